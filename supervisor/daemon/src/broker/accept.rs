//! Callers' listeners and connections: who may connect, how many, how long they may stay silent.

use std::{cell::Cell, io, os::fd::OwnedFd, rc::Rc, time::Duration};

use bytes::Bytes;
use h2::{Ping, PingPong, server::Connection};
use plugvisor_core::route::PluginCaller;
use tokio::{
    net::{UnixListener, UnixStream, unix::UCred},
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{admit, caller::Caller, config::ConnectionLimits, event::BrokerEvent, shared::Shared};

/// The pause after an accept that failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Who may connect to a listener, and who they are then.
#[derive(Debug)]
pub(super) enum Door {
    /// One plugin generation.
    Plugin { plugin: PluginCaller, uid: Option<u32> },
    /// Local applications of these users.
    Local { uids: Vec<u32> },
}

impl Door {
    fn caller(&self, peer: UCred, shared: &Shared) -> Result<Caller, String> {
        match self {
            Self::Plugin { plugin, uid } => match uid {
                Some(uid) if *uid != peer.uid() => Err(format!("its user is {}, and not {uid}", peer.uid())),
                Some(_) | None => Ok(Caller::plugin(plugin.clone(), shared)),
            },
            Self::Local { uids } => {
                if peer.uid() != 0 && !uids.contains(&peer.uid()) {
                    return Err(format!("its user {} may not call; root and {uids:?} may", peer.uid()));
                }
                let pid = peer.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or_default();
                Ok(Caller::local(peer.uid(), pid, shared))
            }
        }
    }

    fn name(&self) -> String {
        match self {
            Self::Plugin { plugin, .. } => format!("plugin {}", plugin.name),
            Self::Local { .. } => "a local application".into(),
        }
    }
}

/// Makes a listener of a descriptor that already listens.
pub(super) fn listener(socket: OwnedFd) -> io::Result<UnixListener> {
    let listener = std::os::unix::net::UnixListener::from(socket);
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Accepts until it is dropped, which closes every connection of the listener too.
pub(super) async fn accept(shared: Rc<Shared>, listener: UnixListener, door: Door, limits: ConnectionLimits) {
    let limits = Rc::new(limits);
    let mut connections = JoinSet::new();
    loop {
        // Both branches are cancel-safe.
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection from {}", door.name());
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let admitted = stream
            .peer_cred()
            .map_err(|error| format!("its credentials cannot be read: {error}"))
            .and_then(|peer| door.caller(peer, &shared));
        match admitted {
            Err(detail) => reject(&shared, door.name(), detail),
            Ok(_) if connections.len() >= limits.max_connections => {
                reject(&shared, door.name(), format!("it has {} connections, its limit", limits.max_connections));
            }
            Ok(caller) => {
                let shared = Rc::clone(&shared);
                connections.spawn_local(serve(shared, Rc::new(caller), stream, Rc::clone(&limits)));
            }
        }
    }
}

fn reject(shared: &Shared, caller: String, detail: String) {
    shared.tell_once(&caller.clone(), BrokerEvent::CallerRejected { caller, detail });
}

/// Counts an open connection.
struct Open<'s>(&'s Cell<usize>);

impl<'s> Open<'s> {
    fn new(count: &'s Cell<usize>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

async fn serve(shared: Rc<Shared>, caller: Rc<Caller>, stream: UnixStream, limits: Rc<ConnectionLimits>) {
    let _open = Open::new(&shared.connections);
    let handshake = h2::server::Builder::new()
        .initial_window_size(limits.stream_window)
        .initial_connection_window_size(limits.connection_window)
        .max_frame_size(limits.max_frame_size)
        .max_header_list_size(limits.max_header_list_size)
        .max_concurrent_streams(limits.max_streams)
        .max_concurrent_reset_streams(limits.max_streams as usize)
        .max_pending_accept_reset_streams(limits.max_streams as usize)
        .handshake::<_, Bytes>(stream);
    let connection = match timeout(limits.handshake_timeout, handshake).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return told(&shared, &caller, &error),
        Err(_) => {
            let detail = format!("it did not begin HTTP/2 within {:?}", limits.handshake_timeout);
            return reject(&shared, caller.identity.to_string(), detail);
        }
    };
    if let Err(error) = converse(&shared, &caller, connection, &limits).await {
        told(&shared, &caller, &error);
    }
}

/// Tells of a caller that broke HTTP/2; one that just went away broke nothing.
fn told(shared: &Shared, caller: &Caller, error: &h2::Error) {
    if error.is_library() || !(error.is_io() || error.is_remote()) {
        reject(shared, caller.identity.to_string(), format!("it broke HTTP/2: {error}"));
    }
}

async fn converse(
    shared: &Rc<Shared>,
    caller: &Rc<Caller>,
    mut connection: Connection<UnixStream, Bytes>,
    limits: &ConnectionLimits,
) -> Result<(), h2::Error> {
    let mut stopping = shared.stopping();
    let stop = stopping.wait_for(|stopping| *stopping);
    let mut silence = Silence::new(connection.ping_pong());
    // The first ping comes soon: until it is answered, nothing shows that the peer reads and writes HTTP/2 at all.
    let timer = sleep_until(Instant::now() + limits.handshake_timeout / 2);
    tokio::pin!(stop, timer);
    let mut stop_told = false;
    loop {
        // All branches are polled in place and kept, so none loses anything.
        tokio::select! {
            biased;
            next = connection.accept() => match next {
                Some(Ok((request, respond))) => {
                    silence.broken();
                    admit::begin(shared, caller, request, respond);
                }
                Some(Err(error)) => return Err(error),
                None => return Ok(()),
            },
            _ = &mut stop, if !stop_told => {
                stop_told = true;
                // GOAWAY twice, as RFC 9113, section 6.8 asks; calls in flight go on.
                connection.graceful_shutdown();
            }
            () = silence.pong() => {}
            () = &mut timer => {
                let next = match silence.judge(connection.has_streams()) {
                    Judgement::Heard => limits.idle_ping,
                    Judgement::Asked => limits.handshake_timeout / 2,
                    Judgement::Dead => {
                        let detail = "it does not answer HTTP/2 pings".to_owned();
                        reject(shared, caller.identity.to_string(), detail);
                        return Ok(());
                    }
                };
                timer.as_mut().reset(Instant::now() + next);
            }
        }
    }
}

/// Whether a connection without calls still has somebody at its other end.
struct Silence {
    pings: Option<PingPong>,
    heard: bool,
    asked: bool,
}

enum Judgement {
    Heard,
    Asked,
    Dead,
}

impl Silence {
    fn new(pings: Option<PingPong>) -> Self {
        Self { pings, heard: false, asked: false }
    }

    fn broken(&mut self) {
        self.heard = true;
        self.asked = false;
    }

    /// Called when the connection's timer ran out.
    fn judge(&mut self, busy: bool) -> Judgement {
        // Calls have deadlines of their own; a peer that is stopped in the middle of one is not cut off for it.
        if busy || std::mem::take(&mut self.heard) {
            self.asked = false;
            return Judgement::Heard;
        }
        if self.asked {
            return Judgement::Dead;
        }
        match &mut self.pings {
            Some(pings) => {
                self.asked = pings.send_ping(Ping::opaque()).is_ok();
                Judgement::Asked
            }
            None => Judgement::Heard,
        }
    }

    /// Waits for the answer to a ping.
    async fn pong(&mut self) {
        match &mut self.pings {
            Some(pings) if self.asked => {
                if std::future::poll_fn(|cx| pings.poll_pong(cx)).await.is_ok() {
                    self.broken();
                } else {
                    // The connection is ending, which shows where it is accepted from.
                    std::future::pending::<()>().await;
                }
            }
            Some(_) | None => std::future::pending().await,
        }
    }
}
