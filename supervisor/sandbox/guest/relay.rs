//! Connections on one side, frames on the other: the same code in a guest and on its host.
//!
//! One thread, one `poll`. What is kept is bounded: a window of bytes for each connection, so many connections in each
//! direction, and about [`HIGH`] bytes on their way out. Each turn reads a piece of every connection that has something, so that none of them
//! waits for another one's end.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixStream,
    },
};

use super::link::{self, Frame, MOST_DATA, Malformed, Target, WINDOW};

/// The most connections to the plugin at once, and the most that it has to others: more are closed at once. Each has its
/// own, so that a plugin that opens as many as it can does not keep its health checks out, nor its callers it from calling.
pub(crate) const MOST_INWARD: usize = 64;
pub(crate) const MOST_OUTWARD: usize = 192;

/// With so many bytes on their way out, nothing more is read from connections.
const HIGH: usize = 256 << 10;

/// What a pipe takes without waiting when poll(2) says that it takes something (`PIPE_BUF`).
const PIPE: usize = 4096;

/// As poll(2) takes it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Poll {
    pub(crate) fd: RawFd,
    pub(crate) events: i16,
    pub(crate) found: i16,
}

pub(crate) const IN: i16 = 1;
pub(crate) const OUT: i16 = 4;

impl Poll {
    pub(crate) fn new(fd: &impl AsRawFd, events: i16) -> Self {
        Self { fd: fd.as_raw_fd(), events, found: 0 }
    }

    /// Something came, or nothing will any more.
    pub(crate) fn is_readable(&self) -> bool {
        self.found & !OUT != 0
    }

    fn is_writable(&self) -> bool {
        self.found & !IN != 0
    }
}

/// One end of a connection.
#[derive(Debug)]
pub(crate) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
    /// An end of a pipe.
    Pipe(File),
}

impl Socket {
    /// Never waits in a read or write from here on.
    fn ready(&self) -> io::Result<()> {
        match self {
            Self::Unix(socket) => socket.set_nonblocking(true),
            Self::Tcp(socket) => socket.set_nodelay(true).and_then(|()| socket.set_nonblocking(true)),
            // Its flags may be shared. It is only used when poll says so, and then for as much as it has or takes.
            Self::Pipe(_) => Ok(()),
        }
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(socket) => (&*socket).read(buffer),
            Self::Tcp(socket) => (&*socket).read(buffer),
            Self::Pipe(pipe) => (&*pipe).read(buffer),
        }
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(socket) => (&*socket).write(bytes),
            Self::Tcp(socket) => (&*socket).write(bytes),
            Self::Pipe(pipe) => (&*pipe).write(&bytes[..bytes.len().min(PIPE)]),
        }
    }

    const fn is_pipe(&self) -> bool {
        matches!(self, Self::Pipe(_))
    }

    fn end(&self) {
        // Fails when the other end has ended it already.
        match self {
            Self::Unix(socket) => drop(socket.shutdown(Shutdown::Write)),
            Self::Tcp(socket) => drop(socket.shutdown(Shutdown::Write)),
            Self::Pipe(_) => {}
        }
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Unix(socket) => socket.as_raw_fd(),
            Self::Tcp(socket) => socket.as_raw_fd(),
            Self::Pipe(pipe) => pipe.as_raw_fd(),
        }
    }
}

#[derive(Debug)]
struct Stream {
    socket: Socket,
    /// From the other side, not written yet.
    waiting: Vec<u8>,
    /// How much of it the other side takes.
    credit: u32,
    /// Written since the other side was told.
    written: u32,
    /// The connection may still say something.
    reads: Says,
    /// The other side may still say something.
    writes: Says,
}

/// Whether one direction goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Says {
    More,
    Nothing,
}

/// What the other side said that is not about a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Hello { version: u8 },
    Signal { number: u32 },
    OutOfMemory,
    Ended { signal: bool, value: i32 },
}

