//! The states of a plugin, and what each of them remembers.

use std::{fmt, time::Duration};

use crate::{Error, Time};

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
    /// Where its process comes from.
    pub origin: Origin,
    /// Set when the load is being undone, and what remains is to see the process end.
    pub stopping: Option<Stopping>,
}

/// Where the process of a load comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It is launched in the phase [`Launch`](Phase::Launch).
    Launched,
    /// An earlier supervisor launched it, and it runs from the beginning of this load. The phases are verify, handshake
    /// and register: its dependencies were there when it was launched, and it was initialised then.
    Adopted {
        /// How long it had been ready, as far as is known.
        ready_for: Duration,
        /// How long nobody supervised it before this load.
        gap: Duration,
    },
}

impl Loading {
    /// The phase after the present one; `None` after the last.
    #[must_use]
    pub const fn next(&self) -> Option<Phase> {
        match (self.origin, self.phase) {
            (Origin::Adopted { .. }, Phase::Verify) => Some(Phase::Handshake),
            (Origin::Adopted { .. }, Phase::Handshake) => Some(Phase::Register),
            (Origin::Adopted { .. } | Origin::Launched, phase) => phase.next(),
        }
    }

    /// Whether a process of it runs or may be about to.
    #[must_use]
    pub fn has_process(&self) -> bool {
        match self.origin {
            Origin::Launched => self.phase >= Phase::Launch,
            Origin::Adopted { .. } => true,
        }
    }
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
    /// A new load, as somebody asked for.
    Restart,
    /// A new load, because what runs is not what is to run.
    Renew,
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
            Self::Renew => "renew",
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
