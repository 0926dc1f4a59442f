//! The runtime directory: its lock, and the sockets in it.
//!
//! Every step goes through a descriptor of the directory and follows no link in it, so that nobody who can write
//! elsewhere can steer it. A second supervisor is refused by the lock before it touches anything. Who may connect to a
//! socket is its file mode here and `SO_PEERCRED` where it is served.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid},
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};

use crate::directory_lock::{self, LockError};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 4096;
/// The longest path of a Unix socket, in bytes (unix(7): `sun_path` with its NUL).
const MAX_SOCKET_PATH: usize = 107;
/// The longest name of a socket in the directory, with the slash before it.
const LONGEST: &str = "/reattach/launcher.sock";

/// The directory, locked by this process.
#[derive(Debug)]
pub struct RuntimeDirectory {
    path: PathBuf,
    directory: OwnedFd,
    /// Held for as long as this value lives.
    lock: File,
    sockets: Vec<&'static str>,
    created: bool,
}

/// The unprivileged user whom the supervisor becomes, when it is started by root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its uid.
    pub uid: u32,
    /// Its primary group.
    pub gid: u32,
}

/// Why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeDirectoryError {
    /// The system refused a step.
    #[error("cannot {what} {}: {source}; check the path and its permissions, or set [supervisor] runtime_directory", path.display())]
    Io {
        /// The step.
        what: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others could change what is in it.
    #[error("{} is not safe as a runtime directory: {why}; {fix}", path.display())]
    Unsafe {
        /// The directory.
        path: PathBuf,
        /// Why.
        why: String,
        /// What to do.
        fix: String,
    },
    /// No socket in it could be connected to by its path.
    #[error(
        "{} cannot be the runtime directory: its path has {} bytes, and with more than {} those of its sockets are too long \
         for the kernel (unix(7)); set [supervisor] runtime_directory to a shorter one, such as /run/plugvisor",
        path.display(), path.as_os_str().len(), MAX_SOCKET_PATH - LONGEST.len()
    )]
    TooLong {
        /// The directory.
        path: PathBuf,
    },
    /// Another supervisor uses it.
    #[error(
        "another supervisor{} holds {}; stop it, or start this one with --runtime-directory and another metrics_address",
        holder.map(|pid| format!(" (pid {pid})")).unwrap_or_default(), path.display()
    )]
    Locked {
        /// The lock.
        path: PathBuf,
        /// Its pid, as it wrote it into the lock.
        holder: Option<u32>,
    },
    /// A file stands where a socket must be, or a live socket that holds no lock.
    #[error("{} is in the way: {why}; remove it if nothing needs it", path.display())]
    InTheWay {
        /// The file.
        path: PathBuf,
        /// What it is.
        why: &'static str,
    },
}

impl From<LockError> for RuntimeDirectoryError {
    fn from(error: LockError) -> Self {
        match error {
            LockError::Io { what, path, source } => Self::Io { what, path, source },
            LockError::Held { path, holder } => Self::Locked { path, holder },
            LockError::InTheWay { path, why } => Self::InTheWay { path, why },
        }
    }
}

/// Whether the sockets in such a directory can have paths.
pub fn check_length(path: &Path) -> Result<(), RuntimeDirectoryError> {
    if path.as_os_str().len() + LONGEST.len() > MAX_SOCKET_PATH {
        return Err(RuntimeDirectoryError::TooLong { path: path.to_owned() });
    }
    Ok(())
}

