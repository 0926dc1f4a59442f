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
    time::{Duration, Instant},
};

use super::link::{self, Frame, MOST_DATA, Malformed, Target, WINDOW};

/// The most connections to the plugin at once, and the most that it has to others: more are closed at once. Each has its
/// own, so that a plugin that opens as many as it can does not keep its health checks out, nor its callers it from calling.
pub(crate) const MOST_INWARD: usize = 64;
pub(crate) const MOST_OUTWARD: usize = 192;

/// How long what a plugin said last on its connections is carried on after its end, where somebody takes it.
pub(crate) const SETTLE: Duration = Duration::from_secs(1);

/// How long a connection to a port is kept for what came last when both ends have said all, and the plugin does not read it: as
/// long as the supervisor gives one at other levels. It holds a place from who connects next.
pub(crate) const LINGER: Duration = Duration::from_secs(5);

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
const ERROR: i16 = 8;

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

    /// Whether one that nothing is wanted of tells that its other end broke it off, and nothing else.
    const fn tells_of_a_reset(&self) -> bool {
        matches!(self, Self::Tcp(_))
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

/// Connections of one kind have room of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// To the worker socket.
    Inward,
    /// To the ports at which the plugin listens.
    Port,
    /// From the plugin.
    Outward,
}

impl From<Target> for Kind {
    fn from(target: Target) -> Self {
        match target {
            Target::Worker => Self::Inward,
            Target::Port(_) => Self::Port,
            Target::Broker | Target::Egress | Target::Stdout | Target::Stderr => Self::Outward,
        }
    }
}

#[derive(Debug)]
struct Stream {
    kind: Kind,
    socket: Socket,
    /// Both ends have ended it: its socket tells nothing more.
    closed: bool,
    /// Since when nothing is left of one to a port but what its plugin does not read.
    lingers: Option<Instant>,
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
        matches!((self, target), (Self::Guest, Target::Worker | Target::Port(_)))
            || matches!((self, target), (Self::Host, Target::Broker | Target::Egress | Target::Stdout | Target::Stderr))
    }
}

/// How a connection of TCP is broken off: when it is closed after this, its other end is told by a reset, so that it does not
/// take what it has for everything.
pub(crate) type BreakOff = fn(&TcpStream);

/// The connections and the link. What has not been ended in order when it is dropped is broken off.
#[derive(Debug)]
pub(crate) struct Relay<L> {
    side: Side,
    link: L,
    ports: usize,
    break_off: BreakOff,
    streams: BTreeMap<u32, Stream>,
    next: u32,
    turns: usize,
    /// The connections that were read last: of those to ports, and of the others.
    last: [u32; 2],
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
}

impl<L: Read + Write + AsRawFd> Relay<L> {
    /// Reads and writes of the link must not wait. At most so many connections to `ports` at once.
    pub(crate) fn new(side: Side, link: L, ports: usize, break_off: BreakOff) -> Self {
        let next = match side {
            Side::Host => 2,
            Side::Guest => 1,
        };
        let (streams, incoming, outgoing) = (BTreeMap::new(), Vec::new(), Vec::new());
        Self { side, link, ports, break_off, streams, next, turns: 0, last: [0; 2], incoming, outgoing }
    }

    /// Whether one more connection to there may begin here. Not while much is on its way out: who connects and breaks off
    /// again would have ever more said of it.
    pub(crate) fn has_room(&self, target: Target) -> bool {
        self.outgoing.len() < HIGH && self.has_place(target)
    }

    /// Whether there are fewer connections to there than there may be.
    fn has_place(&self, target: Target) -> bool {
        let kind = Kind::from(target);
        let most = match kind {
            Kind::Inward => MOST_INWARD,
            Kind::Port => self.ports,
            Kind::Outward => MOST_OUTWARD,
        };
        self.streams.values().filter(|stream| stream.kind == kind).count() < most
    }

    /// Whether nothing more is to be had of any connection here.
    pub(crate) fn has_heard_all(&self) -> bool {
        self.streams.values().all(|stream| stream.reads == Says::Nothing)
    }

