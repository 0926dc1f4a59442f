//! What callers say.

use std::{ops::Range, rc::Rc, time::Duration};

use plugvisor_core::route::Refusal;

use super::{
    admit::{self, CallTime, Target},
    call::{Call, Callee, End, Far, Waiting, keeps_length},
    caller::Caller,
    event::Sender,
    exchange::Exchange,
    fault::Fault,
    headers, host,
    http2::{Code, Event, Fields, Moved, StreamId, encode},
    link::LinkState,
    message::Messages,
    peer::Side,
    refusal,
};
use crate::traces::{CallTrace, TracedCall};

/// The path is kept for the metrics, which know no longer one.
const PATH_KEPT: usize = 1024;
/// The least that the broker takes.
const HOP: Duration = Duration::from_micros(2);

impl Exchange {
    pub(super) fn caller_says(&mut self, place: usize, event: &Event, read: &[u8], fields: &Fields) {
        match event {
            Event::Opened { stream, end, oversized } => self.begin(place, *stream, *end, *oversized, fields),
            Event::Data { stream, call, piece, end } => self.asked(place, *stream, *call, piece.clone(), *end, read),
            Event::Fields { stream, call, oversized, .. } => self.asked_all(place, *stream, *call, *oversized, fields),
            Event::Reset { call, .. } => self.finish(*call, End::Cancelled),
            // A caller that leaves closes the connection when its calls have ended.
            Event::GoAway { .. } | Event::Pong => {}
        }
    }

    /// Begins a call: passes it on, or refuses it at once.
    fn begin(&mut self, place: usize, stream: StreamId, end: bool, oversized: bool, fields: &Fields) {
        let Side::Caller { caller, limits, .. } = &self.peers[place].side else { return };
        let (caller, limits) = (Rc::clone(caller), Rc::clone(limits));
        self.not_silent(place);
        // A body that is not there has no length.
        let head = headers::request(fields).ok().filter(|head| !end || head.length.is_none_or(|length| length == 0));
        let Some(head) = head else {
            if oversized {
                let most = limits.max_header_list_size;
                let what = admit::bad_request(&format!("the metadata has more than {most} bytes"));
                return self.refuse(place, stream, &caller, b"", &what);
            }
            self.peers[place].http.close(stream, Code::PROTOCOL_ERROR);
            return;
        };
        let admitted = if oversized {
            let most = limits.max_header_list_size;
            Err(admit::bad_request(&format!("the metadata has more than {most} bytes")))
        } else {
            admit::admit(&self.shared, &caller, &head, self.now)
        };
        let traceparent = head.traceparent.and_then(|text| std::str::from_utf8(text).ok());
        let trace = self.shared.config.tracer.as_ref().and_then(|tracer| tracer.begin(traceparent));
        let (target, time) = match admitted {
            Ok(admitted) => admitted,
            Err(refused) => {
                self.trace_refusal(trace, &caller, head.path, &refused);
                return self.refuse(place, stream, &caller, head.path, &refused);
            }
        };
        let path = std::str::from_utf8(head.path).unwrap_or_default();
        let path: Box<str> = path[..path.floor_char_boundary(PATH_KEPT)].into();
        let (callee, link, limit) = match target {
            Target::Provider(admitted) => {
                let (link, limit) = (admitted.provider.link, admitted.provider.limits.max_message);
                (Callee::Plugin(admitted), link, limit)
            }
            Target::Host => (Callee::Host, self.host_link, super::config::CallLimits::default().max_message),
        };
        let CallTime { began, .. } = time;
        let deadline = time.deadline();
        self.deadline = Some(self.deadline.map_or(deadline, |earliest| earliest.min(deadline)));
        let call = self.calls.insert(Call {
            caller,
            callee,
            link,
            near: (place, stream),
            far: Far::Waiting(Box::new(Waiting { head: fields.clone(), body: Vec::new(), trailers: None })),
            time,
            deadline,
            path,
            up: Messages::new(limit),
            down: Messages::new(limit),
            asked: end.then_some(began),
            answered: None,
            lengths: (head.length, None),
            last: None,
            trace,
            passed: None,
        });
        self.peers[place].http.number(stream, call);
        let Some(entry) = self.links.get_mut(link) else { return };
        entry.waiting.push_back(call);
        match entry.state {
            // With its body, or when all that was read has been handled: a call that is given up at once costs its
            // provider nothing, and servers close a connection on which that happens often (CVE-2023-44487).
            LinkState::Up(far) => self.mark(far),
            LinkState::Down | LinkState::Full(_) => self.connect(link),
        }
    }

    /// Opens a call's stream to its provider.
    pub(super) fn open(&mut self, number: usize, far: usize, fields: &Fields, end: bool) -> Option<StreamId> {
        let call = self.calls.get_mut(number)?;
        // The clock is looked at once for many calls; what passes on is less than what came all the same, so that calls
        // that go round in a circle end.
        let left = call.deadline.saturating_duration_since(self.now).saturating_sub(HOP);
        if left.is_zero() {
            let end = call.out_of_time(&self.shared);
            self.finish(number, end);
            return None;
        }
        let identity = match &call.callee {
            Callee::Plugin(_) => None,
            Callee::Host => Some(host::written(&call.caller.identity)),
        };
        let peer = self.peers.get_mut(far)?;
        let stream = peer.http.open(number, end, |encoder, block| {
            headers::write_request(
                encoder,
                block,
                fields,
                &call.caller,
                left,
                identity.as_deref(),
                call.trace.as_ref(),
            );
        });
        call.passed = Some(self.now);
        call.far = Far::Open { peer: far, stream };
        self.mark(far);
        Some(stream)
    }

