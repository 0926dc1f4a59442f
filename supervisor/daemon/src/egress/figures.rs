//! What passed through a plugin's proxy, over all its generations.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use crate::meter::Traffic;

/// Counters.
#[derive(Debug, Default)]
pub struct Figures {
    traffic: Arc<Traffic>,
    denials: AtomicU64,
}

impl Figures {
    pub(super) fn traffic(&self) -> Arc<Traffic> {
        Arc::clone(&self.traffic)
    }

    pub(super) fn denied(&self) {
        self.denials.fetch_add(1, Ordering::Relaxed);
    }

    /// Bytes that the plugin sent to its destinations.
    #[must_use]
    pub fn bytes_out(&self) -> u64 {
        self.traffic.bytes_out()
    }

    /// Bytes that it received from them.
    #[must_use]
    pub fn bytes_in(&self) -> u64 {
        self.traffic.bytes_in()
    }

    /// Requests that were refused.
    #[must_use]
    pub fn denials(&self) -> u64 {
        self.denials.load(Ordering::Relaxed)
    }
}
