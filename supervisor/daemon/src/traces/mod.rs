//! Traces of calls: for each call that is traced two spans, the broker's own and the one of its way to the provider.
//!
//! ```text
//!   application ── traceparent ──▶ broker: SERVER span ──▶ CLIENT span ── traceparent ──▶ provider ──▶ broker …
//! ```
//!
//! The provider is given the CLIENT span as its parent, so a call that it makes on behalf of this one continues the
//! trace. This module owns the spans and their way to an OTLP receiver. It does not know HTTP/2, routes or plugins, and
//! nothing on a call's way waits for it: what the queue cannot take is dropped and counted.
//!
//! Sources: W3C Trace Context; OpenTelemetry's semantic conventions for RPC spans.

mod export;
mod span;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use http::HeaderValue;
use opentelemetry::{
    Context, SpanId, TraceFlags, TraceId,
    propagation::{Extractor, TextMapPropagator as _},
    trace::TraceContextExt as _,
};
use opentelemetry_sdk::{
    propagation::TraceContextPropagator,
    trace::{IdGenerator as _, RandomIdGenerator},
};
use tokio::sync::mpsc;

pub use export::{ExportError, Exporter};

/// Bounds and aim of the traces.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceSettings {
    /// Where OTLP over gRPC is received, such as `http://127.0.0.1:4317`.
    pub endpoint: String,
    /// The share, from 0 to 1, of traces begun here that are kept. A caller's own decision is always followed.
    pub share: f64,
    /// Calls waiting to be sent; more are dropped and counted.
    pub queue: usize,
    /// The most spans in one request to the receiver.
    pub batch: usize,
    /// How long a span may wait for others to be sent with it.
    pub delay: Duration,
    /// How long the receiver may take to answer.
    pub timeout: Duration,
}

impl TraceSettings {
    /// Every trace, with a queue of 4096 calls.
    #[must_use]
    pub fn to(endpoint: impl Into<String>) -> Self {
        Self {
            endpoint: endpoint.into(),
            share: 1.0,
            queue: 4096,
            batch: 512,
            delay: Duration::from_millis(500),
            timeout: Duration::from_secs(5),
        }
    }
}

/// Begins and ends the spans of calls. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Tracer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    calls: mpsc::Sender<(CallTrace, TracedCall)>,
    dropped: AtomicU64,
    share: f64,
    ids: RandomIdGenerator,
    propagator: TraceContextPropagator,
}

/// One traced call, from its admission on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallTrace {
    trace: TraceId,
    /// The caller's span; [`SpanId::INVALID`] when the trace begins here.
    parent: SpanId,
    server: SpanId,
    client: SpanId,
    began: SystemTime,
}

/// What is known of a call when it has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TracedCall {
    /// Who called.
    pub caller: String,
    /// The provider; `None` when the broker refused before one was chosen.
    pub callee: Option<String>,
    /// `package.Service/Method`.
    pub method: String,
    /// The gRPC status that the caller got.
    pub status: i32,
    /// Why the broker itself ended it, if it did.
    pub reason: Option<&'static str>,
    /// From the beginning to where it was passed to the provider; `None` when it never was.
    pub passed_after: Option<Duration>,
    /// From the beginning to the end.
    pub took: Duration,
}

/// The two fields of a head that carry a trace.
struct Carrier<'a>(&'a str);

impl Extractor for Carrier<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        (key == "traceparent").then_some(self.0)
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent"]
    }
}

impl Tracer {
    fn new(settings: &TraceSettings) -> (Self, mpsc::Receiver<(CallTrace, TracedCall)>) {
        let (calls, received) = mpsc::channel(settings.queue.max(1));
        let shared = Shared {
            calls,
            dropped: AtomicU64::new(0),
            share: settings.share,
            ids: RandomIdGenerator::default(),
            propagator: TraceContextPropagator::new(),
        };
        (Self { shared: Arc::new(shared) }, received)
    }

    /// Begins the trace of a call that came with this `traceparent`. `None` when the call is not traced: then its
    /// metadata travels on as it came.
    #[must_use]
    pub fn begin(&self, traceparent: Option<&str>) -> Option<CallTrace> {
        let ids = &self.shared.ids;
        let remote = traceparent.and_then(|text| {
            let context = self.shared.propagator.extract_with_context(&Context::new(), &Carrier(text));
            let span = context.span().span_context().clone();
            span.is_valid().then_some(span)
        });
        let (trace, parent) = match remote {
            Some(span) if span.is_sampled() => (span.trace_id(), span.span_id()),
            Some(_not_sampled) => return None,
            None => {
                let trace = ids.new_trace_id();
                if !self.keeps(trace) {
                    return None;
                }
                (trace, SpanId::INVALID)
            }
        };
        let (server, client) = (ids.new_span_id(), ids.new_span_id());
        Some(CallTrace { trace, parent, server, client, began: SystemTime::now() })
    }

