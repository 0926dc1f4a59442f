//! The walk over a bundle's directory: each file opened once, judged, hashed.
//!
//! Names are looked up one component at a time below an open directory and never through a link, so a directory that
//! changes underneath can make the walk fail but cannot lead it elsewhere. This module does not know the manifest.

use std::{
    collections::BTreeSet,
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use sha2::{Digest as _, Sha256};

use super::{BundleError, Refusal};
use crate::{BundleFile, BundleLimits, Digest};

/// Files that the caller wants more of than their digests.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    /// The file whose descriptor is kept.
    pub(crate) keep: String,
    /// The file whose bytes are kept.
    pub(crate) load: String,
    /// The file that was read before and is not opened again.
    pub(crate) skip: &'static str,
}

/// What the walk found.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// All files but the skipped one, sorted by path.
    pub(crate) files: Vec<BundleFile>,
    /// The kept file, at offset 0.
    pub(crate) kept: Option<File>,
    /// The loaded bytes.
    pub(crate) loaded: Option<Vec<u8>>,
}

/// Walks the directory.
pub(crate) fn walk(
    directory: BorrowedFd<'_>,
    root: &Path,
    wanted: &Wanted,
    limits: &BundleLimits,
) -> Result<Found, BundleError> {
    let mut walk = Walk { root, wanted, limits, entries: 0, bytes: 0, found: Found::default() };
    walk.directory(directory, "", 0)?;
    walk.found.files.sort();
    Ok(walk.found)
}

/// Reads one file below the directory, or `None` when there is none.
pub(crate) fn read_file(
    directory: BorrowedFd<'_>,
    root: &Path,
    name: &str,
    most: u64,
) -> Result<Option<Vec<u8>>, BundleError> {
    let path = root.join(name);
    let stat = match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        other => other.map_err(|errno| failed(&path, errno))?,
    };
    let (file, stat) = open(directory, name, &path, &stat, OFlags::empty())?;
    let mut bytes = Vec::new();
    read(&file, &path, &stat, most, |part| bytes.extend_from_slice(part))?;
    Ok(Some(bytes))
}

struct Walk<'a> {
    root: &'a Path,
    wanted: &'a Wanted,
    limits: &'a BundleLimits,
    entries: usize,
    bytes: u64,
    found: Found,
}

impl Walk<'_> {
    /// `prefix` is empty or ends with `/`. The recursion is as deep as the limit allows.
    fn directory(&mut self, directory: BorrowedFd<'_>, prefix: &str, depth: usize) -> Result<(), BundleError> {
        for name in self.names(directory, prefix)? {
            let within = format!("{prefix}{name}");
            let path = self.root.join(&within);
            let stat = rustix::fs::statat(directory, &*name, AtFlags::SYMLINK_NOFOLLOW);
            let stat = stat.map_err(|errno| failed(&path, errno))?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory if depth >= self.limits.depth => {
                    return Err(refuse(path, Refusal::TooDeep(self.limits.depth)));
                }
                FileType::Directory => {
                    let (below, _) = open(directory, &name, &path, &stat, OFlags::DIRECTORY)?;
                    self.directory(below.as_fd(), &format!("{within}/"), depth + 1)?;
                }
                FileType::RegularFile if within == self.wanted.skip => {}
                FileType::RegularFile => self.file(directory, &name, within, &path, &stat)?,
                other => return Err(refuse(path, special(other))),
            }
        }
        Ok(())
    }

    fn names(&mut self, directory: BorrowedFd<'_>, prefix: &str) -> Result<BTreeSet<String>, BundleError> {
        let at = self.root.join(prefix);
        let mut names = BTreeSet::new();
        for entry in Dir::read_from(directory).map_err(|errno| failed(&at, errno))? {
            let entry = entry.map_err(|errno| failed(&at, errno))?;
            let bytes = entry.file_name().to_bytes();
            if matches!(bytes, b"." | b"..") {
                continue;
            }
            let refusal = match std::str::from_utf8(bytes) {
                Err(_) => Refusal::NameNotUtf8,
                Ok(name) if name.chars().any(char::is_control) => Refusal::NameControl,
                Ok(name) if name.len() > self.limits.name_bytes => Refusal::NameTooLong(self.limits.name_bytes),
                Ok(name) => {
                    self.entries += 1;
                    if self.entries > self.limits.entries {
                        return Err(refuse(self.root.to_owned(), Refusal::TooManyEntries(self.limits.entries)));
                    }
                    names.insert(name.to_owned());
                    continue;
                }
            };
            return Err(refuse(at.join(String::from_utf8_lossy(bytes).escape_debug().to_string()), refusal));
        }
        Ok(names)
    }

    fn file(
        &mut self,
        directory: BorrowedFd<'_>,
        name: &str,
        within: String,
        path: &Path,
        stat: &Stat,
    ) -> Result<(), BundleError> {
        let (file, stat) = open(directory, name, path, stat, OFlags::empty())?;
        if Mode::from_raw_mode(stat.st_mode).intersects(Mode::SUID | Mode::SGID) {
            return Err(refuse(path.to_owned(), Refusal::SetId));
        }
        let size = size(&stat);
        let load = within == self.wanted.load;
        if load && size > self.limits.descriptor_bytes as u64 {
            return Err(refuse(path.to_owned(), Refusal::FileTooLarge(self.limits.descriptor_bytes as u64)));
        }
        self.bytes = self.bytes.saturating_add(size);
        if self.bytes > self.limits.total_bytes {
            return Err(refuse(self.root.to_owned(), Refusal::BundleTooLarge(self.limits.total_bytes)));
        }
        let mut hash = Sha256::new();
        let mut bytes = Vec::new();
        read(&file, path, &stat, self.limits.file_bytes, |part| {
            hash.update(part);
            if load {
                bytes.extend_from_slice(part);
            }
        })?;
        if within == self.wanted.keep {
            self.found.kept = Some(file);
        }
        if load {
            self.found.loaded = Some(bytes);
        }
        let executable = Mode::from_raw_mode(stat.st_mode).contains(Mode::XUSR);
        let sha256 = Digest::from_bytes(hash.finalize().into());
        self.found.files.push(BundleFile { path: within, executable, size, sha256 });
        Ok(())
    }
}

