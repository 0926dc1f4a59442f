//! What the broker noticed by itself and tells the supervisor. It decides nothing: drivers do.

use plugvisor_core::{
    breaker::{Memory, Transition},
    route::Refusal,
};

use super::identity::{CallerIdentity, PluginIdentity};

/// Something the broker noticed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BrokerEvent {
    /// A provider's breaker changed its state.
    BreakerChanged {
        /// Whose breaker.
        provider: PluginIdentity,
        /// How, and why.
        transition: Transition,
        /// Where it stands now, to be remembered.
        memory: Memory,
    },
    /// The connection to a provider ended, or could not be made, while the provider was expected to serve.
    ProviderLost {
        /// Which provider.
        provider: PluginIdentity,
        /// What the system or HTTP/2 said.
        detail: String,
        /// Calls that were in flight on the connection.
        in_flight: usize,
    },
    /// A provider broke HTTP/2 or gRPC.
    ProviderProtocolError {
        /// Which provider.
        provider: PluginIdentity,
        /// Which rule it broke.
        detail: String,
    },
    /// A caller broke HTTP/2, did not begin it in time, or is not who may use the socket; the connection was closed.
    CallerRejected {
        /// The caller, in words.
        caller: String,
        /// Why.
        detail: String,
    },
    /// A caller called what it may not, or what is not there.
    CallDenied {
        /// Who called.
        caller: CallerIdentity,
        /// What was called, cut to a bounded length.
        service: String,
        /// Why it was refused; its texts are cut too.
        refusal: Refusal,
    },
    /// A provider sent, or was sent, a message over its limit.
    MessageTooLarge {
        /// Which provider.
        provider: PluginIdentity,
        /// The caller, in words.
        caller: String,
        /// Who sent the message.
        sender: Sender,
        /// The size that the message's prefix announced.
        size: u32,
        /// The limit.
        limit: u32,
    },
}

/// One of the two ends of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// Who made the call.
    Caller,
    /// Who serves it.
    Provider,
}
