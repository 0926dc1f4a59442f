//! Bounds of the egress proxy.

use std::time::Duration;

use plugvisor_core::egress::HeadLimits;

use crate::config::defaults;

/// Bounds of all that a plugin, and the servers that it asks, can make the supervisor hold or wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EgressLimits {
    /// Connections of one plugin at once.
    pub connections: usize,
    /// Connections of all plugins at once.
    pub connections_of_all: usize,
    /// The head of a request.
    pub head: HeadLimits,
    /// How long a head may take from its first byte, and the first one from the connection.
    pub head_time: Duration,
    /// How long a connection may rest between two requests.
    pub rest: Duration,
    /// Names of one plugin that are looked up at once.
    pub lookups: usize,
    /// Names of all plugins that are looked up at once.
    pub lookups_of_all: usize,
    /// How long looking a name up may take.
    pub lookup_time: Duration,
    /// Addresses of a name that are tried.
    pub attempts: usize,
    /// How long one address is tried alone before the next one is tried beside it.
    pub stagger: Duration,
    /// How long connecting may take.
    pub connect_time: Duration,
    /// How long nothing may pass in either direction.
    pub idle: Duration,
}

impl Default for EgressLimits {
    fn default() -> Self {
        Self {
            connections: defaults::EGRESS_CONNECTIONS,
            connections_of_all: defaults::EGRESS_CONNECTIONS_OF_ALL,
            head: HeadLimits { bytes: defaults::EGRESS_HEAD_BYTES, fields: defaults::EGRESS_HEAD_FIELDS },
            head_time: defaults::EGRESS_HEAD_TIME,
            rest: defaults::EGRESS_REST,
            lookups: defaults::EGRESS_LOOKUPS,
            lookups_of_all: defaults::EGRESS_LOOKUPS_OF_ALL,
            lookup_time: defaults::EGRESS_LOOKUP_TIME,
            attempts: defaults::EGRESS_ATTEMPTS,
            stagger: defaults::EGRESS_STAGGER,
            connect_time: defaults::EGRESS_CONNECT_TIME,
            idle: defaults::EGRESS_IDLE,
        }
    }
}
