//! The broker: it accepts calls from plugins and local applications and passes them to the plugins that serve them.
//!
//! It owns the callers' and the providers' HTTP/2 connections, the breakers and the call metrics, all on one thread of
//! its own, so that nothing on a call's way takes a lock. It deliberately does not know what a message contains
//! (bodies pass as bytes), who may call whom (`plugvisor-core` decides over an immutable table), or when a plugin
//! starts and stops (drivers say so through [`BrokerHandle`]).

mod config;
mod event;
mod handle;
mod identity;
mod snapshot;

pub use config::{BrokerConfig, CallLimits, ConnectionLimits};
pub use event::{BreakerState, BrokerEvent, Sender};
pub use handle::{Broker, BrokerHandle, CallerSpec, Drained, HostModule, LocalSpec, ProviderSpec, StartError, Stopped};
pub use identity::{CallerIdentity, PluginIdentity};
pub use snapshot::{CallSeries, DURATION_BOUNDS, ProviderSnapshot, RejectedSeries, STATUS_CODES, Snapshot};
