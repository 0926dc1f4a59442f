//! The broker's bounds. Every size, count and time that a peer could stretch is here, with its default.

use std::time::Duration;

use crate::traces::Tracer;

pub use super::http2::budget::BudgetLimits;

/// Bounds of the broker as a whole.
#[derive(Clone, Debug)]
pub struct BrokerConfig {
    /// Bounds of each connection from a plugin.
    pub plugin_connections: ConnectionLimits,
    /// Bounds of each connection from local applications; all of them together share `max_connections`.
    pub local_connections: ConnectionLimits,
    /// The deadline of a call that brings none.
    pub default_deadline: Duration,
    /// How long a provider may take to accept a connection, and then to answer HTTP/2 on it.
    pub connect_timeout: Duration,
    /// Bytes of one call's response that may wait in the broker. The connection's window is this times the provider's
    /// concurrency limit: a caller that does not read can then hold up its own calls only.
    pub provider_stream_window: u32,
    /// The largest frame accepted from a provider, in bytes.
    pub provider_max_frame_size: u32,
    /// The longest deadline of a call to a provider that sets none of its own, and to the supervisor itself.
    pub max_deadline: Duration,
    /// A call that ran out of time counts against its provider's breaker only when the provider, asked in full, then had
    /// at least this long and did not begin to answer: a caller cannot open a breaker with deadlines that nobody can
    /// meet, with a request that it never ends, or with a response that it does not read.
    pub fair_deadline: Duration,
    /// How many distinct methods of one provider get metrics of their own; the others are counted together as `other`.
    pub max_method_series: usize,
    /// Commands waiting for the broker's thread; beyond that, senders wait.
    pub command_queue: usize,
    /// Where calls are traced; `None` leaves `traceparent` as it comes.
    pub tracer: Option<Tracer>,
    /// Events waiting for the reader; beyond that they are dropped and counted in the snapshot.
    pub event_queue: usize,
}

impl Default for BrokerConfig {
    fn default() -> Self {
        Self {
            plugin_connections: ConnectionLimits::default(),
            local_connections: ConnectionLimits { max_connections: 128, ..ConnectionLimits::default() },
            default_deadline: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(10),
            provider_stream_window: 256 * 1024,
            provider_max_frame_size: 128 * 1024,
            max_deadline: Duration::from_secs(24 * 3600),
            fair_deadline: Duration::from_millis(100),
            max_method_series: 64,
            command_queue: 256,
            tracer: None,
            event_queue: 1024,
        }
    }
}

/// Bounds of the HTTP/2 connections of one caller.
#[derive(Clone, Debug)]
pub struct ConnectionLimits {
    /// Connections open at once; one more is closed as soon as it is accepted.
    pub max_connections: usize,
    /// Calls in flight on one connection (`SETTINGS_MAX_CONCURRENT_STREAMS`).
    pub max_streams: u32,
    /// Bytes of one call's messages that may wait in the broker (RFC 9113, section 5.2).
    pub stream_window: u32,
    /// Bytes of all calls' messages on one connection that may wait in the broker.
    pub connection_window: u32,
    /// The largest frame accepted, in bytes.
    pub max_frame_size: u32,
    /// All metadata of one request together, in bytes as RFC 9113, section 6.5.2 counts them.
    pub max_header_list_size: u32,
    /// What a peer may ask for without getting anywhere: calls given up, pings, settings, empty frames.
    pub budget: BudgetLimits,
    /// How long a peer may take to begin HTTP/2, and to answer a ping on a connection without calls.
    pub handshake_timeout: Duration,
    /// How long a connection without calls stays silent before the peer is pinged.
    pub idle_ping: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            max_connections: 8,
            max_streams: 256,
            stream_window: 256 * 1024,
            connection_window: 8 * 1024 * 1024,
            max_frame_size: 128 * 1024,
            max_header_list_size: 32 * 1024,
            budget: BudgetLimits::default(),
            handshake_timeout: Duration::from_secs(10),
            idle_ping: Duration::from_secs(60),
        }
    }
}

/// Bounds of the calls to one provider.
#[derive(Clone, Debug)]
pub struct CallLimits {
    /// Calls in flight; one more is refused as `overloaded`.
    pub max_concurrent: usize,
    /// The largest message either way, in bytes as on the wire (compressed, if it is), without its five-byte prefix.
    pub max_message: u32,
    /// The longest deadline (`maxExecutionTime`); a caller's longer one is cut to it.
    pub max_deadline: Option<Duration>,
}

impl Default for CallLimits {
    fn default() -> Self {
        // 4 MiB is what gRPC libraries accept when nothing else is configured.
        Self { max_concurrent: 200, max_message: 4 * 1024 * 1024, max_deadline: None }
    }
}
