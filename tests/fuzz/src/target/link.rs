//! Frames between a guest and its host: any bytes are frames or an error, a frame is what it is written as, and no piece of
//! one is another one.

use std::fmt::Write as _;

// The same file as in the guest and in its monitor.
#[path = "../../../../supervisor/sandbox/guest/link.rs"]
#[allow(dead_code, unreachable_pub, reason = "each side uses its half")]
mod wire;

use wire::{Frame, HEAD, MOST_DATA, Target};

pub(super) fn check(input: &[u8]) -> String {
    let mut outcome = String::new();
    let mut written = Vec::with_capacity(HEAD + MOST_DATA);
    let mut left = input;
    // A reader stops at what is wrong, and waits for what is not whole. What many say alike is no other way through.
    while outcome.len() < 512 {
        let (frame, length) = match wire::read(left) {
            Ok(Some(read)) => read,
            Ok(None) => {
                assert!(left.len() < HEAD + MOST_DATA, "{} bytes are not a whole frame", left.len());
                outcome.push_str(if left.is_empty() { "all" } else { "part" });
                break;
            }
            Err(wrong) => {
                let _ = write!(outcome, "{wrong:?}");
                break;
            }
        };
        assert!((HEAD..=HEAD + MOST_DATA).contains(&length) && length <= left.len(), "a frame of {length} bytes");
        written.clear();
        frame.write(&mut written);
        assert_eq!(written.len(), length, "{frame:?} has another length when it is written");
        assert_eq!(wire::read(&written), Ok(Some((frame, length))), "a frame changed on its way");
        for cut in [0, 1, HEAD - 1, HEAD, length - 1].into_iter().filter(|cut| *cut < length) {
            assert_eq!(wire::read(&left[..cut]), Ok(None), "{cut} bytes of {frame:?} are a frame");
        }
        let _ = match frame {
            Frame::Data { bytes, .. } => write!(outcome, "Data {} ", bytes.len() == MOST_DATA),
            // Which port it is leads nowhere else.
            Frame::Open { target: Target::Port(_), .. } => write!(outcome, "Port "),
            Frame::Open { target, .. } => write!(outcome, "{target:?} "),
            Frame::Ended { signal, .. } => write!(outcome, "Ended {signal} "),
            other => write!(outcome, "{other:?} "),
        };
        left = &left[length..];
    }
    outcome
}
