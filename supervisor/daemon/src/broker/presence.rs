//! Whether somebody is at the other end of a connection, and how one takes leave of them.

use std::{rc::Rc, time::Instant};

use super::{
    exchange::Exchange,
    http2::Code,
    peer::{Gone, Peer, Side},
    timer::Alarm,
};

/// How far the farewell of a connection has come (RFC 9113, section 6.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Farewell {
    No,
    /// The first GOAWAY is on its way, and a ping behind it.
    Announced,
    /// No further stream is taken.
    Said,
}

/// What is known of a peer's presence.
#[derive(Debug)]
pub(super) struct Presence {
    /// When it is next looked at.
    check: Instant,
    /// It has begun to speak HTTP/2.
    begun: bool,
    /// It has said something since it was last looked at.
    heard: bool,
    /// It was asked, and has not answered.
    asked: bool,
}

impl Presence {
    pub(super) const fn new(check: Instant) -> Self {
        Self { check, begun: false, heard: false, asked: false }
    }
}

impl Exchange {
    pub(super) fn heard_from(&mut self, place: usize) {
        let now = self.now;
        let Some(peer) = self.peers.get_mut(place) else { return };
        if peer.presence.begun || !peer.http.has_begun() {
            return;
        }
        peer.presence.begun = true;
        if let Side::Caller { limits, .. } = &peer.side {
            // The first ping comes soon: until it is answered, nothing shows that the peer reads HTTP/2 at all.
            peer.presence.check = now + limits.handshake_timeout / 2;
            self.timers.at(peer.presence.check, Alarm::Check { place, number: peer.number });
        }
    }

    pub(super) fn pong(&mut self, place: usize) {
        let Some(peer) = self.peers.get_mut(place) else { return };
        peer.presence.heard = true;
        peer.presence.asked = false;
        if peer.farewell == Farewell::Announced {
            peer.farewell = Farewell::Said;
            let last = peer.http.last_stream();
            peer.http.go_away(last, Code::NO_ERROR);
            self.mark(place);
        }
    }

    /// Notes that a caller has called.
    pub(super) fn not_silent(&mut self, place: usize) {
        if let Some(peer) = self.peers.get_mut(place) {
            peer.presence.heard = true;
            peer.presence.asked = false;
        }
    }

    /// Sees whether somebody is there.
    pub(super) fn check(&mut self, place: usize, number: u32) {
        let now = self.now;
        let due = |peer: &Peer| peer.number == number && peer.presence.check <= now;
        if !self.peers.get(place).is_some_and(due) {
            return;
        }
        // What it has said by now counts, also when this thread did not run in time to read it before the alarm.
        self.read(place, number);
        let Some(peer) = self.peers.get_mut(place).filter(|peer| due(peer)) else { return };
        let patience = match &peer.side {
            Side::Link(_) => self.shared.config.connect_timeout,
            Side::Caller { limits, .. } => limits.handshake_timeout,
        };
        if now.saturating_duration_since(peer.presence.check) > patience / 4 {
            // This thread itself was held up for long, and so the peer may have been: after a pause of the machine nobody's
            // silence says anything. It has as long again.
            peer.presence.check = now + patience / 2;
            self.timers.at(peer.presence.check, Alarm::Check { place, number });
            return;
        }
        let limits = match &peer.side {
            Side::Link(_) => {
                if peer.presence.heard {
                    return;
                }
                let patience = self.shared.config.connect_timeout;
                return self.peer_gone(place, &Gone::Silent(format!("it did not answer HTTP/2 within {patience:?}")));
            }
            Side::Caller { limits, .. } => Rc::clone(limits),
        };
        if !peer.presence.begun {
            let detail = format!("it did not begin HTTP/2 within {:?}", limits.handshake_timeout);
            return self.peer_gone(place, &Gone::Silent(detail));
        }
        // Calls have deadlines of their own; a peer that is stopped in the middle of one is not cut off for it.
        let next = if peer.http.open_streams() > 0 || std::mem::take(&mut peer.presence.heard) {
            peer.presence.asked = false;
            limits.idle_ping
        } else if peer.presence.asked {
            return self.peer_gone(place, &Gone::Silent("it does not answer HTTP/2 pings".to_owned()));
        } else {
            peer.presence.asked = true;
            peer.http.ping();
            limits.handshake_timeout / 2
        };
        peer.presence.check = now + next;
        self.timers.at(peer.presence.check, Alarm::Check { place, number });
        self.mark(place);
    }

    /// Begins to say farewell: calls in flight go on, and soon no further one is taken.
    pub(super) fn announce_farewell(&mut self, place: usize) {
        const ALL: u32 = (1 << 31) - 1;
        if let Some(peer) = self.peers.get_mut(place)
            && peer.farewell == Farewell::No
        {
            peer.farewell = Farewell::Announced;
            peer.http.go_away(ALL, Code::NO_ERROR);
            peer.http.ping();
            self.mark(place);
        }
    }
}
