//! From orders to frames.

use std::ops::Range;

use super::{
    budget::{RESET, WORK},
    code::Code,
    connection::{Connection, Role},
    fields::Fields,
    frame::{self, Head, Kind, flag},
    hpack::Encoder,
    stream::{After, Stream, StreamId},
};

/// What one stream may send before the next has its turn.
const TURN: usize = 64 * 1024;
/// The highest number of a stream that is opened here.
const LAST_STREAM: StreamId = 1 << 30;

/// Bytes that waited and are on their way now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved {
    /// Which stream.
    pub stream: StreamId,
    /// The owner's number.
    pub call: usize,
    /// How many.
    pub bytes: u32,
    /// Nothing of it waits any more.
    pub drained: bool,
}

impl Connection {
    /// Whether another stream can be opened now.
    #[must_use]
    pub fn can_open(&self) -> bool {
        self.streams.len() < self.settings.max_streams as usize && self.outbox.len() < self.limits.outbox
    }

    /// Whether the connection has no numbers left.
    #[must_use]
    pub const fn is_used_up(&self) -> bool {
        self.last >= LAST_STREAM
    }

    /// Opens a stream whose head `write` encodes.
    pub fn open(&mut self, call: usize, end: bool, write: impl FnOnce(&mut Encoder, &mut Vec<u8>)) -> StreamId {
        let id = if self.last == 0 { 1 } else { self.last + 2 };
        self.last = id;
        let mut stream = Stream::new(call, self.settings.stream_window, self.limits.stream_window);
        stream.finished = end;
        self.streams.insert(id, stream);
        self.head(id, end, write);
        id
    }

