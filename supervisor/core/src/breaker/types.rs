//! What a breaker is told and what it tells.

use std::time::Duration;

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

/// The leave to make one call, to be handed back to [`Breaker::record`](super::Breaker::record). Dropping it unrecorded costs a half-open
/// breaker one of its calls until [`Settings::half_open_time`] has passed; record [`Outcome::Ignored`] instead.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "record how the call ended"]
pub struct Permit {
    pub(super) epoch: u64,
    pub(super) transition: Option<Transition>,
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

/// What of a breaker outlives the supervisor that owns it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Where it stands.
    pub position: Position,
    /// How much longer it refuses calls; zero unless open.
    pub open_left: Duration,
    /// How often in a row half-open led back to open.
    pub reopened: u32,
    /// Failures in a row.
    pub consecutive: u32,
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