    /// The span of a call that was passed to nobody.
    fn trace_refusal(&self, trace: Option<CallTrace>, caller: &Caller, path: &[u8], refused: &Refusal) {
        let (Some(trace), Some(tracer)) = (trace, &self.shared.config.tracer) else { return };
        let path = std::str::from_utf8(path).unwrap_or_default();
        let method = path.strip_prefix('/').unwrap_or(path);
        tracer.finish(
            trace,
            TracedCall {
                caller: caller.identity.label(),
                callee: None,
                method: method[..method.floor_char_boundary(PATH_KEPT)].to_owned(),
                status: refused.reason.grpc_status(),
                reason: Some(refused.reason.as_str()),
                passed_after: None,
                took: Duration::ZERO,
            },
        );
    }

    fn refuse(&mut self, place: usize, stream: StreamId, caller: &Caller, path: &[u8], refused: &Refusal) {
        self.shared.metrics.rejected(caller.key, refused.reason);
        admit::tell_denied(&self.shared, caller, path, refused);
        let response = refusal::response(refused);
        let http = &mut self.peers[place].http;
        http.respond(stream, true, |encoder, block| encode(encoder, block, &response));
        http.close(stream, Code::NO_ERROR);
    }

    /// Passes a part of a request's body on.
    fn asked(&mut self, place: usize, stream: StreamId, number: usize, piece: Range<usize>, end: bool, read: &[u8]) {
        let size = u32::try_from(piece.len()).unwrap_or(u32::MAX);
        let Some(call) = self.calls.get(number) else { return };
        if matches!(call.far, Far::Waiting(_)) {
            self.begin_waiting(call.link);
        }
        let Some(call) = self.calls.get_mut(number) else {
            // It ran out of time.
            return self.peers[place].http.give_back(stream, size);
        };
        if !keeps_length(&mut call.lengths.0, piece.len(), end) {
            let http = &mut self.peers[place].http;
            http.give_back(stream, size);
            http.close(stream, Code::PROTOCOL_ERROR);
            return self.finish(number, End::Cancelled);
        }
        if let Err((_, breach)) = call.up.follow(&read[piece.clone()]) {
            let end = call.fault(Fault::Breach(Sender::Caller, breach));
            self.peers[place].http.give_back(stream, size);
            return self.finish(number, end);
        }
        if end {
            call.asked = Some(self.now);
        }
        match &mut call.far {
            // No more than one window, which is not given back before it goes.
            Far::Waiting(waiting) => waiting.body.extend_from_slice(&read[piece]),
            Far::Open { peer: far, stream: to } => {
                let (far, to) = (*far, *to);
                let gone = self.peers.get_mut(far).map_or(size, |far| far.http.data(to, read, piece, end));
                self.peers[place].http.give_back(stream, gone);
                self.mark(far);
            }
        }
    }

    /// Passes a request's trailers on.
    fn asked_all(&mut self, place: usize, stream: StreamId, number: usize, oversized: bool, fields: &Fields) {
        let Some(call) = self.calls.get_mut(number) else { return };
        let kept = keeps_length(&mut call.lengths.0, 0, true);
        if oversized || !kept || headers::trailers(fields).is_err() {
            self.peers[place].http.close(stream, Code::PROTOCOL_ERROR);
            return self.finish(number, End::Cancelled);
        }
        call.asked = Some(self.now);
        let mut passing = std::mem::take(&mut self.passing);
        headers::strip(fields, &mut passing);
        match &mut call.far {
            Far::Waiting(waiting) => waiting.trailers = Some(passing.clone()),
            Far::Open { peer: far, stream } => {
                let (far, stream) = (*far, *stream);
                if let Some(far) = self.peers.get_mut(far) {
                    far.http.trailers(stream, &passing);
                }
                self.mark(far);
            }
        }
        self.passing = passing;
    }

    /// Notes that bytes which waited at a peer are on their way: whoever sent them may send as many more.
    pub(super) fn moved_on(&mut self, place: usize, moved: Moved) {
        let Some(call) = self.calls.get_mut(moved.call) else { return };
        let (near, near_stream) = call.near;
        let to_caller = place == near && moved.stream == near_stream;
        let source = match &call.far {
            Far::Open { peer, stream } if to_caller => Some((*peer, *stream)),
            Far::Open { .. } => Some((near, near_stream)),
            Far::Waiting(_) => None,
        };
        if let Some((source, stream)) = source
            && let Some(peer) = self.peers.get_mut(source)
        {
            peer.http.give_back(stream, moved.bytes);
            self.mark(source);
        }
        if to_caller && moved.drained {
            self.drained(moved.call);
        }
    }
}
