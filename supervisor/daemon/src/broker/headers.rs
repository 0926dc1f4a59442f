//! What a head means, what of its fields travels on, and what the broker sets itself.
//!
//! Metadata passes untouched but for fields that belong to one connection (RFC 9113, section 8.2.2), for a length that
//! the broker could not keep, and for everything under `plugvisor-`, which is the broker's own: whatever a peer wrote
//! there is dropped.

use std::time::Duration;

use super::{
    caller::Caller,
    deadline,
    http2::{Field, Fields, comes_again, hpack::Encoder},
};
use crate::traces::CallTrace;

pub(super) const CALLER: &[u8] = b"plugvisor-caller";
pub(super) const HOPS: &[u8] = b"plugvisor-hops";
pub(super) const TOKEN: &[u8] = b"plugvisor-token";
const TIMEOUT: &[u8] = b"grpc-timeout";
const TRACEPARENT: &[u8] = b"traceparent";
/// Who calls a host module; only the broker's own server ever sees it.
pub(super) const IDENTITY: &[u8] = b"plugvisor-identity";

const OURS: &[u8] = b"plugvisor-";
const CONTENT_TYPE: &[u8] = b"content-type";
const PATH: &[u8] = b":path";
const LENGTH: &[u8] = b"content-length";

/// Indexes of the static table (RFC 7541, appendix A).
const METHOD_POST: u8 = 3;
const SCHEME_HTTP: u8 = 6;
const STATUS_200: u8 = 8;

/// A head that breaks RFC 9113, section 8: its stream is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// What the broker wants to know of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct RequestHead<'f> {
    pub(super) method: &'f [u8],
    pub(super) path: &'f [u8],
    pub(super) is_grpc: bool,
    pub(super) timeout: Option<&'f [u8]>,
    pub(super) token: Option<&'f [u8]>,
    pub(super) hops: Option<&'f [u8]>,
    pub(super) traceparent: Option<&'f [u8]>,
    /// How many bytes the body has, if it says so.
    pub(super) length: Option<u64>,
}

/// Reads a request's head.
pub(super) fn request(fields: &Fields) -> Result<RequestHead<'_>, Malformed> {
    let (mut method, mut path, mut scheme, mut authority) = (None, None, None, None);
    let mut head = RequestHead {
        method: b"",
        path: b"",
        is_grpc: false,
        timeout: None,
        token: None,
        hops: None,
        traceparent: None,
        length: None,
    };
    let mut regular = false;
    for field in fields.iter() {
        check(field, &mut regular)?;
        let slot = match field.name {
            b":method" => &mut method,
            PATH => &mut path,
            b":scheme" => &mut scheme,
            b":authority" => &mut authority,
            [b':', ..] => return Err(Malformed),
            CONTENT_TYPE => {
                head.is_grpc = is_grpc(field.value);
                continue;
            }
            TIMEOUT => {
                head.timeout = head.timeout.or(Some(field.value));
                continue;
            }
            TOKEN => {
                head.token = head.token.or(Some(field.value));
                continue;
            }
            HOPS => {
                head.hops = head.hops.or(Some(field.value));
                continue;
            }
            TRACEPARENT => {
                head.traceparent = head.traceparent.or(Some(field.value));
                continue;
            }
            LENGTH => {
                head.length = Some(length(field.value, head.length)?);
                continue;
            }
            _ => continue,
        };
        if slot.replace(field.value).is_some() {
            return Err(Malformed);
        }
    }
    scheme.ok_or(Malformed)?;
    head.method = method.ok_or(Malformed)?;
    head.path = path.filter(|path| !path.is_empty()).ok_or(Malformed)?;
    Ok(head)
}

/// What the broker wants to know of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ResponseHead {
    /// The HTTP status, unless it is 200 and gRPC follows.
    pub(super) not_grpc: Option<u16>,
    /// How many bytes the body has, if it says so.
    pub(super) length: Option<u64>,
}

/// Reads a response's head.
pub(super) fn response(fields: &Fields) -> Result<ResponseHead, Malformed> {
    let mut said = None;
    let mut status = None;
    let mut grpc = false;
    let mut regular = false;
    for field in fields.iter() {
        check(field, &mut regular)?;
        match field.name {
            b":status" if status.is_none() => {
                status = std::str::from_utf8(field.value).ok().and_then(|text| text.parse::<u16>().ok());
            }
            [b':', ..] => return Err(Malformed),
            CONTENT_TYPE => grpc = is_grpc(field.value),
            LENGTH => said = Some(length(field.value, said)?),
            _ => {}
        }
    }
    let status = status.ok_or(Malformed)?;
    Ok(ResponseHead { not_grpc: (!grpc || status != 200).then_some(status), length: said })
}

