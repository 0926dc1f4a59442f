//! One call: what is known of it from its first byte to what is recorded about it.
//!
//! It knows neither sockets nor frames. Nothing is ever tried twice: whether a call may be repeated, only its caller
//! knows.

use std::{
    rc::Rc,
    time::{Duration, Instant},
};

use plugvisor_core::{
    breaker::Outcome,
    route::{Reason, Refusal},
};

use super::{
    admit::CallTime,
    caller::Caller,
    fault::{self, Fault},
    http2::{Fields, StreamId},
    link::LinkKey,
    message::Messages,
    provider::Admitted,
    shared::Shared,
};
use crate::traces::{CallTrace, TracedCall};

/// The provider under which calls to host modules are counted; no plugin can have a name with a dot.
const COUNTED_AS: &str = "plugvisor.host";

/// A server that keeps the deadline itself may say so just before the broker's own clock does, by as much as timers are
/// coarse (tokio's tick in 1 ms steps).
const DEADLINE_SLACK: Duration = Duration::from_millis(5);

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

/// Who serves.
#[derive(Debug)]
pub(super) enum Callee {
    /// A plugin.
    Plugin(Admitted),
    /// The supervisor itself.
    Host,
}

/// The half of a call towards its provider.
#[derive(Debug)]
pub(super) enum Far {
    /// Not begun: there is no connection, or it has no place.
    Waiting(Box<Waiting>),
    /// A stream of a connection.
    Open { peer: usize, stream: StreamId },
}

/// What a call that has not begun has said.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    pub(super) head: Fields,
    pub(super) body: Vec<u8>,
    pub(super) trailers: Option<Fields>,
}

/// What ends a call as soon as all that waits for its caller has been passed on.
#[derive(Debug)]
pub(super) enum Last {
    /// Trailers, which are on their way behind the rest.
    Status(i32),
    /// A message that is not allowed.
    Fault(Fault),
}

/// One call.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) caller: Rc<Caller>,
    pub(super) callee: Callee,
    pub(super) link: LinkKey,
    pub(super) near: (usize, StreamId),
    pub(super) far: Far,
    pub(super) time: CallTime,
    pub(super) deadline: Instant,
    /// `/package.Service/Method`.
    pub(super) path: Box<str>,
    pub(super) up: Messages,
    pub(super) down: Messages,
    /// When the caller had said all that it asks. Until then its provider owes no answer.
    pub(super) asked: Option<Instant>,
    /// When the head of the response came.
    pub(super) answered: Option<Instant>,
    /// Bytes of the request's and of the response's body that are still to come, where their heads say how many.
    pub(super) lengths: (Option<u64>, Option<u64>),
    pub(super) last: Option<Last>,
    pub(super) trace: Option<CallTrace>,
    /// When its stream to the provider was opened.
    pub(super) passed: Option<Instant>,
}

/// Counts a part of a body against the length that its head said; false when they do not agree.
pub(super) fn keeps_length(left: &mut Option<u64>, size: usize, end: bool) -> bool {
    let Some(length) = left else { return true };
    let Some(rest) = length.checked_sub(size as u64) else { return false };
    *length = rest;
    !end || rest == 0
}

impl Call {
    pub(super) fn callee_name(&self) -> String {
        match &self.callee {
            Callee::Plugin(admitted) => format!("plugin {}", admitted.provider.identity.name),
            Callee::Host => "the supervisor".into(),
        }
    }

    /// The end of a call whose provider has no connection.
    pub(super) fn unreachable(&self, why: &str) -> End {
        let hint = match &self.callee {
            Callee::Plugin(admitted) => {
                let name = &admitted.provider.identity.name;
                format!("try again shortly; `plugvisor describe {name}` says how it is")
            }
            Callee::Host => "see the log of plugvisord".to_owned(),
        };
        let what = format!("{} cannot be reached: {why}", self.callee_name());
        End::cut(Refusal::new(Reason::ProviderLost, what, hint))
    }

