//! One direction of one call: bytes from one HTTP/2 stream to another, with flow control end to end.
//!
//! A byte is taken over only when the far side has room for it, and only then is the near side told that it may send
//! another: what waits here is therefore never more than one stream window, and [`EAGER`] of a request. It waits as it came, except that frames
//! smaller than [`SMALL`] are put together: h2 charges each frame that it must keep for its bookkeeping, and closes a
//! connection on which many small ones pile up, which a slow reader on the far side would otherwise bring about.

use std::{
    collections::VecDeque,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use h2::{RecvStream, SendStream};
use http::HeaderMap;

use super::frame::{Breach, Messages};

const SMALL: usize = 1024;
/// The most that is handed over before the far stream is open, in bytes.
const EAGER: usize = 64 * 1024;

/// How a lane that passed everything ended.
#[derive(Debug)]
pub(super) struct Done {
    /// The trailers that the source ended with, not passed on.
    pub(super) trailers: Option<HeaderMap>,
    /// Whether the far side has been told that the stream is over.
    pub(super) closed: bool,
}

/// Why a lane stopped before its end.
#[derive(Debug)]
pub(super) enum Broken {
    /// The side that sends is gone.
    Source(h2::Error),
    /// The side that receives is gone or wants no more.
    Sink,
    /// The bytes are not what gRPC allows; everything before the message at fault has been passed on.
    Breach(Breach),
}

/// Who may end the far stream with the last byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// The last byte ends it (requests).
    WithData,
    /// Trailers will follow (responses).
    WithTrailers,
}

#[derive(Debug)]
pub(super) struct Lane {
    messages: Messages,
    ending: Ending,
    /// Nothing has been handed over yet.
    first: bool,
    queue: VecDeque<Bytes>,
    tail: BytesMut,
    over: bool,
    trailers: Option<HeaderMap>,
    breach: Option<Breach>,
}

impl Lane {
    pub(super) fn new(limit: u32, ending: Ending) -> Self {
        Self {
            messages: Messages::new(limit),
            ending,
            first: true,
            queue: VecDeque::new(),
            tail: BytesMut::new(),
            over: false,
            trailers: None,
            breach: None,
        }
    }

    /// Passes on what can be passed on now.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut RecvStream,
        to: &mut SendStream<Bytes>,
    ) -> Poll<Result<Done, Broken>> {
        loop {
            if !self.over && from.is_end_stream() {
                self.over = true;
            }
            match self.flush(cx, from, to) {
                Flushed::All { closed } => {
                    if let Some(breach) = self.breach {
                        return Poll::Ready(Err(Broken::Breach(breach)));
                    }
                    if self.over {
                        return Poll::Ready(Ok(Done { trailers: self.trailers.take(), closed }));
                    }
                }
                Flushed::Gone => return Poll::Ready(Err(Broken::Sink)),
                Flushed::Waiting => {
                    if self.over || self.breach.is_some() {
                        return Poll::Pending;
                    }
                }
            }
            match from.poll_data(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(Ok(chunk))) => self.take(chunk),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(Broken::Source(error))),
                Poll::Ready(None) => match from.poll_trailers(cx) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Ok(trailers)) => {
                        self.trailers = trailers;
                        self.over = true;
                    }
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(Broken::Source(error))),
                },
            }
        }
    }

    /// Whether the side that sends has sent its last, passed on or not.
    pub(super) const fn source_ended(&self) -> bool {
        self.over
    }

    /// Whether everything passed so far ends with a whole message.
    pub(super) const fn at_boundary(&self) -> bool {
        self.messages.at_boundary()
    }

    fn take(&mut self, mut chunk: Bytes) {
        if let Err((good, breach)) = self.messages.follow(&chunk) {
            self.breach = Some(breach);
            chunk.truncate(good);
        }
        if chunk.len() < SMALL && (!self.queue.is_empty() || !self.tail.is_empty()) {
            self.tail.extend_from_slice(&chunk);
        } else if !chunk.is_empty() {
            if !self.tail.is_empty() {
                self.queue.push_back(self.tail.split().freeze());
            }
            self.queue.push_back(chunk);
        }
    }

    fn flush(&mut self, cx: &mut Context<'_>, from: &mut RecvStream, to: &mut SendStream<Bytes>) -> Flushed {
        loop {
            if self.queue.is_empty() && !self.tail.is_empty() {
                self.queue.push_back(self.tail.split().freeze());
            }
            let Some(first) = self.queue.front_mut() else { return Flushed::All { closed: false } };
            to.reserve_capacity(first.len());
            let mut room = to.capacity();
            // h2 gives a request's stream no room before its connection has opened it, which is a wake-up later. Sent
            // along with the head, the first piece costs the provider one wake-up and not two.
            if room == 0 && self.first && self.ending == Ending::WithData && first.len() <= EAGER {
                room = first.len();
            }
            if room == 0 {
                match to.poll_capacity(cx) {
                    Poll::Pending => return Flushed::Waiting,
                    Poll::Ready(Some(Ok(more))) => room = more,
                    Poll::Ready(Some(Err(_)) | None) => return Flushed::Gone,
                }
                if room == 0 {
                    continue;
                }
            }
            let piece = if room >= first.len() {
                let whole = std::mem::take(first);
                self.queue.pop_front();
                whole
            } else {
                first.split_to(room)
            };
            self.first = false;
            let size = piece.len();
            let last = self.ending == Ending::WithData
                && self.over
                && self.trailers.is_none()
                && self.breach.is_none()
                && self.queue.is_empty()
                && self.tail.is_empty();
            if to.send_data(piece, last).is_err() {
                return Flushed::Gone;
            }
            // An error here means that the near stream is gone already; its data is passed on all the same.
            let _ = from.flow_control().release_capacity(size);
            if last {
                return Flushed::All { closed: true };
            }
        }
    }
}

enum Flushed {
    All { closed: bool },
    Waiting,
    Gone,
}
