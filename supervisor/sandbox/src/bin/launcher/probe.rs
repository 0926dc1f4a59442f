//! Which controls work on this host, found by using them: one trial launch of the launcher's own program through every
//! wall, and one trial group with every limit. A kernel's version or a file's presence proves nothing.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use plugvisor_sandbox::protocol::{Control, Exit, Launch, Level, Limits, ProbeState, Probed, SocketMode};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{WaitId, WaitIdOptions, waitid},
};

use crate::{
    check::Checked,
    child::Entry,
    creds::Identity,
    launch::{Launcher, Program, Running, remove_sockets},
    own_program,
    step::{self, Step},
};

/// The only argument with which the launcher, executed behind the walls, ends at once.
pub(crate) const TRIAL: &str = "--trial";

const TRIAL_TIME: Duration = Duration::from_secs(5);

/// What the trial found.
#[derive(Debug, Default)]
pub(crate) struct Trial {
    /// The controls that failed, and how.
    failed: Vec<(Control, String)>,
}

/// Where a trial launch failed.
struct TrialError {
    step: Option<Step>,
    why: String,
}

impl TrialError {
    fn at(step: Step, errno: i32) -> Self {
        Self { step: Some(step), why: step.refusal("a trial", errno).message }
    }
}

impl Launcher {
    /// Tries every control once. Called before any request is read.
    pub(crate) fn try_controls(&mut self) {
        let mut trial = Trial::default();
        // The groups first, alone: without them the walls can still be tried.
        let limits =
            Limits { memory_bytes: Some(64 << 20), cpu_percent: Some(50), pids: Some(16), ..Limits::default() };
        match self.cgroups.create("trial", &limits) {
            Ok(mut groups) => {
                groups.remove();
            }
            Err(error) => trial.failed.push((error.control, error.why)),
        }
        let mut walls = self.try_walls();
        if let Err(TrialError { step: Some(Step::Cgroup), why }) = &walls {
            // Groups that nobody can join hold nothing; the walls are tried again without them.
            self.cgroups.give_up(why);
            walls = self.try_walls();
        }
        if let Err(error) = walls {
            let controls = match error.step.and_then(Step::control) {
                Some(Control::MountNamespace | Control::PidNamespace) | None => self.resting_on_namespaces(),
                Some(control) => vec![control],
            };
            trial.failed.extend(controls.into_iter().map(|control| (control, error.why.clone())));
        }
        self.trial = trial;
    }

    /// What falls with the namespaces.
    fn resting_on_namespaces(&self) -> Vec<Control> {
        let mut controls = vec![
            Control::MountNamespace,
            Control::PidNamespace,
            Control::IpcNamespace,
            Control::WholeKill,
            Control::DiesWithLauncher,
        ];
        if !self.privileged() && self.cgroups.place(Control::PidsLimit).is_err() {
            controls.push(Control::PidsLimit);
        }
        controls
    }

    fn try_walls(&mut self) -> Result<(), TrialError> {
        let plain = |error: io::Error| TrialError { step: None, why: format!("a trial launch failed: {error}") };
        let request = Launch {
            plugin: "trial".to_owned(),
            generation: 0,
            level: Level::Process,
            bundle: [0; 32],
            approval: None,
            limits: Limits { pids: Some(4), ..Limits::default() },
            grants: Vec::new(),
            allow_degraded: Control::ALL.to_vec(),
        };
        let own = own_program::sealed().map_err(plain)?;
        let here: OwnedFd = File::open(".").map_err(plain)?.into();
        let path = std::env::current_dir().map_err(plain)?;
        let argv = vec![c"plugvisor-launcher".to_owned(), c"--trial".to_owned()];
        let plugin = request.plugin.parse().expect("a plugin's name");
        let checked = Checked { plugin, argv, envp: Vec::new(), socket: SocketMode::Inherit };
        let program = Program {
            directory: here.as_fd(),
            path: &path,
            entry: Entry::Sealed(own.as_fd()),
            identity: Some(Identity::copier(&self.options.uids)),
        };
        match self.start(&request, &checked, &program, Instant::now()) {
            Err(refusal) => Err(TrialError { step: None, why: refusal.message }),
            Ok(mut running) => self.watch_trial(&mut running),
        }
    }

