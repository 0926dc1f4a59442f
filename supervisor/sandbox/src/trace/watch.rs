//! The loop of a trace: takes each call, reads what it names, answers it.
//!
//! What is read of the caller (its memory, its directories) is that caller's only while the call waits, and is thrown away
//! when it does not any more. Nothing that is read decides what becomes of a call: that is decided by the call's number and
//! arguments alone, which nobody changes while it waits.

use std::{
    fs::{self, File},
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt as _,
    },
    path::{Component, Path, PathBuf},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{Mode, OFlags, ResolveFlags, openat2},
    io::Errno,
};

use super::{
    book::Book,
    seen::{Access, FileUse, Place, Seen, SocketUse},
    touched::{Touched, opens, touched},
};
use crate::notify::{self, Answer, Waiting};

/// The longest path that the kernel takes.
const LONGEST: usize = 4096;
/// The largest socket address.
const ADDRESS: usize = 128;
/// `SECCOMP_FILTER_FLAG_NEW_LISTENER`.
const NEW_LISTENER: u64 = 1 << 3;

/// Answers every call that waits at the listener until no process is left that could make one, and gives what was seen. The
/// first exec is the launcher's.
///
/// # Errors
/// When the listener can no longer be read. Every call of the program fails with ENOSYS from then on.
pub fn watch(listener: &OwnedFd, book: &Book) -> io::Result<Seen> {
    notify::wake_up_in_step(listener);
    let mut watch =
        Watch { listener: listener.as_fd(), book, seen: Seen::default(), root: None, unproven: None, started: false };
    loop {
        let mut fds = [PollFd::new(listener, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        let ready = fds[0].revents();
        if !ready.contains(PollFlags::IN) {
            return Ok(watch.seen);
        }
        match notify::receive(listener.as_fd()) {
            Ok(waiting) => watch.take(&waiting)?,
            // Who made it was killed meanwhile, or a signal came.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => {}
            Err(error) => return Err(error),
        }
    }
}

struct Watch<'a> {
    listener: BorrowedFd<'a>,
    book: &'a Book,
    seen: Seen,
    /// The plugin's root directory, once it could be opened; it has one for good.
    root: Option<OwnedFd>,
    /// The root of a thread that may be another's by now.
    unproven: Option<OwnedFd>,
    /// The plugin's own program is there.
    started: bool,
}

impl Watch<'_> {
    fn take(&mut self, waiting: &Waiting) -> io::Result<()> {
        let (number, arguments) = (i64::from(waiting.number()), waiting.arguments());
        if !self.started {
            self.started = [libc::SYS_execve, libc::SYS_execveat].contains(&number);
            return self.answer(waiting, Answer::Pass);
        }
        let kind = self.book.kind(number, arguments);
        self.seen.call(kind, arguments);
        for touched in touched(number, arguments) {
            self.look(waiting, touched);
        }
        let answer = match self.book.always_refused(kind) {
            Some(errno) => Answer::Fail(errno),
            // Of two filters that ask, the newer one counts: one with a listener could let through what is refused here.
            None if number == libc::SYS_seccomp && arguments[1] & NEW_LISTENER != 0 => {
                self.seen.listeners += 1;
                Answer::Fail(libc::EPERM)
            }
            None => Answer::Pass,
        };
        self.answer(waiting, answer)
    }

    fn answer(&self, waiting: &Waiting, answer: Answer) -> io::Result<()> {
        match notify::answer(self.listener, waiting, answer) {
            // Nobody waits for it any more.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            answered => answered,
        }
    }

    /// Notes what is behind a pointer.
    fn look(&mut self, waiting: &Waiting, touched: Touched) {
        let caller = Caller(waiting.thread());
        let found = match touched {
            Touched::Path { access, from, at } => self.file(caller, access, from, at),
            Touched::Opened { from, at, how } => caller
                .bytes(how, 8)
                .and_then(|flags| self.file(caller, opens(u64::from_le_bytes(*flags.first_chunk()?)), from, at)),
            Touched::Address { bind, at, length } => {
                let length = usize::try_from(length & 0xFFFF_FFFF).unwrap_or(ADDRESS).min(ADDRESS);
                caller.bytes(at, length).and_then(|address| self.address(caller, bind, &address))
            }
        };
        // The number of a thread that is gone may be another's by now.
        if !notify::still_waits(self.listener, waiting) {
            return;
        }
        if self.root.is_none() {
            self.root = self.unproven.take();
        }
        match found {
            Some(Found::File(file)) => self.seen.file(file),
            Some(Found::Socket(socket)) => self.seen.socket(socket),
            Some(Found::Nothing) => {}
            None => self.seen.unread += 1,
        }
    }

    fn file(&mut self, caller: Caller, access: Access, from: i32, at: u64) -> Option<Found> {
        let text = caller.text(at)?;
        // The descriptor itself is meant (AT_EMPTY_PATH), or nothing at all.
        if text.is_empty() {
            return Some(Found::Nothing);
        }
        let path =
            if Path::new(&text).is_absolute() { PathBuf::from(&text) } else { caller.directory(from)?.join(&text) };
        self.placed(caller, access, &plain(&path)).map(Found::File)
    }

    fn placed(&mut self, caller: Caller, access: Access, path: &Path) -> Option<FileUse> {
        if self.root.is_none() {
            self.unproven = caller.root();
        }
        let root = self.root.as_ref().or(self.unproven.as_ref())?;
        // What is in /proc is different for each who looks.
        let place = if path.starts_with("/proc") || exists(root.as_fd(), path) {
            Place::Tree
        } else if on_this_host(path) {
            Place::Host
        } else {
            Place::Nowhere
        };
        Some(FileUse { access, path: path.to_string_lossy().into_owned(), place })
    }

    fn address(&mut self, caller: Caller, bind: bool, bytes: &[u8]) -> Option<Found> {
        let (family, rest) = bytes.split_first_chunk()?;
        let port = || rest.first_chunk().copied().map(u16::from_be_bytes);
        let address = match i32::from(u16::from_ne_bytes(*family)) {
            libc::AF_INET => {
                let ip: [u8; 4] = *rest.get(2..)?.first_chunk()?;
                SocketAddr::from((Ipv4Addr::from(ip), port()?))
            }
            libc::AF_INET6 => {
                let ip: [u8; 16] = *rest.get(6..)?.first_chunk()?;
                SocketAddr::from((Ipv6Addr::from(ip), port()?))
            }
            libc::AF_UNIX => return self.unix(caller, bind, rest),
            _ => return Some(Found::Nothing),
        };
        Some(Found::Socket(if bind { SocketUse::Bind(address) } else { SocketUse::Connect(address) }))
    }

    fn unix(&mut self, caller: Caller, bind: bool, name: &[u8]) -> Option<Found> {
        match name {
            [0, name @ ..] if !bind => {
                Some(Found::Socket(SocketUse::Abstract(String::from_utf8_lossy(name).into_owned())))
            }
            // Its own network namespace has names of its own.
            [] | [0, ..] => Some(Found::Nothing),
            name => {
                let name = name.split(|byte| *byte == 0).next()?;
                let text = String::from_utf8_lossy(name).into_owned();
                let path =
                    if text.starts_with('/') { text.into() } else { caller.directory(libc::AT_FDCWD)?.join(text) };
                let access = if bind { Access::Write } else { Access::Connect };
                self.placed(caller, access, &plain(&path)).map(Found::File)
            }
        }
    }
}

