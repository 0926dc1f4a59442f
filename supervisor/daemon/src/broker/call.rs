//! One admitted call to a provider: from its first byte to what is recorded about it.
//!
//! One task polls both directions. Nothing is ever tried twice: whether a call may be repeated, only its caller knows.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    rc::Rc,
    task::Poll,
};

use bytes::Bytes;
use h2::{RecvStream, client::SendRequest, server::SendResponse};
use http::Request;
use plugvisor_core::{
    breaker::Outcome,
    route::{Reason, Refusal},
};
use tokio::time::{Instant, Sleep, sleep_until};

use super::{admit::CallTime, caller::Caller, deadline, headers, provider::Admitted, pump::Pump, refusal};

/// How a call ended.
#[derive(Debug)]
pub(super) enum End {
    /// As the provider said.
    Passed {
        /// The gRPC status.
        code: i32,
    },
    /// The caller gave up or is gone.
    Cancelled,
    /// The broker ended it.
    Cut {
        refusal: Refusal,
        /// What that says about the provider.
        outcome: Outcome,
    },
}

impl End {
    /// The broker ended the call for something that the provider did, or did not.
    pub(super) fn cut(refusal: Refusal) -> Self {
        let outcome = Outcome::of_grpc(refusal.reason.grpc_status());
        Self::Cut { refusal, outcome }
    }
}

#[derive(Debug)]
pub(super) struct Call {
    pub(super) caller: Rc<Caller>,
    pub(super) admitted: Admitted,
    pub(super) time: CallTime,
    pub(super) respond: SendResponse<Bytes>,
}

impl Call {
    pub(super) async fn run(mut self, request: Request<()>, body: RecvStream) {
        let path = request.uri().clone();
        let mut timer = std::pin::pin!(sleep_until(self.time.deadline()));
        let mut pump = None;
        let end = match self.sender(timer.as_mut()).await {
            Err(end) => end,
            Ok(sender) => match self.open(sender, request, body) {
                Err(end) => end,
                Ok(opened) => self.pass(pump.insert(opened), timer).await,
            },
        };
        let mut answered = None;
        let mut asked = None;
        let mut to_caller = None;
        if let Some(mut pump) = pump {
            answered = pump.answered;
            asked = pump.asked;
            // A provider is only as slow as it is after it has been asked in full.
            self.admitted.began = asked.unwrap_or_else(Instant::now);
            to_caller = pump.close(&end);
        }
        if let End::Cut { refusal, .. } = &end {
            // Errors here mean that the caller is gone; there is nobody to tell.
            match to_caller {
                Some(mut begun) => drop(begun.send_trailers(refusal::trailers(refusal))),
                None => drop(self.respond.send_response(refusal::response(refusal), true)),
            }
        }
        self.record(path.path(), &end, asked, answered);
    }

    async fn sender(&mut self, mut timer: Pin<&mut Sleep>) -> Result<SendRequest<Bytes>, End> {
        let provider = Rc::clone(&self.admitted.provider);
        let shared = Rc::clone(&self.admitted.shared);
        let mut sender = std::pin::pin!(provider.sender(&shared));
        poll_fn(|cx| {
            if let Poll::Ready(sender) = sender.as_mut().poll(cx) {
                return Poll::Ready(sender.map_err(|why| End::cut(self.lost(&why))));
            }
            if self.respond.poll_reset(cx).is_ready() {
                return Poll::Ready(Err(End::Cancelled));
            }
            // Without a connection only the provider can be at fault; with one, its streams may all be other callers'.
            let asked = (!provider.is_connected()).then_some(self.time.began);
            timer.as_mut().poll(cx).map(|()| Err(self.out_of_time(asked)))
        })
        .await
    }

    fn open(
        &mut self,
        mut sender: SendRequest<Bytes>,
        mut request: Request<()>,
        body: RecvStream,
    ) -> Result<Pump, End> {
        let left = self.time.deadline().saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(self.out_of_time(None));
        }
        request.headers_mut().insert(headers::TIMEOUT, deadline::format(left));
        let no_body = body.is_end_stream();
        match sender.send_request(request, no_body) {
            Ok((response, to_provider)) => {
                let limit = self.admitted.provider.limits.max_message;
                Ok(Pump::new(body, to_provider, response, no_body, limit, self.time.deadline()))
            }
            Err(error) => Err(End::cut(self.lost(&error.to_string()))),
        }
    }

    async fn pass(&mut self, pump: &mut Pump, mut timer: Pin<&mut Sleep>) -> End {
        let ended = poll_fn(|cx| {
            if let Poll::Ready(ended) = pump.poll(cx, &mut self.respond) {
                return Poll::Ready(ended);
            }
            timer.as_mut().poll(cx).map(|()| Ok(None))
        })
        .await;
        match ended {
            // Once it has answered, how fast its response goes depends on its reader too.
            Ok(None) => self.out_of_time(pump.asked.filter(|_| pump.answered.is_none())),
            Ok(Some(end)) => end,
            Err(fault) => fault.end(&self.caller, &self.admitted),
        }
    }

    fn lost(&self, why: &str) -> Refusal {
        let name = &self.admitted.provider.identity.name;
        Refusal::new(
            Reason::ProviderLost,
            format!("plugin {name} cannot be reached: {why}"),
            format!("try again shortly; `plugvisor describe {name}` says how it is"),
        )
    }

    /// `asked`: since when the provider alone kept the call waiting, if it did.
    fn out_of_time(&self, asked: Option<Instant>) -> End {
        let refusal = self.time.over(&format!("plugin {}", self.admitted.provider.identity.name));
        End::Cut { refusal, outcome: if self.was_fair(asked) { Outcome::Failure } else { Outcome::Ignored } }
    }

    /// Whether the provider had enough time for its answer; see `BrokerConfig::fair_deadline`.
    fn was_fair(&self, asked: Option<Instant>) -> bool {
        let had = asked.map(|asked| self.time.deadline().saturating_duration_since(asked));
        had.is_some_and(|had| had >= self.admitted.shared.config.fair_deadline)
    }

    fn record(self, path: &str, end: &End, asked: Option<Instant>, answered: Option<Instant>) {
        const DEADLINE_EXCEEDED: i32 = 4;
        let now = Instant::now();
        let (code, outcome) = match end {
            // The provider watches the same deadline, and may tell of it before the broker's own clock does.
            End::Passed { code: DEADLINE_EXCEEDED } if !self.was_fair(asked) => (DEADLINE_EXCEEDED, Outcome::Ignored),
            End::Passed { code } => (*code, Outcome::of_grpc(*code)),
            End::Cancelled => (1, Outcome::Ignored),
            End::Cut { refusal, outcome } => {
                self.admitted.shared.metrics.rejected(self.caller.key, refusal.reason);
                (refusal.reason.grpc_status(), *outcome)
            }
        };
        let method = path.strip_prefix('/').unwrap_or(path);
        let metrics = &self.admitted.shared.metrics;
        let duration = now.duration_since(self.time.began);
        metrics.finished(&self.admitted.provider.metrics, self.caller.key, method, code, duration);
        self.admitted.record(outcome, answered, now);
    }
}
