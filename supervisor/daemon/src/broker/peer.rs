//! One connection with its socket: reading, writing, and whether somebody is still there.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    rc::Rc,
    time::Instant,
};

use rustix::{
    io::Errno,
    net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg, sockopt},
};

use super::{
    call::End,
    caller::Caller,
    config::ConnectionLimits,
    exchange::Exchange,
    fault::Fault,
    http2::{Connection, ConnectionError, Event, Role},
    link::LinkKey,
    presence::{Farewell, Presence},
    timer::Alarm,
};

/// With more than this on its way, a peer is not read from: whatever it says makes answers that it does not read.
const STALLED: usize = 1024 * 1024;
/// What the kernel may hold of what is written; it doubles and caps it.
const SEND_BUFFER: usize = 256 * 1024;

/// Whose connection it is.
#[derive(Clone, Debug)]
pub(super) enum Side {
    /// Somebody calls.
    Caller { caller: Rc<Caller>, listener: usize, limits: Rc<ConnectionLimits> },
    /// Somebody serves.
    Link(LinkKey),
}

#[derive(Debug)]
pub(super) struct Peer {
    pub(super) socket: OwnedFd,
    pub(super) http: Connection,
    pub(super) side: Side,
    pub(super) number: u32,
    /// What its socket is looked at for.
    looks: (bool, bool),
    /// It is in the list of those with something to write.
    marked: bool,
    pub(super) presence: Presence,
    pub(super) farewell: Farewell,
}

/// How a connection ended.
#[derive(Debug)]
pub(super) enum Gone {
    /// The peer closed it.
    Eof,
    /// The system says so.
    Io(io::Error),
    /// The peer broke HTTP/2.
    Broke(ConnectionError),
    /// The peer did not do in time what the text says.
    Silent(String),
    /// It was closed here.
    Closed,
}

impl Exchange {
    /// Takes a connected socket.
    pub(super) fn add_peer(
        &mut self,
        socket: OwnedFd,
        http: Connection,
        side: Side,
        check: Instant,
    ) -> io::Result<usize> {
        // A smaller buffer is slower, and nothing else.
        let _ = sockopt::set_socket_send_buffer_size(&socket, SEND_BUFFER);
        self.peer_number = self.peer_number.wrapping_add(1) & 0x3fff_ffff;
        let number = self.peer_number;
        if matches!(side, Side::Caller { .. }) {
            self.shared.connections.set(self.shared.connections.get() + 1);
        }
        let place = self.peers.insert(Peer {
            socket,
            http,
            side,
            number,
            looks: (true, false),
            marked: false,
            presence: Presence::new(check),
            farewell: Farewell::No,
        });
        let peer = &self.peers[place];
        if let Err(error) = self.poll.add(peer.socket.as_fd(), peer.token(place)) {
            self.forget(place);
            return Err(error);
        }
        self.timers.at(check, Alarm::Check { place, number });
        Ok(place)
    }

    fn forget(&mut self, place: usize) -> Option<Peer> {
        let peer = self.peers.try_remove(place)?;
        if let Side::Caller { listener, .. } = &peer.side {
            self.shared.connections.set(self.shared.connections.get() - 1);
            self.left_listener(*listener);
        }
        Some(peer)
    }

    /// Notes that a peer may have something to write.
    pub(super) fn mark(&mut self, place: usize) {
        if let Some(peer) = self.peers.get_mut(place)
            && !peer.marked
        {
            peer.marked = true;
            self.marked.push(place);
        }
    }

    /// Reads once from a peer and handles all that came.
    pub(super) fn read(&mut self, place: usize, number: u32) {
        let Some(peer) = self.peers.get_mut(place).filter(|peer| peer.number == number) else { return };
        let mut buffer = std::mem::take(&mut self.buffer);
        let count = match recv(&peer.socket, &mut buffer[..], RecvFlags::empty()) {
            Ok((0, _)) => {
                self.buffer = buffer;
                return self.peer_gone(place, &Gone::Eof);
            }
            Ok((count, _)) => count,
            Err(Errno::AGAIN | Errno::INTR) => {
                self.buffer = buffer;
                return;
            }
            Err(error) => {
                self.buffer = buffer;
                return self.peer_gone(place, &Gone::Io(error.into()));
            }
        };
        let read = &buffer[..count];
        let mut fields = std::mem::take(&mut self.fields);
        let mut at = 0;
        while let Some(peer) = self.peers.get_mut(place).filter(|peer| peer.number == number) {
            match peer.http.next(read, &mut at, &mut fields, self.now) {
                Ok(Some(event)) => self.handle(place, &event, read, &fields),
                Ok(None) => {
                    self.heard_from(place);
                    break;
                }
                Err(error) => {
                    self.peer_gone(place, &Gone::Broke(error));
                    break;
                }
            }
        }
        self.fields = fields;
        self.mark(place);
        self.flush_marked(read);
        self.buffer = buffer;
    }

