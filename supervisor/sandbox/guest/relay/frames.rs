//! The link: what the other side says is taken, and what is said here is sent.

use std::{
    io::{self, ErrorKind, Read, Write},
    os::fd::AsRawFd,
};

use super::super::link::{self, Frame, Target, WINDOW};
use super::{
    Broken, Event, Relay, Side, Socket,
    stream::{Says, Stream},
};

impl<L: Read + Write + AsRawFd> Relay<L> {
    /// Sends as much as the link takes.
    pub(super) fn send(&mut self) -> Result<(), Broken> {
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

    pub(super) fn receive(
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
}

fn broken(error: io::Error) -> Broken {
    match error.kind() {
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => Broken::Gone,
        _ => Broken::Link(error),
    }
}
