//! How fast an emulated machine's time runs: its counter is the host processor's, and it has nothing to measure it by.

use std::time::{Duration, Instant};

use crate::kernel;

/// A shorter time would not be exact: a reading may be a few microseconds late.
const LEAST: Duration = Duration::from_millis(20);

/// A measurement under way.
pub(super) struct Pace {
    ticks: u64,
    begun: Instant,
}

impl Pace {
    pub(super) fn begin() -> Self {
        Self { ticks: kernel::ticks(), begun: Instant::now() }
    }

    /// Ticks in a millisecond, over the time since it began; waits when that was too short.
    pub(super) fn khz(self) -> u64 {
        std::thread::sleep(LEAST.saturating_sub(self.begun.elapsed()));
        let ticks = kernel::ticks().wrapping_sub(self.ticks);
        let micros = u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX).max(1);
        ticks.saturating_mul(1000) / micros
    }
}
