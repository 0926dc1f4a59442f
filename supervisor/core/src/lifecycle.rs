//! A plugin's life: its states, what changes them, and what is to be done at each change.
//!
//! [`step`] is the one function that changes a state. It is pure: the driver of a plugin feeds it [`Event`]s in the
//! order in which they happened and carries out the [`Effect`]s in the order in which they are returned. The diagram in
//! `docs/lifecycle.md` is produced from it, and a test holds the two together.
//!
//! Two kinds of events come in. *Requests* (load, unload, restart, stop, quarantine) are refused when the state does
//! not admit them, and nothing changes. *Reports* carry the generation that they speak of; one that speaks of another
//! generation, or of a phase or stage that is over, is stale and is ignored.
//!
//! Promises, held by property tests: a process is launched only in LOADING(launch), and no second one before the first
//! is gone; a state without a process is entered only when the process is known to be gone; what was launched is
//! terminated or killed; calls are routed only while LOADED and serving.

#[cfg(test)]
mod diagram;
mod step;
#[cfg(test)]
mod tests;

use std::{fmt, time::Duration};

use plugvisor_package::PluginName;

pub use self::step::step;
use crate::{
    Error, Generation, Jitter, Time,
    event::{Exit, PluginEvent},
    restart::{RestartPolicy, Restarts},
};

/// The steps of a load, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Read the bundle and the policy; wait for dependencies.
    Resolve,
    /// Hash the entry and check what can be checked.
    Verify,
    /// Have the launcher start the process.
    Launch,
    /// Wait until its health service says SERVING.
    Handshake,
    /// Hand over configuration and grants.
    Init,
    /// Route calls to it.
    Register,
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Self; 6] = [Self::Resolve, Self::Verify, Self::Launch, Self::Handshake, Self::Init, Self::Register];

    /// The phase's name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Resolve => "resolve",
            Self::Verify => "verify",
            Self::Launch => "launch",
            Self::Handshake => "handshake",
            Self::Init => "init",
            Self::Register => "register",
        }
    }

    /// The phase that follows; `None` after the last.
    #[must_use]
    pub const fn next(self) -> Option<Self> {
        match self {
            Self::Resolve => Some(Self::Verify),
            Self::Verify => Some(Self::Launch),
            Self::Launch => Some(Self::Handshake),
            Self::Handshake => Some(Self::Init),
            Self::Init => Some(Self::Register),
            Self::Register => None,
        }
    }

    /// How much of the load is done when the phase begins, in percent.
    #[must_use]
    pub const fn percent(self) -> u8 {
        match self {
            Self::Resolve => 0,
            Self::Verify => 15,
            Self::Launch => 30,
            Self::Handshake => 50,
            Self::Init => 80,
            Self::Register => 95,
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The state of a plugin.
#[derive(Clone, Debug, PartialEq)]
pub enum State {
    /// Nothing is known of it but its name.
    Unknown,
    /// Its bundle was found; it was never loaded.
    Discovered,
    /// It is being loaded, or a load is being undone.
    Loading(Loading),
    /// It runs and was ready once.
    Loaded(Loaded),
    /// It was loaded, or was to be; nothing of it runs, and nobody wants it to.
    Unloaded,
    /// It could not be loaded, or ended unasked; nothing of it runs.
    Failed(Failed),
    /// It is never started.
    Quarantined,
}

impl State {
    /// The name, in the capitals of the documentation.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Unknown => "UNKNOWN",
            Self::Discovered => "DISCOVERED",
            Self::Loading(_) => "LOADING",
            Self::Loaded(_) => "LOADED",
            Self::Unloaded => "UNLOADED",
            Self::Failed(_) => "FAILED",
            Self::Quarantined => "QUARANTINED",
        }
    }
}

