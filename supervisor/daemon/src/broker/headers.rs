//! What of a head's fields travels on, and what the broker sets itself.
//!
//! Metadata passes untouched but for fields that belong to one connection (RFC 9113, section 8.2.2), for a length that
//! the broker could not keep, and for everything under `plugvisor-`, which is the broker's own: whatever a peer wrote
//! there is dropped.

use http::{
    HeaderMap, HeaderName, HeaderValue, Uri,
    header::{
        CONNECTION, CONTENT_LENGTH, HOST, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE,
    },
    uri::{Authority, PathAndQuery, Scheme},
};

pub(super) const CALLER: HeaderName = HeaderName::from_static("plugvisor-caller");
pub(super) const HOPS: HeaderName = HeaderName::from_static("plugvisor-hops");
pub(super) const TOKEN: HeaderName = HeaderName::from_static("plugvisor-token");
pub(super) const TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

const OURS: &str = "plugvisor-";
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Drops what does not travel on.
pub(super) fn strip(headers: &mut HeaderMap) {
    // Most heads have none of these, so one pass over the names finds that out without hashing each of them.
    let strange = headers.keys().any(|name| {
        let text = name.as_str();
        text.starts_with(OURS)
            || matches!(text.as_bytes()[0], b'c' | b'k' | b'p' | b't' | b'u' | b'h') && belongs_to_connection(name)
    });
    if !strange {
        return;
    }
    let named: Vec<HeaderName> =
        headers.keys().filter(|name| name.as_str().starts_with(OURS) || belongs_to_connection(name)).cloned().collect();
    let trailers_welcome = headers.get(TE).is_some_and(|value| value == "trailers");
    for name in named {
        headers.remove(name);
    }
    if trailers_welcome {
        // The one value that HTTP/2 allows, and gRPC servers look for.
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

fn belongs_to_connection(name: &HeaderName) -> bool {
    [
        CONNECTION,
        // The broker may end what it passes on before its announced length; gRPC has no use for it.
        CONTENT_LENGTH,
        HOST,
        KEEP_ALIVE,
        PROXY_AUTHENTICATE,
        PROXY_AUTHORIZATION,
        PROXY_CONNECTION,
        TRANSFER_ENCODING,
        UPGRADE,
    ]
    .contains(name)
        || *name == TE
}

/// The target of a call at its provider. The authority is ours: what a caller dialled says nothing there.
pub(super) fn provider_uri(path: PathAndQuery) -> Uri {
    let mut parts = http::uri::Parts::default();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = Some(Authority::from_static("plugvisor"));
    parts.path_and_query = Some(path);
    // All three parts are there and already parsed; the other branch only keeps this free of panics.
    Uri::from_parts(parts).unwrap_or_default()
}

/// Splits `/package.Service/Method`.
pub(super) fn service_and_method(path: &str) -> Option<(&str, &str)> {
    let (service, method) = path.strip_prefix('/')?.split_once('/')?;
    (!service.is_empty() && !method.is_empty() && !method.contains('/')).then_some((service, method))
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, HeaderName, HeaderValue};

    use super::{service_and_method, strip};

    #[test]
    fn metadata_stays_and_the_rest_goes() {
        let mut headers = HeaderMap::new();
        for name in [
            "x-one",
            "x-one",
            "key-bin",
            "traceparent",
            "te",
            "host",
            "connection",
            "plugvisor-caller",
            "plugvisor-new",
            "plugvisor-caller",
            "content-type",
            "proxy-connection",
            "user-agent",
        ] {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static("trailers"));
        }
        strip(&mut headers);
        let mut left: Vec<&str> = headers.iter().map(|(name, _)| name.as_str()).collect();
        left.sort_unstable();
        assert_eq!(left, ["content-type", "key-bin", "te", "traceparent", "user-agent", "x-one", "x-one"]);
    }

    #[test]
    fn another_te_goes() {
        let mut headers = HeaderMap::new();
        headers.insert("te", HeaderValue::from_static("gzip"));
        strip(&mut headers);
        assert!(headers.is_empty());
    }

    #[test]
    fn a_path_is_a_service_and_a_method() {
        assert_eq!(service_and_method("/a.B/C"), Some(("a.B", "C")));
        for bad in ["", "/", "a.B/C", "/a.B", "/a.B/", "//C", "/a.B/C/D", "*"] {
            assert_eq!(service_and_method(bad), None, "{bad:?} was accepted");
        }
    }
}
