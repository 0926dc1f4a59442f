//! How long a request's body is, when there is only one way to understand it, and which fields end at a proxy.

use std::fmt;

/// How a body is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is none.
    None,
    /// So many bytes.
    Length(u64),
    /// In chunks.
    Chunked,
}

/// Why it is refused: readers that disagree on where a request ends see different requests after it (request smuggling).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FramingError {
    /// Both a length and chunks.
    Both,
    /// More than one length.
    Lengths,
    /// A length that is no number.
    Length,
    /// A transfer coding other than `chunked` alone.
    Coding,
    /// A transfer coding in HTTP/1.0, which has none.
    OldVersion,
    /// No Host, or several.
    Hosts,
    /// A chunk whose size or end is not as it must be.
    Chunk,
}

impl fmt::Display for FramingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Both => "the request has both Content-Length and Transfer-Encoding",
            Self::Lengths => "the request has more than one Content-Length",
            Self::Length => "the request's Content-Length is not a number",
            Self::Coding => "the request's Transfer-Encoding is not chunked alone",
            Self::OldVersion => "an HTTP/1.0 request has a Transfer-Encoding",
            Self::Chunk => "the request has a chunk whose size or end is malformed",
            Self::Hosts => "an HTTP/1.1 request has exactly one Host",
        })
    }
}

impl std::error::Error for FramingError {}

impl Framing {
    /// The framing of a request with these fields, in any case; `old` for HTTP/1.0.
    ///
    /// # Errors
    ///
    /// When readers could disagree.
    pub fn of<'a>(fields: impl Iterator<Item = (&'a str, &'a [u8])>, old: bool) -> Result<Self, FramingError> {
        let (mut length, mut chunked, mut hosts) = (None, false, 0_u32);
        for (name, value) in fields {
            if name.eq_ignore_ascii_case("content-length") {
                let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
                let number = std::str::from_utf8(value).ok().filter(|_| digits).and_then(|text| text.parse().ok());
                let number = number.ok_or(FramingError::Length)?;
                // Equal ones too: a list of lengths is what smuggling is made of, and nobody needs it.
                if length.replace(number).is_some() {
                    return Err(FramingError::Lengths);
                }
            } else if name.eq_ignore_ascii_case("transfer-encoding") {
                if old {
                    return Err(FramingError::OldVersion);
                }
                if chunked || !value.eq_ignore_ascii_case(b"chunked") {
                    return Err(FramingError::Coding);
                }
                chunked = true;
            } else if name.eq_ignore_ascii_case("host") {
                hosts += 1;
            }
        }
        if hosts > 1 || (hosts == 0 && !old) {
            return Err(FramingError::Hosts);
        }
        match (length, chunked) {
            (Some(_), true) => Err(FramingError::Both),
            (Some(0) | None, false) => Ok(Self::None),
            (Some(length), false) => Ok(Self::Length(length)),
            (None, true) => Ok(Self::Chunked),
        }
    }
}

/// The size that the first line of a chunk says; extensions are ignored.
///
/// # Errors
///
/// When it is not a hexadecimal number of at most fifteen digits, perhaps with extensions.
pub fn chunk_size(line: &[u8]) -> Result<u64, FramingError> {
    let (digits, extensions) = match line.iter().position(|byte| *byte == b';') {
        Some(at) => (&line[..at], &line[at..]),
        None => (line, &[][..]),
    };
    let number = std::str::from_utf8(digits).ok().and_then(|text| u64::from_str_radix(text, 16).ok());
    let plain = extensions.iter().all(|byte| matches!(byte, b'\t' | b' '..=b'~'));
    let hexadecimal = (1..=15).contains(&digits.len()) && digits.iter().all(u8::is_ascii_hexdigit);
    number.filter(|_| plain && hexadecimal).ok_or(FramingError::Chunk)
}

