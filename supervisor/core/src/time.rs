//! The monotonic clock as a value. Who reads it, and when it began, this crate does not know.

use std::{
    ops::{Add, Sub},
    time::Duration,
};

/// A moment of a monotonic clock, in nanoseconds since that clock's owner started (584 years fit).
///
/// The daemon makes one from `Instant::elapsed`; tests make them from numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(u64);

impl Time {
    /// The moment the clock began.
    pub const ZERO: Self = Self(0);

    /// The moment this long after the clock began.
    #[must_use]
    pub fn after_start(elapsed: Duration) -> Self {
        Self(nanos(elapsed))
    }

    /// The moment this many milliseconds after the clock began.
    #[must_use]
    pub const fn from_millis(millis: u64) -> Self {
        Self(millis.saturating_mul(1_000_000))
    }

    /// Nanoseconds since the clock began.
    #[must_use]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// How long ago `earlier` was; zero when it is not in the past.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Time {
    type Output = Self;

    fn add(self, later: Duration) -> Self {
        Self(self.0.saturating_add(nanos(later)))
    }
}

impl Sub<Self> for Time {
    type Output = Duration;

    fn sub(self, earlier: Self) -> Duration {
        self.since(earlier)
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A random number in 0..1 that the caller drew, to spread what would otherwise happen everywhere at once.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Jitter(f64);

impl Jitter {
    /// The middle of the range: no spread.
    pub const MIDDLE: Self = Self(0.5);

    /// Takes any number; those outside 0..1 are moved to the nearer end, and NaN to the middle.
    #[must_use]
    pub fn new(number: f64) -> Self {
        if number.is_nan() { Self::MIDDLE } else { Self(number.clamp(0.0, 1.0)) }
    }

    /// A jitter from 64 random bits.
    #[must_use]
    pub fn from_bits(bits: u64) -> Self {
        // The upper 53 bits are as many as an f64 holds exactly.
        #[allow(clippy::cast_precision_loss, reason = "53 bits fit an f64")]
        Self((bits >> 11) as f64 / (1_u64 << 53) as f64)
    }

    /// The point between `low` and `high` that the jitter picks.
    #[must_use]
    pub fn between(self, low: Duration, high: Duration) -> Duration {
        low + high.saturating_sub(low).mul_f64(self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Jitter, Time};

    #[test]
    fn time_never_runs_backwards_or_over() {
        let one = Time::from_millis(1);
        assert_eq!(Time::ZERO.since(one), Duration::ZERO);
        assert_eq!((one + Duration::from_millis(2)) - one, Duration::from_millis(2));
        assert_eq!(one + Duration::MAX + Duration::MAX, Time::after_start(Duration::MAX));
    }

    #[test]
    fn jitter_stays_in_its_range() {
        let (low, high) = (Duration::from_secs(1), Duration::from_secs(2));
        for number in [-1.0, 0.0, 0.3, 1.0, 7.0, f64::NAN, f64::INFINITY] {
            let picked = Jitter::new(number).between(low, high);
            assert!((low..=high).contains(&picked), "{number} gave {picked:?}");
        }
        assert_eq!(Jitter::from_bits(0).between(low, high), low);
        assert!(Jitter::from_bits(u64::MAX).between(low, high) <= high);
        assert_eq!(Jitter::MIDDLE.between(high, low), high);
    }
}
