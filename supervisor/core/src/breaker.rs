//! The circuit breaker of one plugin generation.
//!
//! ```text
//!             consecutive failures, failure rate or slow rate
//!   CLOSED ───────────────────────────────────────────────────▶ OPEN
//!      ▲                                                        │  ▲
//!      │ enough successes                       open time passed│  │ a failure, or no result in time
//!      └────────────────────────── HALF-OPEN ◀──────────────────┘  │
//!                                       └──────────────────────────┘ (the next open time is doubled)
//! ```
//!
//! Owns the counts and the decision to admit. It does not know what a call is: its owner maps results to [`Outcome`]s,
//! and liveness is judged elsewhere, so a slow call neither kills nor ejects. Nothing here allocates: [`Breaker::admit`]
//! and [`Breaker::record`] run for every call.

#[cfg(test)]
mod tests;
mod types;

use std::time::Duration;

pub use self::types::{
    Memory, Mode, OpenCause, Outcome, Permit, Position, Refused, Settings, Snapshot, Transition, Window,
};
use crate::{Jitter, Time};

const BUCKETS: usize = 10;

#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    /// Which interval the counts belong to: `now / bucket length`, plus one so that 0 is "never used".
    tick: u64,
    counts: Window,
}

#[derive(Clone, Copy, Debug)]
enum Inner {
    Closed,
    Open { until: Time },
    HalfOpen { since: Time, lent: u32, successes: u32 },
}

/// The breaker itself. One owner calls it; it has no lock.
#[derive(Clone, Debug)]
pub struct Breaker {
    settings: Settings,
    inner: Inner,
    /// Rises with each change of position; permits of an earlier epoch are ignored.
    epoch: u64,
    consecutive: u32,
    buckets: [Bucket; BUCKETS],
    /// Times in a row that half-open led back to open.
    reopened: u32,
    /// When it left CLOSED.
    opened_at: Time,
    /// The state of the generator of jitter.
    random: u64,
}

impl Breaker {
    /// A closed breaker. `seed` feeds the jitter of its open times; breakers of one host should have different seeds.
    #[must_use]
    pub fn new(settings: Settings, seed: u64) -> Self {
        Self {
            settings,
            inner: Inner::Closed,
            epoch: 0,
            consecutive: 0,
            buckets: [Bucket::default(); BUCKETS],
            reopened: 0,
            opened_at: Time::ZERO,
            random: seed,
        }
    }

    /// What of it a breaker of the same plugin generation goes on from, in another supervisor.
    #[must_use]
    pub fn memory(&self, now: Time) -> Memory {
        let Snapshot { position, consecutive_failures, window: _, retry_after } = self.snapshot(now);
        Memory { position, open_left: retry_after, reopened: self.reopened, consecutive: consecutive_failures }
    }

    /// A breaker that goes on from a memory. The window of calls begins empty, and half-open begins anew: the calls that
    /// it had let through ended with the supervisor that made them.
    #[must_use]
    pub fn resume(settings: Settings, seed: u64, memory: Memory, now: Time) -> Self {
        let Memory { position, open_left, reopened, consecutive } = memory;
        let mut this = Self::new(settings, seed);
        if this.settings.mode == Mode::Off {
            return this;
        }
        // What was written on a disk opens it no longer than it could have opened itself.
        let longest = this.settings.recovery_cap.max(this.settings.recovery).saturating_mul(2);
        match position {
            Position::Closed => this.consecutive = consecutive.min(this.settings.failure_threshold.saturating_sub(1)),
            Position::Open => this.enter(Inner::Open { until: now + open_left.min(longest) }),
            Position::HalfOpen => this.enter(Inner::HalfOpen { since: now, lent: 0, successes: 0 }),
        }
        if position != Position::Closed {
            this.reopened = reopened;
            this.opened_at = now;
        }
        this
    }

    /// Asks to make a call.
    ///
    /// # Errors
    ///
    /// [`Refused`] while it is open, and while it is half-open with all of its calls given out.
    pub fn admit(&mut self, now: Time) -> Result<Permit, Refused> {
        match self.inner {
            Inner::Closed => Ok(Permit { epoch: self.epoch, transition: None }),
            Inner::Open { .. } | Inner::HalfOpen { .. } => self.admit_while_not_closed(now),
        }
    }

