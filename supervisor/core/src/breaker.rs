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

use std::time::Duration;

use crate::{Jitter, Time};

const BUCKETS: usize = 10;

/// The rules of a breaker. The defaults are those of `Default`.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Whether calls are ever refused. Default: on.
    pub mode: Mode,
    /// Consecutive failures that open it (`failureThreshold`). Default: 5.
    pub failure_threshold: u32,
    /// The first open time (`recoveryTimeout`). Default: 60 s. It doubles each time that half-open fails.
    pub recovery: Duration,
    /// The longest open time, before jitter. Default: 10 min.
    pub recovery_cap: Duration,
    /// The open time varies by this share in both directions. Default: 0.2.
    pub recovery_spread: f64,
    /// Calls let through while half-open, and successes that close it (`halfOpenMaxCalls`). Default: 3.
    pub half_open_calls: u32,
    /// How long half-open waits for the results of the calls that it let through. Default: 30 s.
    pub half_open_time: Duration,
    /// The length of each of the ten buckets of the sliding window. Default: 1 s.
    pub bucket: Duration,
    /// Calls in the window below which no rate is judged. Default: 20.
    pub rate_calls: u32,
    /// The share of failed calls that opens it. Default: 0.5.
    pub failure_rate: f64,
    /// The share of slow calls that opens it. Default: 0.8.
    pub slow_rate: f64,
    /// A call that takes longer is slow (`maxResponseTime`). Default: `None`, no call is.
    pub slow_after: Option<Duration>,
}

/// Whether a breaker acts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// It opens and refuses.
    #[default]
    On,
    /// It admits everything and stays closed.
    Off,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            mode: Mode::On,
            failure_threshold: 5,
            recovery: Duration::from_secs(60),
            recovery_cap: Duration::from_secs(600),
            recovery_spread: 0.2,
            half_open_calls: 3,
            half_open_time: Duration::from_secs(30),
            bucket: Duration::from_secs(1),
            rate_calls: 20,
            failure_rate: 0.5,
            slow_rate: 0.8,
            slow_after: None,
        }
    }
}

/// What a call's end says about the provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The provider did its work.
    Success,
    /// The provider failed.
    Failure,
    /// The caller's mistake or wish: it says nothing about the provider, and its duration neither.
    Ignored,
    /// The provider said that it has too much to do: for the limiter, not for the breaker.
    Overloaded,
}

impl Outcome {
    /// What a gRPC status code says about the provider
    /// (<https://grpc.io/docs/guides/status-codes/>; codes outside 0..=16 are UNKNOWN).
    #[must_use]
    pub const fn of_grpc(code: i32) -> Self {
        match code {
            0 => Self::Success,
            // CANCELLED, INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, PERMISSION_DENIED, FAILED_PRECONDITION,
            // ABORTED, OUT_OF_RANGE, UNIMPLEMENTED, UNAUTHENTICATED.
            1 | 3 | 5 | 6 | 7 | 9 | 10 | 11 | 12 | 16 => Self::Ignored,
            8 => Self::Overloaded,
            // UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE, DATA_LOSS, and what is no code.
            _ => Self::Failure,
        }
    }
}

/// The leave to make one call, to be handed back to [`Breaker::record`]. Dropping it unrecorded costs a half-open
/// breaker one of its calls until [`Settings::half_open_time`] has passed; record [`Outcome::Ignored`] instead.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "record how the call ended"]
pub struct Permit {
    epoch: u64,
    transition: Option<Transition>,
}

impl Permit {
    /// The change that admitting this call made, if any: the first call after the open time half-opens the breaker.
    #[must_use]
    pub const fn transition(&self) -> Option<Transition> {
        self.transition
    }
}

/// A call was not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// When a call may be admitted again, at the earliest.
    pub retry_after: Duration,
}

/// Where a breaker stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    /// All calls pass.
    Closed,
    /// No call passes.
    Open,
    /// A few calls pass, to find out.
    HalfOpen,
}

impl Position {
    /// The stable text: `closed`, `open`, `half_open`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
        }
    }
}

/// Why a breaker opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenCause {
    /// [`Settings::failure_threshold`] failures in a row.
    ConsecutiveFailures,
    /// Too large a share of the calls failed.
    FailureRate,
    /// Too large a share of the calls was slow.
    SlowRate,
    /// A call or probe failed while half-open.
    HalfOpenFailure,
    /// No call that half-open let through ended in time.
    HalfOpenTimeout,
}

impl OpenCause {
    /// The stable text.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ConsecutiveFailures => "consecutive_failures",
            Self::FailureRate => "failure_rate",
            Self::SlowRate => "slow_rate",
            Self::HalfOpenFailure => "half_open_failure",
            Self::HalfOpenTimeout => "half_open_timeout",
        }
    }
}

/// A change of position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transition {
    /// It refuses calls from now on.
    Opened {
        /// Why.
        cause: OpenCause,
        /// The window at that moment.
        window: Window,
        /// How long it will stay open.
        open_for: Duration,
    },
    /// It lets a few calls through.
    HalfOpened,
    /// It admits all calls again.
    Closed {
        /// The time since it first opened.
        open: Duration,
    },
}

/// Counts of the calls in the sliding window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// Calls that succeeded or failed.
    pub calls: u32,
    /// Those that failed.
    pub failed: u32,
    /// Those that were slow.
    pub slow: u32,
}

impl Window {
    /// The share of failed calls, 0..=1.
    #[must_use]
    pub fn failure_rate(self) -> f64 {
        share(self.failed, self.calls)
    }

    /// The share of slow calls, 0..=1.
    #[must_use]
    pub fn slow_rate(self) -> f64 {
        share(self.slow, self.calls)
    }
}

fn share(part: u32, whole: u32) -> f64 {
    if whole == 0 { 0.0 } else { f64::from(part) / f64::from(whole) }
}

/// A breaker as reports show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Where it stands.
    pub position: Position,
    /// Failures in a row.
    pub consecutive_failures: u32,
    /// The window.
    pub window: Window,
    /// Time until a call may be admitted; zero unless open.
    pub retry_after: Duration,
}

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

    /// Notes a launch that failed, which counts as a failed call without a permit.
    pub fn launch_failed(&mut self, now: Time) -> Option<Transition> {
        let permit = Permit { epoch: self.epoch, transition: None };
        self.record(permit, Outcome::Failure, Duration::ZERO, now)
    }

    /// Begins the breaker of a new generation in place of this one: closed, nothing counted, all permits stale.
    pub fn renew(&mut self, now: Time) -> Option<Transition> {
        let was = self.inner;
        self.close();
        match was {
            Inner::Closed => None,
            Inner::Open { .. } | Inner::HalfOpen { .. } => Some(Transition::Closed { open: now - self.opened_at }),
        }
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
