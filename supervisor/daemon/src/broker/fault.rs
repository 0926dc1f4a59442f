//! What a peer did wrong in the middle of a call, turned into the call's end and an event.

use plugvisor_core::{
    breaker::Outcome,
    route::{Reason, Refusal},
};

use super::{
    call::End,
    caller::Caller,
    event::{BrokerEvent, Sender},
    http2::Code,
    message::Breach,
    provider::Admitted,
};

#[derive(Debug)]
pub(super) enum Fault {
    /// Somebody's messages break a rule.
    Breach(Sender, Breach),
    /// The provider's response is not gRPC.
    NotGrpc(String),
    /// The provider reset the stream.
    Reset(Code),
    /// The provider broke HTTP/2; the text says how.
    Protocol(String),
    /// The provider's connection ended; the text says how.
    Lost(String),
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
            // It says itself that it has not looked at the call.
            Self::Reset(code @ Code::REFUSED_STREAM) => lost(&format!("it refused the stream ({code})"), admitted),
            Self::Reset(code) => broken(admitted, &format!("it reset the stream ({code}) without a grpc-status")),
            Self::NotGrpc(what) | Self::Protocol(what) => broken(admitted, &what),
            Self::Lost(how) => lost(&how, admitted),
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

fn lost(how: &str, admitted: &Admitted) -> End {
    let name = &admitted.provider.identity.name;
    End::cut(Refusal::new(
        Reason::ProviderLost,
        format!("plugin {name} went away during the call: {how}"),
        format!("try again if the call may run twice; `plugvisor describe {name}` says how the plugin is"),
    ))
}

/// Ends a call to a host module. The supervisor is no plugin: nothing of this is told, or counted by a breaker.
pub(super) fn end_at_host(fault: Fault) -> End {
    let (reason, what) = match fault {
        Fault::Breach(_, Breach::TooLarge { size }) => {
            (Reason::MessageTooLarge, format!("a message of {size} bytes is over the limit"))
        }
        Fault::Breach(Sender::Caller, Breach::Flag(flag)) => {
            (Reason::BadRequest, format!("the request has a message that begins with the byte {flag:#04x}"))
        }
        Fault::Breach(Sender::Provider, Breach::Flag(_)) => {
            (Reason::ProtocolError, "the supervisor's own service broke gRPC".to_owned())
        }
        Fault::NotGrpc(what) | Fault::Protocol(what) | Fault::Lost(what) => (Reason::ProtocolError, what),
        Fault::Reset(code) => {
            (Reason::ProtocolError, format!("the supervisor's own service reset the stream ({code})"))
        }
    };
    let refusal = Refusal::new(reason, what, "see the log of plugvisord");
    End::Cut { refusal, outcome: Outcome::Ignored }
}