/// Why nothing more can be relayed.
#[derive(Debug)]
pub(crate) enum Broken {
    /// The other side is gone.
    Gone,
    /// Reading or writing the link failed.
    Link(io::Error),
    /// What came is no frame.
    Malformed(Malformed),
    /// A frame that may not come now: what is wrong with it.
    Unexpected(&'static str),
}

/// Which side this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Host,
    Guest,
}

impl Side {
    /// Whether a connection of this number was begun here. The host's are even.
    const fn began(self, stream: u32) -> bool {
        matches!((self, stream % 2), (Self::Host, 0) | (Self::Guest, 1))
    }

    /// Whether the other side may begin one to there.
    const fn takes(self, target: Target) -> bool {
        matches!((self, target), (Self::Guest, Target::Worker))
            || matches!((self, target), (Self::Host, Target::Broker | Target::Egress | Target::Stdout | Target::Stderr))
    }
}

/// The connections and the link.
#[derive(Debug)]
pub(crate) struct Relay<L> {
    side: Side,
    link: L,
    streams: BTreeMap<u32, Stream>,
    next: u32,
    turns: usize,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
}

impl<L: Read + Write + AsRawFd> Relay<L> {
    /// Reads and writes of the link must not wait.
    pub(crate) fn new(side: Side, link: L) -> Self {
        let next = match side {
            Side::Host => 2,
            Side::Guest => 1,
        };
        Self { side, link, streams: BTreeMap::new(), next, turns: 0, incoming: Vec::new(), outgoing: Vec::new() }
    }

    /// Whether one more connection to there may begin.
    pub(crate) fn has_room(&self, target: Target) -> bool {
        // The host begins those to the plugin and no others.
        let inward = self.streams.keys().filter(|stream| Side::Host.began(**stream)).count();
        match target {
            Target::Worker => inward < MOST_INWARD,
            Target::Broker | Target::Egress | Target::Stdout | Target::Stderr => {
                self.streams.len() - inward < MOST_OUTWARD
            }
        }
    }

    /// Whether all that was said on this side is on its way: what was told, and what the pipes carried to their ends.
    pub(crate) fn has_said_all(&self) -> bool {
        let pipes = self.streams.values().filter(|stream| stream.socket.is_pipe());
        self.outgoing.is_empty() && pipes.into_iter().all(|stream| stream.reads == Says::Nothing)
    }

    /// Whether all that came for pipes is in them.
    pub(crate) fn has_printed_all(&self) -> bool {
        self.streams.values().all(|stream| !stream.socket.is_pipe() || stream.waiting.is_empty())
    }

    /// Begins a connection; its number.
    pub(crate) fn begin(&mut self, target: Target, socket: Socket) -> io::Result<u32> {
        socket.ready()?;
        let stream = self.next;
        self.next = self.next.checked_add(2).ok_or(ErrorKind::OutOfMemory)?;
        Frame::Open { stream, target }.write(&mut self.outgoing);
        self.streams.insert(stream, Stream::new(socket));
        Ok(stream)
    }

    /// Sends what is not about a connection.
    pub(crate) fn tell(&mut self, frame: Frame<'_>) {
        frame.write(&mut self.outgoing);
    }

    /// What to wait for: the link first, then every connection, in order.
    pub(crate) fn interests(&self, polls: &mut Vec<Poll>) {
        // An honest side never has so much to say: a guest that asks and does not listen is not listened to either.
        let listens = if self.outgoing.len() < 2 * HIGH { IN } else { 0 };
        polls.push(Poll::new(&self.link, if self.outgoing.is_empty() { listens } else { listens | OUT }));
        let full = self.outgoing.len() >= HIGH;
        polls.extend(self.streams.values().map(|stream| {
            let mut events = 0;
            if stream.reads == Says::More && stream.credit > 0 && !full {
                events |= IN;
            }
            if !stream.waiting.is_empty() {
                events |= OUT;
            }
            // One of which nothing is wanted is not waited for, nor its end: poll passes over negative numbers.
            let fd = if events == 0 { -1 } else { stream.socket.as_raw_fd() };
            Poll { fd, events, found: 0 }
        }));
    }

