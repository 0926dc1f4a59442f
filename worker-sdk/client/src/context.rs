//! What travels along with a call: the deadline, the trace and the hops.
//!
//! A [`CallContext`] is read from the metadata of an incoming call and held by the task that serves it; every call made
//! through a [`Client`](crate::Client) from that task carries it on. Nothing here opens a socket.

use std::{future::Future, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::time::Instant;

/// The metadata key that selects a provider by token.
pub const TOKEN_METADATA: &str = "plugvisor-token";

const TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
/// Passed on unchanged: the trace of W3C (<https://www.w3.org/TR/trace-context/>) and the broker's own record of the path.
const PASSED_ON: [&str; 3] = ["traceparent", "tracestate", "plugvisor-hops"];
const CALLER: HeaderName = HeaderName::from_static("plugvisor-caller");

tokio::task_local! {
    static CURRENT: CallContext;
}

/// The deadline and the trace of the call that is being served.
///
/// It belongs to the task that serves the call. Work handed to `tokio::spawn` leaves it behind unless wrapped:
/// `tokio::spawn(context.scope(work))`.
#[derive(Debug, Clone, Default)]
pub struct CallContext {
    deadline: Option<Instant>,
    passed_on: [Option<HeaderValue>; PASSED_ON.len()],
    caller: Option<HeaderValue>,
}

impl CallContext {
    /// Reads the metadata of an incoming call. An unreadable deadline counts as none.
    pub fn from_headers(headers: &HeaderMap) -> Self {
        Self {
            deadline: timeout_of(headers).and_then(|left| Instant::now().checked_add(left)),
            passed_on: PASSED_ON.map(|name| headers.get(name).cloned()),
            caller: headers.get(CALLER).cloned(),
        }
    }

    /// The context of the call that the current task serves.
    pub fn current() -> Option<Self> {
        CURRENT.try_with(Clone::clone).ok()
    }

    /// This context with an earlier deadline; a later one than it has changes nothing.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        if let Some(candidate) = Instant::now().checked_add(timeout) {
            self.deadline = Some(self.deadline.map_or(candidate, |known| known.min(candidate)));
        }
        self
    }

    /// This context with another `traceparent` (W3C trace context). `None` when the text cannot be metadata.
    #[must_use]
    pub fn with_traceparent(mut self, traceparent: &str) -> Option<Self> {
        self.passed_on[0] = Some(HeaderValue::from_str(traceparent).ok()?);
        Some(self)
    }

    /// When the caller stops waiting.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// The time left, zero when it has run out; `None` without a deadline.
    pub fn remaining(&self) -> Option<Duration> {
        self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    /// The W3C `traceparent` as received.
    pub fn traceparent(&self) -> Option<&str> {
        self.passed_on[0].as_ref()?.to_str().ok()
    }

    /// The trace id, 32 hexadecimal digits, out of a well-formed `traceparent`.
    pub fn trace_id(&self) -> Option<&str> {
        let id = self.traceparent()?.split('-').nth(1)?;
        let well_formed = id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        (well_formed && id.bytes().any(|byte| byte != b'0')).then_some(id)
    }

    /// Who calls, as the broker says: the name of a plugin, or what the broker calls a local application.
    pub fn caller(&self) -> Option<&str> {
        self.caller.as_ref()?.to_str().ok()
    }

    /// Runs `work` as part of this call: what it calls through a [`Client`](crate::Client) carries the context on.
    pub async fn scope<F: Future>(self, work: F) -> F::Output {
        CURRENT.scope(self, work).await
    }

    /// Runs `work` as part of this call, without a future.
    pub fn sync_scope<R>(self, work: impl FnOnce() -> R) -> R {
        CURRENT.sync_scope(self, work)
    }

    /// Adds the context to the metadata of an outgoing call, without overwriting what the author has set there.
    pub(crate) fn apply(&self, headers: &mut HeaderMap) {
        for (name, value) in PASSED_ON.into_iter().zip(&self.passed_on) {
            if let Some(value) = value {
                headers.entry(name).or_insert_with(|| value.clone());
            }
        }
    }
}

/// The shortest of the timeouts becomes the call's `grpc-timeout`. Returns it; `None` when there is none at all.
pub(crate) fn apply_timeout(headers: &mut HeaderMap, limits: [Option<Duration>; 2]) -> Option<Duration> {
    let least = limits.into_iter().flatten().chain(timeout_of(headers)).min()?;
    headers.insert(TIMEOUT, encode_timeout(least));
    Some(least)
}

