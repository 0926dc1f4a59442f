//! The launch phase: what is asked of the launcher, what is made of its answer, and what of its refusal.

use std::{path::PathBuf, sync::Arc};

use plugvisor_core::{
    Code, Error, Generation,
    event::{PluginEvent, SecurityEvent},
    lifecycle::{Failure, Permanence, Phase},
};
use plugvisor_package::{Capability, PluginName};
use plugvisor_sandbox::protocol::{self, ControlState, Launch, PolicyFile, RefusalCode};
use tokio::time::Instant;

use super::{
    Driver, Inward, PluginView, ProcessView, Running,
    adopt::{acknowledge, end},
    exit::Watcher,
    load::{failed, permanent, transient},
    settings,
    verify::Verified,
};
use crate::{
    egress::Proxy,
    events::Subject,
    launcher::{Launcher, LauncherError, Process},
    logs::LogStream,
    meter::Meter,
};

/// What an operator can do where a control is missing.
const UNCONTROLLED: &str = "`plugvisor doctor` says the fix, and has the allow_degraded line if it may be done \
     without, which is read when plugvisord starts";

impl Driver {
    pub(super) fn begin_launch(&mut self, generation: Generation) {
        let config = self.config.clone();
        let asked = self.of(generation).and_then(|run| run.verified.as_ref()).map(|verified| {
            let Verified { info, files, verdict, directory_tier, approval } = verified;
            let manifest = &info.manifest;
            let launch = Launch {
                plugin: manifest.name.to_string(),
                generation: generation.0,
                level: verdict.level.into(),
                bundle: *info.digest.as_bytes(),
                tier: verdict.tier.into(),
                approval: approval.as_ref().map(|approval| protocol::Approval {
                    tier: approval.tier.into(),
                    key: approval.key.clone(),
                    signature: approval.signature.to_vec(),
                }),
                limits: settings::kernel_limits(&verdict.limits),
                grants: protocol::Grant::of_all(verdict.granted().iter()),
                environment: settings::environment(verdict, &config),
                inward: settings::inward(verdict, &config),
                allow_degraded: Vec::new(),
            };
            // What an approval adds is found at the launch, not by importing once more.
            (launch, Arc::clone(files), verdict.tier.min(*directory_tier))
        });
        let Some((mut launch, files, tier)) = asked else { return };
        launch.allow_degraded.clone_from(&self.shared.allow_degraded);
        let (launcher, name) = (self.shared.launcher.clone(), self.name.clone());
        let place = Arc::clone(&self.shared.place);
        self.spawn(generation, async move {
            let launched = match launcher.import(files, tier.into()).await {
                Ok(()) => launcher.launch(launch).await,
                Err(error) => Err(error),
            };
            Some(match launched {
                Ok(process) => Inward::Launched(generation, Box::new(process)),
                Err(error) => failed(generation, Phase::Launch, launch_failure(&name, &error, &place)),
            })
        });
    }

    /// A process was launched.
    pub(super) async fn launched(&mut self, generation: Generation, process: Process) {
        let reason = self.start_reason;
        let now = Instant::now();
        let health = self.config.health.clone();
        let unallowed = process.unallowed(&self.shared.allow_degraded);
        let Some(run) = self.of(generation) else {
            // Cannot be: a generation with a launch under way is not forgotten. Nothing may run unowned all the same.
            let _ = self.shared.launcher.kill(process.launched.launch).await;
            return;
        };
        if !unallowed.is_empty() {
            return self.refuse_launched(generation, process, &unallowed);
        }
        let Some(verified) = &run.verified else { return };
        let level = verified.verdict.level.as_str();
        let holding = Holding {
            launched_at: now,
            deadline: now + settings::startup_time(&verified.info.manifest, &health),
            memory_limit: verified.verdict.limits.memory_bytes,
        };
        let (pid, cgroups) = (process.launched.pid, process.launched.cgroups.clone());
        let launch_exec_us = process.launched.launch_exec_nanos / 1_000;
        let parts = process.launched.parts.iter();
        let launch_parts_us = parts.map(|(part, nanos)| (part.clone(), nanos / 1_000)).collect();
        let missing = self.hold(generation, process, holding);
        self.open_egress(generation);
        self.view.send_modify(|seen| {
            *Arc::make_mut(seen).figures.starts.entry(reason).or_insert(0) += 1;
        });
        self.emit(PluginEvent::Starting { pid, cgroups, level, launch_exec_us, launch_parts_us });
        if !missing.is_empty() {
            self.emit(SecurityEvent::SandboxDegraded { missing });
        }
        self.done(generation, Phase::Launch).await;
    }

