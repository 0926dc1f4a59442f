//! The connection to the supervisor: packets to requests, answers and notices to packets.
//!
//! Bounds: answers wait in a queue of [`MAX_QUEUED`], and while it is full no request is read, so that a flood of them is
//! held in the socket; notices are bounded by the launches. What a request means is not known here.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Instant,
};

use plugvisor_sandbox::{
    codec::{self, DecodeError},
    protocol::{Notice, RefusalCode, Reply},
    seqpacket::{Packet, Received},
};
use rustix::event::epoll;

use super::{Server, Source, requests::refused};

const MAX_QUEUED: usize = 64;

impl Server {
    pub(super) fn read_requests(&mut self) {
        while self.ending.is_none() && self.queue.len() < MAX_QUEUED && self.closer.has_room() {
            match self.closer.receive(&self.connection) {
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
                Ok(Received::Closed) | Err(_) => self.end(),
            }
        }
    }

    pub(super) fn packet(&mut self, packet: Packet) {
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

    pub(super) fn reply(&mut self, id: u64, reply: &Reply, descriptors: Vec<OwnedFd>) {
        let packet = codec::encode_reply(id, reply).or_else(|error| {
            codec::encode_reply(id, &refused(RefusalCode::Kernel, &format!("the answer cannot be sent: {error}")))
        });
        if let Ok(packet) = packet {
            self.queue.push_back((packet, descriptors));
        }
    }

    pub(super) fn notice(&mut self, notice: &Notice) {
        if let Ok(packet) = codec::encode_notice(notice) {
            self.queue.push_back((packet, vec![]));
        }
    }

    pub(super) fn flush(&mut self) {
        while self.ending.is_none()
            && let Some((packet, descriptors)) = self.queue.front()
        {
            let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
            match self.connection.try_send(packet, &borrowed) {
                Ok(()) => {
                    if let Some((_, descriptors)) = self.queue.pop_front() {
                        self.closer.take(descriptors);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.end(),
            }
        }
    }

    /// Asks epoll for room when something waits to be sent, and for requests only when there is room for an answer.
    pub(super) fn watch_connection(&mut self) -> io::Result<()> {
        let mut interest = epoll::EventFlags::empty();
        if !self.queue.is_empty() {
            interest |= epoll::EventFlags::OUT;
        }
        if self.queue.len() < MAX_QUEUED && self.closer.has_room() {
            interest |= epoll::EventFlags::IN;
        }
        if self.ending.is_some() {
            interest = epoll::EventFlags::empty();
            if self.interest != interest {
                // A closed connection is always ready; it must not spin the loop.
                let _ = epoll::delete(&self.epoll, &self.connection);
                self.interest = interest;
            }
        } else if interest != self.interest {
            let data = epoll::EventData::new_u64(Source::Supervisor.token());
            epoll::modify(&self.epoll, &self.connection, data, interest)?;
            self.interest = interest;
        }
        Ok(())
    }
}
