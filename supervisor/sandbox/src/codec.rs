//! Packets to messages and back: the header, the numbers of the kinds, and the bounds.
//!
//! A packet is a header of [`HEADER_LEN`] bytes, little-endian (version `u16`, kind `u16`, request id `u64`), and the
//! body of that kind in postcard. Decoding is total: any bytes give a message or a [`DecodeError`], never a panic, and
//! no allocation is larger than the packet says it can fill. What a field may hold is not judged here.

use serde::{Serialize, de::DeserializeOwned};

use crate::protocol::{
    ControlState, Exit, Hello, Host, Import, Imported, Launch, LaunchId, Launched, Limited, Limits, Listed, MAX_PACKET,
    Notice, PolicyFile, Reattached, Refusal, Reply, Request, Stats, VERSION,
};

/// The header's length in bytes.
pub const HEADER_LEN: usize = 12;

/// The numbers of the kinds. Requests are 1 to 99; a reply is its request's number plus 0x100; notices are from 0x200.
/// Numbers are never reused.
pub mod kind {
    /// [`Request::Hello`](crate::protocol::Request::Hello).
    pub const HELLO: u16 = 1;
    /// [`Request::Probe`](crate::protocol::Request::Probe).
    pub const PROBE: u16 = 2;
    /// [`Request::Import`](crate::protocol::Request::Import).
    pub const IMPORT: u16 = 3;
    /// [`Request::Forget`](crate::protocol::Request::Forget).
    pub const FORGET: u16 = 4;
    /// [`Request::Launch`](crate::protocol::Request::Launch).
    pub const LAUNCH: u16 = 5;
    /// [`Request::Signal`](crate::protocol::Request::Signal).
    pub const SIGNAL: u16 = 6;
    /// [`Request::Kill`](crate::protocol::Request::Kill).
    pub const KILL: u16 = 9;
    /// [`Request::Inspect`](crate::protocol::Request::Inspect).
    pub const INSPECT: u16 = 15;
    /// [`Request::Freeze`](crate::protocol::Request::Freeze).
    pub const FREEZE: u16 = 7;
    /// [`Request::Thaw`](crate::protocol::Request::Thaw).
    pub const THAW: u16 = 8;
    /// [`Request::Limits`](crate::protocol::Request::Limits).
    pub const LIMITS: u16 = 10;
    /// [`Request::Stats`](crate::protocol::Request::Stats).
    pub const STATS: u16 = 11;
    /// [`Request::List`](crate::protocol::Request::List).
    pub const LIST: u16 = 12;
    /// [`Request::HoldFd`](crate::protocol::Request::HoldFd).
    pub const HOLD_FD: u16 = 13;
    /// [`Request::TakeFd`](crate::protocol::Request::TakeFd).
    pub const TAKE_FD: u16 = 14;
    /// [`Request::Reattach`](crate::protocol::Request::Reattach).
    pub const REATTACH: u16 = 16;
    /// [`Request::Acknowledge`](crate::protocol::Request::Acknowledge).
    pub const ACKNOWLEDGE: u16 = 17;
    /// [`Request::Inward`](crate::protocol::Request::Inward).
    pub const INWARD: u16 = 19;
    /// [`Request::End`](crate::protocol::Request::End).
    pub const END: u16 = 18;
    /// [`Request::Policy`](crate::protocol::Request::Policy).
    pub const POLICY: u16 = 20;
    /// [`Reply::Hello`](crate::protocol::Reply::Hello).
    pub const HELLO_REPLY: u16 = 0x101;
    /// [`Reply::Probe`](crate::protocol::Reply::Probe).
    pub const PROBE_REPLY: u16 = 0x102;
    /// [`Reply::Imported`](crate::protocol::Reply::Imported).
    pub const IMPORTED: u16 = 0x103;
    /// [`Reply::Launched`](crate::protocol::Reply::Launched).
    pub const LAUNCHED: u16 = 0x105;
    /// [`Reply::Inspected`](crate::protocol::Reply::Inspected).
    pub const INSPECTED: u16 = 0x10f;
    /// [`Reply::Limited`](crate::protocol::Reply::Limited).
    pub const LIMITED: u16 = 0x10a;
    /// [`Reply::Stats`](crate::protocol::Reply::Stats).
    pub const STATS_REPLY: u16 = 0x10b;
    /// [`Reply::Listed`](crate::protocol::Reply::Listed).
    pub const LISTED: u16 = 0x10c;
    /// [`Reply::Taken`](crate::protocol::Reply::Taken).
    pub const TAKEN: u16 = 0x10e;
    /// [`Reply::Reattached`](crate::protocol::Reply::Reattached).
    pub const REATTACHED: u16 = 0x110;
    /// [`Reply::Inward`](crate::protocol::Reply::Inward).
    pub const INWARD_REPLY: u16 = 0x113;
    /// [`Reply::Policy`](crate::protocol::Reply::Policy).
    pub const POLICY_REPLY: u16 = 0x114;
    /// [`Reply::Done`](crate::protocol::Reply::Done).
    pub const DONE: u16 = 0x1fe;
    /// [`Reply::Refused`](crate::protocol::Reply::Refused).
    pub const REFUSED: u16 = 0x1ff;
    /// [`Notice::Exited`](crate::protocol::Notice::Exited).
    pub const EXITED: u16 = 0x201;
    /// [`Notice::OutOfMemory`](crate::protocol::Notice::OutOfMemory).
    pub const OUT_OF_MEMORY: u16 = 0x202;
}

