//! Calls to plugins from a local application.
//!
//! [`Client`] is a connection to Plugvisor's broker over a Unix socket. Hand a clone of it to any generated tonic client
//! and call the service as if its provider were there:
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use std::time::Duration;
//!
//! let plugins = plugvisor_client::Client::from_default().await?.with_timeout(Duration::from_secs(2));
//! // let mut client = ThumbnailerServiceClient::new(plugins.clone());
//! // let answer = client.thumbnail(request).await?;
//! # Ok(())
//! # }
//! ```
//!
//! What the broker itself refuses, as opposed to what the provider answers, is read with [`Refusal::from_status`].
//!
//! This crate knows the sockets, the metadata and the refusals; it knows no service and decodes no body.
#![forbid(unsafe_code)]

mod channel;
mod context;
mod place;
mod refusal;

pub use channel::{CallFuture, Client, ConnectError};
pub use context::{CallContext, TOKEN_METADATA};
pub use place::{CALLS_VARIABLE, PlaceError, default_calls_socket};
pub use refusal::{Reason, Refusal};
