//! Whether a call may begin, and with which head it travels on.

use std::{rc::Rc, sync::Arc, time::Duration};

use bytes::Bytes;
use h2::{RecvStream, server::SendResponse};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Version, header::CONTENT_TYPE, request::Parts,
    uri::PathAndQuery,
};
use plugvisor_core::route::{Decision, Reason, Refusal, extend_hops, route};
use tokio::time::Instant;

use super::{
    call::Call, caller::Caller, deadline, event::BrokerEvent, headers, host, provider::Admitted, refusal,
    shared::Shared,
};

/// Begins a call that arrived on a caller's connection: passes it on, or refuses it at once.
pub(super) fn begin(
    shared: &Rc<Shared>,
    caller: &Rc<Caller>,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().cloned();
    // The tasks end with their calls, and calls with either of their streams: they need no other owner.
    match admit(shared, caller, parts) {
        Ok(Target::Provider { admitted, request, time }) => {
            let call = Call { caller: Rc::clone(caller), admitted, time, respond };
            tokio::task::spawn_local(call.run(request, body));
        }
        Ok(Target::Host { service, head, time }) => {
            let call = host::Call { shared: Rc::clone(shared), caller: Rc::clone(caller), time, respond };
            tokio::task::spawn_local(call.run(service, head, body));
        }
        Err(refused) => {
            shared.metrics.rejected(caller.key, refused.reason);
            tell_denied(shared, caller, path.as_ref(), &refused);
            // An error means that the caller is gone; there is nobody to tell.
            let _ = respond.send_response(refusal::response(&refused), true);
        }
    }
}

/// The longest text of a caller's own making in an event, in bytes: events are kept, and a path may have kilobytes.
const EVENT_TEXT: usize = 512;

/// Tells of refusals that somebody has to mend: those that only say "not now" are counted, not told.
fn tell_denied(shared: &Shared, caller: &Caller, path: Option<&PathAndQuery>, refused: &Refusal) {
    match refused.reason {
        Reason::UnknownService
        | Reason::UnknownToken
        | Reason::AmbiguousService
        | Reason::CallerNotAllowed
        | Reason::Loop => {}
        Reason::ProviderNotReady
        | Reason::BreakerOpen
        | Reason::Overloaded
        | Reason::Deadline
        | Reason::ProviderLost
        | Reason::MessageTooLarge
        | Reason::ProtocolError
        | Reason::BadRequest
        | Reason::Stopping => return,
    }
    let service = path.and_then(|path| headers::service_and_method(path.as_str())).map_or("", |(service, _)| service);
    let refusal = Refusal::new(refused.reason, cut(&refused.message), cut(&refused.hint));
    let event = BrokerEvent::CallDenied { caller: caller.identity.clone(), service: cut(service).to_owned(), refusal };
    // Not by the service: its name is the caller's choice, and a new one each time would be told each time.
    shared.tell_once(&format!("{} {}", caller.identity.label(), refused.reason), event);
}

fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(EVENT_TEXT)]
}

/// The time of one call.
#[derive(Clone, Copy, Debug)]
pub(super) struct CallTime {
    pub(super) began: Instant,
    /// From its beginning to its deadline.
    pub(super) given: Duration,
}

impl CallTime {
    pub(super) fn deadline(self) -> Instant {
        self.began + self.given
    }

    /// The refusal of a call that `callee` did not finish in time.
    pub(super) fn over(self, callee: &str) -> Refusal {
        Refusal::new(
            Reason::Deadline,
            format!("{callee} did not finish the call within {:?}", self.given),
            "allow more time (grpc-timeout, up to the provider's limit), or find out why the provider is slow",
        )
    }
}

enum Target {
    Provider { admitted: Admitted, request: Request<()>, time: CallTime },
    Host { service: host::HostService, head: Parts, time: CallTime },
}

