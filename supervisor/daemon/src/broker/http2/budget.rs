//! What a peer may ask for without getting anywhere: resets, pings, settings, empty frames, window updates.
//!
//! Every one of them is legal, and an endless row of them is an attack (CVE-2019-9511 to 9518, CVE-2023-44487). Each
//! costs; time and real work pay back.

use std::time::{Duration, Instant};

/// The price of a frame that is legal and moves nothing.
pub(super) const FRAME: u32 = 1;
/// The price of a stream that is given up: it made work at both ends of the broker.
pub(super) const RESET: u32 = 8;
/// What a frame that moves something pays back: for each, a peer may open the stream's window and the connection's, and
/// ask by a ping how long it took.
pub(super) const WORK: u32 = 8;

/// The bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BudgetLimits {
    /// What may be spent at once.
    pub most: u32,
    /// What comes back every second.
    pub per_second: u32,
}

impl Default for BudgetLimits {
    fn default() -> Self {
        // A thousand calls given up at once, and then a thousand a second.
        Self { most: 8_192, per_second: 8_192 }
    }
}

/// What is left.
#[derive(Debug)]
pub(super) struct Budget {
    limits: BudgetLimits,
    left: u32,
    filled: Instant,
}

impl Budget {
    pub(super) const fn new(limits: BudgetLimits, now: Instant) -> Self {
        Self { limits, left: limits.most, filled: now }
    }

    /// Pays; false when there is not enough.
    pub(super) fn pay(&mut self, price: u32, now: Instant) -> bool {
        if self.left < price {
            self.fill(now);
        }
        match self.left.checked_sub(price) {
            Some(left) => {
                self.left = left;
                true
            }
            None => false,
        }
    }

    pub(super) fn earn(&mut self, pay: u32) {
        self.left = self.left.saturating_add(pay).min(self.limits.most);
    }

    /// Only when nothing is left is the clock asked, so that an honest peer never is.
    #[cold]
    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.filled).min(Duration::from_secs(3600));
        let earned = u64::from(self.limits.per_second) * u64::try_from(passed.as_micros()).unwrap_or(0) / 1_000_000;
        if earned > 0 {
            self.filled = now;
            self.earn(u32::try_from(earned).unwrap_or(u32::MAX));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{Budget, BudgetLimits};

    #[test]
    fn time_and_work_pay_back() {
        let start = Instant::now();
        let mut budget = Budget::new(BudgetLimits { most: 10, per_second: 10 }, start);
        assert!((0..10).all(|_| budget.pay(1, start)));
        assert!(!budget.pay(1, start));
        assert!(budget.pay(4, start + Duration::from_millis(500)));
        budget.earn(100);
        assert!(budget.pay(10, start + Duration::from_millis(500)));
        assert!(!budget.pay(1, start + Duration::from_millis(501)));
        assert!(budget.pay(1, start + Duration::from_millis(600)));
    }
}
