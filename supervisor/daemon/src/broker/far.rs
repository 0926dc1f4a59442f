//! What providers say.

use std::ops::Range;

use super::{
    call::{End, Last, keeps_length},
    event::Sender,
    exchange::Exchange,
    fault::Fault,
    headers::{self, ResponseHead},
    http2::{Event, Fields, StreamId},
    link::LinkState,
    message::Breach,
    peer::Gone,
    refusal,
};

const NO_STATUS: &str = "its response ends without a grpc-status";
const NOT_KEPT: &str = "its response has another length than it said";

impl Exchange {
    pub(super) fn server_says(&mut self, place: usize, link: usize, event: &Event, read: &[u8], fields: &Fields) {
        match event {
            Event::Fields { call, trailers, end, oversized, .. } => {
                if *oversized {
                    self.fault(*call, Fault::NotGrpc("its response has far too much metadata".into()));
                } else if *trailers {
                    self.answered_all(*call, fields);
                } else {
                    self.answers(*call, *end, fields);
                }
            }
            Event::Data { stream, call, piece, end } => self.answer(place, *stream, *call, piece.clone(), *end, read),
            Event::Reset { call, code, by_peer, .. } => {
                let fault = if *by_peer {
                    Fault::Reset(*code)
                } else {
                    Fault::Protocol(format!("it broke HTTP/2 on a stream ({code})"))
                };
                self.fault(*call, fault);
            }
            Event::GoAway { last, .. } => self.leaves(place, link, *last),
            Event::Pong | Event::Opened { .. } => {}
        }
    }

    /// Ends a call for a mistake of its provider.
    fn fault(&mut self, number: usize, fault: Fault) {
        if let Some(call) = self.calls.get(number) {
            let end = call.fault(fault);
            self.finish(number, end);
        }
    }

    /// Passes a response's head on.
    fn answers(&mut self, number: usize, only: bool, fields: &Fields) {
        let Some(call) = self.calls.get_mut(number) else { return };
        match headers::response(fields) {
            Ok(ResponseHead { not_grpc: None, length }) => call.lengths.1 = length,
            Ok(ResponseHead { not_grpc: Some(status), .. }) => {
                let what = format!("its response has the HTTP status {status} and is not gRPC");
                return self.fault(number, Fault::NotGrpc(what));
            }
            Err(headers::Malformed) => {
                return self.fault(number, Fault::Protocol("its response has a malformed head".into()));
            }
        }
        let code = if only { refusal::status_of(fields) } else { None };
        if only && code.is_none() {
            return self.fault(number, Fault::NotGrpc(NO_STATUS.into()));
        }
        if only && call.is_overdue(code, self.now) {
            let end = call.out_of_time(&self.shared);
            return self.finish(number, end);
        }
        call.answered = Some(self.now);
        let (near, stream) = call.near;
        if let Some(peer) = self.peers.get_mut(near) {
            peer.http.respond(stream, only, |encoder, block| headers::write_response(encoder, block, fields));
            self.mark(near);
        }
        if let Some(code) = code {
            self.finish(number, End::Passed { code });
        }
    }

    /// Passes a part of a response's body on.
    fn answer(&mut self, place: usize, stream: StreamId, number: usize, piece: Range<usize>, end: bool, read: &[u8]) {
        let Some(call) = self.calls.get_mut(number) else { return };
        let (near, to) = call.near;
        let kept = keeps_length(&mut call.lengths.1, piece.len(), end);
        let mut good = piece.clone();
        let mut breach: Option<Breach> = None;
        if let Err((until, why)) = call.down.follow(&read[piece.clone()]) {
            good.end = piece.start + until;
            breach = Some(why);
        }
        let dropped = u32::try_from(piece.end - good.end).unwrap_or(u32::MAX);
        let gone = match self.peers.get_mut(near) {
            Some(near) if !good.is_empty() => near.http.data(to, read, good, false),
            Some(_) | None => 0,
        };
        if let Some(peer) = self.peers.get_mut(place) {
            peer.http.give_back(stream, gone + dropped);
        }
        self.mark(near);
        // What came before the message at fault, or before an end without a status, is passed on first.
        let fault = match breach {
            Some(breach) => Some(Fault::Breach(Sender::Provider, breach)),
            None if !kept => Some(Fault::Protocol(NOT_KEPT.into())),
            None if end => Some(Fault::NotGrpc(NO_STATUS.into())),
            None => None,
        };
        if let Some(fault) = fault {
            self.end_behind(number, Last::Fault(fault));
        }
    }

    /// Passes a response's trailers on.
    fn answered_all(&mut self, number: usize, fields: &Fields) {
        let Some(call) = self.calls.get_mut(number) else { return };
        let Some(code) = refusal::status_of(fields).filter(|_| headers::trailers(fields).is_ok()) else {
            return self.end_behind(number, Last::Fault(Fault::NotGrpc(NO_STATUS.into())));
        };
        if call.is_overdue(Some(code), self.now) {
            let end = call.out_of_time(&self.shared);
            return self.finish(number, end);
        }
        if !keeps_length(&mut call.lengths.1, 0, true) {
            return self.end_behind(number, Last::Fault(Fault::Protocol(NOT_KEPT.into())));
        }
        if code == 0 && !call.down.at_boundary() {
            let what = "its response ends within a message".to_owned();
            return self.end_behind(number, Last::Fault(Fault::NotGrpc(what)));
        }
        let (near, stream) = call.near;
        let mut passing = std::mem::take(&mut self.passing);
        headers::strip(fields, &mut passing);
        if let Some(peer) = self.peers.get_mut(near) {
            peer.http.trailers(stream, &passing);
        }
        self.passing = passing;
        self.mark(near);
        self.end_behind(number, Last::Status(code));
    }

    /// A provider that leaves has not looked at streams above `last`; those below go on.
    fn leaves(&mut self, place: usize, link: usize, last: StreamId) {
        if let Some(link) = self.links.get_mut(link)
            && link.state == LinkState::Up(place)
        {
            link.state = LinkState::Down;
            if let super::link::Server::Plugin(provider) = &link.server {
                provider.connected.set(false);
            }
        }
        let Some(peer) = self.peers.get(place) else { return };
        let unseen: Vec<usize> = peer.http.calls().filter(|(id, _)| *id > last).map(|(_, call)| call).collect();
        for call in unseen {
            self.fault(call, Fault::Lost("it closed the connection".into()));
        }
        self.close_if_left(place, link);
        if self.links.get(link).is_some_and(|link| !link.waiting.is_empty()) {
            self.connect(link);
        }
    }

    /// Closes a connection to a provider that takes no more streams, when its last has ended.
    pub(super) fn close_if_left(&mut self, place: usize, link: usize) {
        let current = self.links.get(link).is_some_and(|link| link.state == LinkState::Up(place));
        if !current && self.peers.get(place).is_some_and(|peer| peer.http.open_streams() == 0) {
            self.peer_gone(place, &Gone::Closed);
        }
    }
}
