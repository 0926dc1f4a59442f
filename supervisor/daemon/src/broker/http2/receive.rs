//! From bytes to frames.
//!
//! Bodies are handed on as they come, in parts of frames; every other frame is collected, and `react` handles it whole.

use std::{ops::Range, time::Instant};

use super::{
    budget::{FRAME, WORK},
    code::{Code, ConnectionError},
    connection::Connection,
    fields::Fields,
    frame::{self, Head, Kind, PREFACE, flag},
    stream::StreamId,
};

/// What a header block may have beyond the list that it stands for.
const BLOCK_SLACK: usize = 16 * 1024;
/// What a peer said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The peer opened a stream. Its fields are in the list that was passed in; the stream's owner gives it a number.
    Opened {
        /// Which stream.
        stream: StreamId,
        /// No body follows.
        end: bool,
        /// The fields are only those up to the limit.
        oversized: bool,
    },
    /// A response's head, or trailers; the fields are in the list that was passed in.
    Fields {
        /// Which stream.
        stream: StreamId,
        /// The owner's number.
        call: usize,
        /// They end the body.
        trailers: bool,
        /// Nothing follows.
        end: bool,
        /// The fields are only those up to the limit.
        oversized: bool,
    },
    /// A part of a body.
    Data {
        /// Which stream.
        stream: StreamId,
        /// The owner's number.
        call: usize,
        /// Where it stands in the bytes that were passed in.
        piece: Range<usize>,
        /// Nothing follows.
        end: bool,
    },
    /// A stream ended before its time; it is no longer there.
    Reset {
        /// Which stream.
        stream: StreamId,
        /// The owner's number.
        call: usize,
        /// Why.
        code: Code,
        /// It was the peer's wish, and not its mistake.
        by_peer: bool,
    },
    /// The peer will close the connection, and has not looked at streams above `last`.
    GoAway {
        /// The last stream that it looked at.
        last: StreamId,
        /// Why.
        code: Code,
    },
    /// The answer to a ping.
    Pong,
}

/// Where in a frame the next byte belongs.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reading {
    Preface { seen: usize },
    Head { bytes: [u8; frame::HEAD], filled: usize },
    Padding { head: Head },
    Data { stream: StreamId, left: u32, padding: u32, end: bool },
    Payload { head: Head },
    Skip { left: u32 },
}

impl Reading {
    pub(super) const fn start() -> Self {
        Self::Head { bytes: [0; frame::HEAD], filled: 0 }
    }
}

/// A header block in several frames.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) stream: StreamId,
    pub(super) end: bool,
    pub(super) bytes: Vec<u8>,
    pub(super) frames: u32,
}

