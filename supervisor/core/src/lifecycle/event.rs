//! What comes into [`step`](super::step) and what comes out of it.

use std::time::Duration;

use super::{Failure, Phase};
use crate::{
    Generation,
    event::{Exit, PluginEvent},
};

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
    /// Request: take over a process that an earlier supervisor launched and that its launcher kept.
    Reattached {
        /// The generation that it was launched as; not older than any that is known.
        generation: Generation,
        /// How long it had been ready, as far as is known.
        ready_for: Duration,
        /// How long nobody has supervised it.
        gap: Duration,
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
            Self::Reattached { .. } => "reattached",
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
            | Self::QuarantineRequested { .. }
            // It brings its generation with it.
            | Self::Reattached { .. } => None,
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
        /// Why: the name of a [`Then`](super::Then).
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
