//! A token bucket: how often somebody may do something, in the long run and as a burst. It knows no clock.

use tokio::time::Instant;

/// How often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// In the long run.
    pub per_second: u32,
    /// At once, after a rest.
    pub burst: u32,
}

/// What somebody has left of a [`Rate`].
#[derive(Debug)]
pub(crate) struct Bucket {
    tokens: f64,
    rate: Rate,
    at: Instant,
}

impl Bucket {
    /// A full one.
    pub(crate) fn new(rate: Rate, now: Instant) -> Self {
        Self { tokens: f64::from(rate.burst), rate, at: now }
    }

    /// Takes `cost` when there is at least one token, on credit if need be: what costs more than a whole burst is
    /// possible, and waited for afterwards.
    pub(crate) fn take(&mut self, cost: u32, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = now;
        self.tokens = (self.tokens + passed * f64::from(self.rate.per_second)).min(f64::from(self.rate.burst));
        let enough = self.tokens >= 1.0;
        if enough {
            self.tokens -= f64::from(cost);
        }
        enough
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_burst_then_the_rate_and_debts_are_paid_first() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut bucket = Bucket::new(Rate { per_second: 10, burst: 2 }, start);
        assert_eq!([bucket.take(1, at(0)), bucket.take(1, at(0)), bucket.take(1, at(0))], [true, true, false]);
        assert_eq!([bucket.take(5, at(110)), bucket.take(1, at(400)), bucket.take(1, at(620))], [true, false, true]);
        assert_eq!([bucket.take(1, at(9000)), bucket.take(1, at(9000)), bucket.take(1, at(9000))], [true, true, false]);
    }
}
