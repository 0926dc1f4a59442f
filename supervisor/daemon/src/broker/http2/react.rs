//! What a frame means: the connection's state changes, and its owner is told.

use std::time::Instant;

use super::{
    budget::{FRAME, RESET, WORK},
    code::{Code, ConnectionError},
    connection::{Connection, PING, Role},
    fields::Fields,
    frame::{Head, Kind, flag},
    hpack::Decoded,
    receive::{Block, Event},
    settings::MAX_WINDOW,
    stream::{Stream, StreamId},
};

/// Frames of one header block (CVE-2024-27316); its bytes have a bound of their own.
const BLOCK_FRAMES: u32 = 64;
/// The owner's number of a stream that it has not numbered yet.
const UNNUMBERED: usize = usize::MAX;

impl Connection {
    /// Handles a frame that has come whole.
    pub(super) fn whole(
        &mut self,
        head: Head,
        payload: &[u8],
        fields: &mut Fields,
        now: Instant,
    ) -> Result<Option<Event>, ConnectionError> {
        match head.kind {
            Kind::Headers => {
                let block = unwrapped(head, payload)?;
                let end = head.has(flag::END_STREAM);
                if head.has(flag::END_HEADERS) {
                    return self.list(head.stream, end, block, fields, now);
                }
                self.block = Some(Block { stream: head.stream, end, bytes: block.to_vec(), frames: 1 });
                Ok(None)
            }
            Kind::Continuation => {
                self.pay(FRAME, now)?;
                let limit = self.block_limit();
                let Some(block) = &mut self.block else { return Ok(None) };
                block.frames += 1;
                if block.frames > BLOCK_FRAMES || block.bytes.len() + payload.len() > limit {
                    return Err(ConnectionError::flood("a header block without end"));
                }
                block.bytes.extend_from_slice(payload);
                if !head.has(flag::END_HEADERS) {
                    return Ok(None);
                }
                let Some(Block { stream, end, bytes, frames: _ }) = self.block.take() else { return Ok(None) };
                self.list(stream, end, &bytes, fields, now)
            }
            Kind::ResetStream => self.reset_by_peer(head.stream, Code(number(payload)), now),
            Kind::Settings => self.settings(head, payload, now).map(|()| None),
            Kind::Ping => {
                if head.has(flag::ACK) {
                    return Ok((payload == PING).then_some(Event::Pong));
                }
                self.pay(FRAME, now)?;
                self.write(Kind::Ping, flag::ACK, 0, payload);
                Ok(None)
            }
            Kind::GoAway => Ok(Some(Event::GoAway {
                last: number(payload) & 0x7fff_ffff,
                code: Code(number(payload.get(4..).unwrap_or_default())),
            })),
            Kind::WindowUpdate => {
                self.pay(FRAME, now)?;
                self.window(head.stream, number(payload) & 0x7fff_ffff)
            }
            // These were judged by their heads.
            Kind::Data | Kind::Priority | Kind::PushPromise | Kind::Unknown => Ok(None),
        }
    }

    fn settings(&mut self, head: Head, payload: &[u8], now: Instant) -> Result<(), ConnectionError> {
        self.pay(4 * FRAME, now)?;
        if head.has(flag::ACK) {
            if !payload.is_empty() {
                return Err(ConnectionError::size("an acknowledgement of SETTINGS with a payload"));
            }
            self.resets_confirmed();
            return Ok(());
        }
        let before = i64::from(self.settings.stream_window);
        if !self.begun {
            // It allows what it does not mention (RFC 9113, section 6.5.2).
            self.settings.max_streams = u32::MAX;
        }
        self.settings.update(payload)?;
        self.begun = true;
        let change = i64::from(self.settings.stream_window) - before;
        if change != 0 {
            for (id, stream) in &mut self.streams {
                stream.send_window += change;
                if stream.send_window > i64::from(MAX_WINDOW) {
                    return Err(ConnectionError::flow("SETTINGS open a window beyond 2^31 - 1"));
                }
                if stream.has_more() && !stream.waits {
                    stream.waits = true;
                    self.waiting.push_back(*id);
                }
            }
        }
        self.encoder.limit(self.settings.header_table_size as usize);
        self.acknowledge_settings();
        Ok(())
    }