/// What comes from the launcher: the answer to a request, or a notice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromLauncher {
    /// The one answer to the request with this id.
    Reply {
        /// The request's id.
        id: u64,
        /// The answer.
        reply: Reply,
    },
    /// Something that was not asked for.
    Notice(Notice),
}

/// Why bytes are not a message. `id` is the request id, when there was one to read, so that a refusal can name it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Shorter than a header.
    #[error("a packet of {len} bytes is shorter than the header of {HEADER_LEN}")]
    Short {
        /// The packet's length.
        len: usize,
    },
    /// Longer than [`MAX_PACKET`].
    #[error("a packet of {len} bytes is longer than {MAX_PACKET}")]
    Long {
        /// The packet's length.
        len: usize,
    },
    /// Another protocol version in the header.
    #[error("the packet has protocol version {version}, this side speaks {VERSION}")]
    Version {
        /// The request's id.
        id: u64,
        /// The other side's version.
        version: u16,
    },
    /// A kind that does not exist, or that does not go in this direction.
    #[error("kind {kind} is not one that this side accepts")]
    Kind {
        /// The request's id.
        id: u64,
        /// The kind's number.
        kind: u16,
    },
    /// The body does not match the kind.
    #[error("the body does not fit kind {kind}: {why}")]
    Body {
        /// The request's id.
        id: u64,
        /// The kind's number.
        kind: u16,
        /// What the decoder said.
        why: String,
    },
}

impl DecodeError {
    /// The request id of the packet; 0 when it was too short to hold one.
    #[must_use]
    pub const fn id(&self) -> u64 {
        match self {
            Self::Short { .. } | Self::Long { .. } => 0,
            Self::Version { id, .. } | Self::Kind { id, .. } | Self::Body { id, .. } => *id,
        }
    }
}

/// Why a message cannot be a packet.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The packet would be longer than [`MAX_PACKET`].
    #[error("the message is {len} bytes long, a packet holds {MAX_PACKET}")]
    Long {
        /// The packet's length.
        len: usize,
    },
    /// The serializer failed.
    #[error("the message cannot be written: {0}")]
    Body(String),
}

/// A request as a packet.
pub fn encode_request(id: u64, request: &Request) -> Result<Vec<u8>, EncodeError> {
    match request {
        Request::Hello(hello) => packet(kind::HELLO, id, hello),
        Request::Probe => packet(kind::PROBE, id, &()),
        Request::Policy => packet(kind::POLICY, id, &()),
        Request::Launch(launch) => packet(kind::LAUNCH, id, launch),
        Request::Signal { launch, signal } => packet(kind::SIGNAL, id, &(launch, signal)),
        Request::Kill { launch } => packet(kind::KILL, id, launch),
        Request::Inspect { launch } => packet(kind::INSPECT, id, launch),
        Request::Freeze { launch } => packet(kind::FREEZE, id, launch),
        Request::Thaw { launch } => packet(kind::THAW, id, launch),
        Request::Limits { launch, limits } => packet(kind::LIMITS, id, &(launch, limits)),
        Request::Stats { launch } => packet(kind::STATS, id, launch),
        Request::List { after } => packet(kind::LIST, id, after),
        Request::HoldFd { name } => packet(kind::HOLD_FD, id, name),
        Request::TakeFd { name, keep } => packet(kind::TAKE_FD, id, &(name, keep)),
        Request::Reattach { launch } => packet(kind::REATTACH, id, launch),
        Request::Inward { launch, from } => packet(kind::INWARD, id, &(launch, from)),
        Request::Acknowledge { launch } => packet(kind::ACKNOWLEDGE, id, launch),
        Request::End => packet(kind::END, id, &()),
        Request::Import(step) => packet(kind::IMPORT, id, step),
        Request::Forget { bundle } => packet(kind::FORGET, id, bundle),
    }
}

