//! The broker: it accepts calls from plugins and local applications and passes them to the plugins that serve them.
//!
//! It owns the callers' and the providers' HTTP/2 connections, the breakers and the call metrics, all on one thread of
//! its own, so that nothing on a call's way takes a lock. It deliberately does not know what a message contains
//! (bodies pass as bytes), who may call whom (`plugvisor-core` decides over an immutable table), or when a plugin
//! starts and stops (drivers say so through [`BrokerHandle`]).

mod admit;
mod call;
mod caller;
mod command;
mod config;
mod deadline;
mod event;
mod exchange;
mod far;
mod fault;
mod finish;
mod handle;
mod headers;
mod host;
pub mod http2;
mod identity;
mod link;
mod listen;
mod message;
mod metrics;
mod near;
mod peer;
mod poll;
mod presence;
mod provider;
mod refusal;
mod shared;
mod snapshot;
mod timer;

pub use config::{BrokerConfig, BudgetLimits, CallLimits, ConnectionLimits};
pub use event::{BrokerEvent, Sender};
pub use handle::{AddError, Broker, BrokerHandle, CallerSpec, Drained, LocalSpec, ProviderSpec, StartError, Stopped};
pub use host::HostService;
pub use identity::{CallerIdentity, PluginIdentity};
pub use snapshot::{CallSeries, DURATION_BOUNDS, ProviderSnapshot, RejectedSeries, STATUS_CODES, Snapshot};
