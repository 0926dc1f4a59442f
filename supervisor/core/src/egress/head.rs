//! Where a request's head ends, read strictly: what two readers could understand differently is refused before any parser
//! sees it (RFC 9112, sections 2.2 and 5.2). The fields themselves are read by a parser elsewhere.

use std::fmt;

/// Bounds of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadLimits {
    /// All of it, in bytes.
    pub bytes: usize,
    /// Its fields.
    pub fields: usize,
}

/// Why a head is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadError {
    /// It is longer than allowed.
    TooLong,
    /// It has more fields than allowed.
    TooManyFields,
    /// A line that does not end in CR LF.
    LineEnd,
    /// A field on several lines.
    Folded,
    /// A control character.
    Control,
    /// No request line, or a field without a name.
    Empty,
}

impl fmt::Display for HeadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLong => "the request's head is too long",
            Self::TooManyFields => "the request has too many header fields",
            Self::LineEnd => "a line of the request's head does not end in CR LF",
            Self::Folded => "a header field is folded over several lines",
            Self::Control => "the request's head has a control character",
            Self::Empty => "the request's head has a line without a name",
        })
    }
}

impl std::error::Error for HeadError {}

/// The length of the head that these bytes begin with, its empty line included; `None` when it is not all there yet.
///
/// # Errors
///
/// As soon as the bytes can be no head within the limits.
pub fn head_end(bytes: &[u8], limits: HeadLimits) -> Result<Option<usize>, HeadError> {
    let (mut start, mut lines) = (0, 0_usize);
    for at in 0..bytes.len().min(limits.bytes) {
        match bytes[at] {
            b'\n' if at > start && bytes[at - 1] == b'\r' => {
                let line = &bytes[start..at - 1];
                start = at + 1;
                match line {
                    [] if lines == 0 => return Err(HeadError::Empty),
                    [] => return Ok(Some(at + 1)),
                    [b' ' | b'\t', ..] if lines > 0 => return Err(HeadError::Folded),
                    [b' ' | b'\t' | b':', ..] => return Err(HeadError::Empty),
                    _ => {}
                }
                lines += 1;
                // The first line is the request's.
                if lines > limits.fields + 1 {
                    return Err(HeadError::TooManyFields);
                }
            }
            b'\n' => return Err(HeadError::LineEnd),
            // What comes after it is seen with it, or is not there yet.
            b'\r' if bytes.get(at + 1).is_some_and(|next| *next != b'\n') => return Err(HeadError::LineEnd),
            b'\r' | b'\t' | b' '..=b'~' | 0x80.. => {}
            0..=0x1f | 0x7f => return Err(HeadError::Control),
        }
    }
    if bytes.len() >= limits.bytes { Err(HeadError::TooLong) } else { Ok(None) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: HeadLimits = HeadLimits { bytes: 256, fields: 4 };

    #[test]
    fn a_head_is_taken_whole_or_refused() {
        let whole = b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n";
        assert_eq!(head_end(whole, LIMITS), Ok(Some(whole.len())));
        let mut more = whole.to_vec();
        more.extend_from_slice(b"\n\x00the body");
        assert_eq!(head_end(&more, LIMITS), Ok(Some(whole.len())), "what comes after is not its business");
        for length in 0..whole.len() {
            assert_eq!(head_end(&whole[..length], LIMITS), Ok(None), "{length}");
        }
        let long = format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "x".repeat(300));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(5));
        let exact = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(4));
        assert!(matches!(head_end(exact.as_bytes(), LIMITS), Ok(Some(_))));
        for (text, error) in [
            (long.as_str(), HeadError::TooLong),
            (&many, HeadError::TooManyFields),
            ("GET / HTTP/1.1\nHost: a\n\n", HeadError::LineEnd),
            ("GET / HTTP/1.1\r\nHost: a\n\r\n", HeadError::LineEnd),
            ("GET / HTTP/1.1\r\nHost: a\rB: c\r\n\r\n", HeadError::LineEnd),
            ("GET / HTTP/1.1\r\r\nHost: a\r\n\r\n", HeadError::LineEnd),
            ("GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n", HeadError::Folded),
            ("GET / HTTP/1.1\r\nHost: a\r\n\tb\r\n\r\n", HeadError::Folded),
            ("GET / HTTP/1.1\r\n Host: a\r\n\r\n", HeadError::Folded),
            ("GET / HTTP/1.1\r\nA: \0\r\n\r\n", HeadError::Control),
            ("GET / HTTP/1.1\r\n: a\r\n\r\n", HeadError::Empty),
            ("\r\nGET / HTTP/1.1\r\n\r\n", HeadError::Empty),
            (" GET / HTTP/1.1\r\n\r\n", HeadError::Empty),
        ] {
            assert_eq!(head_end(text.as_bytes(), LIMITS), Err(error), "{text:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// What is let through ends as every reader of HTTP ends it, and comes in pieces as it comes at once.
        #[test]
        fn readers_agree(text in "([A-Za-z: ]{0,6}(\r\n|\n|\r|\t| )?){0,12}(\r\n\r\n)?.{0,4}") {
            let bytes = text.as_bytes();
            let at_once = head_end(bytes, LIMITS);
            if let Ok(Some(end)) = at_once {
                let first = bytes.windows(4).position(|four| four == b"\r\n\r\n").expect("an empty line");
                prop_assert_eq!(end, first + 4);
                prop_assert!(!bytes[..end].windows(2).any(|two| two[1] == b'\n' && two[0] != b'\r'));
            }
            let mut in_pieces = Ok(None);
            for length in 0..=bytes.len() {
                in_pieces = head_end(&bytes[..length], LIMITS);
                if in_pieces != Ok(None) {
                    break;
                }
            }
            prop_assert_eq!(in_pieces.is_err(), at_once.is_err());
            prop_assert_eq!(in_pieces.ok(), at_once.ok());
        }
    }
}