impl Connection {
    /// The next event in `input`, from `at`, which moves behind what was read; `None` when all of it is read.
    ///
    /// # Errors
    /// When the peer broke a rule that ends the connection.
    pub fn next(
        &mut self,
        input: &[u8],
        at: &mut usize,
        fields: &mut Fields,
        now: Instant,
    ) -> Result<Option<Event>, ConnectionError> {
        loop {
            let rest = &input[*at..];
            if rest.is_empty() {
                return Ok(None);
            }
            match &mut self.reading {
                Reading::Preface { seen } => {
                    let count = rest.len().min(PREFACE.len() - *seen);
                    if rest[..count] != PREFACE[*seen..*seen + count] {
                        return Err(ConnectionError::protocol("the preface is not that of HTTP/2"));
                    }
                    *at += count;
                    *seen += count;
                    if *seen == PREFACE.len() {
                        self.reading = Reading::start();
                    }
                }
                Reading::Head { bytes, filled } => {
                    let count = rest.len().min(frame::HEAD - *filled);
                    bytes[*filled..*filled + count].copy_from_slice(&rest[..count]);
                    *filled += count;
                    *at += count;
                    if *filled == frame::HEAD {
                        let head = Head::read(*bytes);
                        self.reading = self.enter(head, now)?;
                        // Frames without a payload are over at once; the others need more bytes.
                        match self.reading {
                            Reading::Payload { head } if head.length == 0 => {
                                self.reading = Reading::start();
                                if let Some(event) = self.whole(head, &[], fields, now)? {
                                    return Ok(Some(event));
                                }
                            }
                            Reading::Data { stream, left: 0, padding: 0, end } => {
                                self.reading = Reading::start();
                                if let Some(event) = self.body(stream, *at..*at, end) {
                                    return Ok(Some(event));
                                }
                            }
                            Reading::Skip { left: 0 } => self.reading = Reading::start(),
                            Reading::Preface { .. }
                            | Reading::Head { .. }
                            | Reading::Padding { .. }
                            | Reading::Data { .. }
                            | Reading::Payload { .. }
                            | Reading::Skip { .. } => {}
                        }
                    }
                }
                Reading::Padding { head } => {
                    let head = *head;
                    let padding = u32::from(rest[0]);
                    *at += 1;
                    // The length byte itself is part of the payload.
                    let Some(left) = (head.length - 1).checked_sub(padding) else {
                        return Err(ConnectionError::protocol("a frame is shorter than its padding"));
                    };
                    self.give_back(head.stream, padding + 1);
                    self.reading =
                        Reading::Data { stream: head.stream, left, padding, end: head.has(flag::END_STREAM) };
                    if left == 0 && padding == 0 {
                        self.reading = Reading::start();
                        if let Some(event) = self.body(head.stream, *at..*at, head.has(flag::END_STREAM)) {
                            return Ok(Some(event));
                        }
                    }
                }
                Reading::Data { stream, left, padding, end } => {
                    let (id, last) = (*stream, *end);
                    if *left == 0 {
                        let count = rest.len().min(*padding as usize);
                        *at += count;
                        *padding -= u32::try_from(count).unwrap_or(*padding);
                        if *padding > 0 {
                            continue;
                        }
                        self.reading = Reading::start();
                        if let Some(event) = self.body(id, *at..*at, last) {
                            return Ok(Some(event));
                        }
                        continue;
                    }
                    let count = rest.len().min(*left as usize);
                    let piece = *at..*at + count;
                    *at += count;
                    *left -= u32::try_from(count).unwrap_or(*left);
                    let over = *left == 0 && *padding == 0;
                    if over {
                        self.reading = Reading::start();
                    }
                    if let Some(event) = self.body(id, piece, last && over) {
                        return Ok(Some(event));
                    }
                }
                Reading::Payload { head } => {
                    let head = *head;
                    let length = head.length as usize;
                    let missing = length - self.frame.len();
                    let event = if self.frame.is_empty() && rest.len() >= length {
                        *at += length;
                        self.reading = Reading::start();
                        self.whole(head, &rest[..length], fields, now)?
                    } else {
                        let count = rest.len().min(missing);
                        self.frame.extend_from_slice(&rest[..count]);
                        *at += count;
                        if count < missing {
                            continue;
                        }
                        self.reading = Reading::start();
                        let payload = std::mem::take(&mut self.frame);
                        self.whole(head, &payload, fields, now)?
                    };
                    if event.is_some() {
                        return Ok(event);
                    }
                }
                Reading::Skip { left } => {
                    let count = rest.len().min(*left as usize);
                    *at += count;
                    *left -= u32::try_from(count).unwrap_or(*left);
                    if *left == 0 {
                        self.reading = Reading::start();
                    }
                }
            }
        }
    }

