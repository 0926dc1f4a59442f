//! What a call looks like as spans. Knows OpenTelemetry's names for it, and nothing of how spans are sent.

use std::borrow::Cow;

use opentelemetry::{
    InstrumentationScope, KeyValue, SpanId, TraceFlags,
    trace::{SpanContext, SpanKind, Status, TraceState},
};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};
use tonic::Code;

use super::{CallTrace, TracedCall};

/// The broker's span, and the one of the way to the provider when the call came so far.
pub(super) fn of_call(trace: &CallTrace, call: TracedCall, scope: &InstrumentationScope) -> Vec<SpanData> {
    let TracedCall { caller, callee, method, status, reason, passed_after, took } = call;
    let code = Code::from_i32(status);
    let name: Cow<'static, str> = Cow::Owned(method.clone());
    let mut attributes = vec![
        KeyValue::new("rpc.system.name", "grpc"),
        KeyValue::new("rpc.method", method),
        KeyValue::new("rpc.response.status_code", name_of(code)),
        KeyValue::new("plugvisor.caller", caller),
    ];
    attributes.extend(callee.map(|callee| KeyValue::new("plugvisor.callee", callee)));
    if let Some(what) = reason.or((code != Code::Ok).then(|| name_of(code))) {
        attributes.push(KeyValue::new("error.type", what));
    }
    let end_time = trace.began + took;
    let span = |id: SpanId, parent: SpanId, remote, kind: SpanKind, start_time, failed: bool, attributes| SpanData {
        span_context: SpanContext::new(trace.trace, id, TraceFlags::SAMPLED, false, TraceState::NONE),
        parent_span_id: parent,
        parent_span_is_remote: remote,
        span_kind: kind,
        name: name.clone(),
        start_time,
        end_time,
        attributes,
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status: if failed { Status::error("") } else { Status::Unset },
        instrumentation_scope: scope.clone(),
    };
    let remote = trace.parent != SpanId::INVALID;
    let way = passed_after.map(|after| {
        let start = trace.began + after.min(took);
        span(trace.client, trace.server, false, SpanKind::Client, start, code != Code::Ok, attributes.clone())
    });
    let server =
        span(trace.server, trace.parent, remote, SpanKind::Server, trace.began, is_servers_fault(code), attributes);
    std::iter::once(server).chain(way).collect()
}

/// The conventions blame a server only for these.
fn is_servers_fault(code: Code) -> bool {
    matches!(
        code,
        Code::Unknown
            | Code::DeadlineExceeded
            | Code::Unimplemented
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
    )
}

/// The status as gRPC's documents write it.
fn name_of(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
