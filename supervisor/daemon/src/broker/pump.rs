//! Both directions of one call, polled together.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use h2::{RecvStream, SendStream, client::ResponseFuture, server::SendResponse};
use http::{Response, StatusCode, Version};
use tokio::time::Instant;

use super::{
    admit,
    call::End,
    event::Sender,
    fault::Fault,
    headers,
    lane::{Broken, Ending, Lane},
    refusal,
};

const NO_STATUS: &str = "its response ends without a grpc-status";

/// A server that keeps the deadline itself may say so just before the broker's own clock does, by as much as timers are
/// coarse (tokio's tick in 1 ms steps).
const DEADLINE_SLACK: Duration = Duration::from_millis(5);

/// How passing ended; `None` is the deadline, as the provider tells it.
type Passed = Result<Option<End>, Fault>;

#[derive(Debug)]
pub(super) struct Pump {
    /// When the head of the response came.
    pub(super) answered: Option<Instant>,
    /// When the caller had said all that it asks. Until then its provider owes no answer.
    pub(super) asked: Option<Instant>,
    to_provider: SendStream<Bytes>,
    /// The request's body, until all of it has been passed on.
    up: Option<(RecvStream, Lane)>,
    down: Down,
    limit: u32,
    deadline: Instant,
}

#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "lives in the call's task, which is allocated once")]
enum Down {
    Awaiting(ResponseFuture),
    Flowing { from: RecvStream, to: SendStream<Bytes>, lane: Lane },
    Ended,
}

impl Pump {
    pub(super) fn new(
        body: RecvStream,
        to_provider: SendStream<Bytes>,
        response: ResponseFuture,
        no_body: bool,
        limit: u32,
        deadline: Instant,
    ) -> Self {
        let up = (!no_body).then(|| (body, Lane::new(limit, Ending::WithData)));
        let asked = no_body.then(Instant::now);
        Self { answered: None, asked, to_provider, up, down: Down::Awaiting(response), limit, deadline }
    }

