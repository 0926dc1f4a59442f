//! Sealed copies of entries by digest, so that a restart neither copies nor hashes again.
//!
//! A copy is immutable (all seals are set) and was hashed while it was made, so its digest stays true.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// How many copies are kept. Each costs its size in memory.
const KEPT: usize = 16;
/// How many bytes of copies are kept at most.
const KEPT_BYTES: u64 = 256 << 20;

/// The copies, the last used at the end.
#[derive(Default)]
pub(crate) struct SealedEntries {
    entries: Vec<([u8; 32], OwnedFd, u64)>,
}

impl SealedEntries {
    pub(crate) fn get(&self, sha256: &[u8; 32]) -> Option<BorrowedFd<'_>> {
        self.entries.iter().find(|(other, _, _)| other == sha256).map(|(_, entry, _)| entry.as_fd())
    }

    /// Lets go of one.
    pub(crate) fn remove(&mut self, sha256: &[u8; 32]) {
        self.entries.retain(|(other, _, _)| other != sha256);
    }

    /// Keeps a copy, letting go of the oldest ones beyond the bounds. A running plugin keeps its own copy alive.
    pub(crate) fn insert(&mut self, sha256: [u8; 32], entry: OwnedFd) {
        let size = rustix::fs::fstat(&entry).map_or(u64::MAX, |stat| u64::try_from(stat.st_size).unwrap_or(u64::MAX));
        self.entries.retain(|(other, _, _)| *other != sha256);
        self.entries.push((sha256, entry, size));
        let total = |entries: &[([u8; 32], OwnedFd, u64)]| {
            entries.iter().fold(0_u64, |sum, (_, _, size)| sum.saturating_add(*size))
        };
        while self.entries.len() > KEPT || total(&self.entries) > KEPT_BYTES {
            self.entries.remove(0);
        }
    }
}
