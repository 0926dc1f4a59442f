//! Packets: any bytes give a message or an error, what was decoded survives the way back, and refusals stay short.

use plugvisor_sandbox::codec::{
    DecodeError, FromLauncher, decode_from_launcher, decode_request, encode_notice, encode_reply, encode_request,
};
use plugvisor_sandbox::protocol::VERSION;

/// The longest text of an error: it is sent back, and logged.
const ERROR: usize = 512;

pub(super) fn check(input: &[u8]) -> String {
    let request = match decode_request(input) {
        Ok((id, request)) => {
            let packet = encode_request(id, &request).expect("what came in a packet fits into one");
            assert_eq!(decode_request(&packet), Ok((id, request.clone())), "a request changed on its way");
            assert!(packet.len() <= input.len(), "a request grew from {} to {} bytes", input.len(), packet.len());
            format!("{request:?}")
        }
        Err(error) => refused(&error, input),
    };
    let said = match decode_from_launcher(input) {
        Ok(said) => {
            let packet = match &said {
                FromLauncher::Reply { id, reply } => encode_reply(*id, reply),
                FromLauncher::Notice(notice) => encode_notice(notice),
            };
            let packet = packet.expect("what came in a packet fits into one");
            assert_eq!(decode_from_launcher(&packet), Ok(said.clone()), "an answer changed on its way");
            format!("{said:?}")
        }
        Err(error) => refused(&error, input),
    };
    format!("{request} {said}")
}

fn refused(error: &DecodeError, input: &[u8]) -> String {
    let text = error.to_string();
    assert!(!text.is_empty() && text.len() <= ERROR, "an error of {} bytes", text.len());
    let id = input.get(4..12).map(|id| u64::from_le_bytes(id.try_into().expect("eight bytes")));
    assert!(error.id() == 0 || Some(error.id()) == id, "the error names request {}, the packet {id:?}", error.id());
    text
}

/// For each kind, the bodies of zeros that are a message: empty texts, no lists, first variants. Made anew each time, so
/// that a kind added to the protocol is tried from its first day.
pub(super) fn seeds() -> Vec<Vec<u8>> {
    const LONGEST: usize = 128;
    let mut seeds = Vec::new();
    for kind in (0..0x40_u16).chain(0x100..0x140).chain(0x1f0..0x240) {
        for length in 0..LONGEST {
            let mut packet = VERSION.to_le_bytes().to_vec();
            packet.extend(kind.to_le_bytes());
            packet.extend(7_u64.to_le_bytes());
            packet.resize(packet.len() + length, 0);
            if decode_request(&packet).is_ok() || decode_from_launcher(&packet).is_ok() {
                seeds.push(packet);
            }
        }
    }
    seeds
}