/// Reads a length; all that there are must say the same.
fn length(value: &[u8], before: Option<u64>) -> Result<u64, Malformed> {
    let digits = std::str::from_utf8(value).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    let length = digits.and_then(|digits| digits.parse().ok()).ok_or(Malformed)?;
    if before.is_none_or(|before| before == length) { Ok(length) } else { Err(Malformed) }
}

/// Reads trailers.
pub(super) fn trailers(fields: &Fields) -> Result<(), Malformed> {
    let mut regular = true;
    fields.iter().try_for_each(|field| check(field, &mut regular))
}

/// Names in lower case, no control characters, pseudo-header fields first, none of HTTP/1's connections (sections 8.2
/// and 8.3).
fn check(field: Field<'_>, regular: &mut bool) -> Result<(), Malformed> {
    let name = match field.name {
        [] | b"connection" | b"keep-alive" | b"proxy-connection" | b"transfer-encoding" | b"upgrade" => {
            return Err(Malformed);
        }
        [b':', ..] if *regular => return Err(Malformed),
        [b':', rest @ ..] => rest,
        name => {
            *regular = true;
            name
        }
    };
    let named = name.iter().all(|byte| IN_NAMES[usize::from(*byte)]);
    let valued = field.value.iter().all(|byte| !matches!(byte, 0 | b'\r' | b'\n'));
    if named && valued { Ok(()) } else { Err(Malformed) }
}

/// RFC 9110's `token`, without capitals.
static IN_NAMES: [bool; 256] = {
    let mut allowed = [false; 256];
    let mut byte = 0_u8;
    loop {
        allowed[byte as usize] = matches!(
            byte,
            b'a'..=b'z'
                | b'0'..=b'9'
                | b'!' | b'#' | b'$' | b'%' | b'&' | b'\'' | b'*' | b'+' | b'-' | b'.' | b'^' | b'_' | b'`' | b'|' | b'~'
        );
        if byte == u8::MAX {
            break;
        }
        byte += 1;
    }
    allowed
};