    /// Moves what can be moved after `polls` were found as [`Relay::interests`] gave them. `open` connects to a target for
    /// the other side.
    pub(crate) fn turn(
        &mut self,
        polls: &[Poll],
        mut open: impl FnMut(Target) -> io::Result<Socket>,
    ) -> Result<Vec<Event>, Broken> {
        let Some((link, rest)) = polls.split_first() else { return Ok(Vec::new()) };
        let mut found: Vec<(u32, Poll)> = self.streams.keys().copied().zip(rest.iter().copied()).collect();
        // Another one is the first each time: what is on its way out may be full before the last.
        self.turns = self.turns.wrapping_add(1);
        let first = self.turns % found.len().max(1);
        found.rotate_left(first);
        for (number, poll) in found {
            if poll.is_writable() && poll.events & OUT != 0 {
                self.write_out(number);
            }
            if poll.is_readable() && poll.events & IN != 0 && self.outgoing.len() < HIGH {
                self.read_in(number);
            }
        }
        let mut events = Vec::new();
        if link.is_readable() && link.events & IN != 0 {
            self.receive(&mut events, &mut open)?;
        }
        self.send()?;
        Ok(events)
    }

    /// Sends as much as the link takes.
    fn send(&mut self) -> Result<(), Broken> {
        let mut sent = 0;
        while sent < self.outgoing.len() {
            match self.link.write(&self.outgoing[sent..]) {
                Ok(0) => return Err(Broken::Gone),
                Ok(count) => sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(broken(error)),
            }
        }
        self.outgoing.drain(..sent);
        Ok(())
    }

