//! Taking over a process that an earlier supervisor launched, instead of launching one.
//!
//! Whether it may be kept is decided here, by comparing what it was launched as with what would be launched now; what
//! follows from that is the lifecycle's business.

use std::time::Duration;

use plugvisor_core::{
    Code, Error, Generation,
    event::{Exit, ExitKind, PluginEvent, ResourceEvent, SecurityEvent},
    lifecycle::{Event, Phase},
};
use plugvisor_sandbox::protocol::{self, Control, ControlState, Known, Over, RefusalCode};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::{Driver, Inward, Run, exit::TAIL, launch::Holding, load::permanent, settings, verify::Verified};
use crate::{
    events::{Events, Subject},
    launcher::{Found, Launcher, LauncherError, Process, Reattachment, signal_name},
    logs::LogStream,
};

/// How long what is killed may take to be gone before it is no longer waited for.
const END: Duration = Duration::from_secs(10);

/// A launch that an earlier supervisor left, handed over by the launcher.
#[derive(Debug)]
pub struct Living {
    /// What it was launched as.
    pub known: Known,
    /// What became of it.
    pub reattachment: Reattachment,
    /// How long nobody supervised it.
    pub gap: Duration,
}

/// A launch that a driver is to take over.
#[derive(Debug)]
pub(super) struct Inherited {
    living: Living,
    /// The last supervisor had not loaded it yet, or was about to end it.
    halfway: bool,
}

impl Living {
    /// Whether a process of it runs.
    #[must_use]
    pub fn is_up(&self) -> bool {
        matches!(self.reattachment.state, Found::Up(_))
    }

    /// Ends what is not to be kept, and waits until it is gone.
    pub async fn reap(self, launcher: &Launcher, events: &Events, subject: Subject, why: String) {
        if let Found::Up(process) = self.reattachment.state {
            events.publish(subject, PluginEvent::OrphanReaped { why });
            end(launcher, *process).await;
        }
        acknowledge(launcher, self.known.launch).await;
    }
}

pub(super) async fn end(launcher: &Launcher, process: Process) {
    let Process { launched, mut notices, .. } = process;
    match launcher.kill(launched.launch).await {
        Ok(()) => {}
        // Its end is on the way.
        Err(LauncherError::Refused(refusal)) if refusal.code == RefusalCode::UnknownLaunch => {}
        Err(error) => tracing::warn!(launch = launched.launch.0, %error, "a process could not be killed"),
    }
    // The channel ends behind the notice of the end, or with the launcher.
    if timeout(END, async { while notices.recv().await.is_some() {} }).await.is_err() {
        tracing::warn!(launch = launched.launch.0, "a killed process is not gone yet");
    }
}

pub(super) async fn acknowledge(launcher: &Launcher, launch: protocol::LaunchId) {
    if let Err(error) = launcher.acknowledge(launch).await {
        tracing::debug!(launch = launch.0, %error, "what was kept of a launch was not acknowledged");
    }
}

impl Driver {
    /// Has the driver take a process over as the first thing that it does.
    #[must_use]
    pub fn taking_over(mut self, living: Option<Living>) -> Self {
        // Nothing is remembered when the state was lost; then only its health can tell.
        let last = self.view.borrow().transitions.back().map(|transition| transition.to.clone());
        let halfway = last.is_some_and(|state| !["LOADED", "LOADED (degraded)"].contains(&state.as_ref()));
        self.living = living.map(|living| Box::new(Inherited { living, halfway }));
        self
    }