    /// Ends a process that lacks what nobody allowed it to lack. The launcher refuses such a launch by itself; what it is
    /// trusted for is looked at once more here.
    fn refuse_launched(&mut self, generation: Generation, process: Process, unallowed: &[ControlState]) {
        let told = |state: &ControlState| {
            format!("{} is not confirmed by {}: {}", state.control, state.read_from, state.unavailable)
        };
        let told: Vec<String> = unallowed.iter().map(told).collect();
        let message = format!("plugin {} was launched and is ended again: {}", self.name, told.join("; and "));
        let failure = permanent(Error::new(Code::ControlUnavailable, message, UNCONTROLLED));
        let launcher = self.shared.launcher.clone();
        self.spawn(generation, async move {
            let launch = process.launched.launch;
            end(&launcher, process).await;
            acknowledge(&launcher, launch).await;
            Some(failed(generation, Phase::Launch, failure))
        });
    }

    /// Lets others connect to it by its outer addresses, from when it serves.
    pub(super) fn open_ingress(&mut self, generation: Generation) {
        let Some(front) = self.shared.ingress.front(&self.name) else { return };
        let launcher = self.shared.launcher.clone();
        let Some(run) = self.of(generation) else { return };
        let (Some(running), Some(verified)) = (&run.process, &run.verified) else { return };
        if !verified.verdict.granted().contains(Capability::TcpServer) {
            return;
        }
        let (launch, meter) = (running.view.launch, running.meter.clone());
        front.set_ready(true);
        self.spawn(generation, async move {
            match launcher.inward(launch).await {
                Ok(sockets) => front.stand_before(generation, sockets, meter).await,
                // Of one that has just ended, its end is told too.
                Err(error) => tracing::warn!(%error, "nobody can connect to it; restart the plugin"),
            }
            None
        });
    }

    /// Serves its egress proxy, when it was granted one, from when what it may reach is known.
    pub(super) fn open_egress(&mut self, generation: Generation) {
        let network = self.config.network.clone();
        let Some(run) = self.of(generation) else { return };
        let (Some(running), Some(verified)) = (&mut run.process, &run.verified) else { return };
        running.meter = verified.verdict.limits.network_bytes.map(|rate| Arc::new(Meter::new(rate)));
        let Some(listener) = running.egress.take() else { return };
        let bandwidth = running.meter.clone();
        let rules = settings::egress(&verified.info.manifest, &verified.verdict, network, bandwidth);
        let subject = Subject::Generation(self.name.clone(), generation);
        let figures = Arc::clone(&self.view.borrow().figures.egress);
        let (host, events) = (Arc::clone(&self.shared.egress), Arc::clone(&self.shared.events));
        let proxy = Proxy::new(subject, rules, host, figures, events);
        self.spawn(generation, async move {
            if let Err(error) = proxy.serve(listener).await {
                tracing::error!(%error, "the egress proxy is not served; restart the plugin");
            }
            None
        });
    }