    fn receive(
        &mut self,
        events: &mut Vec<Event>,
        open: &mut impl FnMut(Target) -> io::Result<Socket>,
    ) -> Result<(), Broken> {
        let mut buffer = [0; 32 << 10];
        match self.link.read(&mut buffer) {
            Ok(0) => return Err(Broken::Gone),
            Ok(count) => self.incoming.extend_from_slice(&buffer[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Ok(()),
            Err(error) => return Err(broken(error)),
        }
        let incoming = std::mem::take(&mut self.incoming);
        let mut at = 0;
        while let Some((frame, length)) = link::read(&incoming[at..]).map_err(Broken::Malformed)? {
            at += length;
            self.take(frame, events, open)?;
        }
        // Never more than one frame that is not whole.
        self.incoming = incoming[at..].to_vec();
        Ok(())
    }

    fn take(
        &mut self,
        frame: Frame<'_>,
        events: &mut Vec<Event>,
        open: &mut impl FnMut(Target) -> io::Result<Socket>,
    ) -> Result<(), Broken> {
        match frame {
            Frame::Open { stream, target } => {
                if self.side.began(stream) || !self.side.takes(target) || self.streams.contains_key(&stream) {
                    return Err(Broken::Unexpected("a connection that it may not begin"));
                }
                let opened =
                    if self.has_room(target) { open(target) } else { Err(ErrorKind::ConnectionRefused.into()) };
                match opened.and_then(|socket| socket.ready().map(|()| socket)) {
                    Ok(socket) => {
                        let mut opened = Stream::new(socket);
                        if opened.socket.is_pipe() {
                            // It is written to and never says anything.
                            opened.reads = Says::Nothing;
                            Frame::End { stream }.write(&mut self.outgoing);
                        }
                        self.streams.insert(stream, opened);
                    }
                    Err(_) => Frame::Reset { stream }.write(&mut self.outgoing),
                }
            }
            // What comes of a connection that is not here was on its way when this side ended it.
            Frame::Data { stream, bytes } => {
                let Some(found) = self.streams.get_mut(&stream) else { return Ok(()) };
                let window = usize::try_from(WINDOW - found.written).unwrap_or(0);
                if found.writes == Says::Nothing || found.waiting.len() + bytes.len() > window {
                    return Err(Broken::Unexpected("more bytes than were asked for"));
                }
                found.waiting.extend_from_slice(bytes);
                // A pipe waits until poll says that it takes something.
                if !found.socket.is_pipe() {
                    self.write_out(stream);
                }
            }
            Frame::End { stream } => {
                let Some(found) = self.streams.get_mut(&stream) else { return Ok(()) };
                found.writes = Says::Nothing;
                if found.waiting.is_empty() {
                    self.write_out(stream);
                }
            }
            Frame::Reset { stream } => drop(self.streams.remove(&stream)),
            Frame::Credit { stream, bytes } => {
                let Some(found) = self.streams.get_mut(&stream) else { return Ok(()) };
                match found.credit.checked_add(bytes).filter(|credit| *credit <= WINDOW) {
                    Some(credit) => found.credit = credit,
                    None => return Err(Broken::Unexpected("more credit than a window")),
                }
            }
            Frame::Hello { version } if self.side == Side::Host => events.push(Event::Hello { version }),
            Frame::OutOfMemory if self.side == Side::Host => events.push(Event::OutOfMemory),
            Frame::Ended { signal, value } if self.side == Side::Host => events.push(Event::Ended { signal, value }),
            Frame::Signal { number } if self.side == Side::Guest => events.push(Event::Signal { number }),
            Frame::Hello { .. } | Frame::OutOfMemory | Frame::Ended { .. } | Frame::Signal { .. } => {
                return Err(Broken::Unexpected("what only the other side says"));
            }
        }
        Ok(())
    }

    /// Reads a piece of what a connection says.
    fn read_in(&mut self, number: u32) {
        let Some(stream) = self.streams.get_mut(&number) else { return };
        let mut buffer = [0; MOST_DATA];
        let most = MOST_DATA.min(usize::try_from(stream.credit).unwrap_or(MOST_DATA));
        match stream.socket.read(&mut buffer[..most]) {
            Ok(0) => {
                stream.reads = Says::Nothing;
                Frame::End { stream: number }.write(&mut self.outgoing);
                self.remove_if_over(number);
            }
            Ok(count) => {
                stream.credit -= u32::try_from(count).unwrap_or(stream.credit);
                Frame::Data { stream: number, bytes: &buffer[..count] }.write(&mut self.outgoing);
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => self.reset(number),
        }
    }

    /// Writes what waits for a connection, and says how much more is taken.
    fn write_out(&mut self, number: u32) {
        let Some(stream) = self.streams.get_mut(&number) else { return };
        if !stream.waiting.is_empty() {
            match stream.socket.write(&stream.waiting) {
                Ok(count) => {
                    stream.waiting.drain(..count);
                    stream.written += u32::try_from(count).unwrap_or(0);
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return,
                Err(_) => return self.reset(number),
            }
        }
        // Told in halves of a window, not for each piece.
        if stream.writes == Says::More && stream.written >= WINDOW / 2 {
            Frame::Credit { stream: number, bytes: stream.written }.write(&mut self.outgoing);
            stream.written = 0;
        }
        if stream.waiting.is_empty() && stream.writes == Says::Nothing {
            stream.socket.end();
            self.remove_if_over(number);
        }
    }

    fn remove_if_over(&mut self, number: u32) {
        let over = |stream: &Stream| {
            stream.reads == Says::Nothing && stream.writes == Says::Nothing && stream.waiting.is_empty()
        };
        if self.streams.get(&number).is_some_and(over) {
            self.streams.remove(&number);
        }
    }

    fn reset(&mut self, number: u32) {
        self.streams.remove(&number);
        Frame::Reset { stream: number }.write(&mut self.outgoing);
    }
}

impl Stream {
    fn new(socket: Socket) -> Self {
        Self { socket, waiting: Vec::new(), credit: WINDOW, written: 0, reads: Says::More, writes: Says::More }
    }
}

fn broken(error: io::Error) -> Broken {
    match error.kind() {
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => Broken::Gone,
        _ => Broken::Link(error),
    }
}