/// A load under way.
#[derive(Clone, Debug, PartialEq)]
pub struct Loading {
    /// The phase that it is in, or was in when it was stopped.
    pub phase: Phase,
    /// When the load began.
    pub began: Time,
    /// Set when the load is being undone, and what remains is to see the process end.
    pub stopping: Option<Stopping>,
}

/// A plugin that was ready once.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// Whether it takes calls.
    pub condition: Condition,
    /// The longest time that it was ready without a break, not counting the present one.
    pub longest_ready: Duration,
}

/// The condition of a loaded plugin.
#[derive(Clone, Debug, PartialEq)]
pub enum Condition {
    /// It takes calls.
    Serving {
        /// Since when.
        since: Time,
    },
    /// Its readiness probe fails; calls are refused until it succeeds again.
    Degraded {
        /// Since when.
        since: Time,
    },
    /// It takes no new calls and is on its way out.
    Draining(Stopping),
}

impl Condition {
    /// The condition's name.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Serving { .. } => "serving",
            Self::Degraded { .. } => "degraded",
            Self::Draining(_) => "draining",
        }
    }
}

/// A process on its way out.
#[derive(Clone, Debug, PartialEq)]
pub struct Stopping {
    /// How far it is.
    pub stage: Stage,
    /// What comes when it is gone.
    pub then: Then,
}

/// The stages of a stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The launch was asked for and not answered; a process that comes of it is killed at once.
    AwaitLaunch,
    /// Its calls in flight are given time to end.
    Drain,
    /// It was asked to end.
    Terminate,
    /// It is being killed.
    Kill,
}

/// What comes after a stop.
#[derive(Clone, Debug, PartialEq)]
pub enum Then {
    /// FAILED, and perhaps a restart.
    Fail(Failure),
    /// A new load.
    Restart,
    /// UNLOADED.
    Unload,
    /// UNLOADED, because the supervisor stops.
    Stop,
    /// QUARANTINED.
    Quarantine {
        /// Who did it.
        by: String,
    },
}

impl Then {
    /// The text of `why` in the event `stopping`.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Fail(_) => "failure",
            Self::Restart => "restart",
            Self::Unload => "unload",
            Self::Stop => "shutdown",
            Self::Quarantine { .. } => "quarantine",
        }
    }
}

/// A load that failed, or a process that ended unasked.
#[derive(Clone, Debug, PartialEq)]
pub struct Failed {
    /// Why.
    pub error: Error,
    /// The next restart; `None` when there is none.
    pub restart: Option<Scheduled>,
}

/// A restart to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheduled {
    /// When.
    pub at: Time,
    /// Counts the restarts since failures were last forgiven, from 1.
    pub attempt: u32,
    /// Whether the plugin is in a crash loop.
    pub crash_loop: bool,
}

/// Why a phase failed.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// What went wrong.
    pub error: Error,
    /// Whether trying again could help.
    pub permanence: Permanence,
    /// The plugin's last lines on stderr; empty before it was launched.
    pub stderr_tail: Vec<String>,
}

