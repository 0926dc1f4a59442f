//! Serving, and how the process ends.

use std::sync::Mutex;

use plugvisor_tests::contract::{echo_service_server::EchoServiceServer, hostile_service_server::HostileServiceServer};
use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
};
use tokio_stream::{StreamExt as _, wrappers::UnixListenerStream};
use tonic::transport::Server;
use tonic_health::pb::health_server::HealthServer;

use crate::{
    connection::Scissors,
    deed::{Hoard, Hostile},
    echo::Echo,
    health::Condition,
    socket,
};

/// How the server behaves apart from its deeds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Manners {
    pub(crate) ignore_sigterm: bool,
    pub(crate) hang_health: bool,
    pub(crate) not_serving: bool,
}

/// Serves until SIGTERM, if that is obeyed.
pub(crate) fn serve(manners: Manners) -> anyhow::Result<()> {
    let listener = socket::listener()?;
    runtime()?.block_on(async move {
        listener.set_nonblocking(true)?;
        let scissors = Scissors::default();
        let condition = Condition::new(manners.hang_health, manners.not_serving);
        let hostile =
            Hostile { scissors: scissors.clone(), condition: condition.clone(), hoard: Mutex::new(Hoard::default()) };
        let incoming = UnixListenerStream::new(UnixListener::from_std(listener)?)
            .map(move |stream| stream.map(|stream| scissors.around(stream)));
        // The broker's limits are tested, so this side has none.
        let hostile = HostileServiceServer::new(hostile).max_decoding_message_size(usize::MAX);
        let serving = Server::builder()
            .add_service(HealthServer::new(condition))
            .add_service(EchoServiceServer::new(Echo))
            .add_service(hostile)
            .serve_with_incoming(incoming);
        tokio::select! {
            served = serving => Ok(served?),
            stopped = sigterm(manners.ignore_sigterm) => stopped,
        }
    })
}

/// Waits for SIGTERM and does nothing else.
pub(crate) fn wait_for_sigterm() -> anyhow::Result<()> {
    runtime()?.block_on(sigterm(false))
}

/// As PID 1 of its namespace the process gets no signal that it has no handler for (pid_namespaces(7)).
async fn sigterm(ignore: bool) -> anyhow::Result<()> {
    let mut signals = signal(SignalKind::terminate())?;
    loop {
        signals.recv().await;
        if !ignore {
            return Ok(());
        }
        eprintln!("hostile-plugin: SIGTERM, so what");
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}