    pub(super) async fn take_over(&mut self, inherited: Inherited) {
        let Inherited { living, halfway } = inherited;
        let generation = Generation(living.known.generation);
        if halfway && living.is_up() {
            return self.reap_and_load(living, "it was not loaded, or on its way out".to_owned()).await;
        }
        if generation < self.life.generation() || generation == Generation::NONE {
            let why = format!("it is of generation {generation}, and {} has begun since", self.life.generation());
            return self.reap_and_load(living, why).await;
        }
        if let Found::Up(process) = &living.reattachment.state {
            let unallowed = process.unallowed(&self.shared.allow_degraded);
            if !unallowed.is_empty() {
                let names: Vec<&str> = unallowed.iter().map(|state| state.control.as_str()).collect();
                let why = format!("it is without {}, which allow_degraded does not name", names.join(", "));
                return self.reap_and_load(living, why).await;
            }
        }
        let Living { known, reattachment: Reattachment { state, stdout, stderr }, gap } = living;
        for (stream, output) in [(LogStream::Stdout, stdout), (LogStream::Stderr, stderr)] {
            match output.read() {
                Ok((bytes, lost)) => self.shared.logs.kept(&self.name, generation.0, stream, &bytes, lost),
                Err(error) => tracing::warn!(plugin = %self.name, %error, "what it printed meanwhile cannot be read"),
            }
        }
        let (launch, age) = (known.launch, Duration::from_nanos(known.age_nanos));
        let memory_limit = known.limits.memory_bytes;
        self.run = Some(Run {
            generation,
            cancel: CancellationToken::new(),
            began: Instant::now(),
            start: None,
            verified: None,
            process: None,
            adopted: Some(Box::new(known)),
            registered: false,
        });
        match state {
            Found::Up(process) => {
                let now = Instant::now();
                let manifest = self.view.borrow().bundle.as_ref().map(|bundle| bundle.manifest.clone());
                let startup = manifest.map(|manifest| settings::startup_time(&manifest, &self.config.health));
                let holding = Holding {
                    launched_at: now.checked_sub(age).unwrap_or(now),
                    deadline: now + startup.unwrap_or(crate::config::defaults::STARTUP_TIMEOUT),
                    memory_limit,
                };
                let missing = self.hold(generation, *process, holding);
                if !missing.is_empty() {
                    self.tell(generation, SecurityEvent::SandboxDegraded { missing });
                }
                self.spawn_acknowledgement(launch);
                // Discovered and not older: it is accepted.
                let _ = self.apply(Event::Reattached { generation, ready_for: age, gap }).await;
            }
            Found::Over(over) => {
                let ran = age.saturating_sub(Duration::from_nanos(over.ago_nanos));
                let _ = self.apply(Event::Reattached { generation, ready_for: ran, gap }).await;
                if over.oom_killed {
                    self.tell(generation, ResourceEvent::OomKilled { limit_bytes: memory_limit });
                }
                let exit = self.exit_of(generation, over, ran);
                let _ = self.apply(Event::Exited { generation, exit }).await;
                self.spawn_acknowledgement(launch);
            }
        }
    }

    fn exit_of(&self, generation: Generation, over: Over, ran: Duration) -> Exit {
        let kind = match over.exit {
            protocol::Exit::Code(code) => ExitKind::Code(code),
            protocol::Exit::Signal(signal) => ExitKind::Signal(signal_name(signal)),
        };
        let stderr_tail = self.shared.logs.stderr_tail(&self.name, generation.0, TAIL);
        Exit { kind, oom: over.oom_killed, uptime_ms: super::millis(ran), stderr_tail }
    }

    async fn reap_and_load(&mut self, living: Living, why: String) {
        let (launcher, events) = (self.shared.launcher.clone(), self.shared.events.clone());
        let subject = Subject::Generation(self.name.clone(), Generation(living.known.generation));
        living.reap(&launcher, &events, subject, why).await;
        let _ = self.apply(Event::LoadRequested).await;
    }

    /// Lets the plugin's own calls in once others that were taken over can answer them. They wait in the queue of its
    /// broker socket.
    pub(super) fn admit_later(&mut self, generation: Generation) {
        let mut reattached = self.shared.reattached.clone();
        self.spawn(generation, async move {
            // An error means that the supervisor is going; then it makes no difference.
            let _ = reattached.wait_for(|all| *all).await;
            Some(Inward::Admit(generation))
        });
    }

