//! The state directory: who may write to it, and the lock in it.
//!
//! What is kept in it is another module's business. Here a start by root makes it for the user that it becomes, and a
//! second supervisor is refused before it touches anything.

use std::{
    fs::{DirBuilder, File},
    io,
    os::{fd::OwnedFd, unix::fs::DirBuilderExt as _},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Gid, Mode, OFlags, Uid},
    io::Errno,
};

use crate::{
    directory_lock::{self, LockError},
    runtime_directory::Owner,
};

/// The directory, locked by this process for as long as the value lives.
#[derive(Debug)]
pub struct StateDirectory {
    path: PathBuf,
    /// Held for as long as this value lives. The file stays: the next supervisor takes it over.
    _lock: File,
}

/// Why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateDirectoryError {
    /// The system refused a step.
    #[error("cannot {what} {}: {source}; check the path and its permissions, or set [supervisor] state_directory", path.display())]
    Io {
        /// The step.
        what: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others could change what is in it, or the supervisor could not.
    #[error("{} cannot be the state directory: {why}; {fix}", path.display())]
    Unsafe {
        /// The directory.
        path: PathBuf,
        /// Why.
        why: String,
        /// What to do.
        fix: String,
    },
    /// Another supervisor uses it.
    #[error(
        "another supervisor{} uses the state in {}; stop it, or start this one with --state-directory",
        holder.map(|pid| format!(" (pid {pid})")).unwrap_or_default(), path.parent().unwrap_or(path).display()
    )]
    Locked {
        /// The lock.
        path: PathBuf,
        /// Its pid, as it wrote it into the lock.
        holder: Option<u32>,
    },
    /// A file stands where the lock must be.
    #[error("{} is in the way: {why}; remove it if nothing needs it", path.display())]
    InTheWay {
        /// The file.
        path: PathBuf,
        /// What it is.
        why: &'static str,
    },
}

impl From<LockError> for StateDirectoryError {
    fn from(error: LockError) -> Self {
        match error {
            LockError::Io { what, path, source } => Self::Io { what, path, source },
            LockError::Held { path, holder } => Self::Locked { path, holder },
            LockError::InTheWay { path, why } => Self::InTheWay { path, why },
        }
    }
}

impl StateDirectory {
    /// Makes the directory if need be (mode 0700), checks who may change it, and takes its lock.
    ///
    /// With `owner` (the supervisor is root now and will be `owner` later) it belongs to `owner`; an empty one of
    /// root's is handed over.
    pub fn open(path: &Path, owner: Option<Owner>) -> Result<Self, StateDirectoryError> {
        let io = |what, source| StateDirectoryError::Io { what, path: path.to_owned(), source };
        let failed = |what, source: Errno| io(what, source.into());
        let made = match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // ~/.local/state of a fresh account.
                DirBuilder::new().mode(0o700).recursive(true).create(path).map_err(|error| io("make", error))?;
                true
            }
            Err(error) => return Err(io("make", error)),
        };
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| failed("open", error))?;
        let this = rustix::process::geteuid().as_raw();
        let wanted = owner.map_or(this, |owner| owner.uid);
        if let Some(owner) = owner
            && (made || is_roots_and_empty(&directory).map_err(|error| failed("read", error))?)
        {
            let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
            rustix::fs::fchown(&directory, Some(uid), Some(gid)).map_err(|error| failed("chown", error))?;
        }
        let stat = rustix::fs::fstat(&directory).map_err(|error| failed("look at", error))?;
        let unsafe_ = |why: String, fix: String| StateDirectoryError::Unsafe { path: path.to_owned(), why, fix };
        if stat.st_uid != wanted {
            let why = format!("it belongs to uid {}, and the supervisor runs as uid {wanted}", stat.st_uid);
            return Err(unsafe_(why, format!("chown -R {wanted} {}, or name another one", path.display())));
        }
        if stat.st_mode & 0o022 != 0 {
            let why = format!("others may write to it (mode {:o})", stat.st_mode & 0o7777);
            return Err(unsafe_(why, format!("chmod go-w {}", path.display())));
        }
        let lock = directory_lock::take(path, &directory, owner.map(|owner| owner.uid))?;
        if let Some(owner) = owner {
            let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
            rustix::fs::fchown(&lock, Some(uid), Some(gid)).map_err(|error| failed("chown the lock in", error))?;
        }
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn is_roots_and_empty(directory: &OwnedFd) -> Result<bool, Errno> {
    if rustix::fs::fstat(directory)?.st_uid != 0 {
        return Ok(false);
    }
    for entry in rustix::fs::Dir::read_from(directory)? {
        if ![&b"."[..], b".."].contains(&entry?.file_name().to_bytes()) {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};

    use super::*;

    #[test]
    fn it_is_made_for_its_owner_alone_and_locked() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("a/b/state");
        let first = StateDirectory::open(&path, None).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o700);
        let error = StateDirectory::open(&path, None).unwrap_err().to_string();
        assert!(error.starts_with(&format!("another supervisor (pid {})", std::process::id())), "{error}");
        drop(first);
        StateDirectory::open(&path, None).unwrap();
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_refused_with_the_fix() {
        let parent = tempfile::tempdir().unwrap();
        std::fs::set_permissions(parent.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let error = StateDirectory::open(parent.path(), None).unwrap_err().to_string();
        assert!(error.contains("chmod go-w"), "{error}");
    }

    #[test]
    fn root_hands_it_to_the_user_that_it_becomes_and_takes_nobody_elses() {
        if !rustix::process::geteuid().is_root() {
            // Only root can give a file away; the other tests hold for everyone.
            return;
        }
        let parent = tempfile::tempdir().unwrap();
        let owner = Some(Owner { uid: 12_345, gid: 12_345 });
        let owners = |path: &Path| (path.metadata().unwrap().uid(), path.join("lock").metadata().unwrap().uid());
        let made = parent.path().join("made");
        drop(StateDirectory::open(&made, owner).unwrap());
        assert_eq!(owners(&made), (12_345, 12_345));
        drop(StateDirectory::open(&made, owner).unwrap());

        let empty = parent.path().join("empty");
        std::fs::create_dir(&empty).unwrap();
        drop(StateDirectory::open(&empty, owner).unwrap());
        assert_eq!(owners(&empty), (12_345, 12_345));

        let foreign = parent.path().join("foreign");
        std::fs::create_dir(&foreign).unwrap();
        chown(&foreign, Some(54_321), None).unwrap();
        let error = StateDirectory::open(&foreign, owner).unwrap_err().to_string();
        assert!(error.contains("it belongs to uid 54321, and the supervisor runs as uid 12345"), "{error}");
        assert!(!foreign.join("lock").exists());
    }
}
