//! One connection's state. Its receiving half is in `receive`, its sending half in `send`.

use std::{collections::VecDeque, time::Instant};

use super::{
    budget::{Budget, BudgetLimits, RESET},
    code::Code,
    frame::{Head, Kind, PREFACE, flag},
    hpack::{Decoder, Encoder},
    outbox::Outbox,
    receive::{Block, Reading},
    settings::{Announced, DEFAULT_WINDOW, Settings},
    stream::{StreamId, Streams},
};

/// The table that a peer's encoder may fill; the default of RFC 7541, which is therefore not announced.
const HEADER_TABLE: usize = 4096;

/// How many streams are remembered that were ended here: as many as may be open at once, and more.
const ENDED_HERE: usize = 512;

/// Which end of the connection this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The peer opens streams.
    Server,
    /// Streams are opened here.
    Client,
}

/// What the peer may make of the connection.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Streams that it may have open at once.
    pub max_streams: u32,
    /// Bytes of one stream that may wait here.
    pub stream_window: u32,
    /// Bytes of all streams that may wait here.
    pub connection_window: u32,
    /// The largest frame.
    pub max_frame_size: u32,
    /// The largest list of fields, as RFC 9113, section 6.5.2 counts it.
    pub max_header_list_size: u32,
    /// Bytes on their way to the peer, beyond which bodies wait.
    pub outbox: usize,
    /// What it may ask for without getting anywhere.
    pub budget: BudgetLimits,
}

/// Streams that are given up, told to a server a few at a time.
///
/// Callers may give their calls up as fast as they make them, and servers close a connection on which that happens
/// (CVE-2023-44487; `h2` does from 20 streams on that it has not looked at): all callers of the server would suffer. So a
/// few resets go, and the next when the server has confirmed a SETTINGS frame behind them. A PING would do as well,
/// but there are servers that count those.
#[derive(Debug, Default)]
pub(super) struct Resets {
    unconfirmed: u32,
    asked: bool,
    held: VecDeque<StreamId>,
}

/// Resets that go before they are confirmed.
const RESETS: u32 = 8;
/// Resets that wait at most; the server has ended most of these streams by itself then.
const HELD: usize = 4096;

/// One HTTP/2 connection.
#[derive(Debug)]
pub struct Connection {
    pub(super) role: Role,
    pub(super) limits: Limits,
    pub(super) reading: Reading,
    /// A frame that has come in part.
    pub(super) frame: Vec<u8>,
    /// A header block that goes on in the next frame.
    pub(super) block: Option<Block>,
    pub(super) decoder: Decoder,
    pub(super) encoder: Encoder,
    /// What the peer wants.
    pub(super) settings: Settings,
    /// The peer has said what it wants.
    pub(super) begun: bool,
    pub(super) streams: Streams,
    /// The last stream that was opened.
    pub(super) last: StreamId,
    /// Streams above this are not taken any more, since GOAWAY said so.
    pub(super) accepted: StreamId,
    /// Streams that were ended here while the peer may have gone on, the last of them behind.
    pub(super) ended_here: VecDeque<StreamId>,
    /// Resets that the peer has not confirmed, and those that wait until it has.
    pub(super) resets: Resets,
    pub(super) send_window: i64,
    pub(super) receive_window: i64,
    /// Bytes taken and not yet given back.
    pub(super) taken: u32,
    /// Streams with something that waits for room.
    pub(super) waiting: VecDeque<StreamId>,
    pub(super) budget: Budget,
    pub(super) outbox: Outbox,
}