    /// Numbers a stream that the peer opened.
    pub fn number(&mut self, id: StreamId, call: usize) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.call = call;
        }
    }

    /// Answers on a stream with a head, or ends it with trailers; nothing may wait on it.
    pub fn respond(&mut self, id: StreamId, end: bool, write: impl FnOnce(&mut Encoder, &mut Vec<u8>)) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.finished |= end;
            self.head(id, end, write);
        }
    }

    /// Ends a stream with trailers, behind what waits.
    pub fn trailers(&mut self, id: StreamId, trailers: &Fields) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if stream.queue.is_empty() {
            stream.finished = true;
            self.head(id, true, |encoder, block| encode(encoder, block, trailers));
        } else {
            stream.after = After::Trailers(Box::new(trailers.clone()));
        }
    }

    /// Forgets what waits on a stream, so that it can be ended at once; returns how much that was.
    pub fn discard(&mut self, id: StreamId) -> u32 {
        let Some(stream) = self.streams.get_mut(&id) else { return 0 };
        let dropped = stream.queue.len();
        stream.queue.clear();
        stream.after = After::More;
        u32::try_from(dropped).unwrap_or(u32::MAX)
    }

    /// Whether nothing of a stream waits.
    #[must_use]
    pub fn is_drained(&self, id: StreamId) -> bool {
        self.streams.get(&id).is_none_or(|stream| !stream.has_more())
    }

    /// Sends a piece of `read`, the buffer of the next flush, as far as the peer has room; the rest waits. Returns how
    /// many bytes are on their way.
    pub fn data(&mut self, id: StreamId, read: &[u8], piece: Range<usize>, end: bool) -> u32 {
        let Some(stream) = self.streams.get_mut(&id) else {
            return u32::try_from(piece.len()).unwrap_or(u32::MAX);
        };
        let mut go = 0;
        if !stream.has_more() {
            let room = room(stream.send_window, self.send_window, self.limits.outbox, self.outbox.len());
            go = piece.len().min(room);
            let whole = go == piece.len();
            let size = i64::try_from(go).unwrap_or(i64::MAX);
            stream.send_window -= size;
            self.send_window -= size;
            stream.finished |= whole && end;
            let mut from = piece.start;
            let to = piece.start + go;
            let most = self.settings.max_frame_size as usize;
            loop {
                let next = to.min(from + most);
                let last = whole && end && next == to;
                if next > from || last {
                    self.budget.earn(WORK);
                    write_head(self.outbox.buffer(), id, next - from, last);
                    self.outbox.piece(read, from..next);
                }
                from = next;
                if from == to {
                    break;
                }
            }
            if whole {
                return u32::try_from(go).unwrap_or(u32::MAX);
            }
        }
        stream.queue.push(&read[piece.start + go..piece.end]);
        if end {
            stream.after = After::End;
        }
        if !stream.waits {
            stream.waits = true;
            self.waiting.push_back(id);
        }
        u32::try_from(go).unwrap_or(u32::MAX)
    }

    /// Puts bytes that are nobody's buffer on a stream; they go with the next [`Connection::pump`].
    pub fn queue(&mut self, id: StreamId, bytes: &[u8], end: bool) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.queue.push(bytes);
        if end {
            stream.after = After::End;
        }
        if !stream.waits && stream.has_more() {
            stream.waits = true;
            self.waiting.push_back(id);
        }
    }

    /// Whether [`Connection::pump`] would find something.
    #[must_use]
    pub fn wants_pump(&self) -> bool {
        !self.waiting.is_empty() && self.outbox.len() < self.limits.outbox
    }

    /// Sends what waited and has room now, each stream in its turn.
    pub fn pump(&mut self, moved: &mut Vec<Moved>) {
        for _ in 0..self.waiting.len() {
            if self.outbox.len() >= self.limits.outbox {
                return;
            }
            let Some(id) = self.waiting.pop_front() else { return };
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            stream.waits = false;
            let room = room(stream.send_window, self.send_window, self.limits.outbox, self.outbox.len());
            let go = stream.queue.len().min(room).min(TURN);
            let size = i64::try_from(go).unwrap_or(i64::MAX);
            stream.send_window -= size;
            self.send_window -= size;
            let mut left = go;
            let drains = go == stream.queue.len();
            let end = drains && matches!(stream.after, After::End);
            while left > 0 || end && !stream.finished {
                let part = left.min(self.settings.max_frame_size as usize);
                left -= part;
                let last = end && left == 0;
                stream.finished |= last;
                self.budget.earn(WORK);
                write_head(self.outbox.buffer(), id, part, last);
                stream.queue.pop(part, self.outbox.buffer());
            }
            let call = stream.call;
            let mut after = None;
            if drains {
                after = Some(std::mem::take(&mut stream.after));
            } else if stream.send_window > 0 {
                // Not its own window, but the connection's, or the end of its turn.
                stream.waits = true;
                self.waiting.push_back(id);
            }
            if let Some(After::Trailers(trailers)) = &after {
                stream.finished = true;
                self.head(id, true, |encoder, block| encode(encoder, block, trailers));
            }
            if go > 0 || drains {
                moved.push(Moved { stream: id, call, bytes: u32::try_from(go).unwrap_or(u32::MAX), drained: drains });
            }
        }
    }

    /// Ends a stream: resets it unless both sides have ended it (a server is told CANCEL, whatever the code). Returns how many bytes waited on it.
    pub fn close(&mut self, id: StreamId, code: Code) -> u32 {
        let Some(stream) = self.streams.remove(&id) else { return 0 };
        if !(stream.ended && stream.finished) {
            match self.role {
                Role::Server => self.reset(id, code),
                Role::Client => self.give_up(id),
            }
        } else if self.role == Role::Server {
            // A call that was wanted pays for one that is given up.
            self.budget.earn(RESET);
        }
        u32::try_from(stream.queue.len()).unwrap_or(u32::MAX)
    }

    /// Gives bytes of a body back to the peer: it may send as many more.
    pub fn give_back(&mut self, id: StreamId, bytes: u32) {
        self.taken += bytes;
        // Half a window at a time: one frame for many, and the peer never runs dry.
        if self.taken >= self.limits.connection_window / 2 {
            let more = std::mem::take(&mut self.taken);
            self.receive_window += i64::from(more);
            self.write(Kind::WindowUpdate, 0, 0, &more.to_be_bytes());
        }
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.taken += bytes;
        if stream.taken >= self.limits.stream_window / 2 && !stream.ended {
            let more = std::mem::take(&mut stream.taken);
            stream.receive_window += i64::from(more);
            self.write(Kind::WindowUpdate, 0, id, &more.to_be_bytes());
        }
    }

    /// Writes a header block; one that is larger than a frame goes on in others.
    fn head(&mut self, id: StreamId, end: bool, write: impl FnOnce(&mut Encoder, &mut Vec<u8>)) {
        let buffer = self.outbox.buffer();
        let start = buffer.len();
        buffer.extend_from_slice(&[0; frame::HEAD]);
        self.encoder.begin(buffer);
        write(&mut self.encoder, buffer);
        let length = buffer.len() - start - frame::HEAD;
        let most = self.settings.max_frame_size as usize;
        let end = if end { flag::END_STREAM } else { 0 };
        let rest = if length > most { buffer.split_off(start + frame::HEAD + most) } else { Vec::new() };
        let flags = if rest.is_empty() { end | flag::END_HEADERS } else { end };
        let first = Head { length: size(length.min(most)), kind: Kind::Headers, flags, stream: id };
        buffer[start..start + frame::HEAD].copy_from_slice(&first.bytes());
        let mut parts = rest.chunks(most).peekable();
        while let Some(part) = parts.next() {
            let flags = if parts.peek().is_none() { flag::END_HEADERS } else { 0 };
            self.write(Kind::Continuation, flags, id, part);
        }
    }
}

impl Stream {
    /// Whether something waits.
    pub(super) fn has_more(&self) -> bool {
        !self.queue.is_empty() || !matches!(self.after, After::More)
    }
}

/// How many bytes of a body may go now.
fn room(stream: i64, connection: i64, most: usize, waiting: usize) -> usize {
    let window = usize::try_from(stream.min(connection)).unwrap_or(0);
    window.min(most.saturating_sub(waiting))
}

fn write_head(buffer: &mut Vec<u8>, stream: StreamId, length: usize, end: bool) {
    let flags = if end { flag::END_STREAM } else { 0 };
    buffer.extend_from_slice(&Head { length: size(length), kind: Kind::Data, flags, stream }.bytes());
}

/// Lengths here are at most a frame's.
fn size(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// Encodes a list as it is.
pub fn encode(encoder: &mut Encoder, block: &mut Vec<u8>, fields: &Fields) {
    for field in fields.iter() {
        if field.name == b":status" && field.value == b"200" {
            Encoder::known(block, 8);
            continue;
        }
        if comes_again(field.name) { encoder.stable(block, field) } else { Encoder::once(block, field) }
    }
}

/// Fields that have the same value in most calls of a connection.
#[must_use]
pub fn comes_again(name: &[u8]) -> bool {
    matches!(
        name,
        b"te"
            | b"content-type"
            | b"user-agent"
            | b"grpc-encoding"
            | b"grpc-accept-encoding"
            | b"grpc-status"
            | b"plugvisor-caller"
            | b"plugvisor-hops"
    )
}
