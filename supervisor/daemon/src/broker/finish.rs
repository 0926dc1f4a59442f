//! How calls end, at both of their ends.

use super::{
    call::{End, Far, Last},
    exchange::Exchange,
    http2::{Code, encode},
    refusal,
};

impl Exchange {
    /// Ends a call as soon as all that waits for its caller has been passed on.
    pub(super) fn end_behind(&mut self, number: usize, last: Last) {
        let Some(call) = self.calls.get_mut(number) else { return };
        call.last = Some(last);
        let (near, stream) = call.near;
        if self.peers.get(near).is_none_or(|near| near.http.is_drained(stream)) {
            self.drained(number);
        }
    }

    /// Ends a call that only waited for its reader.
    pub(super) fn drained(&mut self, number: usize) {
        let Some(call) = self.calls.get_mut(number) else { return };
        let end = match call.last.take() {
            None => return,
            Some(Last::Status(code)) => End::Passed { code },
            Some(Last::Fault(fault)) => call.fault(fault),
        };
        self.finish(number, end);
    }

    /// Ends a call: tells both ends, and records it.
    pub(super) fn finish(&mut self, number: usize, end: End) {
        let Some(call) = self.calls.try_remove(number) else { return };
        let (near, near_stream) = call.near;
        // What was said and will not go on any more counts as taken.
        let unsaid = match &call.far {
            Far::Open { peer, stream } => {
                self.mark(*peer);
                self.peers.get_mut(*peer).map_or(0, |far| far.http.close(*stream, Code::CANCEL))
            }
            Far::Waiting(waiting) => {
                if let Some(link) = self.links.get_mut(call.link) {
                    link.waiting.retain(|waits| *waits != number);
                }
                u32::try_from(waiting.body.len()).unwrap_or(u32::MAX)
            }
        };
        let mut unheard = 0;
        if let Some(peer) = self.peers.get_mut(near) {
            match &end {
                End::Passed { .. } => {}
                End::Cancelled => unheard = peer.http.close(near_stream, Code::CANCEL),
                End::Cut { refusal, .. } => {
                    unheard = peer.http.discard(near_stream);
                    let fields =
                        if call.answered.is_some() { refusal::trailers(refusal) } else { refusal::response(refusal) };
                    peer.http.respond(near_stream, true, |encoder, block| encode(encoder, block, &fields));
                }
            }
            peer.http.close(near_stream, Code::NO_ERROR);
            peer.http.give_back(near_stream, unsaid);
            self.mark(near);
        }
        if let Far::Open { peer, stream } = call.far {
            if let Some(far) = self.peers.get_mut(peer) {
                far.http.give_back(stream, unheard);
            }
            self.close_if_left(peer, call.link);
        }
        call.record(end, &self.shared, self.now);
    }
}
