//! The connection to the supervisor: packets to requests, answers and notices to packets. And who else knocks.
//!
//! Bounds: answers wait in a queue of [`MAX_QUEUED`], and while it is full no request is read, so that a flood of them is
//! held in the socket; notices are bounded by the launches. A turn of the loop reads requests for [`READ_TIME`] and
//! answers [`KNOCKS`] new connections at most; then children, memory and signals have theirs. What a request means is not
//! known here.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use plugvisor_sandbox::{
    codec::{self, DecodeError},
    protocol::{Notice, RefusalCode, Reply},
    seqpacket::{Packet, Received, Seqpacket},
};
use rustix::{event::epoll, net::Shutdown};

use super::{Server, Source, requests::refused};

const MAX_QUEUED: usize = 64;
/// How long requests are read before the others have their turn.
const READ_TIME: Duration = Duration::from_millis(10);
/// How many connections are answered before the others have their turn.
const KNOCKS: usize = 16;
/// How long, and how many of them, those who are turned away have to read why.
const LEAVE_TIME: Duration = Duration::from_secs(1);
const LEAVING: usize = 32;
/// How long somebody who was let in may keep the others out without a Hello.
const HELLO_TIME: Duration = Duration::from_secs(5);
/// How long nobody is let in after there was no descriptor for one.
const REST: Duration = Duration::from_millis(100);

/// The one supervisor's connection.
pub(super) struct Connection {
    socket: Seqpacket,
    queue: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    pub(super) greeted: bool,
    /// When a Hello must have come; `None` for the one that started the launcher, whom nobody waits behind.
    pub(super) greets_by: Option<Instant>,
    /// No supervisor is expected after it.
    pub(super) last: bool,
    interest: epoll::EventFlags,
}

impl Connection {
    /// Ends the connection without closing it.
    pub(super) fn hang_up(&self) {
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }

    /// Everything that it holds, to be closed.
    fn into_descriptors(self) -> Vec<OwnedFd> {
        let queued = self.queue.into_iter().flat_map(|(_, descriptors)| descriptors);
        queued.chain([self.socket.into()]).collect()
    }
}

impl Server {
    /// Serves this supervisor from now on.
    pub(super) fn attach(&mut self, socket: Seqpacket) -> io::Result<()> {
        let interest = epoll::EventFlags::IN;
        epoll::add(&self.epoll, &socket, epoll::EventData::new_u64(Source::Supervisor.token()), interest)?;
        self.connection =
            Some(Connection { socket, queue: VecDeque::new(), greeted: false, greets_by: None, last: false, interest });
        self.connections += 1;
        Ok(())
    }

    /// The supervisor has said Hello; said again it changes nothing.
    pub(super) fn greeted(&mut self) {
        let Some(connection) = self.connection.as_mut().filter(|connection| !connection.greeted) else { return };
        connection.greeted = true;
        let alone = self.alone.take();
        self.unattended = alone.filter(|_| self.visits > 0).map(|since| since.elapsed());
        self.visits += 1;
    }

    /// The supervisor is gone, by itself or because it broke the protocol's bounds.
    pub(super) fn lost(&mut self) {
        if self.ending.is_some() {
            return;
        }
        if self.door.is_none() || self.connection.as_ref().is_some_and(|connection| connection.last) {
            self.end();
            return;
        }
        let Some(connection) = self.connection.take() else { return };
        let _ = epoll::delete(&self.epoll, &connection.socket);
        connection.hang_up();
        self.closer.take(connection.into_descriptors());
        // Somebody who never said Hello was none.
        self.alone.get_or_insert_with(Instant::now);
        self.launcher.store.abandon();
        self.detach();
    }