impl Connection {
    /// A new connection, which begins with what this side has to say first.
    #[must_use]
    pub fn new(role: Role, limits: Limits, now: Instant) -> Self {
        let mut connection = Self {
            role,
            limits,
            reading: match role {
                Role::Server => Reading::Preface { seen: 0 },
                Role::Client => Reading::start(),
            },
            frame: Vec::new(),
            block: None,
            decoder: Decoder::new(HEADER_TABLE),
            encoder: Encoder::default(),
            settings: Settings::default(),
            begun: false,
            streams: Streams::default(),
            last: 0,
            accepted: StreamId::MAX,
            ended_here: VecDeque::new(),
            resets: Resets::default(),
            send_window: i64::from(DEFAULT_WINDOW),
            receive_window: i64::from(limits.connection_window.max(DEFAULT_WINDOW)),
            taken: 0,
            waiting: VecDeque::new(),
            budget: Budget::new(limits.budget, now),
            outbox: Outbox::default(),
        };
        let announced = Announced {
            max_streams: (role == Role::Server).then_some(limits.max_streams),
            stream_window: limits.stream_window,
            max_frame_size: limits.max_frame_size,
            max_header_list_size: limits.max_header_list_size,
        };
        if role == Role::Client {
            connection.outbox.buffer().extend_from_slice(PREFACE);
        }
        connection.write(Kind::Settings, 0, 0, &announced.payload());
        // The connection's own window has no setting: it is opened from its default.
        if let Some(more @ 1..) = limits.connection_window.checked_sub(DEFAULT_WINDOW) {
            connection.write(Kind::WindowUpdate, 0, 0, &more.to_be_bytes());
        }
        connection
    }

    /// Writes a whole small frame.
    pub(super) fn write(&mut self, kind: Kind, flags: u8, stream: StreamId, payload: &[u8]) {
        // Payloads of this kind have a few bytes.
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let buffer = self.outbox.buffer();
        buffer.extend_from_slice(&Head { length, kind, flags, stream }.bytes());
        buffer.extend_from_slice(payload);
    }

    /// What waits to be written.
    pub const fn outbox(&mut self) -> &mut Outbox {
        &mut self.outbox
    }

    /// Whether the peer has begun to speak HTTP/2.
    #[must_use]
    pub const fn has_begun(&self) -> bool {
        self.begun
    }

    /// How many streams are open.
    #[must_use]
    pub fn open_streams(&self) -> usize {
        self.streams.len()
    }

    /// The owner's numbers of all open streams.
    pub fn calls(&self) -> impl Iterator<Item = (StreamId, usize)> {
        self.streams.iter().map(|(id, stream)| (*id, stream.call))
    }

    /// The last stream that was opened.
    #[must_use]
    pub const fn last_stream(&self) -> StreamId {
        self.last
    }

    /// Asks whether somebody is there; [`super::Event::Pong`] is the answer.
    pub fn ping(&mut self) {
        self.write(Kind::Ping, 0, 0, PING);
    }

    /// Says that the connection will end, and that streams above `last` are not looked at.
    pub fn go_away(&mut self, last: StreamId, code: Code) {
        self.accepted = self.accepted.min(last);
        let payload = [last.to_be_bytes(), code.0.to_be_bytes()].concat();
        self.write(Kind::GoAway, 0, 0, &payload);
    }

    /// Resets a stream that the peer may still write to.
    pub(super) fn reset(&mut self, id: StreamId, code: Code) {
        self.write(Kind::ResetStream, 0, id, &code.0.to_be_bytes());
        if self.ended_here.len() >= ENDED_HERE {
            self.ended_here.pop_front();
        }
        self.ended_here.push_back(id);
    }

    /// Gives up a stream of a server.
    pub(super) fn give_up(&mut self, id: StreamId) {
        // It answers until it learns that nobody listens.
        self.budget.earn(RESET);
        if self.resets.held.len() >= HELD {
            self.resets.held.pop_front();
        }
        self.resets.held.push_back(id);
        self.send_resets();
    }

    pub(super) fn resets_confirmed(&mut self) {
        self.resets.unconfirmed = 0;
        self.resets.asked = false;
        self.send_resets();
    }

    fn send_resets(&mut self) {
        while self.resets.unconfirmed < RESETS {
            let Some(id) = self.resets.held.pop_front() else { return };
            self.resets.unconfirmed += 1;
            self.write(Kind::ResetStream, 0, id, &Code::CANCEL.0.to_be_bytes());
        }
        if !self.resets.asked {
            self.resets.asked = true;
            self.write(Kind::Settings, 0, 0, &[]);
        }
    }

    pub(super) fn acknowledge_settings(&mut self) {
        self.write(Kind::Settings, flag::ACK, 0, &[]);
    }
}

/// What our pings carry.
pub(super) const PING: &[u8] = b"plugvsr1";
