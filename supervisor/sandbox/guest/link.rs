//! What passes between a guest and its host: frames over one stream of bytes, a virtio-serial port. Pure.
//!
//! Many connections share that stream, so each has a number and a window: nobody sends more of a connection than the other
//! side has said that it takes, and a reader who does not read costs one window and holds up nobody else.
//!
//! ```text
//! 0      1        2        4        8
//! kind │ detail │ length │ number │ bytes …        little endian
//! ```
//!
//! The host believes nothing that a guest says: what does not fit is an error, and ends the machine.

/// The version that both sides must have; they are built together.
pub(crate) const VERSION: u8 = 3;

/// The bytes before a frame's own.
pub(crate) const HEAD: usize = 8;

/// The most bytes that one frame carries.
pub(crate) const MOST_DATA: usize = 16 << 10;

/// How much of a connection may be under way in one direction.
pub(crate) const WINDOW: u32 = 64 << 10;

/// Where a connection leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// From the host to the plugin's worker socket.
    Worker,
    /// From the plugin to its broker socket.
    Broker,
    /// From the plugin to the egress proxy.
    Egress,
    /// What the plugin prints.
    Stdout,
    /// What it prints as errors.
    Stderr,
    /// From the guest to who answers for the plugin's data.
    Files,
    /// From the host to a port of TCP at which the plugin listens in its guest; its frame carries the port.
    Port(u16),
}

/// The detail of [`Target::Port`].
const PORT: u8 = 6;

impl Target {
    /// Those that are said by the detail alone, which is their place here.
    const PLAIN: [Self; 6] = [Self::Worker, Self::Broker, Self::Egress, Self::Stdout, Self::Stderr, Self::Files];

    const fn detail(self) -> u8 {
        match self {
            Self::Worker => 0,
            Self::Broker => 1,
            Self::Egress => 2,
            Self::Stdout => 3,
            Self::Stderr => 4,
            Self::Files => 5,
            Self::Port(_) => PORT,
        }
    }

    fn plain(detail: u8) -> Option<Self> {
        Self::PLAIN.get(usize::from(detail)).copied()
    }
}

/// One message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Frame<'a> {
    /// The guest's first: it listens, and is about to start the plugin.
    Hello { version: u8 },
    /// A connection with a new number.
    Open { stream: u32, target: Target },
    /// Bytes of a connection.
    Data { stream: u32, bytes: &'a [u8] },
    /// No more bytes come of it.
    End { stream: u32 },
    /// It is over in both directions.
    Reset { stream: u32 },
    /// So many more bytes of it are taken.
    Credit { stream: u32, bytes: u32 },
    /// To the guest: a signal for the plugin.
    Signal { number: u32 },
    /// From the guest: the plugin was killed for memory.
    OutOfMemory,
    /// From the guest, its last: how the plugin ended.
    Ended { signal: bool, value: i32 },
}

impl Frame<'_> {
    /// Appends it.
    pub(crate) fn write(self, to: &mut Vec<u8>) {
        let (kind, detail, number, bytes): (u8, u8, u32, &[u8]) = match self {
            Self::Hello { version } => (1, version, 0, &[]),
            Self::Open { stream, target: target @ Target::Port(port) } => {
                (2, target.detail(), stream, &port.to_le_bytes())
            }
            Self::Open { stream, target } => (2, target.detail(), stream, &[]),
            Self::Data { stream, bytes } => (3, 0, stream, bytes),
            Self::End { stream } => (4, 0, stream, &[]),
            Self::Reset { stream } => (5, 0, stream, &[]),
            Self::Credit { stream, bytes } => (6, 0, stream, &bytes.to_le_bytes()),
            Self::Signal { number } => (7, 0, number, &[]),
            Self::OutOfMemory => (8, 0, 0, &[]),
            Self::Ended { signal, value } => (9, u8::from(signal), value.cast_unsigned(), &[]),
        };
        // Callers send no more than MOST_DATA at once, which a u16 holds.
        let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
        to.extend_from_slice(&[kind, detail]);
        to.extend_from_slice(&length.to_le_bytes());
        to.extend_from_slice(&number.to_le_bytes());
        to.extend_from_slice(&bytes[..usize::from(length)]);
    }
}

/// Why what came is no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Malformed {
    /// No frame has this kind, or not this detail.
    Kind,
    /// It is longer than one may be, or not as long as one of its kind is.
    Length,
}

/// The first frame of these bytes, and how long it is; `None` when it is not whole yet.
pub(crate) fn read(bytes: &[u8]) -> Result<Option<(Frame<'_>, usize)>, Malformed> {
    let Some((&[kind, detail, low, high, n0, n1, n2, n3], rest)) = bytes.split_first_chunk::<HEAD>() else {
        return Ok(None);
    };
    let length = usize::from(u16::from_le_bytes([low, high]));
    let number = u32::from_le_bytes([n0, n1, n2, n3]);
    let fits = match (kind, detail) {
        (2, PORT) => length == 2,
        (3, _) => (1..=MOST_DATA).contains(&length),
        (6, _) => length == 4,
        _ => length == 0,
    };
    if !fits {
        return Err(Malformed::Length);
    }
    let Some(body) = rest.get(..length) else { return Ok(None) };
    let frame = match (kind, detail) {
        (1, version) => Frame::Hello { version },
        (2, PORT) => {
            let port = body.first_chunk().copied().map(u16::from_le_bytes).ok_or(Malformed::Length)?;
            Frame::Open { stream: number, target: Target::Port(port) }
        }
        (2, target) => Frame::Open { stream: number, target: Target::plain(target).ok_or(Malformed::Kind)? },
        (3, 0) => Frame::Data { stream: number, bytes: body },
        (4, 0) => Frame::End { stream: number },
        (5, 0) => Frame::Reset { stream: number },
        (6, 0) => {
            let bytes = body.first_chunk().copied().map(u32::from_le_bytes).ok_or(Malformed::Length)?;
            Frame::Credit { stream: number, bytes }
        }
        (7, 0) => Frame::Signal { number },
        (8, 0) => Frame::OutOfMemory,
        (9, signal @ (0 | 1)) => Frame::Ended { signal: signal == 1, value: number.cast_signed() },
        _ => return Err(Malformed::Kind),
    };
    Ok(Some((frame, HEAD + length)))
}
