//! A peer's bytes against a connection whose owner does what the broker does with them.
//!
//! For fuzzers and property tests: it panics when the connection breaks its own word.

use std::{ops::ControlFlow, time::Instant};

use super::{
    Code, Connection, ConnectionError, Event, Fields, Limits, Role, budget::BudgetLimits, frame::PREFACE,
    hpack::Encoder,
};

/// Small limits, so that few bytes reach them.
const LIMITS: Limits = Limits {
    max_streams: 4,
    stream_window: 70_000,
    connection_window: 100_000,
    max_frame_size: 16_384,
    max_header_list_size: 2048,
    outbox: 64 * 1024,
    budget: BudgetLimits { most: 64, per_second: 0 },
};

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Bytes of bodies that arrived.
    pub received: usize,
    /// Streams that the peer opened.
    pub opened: usize,
    /// How the connection ended, if the peer broke a rule.
    pub broke: Option<ConnectionError>,
}

/// Feeds `bytes` to a connection, in parts of the sizes that `cuts` gives in turn. A server gets the preface before
/// them, and a client has opened three streams.
///
/// # Panics
/// When the connection hands out more than a peer may send, or holds more than its limits allow.
#[must_use]
pub fn rehearse(role: Role, bytes: &[u8], cuts: &[u8]) -> Outcome {
    let now = Instant::now();
    let mut connection = Connection::new(role, LIMITS, now);
    let mut outcome = Outcome::default();
    let mut input = Vec::new();
    match role {
        Role::Server => input.extend_from_slice(PREFACE),
        Role::Client => {
            for call in 0..3 {
                let stream = connection.open(call, false, |_, block| Encoder::known(block, 3));
                connection.queue(stream, &[7; 1000], false);
            }
        }
    }
    input.extend_from_slice(bytes);
    let mut fields = Fields::new();
    let mut rest = &input[..];
    let mut cuts = cuts.iter().cycle();
    while !rest.is_empty() {
        let size = cuts.next().map_or(rest.len(), |cut| usize::from(*cut) + 1).min(rest.len());
        let (part, later) = rest.split_at(size);
        rest = later;
        if let ControlFlow::Break(error) = take(&mut connection, part, &mut fields, &mut outcome, now) {
            connection.go_away(connection.last_stream(), error.code);
            outcome.broke = Some(error);
            return outcome;
        }
        let mut moved = Vec::new();
        connection.pump(&mut moved);
        assert!(connection.open_streams() <= LIMITS.max_streams as usize, "more streams than announced");
        assert!(connection.outbox().len() < 2 * LIMITS.outbox, "more to write than anything asked for");
        // A peer that reads.
        let _ = connection.outbox().flush(part, |slices| Ok::<_, ()>(slices.iter().map(|slice| slice.len()).sum()));
    }
    outcome
}

