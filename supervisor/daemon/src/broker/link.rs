//! The one HTTP/2 connection to whoever serves: a provider generation, or the supervisor's own services.
//!
//! It is made when the provider becomes ready, and again by the next call after it was lost.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    rc::Rc,
    time::{Duration, Instant},
};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::{
    call::{Far, Waiting},
    exchange::Exchange,
    http2::{Connection, Limits, Role, budget::BudgetLimits},
    peer::{Gone, Peer, Side},
    poll::Token,
    provider::Provider,
    timer::Alarm,
};

/// A link's place.
pub(super) type LinkKey = usize;

/// The pause between tries to connect while the provider's backlog is full.
const BACKLOG_PAUSE: Duration = Duration::from_millis(2);
/// Bytes on their way to a peer, beyond which bodies wait.
pub(super) const OUTBOX: usize = 512 * 1024;

/// Who is at the far end.
#[derive(Clone, Debug)]
pub(super) enum Server {
    Plugin(Rc<Provider>),
    Host,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LinkState {
    Down,
    /// Its backlog is full; tried since then.
    Full(Instant),
    /// Connected, at this place among the peers.
    Up(usize),
}

#[derive(Debug)]
pub(super) struct Link {
    pub(super) server: Server,
    pub(super) state: LinkState,
    /// Calls that have not begun.
    pub(super) waiting: VecDeque<usize>,
}

impl Link {
    pub(super) const fn new(server: Server) -> Self {
        Self { server, state: LinkState::Down, waiting: VecDeque::new() }
    }
}

impl Exchange {
    /// Connects, unless it is connected or connecting.
    pub(super) fn connect(&mut self, key: LinkKey) {
        let Some(link) = self.links.get(key) else { return };
        if link.state != LinkState::Down {
            return;
        }
        self.try_connect(key, self.now);
    }

    /// Tries again, with a backlog that was full.
    pub(super) fn connect_again(&mut self, key: LinkKey) {
        if let Some(Link { state: LinkState::Full(since), .. }) = self.links.get(key) {
            self.try_connect(key, *since);
        }
    }

    fn try_connect(&mut self, key: LinkKey, since: Instant) {
        let Some(link) = self.links.get_mut(key) else { return };
        let (dialled, concurrent) = match &link.server {
            Server::Plugin(provider) => (dial(&provider.socket), provider.limits.max_concurrent),
            Server::Host => (self.host.connect(), super::config::CallLimits::default().max_concurrent),
        };
        let timeout = self.shared.config.connect_timeout;
        match dialled {
            Ok(socket) => {
                if let Err(error) = self.connected(key, socket, concurrent) {
                    self.unreachable(key, &error.to_string());
                }
            }
            // unix(7): a full backlog makes a non-blocking connect fail with EAGAIN, and nothing tells when it has room
            // again.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && self.now.duration_since(since) < timeout => {
                link.state = LinkState::Full(since);
                self.timers.at(self.now + BACKLOG_PAUSE, Alarm::Connect(key));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.unreachable(key, "it accepts no connection");
            }
            Err(error) => self.unreachable(key, &error.to_string()),
        }
    }

    fn connected(&mut self, key: LinkKey, socket: OwnedFd, concurrent: usize) -> io::Result<()> {
        let config = &self.shared.config;
        let window = config.provider_stream_window;
        let all = u64::from(window) * u64::try_from(concurrent).unwrap_or(u64::MAX).clamp(1, 8191);
        let limits = Limits {
            max_streams: 0,
            stream_window: window,
            // RFC 9113, section 6.9.1: windows end at 2^31 - 1.
            connection_window: u32::try_from(all).unwrap_or(u32::MAX).min((1 << 31) - 1),
            max_frame_size: config.provider_max_frame_size,
            max_header_list_size: config.plugin_connections.max_header_list_size,
            outbox: OUTBOX,
            // It can only answer what it was asked; a storm of anything else is still one.
            budget: BudgetLimits::default(),
        };
        let mut http = Connection::new(Role::Client, limits, self.now);
        // Until it is answered, nothing shows that the peer reads and writes HTTP/2 at all.
        http.ping();
        let check = self.now + config.connect_timeout;
        let place = self.add_peer(socket, http, Side::Link(key), check)?;
        if let Some(link) = self.links.get_mut(key) {
            link.state = LinkState::Up(place);
            if let Server::Plugin(provider) = &link.server {
                provider.connected.set(true);
            }
        }
        self.mark(place);
        self.begin_waiting(key);
        Ok(())
    }