/// Opens what was just seen. It is looked at before, because opening a device can have effects, and after, because it
/// may have been replaced in between.
fn open(
    directory: BorrowedFd<'_>,
    name: &str,
    path: &Path,
    before: &Stat,
    more: OFlags,
) -> Result<(File, Stat), BundleError> {
    let kind = FileType::from_raw_mode(before.st_mode);
    let expected = if more.contains(OFlags::DIRECTORY) { FileType::Directory } else { FileType::RegularFile };
    if kind != expected {
        return Err(refuse(path.to_owned(), special(kind)));
    }
    // Without O_NONBLOCK a FIFO put here in between would hold this process until someone writes to it.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC | more;
    let opened: OwnedFd = match rustix::fs::openat(directory, name, flags, Mode::empty()) {
        Err(rustix::io::Errno::LOOP | rustix::io::Errno::NOTDIR | rustix::io::Errno::NOENT) => {
            return Err(refuse(path.to_owned(), Refusal::Changed));
        }
        other => other.map_err(|errno| failed(path, errno))?,
    };
    let after = rustix::fs::fstat(&opened).map_err(|errno| failed(path, errno))?;
    if (before.st_dev, before.st_ino) != (after.st_dev, after.st_ino) || FileType::from_raw_mode(after.st_mode) != kind
    {
        return Err(refuse(path.to_owned(), Refusal::Changed));
    }
    Ok((File::from(opened), after))
}

/// Hands on every byte of a file, without moving its offset. Its size and times must stay as they were.
fn read(file: &File, path: &Path, stat: &Stat, most: u64, mut sink: impl FnMut(&[u8])) -> Result<(), BundleError> {
    let size = size(stat);
    if size > most {
        return Err(refuse(path.to_owned(), Refusal::FileTooLarge(most)));
    }
    let mut buffer = vec![0; 64 * 1024];
    let mut offset = 0;
    loop {
        let count = match file.read_at(&mut buffer, offset) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(source) => return Err(BundleError::Io { path: path.to_owned(), source }),
        };
        offset += count as u64;
        if offset > size {
            return Err(refuse(path.to_owned(), Refusal::Changed));
        }
        sink(&buffer[..count]);
    }
    let after = rustix::fs::fstat(file).map_err(|errno| failed(path, errno))?;
    let marks = |stat: &Stat| (stat.st_size, stat.st_mtime, stat.st_mtime_nsec, stat.st_mode);
    if offset != size || marks(stat) != marks(&after) {
        return Err(refuse(path.to_owned(), Refusal::Changed));
    }
    Ok(())
}

fn size(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(u64::MAX)
}

fn special(kind: FileType) -> Refusal {
    match kind {
        FileType::Symlink => Refusal::SymbolicLink,
        FileType::Fifo => Refusal::Special("named pipe"),
        FileType::Socket => Refusal::Special("socket"),
        FileType::CharacterDevice | FileType::BlockDevice => Refusal::Special("device"),
        FileType::Directory => Refusal::Special("directory where a file should be"),
        FileType::RegularFile => Refusal::Special("file where a directory should be"),
        _ => Refusal::Special("thing of unknown kind"),
    }
}

fn refuse(path: PathBuf, refusal: Refusal) -> BundleError {
    BundleError::Refused { path, refusal }
}

fn failed(path: &Path, errno: rustix::io::Errno) -> BundleError {
    BundleError::Io { path: path.to_owned(), source: errno.into() }
}