    /// Judges a frame by its head.
    fn enter(&mut self, head: Head, now: Instant) -> Result<Reading, ConnectionError> {
        if head.length > self.limits.max_frame_size {
            return Err(ConnectionError::size("a frame is larger than announced"));
        }
        if !self.begun && (head.kind != Kind::Settings || head.has(flag::ACK)) {
            return Err(ConnectionError::protocol("it does not begin with SETTINGS"));
        }
        if let Some(block) = &self.block
            && (head.kind != Kind::Continuation || head.stream != block.stream)
        {
            return Err(ConnectionError::protocol("a header block is interrupted"));
        }
        match head.kind {
            Kind::Data => self.enter_data(head, now),
            Kind::Continuation if self.block.is_none() => {
                Err(ConnectionError::protocol("CONTINUATION without a header block"))
            }
            Kind::PushPromise => Err(ConnectionError::protocol("PUSH_PROMISE, which nobody allowed")),
            Kind::Headers | Kind::Continuation => {
                if head.length as usize > self.block_limit() {
                    return Err(ConnectionError::flood("a header block is far too large"));
                }
                Ok(Reading::Payload { head })
            }
            Kind::ResetStream | Kind::WindowUpdate if head.length != 4 => {
                Err(ConnectionError::size("RST_STREAM or WINDOW_UPDATE of a wrong size"))
            }
            Kind::Ping if head.length != 8 => Err(ConnectionError::size("PING of a wrong size")),
            Kind::Settings | Kind::Ping | Kind::GoAway if head.stream != 0 => {
                Err(ConnectionError::protocol("a frame of the connection names a stream"))
            }
            Kind::ResetStream | Kind::Priority if head.stream == 0 => {
                Err(ConnectionError::protocol("a frame of a stream names none"))
            }
            Kind::Settings if head.length > 6 * 64 => Err(ConnectionError::flood("SETTINGS without end")),
            // What follows the code is for people; it is not kept.
            Kind::GoAway if !(8..=4096).contains(&head.length) => Err(ConnectionError::size("GOAWAY of a wrong size")),
            Kind::ResetStream | Kind::Settings | Kind::Ping | Kind::GoAway | Kind::WindowUpdate => {
                Ok(Reading::Payload { head })
            }
            Kind::Priority | Kind::Unknown => {
                self.pay(FRAME, now)?;
                Ok(Reading::Skip { left: head.length })
            }
        }
    }

    fn enter_data(&mut self, head: Head, now: Instant) -> Result<Reading, ConnectionError> {
        if head.stream == 0 || self.is_idle(head.stream) {
            return Err(ConnectionError::protocol("DATA on a stream that is not open"));
        }
        self.receive_window -= i64::from(head.length);
        if self.receive_window < 0 {
            return Err(ConnectionError::flow("more DATA than the connection's window"));
        }
        let end = head.has(flag::END_STREAM);
        let Some(stream) = self.streams.get_mut(&head.stream) else {
            // It was reset here, and the peer did not know yet.
            self.pay(FRAME, now)?;
            self.give_back(head.stream, head.length);
            return Ok(Reading::Skip { left: head.length });
        };
        if stream.ended || !stream.begun {
            return Err(ConnectionError { code: Code::STREAM_CLOSED, what: "DATA outside a body" });
        }
        stream.receive_window -= i64::from(head.length);
        if stream.receive_window < 0 {
            return Err(ConnectionError::flow("more DATA than the stream's window"));
        }
        let padded = head.has(flag::PADDED);
        if end || head.length > 0 && !padded {
            self.budget.earn(WORK);
        } else {
            // What padding leaves is not known yet; it is not worth a refund.
            self.pay(FRAME, now)?;
        }
        if padded {
            if head.length == 0 {
                return Err(ConnectionError::size("a padded frame without a length of its padding"));
            }
            return Ok(Reading::Padding { head });
        }
        Ok(Reading::Data { stream: head.stream, left: head.length, padding: 0, end })
    }

    fn body(&mut self, id: StreamId, piece: Range<usize>, end: bool) -> Option<Event> {
        if piece.is_empty() && !end {
            return None;
        }
        let Some(stream) = self.streams.get_mut(&id) else {
            // It ended in the middle of this frame.
            self.give_back(id, u32::try_from(piece.len()).unwrap_or(u32::MAX));
            return None;
        };
        stream.ended |= end;
        Some(Event::Data { stream: id, call: stream.call, piece, end })
    }

    /// Whether a stream of this number has never been open.
    pub(super) const fn is_idle(&self, id: StreamId) -> bool {
        id > self.last || id.is_multiple_of(2)
    }

    pub(super) const fn block_limit(&self) -> usize {
        self.limits.max_header_list_size as usize + BLOCK_SLACK
    }

    pub(super) fn pay(&mut self, price: u32, now: Instant) -> Result<(), ConnectionError> {
        if self.budget.pay(price, now) {
            Ok(())
        } else {
            Err(ConnectionError::flood("it sends frame after frame that moves nothing"))
        }
    }
}