    /// The end of a call for somebody's mistake.
    pub(super) fn fault(&self, fault: Fault) -> End {
        match &self.callee {
            Callee::Plugin(admitted) => fault.end(&self.caller, admitted),
            Callee::Host => fault::end_at_host(fault),
        }
    }

    /// The end of a call whose time is over.
    pub(super) fn out_of_time(&self, shared: &Shared) -> End {
        let asked = match (&self.far, &self.callee) {
            // Without a connection only the provider can be at fault; with one, its streams may all be other callers'.
            (Far::Waiting(_), Callee::Plugin(admitted)) => {
                (!admitted.provider.connected.get()).then_some(self.time.began)
            }
            // Once it has answered, how fast its response goes depends on its reader too.
            (Far::Open { .. }, Callee::Plugin(_)) => self.asked.filter(|_| self.answered.is_none()),
            (_, Callee::Host) => None,
        };
        let refusal = self.time.over(&self.callee_name());
        End::Cut { refusal, outcome: if self.was_fair(asked, shared) { Outcome::Failure } else { Outcome::Ignored } }
    }

    /// Whether a provider's status only says that the deadline passed. gRPC means `DEADLINE_EXCEEDED` (4); tonic's
    /// server says CANCELLED (1). The caller has not cancelled: that would have ended the call before.
    pub(super) fn is_overdue(&self, code: Option<i32>, now: Instant) -> bool {
        matches!(code, Some(1 | 4)) && now + DEADLINE_SLACK >= self.deadline
    }

    /// Whether the provider had enough time for its answer; see `BrokerConfig::fair_deadline`.
    fn was_fair(&self, asked: Option<Instant>, shared: &Shared) -> bool {
        let had = asked.map(|asked| self.deadline.saturating_duration_since(asked));
        had.is_some_and(|had| had >= shared.config.fair_deadline)
    }

    /// Counts the call, and gives its place back.
    pub(super) fn record(self, end: End, shared: &Shared, now: Instant) {
        const DEADLINE_EXCEEDED: i32 = 4;
        let mut reason = None;
        let (code, outcome) = match end {
            // The provider watches the same deadline, and may tell of it before the broker's own clock does.
            End::Passed { code: DEADLINE_EXCEEDED } if !self.was_fair(self.asked, shared) => {
                (DEADLINE_EXCEEDED, Outcome::Ignored)
            }
            End::Passed { code } => (code, Outcome::of_grpc(code)),
            End::Cancelled => (1, Outcome::Ignored),
            End::Cut { refusal, outcome } => {
                reason = Some(refusal.reason.as_str());
                shared.metrics.rejected(self.caller.key, refusal.reason);
                (refusal.reason.grpc_status(), outcome)
            }
        };
        let method = self.path.strip_prefix('/').unwrap_or(&self.path);
        let duration = now.duration_since(self.time.began);
        if let (Some(trace), Some(tracer)) = (self.trace, &shared.config.tracer) {
            let callee = match &self.callee {
                Callee::Plugin(admitted) => admitted.provider.identity.name.to_string(),
                Callee::Host => COUNTED_AS.to_owned(),
            };
            let call = TracedCall {
                caller: self.caller.identity.label(),
                callee: Some(callee),
                method: method.to_owned(),
                status: code,
                reason,
                passed_after: self.passed.map(|passed| passed.duration_since(self.time.began)),
                took: duration,
            };
            tracer.finish(trace, call);
        }
        match self.callee {
            Callee::Plugin(mut admitted) => {
                let figures = &admitted.provider.metrics;
                shared.metrics.finished(figures, self.caller.key, method, code, duration);
                if matches!(self.far, Far::Open { .. }) {
                    // A provider is only as slow as it is after it has been asked in full.
                    admitted.began = self.asked.unwrap_or(now);
                }
                admitted.record(outcome, self.answered, now);
            }
            Callee::Host => {
                let figures = shared.metrics.provider(COUNTED_AS);
                shared.metrics.finished(&figures, self.caller.key, method, code, duration);
            }
        }
    }
}
