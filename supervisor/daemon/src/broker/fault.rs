//! What a peer did wrong in the middle of a call, turned into the call's end and an event.

use h2::Reason as Code;
use plugvisor_core::{
    breaker::Outcome,
    route::{Reason, Refusal},
};

use super::{
    call::End,
    caller::Caller,
    event::{BrokerEvent, Sender},
    frame::Breach,
    provider::Admitted,
};

#[derive(Debug)]
pub(super) enum Fault {
    /// Somebody's messages break a rule.
    Breach(Sender, Breach),
    /// The provider's response is not gRPC.
    NotGrpc(String),
    /// The provider ended the stream or the connection.
    Lost(h2::Error),
}

impl Fault {
    /// Ends the call, and tells the supervisor what is the provider's fault.
    pub(super) fn end(self, caller: &Caller, admitted: &Admitted) -> End {
        let provider = &admitted.provider;
        let name = &provider.identity.name;
        match self {
            Self::Breach(sender, Breach::TooLarge { size }) => {
                let limit = provider.limits.max_message;
                let who = match sender {
                    Sender::Caller => "the request".to_owned(),
                    Sender::Provider => format!("the response of plugin {name}"),
                };
                let event = BrokerEvent::MessageTooLarge {
                    provider: provider.identity.clone(),
                    caller: caller.identity.to_string(),
                    sender,
                    size,
                    limit,
                };
                admitted.shared.tell_once(&format!("{name} {}", caller.identity), event);
                let refusal = Refusal::new(
                    Reason::MessageTooLarge,
                    format!("{who} has a message of {size} bytes, over the limit of {limit}"),
                    "send it in parts (a stream), or raise the plugin's message limit",
                );
                End::Cut { refusal, outcome: Outcome::Ignored }
            }
            Self::Breach(Sender::Caller, Breach::Flag(flag)) => {
                let refusal = Refusal::new(
                    Reason::BadRequest,
                    format!(
                        "the request has a message that begins with the byte {flag:#04x}, which gRPC does not know"
                    ),
                    "call with a gRPC client",
                );
                End::Cut { refusal, outcome: Outcome::Ignored }
            }
            Self::Breach(Sender::Provider, Breach::Flag(flag)) => {
                broken(admitted, &format!("its response has a message that begins with the byte {flag:#04x}"))
            }
            Self::NotGrpc(what) => broken(admitted, &what),
            Self::Lost(error) => lost(&error, admitted),
        }
    }
}

fn broken(admitted: &Admitted, what: &str) -> End {
    let name = &admitted.provider.identity.name;
    admitted.provider.tell_protocol(&admitted.shared, what.to_owned());
    End::cut(Refusal::new(
        Reason::ProtocolError,
        format!("plugin {name} broke gRPC: {what}"),
        format!("tell the author of {name}; `plugvisor logs {name}` may say more"),
    ))
}

fn lost(error: &h2::Error, admitted: &Admitted) -> End {
    let name = &admitted.provider.identity.name;
    // A stream that the provider reset, or a rule of HTTP/2 that it broke. Connections that end tell of themselves.
    let by_reset = error.is_reset() && error.is_remote() && error.reason() != Some(Code::REFUSED_STREAM);
    if by_reset {
        let code = error.reason().map_or_else(String::new, |code| format!(" ({code:?})"));
        return broken(admitted, &format!("it reset the stream{code} without a grpc-status"));
    }
    if error.is_library() {
        return broken(admitted, &error.to_string());
    }
    End::cut(Refusal::new(
        Reason::ProviderLost,
        format!("plugin {name} went away during the call: {error}"),
        format!("try again if the call may run twice; `plugvisor describe {name}` says how the plugin is"),
    ))
}
