//! A limit on bytes per second, as a bucket of tokens on credit.

use std::time::Duration;

use crate::Time;

/// The longest time whose bytes may pass at once after a rest. Small, so that the limit holds over short times too; long
/// enough that a busy host's late timers do not cost bandwidth.
const BURST: Duration = Duration::from_millis(100);

/// How long one piece may take at the limit.
const PIECE: Duration = Duration::from_millis(10);

const NANOS: i128 = 1_000_000_000;

/// The bucket of one plugin. It begins empty.
///
/// A piece is let through when the bucket holds anything, and its bytes are taken afterwards, on credit if need be: what was
/// overdrawn is waited for before the next one. So the long run is exact, whatever sizes pieces have.
#[derive(Clone, Debug)]
pub struct Bandwidth {
    /// Bytes per second.
    rate: u64,
    /// Billionths of a byte.
    held: i128,
    at: Time,
}

impl Bandwidth {
    /// A bucket for this many bytes per second; at least one.
    #[must_use]
    pub const fn new(rate: u64, now: Time) -> Self {
        Self { rate: if rate == 0 { 1 } else { rate }, held: 0, at: now }
    }

    /// How many bytes the next piece may have at most.
    #[must_use]
    pub fn piece(&self) -> usize {
        let bytes = u128::from(self.rate) * PIECE.as_nanos() / NANOS.unsigned_abs();
        usize::try_from(bytes.clamp(512, 64 * 1024)).unwrap_or(512)
    }

    /// Whether a piece may pass now, or after how long to ask again.
    ///
    /// # Errors
    ///
    /// The time after which it may.
    pub fn ask(&mut self, now: Time) -> Result<(), Duration> {
        self.refill(now);
        if self.held > 0 {
            return Ok(());
        }
        // One billionth more than nothing.
        let missing = 1 - self.held;
        let nanos = missing.unsigned_abs().div_ceil(self.rate.into());
        Err(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }

    /// This many bytes have passed.
    pub fn took(&mut self, bytes: u64, now: Time) {
        self.refill(now);
        self.held -= i128::from(bytes) * NANOS;
    }

    fn refill(&mut self, now: Time) {
        let passed = now.since(self.at);
        self.at = self.at.max(now);
        let nanos = |time: Duration| i128::try_from(time.as_nanos()).unwrap_or(i128::MAX);
        let most = i128::from(self.rate) * nanos(BURST);
        self.held = self.held.saturating_add(i128::from(self.rate).saturating_mul(nanos(passed))).min(most);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(nanos: u64) -> Time {
        Time::after_start(Duration::from_nanos(nanos))
    }

    #[test]
    fn a_rest_earns_a_tenth_of_a_second_and_no_more() {
        let mut bucket = Bandwidth::new(1000, Time::ZERO);
        assert!(bucket.ask(Time::ZERO).is_err(), "it begins empty");
        let mut passed = 0;
        let later = Time::from_millis(60_000);
        while bucket.ask(later).is_ok() {
            bucket.took(10, later);
            passed += 10;
        }
        assert_eq!(passed, 100);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Whoever sends as fast as it may gets the rate: never more than it and one burst and one piece, and never less
        /// than it, if timers are not later than a burst.
        #[test]
        fn the_rate_holds_in_the_long_run(
            rate in 1_000_u64..10_000_000_000,
            steps in prop::collection::vec((1_usize..=64 * 1024, 0_u64..50_000_000), 200..400),
        ) {
            let (mut now, mut passed) = (0_u64, 0_u64);
            let mut bucket = Bandwidth::new(rate, Time::ZERO);
            let mut last = 0;
            for (size, late) in steps {
                if let Err(wait) = bucket.ask(at(now)) {
                    now += u64::try_from(wait.as_nanos()).expect("fits") + late;
                    prop_assert!(bucket.ask(at(now)).is_ok(), "it says exactly when");
                }
                last = size.min(bucket.piece()) as u64;
                bucket.took(last, at(now));
                passed += last;
            }
            let seconds = u128::from(now);
            let earned = u128::from(rate) * seconds / 1_000_000_000;
            let burst = u128::from(rate) / 10;
            prop_assert!(u128::from(passed) <= earned + u128::from(last) + 1, "{passed} in {now} ns at {rate}");
            prop_assert!(u128::from(passed) + burst + 1 >= earned, "{passed} in {now} ns at {rate}");
        }

        #[test]
        fn time_that_goes_back_gives_nothing(times in prop::collection::vec(0_u64..1_000_000_000, 1..50)) {
            let mut bucket = Bandwidth::new(1_000_000, Time::ZERO);
            let mut passed = 0_u64;
            let mut newest = 0;
            for time in times {
                newest = newest.max(time);
                if bucket.ask(at(time)).is_ok() {
                    bucket.took(1000, at(time));
                    passed += 1000;
                }
            }
            prop_assert!(passed <= newest / 1000 + 1000, "{passed} in {newest} ns");
        }
    }
}
