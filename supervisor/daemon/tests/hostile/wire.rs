//! HTTP/2 by hand (RFC 9113, and as much of RFC 7541 as writing needs): frames that no library would send.

use std::{path::Path, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    time::timeout,
};

use super::grpc::{PATIENCE, within};

pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const PRIORITY: u8 = 2;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PUSH_PROMISE: u8 = 5;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;

pub(crate) const ACK: u8 = 1;
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;
pub(crate) const PADDED: u8 = 8;

pub(crate) const PROTOCOL_ERROR: u32 = 1;
pub(crate) const FLOW_CONTROL_ERROR: u32 = 3;
pub(crate) const STREAM_CLOSED: u32 = 5;
pub(crate) const FRAME_SIZE_ERROR: u32 = 6;
pub(crate) const COMPRESSION_ERROR: u32 = 9;
pub(crate) const ENHANCE_YOUR_CALM: u32 = 11;

/// One frame.
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    frame_announced(u32::try_from(payload.len()).unwrap(), kind, flags, stream, payload)
}

/// One frame that announces a length of its own choice.
pub(crate) fn frame_announced(length: u32, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = length.to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// A SETTINGS frame.
pub(crate) fn settings(values: &[(u16, u32)]) -> Vec<u8> {
    let payload: Vec<u8> =
        values.iter().flat_map(|(id, value)| id.to_be_bytes().into_iter().chain(value.to_be_bytes())).collect();
    frame(SETTINGS, 0, 0, &payload)
}

/// A block of fields, each a literal without indexing and without Huffman's code.
pub(crate) fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in fields {
        bytes.push(0);
        text(&mut bytes, name.as_bytes());
        text(&mut bytes, value.as_bytes());
    }
    bytes
}

/// A field that enters the dynamic table.
pub(crate) fn indexed_literal(name: &str, value: &str) -> Vec<u8> {
    let mut bytes = vec![0x40];
    text(&mut bytes, name.as_bytes());
    text(&mut bytes, value.as_bytes());
    bytes
}

fn text(bytes: &mut Vec<u8>, text: &[u8]) {
    let mut left = text.len();
    if left < 127 {
        bytes.push(u8::try_from(left).unwrap());
    } else {
        bytes.push(127);
        left -= 127;
        while left >= 128 {
            bytes.push(u8::try_from(left % 128).unwrap() | 0x80);
            left /= 128;
        }
        bytes.push(u8::try_from(left).unwrap());
    }
    bytes.extend(text);
}

/// The fields of a gRPC request.
pub(crate) fn request(path: &str) -> Vec<u8> {
    block(&[
        (":method", "POST"),
        (":scheme", "http"),
        (":authority", "x"),
        (":path", path),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ])
}

/// A HEADERS frame that is whole.
pub(crate) fn headers(stream: u32, block: &[u8], flags: u8) -> Vec<u8> {
    frame(HEADERS, flags | END_HEADERS, stream, block)
}

/// Fields over as many frames as they need.
pub(crate) fn long_headers(stream: u32, block: &[u8], flags: u8) -> Vec<u8> {
    let mut chunks = block.chunks(16_000).peekable();
    let mut bytes = Vec::new();
    let (mut kind, mut flags) = (HEADERS, flags);
    while let Some(chunk) = chunks.next() {
        if chunks.peek().is_none() {
            flags |= END_HEADERS;
        }
        bytes.extend(frame(kind, flags, stream, chunk));
        (kind, flags) = (CONTINUATION, 0);
    }
    bytes
}

/// A frame as it was read.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) stream: u32,
    pub(crate) payload: Vec<u8>,
}

impl Frame {
    fn number(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.payload[at..at + 4].try_into().unwrap())
    }
}

/// What the broker said on a connection.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// The code of its GOAWAY; the last one counts.
    pub(crate) goaway: Option<u32>,
    /// Streams that it reset, with the codes.
    pub(crate) resets: Vec<(u32, u32)>,
    /// Streams that it answered with a head that ends them.
    pub(crate) answers: Vec<u32>,
    /// It closed the connection.
    pub(crate) closed: bool,
}

impl Seen {
    fn note(&mut self, frame: &Frame) {
        match frame.kind {
            GOAWAY => self.goaway = Some(frame.number(4)),
            RST_STREAM => self.resets.push((frame.stream, frame.number(0))),
            HEADERS if frame.flags & END_STREAM != 0 => self.answers.push(frame.stream),
            _ => {}
        }
    }

