//! The pipes of a launch.

use std::{io, os::fd::OwnedFd};

use rustix::{
    fs::{Gid, Uid},
    pipe::{PipeFlags, pipe_with},
};

use crate::{creds::Identity, level::Kernel};

/// The pipes of a launch.
pub(super) struct Pipes {
    pub(super) stdout: OwnedFd,
    pub(super) stdout_write: OwnedFd,
    pub(super) stderr: OwnedFd,
    pub(super) stderr_write: OwnedFd,
    /// Closed by the exec, which is how the launcher sees it.
    pub(super) exec: OwnedFd,
    pub(super) exec_write: OwnedFd,
    /// Over which a machine's monitor tells what its end does not; at the level that has one.
    pub(super) told: Option<(OwnedFd, OwnedFd)>,
}

impl Pipes {
    pub(super) fn make(identity: Identity, kernel: Kernel) -> io::Result<Self> {
        let pipe = || -> io::Result<(OwnedFd, OwnedFd)> {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
            rustix::io::ioctl_fionbio(&read, true)?;
            if let Identity::Own { uid } = identity {
                // So that the plugin may open /dev/stdout, which opens the pipe anew.
                rustix::fs::fchown(&write, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid)))?;
            }
            Ok((read, write))
        };
        let ((stdout, stdout_write), (stderr, stderr_write)) = (pipe()?, pipe()?);
        let (exec, exec_write) = pipe_with(PipeFlags::CLOEXEC)?;
        let told = match kernel {
            Kernel::Host => None,
            // The monitor has its end alone, and the launcher this one: neither waits.
            Kernel::Own => Some(pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?),
        };
        Ok(Self { stdout, stdout_write, stderr, stderr_write, exec, exec_write, told })
    }
}