    #[cold]
    fn admit_while_not_closed(&mut self, now: Time) -> Result<Permit, Refused> {
        let transition = self.tick(now);
        match &mut self.inner {
            Inner::Closed => Ok(Permit { epoch: self.epoch, transition }),
            Inner::Open { until } => Err(Refused { retry_after: *until - now }),
            Inner::HalfOpen { since, lent, successes } => {
                if *lent + *successes >= self.settings.half_open_calls.max(1) {
                    return Err(Refused { retry_after: (*since + self.settings.half_open_time) - now });
                }
                *lent += 1;
                Ok(Permit { epoch: self.epoch, transition })
            }
        }
    }

    /// Notes how a call ended, `latency` after it began (for a stream: until its first response). A permit of an
    /// earlier epoch changes nothing.
    #[allow(clippy::needless_pass_by_value, reason = "a permit is spent by recording it")]
    pub fn record(&mut self, permit: Permit, outcome: Outcome, latency: Duration, now: Time) -> Option<Transition> {
        if permit.epoch != self.epoch || self.settings.mode == Mode::Off {
            return None;
        }
        match (&mut self.inner, outcome) {
            (Inner::Closed, Outcome::Ignored | Outcome::Overloaded) | (Inner::Open { .. }, _) => None,
            (Inner::Closed, Outcome::Success) => {
                self.consecutive = 0;
                self.count(outcome, latency, now)
            }
            (Inner::Closed, Outcome::Failure) => {
                self.consecutive = self.consecutive.saturating_add(1);
                self.count(outcome, latency, now)
            }
            (Inner::HalfOpen { lent, .. }, Outcome::Ignored | Outcome::Overloaded) => {
                *lent = lent.saturating_sub(1);
                None
            }
            (Inner::HalfOpen { lent, .. }, Outcome::Success) => {
                *lent = lent.saturating_sub(1);
                self.half_open_success(now)
            }
            (Inner::HalfOpen { .. }, Outcome::Failure) => Some(self.open(OpenCause::HalfOpenFailure, now)),
        }
    }

    /// Notes a health probe, so that a breaker without calls recovers. It counts only once the open time has passed:
    /// a plugin that answers probes and fails calls is not let back early, and a missed probe alone opens nothing.
    pub fn probe(&mut self, found: Outcome, now: Time) -> Option<Transition> {
        let transition = self.tick(now);
        let Inner::HalfOpen { .. } = self.inner else { return transition };
        let further = match found {
            Outcome::Success => self.half_open_success(now),
            Outcome::Failure => Some(self.open(OpenCause::HalfOpenFailure, now)),
            Outcome::Ignored | Outcome::Overloaded => None,
        };
        further.or(transition)
    }

    /// Makes the changes that only time makes. Call it about once a second, or at [`Snapshot::retry_after`].
    pub fn tick(&mut self, now: Time) -> Option<Transition> {
        match self.inner {
            Inner::Closed => None,
            Inner::Open { until } => (now >= until).then(|| {
                self.enter(Inner::HalfOpen { since: now, lent: 0, successes: 0 });
                Transition::HalfOpened
            }),
            Inner::HalfOpen { since, lent, successes } => {
                if now < since + self.settings.half_open_time {
                    return None;
                }
                match (lent, successes) {
                    // Nobody called: there is nothing to judge, and the next call or probe will tell.
                    (0, 0) => None,
                    (_, 0) => Some(self.open(OpenCause::HalfOpenTimeout, now)),
                    // Fewer calls than asked for, and none failed.
                    (_, _) => Some(self.closed(now)),
                }
            }
        }
    }

    /// Closes it by an operator's word, with every count back at zero; `None` when it was closed, whose counts go too.
    /// Calls under way are not judged any more.
    pub fn reset(&mut self, now: Time) -> Option<Transition> {
        match self.inner {
            Inner::Closed => {
                self.close();
                None
            }
            Inner::Open { .. } | Inner::HalfOpen { .. } => Some(self.closed(now)),
        }
    }

