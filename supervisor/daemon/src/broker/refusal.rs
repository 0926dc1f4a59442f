//! What a refusal looks like on the wire: a gRPC status with the reason and the next step beside it.

use plugvisor_core::route::Refusal;

use super::http2::Fields;

pub(super) const GRPC_STATUS: &[u8] = b"grpc-status";
const GRPC_MESSAGE: &[u8] = b"grpc-message";
const REASON: &[u8] = b"plugvisor-reason";
const HINT: &[u8] = b"plugvisor-hint";

/// The longest message or hint on the wire, in bytes before it is percent-encoded.
const TEXT_MAX: usize = 512;

/// The trailers that end a call whose response has begun.
pub(super) fn trailers(refusal: &Refusal) -> Fields {
    let mut trailers = Fields::new();
    write(refusal, &mut trailers);
    trailers
}

/// The whole response to a call whose response has not begun ("Trailers-Only").
pub(super) fn response(refusal: &Refusal) -> Fields {
    let mut response = Fields::new();
    // gRPC puts its own status beside HTTP's, which stays 200.
    response.push(b":status", b"200");
    response.push(b"content-type", b"application/grpc");
    write(refusal, &mut response);
    response
}

fn write(refusal: &Refusal, fields: &mut Fields) {
    fields.push(GRPC_STATUS, refusal.reason.grpc_status().to_string().as_bytes());
    fields.push(GRPC_MESSAGE, &percent_encoded(&refusal.message));
    fields.push(REASON, refusal.reason.as_str().as_bytes());
    fields.push(HINT, &percent_encoded(refusal.caller_hint()));
}

/// The status that a provider ended a call with; `None` when it gave none.
pub(super) fn status_of(fields: &Fields) -> Option<i32> {
    let digits = fields.get(GRPC_STATUS)?;
    if digits.is_empty() || digits.len() > 9 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(digits.iter().fold(0, |number, digit| number * 10 + i32::from(digit - b'0')))
}

/// gRPC's percent-encoding of a text: everything but printable ASCII, and `%` itself.
fn percent_encoded(text: &str) -> Vec<u8> {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let mut end = text.len().min(TEXT_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let mut encoded = Vec::with_capacity(end + 16);
    for byte in text[..end].bytes() {
        if matches!(byte, b' '..=b'~') && byte != b'%' {
            encoded.push(byte);
        } else {
            encoded.extend([b'%', HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use plugvisor_core::route::{Reason, Refusal};

    use super::{Fields, TEXT_MAX, response, status_of, trailers};

    #[test]
    fn a_refusal_is_trailers_only_and_encoded() {
        let refusal = Refusal::new(Reason::BreakerOpen, "größe 100 %\n", "wait");
        let response = response(&refusal);
        let header = |name: &str| std::str::from_utf8(response.get(name.as_bytes()).unwrap()).unwrap().to_owned();
        assert_eq!(header(":status"), "200");
        assert_eq!(header("grpc-status"), "14");
        assert_eq!(header("grpc-message"), "gr%C3%B6%C3%9Fe 100 %25%0A");
        assert_eq!(header("plugvisor-reason"), "breaker_open");
        assert_eq!(header("plugvisor-hint"), "wait");
    }

    #[test]
    fn the_caller_is_told_what_is_for_it() {
        let refusal = Refusal { hint_for_caller: Some("for it".into()), ..Refusal::new(Reason::Loop, "", "of /etc") };
        assert_eq!(response(&refusal).get(b"plugvisor-hint"), Some(&b"for it"[..]));
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let refusal = Refusal::new(Reason::Loop, format!("x{}", "ä".repeat(TEXT_MAX)), "");
        let sent = trailers(&refusal).get(b"grpc-message").unwrap().len();
        assert_eq!(sent, 1 + (TEXT_MAX - 1) / 2 * 6);
    }

    #[test]
    fn a_status_is_a_small_number() {
        let of = |text: &str| status_of(&[(&b"grpc-status"[..], text.as_bytes())].into_iter().collect());
        assert_eq!(of("0"), Some(0));
        assert_eq!(of("16"), Some(16));
        for bad in ["", "-1", "x", "1 ", "9999999999"] {
            assert_eq!(of(bad), None, "{bad:?} was accepted");
        }
        assert_eq!(status_of(&Fields::new()), None);
    }
}