enum Found {
    File(FileUse),
    Socket(SocketUse),
    Nothing,
}

/// A thread whose call waits.
#[derive(Clone, Copy)]
struct Caller(u32);

impl Caller {
    /// So many bytes of its memory.
    fn bytes(self, at: u64, length: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; length];
        File::open(format!("/proc/{}/mem", self.0)).ok()?.read_exact_at(&mut bytes, at).ok()?;
        Some(bytes)
    }

    /// The text up to a zero byte.
    fn text(self, at: u64) -> Option<String> {
        let memory = File::open(format!("/proc/{}/mem", self.0)).ok()?;
        let mut text = Vec::new();
        let mut at = at;
        while text.len() < LONGEST {
            // Not beyond a page: the next one may not be there.
            let left = 4096 - usize::try_from(at % 4096).ok()?;
            let mut bytes = vec![0; left];
            let read = memory.read_at(&mut bytes, at).ok().filter(|read| *read > 0)?;
            if let Some(end) = bytes[..read].iter().position(|byte| *byte == 0) {
                text.extend_from_slice(&bytes[..end]);
                return Some(String::from_utf8_lossy(&text).into_owned());
            }
            text.extend_from_slice(&bytes[..read]);
            at = at.checked_add(u64::try_from(read).ok()?)?;
        }
        None
    }

    /// The directory behind a descriptor, as it sees it.
    fn directory(self, from: i32) -> Option<PathBuf> {
        let link = match from {
            libc::AT_FDCWD => format!("/proc/{}/cwd", self.0),
            from => format!("/proc/{}/fd/{from}", self.0),
        };
        fs::read_link(link).ok()
    }

    fn root(self) -> Option<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(format!("/proc/{}/root", self.0), flags, Mode::empty()).ok()
    }
}

/// Whether there is such a file below this root; links are followed within it.
fn exists(root: BorrowedFd<'_>, path: &Path) -> bool {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve).is_ok()
}

/// Whether the host's root file system has it. The plugin chose the path, and looking further could make the host mount
/// something, resolve a name, or wait for a server that is gone.
fn on_this_host(path: &Path) -> bool {
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat2(rustix::fs::CWD, path, flags, Mode::empty(), resolve).is_ok()
}

/// The path without `.`, and without `..` as far as the text says.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => plain.push(name),
            Component::ParentDir => drop(plain.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read_as_far_as_their_text_says() {
        assert_eq!(plain(Path::new("/a/./b/../c")), Path::new("/a/c"));
        assert_eq!(plain(Path::new("/../..")), Path::new("/"));
    }

    #[test]
    fn memory_is_read_up_to_the_end_of_the_text() {
        let text = c"/a/path";
        let own = Caller(std::process::id());
        let at = text.as_ptr() as u64;
        assert_eq!(own.text(at).as_deref(), Some("/a/path"));
        assert_eq!(own.bytes(at, 2), Some(b"/a".to_vec()));
        assert_eq!(own.text(8), None);
    }
}