    /// The breaker as reports show it.
    #[must_use]
    pub fn snapshot(&self, now: Time) -> Snapshot {
        let (position, retry_after) = match self.inner {
            Inner::Closed => (Position::Closed, Duration::ZERO),
            Inner::Open { until } => (Position::Open, until - now),
            Inner::HalfOpen { .. } => (Position::HalfOpen, Duration::ZERO),
        };
        Snapshot { position, consecutive_failures: self.consecutive, window: self.window(now), retry_after }
    }

    fn half_open_success(&mut self, now: Time) -> Option<Transition> {
        let Inner::HalfOpen { successes, .. } = &mut self.inner else { return None };
        *successes += 1;
        (*successes >= self.settings.half_open_calls.max(1)).then(|| self.closed(now))
    }

    /// Counts a call while closed, and opens when a limit is reached.
    fn count(&mut self, outcome: Outcome, latency: Duration, now: Time) -> Option<Transition> {
        let failed = outcome == Outcome::Failure;
        let slow = self.settings.slow_after.is_some_and(|limit| latency > limit);
        let tick = self.tick_number(now);
        let bucket = &mut self.buckets[slot(tick)];
        if bucket.tick != tick {
            *bucket = Bucket { tick, counts: Window::default() };
        }
        let counts = &mut bucket.counts;
        counts.calls = counts.calls.saturating_add(1);
        counts.failed = counts.failed.saturating_add(u32::from(failed));
        counts.slow = counts.slow.saturating_add(u32::from(slow));
        if failed && self.consecutive >= self.settings.failure_threshold.max(1) {
            return Some(self.open(OpenCause::ConsecutiveFailures, now));
        }
        let window = self.window(now);
        if window.calls < self.settings.rate_calls {
            None
        } else if window.failed > 0 && window.failure_rate() >= self.settings.failure_rate {
            Some(self.open(OpenCause::FailureRate, now))
        } else if window.slow > 0 && window.slow_rate() >= self.settings.slow_rate {
            Some(self.open(OpenCause::SlowRate, now))
        } else {
            None
        }
    }

    fn open(&mut self, cause: OpenCause, now: Time) -> Transition {
        let window = self.window(now);
        match self.inner {
            Inner::Closed => {
                self.opened_at = now;
                self.reopened = 0;
            }
            Inner::Open { .. } | Inner::HalfOpen { .. } => self.reopened = self.reopened.saturating_add(1),
        }
        let factor = 1_u32.checked_shl(self.reopened).unwrap_or(u32::MAX);
        let cap = self.settings.recovery_cap.max(self.settings.recovery);
        let full = self.settings.recovery.checked_mul(factor).map_or(cap, |time| time.min(cap));
        let spread = self.settings.recovery_spread.clamp(0.0, 1.0);
        let open_for = self.jitter().between(full.mul_f64(1.0 - spread), full.mul_f64(1.0 + spread));
        self.enter(Inner::Open { until: now + open_for });
        Transition::Opened { cause, window, open_for }
    }

    fn closed(&mut self, now: Time) -> Transition {
        self.close();
        Transition::Closed { open: now - self.opened_at }
    }

    fn close(&mut self) {
        self.enter(Inner::Closed);
        self.consecutive = 0;
        self.reopened = 0;
        self.buckets = [Bucket::default(); BUCKETS];
    }

    fn enter(&mut self, inner: Inner) {
        self.inner = inner;
        self.epoch += 1;
    }

    fn tick_number(&self, now: Time) -> u64 {
        let length = u64::try_from(self.settings.bucket.as_nanos()).unwrap_or(u64::MAX).max(1);
        now.as_nanos() / length + 1
    }

    fn window(&self, now: Time) -> Window {
        let last = self.tick_number(now);
        let recent = self.buckets.iter().filter(|bucket| bucket.tick != 0 && bucket.tick + BUCKETS as u64 > last);
        recent.fold(Window::default(), |sum, Bucket { counts, .. }| Window {
            calls: sum.calls.saturating_add(counts.calls),
            failed: sum.failed.saturating_add(counts.failed),
            slow: sum.slow.saturating_add(counts.slow),
        })
    }

    /// SplitMix64 (Steele, Lea and Flood, 2014): small, and good enough to spread open times.
    fn jitter(&mut self) -> Jitter {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.random;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Jitter::from_bits(bits ^ (bits >> 31))
    }
}

fn slot(tick: u64) -> usize {
    usize::try_from(tick % BUCKETS as u64).unwrap_or_default()
}