    /// Whether all that came is with those whom it was for.
    pub(crate) fn has_passed_on_all(&self) -> bool {
        self.streams.values().all(|stream| stream.waiting.is_empty())
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
        // One that serves for long has had them all, and begins anew: connections are few.
        while self.streams.contains_key(&self.next) {
            self.next = self.next.wrapping_add(2);
        }
        let stream = self.next;
        self.next = self.next.wrapping_add(2);
        Frame::Open { stream, target }.write(&mut self.outgoing);
        self.streams.insert(stream, Stream::new(socket, target));
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
            // One of which nothing is wanted is not waited for, nor its end: poll passes over negative numbers. But for one
            // that tells when it is broken off: it keeps a place from others.
            let watched = events != 0 || (stream.socket.tells_of_a_reset() && !stream.closed);
            let fd = if watched { stream.socket.as_raw_fd() } else { -1 };
            Poll { fd, events, found: 0 }
        }));
    }

    /// When [`Relay::turn`] is to be called at the latest, though nothing was found.
    pub(crate) fn patience(&self, now: Instant) -> Option<Duration> {
        let first = self.streams.values().filter_map(|stream| stream.lingers).min()?;
        Some((first + LINGER).saturating_duration_since(now))
    }

    /// Breaks off what has lingered for too long, and notes what lingers from now on.
    pub(crate) fn end_lingering(&mut self, now: Instant) {
        let mut late = Vec::new();
        for (number, stream) in &mut self.streams {
            let said = stream.reads == Says::Nothing && stream.writes == Says::Nothing;
            if stream.kind != Kind::Port || !(stream.closed || said) {
                stream.lingers = None;
            } else if now.duration_since(*stream.lingers.get_or_insert(now)) >= LINGER {
                late.push(*number);
            }
        }
        for number in late {
            self.reset(number);
        }
    }

    /// Moves what can be moved after `polls` were found as [`Relay::interests`] gave them. `open` connects to a target for
    /// the other side.
    pub(crate) fn turn(
        &mut self,
        polls: &[Poll],
        mut open: impl FnMut(Target) -> io::Result<Socket>,
    ) -> Result<Vec<Event>, Broken> {
        let Some((link, rest)) = polls.split_first() else { return Ok(Vec::new()) };
        for (number, poll) in self.order(rest) {
            if poll.events == 0 && poll.found != 0 {
                self.found_over(number, poll);
                continue;
            }
            if poll.is_writable() && poll.events & OUT != 0 {
                self.write_out(number);
            }
            if poll.is_readable() && poll.events & IN != 0 && self.outgoing.len() < HIGH {
                let Some(stream) = self.streams.get(&number) else { continue };
                self.last[usize::from(stream.kind == Kind::Port)] = number;
                self.read_in(number);
            }
        }
        let mut events = Vec::new();
        if link.is_readable() && link.events & IN != 0 {
            self.receive(&mut events, &mut open)?;
        }
        self.end_lingering(Instant::now());
        self.send()?;
        Ok(events)
    }

    /// What was found of each, in the order in which they are read: what is on its way out may be full before the last. Those to
    /// ports, of which strangers may begin many, and all others take turns in being first; and of each the first is the one
    /// after the last that was read.
    fn order(&mut self, polls: &[Poll]) -> Vec<(u32, Poll)> {
        let all = self.streams.iter().zip(polls);
        let (to_ports, others): (Vec<_>, Vec<_>) = all.partition(|((_, stream), _)| stream.kind == Kind::Port);
        let from_last = |list: Vec<((&u32, &Stream), &Poll)>, last: u32| {
            let mut list: Vec<(u32, Poll)> = list.into_iter().map(|((number, _), poll)| (*number, *poll)).collect();
            let first = list.partition_point(|(number, _)| *number <= last);
            list.rotate_left(first);
            list
        };
        let (mut first, mut second) = (from_last(others, self.last[0]), from_last(to_ports, self.last[1]));
        self.turns = self.turns.wrapping_add(1);
        if self.turns.is_multiple_of(2) {
            std::mem::swap(&mut first, &mut second);
        }
        first.append(&mut second);
        first
    }

    /// One of which nothing is wanted now tells something: that it was broken off, or that both ends have ended it.
    fn found_over(&mut self, number: u32, poll: Poll) {
        if poll.found & ERROR != 0 {
            self.reset(number);
        } else if let Some(stream) = self.streams.get_mut(&number) {
            stream.closed = true;
        }
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
                    if self.has_place(target) { open(target) } else { Err(ErrorKind::ConnectionRefused.into()) };
                match opened.and_then(|socket| socket.ready().map(|()| socket)) {
                    Ok(socket) => {
                        let mut opened = Stream::new(socket, target);
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
            Frame::Reset { stream } => self.drop_broken(stream),
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
        self.drop_broken(number);
        Frame::Reset { stream: number }.write(&mut self.outgoing);
    }

    fn drop_broken(&mut self, number: u32) {
        if let Some(stream) = self.streams.remove(&number) {
            stream.break_off(self.break_off);
        }
    }
}

impl<L> Drop for Relay<L> {
    fn drop(&mut self) {
        let ended = |stream: &&Stream| stream.writes == Says::Nothing && stream.waiting.is_empty();
        self.streams.values().filter(|stream| !ended(stream)).for_each(|stream| stream.break_off(self.break_off));
    }
}

impl Stream {
    fn new(socket: Socket, target: Target) -> Self {
        let (kind, waiting) = (target.into(), Vec::new());
        let (reads, writes) = (Says::More, Says::More);
        Self { kind, socket, closed: false, lingers: None, waiting, credit: WINDOW, written: 0, reads, writes }
    }

    fn break_off(&self, break_off: BreakOff) {
        if let Socket::Tcp(socket) = &self.socket {
            break_off(socket);
        }
    }
}

fn broken(error: io::Error) -> Broken {
    match error.kind() {
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => Broken::Gone,
        _ => Broken::Link(error),
    }
}