/// Whether trying again could help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permanence {
    /// It could: the back-off decides when.
    Transient,
    /// It could not, until somebody changes something.
    Permanent,
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Its bundle was found, or found again.
    Discovered {
        /// The bundle's directory.
        directory: String,
    },
    /// Its bundle is no longer there. A plugin that runs goes on running.
    Removed,
    /// Request: load it.
    LoadRequested,
    /// Request: stop it if it runs, and load it anew.
    RestartRequested,
    /// Request: stop it and leave it stopped.
    UnloadRequested,
    /// Request: the supervisor stops.
    StopRequested(Haste),
    /// Request: kill it and never start it again.
    QuarantineRequested {
        /// Who asks.
        by: String,
    },
    /// Report: the phase succeeded. For `Launch`: the process runs; for `Handshake`: its health says SERVING.
    PhaseDone {
        /// The generation that this speaks of.
        generation: Generation,
        /// Which phase.
        phase: Phase,
    },
    /// Report: the phase failed, or took too long. For `Launch`: no process runs.
    PhaseFailed {
        /// The generation that this speaks of.
        generation: Generation,
        /// Which phase.
        phase: Phase,
        /// Why.
        failure: Failure,
    },
    /// Report: it is no longer ready.
    ReadyLost {
        /// The generation that this speaks of.
        generation: Generation,
    },
    /// Report: it is ready again.
    ReadyRegained {
        /// The generation that this speaks of.
        generation: Generation,
    },
    /// Report: it missed too many liveness probes.
    Hung {
        /// The generation that this speaks of.
        generation: Generation,
        /// Probes missed in a row.
        missed: u32,
    },
    /// Report: none of its processes is left. Comes once for each process that was launched.
    Exited {
        /// The generation that this speaks of.
        generation: Generation,
        /// How it ended.
        exit: Exit,
    },
    /// Report: it has no call in flight any more, or the drain time has passed.
    Drained {
        /// The generation that this speaks of.
        generation: Generation,
        /// Calls still in flight.
        inflight_left: u32,
    },
    /// Report: the grace of [`Effect::Terminate`] has passed.
    GracePassed {
        /// The generation that this speaks of.
        generation: Generation,
    },
    /// Report: the delay of [`Effect::ScheduleRestart`] has passed.
    RestartDue {
        /// The generation that failed.
        generation: Generation,
    },
}

/// How a supervisor stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Haste {
    /// Drain, ask, and only then kill.
    Gentle,
    /// Kill at once.
    Now,
}

impl Event {
    /// The event's name, for refusals and the diagram.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Discovered { .. } => "discovered",
            Self::Removed => "removed",
            Self::LoadRequested => "load",
            Self::RestartRequested => "restart",
            Self::UnloadRequested => "unload",
            Self::StopRequested(Haste::Gentle) => "stop",
            Self::StopRequested(Haste::Now) => "stop now",
            Self::QuarantineRequested { .. } => "quarantine",
            Self::PhaseDone { .. } => "phase done",
            Self::PhaseFailed { .. } => "phase failed",
            Self::ReadyLost { .. } => "ready lost",
            Self::ReadyRegained { .. } => "ready regained",
            Self::Hung { .. } => "hung",
            Self::Exited { .. } => "exited",
            Self::Drained { .. } => "drained",
            Self::GracePassed { .. } => "grace passed",
            Self::RestartDue { .. } => "restart due",
        }
    }

    /// The generation that a report speaks of; `None` for what is not a report.
    #[must_use]
    pub const fn generation(&self) -> Option<Generation> {
        match self {
            Self::Discovered { .. }
            | Self::Removed
            | Self::LoadRequested
            | Self::RestartRequested
            | Self::UnloadRequested
            | Self::StopRequested(_)
            | Self::QuarantineRequested { .. } => None,
            Self::PhaseDone { generation, .. }
            | Self::PhaseFailed { generation, .. }
            | Self::ReadyLost { generation }
            | Self::ReadyRegained { generation }
            | Self::Hung { generation, .. }
            | Self::Exited { generation, .. }
            | Self::Drained { generation, .. }
            | Self::GracePassed { generation }
            | Self::RestartDue { generation } => Some(*generation),
        }
    }
}

