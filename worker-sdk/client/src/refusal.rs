//! Refusals of the broker, read from a status.
//!
//! The wire form is in `proto/plugvisor/broker/v1/broker.proto`. This module maps names; it decides nothing.

use plugvisor_proto::broker::v1 as wire;
use tonic::{Code, Status};

const REASON_METADATA: &str = "plugvisor-reason";
const HINT_METADATA: &str = "plugvisor-hint";

/// Why the broker itself, not the provider, ended a call.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// No plugin provides the service.
    UnknownService,
    /// No plugin offers the token.
    UnknownToken,
    /// Several plugins provide the service and no token chose one.
    AmbiguousService,
    /// The caller lacks a capability, or the service is not exported to it.
    CallerNotAllowed,
    /// The provider is not loaded, is restarting or is draining.
    ProviderNotReady,
    /// The provider's breaker is open.
    BreakerOpen,
    /// The provider's concurrency limit and queue are full.
    Overloaded,
    /// The time ran out at the broker.
    Deadline,
    /// The call came back to a plugin that is already on its path, or made too many hops.
    Loop,
    /// The provider's process or connection ended during the call.
    ProviderLost,
    /// A message is over the size limit.
    MessageTooLarge,
    /// The provider broke HTTP/2 or gRPC.
    ProtocolError,
    /// The caller's request is not gRPC.
    BadRequest,
    /// The supervisor is stopping.
    Stopping,
    /// The caller may call this service of the host, and this version of the host does not have it.
    ModuleNotAvailable,
    /// A reason that this version of the crate does not know, as sent.
    Unknown(String),
}

impl Reason {
    /// Reads the wire form, such as `breaker_open`.
    pub fn parse(text: &str) -> Self {
        // The bound keeps the copy small whatever the other side sends; no reason is half as long.
        let known = (text.len() <= 64)
            .then(|| wire::Reason::from_str_name(&format!("REASON_{}", text.to_ascii_uppercase())))
            .flatten();
        match known {
            Some(wire::Reason::UnknownService) => Self::UnknownService,
            Some(wire::Reason::UnknownToken) => Self::UnknownToken,
            Some(wire::Reason::AmbiguousService) => Self::AmbiguousService,
            Some(wire::Reason::CallerNotAllowed) => Self::CallerNotAllowed,
            Some(wire::Reason::ProviderNotReady) => Self::ProviderNotReady,
            Some(wire::Reason::BreakerOpen) => Self::BreakerOpen,
            Some(wire::Reason::Overloaded) => Self::Overloaded,
            Some(wire::Reason::Deadline) => Self::Deadline,
            Some(wire::Reason::Loop) => Self::Loop,
            Some(wire::Reason::ProviderLost) => Self::ProviderLost,
            Some(wire::Reason::MessageTooLarge) => Self::MessageTooLarge,
            Some(wire::Reason::ProtocolError) => Self::ProtocolError,
            Some(wire::Reason::BadRequest) => Self::BadRequest,
            Some(wire::Reason::Stopping) => Self::Stopping,
            Some(wire::Reason::ModuleNotAvailable) => Self::ModuleNotAvailable,
            Some(wire::Reason::Unspecified) | None => Self::Unknown(text.to_owned()),
        }
    }

    /// Whether the same call may succeed later without anybody changing anything.
    ///
    /// Says nothing about whether the call had an effect: after [`Reason::ProviderLost`] and [`Reason::Deadline`] it may
    /// have had one.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::ProviderNotReady
            | Self::BreakerOpen
            | Self::Overloaded
            | Self::Deadline
            | Self::ProviderLost
            | Self::Stopping => true,
            Self::UnknownService
            | Self::UnknownToken
            | Self::AmbiguousService
            | Self::CallerNotAllowed
            | Self::Loop
            | Self::MessageTooLarge
            | Self::ProtocolError
            | Self::BadRequest
            | Self::ModuleNotAvailable
            | Self::Unknown(_) => false,
        }
    }
}

/// A call that the broker refused or ended itself.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refusal {
    /// Why.
    pub reason: Reason,
    /// What to do next; empty when the broker had no advice.
    pub hint: String,
    /// The gRPC status code.
    pub code: Code,
    /// What happened, to what.
    pub message: String,
}

impl Refusal {
    /// Reads the refusal out of a status; `None` when the provider, not the broker, answered.
    pub fn from_status(status: &Status) -> Option<Self> {
        let text = |name| status.metadata().get(name).and_then(|value| value.to_str().ok());
        Some(Self {
            reason: Reason::parse(text(REASON_METADATA)?),
            hint: text(HINT_METADATA).unwrap_or_default().to_owned(),
            code: status.code(),
            message: status.message().to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(reason: &'static str) -> Status {
        let mut status = Status::unavailable("the breaker of thumbnailer is open");
        status.metadata_mut().insert(REASON_METADATA, reason.parse().unwrap());
        status.metadata_mut().insert(HINT_METADATA, "try again in 20 s".parse().unwrap());
        status
    }

    #[test]
    fn a_refusal_is_typed() {
        let refusal = Refusal::from_status(&refused("breaker_open")).unwrap();
        assert_eq!(refusal.reason, Reason::BreakerOpen);
        assert_eq!(refusal.hint, "try again in 20 s");
        assert_eq!(refusal.code, Code::Unavailable);
        assert!(refusal.reason.is_transient());
    }

    #[test]
    fn every_reason_of_the_contract_is_known() {
        for number in 1.. {
            let Ok(reason) = wire::Reason::try_from(number) else { break };
            let text = reason.as_str_name().trim_start_matches("REASON_").to_ascii_lowercase();
            assert!(!matches!(Reason::parse(&text), Reason::Unknown(_)), "{text}");
            assert!(number <= 15, "a new reason: check is_transient, then raise this number");
        }
    }

    #[test]
    fn a_reason_of_a_later_version_is_kept_as_sent() {
        let refusal = Refusal::from_status(&refused("on_fire")).unwrap();
        assert_eq!(refusal.reason, Reason::Unknown("on_fire".into()));
        assert_eq!(Reason::parse("unspecified"), Reason::Unknown("unspecified".into()));
    }

    #[test]
    fn an_answer_of_the_provider_is_not_a_refusal() {
        assert_eq!(Refusal::from_status(&Status::unavailable("mine")), None);
    }
}
