//! A limit on bytes per second, as a bucket of tokens on credit.

use std::time::Duration;

use crate::Time;

/// The longest time whose bytes may pass at once after a rest. Small, so that the limit holds over short times too; long
/// enough that a busy host's late timers do not cost bandwidth.
const BURST: Duration = Duration::from_millis(100);

/// How long one piece may take at the limit.
const PIECE: Duration = Duration::from_millis(10);

/// Half billionths of a byte: so that in a nanosecond each origin earns a whole number of them.
const UNITS: i128 = 2_000_000_000;

/// Who began a connection of a plugin's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The plugin, to a destination.
    Inside,
    /// Somebody outside, to the plugin.
    Outside,
}

/// The bucket of one plugin, in two halves that begin empty: one for the connections of each origin, so that those who connect
/// from outside, however many, cannot keep the plugin from its own destinations, nor it them.
///
/// What is earned goes to both halves alike, and from one that is full into the other: who wants bandwidth has half of it at
/// least, and all that the other leaves. A piece is let through when its half holds anything, and its bytes are taken
/// afterwards, on credit if need be: what was overdrawn is waited for before the next one. So the long run is exact, whatever
/// sizes pieces have.
#[derive(Clone, Debug)]
pub struct Bandwidth {
    /// Bytes per second.
    rate: u64,
    /// By origin, in [`UNITS`].
    held: [i128; 2],
    at: Time,
}

impl Bandwidth {
    /// A bucket for this many bytes per second; at least one.
    #[must_use]
    pub const fn new(rate: u64, now: Time) -> Self {
        Self { rate: if rate == 0 { 1 } else { rate }, held: [0; 2], at: now }
    }

    /// How many bytes the next piece may have at most.
    #[must_use]
    pub fn piece(&self) -> usize {
        let bytes = u128::from(self.rate) * PIECE.as_nanos() / 1_000_000_000;
        usize::try_from(bytes.clamp(512, 64 * 1024)).unwrap_or(512)
    }