    /// Ends the calls of a link that cannot be connected.
    fn unreachable(&mut self, key: LinkKey, error: &str) {
        let Some(link) = self.links.get_mut(key) else { return };
        link.state = LinkState::Down;
        let detail = format!("cannot connect to its worker socket: {error}");
        match &link.server {
            Server::Plugin(provider) if !provider.is_removed() => provider.tell_lost(&self.shared, detail.clone()),
            Server::Plugin(_) => {}
            Server::Host => tracing::error!(error, "cannot connect to the supervisor's own services"),
        }
        for call in std::mem::take(&mut link.waiting) {
            if let Some(waiting) = self.calls.get(call) {
                let end = waiting.unreachable(&detail);
                self.finish(call, end);
            }
        }
    }

    /// Begins calls that wait for a stream.
    pub(super) fn begin_waiting(&mut self, key: LinkKey) {
        loop {
            let Some(link) = self.links.get_mut(key) else { return };
            let LinkState::Up(place) = link.state else { return };
            let Some(peer) = self.peers.get(place) else { return };
            if !peer.http.can_open() {
                return;
            }
            if peer.http.is_used_up() {
                // It lives on until its calls have ended; the next call makes a new one.
                link.state = LinkState::Down;
                self.connect(key);
                continue;
            }
            let Some(number) = link.waiting.pop_front() else { return };
            let Some(call) = self.calls.get_mut(number) else { continue };
            let opened = Far::Open { peer: place, stream: 0 };
            let Far::Waiting(waiting) = std::mem::replace(&mut call.far, opened) else { continue };
            let ended = call.asked.is_some();
            let Waiting { head, body, trailers } = *waiting;
            if let Some(stream) = self.open(number, place, &head, ended && body.is_empty() && trailers.is_none())
                && let Some(peer) = self.peers.get_mut(place)
            {
                if !body.is_empty() {
                    peer.http.queue(stream, &body, ended && trailers.is_none());
                }
                if let Some(trailers) = trailers {
                    peer.http.trailers(stream, &trailers);
                }
            }
        }
    }

    /// What the end of a connection means for its link; its streams' calls are ended by whoever closes it.
    pub(super) fn link_gone(&mut self, key: LinkKey, place: usize, gone: &Gone, calls: usize) {
        let Some(link) = self.links.get_mut(key) else { return };
        let current = link.state == LinkState::Up(place);
        if current {
            link.state = LinkState::Down;
        }
        let Server::Plugin(provider) = &link.server else {
            tracing::debug!(?gone, "the connection to the supervisor's own services ended");
            return;
        };
        if current {
            provider.connected.set(false);
        }
        if provider.is_removed() {
            return;
        }
        match gone {
            Gone::Eof if calls > 0 => {
                provider.tell_lost(&self.shared, "it closed the connection in the middle of calls".into());
            }
            Gone::Eof | Gone::Closed => {}
            Gone::Io(error) => provider.tell_lost(&self.shared, error.to_string()),
            Gone::Broke(error) => provider.tell_protocol(&self.shared, error.to_string()),
            Gone::Silent(detail) => provider.tell_protocol(&self.shared, detail.clone()),
        }
    }

    /// Ends a link and its calls; whoever served is gone.
    pub(super) fn remove_link(&mut self, key: LinkKey) {
        let Some(link) = self.links.get_mut(key) else { return };
        link.state = LinkState::Down;
        for call in std::mem::take(&mut link.waiting) {
            if let Some(waiting) = self.calls.get(call) {
                let end = waiting.unreachable("it has been stopped");
                self.finish(call, end);
            }
        }
        let peers: Vec<usize> = self
            .peers
            .iter()
            .filter(|(_, peer)| matches!(peer.side, Side::Link(link) if link == key))
            .map(|(place, _)| place)
            .collect();
        for place in peers {
            self.peer_gone(place, &Gone::Closed);
        }
        self.links.try_remove(key);
    }
}

/// Connects to a worker socket. An `O_PATH` descriptor names the socket itself, whatever has happened to its path since.
fn dial(worker: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let address = SocketAddrUnix::new(format!("/proc/self/fd/{}", worker.as_fd().as_raw_fd()))?;
    connect(&socket, &address)?;
    Ok(socket)
}

impl Peer {
    /// The token under which its socket is looked at.
    pub(super) const fn token(&self, place: usize) -> Token {
        Token::Peer { place, number: self.number }
    }
}
