//! Frames: nine bytes of head, then the payload (RFC 9113, section 4.1).

/// The length of a frame's head.
pub const HEAD: usize = 9;
/// What a client says first (section 3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The largest frame that every peer takes.
pub const DEFAULT_MAX_SIZE: u32 = 1 << 14;

pub(super) mod flag {
    pub(in super::super) const END_STREAM: u8 = 0x1;
    pub(in super::super) const ACK: u8 = 0x1;
    pub(in super::super) const END_HEADERS: u8 = 0x4;
    pub(in super::super) const PADDED: u8 = 0x8;
    pub(in super::super) const PRIORITY: u8 = 0x20;
}

/// A frame's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A part of a body.
    Data,
    /// The beginning of a header block.
    Headers,
    /// Advice that nobody follows any more.
    Priority,
    /// The end of a stream before its time.
    ResetStream,
    /// How the peer wants to be spoken to.
    Settings,
    /// A promise of a stream; forbidden here.
    PushPromise,
    /// Whether somebody is there.
    Ping,
    /// The connection will end.
    GoAway,
    /// Room for more of a body.
    WindowUpdate,
    /// More of a header block.
    Continuation,
    /// Anything else, to be ignored (section 5.5).
    Unknown,
}

impl Kind {
    const fn of(number: u8) -> Self {
        match number {
            0 => Self::Data,
            1 => Self::Headers,
            2 => Self::Priority,
            3 => Self::ResetStream,
            4 => Self::Settings,
            5 => Self::PushPromise,
            6 => Self::Ping,
            7 => Self::GoAway,
            8 => Self::WindowUpdate,
            9 => Self::Continuation,
            10..=u8::MAX => Self::Unknown,
        }
    }

    const fn number(self) -> u8 {
        match self {
            Self::Data => 0,
            Self::Headers => 1,
            Self::Priority => 2,
            Self::ResetStream => 3,
            Self::Settings => 4,
            Self::PushPromise => 5,
            Self::Ping => 6,
            Self::GoAway => 7,
            Self::WindowUpdate => 8,
            Self::Continuation => 9,
            Self::Unknown => u8::MAX,
        }
    }
}

/// A frame's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Bytes of payload.
    pub length: u32,
    /// The type.
    pub kind: Kind,
    /// The flags, as they came.
    pub flags: u8,
    /// The stream; 0 is the connection.
    pub stream: u32,
}

impl Head {
    /// Reads a head.
    #[must_use]
    pub const fn read(bytes: [u8; HEAD]) -> Self {
        let [a, b, c, kind, flags, w, x, y, z] = bytes;
        Self {
            length: u32::from_be_bytes([0, a, b, c]),
            kind: Kind::of(kind),
            flags,
            // The first bit is reserved.
            stream: u32::from_be_bytes([w, x, y, z]) & 0x7fff_ffff,
        }
    }

    /// Writes a head.
    #[must_use]
    pub const fn bytes(self) -> [u8; HEAD] {
        let [_, a, b, c] = self.length.to_be_bytes();
        let [w, x, y, z] = self.stream.to_be_bytes();
        [a, b, c, self.kind.number(), self.flags, w, x, y, z]
    }

    pub(super) const fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Head;

    proptest! {
        #[test]
        fn what_is_written_is_read(bytes in any::<[u8; 9]>()) {
            let head = Head::read(bytes);
            let mut expected = bytes;
            expected[5] &= 0x7f;
            if bytes[3] > 9 {
                expected[3] = 255;
            }
            prop_assert_eq!(head.bytes(), expected);
        }
    }
}
