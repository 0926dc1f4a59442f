//! The launcher's own program in sealed memory: what a trial launch executes behind every wall, where no file of the host
//! can be executed.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use rustix::{
    fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, memfd_create},
    io::Errno,
};

use crate::sealing;

/// A copy, open for reading only: a second, writable opening would make exec fail with ETXTBSY.
pub(crate) fn sealed() -> io::Result<OwnedFd> {
    sealing::sealed(copy)
}

fn copy() -> io::Result<OwnedFd> {
    let mut memory = File::from(memory_file()?);
    io::copy(&mut File::open("/proc/self/exe")?, &mut memory)?;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    match fcntl_add_seals(&memory, seals | SealFlags::EXEC) {
        // F_SEAL_EXEC came with Linux 6.3.
        Err(Errno::INVAL) => fcntl_add_seals(&memory, seals),
        other => other,
    }?;
    let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

fn memory_file() -> Result<OwnedFd, Errno> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match memfd_create(c"trial", flags | MemfdFlags::EXEC) {
        // MFD_EXEC came with Linux 6.3; before, every memory file could be executed.
        Err(Errno::INVAL) => memfd_create(c"trial", flags),
        other => other,
    }
}