    fn handle(&mut self, place: usize, event: &Event, read: &[u8], fields: &super::http2::Fields) {
        if let Event::Pong = event {
            return self.pong(place);
        }
        let link = match &self.peers[place].side {
            Side::Caller { .. } => return self.caller_says(place, event, read, fields),
            Side::Link(link) => *link,
        };
        self.server_says(place, link, event, read, fields);
    }

    /// Writes what waits, until nothing does or nobody takes it. `read` is where pieces of bodies still stand.
    pub(super) fn flush_marked(&mut self, read: &[u8]) {
        while let Some(place) = self.marked.pop() {
            let Some(peer) = self.peers.get_mut(place) else { continue };
            peer.marked = false;
            self.flush(place, read);
        }
    }

    fn flush(&mut self, place: usize, read: &[u8]) {
        if let Some(Side::Link(link)) = self.peers.get(place).map(|peer| &peer.side) {
            self.begin_waiting(*link);
        }
        let mut error = None;
        loop {
            self.pump(place);
            let Some(peer) = self.peers.get_mut(place) else { return };
            let socket = &peer.socket;
            let outbox = peer.http.outbox();
            if outbox.is_empty() {
                break;
            }
            let written = outbox.flush(read, |slices| {
                loop {
                    match sendmsg(socket, slices, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL) {
                        Err(Errno::INTR) => {}
                        written => break written,
                    }
                }
            });
            match written {
                Ok(()) | Err(Errno::AGAIN) => {}
                Err(other) => error = Some(other),
            }
            if !peer.http.outbox().is_empty() {
                break;
            }
        }
        if let Some(error) = error {
            return self.peer_gone(place, &Gone::Io(error.into()));
        }
        let Some(peer) = self.peers.get_mut(place) else { return };
        let waiting = peer.http.outbox().len();
        let looks = (waiting < STALLED, waiting > 0);
        if looks != peer.looks {
            peer.looks = looks;
            let token = peer.token(place);
            if let Err(error) = self.poll.change(self.peers[place].socket.as_fd(), token, looks.0, looks.1) {
                return self.peer_gone(place, &Gone::Io(error));
            }
        }
        if let Side::Link(link) = self.peers[place].side {
            // There may be room now that was not there before.
            self.begin_waiting(link);
        }
    }

    /// Sends what waited for room, and lets those who sent it send as much more.
    fn pump(&mut self, place: usize) {
        let Some(peer) = self.peers.get_mut(place) else { return };
        if !peer.http.wants_pump() {
            return;
        }
        let mut moved = std::mem::take(&mut self.moved);
        peer.http.pump(&mut moved);
        for moved in moved.drain(..) {
            self.moved_on(place, moved);
        }
        self.moved = moved;
    }

    /// Closes a connection and ends its calls.
    pub(super) fn peer_gone(&mut self, place: usize, gone: &Gone) {
        let Some(mut peer) = self.forget(place) else { return };
        if let Gone::Broke(error) = gone {
            let last = peer.http.last_stream();
            peer.http.go_away(last, error.code);
        }
        if !matches!(gone, Gone::Io(_) | Gone::Eof) && peer.http.outbox().is_whole() {
            // As far as the socket takes it.
            let socket = &peer.socket;
            let _ = peer
                .http
                .outbox()
                .flush(&[], |slices| sendmsg(socket, slices, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL));
        }
        let calls: Vec<usize> = peer.http.calls().map(|(_, call)| call).collect();
        match &peer.side {
            Side::Caller { caller, .. } => {
                let detail = match gone {
                    Gone::Broke(error) => Some(format!("it broke HTTP/2: {error}")),
                    Gone::Silent(detail) => Some(detail.clone()),
                    Gone::Eof | Gone::Io(_) | Gone::Closed => None,
                };
                if let Some(detail) = detail {
                    self.reject(caller.identity.to_string(), detail);
                }
                for call in calls {
                    self.finish(call, End::Cancelled);
                }
            }
            Side::Link(link) => {
                let link = *link;
                self.link_gone(link, place, gone, calls.len());
                for number in calls {
                    let Some(call) = self.calls.get(number) else { continue };
                    let fault = match gone {
                        Gone::Eof => Fault::Lost("it closed the connection".into()),
                        Gone::Io(error) => Fault::Lost(error.to_string()),
                        Gone::Broke(error) => Fault::Protocol(error.to_string()),
                        Gone::Silent(detail) => Fault::Protocol(detail.clone()),
                        Gone::Closed => Fault::Lost("it has been stopped".into()),
                    };
                    let end = call.fault(fault);
                    self.finish(number, end);
                }
                if self.links.get(link).is_some_and(|link| !link.waiting.is_empty()) {
                    self.connect(link);
                }
            }
        }
    }

    /// The limits of HTTP/2 for a caller.
    pub(super) fn caller_http(limits: &ConnectionLimits, now: Instant) -> Connection {
        let limits = super::http2::Limits {
            max_streams: limits.max_streams,
            stream_window: limits.stream_window,
            connection_window: limits.connection_window,
            max_frame_size: limits.max_frame_size,
            max_header_list_size: limits.max_header_list_size,
            outbox: super::link::OUTBOX,
            budget: limits.budget,
        };
        Connection::new(Role::Server, limits, now)
    }
}
