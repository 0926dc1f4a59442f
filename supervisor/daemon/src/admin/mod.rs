//! The admin service: what operators' tools ask, answered from the supervisor's state.
//!
//! Who may ask is decided here, by `SO_PEERCRED` beside the socket's file mode. Protobuf types do not leave this module
//! but by [`wire`].

mod convert;
pub mod error;
mod explain;
mod read_logs;
mod service;
pub mod wire;

use std::{collections::BTreeSet, os::unix::net::UnixListener, sync::Arc, time::Duration};

use plugvisor_core::{Code, Error};
use plugvisor_proto::admin::v1::admin_server::AdminServer;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Status,
    transport::{Server, server::UdsConnectInfo},
};

pub use service::AdminService;

use crate::supervisor::Supervisor;

/// The longest request.
const MAX_REQUEST: usize = 64 * 1024;

/// Serves the admin socket until cancelled. Only users in `allowed` are answered.
pub async fn serve(
    listener: UnixListener,
    state: Arc<Supervisor>,
    allowed: BTreeSet<u32>,
    cancelled: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let listener = match tokio::net::UnixListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "the admin socket cannot be served");
            return Ok(());
        }
    };
    let check = move |request: Request<()>| match who(&request) {
        Some(uid) if allowed.contains(&uid) => Ok(request),
        other => Err(denied(other)),
    };
    let service = AdminServer::new(AdminService::new(state)).max_decoding_message_size(MAX_REQUEST);
    let service = tonic::service::interceptor::InterceptedService::new(service, check);
    Server::builder()
        .http2_max_header_list_size(16 * 1024)
        .max_concurrent_streams(64)
        .initial_stream_window_size(64 * 1024)
        .http2_keepalive_interval(Some(Duration::from_secs(60)))
        .add_service(service)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), cancelled.cancelled_owned())
        .await
}

/// The user at the other end.
fn who(request: &Request<()>) -> Option<u32> {
    let info = request.extensions().get::<UdsConnectInfo>()?;
    info.peer_cred.map(|credentials| credentials.uid())
}

fn denied(uid: Option<u32>) -> Status {
    let who = uid.map_or_else(|| "an unknown user".to_owned(), |uid| format!("user {uid}"));
    let error = Error::new(
        Code::RequestDenied,
        format!("{who} may not administer this supervisor"),
        "use the user who started plugvisord, or root",
    );
    error::status(&error)
}