    pub(super) fn read_requests(&mut self) {
        let until = Instant::now() + READ_TIME;
        while self.ending.is_none()
            && self.closer.has_room()
            && let Some(connection) = &self.connection
            && connection.queue.len() < MAX_QUEUED
            && Instant::now() < until
        {
            match self.closer.receive(&connection.socket) {
                Ok(Received::Packet(packet)) => self.packet(packet),
                Ok(Received::Truncated(descriptors)) => {
                    self.closer.take(descriptors);
                    self.reply(
                        0,
                        &refused(RefusalCode::Malformed, "a packet was too long or carried too many descriptors"),
                        vec![],
                    );
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Received::Closed) | Err(_) => self.lost(),
            }
        }
    }

    fn packet(&mut self, packet: Packet) {
        let arrived = Instant::now();
        match codec::decode_request(&packet.bytes) {
            Ok((id, request)) => {
                let reply = self.request(id, request, &packet.descriptors, arrived);
                self.closer.take(packet.descriptors);
                if let Some(reply) = reply {
                    self.reply(id, &reply, vec![]);
                }
            }
            Err(error) => {
                let code = match error {
                    DecodeError::Version { .. } => RefusalCode::Version,
                    DecodeError::Short { .. }
                    | DecodeError::Long { .. }
                    | DecodeError::Kind { .. }
                    | DecodeError::Body { .. } => RefusalCode::Malformed,
                };
                self.closer.take(packet.descriptors);
                self.reply(error.id(), &refused(code, &error.to_string()), vec![]);
            }
        }
    }

    /// Answers a request of the supervisor that is connected.
    pub(super) fn reply(&mut self, id: u64, reply: &Reply, descriptors: Vec<OwnedFd>) {
        match (encode(id, reply), &mut self.connection) {
            (Some(packet), Some(connection)) => connection.queue.push_back((packet, descriptors)),
            _ => self.closer.take(descriptors),
        }
    }

    /// Tells the supervisor; one that is not connected, or has not said Hello, finds it in the list.
    pub(super) fn notice(&mut self, notice: &Notice) {
        let connection = self.connection.as_mut().filter(|connection| connection.greeted);
        if let (Some(connection), Ok(packet)) = (connection, codec::encode_notice(notice)) {
            connection.queue.push_back((packet, vec![]));
        }
    }

