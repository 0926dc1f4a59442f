//! Connections on one side, frames on the other: the same code in a guest and on its host.
//!
//! One thread, one `poll`. What is kept is bounded: a window of bytes for each connection, so many connections in each
//! direction, and about [`HIGH`] bytes on their way out. Each turn reads a piece of every connection that has something,
//! so that none of them waits for another one's end.
//!
//! Here is what is relayed and in which order; `frames` is about the link, `stream` about one connection.

mod frames;
mod poll;
mod socket;
mod stream;

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::TcpStream,
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use self::{
    poll::ERROR,
    stream::{Kind, Says, Stream},
};
pub(crate) use self::{
    poll::{IN, OUT, Poll},
    socket::Socket,
};
use super::link::{Frame, Malformed, Target};

/// The most connections to the plugin at once, and the most that it has to others: more are closed at once. Each has its
/// own, so that a plugin that opens as many as it can does not keep its health checks out, nor its callers it from calling.
pub(crate) const MOST_INWARD: usize = 64;
pub(crate) const MOST_OUTWARD: usize = 192;

/// How long what a plugin said last on its connections is carried on after its end, where somebody takes it.
pub(crate) const SETTLE: Duration = Duration::from_secs(1);

/// How long a connection to a port is kept for what came last when both ends have said all, and the plugin does not read it: as
/// long as the supervisor gives one at other levels. It holds a place from who connects next.
pub(crate) const LINGER: Duration = Duration::from_secs(5);

/// What each of the two buffers of a connection to a port is set to in a guest, in bytes: as the host does on its side.
pub(crate) const BUFFER: u32 = 64 << 10;

/// With so many bytes on their way out, nothing more is read from connections.
const HIGH: usize = 256 << 10;

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
            || matches!(
                (self, target),
                (Self::Host, Target::Broker | Target::Egress | Target::Stdout | Target::Stderr | Target::Files)
            )
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
            Kind::Files => 1,
        };
        self.streams.values().filter(|stream| stream.kind == kind).count() < most
    }

    /// Whether nothing more is to be had of any connection here. The one for the plugin's data lasts as long as the guest: what
    /// a plugin wrote has been answered for when it has ended.
    pub(crate) fn has_heard_all(&self) -> bool {
        self.streams.values().all(|stream| stream.reads == Says::Nothing || stream.kind == Kind::Files)
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
}

impl<L> Drop for Relay<L> {
    fn drop(&mut self) {
        let ended = |stream: &&Stream| stream.writes == Says::Nothing && stream.waiting.is_empty();
        self.streams.values().filter(|stream| !ended(stream)).for_each(|stream| stream.break_off(self.break_off));
    }
}
