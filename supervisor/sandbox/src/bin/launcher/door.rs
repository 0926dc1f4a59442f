//! The socket at which supervisors knock, in `--listen`: where it is made, and who may come in. One at a time is let in;
//! that is the loop's business.

use std::{
    ffi::OsStr,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Instant,
};

use plugvisor_sandbox::options::{Linger, Listen};
use rustix::{
    fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, Uid},
    io::Errno,
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen as listen_on, socket_with,
        sockopt,
    },
    process::{getpid, getuid},
};

use crate::kernel;

/// Connections that may wait to be let in or turned away.
const BACKLOG: i32 = 64;

/// The listening socket and its rules.
#[derive(Debug)]
pub(crate) struct Door {
    socket: OwnedFd,
    /// Its directory and name, when the launcher made it.
    made: Option<(OwnedFd, PathBuf)>,
    pub(crate) uid: u32,
    pub(crate) linger: Linger,
    /// Whether it is in the epoll set.
    pub(crate) watched: bool,
    /// Nobody is let in before, because there was no descriptor to be had.
    pub(crate) rests_until: Option<Instant>,
}

impl Door {
    /// Takes over the socket that systemd passed, or makes one.
    pub(crate) fn open(listen: &Listen) -> io::Result<Self> {
        let (socket, made) = match passed()? {
            Some(socket) => (socket, None),
            None => {
                make(&listen.path, listen.uid).map(|(socket, directory, name)| (socket, Some((directory, name))))?
            }
        };
        Ok(Self { socket, made, uid: listen.uid, linger: listen.linger, watched: false, rests_until: None })
    }

    /// The listening socket.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Removes the path. The socket itself is closed by the end of the process.
    pub(crate) fn remove(&self) {
        if let Some((directory, name)) = &self.made {
            let _ = rustix::fs::unlinkat(directory, name, AtFlags::empty());
        }
    }
}

/// The one socket of `sd_listen_fds(3)`, if there is one for this process.
fn passed() -> io::Result<Option<OwnedFd>> {
    let for_us = std::env::var("LISTEN_PID").is_ok_and(|pid| pid == getpid().to_string());
    if !for_us {
        return Ok(None);
    }
    if std::env::var("LISTEN_FDS").as_deref() != Ok("1") {
        return Err(io::Error::other("LISTEN_FDS must be 1: one ListenSequentialPacket= in the socket unit"));
    }
    let socket = kernel::inherited(3)?;
    let fits = sockopt::socket_domain(&socket)? == AddressFamily::UNIX
        && sockopt::socket_type(&socket)? == SocketType::SEQPACKET
        && sockopt::socket_acceptconn(&socket)?;
    if !fits {
        return Err(io::Error::other("the passed socket must be a Unix one from ListenSequentialPacket="));
    }
    // Only PID 1 shares this open description.
    rustix::io::ioctl_fionbio(&socket, true)?;
    Ok(Some(socket))
}

/// Makes the socket, in a directory in which nobody but root and this user can put anything in its place.
fn make(path: &Path, uid: u32) -> io::Result<(OwnedFd, OwnedFd, PathBuf)> {
    let wrong = |kind, what: &str| io::Error::new(kind, format!("{}: {what}", path.display()));
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(wrong(io::ErrorKind::InvalidInput, "it names no file"));
    };
    let directory = rustix::fs::open(parent, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let found = rustix::fs::fstat(&directory)?;
    if ![0, getuid().as_raw()].contains(&found.st_uid) || found.st_mode & 0o022 != 0 {
        return Err(wrong(
            io::ErrorKind::PermissionDenied,
            "its directory must belong to root or to the launcher's user, and nobody else may write to it",
        ));
    }
    // Held while the socket is made, so that of two launchers one sees the other's.
    rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| wrong(io::ErrorKind::AddrInUse, "another launcher is being started there"))?;
    let address = SocketAddrUnix::new(beneath(&directory, name))?;
    match rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
        Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::Socket => {
            // Left by a launcher that was killed, unless somebody answers.
            let probe = socket()?;
            if connect(&probe, &address) != Err(Errno::CONNREFUSED) {
                return Err(wrong(io::ErrorKind::AddrInUse, "another launcher listens there"));
            }
            rustix::fs::unlinkat(&directory, name, AtFlags::empty())?;
        }
        Ok(_) => return Err(wrong(io::ErrorKind::AlreadyExists, "it is not a socket; remove it")),
    }
    let socket = socket()?;
    // The umask lets only the owner connect; nobody can before it listens.
    bind(&socket, &address)?;
    if uid != getuid().as_raw() {
        rustix::fs::chownat(&directory, name, Some(Uid::from_raw(uid)), None, AtFlags::SYMLINK_NOFOLLOW)?;
    }
    listen_on(&socket, BACKLOG)?;
    rustix::fs::flock(&directory, FlockOperation::Unlock)?;
    Ok((socket, directory, name.into()))
}

fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// A path for socket addresses: short whatever the directory is called, and of this directory whatever is renamed.
fn beneath(directory: &OwnedFd, name: &OsStr) -> PathBuf {
    Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name)
}