/// What the driver is to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Begin a phase; answer with [`Event::PhaseDone`] or [`Event::PhaseFailed`]. `Register` also makes calls be routed
    /// to it.
    Begin {
        /// For this generation.
        generation: Generation,
        /// Which phase.
        phase: Phase,
    },
    /// Route no new call to it. Those in flight go on.
    Withdraw {
        /// For this generation.
        generation: Generation,
    },
    /// Route calls to it again.
    Restore {
        /// For this generation.
        generation: Generation,
    },
    /// Have it finish its calls in flight; answer with [`Event::Drained`] when none is left, at the latest after
    /// `time`.
    Drain {
        /// For this generation.
        generation: Generation,
        /// The longest time.
        time: Duration,
    },
    /// Ask it to end (`Worker.Stop`, then SIGTERM); send [`Event::GracePassed`] after `grace`.
    Terminate {
        /// For this generation.
        generation: Generation,
        /// The time that it has.
        grace: Duration,
        /// Why: the name of a [`Then`].
        why: &'static str,
    },
    /// Kill all of its processes. [`Event::Exited`] follows.
    Kill {
        /// For this generation.
        generation: Generation,
    },
    /// Send [`Event::RestartDue`] after `delay`.
    ScheduleRestart {
        /// The generation that failed.
        generation: Generation,
        /// How long to wait.
        delay: Duration,
    },
    /// The restart that was scheduled is not wanted any more.
    CancelRestart,
    /// Tell the world.
    Emit(PluginEvent),
    /// Drop everything that was kept for the generation: connections, sockets, descriptors, timers, work under way.
    Forget {
        /// Which generation.
        generation: Generation,
    },
}

/// The rules of a life.
#[derive(Clone, Debug, PartialEq)]
pub struct LifePolicy {
    /// Restart and back-off.
    pub restart: RestartPolicy,
    /// Time for calls in flight to end. Default: 10 s.
    pub drain: Duration,
    /// Time from SIGTERM to the kill. Default: 10 s.
    pub grace: Duration,
}

impl Default for LifePolicy {
    fn default() -> Self {
        Self { restart: RestartPolicy::default(), drain: Duration::from_secs(10), grace: Duration::from_secs(10) }
    }
}

/// What [`step`] needs from outside.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// The moment of the event.
    pub now: Time,
    /// Spreads the restart that the event may cause.
    pub jitter: Jitter,
    /// The plugin's rules.
    pub policy: &'a LifePolicy,
}

/// A plugin's state and what must be remembered across states.
#[derive(Clone, Debug, PartialEq)]
pub struct Life {
    name: PluginName,
    state: State,
    generation: Generation,
    restarts: Restarts,
}

impl Life {
    /// A plugin of which nothing is known but its name.
    #[must_use]
    pub fn new(name: PluginName) -> Self {
        Self { name, state: State::Unknown, generation: Generation::NONE, restarts: Restarts::default() }
    }

    /// Its name.
    #[must_use]
    pub const fn name(&self) -> &PluginName {
        &self.name
    }

    /// Its state.
    #[must_use]
    pub const fn state(&self) -> &State {
        &self.state
    }

    /// The generation of the present load, or of the last one.
    #[must_use]
    pub const fn generation(&self) -> Generation {
        self.generation
    }

    /// How often it was restarted after failures.
    #[must_use]
    pub const fn restarts(&self) -> u32 {
        self.restarts.total()
    }

    /// Whether a process of it runs or may be about to.
    #[must_use]
    pub fn has_process(&self) -> bool {
        match &self.state {
            State::Loading(loading) => loading.phase >= Phase::Launch,
            State::Loaded(_) => true,
            State::Unknown | State::Discovered | State::Unloaded | State::Failed(_) | State::Quarantined => false,
        }
    }

    /// [`step`] in place: on a refusal nothing changes.
    ///
    /// # Errors
    ///
    /// As [`step`].
    pub fn apply(&mut self, event: Event, context: Context<'_>) -> Result<Vec<Effect>, RefusedTransition> {
        let (next, effects) = step(self.clone(), event, context)?;
        *self = next;
        Ok(effects)
    }
}

/// A request that the state does not admit. Nothing changed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{error}")]
pub struct RefusedTransition {
    /// The request's name.
    pub request: &'static str,
    /// The state's name.
    pub state: &'static str,
    /// What to tell the requester.
    pub error: Error,
}

impl RefusedTransition {
    /// The event that tells of it.
    #[must_use]
    pub const fn event(&self) -> PluginEvent {
        PluginEvent::Refused { request: self.request, state: self.state }
    }
}