    /// A process runs: show it, read its pipes, wait for its end. Returns the controls that are missing, as the
    /// operator allows.
    pub(super) fn hold(&mut self, generation: Generation, process: Process, holding: Holding) -> Vec<String> {
        let Process { launched, pidfd, broker_listener, worker, stdout, stderr, egress, notices } = process;
        let Holding { launched_at, deadline, memory_limit } = holding;
        let cgroups: Vec<PathBuf> = launched.cgroups.iter().map(PathBuf::from).collect();
        let missing: Vec<String> = launched
            .controls
            .iter()
            .filter(|state| state.enforced.is_none() && self.shared.allow_degraded.contains(&state.control))
            .map(|control| control.control.to_string())
            .collect();
        let (pid, launch) = (launched.pid, launched.launch);
        let view = ProcessView {
            launch,
            pid,
            uid: launched.uid,
            controls: launched.controls,
            directories: launched.directories,
            cgroups,
        };
        let view = Arc::new(view);
        let Some(run) = self.of(generation) else { return missing };
        run.process = Some(Running {
            view: Arc::clone(&view),
            launched_at,
            deadline,
            given: Arc::new(worker),
            broker_listener: Some(broker_listener),
            egress,
            meter: None,
            socket: None,
            worker: None,
        });
        self.view.send_modify(|seen| {
            let seen: &mut PluginView = Arc::make_mut(seen);
            seen.process = Some(Arc::clone(&view));
        });
        let readers = [(LogStream::Stdout, stdout), (LogStream::Stderr, stderr)]
            .map(|(stream, pipe)| {
                let logs = Arc::clone(&self.shared.logs);
                self.tasks.spawn(logs.read(self.name.clone(), generation.0, stream, pipe))
            })
            .into();
        let watcher = Watcher {
            plugin: self.name.clone(),
            generation,
            launch,
            pidfd,
            notices,
            launched_at,
            memory_limit,
            readers,
            launcher: self.shared.launcher.clone(),
            logs: Arc::clone(&self.shared.logs),
            events: Arc::clone(&self.shared.events),
        };
        self.spawn(generation, watcher.run());
        missing
    }
}

/// What is known of a process beside what the launcher hands over.
#[derive(Clone, Copy, Debug)]
pub(super) struct Holding {
    pub(super) launched_at: Instant,
    /// Until when it must be ready.
    pub(super) deadline: Instant,
    pub(super) memory_limit: Option<u64>,
}

/// Problems of the launcher's policy file that are told with an error: an answer's head is short. `plugvisor doctor` tells all.
const MOST_TOLD: usize = 2;

/// Asked before a plugin that runs is stopped for another launch: nothing would come in its place while the launcher refuses
/// every launch, or does not answer.
///
/// # Errors
///
/// Why it is left running.
pub(crate) async fn check_restart(launcher: &Launcher, name: &str) -> Result<(), Error> {
    let refused = |code, why: &str, next: &str| {
        let message = format!("plugin {name} was not restarted and runs on: {why}");
        let hint = format!("{next}, then `plugvisor restart {name}`; `plugvisor unload {name}` stops it all the same");
        Error::new(code, message, hint)
    };
    match launcher.policy().await {
        Ok(PolicyFile::Absent | PolicyFile::Usable { path: _ }) => Ok(()),
        Ok(PolicyFile::Unusable { path: _, why }) => {
            let why = format!("the launcher cannot use its policy: {}", in_one_line(&why));
            let next =
                "correct that file, which is read anew at each launch (`plugvisor doctor` says all that is wrong)";
            Err(refused(Code::LaunchRefused, &why, next))
        }
        Err(error) => {
            let (code, next) = unanswered(&error);
            Err(refused(code, &error.to_string(), next))
        }
    }
}

/// What is wrong with a file, with its first problems.
fn in_one_line(why: &str) -> String {
    let mut lines = why.lines();
    let mut told = lines.next().unwrap_or_default().to_owned();
    let mut join = " ";
    for line in lines.by_ref().take(MOST_TOLD) {
        told.push_str(join);
        told.push_str(line.trim_start());
        join = "; ";
    }
    if lines.next().is_some() {
        told.push_str("; and more");
    }
    told
}

