//! One end of a connection, of whatever kind, which never waits.

use std::{
    fs::File,
    io::{self, Read, Write},
    net::{Shutdown, TcpStream},
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixStream,
    },
};

/// What a pipe takes without waiting when poll(2) says that it takes something (`PIPE_BUF`).
const PIPE: usize = 4096;

/// One end of a connection.
#[derive(Debug)]
pub(crate) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
    /// An end of a pipe.
    Pipe(File),
}

impl Socket {
    /// Never waits in a read or write from here on.
    pub(super) fn ready(&self) -> io::Result<()> {
        match self {
            Self::Unix(socket) => socket.set_nonblocking(true),
            Self::Tcp(socket) => socket.set_nodelay(true).and_then(|()| socket.set_nonblocking(true)),
            // Its flags may be shared. It is only used when poll says so, and then for as much as it has or takes.
            Self::Pipe(_) => Ok(()),
        }
    }

    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(socket) => (&*socket).read(buffer),
            Self::Tcp(socket) => (&*socket).read(buffer),
            Self::Pipe(pipe) => (&*pipe).read(buffer),
        }
    }

    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(socket) => (&*socket).write(bytes),
            Self::Tcp(socket) => (&*socket).write(bytes),
            Self::Pipe(pipe) => (&*pipe).write(&bytes[..bytes.len().min(PIPE)]),
        }
    }

    pub(super) const fn is_pipe(&self) -> bool {
        matches!(self, Self::Pipe(_))
    }

    /// Whether one that nothing is wanted of tells that its other end broke it off, and nothing else.
    pub(super) const fn tells_of_a_reset(&self) -> bool {
        matches!(self, Self::Tcp(_))
    }

    pub(super) fn end(&self) {
        // Fails when the other end has ended it already.
        match self {
            Self::Unix(socket) => drop(socket.shutdown(Shutdown::Write)),
            Self::Tcp(socket) => drop(socket.shutdown(Shutdown::Write)),
            Self::Pipe(_) => {}
        }
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Unix(socket) => socket.as_raw_fd(),
            Self::Tcp(socket) => socket.as_raw_fd(),
            Self::Pipe(pipe) => pipe.as_raw_fd(),
        }
    }
}