    /// Whether a piece may pass now, or after how long to ask again: then it may, unless the other origin wants more by then.
    ///
    /// # Errors
    ///
    /// The time after which it may.
    pub fn ask(&mut self, origin: Origin, now: Time) -> Result<(), Duration> {
        self.refill(now);
        let [own, other] = self.halves(origin);
        if own > 0 {
            return Ok(());
        }
        // One unit more than nothing. Until the other half is full, it earns as much.
        let missing = 1 - own;
        let shared = missing.min(self.most() - other);
        let nanos = (missing + shared).unsigned_abs().div_ceil(2 * u128::from(self.rate));
        Err(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }

    /// This many bytes have passed.
    pub fn took(&mut self, origin: Origin, bytes: u64, now: Time) {
        self.refill(now);
        self.held[origin as usize] -= i128::from(bytes) * UNITS;
    }

    fn halves(&self, origin: Origin) -> [i128; 2] {
        let [inside, outside] = self.held;
        match origin {
            Origin::Inside => [inside, outside],
            Origin::Outside => [outside, inside],
        }
    }

    /// What one half holds at most.
    fn most(&self) -> i128 {
        i128::from(self.rate) * nanos(BURST)
    }

    fn refill(&mut self, now: Time) {
        let passed = now.since(self.at);
        self.at = self.at.max(now);
        let (most, earned) = (self.most(), i128::from(self.rate).saturating_mul(nanos(passed)));
        let earned = self.held.map(|held| held.saturating_add(earned));
        let over = earned.map(|held| (held - most).max(0));
        self.held = [earned[0].saturating_add(over[1]).min(most), earned[1].saturating_add(over[0]).min(most)];
    }
}

fn nanos(time: Duration) -> i128 {
    i128::try_from(time.as_nanos()).unwrap_or(i128::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(nanos: u64) -> Time {
        Time::after_start(Duration::from_nanos(nanos))
    }

    const ORIGINS: [Origin; 2] = [Origin::Inside, Origin::Outside];

    #[test]
    fn a_rest_earns_a_tenth_of_a_second_and_no_more() {
        let mut bucket = Bandwidth::new(1000, Time::ZERO);
        assert!(ORIGINS.iter().all(|origin| bucket.ask(*origin, Time::ZERO).is_err()), "it begins empty");
        let mut passed = [0; 2];
        let later = Time::from_millis(60_000);
        for origin in ORIGINS {
            while bucket.ask(origin, later).is_ok() {
                bucket.took(origin, 10, later);
                passed[origin as usize] += 10;
            }
        }
        assert_eq!(passed, [50, 50]);
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
            let origin = Origin::Outside;
            let mut bucket = Bandwidth::new(rate, Time::ZERO);
            let mut last = 0;
            for (size, late) in steps {
                if let Err(wait) = bucket.ask(origin, at(now)) {
                    let wait = u64::try_from(wait.as_nanos()).expect("fits");
                    prop_assert!(bucket.ask(origin, at(now + wait - 1)).is_err(), "it says exactly when");
                    now += wait + late;
                    prop_assert!(bucket.ask(origin, at(now)).is_ok(), "it says exactly when");
                }
                last = size.min(bucket.piece()) as u64;
                bucket.took(origin, last, at(now));
                passed += last;
            }
            let seconds = u128::from(now);
            let earned = u128::from(rate) * seconds / 1_000_000_000;
            let burst = u128::from(rate) / 10;
            prop_assert!(u128::from(passed) <= earned + u128::from(last) + 1, "{passed} in {now} ns at {rate}");
            prop_assert!(u128::from(passed) + burst + 1 >= earned, "{passed} in {now} ns at {rate}");
        }

        /// Whoever asks more often, in whatever pieces: each origin has half of the rate when both want more than that, and
        /// what one leaves is the other's.
        #[test]
        fn neither_origin_starves_the_other(
            rate in 10_000_u64..10_000_000_000,
            often in 1_usize..20,
            modest in 0_u64..40,
            sizes in prop::collection::vec(1_usize..=64 * 1024, 400..800),
        ) {
            let mut bucket = Bandwidth::new(rate, Time::ZERO);
            let (mut now, mut passed) = (0_u64, [0_u64; 2]);
            let mut largest = 0;
            // The plugin wants all that it gets, or this share of the rate, in hundredths.
            let wants = |now: u64| match modest {
                0 => u64::MAX,
                share => u64::try_from(u128::from(rate) * u128::from(now) * u128::from(share) / 100_000_000_000).expect("fits"),
            };
            for size in sizes {
                let size = size.min(bucket.piece()) as u64;
                largest = size.max(largest);
                let mut soonest = u64::MAX;
                for turn in 0..=often {
                    let origin = if turn < often { Origin::Outside } else { Origin::Inside };
                    if origin == Origin::Inside && passed[0] + size > wants(now) {
                        continue;
                    }
                    match bucket.ask(origin, at(now)) {
                        Ok(()) => {
                            bucket.took(origin, size, at(now));
                            passed[origin as usize] += size;
                        }
                        Err(wait) => soonest = soonest.min(u64::try_from(wait.as_nanos()).expect("fits")),
                    }
                }
                // Those outside always wait.
                now += if soonest == u64::MAX { 1 } else { soonest };
            }
            let earned = u64::try_from(u128::from(rate) * u128::from(now) / 1_000_000_000).expect("fits");
            let slack = rate / 10 + 2 * largest + 2;
            prop_assert!(passed[0] + passed[1] <= earned + 2 * largest + 2, "{passed:?} of {earned}");
            prop_assert!(passed[0] + passed[1] + slack >= earned, "{passed:?} of {earned}");
            prop_assert!(passed[0] + slack >= (earned / 2).min(wants(now)), "{passed:?} of {earned}");
            prop_assert!(passed[1] + slack >= earned / 2, "{passed:?} of {earned}");
        }

        #[test]
        fn time_that_goes_back_gives_nothing(times in prop::collection::vec(0_u64..1_000_000_000, 1..50)) {
            let mut bucket = Bandwidth::new(1_000_000, Time::ZERO);
            let mut passed = 0_u64;
            let mut newest = 0;
            for time in times {
                newest = newest.max(time);
                if bucket.ask(Origin::Inside, at(time)).is_ok() {
                    bucket.took(Origin::Inside, 1000, at(time));
                    passed += 1000;
                }
            }
            prop_assert!(passed <= newest / 1000 + 1000, "{passed} in {newest} ns");
        }
    }
}
