//! Frames of the broker's own HTTP/2: whatever a peer writes, the connection keeps its word, or ends with an error that says
//! which rule was broken; and how the bytes were cut on their way changes nothing of that.

use plugvisor_daemon::broker::http2::{
    Role,
    rehearsal::{Outcome, rehearse},
};

/// The longest text of an error: it is logged, and told in an event.
const ERROR: usize = 200;

/// The first byte of an input says who the peer is, by its lowest bit, and the size of the parts in which the rest comes;
/// without a size it comes in one.
pub(super) fn check(input: &[u8]) -> String {
    let Some((first, bytes)) = input.split_first() else { return "nothing".to_owned() };
    let role = if first & 1 == 0 { Role::Server } else { Role::Client };
    let cuts: &[u8] = if first >> 1 == 0 { &[] } else { &[first >> 1] };
    let outcome = rehearse(role, bytes, cuts);
    assert_eq!(rehearse(role, bytes, cuts), outcome, "the same bytes led elsewhere");
    assert!(outcome.received <= bytes.len(), "{} bytes of bodies out of {}", outcome.received, bytes.len());
    said(role, &outcome)
}

fn said(role: Role, outcome: &Outcome) -> String {
    let Outcome { received, opened, broke } = outcome;
    let broke = match broke {
        None => "goes on".to_owned(),
        Some(error) => {
            let text = error.to_string();
            assert!(!text.is_empty() && text.len() <= ERROR, "an error of {} bytes", text.len());
            text
        }
    };
    // Sizes by their magnitude: each way through a window is one shape and not thousands.
    let magnitude = "i".repeat(usize::try_from(usize::BITS - received.leading_zeros()).unwrap_or_default());
    format!("{role:?} {magnitude} {} {broke}", "o".repeat(*opened))
}