/// A packet as a request and its id.
pub fn decode_request(bytes: &[u8]) -> Result<(u64, Request), DecodeError> {
    let (kind, id, body) = header(bytes)?;
    let request = match kind {
        kind::HELLO => Request::Hello(parse::<Hello>(kind, id, body)?),
        kind::PROBE => {
            parse::<()>(kind, id, body)?;
            Request::Probe
        }
        kind::POLICY => {
            parse::<()>(kind, id, body)?;
            Request::Policy
        }
        kind::LAUNCH => Request::Launch(Box::new(parse::<Launch>(kind, id, body)?)),
        kind::SIGNAL => {
            let (launch, signal) = parse::<(LaunchId, i32)>(kind, id, body)?;
            Request::Signal { launch, signal }
        }
        kind::KILL => Request::Kill { launch: parse(kind, id, body)? },
        kind::INSPECT => Request::Inspect { launch: parse(kind, id, body)? },
        kind::FREEZE => Request::Freeze { launch: parse(kind, id, body)? },
        kind::THAW => Request::Thaw { launch: parse(kind, id, body)? },
        kind::LIMITS => {
            let (launch, limits) = parse::<(LaunchId, Limits)>(kind, id, body)?;
            Request::Limits { launch, limits }
        }
        kind::STATS => Request::Stats { launch: parse(kind, id, body)? },
        kind::LIST => Request::List { after: parse(kind, id, body)? },
        kind::HOLD_FD => Request::HoldFd { name: parse(kind, id, body)? },
        kind::TAKE_FD => {
            let (name, keep) = parse::<(String, bool)>(kind, id, body)?;
            Request::TakeFd { name, keep }
        }
        kind::REATTACH => Request::Reattach { launch: parse(kind, id, body)? },
        kind::INWARD => {
            let (launch, from) = parse::<(LaunchId, u16)>(kind, id, body)?;
            Request::Inward { launch, from }
        }
        kind::ACKNOWLEDGE => Request::Acknowledge { launch: parse(kind, id, body)? },
        kind::END => {
            parse::<()>(kind, id, body)?;
            Request::End
        }
        kind::IMPORT => Request::Import(parse::<Import>(kind, id, body)?),
        kind::FORGET => Request::Forget { bundle: parse(kind, id, body)? },
        _ => return Err(DecodeError::Kind { id, kind }),
    };
    Ok((id, request))
}

/// A reply as a packet.
pub fn encode_reply(id: u64, reply: &Reply) -> Result<Vec<u8>, EncodeError> {
    match reply {
        Reply::Hello { version, pid } => packet(kind::HELLO_REPLY, id, &(version, pid)),
        Reply::Probe(probed) => packet(kind::PROBE_REPLY, id, probed),
        Reply::Policy(file) => packet(kind::POLICY_REPLY, id, file),
        Reply::Launched(launched) => packet(kind::LAUNCHED, id, launched),
        Reply::Done => packet(kind::DONE, id, &()),
        Reply::Inspected(controls) => packet(kind::INSPECTED, id, controls),
        Reply::Imported(imported) => packet(kind::IMPORTED, id, imported),
        Reply::Refused(refusal) => packet(kind::REFUSED, id, refusal),
        Reply::Limited(limits) => packet(kind::LIMITED, id, limits),
        Reply::Stats(stats) => packet(kind::STATS_REPLY, id, stats),
        Reply::Listed(listed) => packet(kind::LISTED, id, listed),
        Reply::Taken => packet(kind::TAKEN, id, &()),
        Reply::Reattached(reattached) => packet(kind::REATTACHED, id, reattached),
        Reply::Inward { all } => packet(kind::INWARD_REPLY, id, all),
    }
}