/// Whether gRPC follows, in whatever encoding of messages.
fn is_grpc(content_type: &[u8]) -> bool {
    let rest = content_type.strip_prefix(b"application/grpc");
    rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// Whether a field travels on.
fn passes(field: Field<'_>) -> bool {
    match field.name {
        [b':', ..]
        // The broker may end what it passes on before its announced length; gRPC has no use for it.
        | LENGTH
        | b"host"
        | b"proxy-authenticate"
        | b"proxy-authorization" => false,
        // The one value that HTTP/2 allows, and gRPC servers look for.
        b"te" => field.value == b"trailers",
        name => !name.starts_with(OURS),
    }
}

/// Writes a request's head as it travels on. The authority is ours: what a caller dialled says nothing there.
pub(super) fn write_request(
    encoder: &mut Encoder,
    block: &mut Vec<u8>,
    fields: &Fields,
    caller: &Caller,
    left: Duration,
    identity: Option<&str>,
    trace: Option<&CallTrace>,
) {
    Encoder::known(block, METHOD_POST);
    Encoder::known(block, SCHEME_HTTP);
    encoder.stable(block, field(PATH, fields.get(PATH).unwrap_or(b"/")));
    encoder.stable(block, field(b":authority", b"plugvisor"));
    let replaced = |name: &[u8]| name == TIMEOUT || (trace.is_some() && name == TRACEPARENT);
    for passing in fields.iter().filter(|field| passes(*field) && !replaced(field.name)) {
        pass(encoder, block, passing);
    }
    if let Some(trace) = trace {
        Encoder::once(block, field(TRACEPARENT, trace.traceparent().as_bytes()));
    }
    encoder.stable(block, field(CALLER, caller.label.as_bytes()));
    if let Some(name) = caller.plugin_name() {
        match fields.get(HOPS) {
            None | Some(b"") => encoder.stable(block, field(HOPS, name.as_str().as_bytes())),
            Some(path) => {
                let longer = [path, b",", name.as_str().as_bytes()].concat();
                encoder.stable(block, field(HOPS, &longer));
            }
        }
    }
    if let Some(identity) = identity {
        encoder.stable(block, field(IDENTITY, identity.as_bytes()));
    }
    Encoder::once(block, field(TIMEOUT, deadline::format(left).as_bytes()));
}

const fn field<'f>(name: &'f [u8], value: &'f [u8]) -> Field<'f> {
    Field { name, value, sensitive: false }
}

/// Writes a response's head as it travels on.
pub(super) fn write_response(encoder: &mut Encoder, block: &mut Vec<u8>, fields: &Fields) {
    Encoder::known(block, STATUS_200);
    for passing in fields.iter().filter(|field| passes(*field)) {
        pass(encoder, block, passing);
    }
}

/// What of `fields` travels on, added to `to`.
pub(super) fn strip(fields: &Fields, to: &mut Fields) {
    to.clear();
    fields.iter().filter(|field| passes(*field)).for_each(|field| to.push_field(field));
}

fn pass(encoder: &mut Encoder, block: &mut Vec<u8>, field: Field<'_>) {
    if comes_again(field.name) { encoder.stable(block, field) } else { Encoder::once(block, field) }
}

/// Splits `/package.Service/Method`.
pub(super) fn service_and_method(path: &str) -> Option<(&str, &str)> {
    let (service, method) = path.strip_prefix('/')?.split_once('/')?;
    (!service.is_empty() && !method.is_empty() && !method.contains('/')).then_some((service, method))
}

#[cfg(test)]
mod tests {
    use super::{Fields, Malformed, ResponseHead, is_grpc, request, response, service_and_method, strip, trailers};

    fn list(fields: &[(&str, &str)]) -> Fields {
        fields.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())).collect()
    }

    #[test]
    fn metadata_stays_and_the_rest_goes() {
        let names = [
            ":path",
            "x-one",
            "x-one",
            "key-bin",
            "traceparent",
            "te",
            "host",
            "content-length",
            "plugvisor-caller",
            "plugvisor-new",
            "plugvisor-caller",
            "content-type",
            "proxy-authorization",
            "user-agent",
        ];
        let mut left = Fields::new();
        strip(&list(&names.map(|name| (name, "trailers"))), &mut left);
        let left: Vec<_> = left.iter().map(|field| std::str::from_utf8(field.name).unwrap()).collect();
        assert_eq!(left, ["x-one", "x-one", "key-bin", "traceparent", "te", "content-type", "user-agent"]);
    }

    #[test]
    fn another_te_goes() {
        let mut left = Fields::new();
        strip(&list(&[("te", "gzip")]), &mut left);
        assert!(left.is_empty());
    }

    #[test]
    fn heads_that_http2_does_not_allow() {
        let good = [(":method", "POST"), (":scheme", "http"), (":path", "/a/b"), ("content-type", "application/grpc")];
        let head = list(&good);
        assert!(request(&head).is_ok_and(|head| head.is_grpc && head.path == b"/a/b"));
        for bad in [
            &good[1..],
            &[good[0], good[1]],
            &[good[0], good[0], good[1], good[2]],
            &[good[3], good[0], good[1], good[2]],
            &[good[0], good[1], good[2], (":status", "200")],
            &[good[0], good[1], good[2], ("Upper", "x")],
            &[good[0], good[1], good[2], ("a b", "x")],
            &[good[0], good[1], good[2], ("", "x")],
            &[good[0], good[1], good[2], ("x", "a\r\nb")],
            &[good[0], good[1], (":path", "")],
            &[good[0], good[1], good[2], ("connection", "close")],
            &[good[0], good[1], good[2], ("content-length", "1"), ("content-length", "2")],
            &[good[0], good[1], good[2], ("content-length", "-1")],
        ] {
            assert_eq!(request(&list(bad)).err(), Some(Malformed), "{bad:?}");
        }
        assert_eq!(trailers(&list(&[("grpc-status", "0"), (":path", "/")])), Err(Malformed));
        assert_eq!(response(&list(&[("content-type", "application/grpc")])), Err(Malformed));
        let answered = |status, length| {
            let fields = [(":status", status), ("content-type", "application/grpc"), ("content-length", length)];
            response(&list(&fields))
        };
        assert_eq!(answered("404", "7"), Ok(ResponseHead { not_grpc: Some(404), length: Some(7) }));
        assert_eq!(answered("200", "7"), Ok(ResponseHead { not_grpc: None, length: Some(7) }));
    }

    #[test]
    fn grpc_is_known_by_its_content_type() {
        for good in ["application/grpc", "application/grpc+proto", "application/grpc;x=y"] {
            assert!(is_grpc(good.as_bytes()), "{good}");
        }
        for bad in ["", "application/json", "application/grpc-web", "text/application/grpc"] {
            assert!(!is_grpc(bad.as_bytes()), "{bad}");
        }
    }

    #[test]
    fn a_path_is_a_service_and_a_method() {
        assert_eq!(service_and_method("/a.B/C"), Some(("a.B", "C")));
        for bad in ["", "/", "a.B/C", "/a.B", "/a.B/", "//C", "/a.B/C/D", "*"] {
            assert_eq!(service_and_method(bad), None, "{bad:?} was accepted");
        }
    }
}
