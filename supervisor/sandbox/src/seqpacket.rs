//! One end of the `SOCK_SEQPACKET` connection between supervisor and launcher: whole packets with descriptors.
//!
//! Nothing here blocks: every call passes `MSG_DONTWAIT`, so a descriptor whose `O_NONBLOCK` the other side could clear
//! makes no difference. A packet that did not fit is never handed on in part. Received descriptors are handed on whatever
//! came with them, and none is closed here: closing one can block. What the bytes mean is not known here.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    path::Path,
};

use rustix::{
    cmsg_space,
    event::{PollFd, PollFlags, Timespec, poll},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, recvmsg, sendmsg, socket_with,
        socketpair, sockopt,
    },
};

use crate::protocol::{MAX_DESCRIPTORS, MAX_PACKET};

/// The most descriptors that the kernel lets anybody put into one packet (`SCM_MAX_FD`). There is room for all of them,
/// because the kernel closes those for which there is none in the receiving thread.
pub const MOST_DESCRIPTORS: usize = 253;

/// One end of the connection. Works under tokio's `AsyncFd`: both calls answer `WouldBlock` instead of waiting.
#[derive(Debug)]
pub struct Seqpacket {
    socket: OwnedFd,
}

/// What [`Seqpacket::try_recv`] found.
#[derive(Debug)]
pub enum Received {
    /// One whole packet.
    Packet(Packet),
    /// The packet was longer than [`MAX_PACKET`] or carried more than [`MAX_DESCRIPTORS`]; it is dropped, and these are
    /// all the descriptors that came with it.
    Truncated(Vec<OwnedFd>),
    /// The other side closed the connection; nothing more will come.
    Closed,
}

/// One packet as it came.
#[derive(Debug)]
pub struct Packet {
    /// The bytes, header included.
    pub bytes: Vec<u8>,
    /// The descriptors, in order, close-on-exec.
    pub descriptors: Vec<OwnedFd>,
}

/// Who is at the other end: `SO_PEERCRED`, fixed when the pair was made or the connection accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The process, as this one's PID namespace numbers it.
    pub pid: i32,
    /// Its effective uid.
    pub uid: u32,
    /// Its effective gid.
    pub gid: u32,
}

impl Seqpacket {
    /// A connected pair, both close-on-exec and non-blocking.
    pub fn pair() -> io::Result<(Self, Self)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Self { socket: a }, Self { socket: b }))
    }

    /// Connects to a launcher that listens at this path. `WouldBlock` when too many others are waiting there,
    /// `ConnectionRefused` when nobody listens.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(Self { socket })
    }

    /// Takes over a socket that was inherited or accepted; anything but a Unix `SOCK_SEQPACKET` is `InvalidInput`.
    pub fn from_fd(socket: OwnedFd) -> io::Result<Self> {
        if sockopt::socket_domain(&socket)? != AddressFamily::UNIX
            || sockopt::socket_type(&socket)? != SocketType::SEQPACKET
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the descriptor is not a Unix SOCK_SEQPACKET socket",
            ));
        }
        Ok(Self { socket })
    }

    /// Who is at the other end.
    pub fn peer(&self) -> io::Result<Peer> {
        let credentials = sockopt::socket_peercred(&self.socket)?;
        Ok(Peer {
            pid: credentials.pid.as_raw_nonzero().get(),
            uid: credentials.uid.as_raw(),
            gid: credentials.gid.as_raw(),
        })
    }

    /// Sends one packet, or nothing.
    ///
    /// `WouldBlock` when the other side's queue is full, `InvalidInput` when the packet is empty, longer than
    /// [`MAX_PACKET`] or carries more than [`MAX_DESCRIPTORS`], `BrokenPipe` when the other side is gone.
    pub fn try_send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        if bytes.is_empty() || bytes.len() > MAX_PACKET || descriptors.len() > MAX_DESCRIPTORS {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the packet is out of bounds"));
        }
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the descriptors do not fit"));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, flags)?;
        if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Receives one packet, or `WouldBlock`.
    ///
    /// A process whose descriptor table has no room for [`MOST_DESCRIPTORS`] more leaves it to the kernel to close the
    /// rest.
    pub fn try_recv(&self) -> io::Result<Received> {
        let mut bytes = vec![0; MAX_PACKET];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let message = match recvmsg(&self.socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
            Ok(message) => message,
            Err(rustix::io::Errno::CONNRESET) => return Ok(Received::Closed),
            Err(error) => return Err(error.into()),
        };
        let mut descriptors = Vec::new();
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = part {
                descriptors.extend(rights);
            }
        }
        let cut = message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
        if cut || descriptors.len() > MAX_DESCRIPTORS {
            return Ok(Received::Truncated(descriptors));
        }
        // An empty packet looks like the end of the connection; only the hang-up tells them apart.
        if message.bytes == 0 && descriptors.is_empty() && self.hung_up()? {
            return Ok(Received::Closed);
        }
        bytes.truncate(message.bytes);
        Ok(Received::Packet(Packet { bytes, descriptors }))
    }

    /// Whether the other side is gone, or has said that it will send nothing more.
    pub fn hung_up(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        Ok(fds[0].revents().intersects(PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR))
    }
}