fn timeout_of(headers: &HeaderMap) -> Option<Duration> {
    decode_timeout(headers.get(TIMEOUT)?.to_str().ok()?)
}

/// `grpc-timeout` is at most eight digits and a unit
/// (<https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>).
fn decode_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(value * 3600)),
        "M" => Some(Duration::from_secs(value * 60)),
        "S" => Some(Duration::from_secs(value)),
        "m" => Some(Duration::from_millis(value)),
        "u" => Some(Duration::from_micros(value)),
        "n" => Some(Duration::from_nanos(value)),
        _ => None,
    }
}

/// The finest unit that holds the time in eight digits, rounded down so that a hop never lengthens a deadline.
fn encode_timeout(timeout: Duration) -> HeaderValue {
    const MOST: u128 = 99_999_999;
    let candidates = [
        (timeout.as_nanos(), 'n'),
        (timeout.as_micros(), 'u'),
        (timeout.as_millis(), 'm'),
        (u128::from(timeout.as_secs()), 'S'),
    ];
    let (value, unit) = candidates.into_iter().find(|(value, _)| *value <= MOST).unwrap_or((MOST, 'S'));
    HeaderValue::from_str(&format!("{value}{unit}")).expect("digits and a letter are valid metadata")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_survive_the_wire_and_never_grow() {
        for timeout in [0, 1, 99_999_999, 100_000_000, 12_345_678_901, 86_400_000_000_000, 99_999_999_999_999_999] {
            let timeout = Duration::from_nanos(timeout);
            let text = encode_timeout(timeout);
            let back = decode_timeout(text.to_str().unwrap()).unwrap();
            assert!(back <= timeout, "{timeout:?} became {back:?}");
            assert!(timeout - back <= timeout / 1000, "{timeout:?} became {back:?}");
        }
        assert_eq!(decode_timeout("2H"), Some(Duration::from_secs(7200)));
    }

    #[test]
    fn unreadable_timeouts_count_as_none() {
        for text in ["", "S", "5", "123456789S", "-1S", "1x", "+1S", "1é"] {
            assert_eq!(decode_timeout(text), None, "{text:?}");
        }
    }

    #[test]
    fn the_shortest_timeout_wins() {
        let mut headers = HeaderMap::new();
        assert_eq!(apply_timeout(&mut headers, [None, None]), None);
        assert!(headers.is_empty());
        headers.insert(TIMEOUT, HeaderValue::from_static("3S"));
        let limits = [Some(Duration::from_secs(5)), Some(Duration::from_secs(4))];
        assert_eq!(apply_timeout(&mut headers, limits), Some(Duration::from_secs(3)));
        assert_eq!(apply_timeout(&mut headers, [Some(Duration::from_millis(7)), None]), Some(Duration::from_millis(7)));
        assert_eq!(timeout_of(&headers), Some(Duration::from_millis(7)));
    }

    #[tokio::test(start_paused = true)]
    async fn the_time_left_shrinks_as_time_passes() {
        let mut headers = HeaderMap::new();
        headers.insert(TIMEOUT, HeaderValue::from_static("10S"));
        let context = CallContext::from_headers(&headers);
        tokio::time::advance(Duration::from_secs(4)).await;
        assert_eq!(context.remaining(), Some(Duration::from_secs(6)));
        tokio::time::advance(Duration::from_secs(40)).await;
        assert_eq!(context.remaining(), Some(Duration::ZERO));
    }

    #[test]
    fn a_trace_id_is_taken_only_from_a_sound_traceparent() {
        let with = |text: &str| CallContext::default().with_traceparent(text).unwrap();
        let sound = with("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        assert_eq!(sound.trace_id(), Some("0af7651916cd43dd8448eb211c80319c"));
        assert_eq!(with("00-00000000000000000000000000000000-b7ad6b7169203331-01").trace_id(), None);
        assert_eq!(with("nonsense").trace_id(), None);
        assert!(CallContext::default().with_traceparent("a\nb").is_none());
    }

    #[test]
    fn what_the_author_set_is_not_overwritten() {
        let context = CallContext::default().with_traceparent("outer").unwrap();
        let mut headers = HeaderMap::new();
        context.apply(&mut headers);
        assert_eq!(headers["traceparent"], "outer");
        headers.insert("traceparent", HeaderValue::from_static("inner"));
        context.apply(&mut headers);
        assert_eq!(headers["traceparent"], "inner");
    }
}