    /// As OpenTelemetry's `TraceIdRatioBased` does: a trace is kept by its identifier, so that others keep it too.
    fn keeps(&self, trace: TraceId) -> bool {
        let [.., a, b, c, d, e, f, g] = trace.to_bytes();
        let low = u64::from_be_bytes([0, a, b, c, d, e, f, g]);
        #[expect(clippy::cast_precision_loss, reason = "56 bits of a random number, of which 53 decide")]
        let position = low as f64 / (1_u64 << 56) as f64;
        position < self.shared.share
    }

    /// Ends the trace of a call. Never waits.
    pub fn finish(&self, trace: CallTrace, call: TracedCall) {
        if self.shared.calls.try_send((trace, call)).is_err() {
            // Two spans a call, or one when it was never passed on; which of the two matters to nobody here.
            self.count_dropped(1);
        }
    }

    /// Calls whose spans were not delivered, since the start.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    fn count_dropped(&self, calls: usize) {
        self.shared.dropped.fetch_add(u64::try_from(calls).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

impl CallTrace {
    /// The `traceparent` that the provider is given.
    #[must_use]
    pub fn traceparent(&self) -> HeaderValue {
        let text = format!("00-{}-{}-{:02x}", self.trace, self.client, TraceFlags::SAMPLED);
        // Hexadecimal digits and dashes are always a legal value; the other branch only keeps this free of panics.
        HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static(""))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALLERS: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn tracer(share: f64) -> (Tracer, mpsc::Receiver<(CallTrace, TracedCall)>) {
        Tracer::new(&TraceSettings { share, queue: 2, ..TraceSettings::to("http://127.0.0.1:1") })
    }

    fn call() -> TracedCall {
        TracedCall {
            caller: "a".to_owned(),
            callee: None,
            method: "p.S/M".to_owned(),
            status: 0,
            reason: None,
            passed_after: None,
            took: Duration::from_millis(1),
        }
    }

    #[test]
    fn a_callers_trace_goes_on_and_names_the_broker_as_parent() {
        let (tracer, _received) = tracer(0.0);
        let trace = tracer.begin(Some(CALLERS)).unwrap();
        assert_eq!(trace.parent.to_string(), "b7ad6b7169203331");
        let header = trace.traceparent();
        let text = header.to_str().unwrap();
        assert_eq!(text, format!("00-0af7651916cd43dd8448eb211c80319c-{}-01", trace.client));
        assert_ne!(trace.client, trace.server);
        assert_ne!(trace.client, trace.parent);
        let again = tracer.begin(Some(text)).unwrap();
        assert_eq!(again.parent, trace.client, "a hop further");
    }

    #[test]
    fn a_caller_that_keeps_no_trace_is_followed() {
        let (tracer, _received) = tracer(1.0);
        assert_eq!(tracer.begin(Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")), None);
    }

    #[test]
    fn what_is_no_trace_begins_one() {
        let (tracer, _received) = tracer(1.0);
        for text in [None, Some(""), Some("00-0-0-01"), Some("00-00000000000000000000000000000000-b7ad6b7169203331-01")]
        {
            let trace = tracer.begin(text).unwrap();
            assert_eq!(trace.parent, SpanId::INVALID, "{text:?}");
            assert_ne!(trace.trace, TraceId::INVALID);
        }
    }

    #[test]
    fn a_share_of_the_traces_is_kept() {
        let kept = |share| {
            let (tracer, _received) = tracer(share);
            (0..4000).filter(|_| tracer.begin(None).is_some()).count()
        };
        assert_eq!(kept(0.0), 0);
        assert_eq!(kept(1.0), 4000);
        // Ten standard deviations around 1000.
        assert!((726..1274).contains(&kept(0.25)), "{}", kept(0.25));
    }

    #[test]
    fn a_full_queue_drops_and_counts() {
        let (tracer, received) = tracer(1.0);
        for _ in 0..5 {
            tracer.finish(tracer.begin(None).unwrap(), call());
        }
        assert_eq!(tracer.dropped(), 3);
        drop(received);
        tracer.finish(tracer.begin(None).unwrap(), call());
        assert_eq!(tracer.dropped(), 4);
    }
}