impl RuntimeDirectory {
    /// Makes the directory if need be, checks who may change it, and takes its lock.
    ///
    /// With `owner` (the supervisor is root now and will be `owner` later) the directory stays root's and becomes
    /// sticky and writable for the owner's group: the owner can remove what is its own and nothing else.
    pub fn open(path: &Path, owner: Option<Owner>) -> Result<Self, RuntimeDirectoryError> {
        check_length(path)?;
        let failed =
            |what, source: Errno| RuntimeDirectoryError::Io { what, path: path.to_owned(), source: source.into() };
        let mode = if owner.is_some() { 0o755 } else { 0o700 };
        let created = match rustix::fs::mkdir(path, Mode::from_raw_mode(mode)) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(error) => return Err(failed("make", error)),
        };
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| failed("open", error))?;
        check(path, &directory, owner)?;
        if let Some(owner) = owner {
            rustix::fs::fchown(&directory, None, Some(Gid::from_raw(owner.gid))).map_err(|e| failed("chown", e))?;
            rustix::fs::fchmod(&directory, Mode::from_raw_mode(0o1775)).map_err(|error| failed("chmod", error))?;
        }
        let lock = directory_lock::take(path, &directory, owner.map(|owner| owner.uid))?;
        let this = Self { path: path.to_owned(), directory, lock, sockets: Vec::new(), created };
        if let Some(owner) = owner {
            let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
            rustix::fs::fchown(&this.lock, Some(uid), Some(gid)).map_err(|error| failed("chown the lock in", error))?;
        }
        Ok(this)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Binds a listening socket of mode 0600 that belongs to `owner`, non-blocking. One that is left over from a dead
    /// supervisor is removed first.
    ///
    /// Changes the umask for a moment, so it must be called while the process has one thread.
    pub fn bind(&mut self, name: &'static str, owner: Option<Owner>) -> Result<UnixListener, RuntimeDirectoryError> {
        let path = self.path.join(name);
        let failed = |what, source: io::Error| RuntimeDirectoryError::Io { what, path: path.clone(), source };
        self.remove_stale(name, &path)?;
        let old = rustix::process::umask(Mode::from_raw_mode(0o177));
        // Through the descriptor: no link on the way, and no limit of 107 bytes on the directory's path.
        let bound = UnixListener::bind(self.through_descriptor(name));
        rustix::process::umask(old);
        let listener = bound.map_err(|error| failed("bind", error))?;
        self.sockets.push(name);
        if let Some(owner) = owner {
            let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
            rustix::fs::chownat(&self.directory, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|error| failed("chown", error.into()))?;
        }
        rustix::net::listen(&listener, BACKLOG).map_err(|error| failed("listen on", error.into()))?;
        listener.set_nonblocking(true).map_err(|error| failed("prepare", error))?;
        Ok(listener)
    }

    /// Takes over a socket that was bound here and held elsewhere, when clients still reach it by its name.
    pub fn adopt(&mut self, name: &'static str, listener: UnixListener) -> Option<UnixListener> {
        let stat = rustix::fs::statat(&self.directory, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
            return None;
        }
        // Nobody else of this directory holds its lock, so whoever listens at the name is this listener. The
        // connection waits in its queue and ends at once.
        match self.probe(name) {
            Ok(()) | Err(Errno::AGAIN) => {}
            Err(_) => return None,
        }
        listener.set_nonblocking(true).ok()?;
        self.sockets.push(name);
        Some(listener)
    }

    fn probe(&self, name: &str) -> Result<(), Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let probe = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&probe, &SocketAddrUnix::new(self.through_descriptor(name))?)
    }

    /// Lets go of the directory and leaves the sockets to who holds them: only the lock is removed.
    pub fn leave(mut self) -> io::Result<()> {
        self.sockets.clear();
        self.created = false;
        self.unlink()
    }

    fn remove_stale(&self, name: &str, path: &Path) -> Result<(), RuntimeDirectoryError> {
        let in_the_way = |why| RuntimeDirectoryError::InTheWay { path: path.to_owned(), why };
        let failed =
            |what, source: Errno| RuntimeDirectoryError::Io { what, path: path.to_owned(), source: source.into() };
        let stat = match rustix::fs::statat(&self.directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(()),
            Err(error) => return Err(failed("look at", error)),
        };
        if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
            return Err(in_the_way("it is not a socket"));
        }
        match self.probe(name) {
            // Nobody listens any more: the file is a leftover.
            Err(Errno::CONNREFUSED) => {
                rustix::fs::unlinkat(&self.directory, name, AtFlags::empty()).map_err(|error| failed("remove", error))
            }
            Ok(()) | Err(Errno::AGAIN) => Err(in_the_way("a process listens on it")),
            Err(error) => Err(failed("probe", error)),
        }
    }

    fn through_descriptor(&self, name: &str) -> PathBuf {
        format!("/proc/self/fd/{}/{name}", self.directory.as_raw_fd()).into()
    }

    /// Removes the sockets, the lock and, if this process made it, the directory.
    pub fn remove(mut self) -> io::Result<()> {
        self.unlink()
    }

    fn unlink(&mut self) -> io::Result<()> {
        let mut first = Ok(());
        // The lock goes last: until then nobody else binds here.
        for name in self.sockets.drain(..).chain([directory_lock::NAME]) {
            match rustix::fs::unlinkat(&self.directory, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => first = first.and(Err(error.into())),
            }
        }
        if std::mem::take(&mut self.created) {
            // Not empty, or its parent is no longer ours to change (root has become another user): it stays.
            let _ = rustix::fs::rmdir(&self.path);
        }
        first
    }
}

impl Drop for RuntimeDirectory {
    fn drop(&mut self) {
        let _ = self.unlink();
    }
}

