//! How much one pipe may say, and what was dropped of it.

use std::time::Duration;

use tokio::time::Instant;

use crate::bucket::{Bucket, Rate};

/// Between two events about dropped lines of one pipe.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// What one pipe may still say, and what was dropped of it.
pub(super) struct Intake {
    left: Bucket,
    /// Since the line that was kept last.
    dropped: u64,
    /// Since it was last told.
    untold: u64,
    told_at: Option<Instant>,
}

impl Intake {
    pub(super) fn new(per_second: u32, now: Instant) -> Self {
        let left = Bucket::new(Rate { per_second, burst: per_second }, now);
        Self { left, dropped: 0, untold: 0, told_at: None }
    }

    /// `Some` with the number dropped before, when one more line of so many bytes may be kept.
    pub(super) fn admit(&mut self, bytes: usize, now: Instant) -> Option<u64> {
        let cost = u32::try_from(1 + bytes / 1024).unwrap_or(u32::MAX);
        if !self.left.take(cost, now) {
            self.dropped += 1;
            self.untold += 1;
            return None;
        }
        Some(std::mem::take(&mut self.dropped))
    }

    /// How many lines were dropped since this last said so; at most once in [`TELL_EVERY`], and at the end.
    pub(super) fn tell(&mut self, now: Instant, end: bool) -> Option<u64> {
        let due = end || self.told_at.is_none_or(|told| now.saturating_duration_since(told) >= TELL_EVERY);
        if self.untold == 0 || !due {
            return None;
        }
        self.told_at = Some(now);
        Some(std::mem::take(&mut self.untold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_rate_drops_and_counts() {
        let mut rate = Intake::new(2, Instant::now());
        let mut admit = || rate.admit(80, Instant::now());
        assert_eq!([admit(), admit(), admit(), admit()], [Some(0), Some(0), None, None]);
        tokio::time::advance(Duration::from_millis(500)).await;
        assert_eq!([admit(), admit()], [Some(2), None]);
    }

    #[tokio::test(start_paused = true)]
    async fn long_lines_cost_more_and_none_is_too_long() {
        let mut rate = Intake::new(2, Instant::now());
        let mut admit = |bytes| rate.admit(bytes, Instant::now());
        assert_eq!([admit(8 * 1024), admit(1)], [Some(0), None]);
        // Nine tokens were taken of two.
        tokio::time::advance(Duration::from_millis(3900)).await;
        assert_eq!(admit(1), None);
        tokio::time::advance(Duration::from_millis(200)).await;
        assert_eq!(admit(1023), Some(2));
    }
}
