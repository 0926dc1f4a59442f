//! What the child tells the launcher: small fixed messages on a private socket, now and then with a descriptor.
//!
//! The other end is held by our own code only: it is closed in the program by the exec.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{BorrowedFd, OwnedFd},
};

use rustix::{
    cmsg_space,
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
        recv, recvmsg, send as send_bytes, sendmsg,
    },
    process::WaitStatus,
};

use crate::{step::Step, timing::Marks};

/// The most descriptors in a packet to a child.
const MOST: usize = 8;
/// The part before the marks.
const HEAD: usize = 6;
/// Every message has this size.
const SIZE: usize = HEAD + Marks::SIZE;

/// One message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// Setting up failed; nothing else follows.
    Failed { step: Step, errno: i32 },
    /// From a spare: it waits for its order.
    Ready,
    /// From the program, with its pidfd: all walls but the last are up, seccomp and exec come next.
    Executing { marks: Marks },
    /// Before its mounts, with a TCP socket that listens in its network namespace.
    Listening,
    /// Before its mounts, with a TCP socket of its network namespace that is not connected yet.
    Inward,
    /// From the program, with the listener that answers for its exec.
    Asks,
    /// From the init or the guard: how the program ended.
    Ended { signal: bool, value: i32 },
}

impl Message {
    /// How a process ended.
    pub(crate) fn of(status: WaitStatus) -> Self {
        match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Self::Ended { signal: false, value: code },
            (None, signal) => Self::Ended { signal: true, value: signal.unwrap_or(libc::SIGKILL) },
        }
    }

    fn encode(self) -> [u8; SIZE] {
        let (tag, detail, value, marks) = match self {
            Self::Failed { step, errno } => (1, step as u8, errno, None),
            Self::Ready => (3, 0, 0, None),
            Self::Executing { marks } => (4, 0, 0, Some(marks)),
            Self::Asks => (7, 0, 0, None),
            Self::Ended { signal, value } => (5, u8::from(signal), value, None),
            Self::Listening => (6, 0, 0, None),
            Self::Inward => (8, 0, 0, None),
        };
        let mut bytes = [0; SIZE];
        bytes[0] = tag;
        bytes[1] = detail;
        bytes[2..HEAD].copy_from_slice(&value.to_le_bytes());
        bytes[HEAD..].copy_from_slice(&marks.unwrap_or_default().to_bytes());
        bytes
    }

    fn decode(bytes: &[u8; SIZE]) -> Option<Self> {
        let ([tag, detail, value @ ..], marks) = bytes.split_first_chunk::<HEAD>()?;
        let value = i32::from_le_bytes(*value);
        Some(match tag {
            1 => Self::Failed { step: Step::from_number(*detail)?, errno: value },
            3 => Self::Ready,
            4 => Self::Executing { marks: Marks::from_bytes(marks.try_into().ok()?) },
            7 => Self::Asks,
            5 => Self::Ended { signal: *detail != 0, value },
            6 => Self::Listening,
            8 => Self::Inward,
            _ => return None,
        })
    }
}

/// The flags of the one sendmsg(2) that a traced program makes without being seen: before its listener is sent, nobody
/// answers. MSG_CONFIRM and MSG_DONTROUTE mean nothing to a Unix socket, and nobody sets them there.
pub(crate) const UNSEEN: SendFlags = SendFlags::NOSIGNAL.union(SendFlags::CONFIRM).union(SendFlags::DONTROUTE);

/// Sends a message.
pub(crate) fn send(socket: BorrowedFd<'_>, message: &Message, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    send_with(socket, message, descriptor, SendFlags::NOSIGNAL)
}

/// Sends the listener of a filter that asks for every call but this one.
pub(crate) fn send_listener(socket: BorrowedFd<'_>, listener: BorrowedFd<'_>) -> io::Result<()> {
    send_with(socket, &Message::Asks, Some(listener), UNSEEN)
}

fn send_with(
    socket: BorrowedFd<'_>,
    message: &Message,
    descriptor: Option<BorrowedFd<'_>>,
    flags: SendFlags,
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let rights = descriptor.map(|fd| [fd]);
    if let Some(rights) = &rights {
        control.push(SendAncillaryMessage::ScmRights(rights));
    }
    sendmsg(socket, &[IoSlice::new(&message.encode())], &mut control, flags)?;
    Ok(())
}

/// Sends bytes and descriptors to a child, without waiting.
pub(crate) fn send_packet(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MOST))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
    Ok(())
}

/// The child's side: waits for a packet; its length and descriptors, or `None` when the other end is closed.
pub(crate) fn receive_packet(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<Option<(usize, Vec<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MOST))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            received => break received?,
        }
    };
    let mut descriptors = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            descriptors.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    Ok(Some((received.bytes, descriptors)))
}

/// The child's side: waits for a packet with a descriptor, and perhaps one more. Takes no memory.
pub(crate) fn receive_descriptors(socket: BorrowedFd<'_>) -> io::Result<(OwnedFd, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(socket, &mut [IoSliceMut::new(&mut [0; 1])], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = control.drain().filter_map(|part| match part {
        RecvAncillaryMessage::ScmRights(rights) => Some(rights),
        _ => None,
    });
    let mut rights = descriptors.next().ok_or(io::ErrorKind::UnexpectedEof)?;
    let first = rights.next().ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok((first, rights.next()))
}

/// Lets a program be executed, without waiting.
pub(crate) fn release(socket: BorrowedFd<'_>) -> io::Result<()> {
    send_bytes(socket, &[0], SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
    Ok(())
}

/// The child's side: waits until it is let go. Takes no memory.
pub(crate) fn await_release(socket: BorrowedFd<'_>) -> io::Result<()> {
    match recv(socket, &mut [0; 1], RecvFlags::empty())? {
        (1, _) => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Receives a message without waiting; `None` when the other end is closed, `WouldBlock` when there is nothing.
pub(crate) fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<(Message, Option<OwnedFd>)>> {
    let mut bytes = [0; SIZE];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?;
    let descriptor = control.drain().find_map(|part| match part {
        RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
        _ => None,
    });
    if received.bytes == 0 {
        return Ok(None);
    }
    let message = Message::decode(&bytes).ok_or(io::ErrorKind::InvalidData)?;
    Ok(Some((message, descriptor)))
}
