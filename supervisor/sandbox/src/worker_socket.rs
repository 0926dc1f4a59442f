//! The worker socket that a plugin binds itself: in a directory of its own, into which it may put whatever it likes. Who
//! connects to it holds it first, so that neither a link nor a file that is put there later leads elsewhere.

use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags},
    io::Errno,
};

/// Its name in the directory.
pub const NAME: &str = "worker.sock";

/// Why nobody connects to what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotASocket {
    /// A link, a file, a directory.
    #[error("it put something that is not a socket at PLUGVISOR_LISTEN")]
    Other,
    /// It cannot be looked at.
    #[error("its worker socket cannot be opened: {0}")]
    Failed(Errno),
}

/// What is bound in this directory, as an `O_PATH` descriptor; `None` while nothing is there. Bound is not yet listening.
///
/// # Errors
/// When what is there is no socket.
pub fn bound(directory: impl AsFd) -> Result<Option<OwnedFd>, NotASocket> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let socket = match rustix::fs::openat(directory, NAME, flags, Mode::empty()) {
        Ok(socket) => socket,
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(NotASocket::Failed(errno)),
    };
    let found = rustix::fs::statat(&socket, "", AtFlags::EMPTY_PATH).map_err(NotASocket::Failed)?;
    match FileType::from_raw_mode(found.st_mode) {
        FileType::Socket => Ok(Some(socket)),
        _ => Err(NotASocket::Other),
    }
}

/// The path by which a process that has this descriptor open connects to it, or this one when none is named.
#[must_use]
pub fn path_of(socket: &OwnedFd, process: Option<u32>) -> String {
    let process = process.map_or_else(|| "self".to_owned(), |process| process.to_string());
    format!("/proc/{process}/fd/{}", socket.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        os::unix::{
            fs::symlink,
            net::{UnixListener, UnixStream},
        },
    };

    use super::*;

    #[test]
    fn nothing_but_a_socket_is_connected_to() {
        let place = tempfile::tempdir().expect("a directory");
        let elsewhere = tempfile::tempdir().expect("a directory");
        let directory = File::open(place.path()).expect("opens");
        let (path, other) = (place.path().join(NAME), elsewhere.path().join("socket"));
        assert!(matches!(bound(&directory), Ok(None)));
        let _other = UnixListener::bind(&other).expect("binds");
        symlink(&other, &path).expect("a link");
        assert_eq!(bound(&directory).map(drop), Err(NotASocket::Other));
        fs::remove_file(&path).expect("removes");
        fs::write(&path, "text").expect("writes");
        assert_eq!(bound(&directory).map(drop), Err(NotASocket::Other));
        fs::remove_file(&path).expect("removes");
        let listener = UnixListener::bind(&path).expect("binds");
        let socket = bound(&directory).expect("a socket").expect("it is there");
        // What takes its place later is not what was judged.
        fs::remove_file(&path).expect("removes");
        symlink(&other, &path).expect("a link");
        let _stream = UnixStream::connect(path_of(&socket, None)).expect("connects");
        listener.set_nonblocking(true).expect("sets");
        listener.accept().expect("it was this one");
    }
}
