//! Bytes in both directions until both sides have ended, or nothing passes for too long. A side that has said everything
//! goes on hearing (half-close).

use plugvisor_core::egress::Origin;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, copy_bidirectional_with_sizes, join},
    net::TcpStream,
};

use super::{Proxy, client::Client};
use crate::meter::{Activity, Metered};

const BUFFER: usize = 16 * 1024;

/// Answers a CONNECT and carries what follows.
pub(super) async fn run(proxy: &Proxy, mut client: Client, server: TcpStream) {
    let activity = Activity::new();
    let server = proxy.metered(server, &activity);
    if client.writer.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await.is_ok() {
        carry(proxy, client, server, &activity).await;
    }
}

/// Carries bytes between a plugin and a connection that notes when something passes.
pub(super) async fn carry(
    proxy: &Proxy,
    client: Client,
    mut server: impl AsyncRead + AsyncWrite + Unpin,
    activity: &Activity,
) {
    let Client { reader, writer } = client;
    let mut plugin = join(reader, writer);
    tokio::select! {
        // A connection that breaks ends the other too, by being dropped; nobody else is told.
        _ = copy_bidirectional_with_sizes(&mut plugin, &mut server, BUFFER, BUFFER) => {}
        () = activity.idle(proxy.host.limits.idle) => {}
    }
}

impl Proxy {
    /// A connection whose bytes are counted.
    pub(super) fn metered(&self, stream: TcpStream, activity: &std::sync::Arc<Activity>) -> Metered {
        let (meter, traffic) = (self.rules.bandwidth.clone(), self.figures.traffic());
        Metered::new(stream, Origin::Inside, meter, traffic, std::sync::Arc::clone(activity))
    }
}