    fn window(&mut self, id: StreamId, more: u32) -> Result<Option<Event>, ConnectionError> {
        if id == 0 {
            if more == 0 {
                return Err(ConnectionError::protocol("WINDOW_UPDATE by nothing"));
            }
            self.send_window += i64::from(more);
            if self.send_window > i64::from(MAX_WINDOW) {
                return Err(ConnectionError::flow("WINDOW_UPDATE of the connection beyond 2^31 - 1"));
            }
            return Ok(None);
        }
        if self.is_idle(id) {
            return Err(ConnectionError::protocol("WINDOW_UPDATE on a stream that is not open"));
        }
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(None) };
        stream.send_window += i64::from(more);
        if more == 0 || stream.send_window > i64::from(MAX_WINDOW) {
            return Ok(self.reset_by_us(id, Code::FLOW_CONTROL_ERROR));
        }
        if stream.has_more() && !stream.waits {
            stream.waits = true;
            self.waiting.push_back(id);
        }
        Ok(None)
    }

    fn reset_by_peer(&mut self, id: StreamId, code: Code, now: Instant) -> Result<Option<Event>, ConnectionError> {
        if self.is_idle(id) {
            return Err(ConnectionError::protocol("RST_STREAM on a stream that is not open"));
        }
        let Some(stream) = self.streams.remove(&id) else {
            self.pay(FRAME, now)?;
            return Ok(None);
        };
        // A provider can end only what it was asked; a caller can ask and end without bound.
        self.pay(if self.role == Role::Server { RESET } else { FRAME }, now)?;
        Ok(Some(Event::Reset { stream: id, call: stream.call, code, by_peer: true }))
    }

    fn reset_by_us(&mut self, id: StreamId, code: Code) -> Option<Event> {
        let stream = self.streams.remove(&id)?;
        self.reset(id, code);
        Some(Event::Reset { stream: id, call: stream.call, code, by_peer: false })
    }

    /// Handles a whole header block. Whatever becomes of its stream, it is decoded: the next one builds on it.
    fn list(
        &mut self,
        id: StreamId,
        end: bool,
        block: &[u8],
        fields: &mut Fields,
        now: Instant,
    ) -> Result<Option<Event>, ConnectionError> {
        fields.clear();
        let decoded = self.decoder.decode(block, self.limits.max_header_list_size as usize, fields)?;
        let oversized = decoded == Decoded::Oversized;
        if let Some(stream) = self.streams.get_mut(&id) {
            if stream.ended {
                return Err(ConnectionError { code: Code::STREAM_CLOSED, what: "HEADERS after the end of a stream" });
            }
            let informational = self.role == Role::Client
                && !stream.begun
                && fields.get(b":status").is_some_and(|status| status.first() == Some(&b'1'));
            if informational && !end {
                self.pay(FRAME, now)?;
                return Ok(None);
            }
            let trailers = stream.begun;
            if trailers && !end {
                return Ok(self.reset_by_us(id, Code::PROTOCOL_ERROR));
            }
            stream.begun = true;
            stream.ended = end;
            let call = stream.call;
            self.budget.earn(WORK);
            return Ok(Some(Event::Fields { stream: id, call, trailers, end, oversized }));
        }
        if !self.is_idle(id) {
            // A client opened all streams itself, and a peer may write until it learns that one is over.
            if self.role == Role::Server && !self.ended_here.contains(&id) {
                return Err(ConnectionError { code: Code::STREAM_CLOSED, what: "HEADERS on a stream that is over" });
            }
            self.pay(FRAME, now)?;
            return Ok(None);
        }
        if self.role == Role::Client || id.is_multiple_of(2) {
            return Err(ConnectionError::protocol("HEADERS on a stream that the peer cannot open"));
        }
        self.last = id;
        if id > self.accepted || self.streams.len() >= self.limits.max_streams as usize {
            self.pay(RESET, now)?;
            self.reset(id, Code::REFUSED_STREAM);
            return Ok(None);
        }
        let mut stream = Stream::new(UNNUMBERED, self.settings.stream_window, self.limits.stream_window);
        stream.begun = true;
        stream.ended = end;
        self.streams.insert(id, stream);
        Ok(Some(Event::Opened { stream: id, end, oversized }))
    }
}

/// A HEADERS frame's block, without padding and priority.
fn unwrapped(head: Head, payload: &[u8]) -> Result<&[u8], ConnectionError> {
    let mut block = payload;
    let mut padding = 0;
    if head.has(flag::PADDED) {
        let (first, rest) = block.split_first().ok_or(ConnectionError::size("HEADERS without their padding"))?;
        (padding, block) = (usize::from(*first), rest);
    }
    if head.has(flag::PRIORITY) {
        block = block.get(5..).ok_or(ConnectionError::size("HEADERS without their priority"))?;
    }
    let length = block.len().checked_sub(padding);
    let length = length.ok_or(ConnectionError::protocol("a frame is shorter than its padding"))?;
    Ok(&block[..length])
}

/// The first four bytes; frames that are read so have them.
fn number(payload: &[u8]) -> u32 {
    payload.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes))
}
