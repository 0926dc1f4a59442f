//! Whether a call may begin, and with which head it travels on.

use std::{
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use plugvisor_core::route::{Decision, Reason, Refusal, route};

use super::{
    caller::Caller,
    deadline,
    event::BrokerEvent,
    headers::{self, RequestHead},
    provider::Admitted,
    shared::Shared,
};

/// The longest text of a caller's own making in an event, in bytes: events are kept, and a path may have kilobytes.
const EVENT_TEXT: usize = 512;

/// Tells of refusals that somebody has to mend: those that only say "not now" are counted, not told.
pub(super) fn tell_denied(shared: &Shared, caller: &Caller, path: &[u8], refused: &Refusal) {
    match refused.reason {
        Reason::UnknownService
        | Reason::UnknownToken
        | Reason::AmbiguousService
        | Reason::CallerNotAllowed
        | Reason::Loop
        | Reason::ModuleNotAvailable => {}
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
    let path = std::str::from_utf8(path).unwrap_or_default();
    let service = headers::service_and_method(path).map_or("", |(service, _)| service);
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

/// Where a call goes.
#[derive(Debug)]
pub(super) enum Target {
    /// To a plugin.
    Provider(Admitted),
    /// To the supervisor itself.
    Host,
}

/// Decides over a call that arrived on a caller's connection.
pub(super) fn admit(
    shared: &Rc<Shared>,
    caller: &Caller,
    head: &RequestHead<'_>,
    began: Instant,
) -> Result<(Target, CallTime), Refusal> {
    if shared.is_stopping() {
        return Err(Refusal::new(Reason::Stopping, "the supervisor is stopping", "try again when it runs again"));
    }
    if head.method != b"POST" || !head.is_grpc {
        return Err(bad_request("the request is not gRPC: it must be a POST with content-type application/grpc"));
    }
    let path = std::str::from_utf8(head.path).ok().filter(|path| !path.contains(['?', '#']));
    let path = path.ok_or_else(|| bad_request("the request has no path, or a query behind it"))?;
    let (service, _method) =
        headers::service_and_method(path).ok_or_else(|| bad_request("the path is not /package.Service/Method"))?;
    let asked = match head.timeout {
        Some(value) => Some(deadline::parse(value).map_err(|error| bad_request(&error.to_string()))?),
        None => None,
    };
    let token = text(head.token, "plugvisor-token")?;
    let hops = text(head.hops, "plugvisor-hops")?;
    let routes = Arc::clone(&shared.routes.borrow());
    match route(&routes, caller.rules(), service, token, hops)? {
        Decision::Host(module) => {
            if !shared.offers(module) {
                return Err(Refusal::new(
                    Reason::ModuleNotAvailable,
                    format!("{service} is not offered by this supervisor"),
                    "update plugvisord, or do without the service",
                ));
            }
            let given = asked.unwrap_or(shared.config.default_deadline).min(shared.config.max_deadline);
            Ok((Target::Host, CallTime { began, given }))
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
            Ok((Target::Provider(provider.admit(shared, began)?), time))
        }
    }
}

pub(super) fn bad_request(what: &str) -> Refusal {
    Refusal::new(Reason::BadRequest, what, "call with a gRPC client; see the contract plugvisor.broker.v1")
}

fn text<'h>(value: Option<&'h [u8]>, name: &str) -> Result<Option<&'h str>, Refusal> {
    let Some(value) = value else { return Ok(None) };
    let visible = value.iter().all(|byte| matches!(byte, b' '..=b'~' | b'\t'));
    let text = std::str::from_utf8(value).ok().filter(|_| visible);
    text.map(Some).ok_or_else(|| bad_request(&format!("the metadata value {name} is not text")))
}