impl AsFd for Seqpacket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Seqpacket {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl From<Seqpacket> for OwnedFd {
    fn from(connection: Seqpacket) -> Self {
        connection.socket
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::ErrorKind};

    use super::*;

    #[test]
    fn packets_keep_their_bounds_and_descriptors() {
        let (a, b) = Seqpacket::pair().expect("socketpair");
        assert_eq!(b.try_recv().expect_err("nothing sent").kind(), ErrorKind::WouldBlock);
        let null = File::open("/dev/null").expect("/dev/null");
        a.try_send(b"one", &[null.as_fd(); MAX_DESCRIPTORS]).expect("send");
        a.try_send(b"two", &[]).expect("send");
        let Received::Packet(packet) = b.try_recv().expect("recv") else { panic!("not a packet") };
        assert_eq!((packet.bytes.as_slice(), packet.descriptors.len()), (b"one".as_slice(), MAX_DESCRIPTORS));
        let Received::Packet(packet) = b.try_recv().expect("recv") else { panic!("not a packet") };
        assert_eq!((packet.bytes.as_slice(), packet.descriptors.len()), (b"two".as_slice(), 0));
        drop(a);
        assert!(matches!(b.try_recv().expect("recv"), Received::Closed));
    }

    #[test]
    fn an_empty_packet_is_not_the_end() {
        let (a, b) = Seqpacket::pair().expect("socketpair");
        rustix::net::send(&a, b"", SendFlags::NOSIGNAL).expect("send");
        let Received::Packet(packet) = b.try_recv().expect("recv") else { panic!("not a packet") };
        assert!(packet.bytes.is_empty());
    }

    #[test]
    fn what_is_too_large_is_dropped_whole() {
        let (a, b) = Seqpacket::pair().expect("socketpair");
        rustix::net::send(&a, &vec![7; MAX_PACKET + 1], SendFlags::NOSIGNAL).expect("send");
        assert!(matches!(b.try_recv().expect("recv"), Received::Truncated(none) if none.is_empty()));

        let null = File::open("/dev/null").expect("/dev/null");
        let many = vec![null.as_fd(); MOST_DESCRIPTORS];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&many)));
        sendmsg(&a, &[IoSlice::new(b"x")], &mut control, SendFlags::NOSIGNAL).expect("send");
        let Received::Truncated(all) = b.try_recv().expect("recv") else { panic!("not too large") };
        assert_eq!(all.len(), MOST_DESCRIPTORS);
        assert_eq!(a.try_send(&[], &[]).expect_err("empty").kind(), ErrorKind::InvalidInput);
    }

    #[test]
    fn a_full_queue_would_block() {
        let (a, _b) = Seqpacket::pair().expect("socketpair");
        let packet = vec![1; 32 * 1024];
        let error = (0..1024).find_map(|_| a.try_send(&packet, &[]).err()).expect("the queue is bounded");
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
    }

    #[test]
    fn other_sockets_are_refused() {
        let (a, _b) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).expect("socketpair");
        assert_eq!(Seqpacket::from_fd(a).expect_err("a stream").kind(), ErrorKind::InvalidInput);
        let file = File::open("/dev/null").expect("/dev/null");
        assert!(Seqpacket::from_fd(file.into()).is_err());
    }
}
