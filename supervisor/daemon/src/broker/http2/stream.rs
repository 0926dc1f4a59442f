//! The streams of a connection: what each side may still send on them, and what waits.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasherDefault, Hasher},
};

use super::fields::Fields;

/// A stream's number.
pub type StreamId = u32;

/// One stream.
#[derive(Debug)]
pub struct Stream {
    /// The owner's number.
    pub call: usize,
    /// Bytes that the peer lets us send; a change of settings can make it negative.
    pub(super) send_window: i64,
    /// Bytes that the peer may send.
    pub(super) receive_window: i64,
    /// Bytes taken from it and not yet given back.
    pub(super) taken: u32,
    /// The peer has sent its head.
    pub(super) begun: bool,
    /// The peer has sent its last.
    pub(super) ended: bool,
    /// We have sent our last.
    pub(super) finished: bool,
    /// What the peer has no room for yet.
    pub(super) queue: Queue,
    /// What follows the queue.
    pub(super) after: After,
    /// It is in the connection's list of those that wait.
    pub(super) waits: bool,
}

/// What follows the bytes that wait.
#[derive(Debug, Default)]
pub(super) enum After {
    /// More may come.
    #[default]
    More,
    /// The end.
    End,
    /// Trailers, and the end.
    Trailers(Box<Fields>),
}

impl Stream {
    pub(super) fn new(call: usize, send_window: u32, receive_window: u32) -> Self {
        Self {
            call,
            send_window: i64::from(send_window),
            receive_window: i64::from(receive_window),
            taken: 0,
            begun: false,
            ended: false,
            finished: false,
            queue: Queue::default(),
            after: After::More,
            waits: false,
        }
    }
}

/// Bytes in their order; consumed from the front without moving the rest each time.
#[derive(Debug, Default)]
pub(super) struct Queue {
    bytes: VecDeque<u8>,
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    /// Moves the first `count` bytes to the end of `to`.
    pub(super) fn pop(&mut self, count: usize, to: &mut Vec<u8>) {
        let (front, back) = self.bytes.as_slices();
        let first = front.len().min(count);
        to.extend_from_slice(&front[..first]);
        to.extend_from_slice(&back[..count - first]);
        self.bytes.drain(..count);
        if self.bytes.is_empty() {
            self.bytes = VecDeque::new();
        }
    }

    pub(super) fn clear(&mut self) {
        self.bytes = VecDeque::new();
    }
}

/// Stream numbers are their own hash but for spreading: they come in a row, and there are few of them at once.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(u32::from(*byte));
        }
    }

    fn write_u32(&mut self, number: u32) {
        self.0 = (self.0 ^ u64::from(number)).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(32);
    }
}

pub(super) type Streams = HashMap<StreamId, Stream, BuildHasherDefault<IdHasher>>;