fn take(
    connection: &mut Connection,
    part: &[u8],
    fields: &mut Fields,
    outcome: &mut Outcome,
    now: Instant,
) -> ControlFlow<ConnectionError> {
    let mut at = 0;
    loop {
        let event = match connection.next(part, &mut at, fields, now) {
            Ok(Some(event)) => event,
            Ok(None) => return ControlFlow::Continue(()),
            Err(error) => return ControlFlow::Break(error),
        };
        match event {
            Event::Opened { stream, end, .. } => {
                outcome.opened += 1;
                connection.number(stream, outcome.opened);
                connection.respond(stream, false, |_, block| Encoder::known(block, 8));
                if end {
                    connection.close(stream, Code::NO_ERROR);
                }
            }
            // An echo: what came goes back, as far as there is room.
            Event::Data { stream, piece, end, .. } => {
                assert!(piece.end <= part.len(), "a piece outside what was passed in");
                outcome.received += piece.len();
                let gone = connection.data(stream, part, piece, end);
                connection.give_back(stream, gone);
                if end && connection.is_drained(stream) {
                    connection.close(stream, Code::NO_ERROR);
                }
            }
            Event::Fields { stream, end, .. } => {
                let size: usize = fields.iter().map(|field| field.name.len() + field.value.len() + 32).sum();
                assert!(size <= LIMITS.max_header_list_size as usize, "more fields than announced");
                if end {
                    connection.close(stream, Code::NO_ERROR);
                }
            }
            Event::Reset { .. } | Event::GoAway { .. } | Event::Pong => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Code, Outcome, Role, rehearse};
    use crate::broker::http2::frame::{Head, Kind};

    fn frame(kind: Kind, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap();
        [&Head { length, kind, flags, stream }.bytes()[..], payload].concat()
    }

    fn settings() -> Vec<u8> {
        frame(Kind::Settings, 0, 0, &[])
    }

    /// POST, http, and a path from the static table.
    const HEAD: &[u8] = &[0x83, 0x86, 0x84];

    fn of(frames: &[Vec<u8>]) -> Outcome {
        rehearse(Role::Server, &frames.concat(), &[])
    }

    fn ends(frames: &[Vec<u8>]) -> Code {
        of(frames).broke.expect("the connection goes on").code
    }

    #[test]
    fn a_body_arrives_whole() {
        let body = frame(Kind::Data, 1, 1, &[7; 5000]);
        let outcome = of(&[settings(), frame(Kind::Headers, 4, 1, HEAD), body]);
        assert_eq!(outcome, Outcome { received: 5000, opened: 1, broke: None });
    }

    #[test]
    fn padding_and_priority_are_taken_off() {
        let head = [&[2][..], &[0, 0, 0, 0, 1], HEAD, &[0, 0]].concat();
        let body = frame(Kind::Data, 0x8 | 0x1, 1, &[&[3][..], b"body", &[0; 3]].concat());
        let outcome = of(&[settings(), frame(Kind::Headers, 0x4 | 0x8 | 0x20, 1, &head), body]);
        assert_eq!(outcome, Outcome { received: 4, opened: 1, broke: None });
    }

    #[test]
    fn floods_end_the_connection() {
        let begun = [settings(), frame(Kind::Headers, 4, 1, HEAD)].concat();
        for one in [
            settings(),
            frame(Kind::Ping, 0, 0, &[0; 8]),
            frame(Kind::Priority, 0, 1, &[0; 5]),
            frame(Kind::WindowUpdate, 0, 1, &[0, 0, 0, 1]),
            frame(Kind::Data, 0, 1, &[]),
            frame(Kind::Data, 8, 1, &[1, 0]),
            frame(Kind::Unknown, 0, 0, &[]),
        ] {
            assert_eq!(ends(&[begun.clone(), one.repeat(100)]), Code::ENHANCE_YOUR_CALM);
        }
        let mut resets = begun.clone();
        let mut continued = [begun, frame(Kind::Headers, 0, 3, HEAD)].concat();
        for call in 1..100 {
            resets.extend(frame(Kind::Headers, 4, 2 * call + 1, HEAD));
            resets.extend(frame(Kind::ResetStream, 0, 2 * call + 1, &[0, 0, 0, 8]));
            continued.extend(frame(Kind::Continuation, 0, 3, &[]));
        }
        assert_eq!(ends(&[resets]), Code::ENHANCE_YOUR_CALM);
        assert_eq!(ends(&[continued]), Code::ENHANCE_YOUR_CALM);
    }

    #[test]
    fn windows_are_kept() {
        let body: Vec<Vec<u8>> = (0..5).map(|_| frame(Kind::Data, 0, 1, &[7; 16_000])).collect();
        // Nothing is echoed beyond the peer's window of 65,535 bytes, so nothing more is given back.
        let whole = [settings(), frame(Kind::Headers, 4, 1, HEAD), body.concat(), body.concat()];
        assert_eq!(ends(&whole), Code::FLOW_CONTROL_ERROR);
    }

    fn frames() -> impl Strategy<Value = Vec<u8>> {
        let kinds = prop::sample::select(vec![
            Kind::Data,
            Kind::Headers,
            Kind::Priority,
            Kind::ResetStream,
            Kind::Settings,
            Kind::PushPromise,
            Kind::Ping,
            Kind::GoAway,
            Kind::WindowUpdate,
            Kind::Continuation,
            Kind::Unknown,
        ]);
        let payload = prop_oneof![
            prop::collection::vec(any::<u8>(), 0..40),
            Just(HEAD.to_vec()),
            Just(vec![0; 8]),
            (0..16_384_usize).prop_map(|size| vec![7; size]),
            any::<[u8; 4]>().prop_map(|bytes| bytes.to_vec()),
        ];
        let one = (kinds, prop::sample::select(vec![0_u8, 1, 4, 5, 8, 12, 13]), 0..10_u32, payload)
            .prop_map(|(kind, flags, stream, payload)| frame(kind, flags, stream, &payload));
        prop::collection::vec(one, 0..30).prop_map(|frames| frames.concat())
    }

    proptest! {
        #[test]
        fn nothing_breaks_it(bytes in prop::collection::vec(any::<u8>(), 0..2000), cuts in prop::collection::vec(any::<u8>(), 0..9)) {
            let _ = rehearse(Role::Server, &bytes, &cuts);
            let _ = rehearse(Role::Client, &bytes, &cuts);
        }

        /// Frames in any order, and the same outcome however the bytes are cut.
        #[test]
        fn cuts_do_not_matter(later in frames(), cuts in prop::collection::vec(any::<u8>(), 1..9)) {
            let bytes = [settings(), later].concat();
            for role in [Role::Server, Role::Client] {
                let whole = rehearse(role, &bytes, &[]);
                let cut = rehearse(role, &bytes, &cuts);
                // What waits for room is sent between two parts, so windows may open earlier with more of them.
                if whole.broke.is_none() && cut.broke.is_none() {
                    prop_assert_eq!(whole.opened, cut.opened);
                    prop_assert_eq!(whole.received, cut.received);
                }
            }
        }
    }
}