/// What it means that the launcher has not refused, and not done it either.
fn unanswered(error: &LauncherError) -> (Code, &'static str) {
    match error {
        LauncherError::Gone(_) => (Code::LauncherLost, "restart plugvisord"),
        LauncherError::Late(_) => (Code::OperationTimeout, "look at the load of the host"),
        LauncherError::Refused(_) | LauncherError::Request(_) | LauncherError::Mismatch => {
            (Code::Bug, "report this as a bug")
        }
    }
}

fn launch_failure(name: &PluginName, error: &LauncherError, place: &str) -> Failure {
    let message = format!("plugin {name} was not launched: {error}");
    let LauncherError::Refused(refusal) = error else {
        let (code, hint) = unanswered(error);
        return transient(Error::new(code, message, hint));
    };
    let correct = format!(
        "correct the plugin, {place}, or the launcher's policy file, which is read anew at each launch; then `plugvisor load \
         {name}`"
    );
    let (code, permanence, hint) = match refusal.code {
        RefusalCode::Malformed
        | RefusalCode::Version
        | RefusalCode::UnknownLaunch
        | RefusalCode::Busy
        | RefusalCode::NotHeld => (
            Code::Bug,
            Permanence::Permanent,
            "plugvisord and plugvisor-launcher are not of one version: install them together",
        ),
        RefusalCode::Policy => (Code::LaunchRefused, Permanence::Permanent, correct.as_str()),
        // Whoever writes it may be in the middle of it, and no plugin is to blame.
        RefusalCode::PolicyFile => (
            Code::LaunchRefused,
            Permanence::Transient,
            "correct that file; it is read anew at each launch, and nothing has to be restarted",
        ),
        RefusalCode::Approval => (
            Code::LaunchRefused,
            Permanence::Permanent,
            "do what the launcher says of its approval, then `plugvisor load`",
        ),
        RefusalCode::Directory => (
            Code::LaunchRefused,
            Permanence::Permanent,
            "make its directory root's alone as it says, then `plugvisor load`",
        ),
        RefusalCode::LevelUnsupported => (
            Code::LevelNotImplemented,
            Permanence::Permanent,
            "the launcher is of an older version than plugvisord: install them together",
        ),
        RefusalCode::ControlUnavailable => (Code::ControlUnavailable, Permanence::Permanent, UNCONTROLLED),
        RefusalCode::Entry => (Code::EntryWrongFormat, Permanence::Permanent, "build the program for this host"),
        RefusalCode::DigestMismatch => (
            Code::DigestMismatch,
            Permanence::Permanent,
            "the program changed while it was loaded: find out who changed it, then `plugvisor load`",
        ),
        RefusalCode::Exhausted => {
            (Code::ResourceExhausted, Permanence::Transient, "unload another plugin, or raise the limits of the host")
        }
        RefusalCode::UnknownBundle | RefusalCode::InUse => {
            (Code::LaunchRefused, Permanence::Transient, "`plugvisor load` imports the bundle again")
        }
        RefusalCode::File => (Code::BundleInvalid, Permanence::Permanent, "correct the bundle, then `plugvisor load`"),
        RefusalCode::Kernel => {
            (Code::LaunchRefused, Permanence::Transient, "`plugvisor status -o wide` shows what works on this host")
        }
    };
    Failure { error: Error::new(code, message, hint), permanence, stderr_tail: Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::in_one_line;

    #[test]
    fn what_is_wrong_with_a_file_is_one_line_with_its_first_problems() {
        assert_eq!(in_one_line("the file: others may write it"), "the file: others may write it");
        assert_eq!(in_one_line("2 problems:\n  line 1: a\n  line 2: b"), "2 problems: line 1: a; line 2: b");
        assert_eq!(in_one_line("9 problems:\n  a\n  b\n  c\n  and 6 more"), "9 problems: a; b; and more");
    }
}
