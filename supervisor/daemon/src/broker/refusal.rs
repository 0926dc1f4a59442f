//! What a refusal looks like on the wire: a gRPC status with the reason and the next step beside it.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header::CONTENT_TYPE};
use plugvisor_core::route::Refusal;

pub(super) const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
pub(super) const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
pub(super) const REASON: HeaderName = HeaderName::from_static("plugvisor-reason");
pub(super) const HINT: HeaderName = HeaderName::from_static("plugvisor-hint");

/// The longest message or hint on the wire, in bytes before it is percent-encoded.
const TEXT_MAX: usize = 512;

/// The trailers that end a call whose response has begun.
pub(super) fn trailers(refusal: &Refusal) -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(5);
    write(refusal, &mut trailers);
    trailers
}

/// The whole response to a call whose response has not begun ("Trailers-Only").
pub(super) fn response(refusal: &Refusal) -> Response<()> {
    let mut response = Response::new(());
    // gRPC puts its own status beside HTTP's, which stays 200.
    *response.status_mut() = StatusCode::OK;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    write(refusal, response.headers_mut());
    response
}

fn write(refusal: &Refusal, headers: &mut HeaderMap) {
    headers.insert(GRPC_STATUS, HeaderValue::from(refusal.reason.grpc_status()));
    headers.insert(GRPC_MESSAGE, percent_encoded(&refusal.message));
    headers.insert(REASON, HeaderValue::from_static(refusal.reason.as_str()));
    headers.insert(HINT, percent_encoded(&refusal.hint));
}

/// The status that a provider ended a call with; `None` when it gave none.
pub(super) fn status_of(headers: &HeaderMap) -> Option<i32> {
    let digits = headers.get(GRPC_STATUS)?.as_bytes();
    if digits.is_empty() || digits.len() > 9 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(digits.iter().fold(0, |number, digit| number * 10 + i32::from(digit - b'0')))
}

/// gRPC's percent-encoding of a text: everything but printable ASCII, and `%` itself.
fn percent_encoded(text: &str) -> HeaderValue {
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
    // Printable ASCII is always a legal value; the other branch only keeps this free of panics.
    HeaderValue::from_maybe_shared(Bytes::from(encoded)).unwrap_or(HeaderValue::from_static(""))
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, HeaderValue};
    use plugvisor_core::route::{Reason, Refusal};

    use super::{TEXT_MAX, response, status_of, trailers};

    #[test]
    fn a_refusal_is_trailers_only_and_encoded() {
        let refusal = Refusal::new(Reason::BreakerOpen, "größe 100 %\n", "wait");
        let response = response(&refusal);
        assert_eq!(response.status(), 200);
        let header = |name: &str| response.headers()[name].to_str().unwrap().to_owned();
        assert_eq!(header("grpc-status"), "14");
        assert_eq!(header("grpc-message"), "gr%C3%B6%C3%9Fe 100 %25%0A");
        assert_eq!(header("plugvisor-reason"), "breaker_open");
        assert_eq!(header("plugvisor-hint"), "wait");
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let refusal = Refusal::new(Reason::Loop, format!("x{}", "ä".repeat(TEXT_MAX)), "");
        let sent = trailers(&refusal)["grpc-message"].to_str().unwrap().len();
        assert_eq!(sent, 1 + (TEXT_MAX - 1) / 2 * 6);
    }

    #[test]
    fn a_status_is_a_small_number() {
        let of = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-status", HeaderValue::from_static(text));
            status_of(&headers)
        };
        assert_eq!(of("0"), Some(0));
        assert_eq!(of("16"), Some(16));
        for bad in ["", "-1", "x", "1 ", "9999999999"] {
            assert_eq!(of(bad), None, "{bad:?} was accepted");
        }
        assert_eq!(status_of(&HeaderMap::new()), None);
    }
}