fn check(path: &Path, directory: &OwnedFd, owner: Option<Owner>) -> Result<(), RuntimeDirectoryError> {
    let stat = rustix::fs::fstat(directory).map_err(|error| RuntimeDirectoryError::Io {
        what: "look at",
        path: path.to_owned(),
        source: error.into(),
    })?;
    let this = rustix::process::geteuid().as_raw();
    let unsafe_ = |why: String, fix: String| Err(RuntimeDirectoryError::Unsafe { path: path.to_owned(), why, fix });
    if stat.st_uid != this {
        let fix = format!("remove it, or chown {this} {}", path.display());
        return unsafe_(format!("it belongs to uid {}", stat.st_uid), fix);
    }
    // A sticky directory writable for the group is what a start by root leaves for its unprivileged successor.
    let ours = owner.is_some_and(|owner| stat.st_gid == owner.gid) && stat.st_mode & 0o1000 != 0;
    let foreign = if ours { 0o002 } else { 0o022 };
    if stat.st_mode & foreign != 0 {
        let mode = stat.st_mode & 0o7777;
        return unsafe_(format!("others may write to it (mode {mode:o})"), format!("chmod go-w {}", path.display()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _, symlink},
        net::UnixStream,
    };

    use super::*;

    #[test]
    fn sockets_in_the_longest_directory_can_be_bound() {
        let parent = tempfile::tempdir().unwrap();
        let longest =
            parent.path().join("d".repeat(MAX_SOCKET_PATH - LONGEST.len() - parent.path().as_os_str().len() - 1));
        check_length(&longest).unwrap();
        std::fs::create_dir_all(longest.join("reattach")).unwrap();
        UnixListener::bind(format!("{}{LONGEST}", longest.display())).unwrap();
        let error = RuntimeDirectory::open(&longest.with_extension("e"), None).unwrap_err().to_string();
        assert!(error.contains("has 86 bytes") && error.contains("more than 84"), "{error}");
    }

    #[test]
    fn it_holds_sockets_and_leaves_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("run");
        let mut directory = RuntimeDirectory::open(&path, None).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o700);
        let _listener = directory.bind("admin.sock", None).unwrap();
        assert_eq!(path.join("admin.sock").metadata().unwrap().mode() & 0o777, 0o600);
        UnixStream::connect(path.join("admin.sock")).unwrap();
        directory.remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_second_supervisor_is_refused_with_the_first_ones_pid() {
        let parent = tempfile::tempdir().unwrap();
        let first = RuntimeDirectory::open(parent.path(), None).unwrap();
        let error = RuntimeDirectory::open(parent.path(), None).unwrap_err();
        let expected = format!("(pid {})", std::process::id());
        assert!(error.to_string().contains(&expected), "{error}");
        assert!(parent.path().join("lock").exists(), "the loser took nothing away");
        drop(first);
        RuntimeDirectory::open(parent.path(), None).unwrap();
    }

    #[test]
    fn only_dead_sockets_are_removed() {
        let parent = tempfile::tempdir().unwrap();
        let mut directory = RuntimeDirectory::open(parent.path(), None).unwrap();
        drop(UnixListener::bind(parent.path().join("dead.sock")).unwrap());
        directory.bind("dead.sock", None).unwrap();
        let _live = UnixListener::bind(parent.path().join("live.sock")).unwrap();
        let error = directory.bind("live.sock", None).unwrap_err();
        assert!(error.to_string().contains("a process listens on it"), "{error}");
        std::fs::write(parent.path().join("file.sock"), "").unwrap();
        assert!(directory.bind("file.sock", None).is_err());
        symlink("/dev/null", parent.path().join("link.sock")).unwrap();
        assert!(directory.bind("link.sock", None).is_err());
    }

    #[test]
    fn links_and_open_directories_are_refused() {
        let parent = tempfile::tempdir().unwrap();
        symlink(parent.path(), parent.path().join("link")).unwrap();
        assert!(RuntimeDirectory::open(&parent.path().join("link"), None).is_err());
        let open = parent.path().join("open");
        std::fs::create_dir(&open).unwrap();
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).unwrap();
        let error = RuntimeDirectory::open(&open, None).unwrap_err();
        assert!(error.to_string().contains("chmod go-w"), "{error}");
        symlink("/etc/passwd", parent.path().join("lock")).unwrap();
        assert!(RuntimeDirectory::open(parent.path(), None).is_err(), "a link as the lock");
    }

    #[test]
    fn a_lock_that_is_another_file_is_left_alone() {
        let parent = tempfile::tempdir().unwrap();
        let (lock, precious) = (parent.path().join("lock"), parent.path().join("precious"));
        std::fs::write(&precious, "keep").unwrap();
        std::fs::hard_link(&precious, &lock).unwrap();
        let error = RuntimeDirectory::open(parent.path(), None).unwrap_err();
        let expected = format!("{} is in the way: it has other names (hard links); remove it", lock.display());
        assert!(error.to_string().starts_with(&expected), "{error}");
        assert_eq!(std::fs::read_to_string(&precious).unwrap(), "keep");
        std::fs::remove_file(&lock).unwrap();
        RuntimeDirectory::open(parent.path(), None).unwrap();
    }

    #[test]
    fn a_lock_of_another_user_is_refused_but_not_the_successors() {
        if !rustix::process::geteuid().is_root() {
            // Only root can make another user's file; the other tests hold for everyone.
            return;
        }
        let parent = tempfile::tempdir().unwrap();
        let lock = parent.path().join("lock");
        std::fs::write(&lock, "left").unwrap();
        std::os::unix::fs::chown(&lock, Some(12_345), None).unwrap();
        let successor = |uid| Some(Owner { uid, gid: uid });
        for owner in [None, successor(54_321)] {
            let error = RuntimeDirectory::open(parent.path(), owner).unwrap_err();
            assert!(error.to_string().contains("it belongs to another user"), "{error}");
            assert_eq!(std::fs::read_to_string(&lock).unwrap(), "left");
            // As it was before root's attempt.
            std::fs::set_permissions(parent.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        }
        RuntimeDirectory::open(parent.path(), successor(12_345)).unwrap();
    }
}