/// Whether a field is for the next hop alone and ends at a proxy (RFC 9110, section 7.6.1); `connection` are the values of
/// all Connection fields, which may name more.
#[must_use]
pub fn is_hop_by_hop<'a>(name: &str, connection: impl Iterator<Item = &'a [u8]>) -> bool {
    const ALWAYS: [&str; 10] = [
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "http2-settings",
    ];
    let mut named = connection.flat_map(|value| value.split(|byte| *byte == b',')).map(<[u8]>::trim_ascii);
    ALWAYS.iter().any(|always| name.eq_ignore_ascii_case(always))
        || named.any(|named| named.eq_ignore_ascii_case(name.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(fields: &[(&str, &str)], old: bool) -> Result<Framing, FramingError> {
        Framing::of(fields.iter().map(|(name, value)| (*name, value.as_bytes())), old)
    }

    #[test]
    fn one_reading_or_none() {
        let table = [
            (&[("Host", "a")][..], false, Ok(Framing::None)),
            (&[], true, Ok(Framing::None)),
            (&[("Host", "a"), ("Content-Length", "0")], false, Ok(Framing::None)),
            (&[("Host", "a"), ("content-length", "12")], false, Ok(Framing::Length(12))),
            (&[("Host", "a"), ("TRANSFER-ENCODING", "Chunked")], false, Ok(Framing::Chunked)),
            (&[], false, Err(FramingError::Hosts)),
            (&[("Host", "a"), ("host", "a")], false, Err(FramingError::Hosts)),
            (
                &[("Host", "a"), ("Content-Length", "1"), ("Transfer-Encoding", "chunked")],
                false,
                Err(FramingError::Both),
            ),
            (
                &[("Host", "a"), ("Transfer-Encoding", "chunked"), ("Content-Length", "1")],
                false,
                Err(FramingError::Both),
            ),
            (&[("Host", "a"), ("Content-Length", "1"), ("Content-Length", "1")], false, Err(FramingError::Lengths)),
            (&[("Host", "a"), ("Content-Length", "1, 1")], false, Err(FramingError::Length)),
            (&[("Host", "a"), ("Content-Length", "+1")], false, Err(FramingError::Length)),
            (&[("Host", "a"), ("Content-Length", "0x1")], false, Err(FramingError::Length)),
            (&[("Host", "a"), ("Content-Length", "")], false, Err(FramingError::Length)),
            (&[("Host", "a"), ("Content-Length", "99999999999999999999")], false, Err(FramingError::Length)),
            (&[("Host", "a"), ("Transfer-Encoding", "gzip, chunked")], false, Err(FramingError::Coding)),
            (&[("Host", "a"), ("Transfer-Encoding", "identity")], false, Err(FramingError::Coding)),
            (&[("Host", "a"), ("Transfer-Encoding", "xchunked")], false, Err(FramingError::Coding)),
            (
                &[("Host", "a"), ("Transfer-Encoding", "chunked"), ("Transfer-Encoding", "chunked")],
                false,
                Err(FramingError::Coding),
            ),
            (&[("Transfer-Encoding", "chunked")], true, Err(FramingError::OldVersion)),
        ];
        for (fields, old, expected) in table {
            assert_eq!(of(fields, old), expected, "{fields:?} {old}");
        }
    }

    #[test]
    fn sizes_of_chunks_are_numbers() {
        for (line, size) in [("0", 0), ("1a", 26), ("1A;x=\"y\"", 26), ("00000f", 15)] {
            assert_eq!(chunk_size(line.as_bytes()), Ok(size), "{line}");
        }
        for line in ["", ";", "-1", "+1", "0x1", " 1", "1 ", "g", "1;\u{7f}", "1;\r", "1111111111111111", "1\t;a"] {
            assert_eq!(chunk_size(line.as_bytes()), Err(FramingError::Chunk), "{line:?}");
        }
    }

    #[test]
    fn a_connection_field_names_what_ends_here() {
        let connection = [&b"close, X-Private"[..], b" upgrade "];
        let ends = |name| is_hop_by_hop(name, connection.iter().copied());
        assert!(ends("X-PRIVATE") && ends("close") && ends("Upgrade") && ends("TE") && ends("Proxy-Connection"));
        assert!(!ends("Host") && !ends("Accept") && !ends("X-Private-Not"));
        assert!(is_hop_by_hop("Transfer-Encoding", std::iter::empty()));
    }
}
