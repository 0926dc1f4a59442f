//! The entry: the bytes that are hashed are the bytes that are executed.
//!
//! The bytes go once through memory into a memory file that is then sealed. Runs in the child, so that a file on a slow
//! or hanging filesystem holds up nobody else, and before the child joins its cgroup, so that the copy is not taken out
//! of the plugin's memory limit.

use std::{
    ffi::CStr,
    fs::File,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
};

use rustix::{
    fs::{FileType, MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, fcntl_getfl, fstat, memfd_create},
    io::Errno,
};
use sha2::{Digest, Sha256};

use crate::{child::Failure, step::Step};

/// The largest entry, in bytes.
const MAX_BYTES: u64 = 512 << 20;
const CHUNK: usize = 256 << 10;

/// Copies the file behind the descriptor into sealed memory if its bytes have this digest. The result is open for
/// reading only: a second, writable opening would make exec fail with ETXTBSY.
pub(crate) fn seal(entry: BorrowedFd<'_>, name: &CStr, sha256: &[u8; 32]) -> Result<OwnedFd, Failure> {
    let (found, sealed) = copy(entry, name)?;
    if found == *sha256 { Ok(sealed) } else { Err(Failure::new(Step::EntryDigest, Errno::INVAL)) }
}

/// Copies the file into sealed memory and tells its digest. The name is what `ps` shows.
pub(crate) fn copy(entry: BorrowedFd<'_>, name: &CStr) -> Result<([u8; 32], OwnedFd), Failure> {
    let at = |step| move |errno: Errno| Failure::new(step, errno);
    let flags = fcntl_getfl(entry).map_err(at(Step::EntryKind))?;
    let stat = fstat(entry).map_err(at(Step::EntryKind))?;
    let readable = !flags.contains(OFlags::PATH) && flags & OFlags::RWMODE != OFlags::WRONLY;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || !readable {
        return Err(Failure::new(Step::EntryKind, Errno::INVAL));
    }
    if !u64::try_from(stat.st_size).is_ok_and(|size| (1..=MAX_BYTES).contains(&size)) {
        return Err(Failure::new(Step::EntrySize, Errno::FBIG));
    }

    let reading = at(Step::EntryRead);
    let source = File::from(entry.try_clone_to_owned().map_err(|error| Failure::io(Step::EntryRead, &error))?);
    let memory = File::from(memory_file(name).map_err(reading)?);
    let mut hash = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    let mut offset = 0;
    loop {
        // Positioned reads: the file offset is shared with the supervisor, which could move it.
        let read = match source.read_at(&mut buffer, offset) {
            Ok(0) => break,
            Ok(read) => &buffer[..read],
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Failure::io(Step::EntryRead, &error)),
        };
        hash.update(read);
        memory.write_all_at(read, offset).map_err(|error| Failure::io(Step::EntryRead, &error))?;
        offset += read.len() as u64;
        if offset > MAX_BYTES {
            return Err(Failure::new(Step::EntrySize, Errno::FBIG));
        }
    }
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    // A rootless plugin owns this file and could otherwise take the right to execute it from its own next launch.
    match fcntl_add_seals(&memory, seals | SealFlags::EXEC) {
        // F_SEAL_EXEC came with Linux 6.3.
        Err(Errno::INVAL) => fcntl_add_seals(&memory, seals),
        other => other,
    }
    .map_err(reading)?;
    let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
    let sealed = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(reading)?;
    Ok((hash.finalize().into(), sealed))
}

/// Whether the file begins with `#!`, and so is opened again by its interpreter through the descriptor.
pub(crate) fn is_script(entry: BorrowedFd<'_>) -> bool {
    let mut start = [0; 2];
    rustix::io::pread(entry.as_fd(), &mut start, 0) == Ok(2) && start == *b"#!"
}

fn memory_file(name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match memfd_create(name, flags | MemfdFlags::EXEC) {
        // MFD_EXEC came with Linux 6.3; before, every memory file could be executed.
        Err(Errno::INVAL) => memfd_create(name, flags),
        other => other,
    }
}