    pub(super) fn flush(&mut self) {
        while self.ending.is_none()
            && let Some(connection) = &mut self.connection
            && let Some((packet, descriptors)) = connection.queue.front()
        {
            let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
            match connection.socket.try_send(packet, &borrowed) {
                Ok(()) => {
                    if let Some((_, descriptors)) = connection.queue.pop_front() {
                        self.closer.take(descriptors);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.lost(),
            }
        }
    }

    /// Asks epoll for room when something waits to be sent, and for requests only when there is room for an answer.
    pub(super) fn watch_connection(&mut self) -> io::Result<()> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        let mut interest = epoll::EventFlags::empty();
        if !connection.queue.is_empty() {
            interest |= epoll::EventFlags::OUT;
        }
        if connection.queue.len() < MAX_QUEUED && self.closer.has_room() {
            interest |= epoll::EventFlags::IN;
        }
        if self.ending.is_some() {
            interest = epoll::EventFlags::empty();
            if connection.interest != interest {
                // A closed connection is always ready; it must not spin the loop.
                let _ = epoll::delete(&self.epoll, &connection.socket);
                connection.interest = interest;
            }
        } else if interest != connection.interest {
            let data = epoll::EventData::new_u64(Source::Supervisor.token());
            epoll::modify(&self.epoll, &connection.socket, data, interest)?;
            connection.interest = interest;
        }
        Ok(())
    }

    // The door.

    /// Answers those who knock: the first is let in, the others are told why not.
    pub(super) fn accept(&mut self) {
        for _ in 0..KNOCKS {
            let Some(door) = self.door.as_mut().filter(|_| self.ending.is_none() && self.closer.has_room()) else {
                return;
            };
            match self.closer.accept(door.as_fd()).and_then(Seqpacket::from_fd) {
                Ok(socket) => self.knocked(socket),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => {}
                Err(_) => {
                    door.rests_until = Some(Instant::now() + REST);
                    return;
                }
            }
        }
    }

    fn knocked(&mut self, socket: Seqpacket) {
        let wanted = self.door.as_ref().map(|door| door.uid);
        let uid = socket.peer().map(|peer| peer.uid);
        if uid.as_ref().ok() != wanted.as_ref() {
            let uid = uid.map_or_else(|_| "unknown".to_owned(), |uid| uid.to_string());
            let why = format!("uid {uid} may not be the supervisor; --supervisor-uid names who may");
            return self.turn_away(socket, RefusalCode::Policy, &why);
        }
        // The end of the last supervisor may not have been looked at yet, nor what it asked before.
        self.read_requests();
        if self.connection.as_ref().is_some_and(|connection| connection.socket.hung_up().unwrap_or(true)) {
            self.lost();
        }
        if self.connection.is_some() {
            let why = "another supervisor is connected; end it before this one is started";
            return self.turn_away(socket, RefusalCode::Busy, why);
        }
        if let Err(error) = self.attach(socket) {
            self.fail(error);
        }
        if let Some(connection) = &mut self.connection {
            connection.greets_by = Some(Instant::now() + HELLO_TIME);
        }
    }

    /// How long the connected one still has for its Hello.
    pub(super) fn greets_within(&self) -> Option<Duration> {
        let connection = self.connection.as_ref().filter(|connection| !connection.greeted)?;
        Some(connection.greets_by?.saturating_duration_since(Instant::now()))
    }

    /// Ends the connection of somebody who says nothing.
    pub(super) fn mute(&mut self) {
        if self.greets_within().is_some_and(|left| left.is_zero()) {
            self.lost();
        }
    }

    /// Tells somebody why, and closes the connection a moment later: closed at once, with something in it that nobody has
    /// read, it would be reset, and the reason lost. What is in it is never received, so that whoever may not come in
    /// takes no room.
    fn turn_away(&mut self, socket: Seqpacket, code: RefusalCode, why: &str) {
        let _ = rustix::net::shutdown(&socket, Shutdown::Read);
        if let Some(packet) = encode(0, &refused(code, why)) {
            // Its queue is new: there is room, or nobody to read it.
            let _ = socket.try_send(&packet, &[]);
        }
        self.leaving.push_back((socket, Instant::now() + LEAVE_TIME));
        self.show_out();
    }

    /// Closes the connections of those who have been told.
    pub(super) fn show_out(&mut self) {
        while let Some((_, until)) = self.leaving.front()
            && (self.leaving.len() > LEAVING || *until <= Instant::now())
            && let Some((socket, _)) = self.leaving.pop_front()
        {
            self.closer.take(vec![socket.into()]);
        }
    }

    /// When the next one is to be shown out.
    pub(super) fn leaves_within(&self) -> Option<Duration> {
        self.leaving.front().map(|(_, until)| until.saturating_duration_since(Instant::now()))
    }

    /// Listens while somebody could be answered.
    pub(super) fn watch_door(&mut self) -> io::Result<()> {
        let Some(door) = &mut self.door else { return Ok(()) };
        door.rests_until = door.rests_until.filter(|until| Instant::now() < *until);
        let watch = self.ending.is_none() && self.closer.has_room() && door.rests_until.is_none();
        if watch && !door.watched {
            let data = epoll::EventData::new_u64(Source::Door.token());
            epoll::add(&self.epoll, door.as_fd(), data, epoll::EventFlags::IN)?;
        } else if !watch && door.watched {
            epoll::delete(&self.epoll, door.as_fd())?;
        }
        door.watched = watch;
        Ok(())
    }
}

fn encode(id: u64, reply: &Reply) -> Option<Vec<u8>> {
    let packet = codec::encode_reply(id, reply).or_else(|error| {
        codec::encode_reply(id, &refused(RefusalCode::Kernel, &format!("the answer cannot be sent: {error}")))
    });
    packet.ok()
}
