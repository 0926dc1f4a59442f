//! What became of the connections to a plugin, over all its generations.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use crate::meter::Traffic;

/// How a connection from outside went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Both sides ended it.
    Ended,
    /// One side broke it off.
    Broken,
    /// Nothing passed for too long.
    Idle,
    /// The plugin's process ended, and the other side did not take the rest in time.
    Cut,
    /// No generation of the plugin was ready in time.
    NotReady,
    /// No socket was free in time.
    NoSocket,
    /// The plugin does not listen at the port.
    Refused,
    /// The plugin did not take it in time.
    NotTaken,
    /// The kernel refused something.
    Failed,
}

impl Outcome {
    /// Every outcome.
    pub const ALL: [Self; 9] = [
        Self::Ended,
        Self::Broken,
        Self::Idle,
        Self::Cut,
        Self::NotReady,
        Self::NoSocket,
        Self::Refused,
        Self::NotTaken,
        Self::Failed,
    ];

    /// The name in metrics and events.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ended => "ended",
            Self::Broken => "broken",
            Self::Idle => "idle",
            Self::Cut => "cut",
            Self::NotReady => "not_ready",
            Self::NoSocket => "no_socket",
            Self::Refused => "refused",
            Self::NotTaken => "not_taken",
            Self::Failed => "failed",
        }
    }
}

/// Counters.
#[derive(Debug, Default)]
pub struct Figures {
    traffic: Arc<Traffic>,
    outcomes: [AtomicU64; Outcome::ALL.len()],
    open: AtomicU64,
    lost: Arc<AtomicU64>,
}

impl Figures {
    pub(super) fn traffic_counter(&self) -> Arc<Traffic> {
        Arc::clone(&self.traffic)
    }

    pub(super) fn ended(&self, outcome: Outcome) {
        self.outcomes[outcome as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a connection as open until what is returned is dropped.
    pub(super) fn open(self: &Arc<Self>) -> Open {
        self.open.fetch_add(1, Ordering::Relaxed);
        Open(Arc::clone(self))
    }

    /// Where sockets that cannot be used again are counted.
    pub(super) fn lost(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.lost)
    }

    /// What passed.
    #[must_use]
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// Connections that went so.
    #[must_use]
    pub fn outcomes(&self, outcome: Outcome) -> u64 {
        self.outcomes[outcome as usize].load(Ordering::Relaxed)
    }

    /// Connections that were accepted and are not over.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.open.load(Ordering::Relaxed)
    }

    /// Sockets into the plugin that could not be used again.
    #[must_use]
    pub fn sockets_lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

/// An open connection.
#[derive(Debug)]
pub(super) struct Open(Arc<Figures>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_has_a_place_of_its_own() {
        let figures = Figures::default();
        for (index, outcome) in Outcome::ALL.into_iter().enumerate() {
            assert_eq!(outcome as usize, index);
            figures.ended(outcome);
            assert_eq!(figures.outcomes(outcome), 1, "{}", outcome.as_str());
        }
    }
}
