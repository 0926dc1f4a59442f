//! One plugin on one socket, from its first connection to its end.
//!
//! Knows neither the environment nor signals: [`crate::serve`] and [`crate::testing`] bring them.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use plugvisor_client::Client;
use plugvisor_proto::worker::v1::worker_server::WorkerServer;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic_health::{
    ServingStatus,
    server::{HealthReporter, HealthService},
};

use crate::{
    MAX_MESSAGE_BYTES, Plugin, Services, StopReason,
    control::{Control, WorkerService},
    gate::Gate,
    inflight::Inflight,
    listen::Incoming,
};

/// After draining, the connections close by themselves unless the other side does not read; it is not waited for longer.
const CLOSING: Duration = Duration::from_millis(500);
/// Metadata of one call, far above what gRPC clients send.
const MOST_HEADER_BYTES: u32 = 16 << 10;
/// Large enough that a message of a megabyte does not wait for a window update per 64 KiB.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// How long the end waits for the calls in flight, and then for the author's `stop`.
    pub(crate) drain: Duration,
    /// Calls at the same time on one connection.
    pub(crate) streams: u32,
}

/// A plugin before its first connection.
pub(crate) struct Assembly<P> {
    pub(crate) control: Arc<Control<P>>,
    gate: Gate,
}

impl<P: Plugin> Assembly<P> {
    /// `client` is the way to the broker.
    pub(crate) async fn new(client: Client) -> Self {
        let (own, inflight, health) = (Arc::new(OnceLock::new()), Inflight::default(), HealthReporter::new());
        health.set_service_status("", ServingStatus::NotServing).await;
        let control = Control::new(Arc::clone(&own), health.clone(), inflight.clone(), client);
        let control = Arc::new(control);
        let mut fixed = Services::default();
        let health = tonic_health::pb::health_server::HealthServer::new(HealthService::from_health_reporter(health));
        fixed.add(health.max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES));
        let worker = WorkerServer::new(WorkerService(Arc::clone(&control)));
        fixed.add(worker.max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES));
        Self { control, gate: Gate::new(fixed, own, inflight) }
    }

    /// Serves until `quit`, then ends in order: no new calls, drain, `stop`, close. `hurry` cuts the ending short.
    pub(crate) async fn run(
        self,
        incoming: Incoming,
        limits: Limits,
        quit: impl Future<Output = ()>,
        hurry: impl Future<Output = ()>,
    ) -> Result<(), tonic::transport::Error> {
        let Self { control, gate } = self;
        let closing = CancellationToken::new();
        let server = Server::builder()
            .max_concurrent_streams(limits.streams)
            .http2_max_header_list_size(MOST_HEADER_BYTES)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .serve_with_incoming_shutdown(gate, incoming, closing.clone().cancelled_owned());
        // A task of its own: connections learn that they close only while the server's future is polled.
        let mut server = tokio::spawn(server);
        tokio::select! {
            ended = &mut server => return ended.unwrap_or(Ok(())),
            () = quit => {}
        }
        closing.cancel();
        let orderly = async {
            control.drain_within(limits.drain).await;
            control.stop_within(StopReason::Unknown, limits.drain).await;
            control.end_health().await;
            let _ = timeout(CLOSING, &mut server).await;
        };
        tokio::select! {
            () = orderly => {}
            () = hurry => tracing::warn!("told twice to end: calls in flight are dropped"),
        }
        server.abort();
        Ok(())
    }
}