    pub(super) async fn admit(&mut self, generation: Generation) {
        if let Err(failure) = self.add_caller(generation).await {
            tracing::error!(plugin = %self.name, error = %failure.error, "its calls are not accepted");
        }
    }

    /// Tells the launcher that it need not keep what it kept of this launch.
    pub(super) fn spawn_acknowledgement(&self, launch: protocol::LaunchId) {
        let launcher = self.shared.launcher.clone();
        self.tasks.spawn(async move { acknowledge(&launcher, launch).await });
    }

    /// The bundle was judged. What runs already must be what would be launched now.
    pub(super) async fn judged(&mut self, generation: Generation, verified: Verified) {
        let allow_degraded = self.shared.allow_degraded.clone();
        let config = self.config.clone();
        let Some(run) = self.of(generation) else { return };
        let difference = match (&run.adopted, &run.process) {
            (Some(known), Some(running)) => {
                let environment = protocol::environment_digest(&settings::environment(&verified.verdict, &config));
                let inward = settings::inward(&verified.verdict, &config);
                difference(known, &running.view.controls, &verified, environment, &allow_degraded)
                    .or_else(|| (known.inward != inward).then_some("how many connections to it there may be"))
            }
            (Some(_) | None, _) => None,
        };
        let phase = Phase::Verify;
        if let Some(what) = difference {
            let message = format!("{what} changed while no supervisor was there");
            let failure = permanent(Error::new(Code::PluginWrongState, message, "nothing to do: it is loaded anew"));
            let _ = self.apply(Event::PhaseFailed { generation, phase, failure }).await;
            return;
        }
        run.verified = Some(verified);
        // Of a process that was taken over; any other is not there yet.
        self.open_egress(generation);
        self.verified().await;
        self.done(generation, phase).await;
    }
}

/// What of a launch differs from what would be launched now.
fn difference(
    known: &Known,
    controls: &[ControlState],
    verified: &Verified,
    environment: [u8; 32],
    allow_degraded: &[Control],
) -> Option<&'static str> {
    let Verified { info, verdict, .. } = verified;
    let grants = protocol::Grant::of_all(verdict.granted().iter());
    let asked = settings::kernel_limits(&verdict.limits);
    // A limit that this host cannot enforce was not in force at the launch either.
    let lacking =
        |control| controls.iter().any(|state: &ControlState| state.control == control && state.enforced.is_none());
    let in_force = protocol::Limits {
        memory_bytes: asked.memory_bytes.filter(|_| !lacking(Control::MemoryLimit)),
        cpu_percent: asked.cpu_percent.filter(|_| !lacking(Control::CpuLimit)),
        pids: asked.pids.filter(|_| !lacking(Control::PidsLimit)),
        ..asked
    };
    let known_limits = protocol::Limits {
        memory_bytes: known.limits.memory_bytes.filter(|_| !lacking(Control::MemoryLimit)),
        cpu_percent: known.limits.cpu_percent.filter(|_| !lacking(Control::CpuLimit)),
        pids: known.limits.pids.filter(|_| !lacking(Control::PidsLimit)),
        ..known.limits.clone()
    };
    if known.bundle != *info.digest.as_bytes() {
        Some("its bundle")
    } else if known.tier < protocol::Tier::from(verdict.tier) {
        // The launcher judged it at the launch and at nothing else. What the supervisor itself grants by the tier must not
        // rest on an approval or a directory that nobody has judged.
        Some("its tier")
    } else if known.level != protocol::Level::from(verdict.level) {
        Some("its isolation level")
    } else if known.grants != grants {
        Some("its capabilities")
    } else if known.environment != environment {
        Some("its environment")
    } else if known_limits != in_force {
        Some("its limits")
    } else if known.allow_degraded != allow_degraded {
        Some("what may be missing on this host")
    } else {
        None
    }
}
