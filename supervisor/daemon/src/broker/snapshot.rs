//! The broker's figures at one moment, as plain values for whoever renders them.

use std::time::Duration;

use plugvisor_core::breaker;

use super::{config::CallLimits, identity::PluginIdentity};

/// Upper bounds of the duration histogram's buckets; a last bucket without bound follows.
pub const DURATION_BOUNDS: [Duration; 14] = [
    Duration::from_micros(50),
    Duration::from_micros(100),
    Duration::from_micros(250),
    Duration::from_micros(500),
    Duration::from_millis(1),
    Duration::from_micros(2_500),
    Duration::from_millis(5),
    Duration::from_millis(10),
    Duration::from_millis(25),
    Duration::from_millis(100),
    Duration::from_millis(250),
    Duration::from_secs(1),
    Duration::from_secs(5),
    Duration::from_secs(30),
];

/// The number of gRPC status codes, OK included.
pub const STATUS_CODES: usize = 17;

/// Figures since the broker started. Counters only grow, and stay when a plugin goes.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Calls that reached a provider, one entry for each caller, provider and method seen together.
    pub calls: Vec<CallSeries>,
    /// Calls that the broker refused, one entry for each caller and reason.
    pub rejected: Vec<RejectedSeries>,
    /// Providers as they are now.
    pub providers: Vec<ProviderSnapshot>,
    /// Connections from plugins and local applications that are open now.
    pub caller_connections: usize,
    /// Events that were lost because nobody read them in time.
    pub events_dropped: u64,
}

/// One time series of finished calls.
#[derive(Clone, Debug)]
pub struct CallSeries {
    /// The calling plugin's name, or `local`.
    pub caller: String,
    /// The providing plugin's name.
    pub provider: String,
    /// `package.Service/Method`, or `other` beyond the configured number of methods.
    pub method: String,
    /// Finished calls by gRPC status code.
    pub by_code: [u64; STATUS_CODES],
    /// Finished calls by duration; the bounds are [`DURATION_BOUNDS`]; not cumulative.
    pub durations: [u64; DURATION_BOUNDS.len() + 1],
    /// All durations together.
    pub duration_sum: Duration,
}

/// One time series of refused calls.
#[derive(Clone, Debug)]
pub struct RejectedSeries {
    /// The calling plugin's name, or `local`.
    pub caller: String,
    /// The reason as on the wire, such as `breaker_open`.
    pub reason: &'static str,
    /// How many.
    pub count: u64,
}

/// One provider now.
#[derive(Clone, Debug)]
pub struct ProviderSnapshot {
    /// Which provider.
    pub identity: PluginIdentity,
    /// Whether calls are let through to it.
    pub ready: bool,
    /// Its breaker.
    pub breaker: breaker::Snapshot,
    /// Calls in flight.
    pub in_flight: usize,
    /// The bounds of its calls.
    pub limits: CallLimits,
    /// Whether a connection to it is open.
    pub connected: bool,
}