    pub(crate) fn refused(&self, stream: u32) -> bool {
        self.closed || self.answers.contains(&stream) || self.resets.iter().any(|(reset, _)| *reset == stream)
    }
}

/// One end of a connection.
pub(crate) struct Peer {
    stream: UnixStream,
}

/// The payload of the PING that asks whether a connection lives on.
const QUESTION: &[u8; 8] = b"alive?!?";

impl Peer {
    /// A connection on which nothing was said.
    pub(crate) async fn silent(path: &Path) -> Self {
        Self { stream: UnixStream::connect(path).await.unwrap() }
    }

    /// A caller that has said what HTTP/2 begins with.
    pub(crate) async fn caller(path: &Path) -> Self {
        let mut peer = Self::silent(path).await;
        peer.send(&[PREFACE, &settings(&[])].concat()).await;
        peer
    }

    /// A provider's end of an accepted connection, which begins with the preface.
    pub(crate) async fn accepted(mut stream: UnixStream) -> Self {
        let mut preface = [0; PREFACE.len()];
        within(stream.read_exact(&mut preface)).await.unwrap();
        assert_eq!(preface, PREFACE);
        Self { stream }
    }

    /// Sends everything; false when the broker has closed the connection.
    pub(crate) async fn send(&mut self, bytes: &[u8]) -> bool {
        within(self.stream.write_all(bytes)).await.is_ok()
    }

    /// Sends `bytes` again and again until that many have gone, the broker has closed, or it takes no more. Reads
    /// nothing meanwhile. Returns how many went.
    pub(crate) async fn flood(&mut self, bytes: &[u8], times: usize) -> usize {
        /// The broker stopped reading; a slow machine only makes a flood shorter.
        const STUCK: Duration = Duration::from_millis(500);
        let mut sent = 0;
        for _ in 0..times {
            for chunk in bytes.chunks(16 * 1024) {
                if !matches!(timeout(STUCK, self.stream.write_all(chunk)).await, Ok(Ok(()))) {
                    return sent;
                }
                sent += chunk.len();
            }
        }
        sent
    }

    /// The next frame; `None` when the broker has closed. SETTINGS and PINGs are answered.
    pub(crate) async fn next(&mut self) -> Option<Frame> {
        let frame = within(self.read()).await?;
        if frame.kind == SETTINGS && frame.flags & ACK == 0 {
            self.send(&self::frame(SETTINGS, ACK, 0, &[])).await;
        }
        if frame.kind == PING && frame.flags & ACK == 0 {
            self.send(&self::frame(PING, ACK, 0, &frame.payload)).await;
        }
        Some(frame)
    }

    async fn read(&mut self) -> Option<Frame> {
        let mut head = [0; 9];
        self.stream.read_exact(&mut head).await.ok()?;
        let [a, b, c, kind, flags, s, t, u, v] = head;
        let mut payload = vec![0; usize::try_from(u32::from_be_bytes([0, a, b, c])).unwrap()];
        self.stream.read_exact(&mut payload).await.ok()?;
        Some(Frame { kind, flags, stream: u32::from_be_bytes([s, t, u, v]) & (u32::MAX >> 1), payload })
    }

    /// Reads until the broker closes.
    pub(crate) async fn until_closed(&mut self) -> Seen {
        let mut seen = Seen { closed: true, ..Seen::default() };
        while let Some(frame) = self.next().await {
            seen.note(&frame);
        }
        seen
    }

    /// Asks whether the connection lives, and reads until the answer has come, or the end. Then reads on until `done`.
    pub(crate) async fn outcome(&mut self, done: impl Fn(&Seen) -> bool) -> Seen {
        let mut seen = Seen::default();
        if !self.send(&frame(PING, 0, 0, QUESTION)).await {
            // It has closed; what it said before can still be read.
            return self.until_closed().await;
        }
        let mut asked = true;
        while asked || !done(&seen) {
            let Some(frame) = self.next().await else {
                seen.closed = true;
                return seen;
            };
            seen.note(&frame);
            if frame.kind == PING && frame.flags & ACK != 0 && frame.payload == QUESTION {
                asked = false;
            }
        }
        seen
    }

    /// Reads to the end without answering anything, as bytes.
    pub(crate) async fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        // A reset is an end too.
        let _ = timeout(PATIENCE, self.stream.read_to_end(&mut rest)).await.expect("the connection stays open");
        rest
    }
}
