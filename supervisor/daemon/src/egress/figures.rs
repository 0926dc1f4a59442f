//! What passed through a plugin's proxy, over all its generations.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters.
#[derive(Debug, Default)]
pub struct Figures {
    /// Bytes from the plugin.
    out: AtomicU64,
    /// Bytes to it.
    r#in: AtomicU64,
    denials: AtomicU64,
}

impl Figures {
    pub(super) fn sent(&self, bytes: u64) {
        self.out.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn received(&self, bytes: u64) {
        self.r#in.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn denied(&self) {
        self.denials.fetch_add(1, Ordering::Relaxed);
    }

    /// Bytes that the plugin sent to its destinations.
    #[must_use]
    pub fn bytes_out(&self) -> u64 {
        self.out.load(Ordering::Relaxed)
    }

    /// Bytes that it received from them.
    #[must_use]
    pub fn bytes_in(&self) -> u64 {
        self.r#in.load(Ordering::Relaxed)
    }

    /// Requests that were refused.
    #[must_use]
    pub fn denials(&self) -> u64 {
        self.denials.load(Ordering::Relaxed)
    }
}
