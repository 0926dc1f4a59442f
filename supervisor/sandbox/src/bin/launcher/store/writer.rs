//! A forked child that writes in the store: it ends with its launcher, and until it has ended no other launcher begins.
//!
//! A launcher takes the store over when it has its lock (`Disk::open`). What a child of a killed launcher renames
//! afterwards would take back what the new one wrote, uids that were given among it.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, RawFd},
};

use rustix::{
    io::Errno,
    process::{Pid, Signal, getppid, set_parent_process_death_signal},
};

use crate::kernel;

/// The first number after the standard streams.
const FIRST: RawFd = 3;

/// Called first in the child: dies with the launcher, and closes what the launcher has open, above all pipes whose end
/// somebody waits for. The store's lock stays open, and with it held, until the child has ended, however that comes.
pub(crate) fn become_writer(launcher: Pid, lock: Option<BorrowedFd<'_>>) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // One that was gone before that was said sends no signal.
    if getppid() != Some(launcher) {
        return Err(Errno::SRCH.into());
    }
    match lock {
        // It has that number already when nothing else of the launcher's lies below it.
        Some(lock) if lock.as_raw_fd() == FIRST => kernel::close_from(FIRST + 1),
        Some(lock) => kernel::place(lock.as_raw_fd(), FIRST, false).and_then(|()| kernel::close_from(FIRST + 1)),
        None => kernel::close_from(FIRST),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd};

    use rustix::{
        fs::{FlockOperation, flock},
        process::{WaitId, WaitIdOptions, getpid, kill_process, pidfd_send_signal, waitid},
    };

    use super::*;
    use crate::kernel::Cloned;

    /// Forks a child that becomes a writer and then stops, or ends with the error's number.
    fn writer(launcher: Pid, lock: &File) -> std::os::fd::OwnedFd {
        match kernel::clone3(0, None).expect("a child") {
            Cloned::Child => {
                let became = become_writer(launcher, Some(lock.as_fd()));
                if became.is_ok() {
                    let _ = kill_process(getpid(), Signal::STOP);
                }
                kernel::exit_now(became.map_or_else(|error| error.raw_os_error().unwrap_or(libc::EIO), |()| 0))
            }
            Cloned::Parent { pidfd, .. } => pidfd,
        }
    }

    #[test]
    fn the_store_stays_locked_until_the_child_has_ended() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("lock");
        let lock = File::create(&path).expect("the lock");
        flock(&lock, FlockOperation::LockExclusive).expect("locked");
        let pidfd = writer(getpid(), &lock);
        let await_child = |options| waitid(WaitId::PidFd(pidfd.as_fd()), options).expect("waitid").expect("a status");
        assert!(await_child(WaitIdOptions::STOPPED | WaitIdOptions::EXITED).stopped());
        // As when the launcher is killed.
        drop(lock);
        let next = File::open(&path).expect("the lock");
        assert_eq!(flock(&next, FlockOperation::NonBlockingLockExclusive), Err(Errno::WOULDBLOCK));
        pidfd_send_signal(&pidfd, Signal::KILL).expect("SIGKILL");
        assert!(await_child(WaitIdOptions::EXITED).killed());
        // Another test may have forked a child meanwhile that holds a copy until it has ended.
        flock(&next, FlockOperation::LockExclusive).expect("locked");
    }

    #[test]
    fn a_child_whose_launcher_is_gone_writes_nothing() {
        let directory = tempfile::tempdir().expect("a directory");
        let lock = File::create(directory.path().join("lock")).expect("the lock");
        let gone = Pid::from_raw(i32::MAX).expect("a number");
        let pidfd = writer(gone, &lock);
        let status = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED).expect("waitid").expect("a status");
        assert_eq!(status.exit_status(), Some(libc::ESRCH));
    }
}