/// A notice as a packet; its request id is 0.
pub fn encode_notice(notice: &Notice) -> Result<Vec<u8>, EncodeError> {
    match notice {
        Notice::Exited { launch, exit, oom_killed } => packet(kind::EXITED, 0, &(launch, exit, oom_killed)),
        Notice::OutOfMemory { launch } => packet(kind::OUT_OF_MEMORY, 0, launch),
    }
}

/// A packet as what the launcher says.
pub fn decode_from_launcher(bytes: &[u8]) -> Result<FromLauncher, DecodeError> {
    let (kind, id, body) = header(bytes)?;
    let reply = match kind {
        kind::HELLO_REPLY => {
            let (version, pid) = parse(kind, id, body)?;
            Reply::Hello { version, pid }
        }
        kind::PROBE_REPLY => Reply::Probe(parse::<Host>(kind, id, body)?),
        kind::POLICY_REPLY => Reply::Policy(parse::<PolicyFile>(kind, id, body)?),
        kind::LAUNCHED => Reply::Launched(parse::<Launched>(kind, id, body)?),
        kind::DONE => {
            parse::<()>(kind, id, body)?;
            Reply::Done
        }
        kind::INSPECTED => Reply::Inspected(parse::<Vec<ControlState>>(kind, id, body)?),
        kind::IMPORTED => Reply::Imported(parse::<Imported>(kind, id, body)?),
        kind::REFUSED => Reply::Refused(parse::<Refusal>(kind, id, body)?),
        kind::LIMITED => Reply::Limited(parse::<Limited>(kind, id, body)?),
        kind::STATS_REPLY => Reply::Stats(parse::<Stats>(kind, id, body)?),
        kind::LISTED => Reply::Listed(parse::<Listed>(kind, id, body)?),
        kind::TAKEN => {
            parse::<()>(kind, id, body)?;
            Reply::Taken
        }
        kind::INWARD_REPLY => Reply::Inward { all: parse(kind, id, body)? },
        kind::REATTACHED => Reply::Reattached(parse::<Reattached>(kind, id, body)?),
        kind::EXITED => {
            let (launch, exit, oom_killed) = parse::<(LaunchId, Exit, bool)>(kind, id, body)?;
            return Ok(FromLauncher::Notice(Notice::Exited { launch, exit, oom_killed }));
        }
        kind::OUT_OF_MEMORY => {
            return Ok(FromLauncher::Notice(Notice::OutOfMemory { launch: parse(kind, id, body)? }));
        }
        _ => return Err(DecodeError::Kind { id, kind }),
    };
    Ok(FromLauncher::Reply { id, reply })
}

fn packet<T: Serialize + ?Sized>(kind: u16, id: u64, body: &T) -> Result<Vec<u8>, EncodeError> {
    let mut bytes = Vec::with_capacity(256);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&kind.to_le_bytes());
    bytes.extend_from_slice(&id.to_le_bytes());
    let bytes = postcard::to_extend(body, bytes).map_err(|error| EncodeError::Body(error.to_string()))?;
    if bytes.len() > MAX_PACKET {
        return Err(EncodeError::Long { len: bytes.len() });
    }
    Ok(bytes)
}

fn header(bytes: &[u8]) -> Result<(u16, u64, &[u8]), DecodeError> {
    let len = bytes.len();
    if len > MAX_PACKET {
        return Err(DecodeError::Long { len });
    }
    let short = DecodeError::Short { len };
    let (version, rest) = bytes.split_first_chunk::<2>().ok_or_else(|| short.clone())?;
    let (kind, rest) = rest.split_first_chunk::<2>().ok_or_else(|| short.clone())?;
    let (id, body) = rest.split_first_chunk::<8>().ok_or(short)?;
    let id = u64::from_le_bytes(*id);
    let version = u16::from_le_bytes(*version);
    if version != VERSION {
        return Err(DecodeError::Version { id, version });
    }
    Ok((u16::from_le_bytes(*kind), id, body))
}

fn parse<T: DeserializeOwned>(kind: u16, id: u64, body: &[u8]) -> Result<T, DecodeError> {
    match postcard::take_from_bytes::<T>(body) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(DecodeError::Body { id, kind, why: format!("{} bytes too many", rest.len()) }),
        Err(error) => Err(DecodeError::Body { id, kind, why: error.to_string() }),
    }
}
