//! Error codes (RFC 9113, section 7), and the errors that end a connection.

use std::fmt;

use super::hpack::HpackError;

/// Why a stream or a connection ends. Codes that nobody has named keep their number.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Code(pub u32);

impl Code {
    /// Nothing is wrong.
    pub const NO_ERROR: Self = Self(0);
    /// A rule was broken that has no code of its own.
    pub const PROTOCOL_ERROR: Self = Self(1);
    /// Flow control was not obeyed.
    pub const FLOW_CONTROL_ERROR: Self = Self(3);
    /// A frame came for a stream that is over.
    pub const STREAM_CLOSED: Self = Self(5);
    /// A frame has a size that it cannot have.
    pub const FRAME_SIZE_ERROR: Self = Self(6);
    /// The stream was not looked at.
    pub const REFUSED_STREAM: Self = Self(7);
    /// The stream is no longer wanted.
    pub const CANCEL: Self = Self(8);
    /// Header compression failed.
    pub const COMPRESSION_ERROR: Self = Self(9);
    /// The peer makes work for nothing.
    pub const ENHANCE_YOUR_CALM: Self = Self(11);
}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 14] = [
            "NO_ERROR",
            "PROTOCOL_ERROR",
            "INTERNAL_ERROR",
            "FLOW_CONTROL_ERROR",
            "SETTINGS_TIMEOUT",
            "STREAM_CLOSED",
            "FRAME_SIZE_ERROR",
            "REFUSED_STREAM",
            "CANCEL",
            "COMPRESSION_ERROR",
            "CONNECT_ERROR",
            "ENHANCE_YOUR_CALM",
            "INADEQUATE_SECURITY",
            "HTTP_1_1_REQUIRED",
        ];
        match usize::try_from(self.0).ok().and_then(|number| NAMES.get(number)) {
            Some(name) => f.write_str(name),
            None => write!(f, "error {}", self.0),
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What a peer did that ends its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} ({code})")]
pub struct ConnectionError {
    /// What it is told.
    pub code: Code,
    /// Which rule it broke.
    pub what: &'static str,
}

impl ConnectionError {
    pub(super) const fn protocol(what: &'static str) -> Self {
        Self { code: Code::PROTOCOL_ERROR, what }
    }

    pub(super) const fn size(what: &'static str) -> Self {
        Self { code: Code::FRAME_SIZE_ERROR, what }
    }

    pub(super) const fn flow(what: &'static str) -> Self {
        Self { code: Code::FLOW_CONTROL_ERROR, what }
    }

    pub(super) const fn flood(what: &'static str) -> Self {
        Self { code: Code::ENHANCE_YOUR_CALM, what }
    }
}

impl From<HpackError> for ConnectionError {
    fn from(error: HpackError) -> Self {
        let what = match error {
            HpackError::Truncated => "a header block ends within a field",
            HpackError::Integer => "a header block has an integer without bound",
            HpackError::Index => "a header block names a field that no table has",
            HpackError::Huffman => "a header block has a string that is not Huffman code",
            HpackError::TableSize => "a header block sets a table size that is not allowed there",
        };
        Self { code: Code::COMPRESSION_ERROR, what }
    }
}