    fn watch_trial(&mut self, running: &mut Running) -> Result<(), TrialError> {
        let deadline = Instant::now() + TRIAL_TIME;
        let mut ended = false;
        while !ended {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                running.kill();
            }
            let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(left.subsec_nanos()).max(1_000_000) };
            let mut fds = [PollFd::new(&running.init, PollFlags::IN)];
            let _ = poll(&mut fds, Some(&timeout));
            let status = waitid(WaitId::PidFd(running.init.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
            ended = !matches!(status, Ok(None));
        }
        running.drain();
        while !running.groups.remove() && Instant::now() < deadline {
            let _ = poll(&mut [], Some(&Timespec { tv_sec: 0, tv_nsec: 1_000_000 }));
        }
        remove_sockets(running.id);
        match (running.failure, running.executing, running.ended) {
            (None, true, Some(Exit::Code(0))) => Ok(()),
            (Some(failure), _, _) => Err(TrialError::at(failure.step, failure.errno)),
            (None, _, ended) => Err(TrialError { step: None, why: format!("a trial launch ended with {ended:?}") }),
        }
    }

    /// Why this control cannot be enforced here; `None` when it can.
    pub(crate) fn lacking(&self, control: Control) -> Option<String> {
        if let Some((_, why)) = self.trial.failed.iter().find(|(failed, _)| *failed == control) {
            return Some(why.clone());
        }
        match control {
            Control::OwnUid if !self.privileged() => Some(format!(
                "the launcher runs as uid {}, which may use no other uid; the plugin keeps its supplementary groups too",
                rustix::process::geteuid().as_raw()
            )),
            Control::Landlock if self.landlock == 0 => Some("this kernel has no Landlock".to_owned()),
            Control::MemoryLimit | Control::CpuLimit => self.cgroups.place(control).err(),
            Control::PidsLimit if self.privileged() => self.cgroups.place(control).err(),
            _ => None,
        }
    }

    /// Every control with its mechanism, or what is missing and the fix.
    pub(crate) fn probed(&self) -> Vec<Probed> {
        let state = |control| match self.lacking(control) {
            None => ProbeState::Works(self.mechanism(control)),
            Some(why) => ProbeState::Lacking { why, fix: step::fix(control).to_owned() },
        };
        Control::ALL.into_iter().map(|control| Probed { control, state: state(control) }).collect()
    }

    fn mechanism(&self, control: Control) -> String {
        let namespace = if self.privileged() { "namespace" } else { "namespace in a user namespace" };
        match control {
            Control::OwnUid => {
                format!("uids {}-{}", self.options.uids.start(), self.options.uids.end())
            }
            Control::NoCapabilities => "empty sets, locked securebits".to_owned(),
            Control::NoNewPrivs => "prctl".to_owned(),
            Control::Rlimits => "setrlimit".to_owned(),
            Control::MountNamespace => format!("mount {namespace}"),
            Control::PidNamespace => format!("PID {namespace}"),
            Control::IpcNamespace => format!("IPC {namespace}"),
            Control::Seccomp => "filters of policy/process.toml".to_owned(),
            Control::Landlock => format!("Landlock version {}", self.landlock),
            Control::MemoryLimit | Control::CpuLimit => self.cgroups.place(control).unwrap_or_default(),
            Control::PidsLimit => {
                self.cgroups.place(control).unwrap_or_else(|_| "RLIMIT_NPROC in a user namespace of its own".to_owned())
            }
            Control::WholeKill => "the end of the PID namespace's init".to_owned(),
            Control::DiesWithLauncher => "parent-death signal of the PID namespace's init".to_owned(),
        }
    }
}
