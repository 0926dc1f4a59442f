//! A connection as it is known on this side, and how a piece of it is moved.

use std::{io::ErrorKind, time::Instant};

use super::super::link::{Frame, MOST_DATA, Target, WINDOW};
use super::{BreakOff, Relay, Socket};

/// One connection.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) kind: Kind,
    pub(super) socket: Socket,
    /// Both ends have ended it: its socket tells nothing more.
    pub(super) closed: bool,
    /// Since when nothing is left of one to a port but what its plugin does not read.
    pub(super) lingers: Option<Instant>,
    /// From the other side, not written yet.
    pub(super) waiting: Vec<u8>,
    /// How much of it the other side takes.
    pub(super) credit: u32,
    /// Written since the other side was told.
    pub(super) written: u32,
    /// The connection may still say something.
    pub(super) reads: Says,
    /// The other side may still say something.
    pub(super) writes: Says,
}

impl Stream {
    pub(super) fn new(socket: Socket, target: Target) -> Self {
        let (kind, waiting) = (target.into(), Vec::new());
        let (reads, writes) = (Says::More, Says::More);
        Self { kind, socket, closed: false, lingers: None, waiting, credit: WINDOW, written: 0, reads, writes }
    }

    pub(super) fn break_off(&self, break_off: BreakOff) {
        if let Socket::Tcp(socket) = &self.socket {
            break_off(socket);
        }
    }
}

/// Whether one direction goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Says {
    More,
    Nothing,
}

/// Connections of one kind have room of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// To the worker socket.
    Inward,
    /// To the ports at which the plugin listens.
    Port,
    /// From the plugin.
    Outward,
    /// From the guest's kernel.
    Files,
}

impl From<Target> for Kind {
    fn from(target: Target) -> Self {
        match target {
            Target::Worker => Self::Inward,
            Target::Port(_) => Self::Port,
            Target::Broker | Target::Egress | Target::Stdout | Target::Stderr => Self::Outward,
            Target::Files => Self::Files,
        }
    }
}

impl<L> Relay<L> {
    /// Reads a piece of what a connection says.
    pub(super) fn read_in(&mut self, number: u32) {
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
    pub(super) fn write_out(&mut self, number: u32) {
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

    pub(super) fn reset(&mut self, number: u32) {
        self.drop_broken(number);
        Frame::Reset { stream: number }.write(&mut self.outgoing);
    }

    pub(super) fn drop_broken(&mut self, number: u32) {
        if let Some(stream) = self.streams.remove(&number) {
            stream.break_off(self.break_off);
        }
    }
}