    /// Passes on what can be passed on now. Ends with `None` when the provider itself says that the time is over.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, respond: &mut SendResponse<Bytes>) -> Poll<Passed> {
        if let Some(ended) = self.poll_up(cx) {
            return Poll::Ready(ended);
        }
        if let Poll::Ready(ended) = self.poll_down(cx, respond) {
            return Poll::Ready(ended);
        }
        // While the body flows, a caller that gives up shows there; afterwards it only shows here.
        let gone = self.up.is_none()
            && match &mut self.down {
                Down::Awaiting(_) => respond.poll_reset(cx).is_ready(),
                Down::Flowing { to, .. } => to.poll_reset(cx).is_ready(),
                Down::Ended => false,
            };
        if gone { Poll::Ready(Ok(Some(End::Cancelled))) } else { Poll::Pending }
    }

    /// Tells the provider how a call ended that it did not end itself, and returns the caller's half if a response has
    /// begun.
    pub(super) fn close(&mut self, end: &End) -> Option<SendStream<Bytes>> {
        match end {
            End::Passed { .. } => {}
            End::Cancelled | End::Cut { .. } => self.to_provider.send_reset(h2::Reason::CANCEL),
        }
        match std::mem::replace(&mut self.down, Down::Ended) {
            Down::Flowing { to, .. } => Some(to),
            Down::Awaiting(_) | Down::Ended => None,
        }
    }

    fn poll_up(&mut self, cx: &mut Context<'_>) -> Option<Passed> {
        let (from, lane) = self.up.as_mut()?;
        let passed = lane.poll(cx, from, &mut self.to_provider);
        if self.asked.is_none() && lane.source_ended() {
            self.asked = Some(Instant::now());
        }
        match passed {
            Poll::Pending => return None,
            Poll::Ready(Ok(done)) => {
                // An error means that the provider wants no more; its response says why.
                match done.trailers {
                    Some(mut trailers) => {
                        headers::strip(&mut trailers);
                        let _ = self.to_provider.send_trailers(trailers);
                    }
                    None if !done.closed => drop(self.to_provider.send_data(Bytes::new(), true)),
                    None => {}
                }
            }
            // The provider wants no more; its response, or the end of its connection, says why.
            Poll::Ready(Err(Broken::Sink)) => {}
            Poll::Ready(Err(Broken::Source(_))) => return Some(Ok(Some(End::Cancelled))),
            Poll::Ready(Err(Broken::Breach(breach))) => return Some(Err(Fault::Breach(Sender::Caller, breach))),
        }
        self.up = None;
        None
    }

    fn poll_down(&mut self, cx: &mut Context<'_>, respond: &mut SendResponse<Bytes>) -> Poll<Passed> {
        loop {
            match &mut self.down {
                Down::Ended => return Poll::Pending,
                Down::Awaiting(response) => {
                    let response = match Pin::new(response).poll(cx) {
                        Poll::Pending => return Poll::Pending,
                        Poll::Ready(Err(error)) => return Poll::Ready(Err(Fault::Lost(error))),
                        Poll::Ready(Ok(response)) => response,
                    };
                    let now = Instant::now();
                    let (mut head, body) = response.into_parts();
                    if head.status != StatusCode::OK || !admit::is_grpc(&head.headers) {
                        let what = format!("its response has the HTTP status {} and is not gRPC", head.status.as_u16());
                        return Poll::Ready(Err(Fault::NotGrpc(what)));
                    }
                    headers::strip(&mut head.headers);
                    head.version = Version::HTTP_2;
                    head.extensions.clear();
                    let only = body.is_end_stream();
                    let code = refusal::status_of(&head.headers);
                    if only && code.is_none() {
                        return Poll::Ready(Err(Fault::NotGrpc(NO_STATUS.into())));
                    }
                    if only && is_overdue(code, self.deadline, now) {
                        return Poll::Ready(Ok(None));
                    }
                    self.answered = Some(now);
                    let Ok(to) = respond.send_response(Response::from_parts(head, ()), only) else {
                        return Poll::Ready(Ok(Some(End::Cancelled)));
                    };
                    if let (true, Some(code)) = (only, code) {
                        self.down = Down::Ended;
                        return Poll::Ready(Ok(Some(End::Passed { code })));
                    }
                    self.down = Down::Flowing { from: body, to, lane: Lane::new(self.limit, Ending::WithTrailers) };
                }
                Down::Flowing { from, to, lane } => {
                    let mut trailers = match lane.poll(cx, from, to) {
                        Poll::Pending => return Poll::Pending,
                        Poll::Ready(Ok(done)) => match done.trailers {
                            Some(trailers) => trailers,
                            None => return Poll::Ready(Err(Fault::NotGrpc(NO_STATUS.into()))),
                        },
                        Poll::Ready(Err(Broken::Sink)) => return Poll::Ready(Ok(Some(End::Cancelled))),
                        Poll::Ready(Err(Broken::Source(error))) => return Poll::Ready(Err(Fault::Lost(error))),
                        Poll::Ready(Err(Broken::Breach(breach))) => {
                            return Poll::Ready(Err(Fault::Breach(Sender::Provider, breach)));
                        }
                    };
                    let Some(code) = refusal::status_of(&trailers) else {
                        return Poll::Ready(Err(Fault::NotGrpc(NO_STATUS.into())));
                    };
                    if is_overdue(Some(code), self.deadline, Instant::now()) {
                        return Poll::Ready(Ok(None));
                    }
                    if code == 0 && !lane.at_boundary() {
                        let what = "its response ends within a message".to_owned();
                        return Poll::Ready(Err(Fault::NotGrpc(what)));
                    }
                    headers::strip(&mut trailers);
                    let sent = to.send_trailers(trailers);
                    self.down = Down::Ended;
                    return Poll::Ready(Ok(Some(if sent.is_ok() { End::Passed { code } } else { End::Cancelled })));
                }
            }
        }
    }
}

/// Whether a provider's status only says that the deadline passed. gRPC means DEADLINE_EXCEEDED (4); tonic's server says
/// CANCELLED (1). The caller has not cancelled: that would have ended the call before.
fn is_overdue(code: Option<i32>, deadline: Instant, now: Instant) -> bool {
    matches!(code, Some(1 | 4)) && now + DEADLINE_SLACK >= deadline
}

#[cfg(test)]
mod tests {
    use super::{DEADLINE_SLACK, Duration, Instant, is_overdue};

    #[test]
    fn only_a_late_word_about_time_is_the_deadline() {
        let deadline = Instant::now() + Duration::from_secs(1);
        let (close, early) = (deadline - DEADLINE_SLACK, deadline - 2 * DEADLINE_SLACK);
        for code in [1, 4] {
            assert!(is_overdue(Some(code), deadline, close));
            assert!(!is_overdue(Some(code), deadline, early));
        }
        assert!(!is_overdue(Some(0), deadline, deadline));
        assert!(!is_overdue(Some(13), deadline, deadline));
        assert!(!is_overdue(None, deadline, deadline));
    }
}
