//! Write a Plugvisor plugin as one trait.
//!
//! Implement [`Plugin`], hand it to [`serve`], and the program is a plugin: it serves gRPC on the socket it is given,
//! answers the health and the [`Worker`](plugvisor_proto::worker::v1) contract, reads its configuration into your type,
//! calls other plugins with the deadline and the trace of the call it is serving, drains and ends cleanly.
//!
//! ```
//! use std::{process::ExitCode, sync::Arc};
//!
//! use plugvisor_worker::{Host, NoConfig, Plugin, Services, StartError};
//!
//! struct Echo;
//!
//! impl Plugin for Echo {
//!     type Config = NoConfig;
//!
//!     async fn start(_config: NoConfig, _host: Host) -> Result<Self, StartError> {
//!         Ok(Echo)
//!     }
//!
//!     fn services(self: Arc<Self>, services: &mut Services) {
//!         // services.add(EchoServiceServer::from_arc(self));
//! #       let _ = services;
//!     }
//! }
//!
//! fn main() -> ExitCode {
//! #   if true { return ExitCode::SUCCESS; }
//!     plugvisor_worker::serve::<Echo>()
//! }
//! ```
//!
//! The crate knows the contract between a plugin and its host. It knows nothing of manifests, walls or the supervisor's
//! rules: a plugin that is refused something learns it as a gRPC status ([`Refusal`]).
#![forbid(unsafe_code)]

mod config;
mod control;
mod gate;
mod host;
mod inflight;
mod listen;
mod log;
mod plugin;
mod run;
mod serve;
mod services;
pub mod testing;

pub use host::{Host, PublishError};
pub use plugin::{Hook, NoConfig, Plugin, ReconfigureError, StartError, StopReason};
pub use plugvisor_client::{CallContext, Client, Reason, Refusal};
pub use serve::{Options, Runtime, serve, serve_with};
pub use services::Services;

/// The largest message, in bytes, that the SDK's own services take and that a plugin should allow on its own
/// (`max_decoding_message_size` and `max_encoding_message_size` of the generated server): 4 MiB, tonic's own default
/// for received messages.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;
