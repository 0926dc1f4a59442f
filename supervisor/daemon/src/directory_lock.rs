//! The lock in a directory that one supervisor at a time may use: `flock` on a file that names its holder.
//!
//! The kernel gives it up when its holder ends, however it ends. Nothing is taken from whom it refuses.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, FileType, FlockOperation, Mode, OFlags},
    io::Errno,
};

/// The file's name.
pub(crate) const NAME: &str = "lock";

/// Why the lock was not taken.
#[derive(Debug)]
pub(crate) enum LockError {
    /// The system refused a step.
    Io { what: &'static str, path: PathBuf, source: io::Error },
    /// Another process holds it; its pid, as it wrote it into the file.
    Held { path: PathBuf, holder: Option<u32> },
    /// Its name is another file's.
    InTheWay { path: PathBuf, why: &'static str },
}

/// Takes the lock in `directory`, which `path` names in errors. The file may belong to this process's user or to
/// `owner`.
pub(crate) fn take(path: &Path, directory: &OwnedFd, owner: Option<u32>) -> Result<File, LockError> {
    let lock_path = path.join(NAME);
    let failed = |what, source: io::Error| LockError::Io { what, path: lock_path.clone(), source };
    loop {
        // One that is there is not opened to be created: in a sticky directory the kernel refuses that even to root when
        // it is another user's, as a dead supervisor's is (`fs.protected_regular`, proc_sys_fs(5); systemd sets it).
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let opened = match rustix::fs::openat(directory, NAME, flags, Mode::empty()) {
            Err(Errno::NOENT) => {
                let flags = flags | OFlags::CREATE | OFlags::EXCL;
                rustix::fs::openat(directory, NAME, flags, Mode::from_raw_mode(0o600))
            }
            opened => opened,
        };
        let mut lock = match opened {
            Ok(lock) => File::from(lock),
            // Somebody else made it meanwhile.
            Err(Errno::EXIST) => continue,
            Err(error) => return Err(failed("open", error.into())),
        };
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let mut text = String::new();
                let _ = lock.take(32).read_to_string(&mut text);
                return Err(LockError::Held { path: lock_path, holder: text.trim().parse().ok() });
            }
            Err(error) => return Err(failed("lock", error.into())),
        }
        // The holder before us may have removed the name between our open and our lock; then the lock on the nameless
        // file excludes nobody.
        let ours = rustix::fs::fstat(lock.as_fd()).map_err(|error| failed("look at", error.into()))?;
        match rustix::fs::statat(directory, NAME, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(named) if (named.st_dev, named.st_ino) == (ours.st_dev, ours.st_ino) => {}
            Ok(_) | Err(Errno::NOENT) => continue,
            Err(error) => return Err(failed("look at", error.into())),
        }
        // In a directory that an unprivileged user may write to, the name could be a link to any file of ours.
        let in_the_way = |why| Err(LockError::InTheWay { path: lock_path.clone(), why });
        if FileType::from_raw_mode(ours.st_mode) != FileType::RegularFile {
            return in_the_way("it is not a regular file");
        }
        if ours.st_nlink != 1 {
            return in_the_way("it has other names (hard links)");
        }
        let this = rustix::process::geteuid().as_raw();
        if ours.st_uid != this && owner.is_none_or(|owner| owner != ours.st_uid) {
            return in_the_way("it belongs to another user");
        }
        lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id())).map_err(|e| failed("write", e))?;
        return Ok(lock);
    }
}