fn admit(shared: &Rc<Shared>, caller: &Caller, mut head: Parts) -> Result<Target, Refusal> {
    let began = Instant::now();
    if shared.is_stopping() {
        return Err(Refusal::new(Reason::Stopping, "the supervisor is stopping", "try again when it runs again"));
    }
    if head.method != Method::POST || !is_grpc(&head.headers) {
        return Err(bad_request("the request is not gRPC: it must be a POST with content-type application/grpc"));
    }
    let path = head.uri.path_and_query().filter(|path| path.query().is_none()).cloned();
    let path = path.ok_or_else(|| bad_request("the request has no path, or a query behind it"))?;
    let (service, _method) = headers::service_and_method(path.as_str())
        .ok_or_else(|| bad_request("the path is not /package.Service/Method"))?;
    let asked = match head.headers.get(headers::TIMEOUT) {
        Some(value) => Some(deadline::parse(value).map_err(|error| bad_request(&error.to_string()))?),
        None => None,
    };
    let token = text(&head.headers, &headers::TOKEN)?;
    let hops = text(&head.headers, &headers::HOPS)?;
    let routes = Arc::clone(&shared.routes.borrow());
    match route(&routes, caller.rules(), service, token, hops)? {
        Decision::Host(module) => {
            let service = shared.module(module).ok_or_else(|| {
                Refusal::new(
                    Reason::UnknownService,
                    format!("{service} is not offered by this supervisor"),
                    "update plugvisord, or do without the service",
                )
            })?;
            headers::strip(&mut head.headers);
            let given = asked.unwrap_or(shared.config.default_deadline).min(shared.config.max_deadline);
            Ok(Target::Host { service, head, time: CallTime { began, given } })
        }
        Decision::Provider(listed) => {
            let provider = shared.target(listed.slot()).ok_or_else(|| {
                let name = listed.name();
                Refusal::new(
                    Reason::ProviderNotReady,
                    format!("plugin {name} is not ready: its generation {} is not connected", listed.generation()),
                    format!("try again shortly; `plugvisor describe {name}` says what it waits for"),
                )
            })?;
            let cap = provider.limits.max_deadline.unwrap_or(shared.config.max_deadline);
            let time = CallTime { began, given: asked.unwrap_or(shared.config.default_deadline).min(cap) };
            let hops = caller.plugin_name().map(|name| match hops {
                None | Some("") => caller.label.clone(),
                // Names and commas, as `route` has checked; the other branch only keeps this free of panics.
                Some(_) => HeaderValue::from_maybe_shared(Bytes::from(extend_hops(hops, name)))
                    .unwrap_or_else(|_| caller.label.clone()),
            });
            let admitted = provider.admit(shared, began)?;
            headers::strip(&mut head.headers);
            head.headers.insert(headers::CALLER, caller.label.clone());
            if let Some(hops) = hops {
                head.headers.insert(headers::HOPS, hops);
            }
            head.uri = headers::provider_uri(path);
            head.version = Version::HTTP_2;
            // Nothing that one connection left here belongs to the next.
            head.extensions.clear();
            Ok(Target::Provider { admitted, request: Request::from_parts(head, ()), time })
        }
    }
}

fn bad_request(what: &str) -> Refusal {
    Refusal::new(Reason::BadRequest, what, "call with a gRPC client; see the contract plugvisor.broker.v1")
}

/// Whether a head says that gRPC follows, in whatever encoding of messages.
pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    let rest = headers.get(CONTENT_TYPE).and_then(|value| value.as_bytes().strip_prefix(b"application/grpc"));
    rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

fn text<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Result<Option<&'h str>, Refusal> {
    let value = headers.get(name).map(HeaderValue::to_str).transpose();
    value.map_err(|_| bad_request(&format!("the metadata value {name} is not text")))
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, HeaderValue};

    use super::is_grpc;

    #[test]
    fn grpc_is_known_by_its_content_type() {
        let of = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert("content-type", HeaderValue::from_static(text));
            is_grpc(&headers)
        };
        for good in ["application/grpc", "application/grpc+proto", "application/grpc;x=y"] {
            assert!(of(good), "{good}");
        }
        for bad in ["", "application/json", "application/grpc-web", "text/application/grpc"] {
            assert!(!of(bad), "{bad}");
        }
        assert!(!is_grpc(&HeaderMap::new()));
    }
}
