//! Which controls work on this host, found by using them: trial launches of the launcher's own program through every wall,
//! the strongest level first, and one trial group with every limit. A kernel's version or a file's presence proves nothing.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use plugvisor_sandbox::protocol::{
    Control, Exit, Host, Lacking, Launch, Level, Limits, ProbeState, Probed, ProbedLevel, SocketMode, Tier,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{WaitId, WaitIdOptions, waitid},
};

use crate::{
    check::Checked,
    child::Entry,
    creds::Identity,
    kernel,
    launch::{Launcher, Program, Running, may_be_allowed, remove_sockets},
    level, own_program,
    step::{self, Step},
};

/// The only argument with which the launcher, executed behind the walls, ends at once.
pub(crate) const TRIAL: &str = "--trial";

const TRIAL_TIME: Duration = Duration::from_secs(5);

/// What the trial found.
#[derive(Debug, Default)]
pub(crate) struct Trial {
    /// The controls of PROCESS and above that failed, and how.
    failed: Vec<(Control, String)>,
    /// Why nothing can be launched at NONE.
    none: Option<String>,
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
        match self.cgroups.create("trial", &limits, 1) {
            Ok(mut groups) => {
                groups.remove();
            }
            Err(error) => trial.failed.push((error.control, error.why)),
        }
        let mut level = Level::Sandbox;
        loop {
            let mut walls = self.try_walls(level);
            if let Err(TrialError { step: Some(Step::Cgroup), why }) = &walls {
                // Groups that nobody can join hold nothing; the walls are tried again without them.
                self.cgroups.give_up(why);
                walls = self.try_walls(level);
            }
            let Err(error) = walls else { break };
            let controls = self.concerned(level, error.step);
            // What fails at a weaker level too is no more than that; else the weaker one is tried without it.
            let weaker = controls.iter().map(|control| Level::first_with(*control)).min();
            trial.failed.extend(controls.into_iter().map(|control| (control, error.why.clone())));
            level = match (level, weaker) {
                (Level::Sandbox, Some(Level::Sandbox)) => Level::Container,
                (Level::Sandbox | Level::Container, Some(Level::Container)) => Level::Process,
                _ => break,
            };
        }
        self.look_for_machines();
        self.machines.settle();
        let none = self.try_walls(Level::None).err();
        trial.none = none.map(|error| error.why);
        self.trial = trial;
    }

    /// The controls that a failure at this step of this level leaves in doubt.
    fn concerned(&self, level: Level, step: Option<Step>) -> Vec<Control> {
        match (step.and_then(Step::control), level) {
            (Some(Control::MountNamespace | Control::PidNamespace), _) => self.resting_on_namespaces(),
            (Some(control), _) => vec![control],
            // It did not say: whatever this level adds to the next one.
            (None, Level::Sandbox | Level::Container) => {
                Control::ALL.into_iter().filter(|control| Level::first_with(*control) == level).collect()
            }
            (None, _) => self.resting_on_namespaces(),
        }
    }

    /// What falls with the namespaces.
    fn resting_on_namespaces(&self) -> Vec<Control> {
        let mut controls = vec![
            Control::MountNamespace,
            Control::PidNamespace,
            Control::IpcNamespace,
            Control::NetworkNamespace,
            Control::UtsNamespace,
            Control::CgroupNamespace,
            Control::WholeKill,
            Control::DiesWithLauncher,
        ];
        if !self.privileged() && self.cgroups.place(Control::PidsLimit).is_err() {
            controls.push(Control::PidsLimit);
        }
        controls
    }

    fn try_walls(&mut self, level: Level) -> Result<(), TrialError> {
        let plain = |error: io::Error| TrialError { step: None, why: format!("a trial launch failed: {error}") };
        let request = Launch {
            plugin: "trial".to_owned(),
            generation: 0,
            level,
            bundle: [0; 32],
            tier: Tier::Untrusted,
            approval: None,
            limits: Limits { pids: Some(4), ..Limits::default() },
            grants: Vec::new(),
            environment: Vec::new(),
            inward: 0,
            allow_degraded: Control::ALL.to_vec(),
        };
        let own = own_program::sealed().map_err(plain)?;
        let here: OwnedFd = File::open(".").map_err(plain)?.into();
        let path = std::env::current_dir().map_err(plain)?;
        let argv = vec![c"plugvisor-launcher".to_owned(), c"--trial".to_owned()];
        let plugin = request.plugin.parse().expect("a plugin's name");
        let walls = level::walls(level);
        let checked =
            Checked { plugin, walls, argv, envp: Vec::new(), socket: SocketMode::Inherit, listen: Vec::new() };
        let program = Program {
            directory: here.as_fd(),
            path: &path,
            entry: Entry::Sealed(own.as_fd()),
            identity: Some(Identity::copier(&self.options.uids)),
            machine: &[],
            device: None,
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
            let asks = running.listener.as_ref();
            let mut fds = vec![PollFd::new(&running.init, PollFlags::IN)];
            if !running.report_closed {
                fds.push(PollFd::new(&running.report, PollFlags::IN));
            }
            fds.extend(asks.map(|listener| PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)));
            let _ = poll(&mut fds, Some(&timeout));
            let asked = asks.is_some() && fds.last().is_some_and(|fd| fd.revents().contains(PollFlags::IN));
            if asked {
                running.let_execute();
            }
            running.drain();
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

    /// Why nothing can be launched at this level, whatever is allowed to be missing.
    pub(crate) fn missing(&self, level: Level) -> Option<&str> {
        self.trial.none.as_deref().filter(|_| level == Level::None)
    }

    /// Why this control cannot be enforced here at this level; `None` when it can.
    pub(crate) fn lacking(&self, level: Level, control: Control) -> Option<String> {
        let tried =
            |control| self.trial.failed.iter().find(|(failed, _)| *failed == control).map(|(_, why)| why.clone());
        let limit = || self.cgroups.place(control).err().or_else(|| tried(control).filter(|_| level > Level::None));
        match (control, level) {
            (Control::OwnUid, _) if !self.privileged() => Some(format!(
                "the launcher runs as uid {}, which may use no other uid; the plugin keeps its supplementary groups too",
                rustix::process::geteuid().as_raw()
            )),
            (Control::OwnKernel, _) => self.machines.lacking().map(str::to_owned),
            (Control::Landlock, _) if self.landlock == 0 => Some("this kernel has no Landlock".to_owned()),
            (Control::MemoryLimit | Control::CpuLimit, _) | (Control::PidsLimit, Level::None) => limit(),
            (Control::PidsLimit, _) if self.privileged() => limit(),
            (Control::WholeKill | Control::DiesWithLauncher, Level::None) => self.cgroups.kills().err().map(|why| {
                format!(
                    "without a PID namespace only a cgroup ends every process of a plugin, and there is none: {why}"
                )
            }),
            (_, Level::None) => None,
            _ => tried(control),
        }
    }

    /// Every control with its mechanism, or what is missing and the fix; and every level.
    pub(crate) fn probed(&self) -> Host {
        let state = |control| match self.lacking(Level::Sandbox, control) {
            None => ProbeState::Works(self.mechanism(control)),
            Some(why) => ProbeState::Lacking { why, fix: step::fix(control).to_owned() },
        };
        // Where nobody has named a kernel, none is missed; the level says that it has none.
        let shown = |control: &Control| *control != Control::OwnKernel || self.machines.are_wanted();
        let all = Control::ALL.into_iter().filter(shown);
        let controls = all.map(|control| Probed { control, state: state(control) }).collect();
        let levels = Level::ALL.into_iter().map(|level| ProbedLevel { level, lacking: self.lacks(level) }).collect();
        Host { controls, levels }
    }

    fn lacks(&self, level: Level) -> Vec<Lacking> {
        let whole = |why: &str, fix: &str| {
            vec![Lacking { control: None, why: why.to_owned(), fix: fix.to_owned(), may_be_allowed: false }]
        };
        if let Some(why) = self.missing(level) {
            return whole(why, step::FIX_NAMESPACES);
        }
        let lacking = level.controls().filter_map(|control| {
            Some(Lacking {
                control: Some(control),
                why: self.lacking(level, control)?,
                fix: step::fix_at(level, control).to_owned(),
                may_be_allowed: may_be_allowed(level, control),
            })
        });
        lacking.collect()
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
            Control::NetworkNamespace => format!("network {namespace}"),
            Control::UtsNamespace => format!("UTS {namespace}"),
            Control::CgroupNamespace => format!("cgroup {namespace}"),
            Control::NoWriteExec => match kernel::refuses_exec_gain() {
                Some(_) => "PR_SET_MDWE, and the allow-list".to_owned(),
                None => "the allow-list; this kernel has no PR_SET_MDWE".to_owned(),
            },
            Control::SingleExec => "seccomp notification, answered once".to_owned(),
            Control::Seccomp => "a deny-list, and at sandbox an allow-list".to_owned(),
            Control::Landlock => format!("Landlock version {}", self.landlock),
            Control::MemoryLimit | Control::CpuLimit => self.cgroups.place(control).unwrap_or_default(),
            Control::PidsLimit => {
                self.cgroups.place(control).unwrap_or_else(|_| "RLIMIT_NPROC in a user namespace of its own".to_owned())
            }
            Control::WholeKill => "the end of the PID namespace's init".to_owned(),
            Control::OwnKernel => self.machines.mechanism(),
            Control::DiesWithLauncher => "parent-death signal of the PID namespace's init".to_owned(),
        }
    }
}
