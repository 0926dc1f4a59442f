//! The child that copies and hashes what the supervisor brought: unprivileged, with nothing open but what it copies,
//! limited in time and size.
//!
//! Everything that could wait or lie is met here and not in the launcher: a FIFO, a device, a file that grows, a server
//! behind a mount. It is also the one place where a manifest is parsed: its canonical form, which the content digest
//! covers, is what is stored. What it found goes to the launcher in one small message.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    path::{Path, PathBuf},
    time::Duration,
};

use plugvisor_package::{Manifest, ManifestLimits};
use plugvisor_sandbox::protocol::ImportFile;
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fcntl_getfl, fstat, openat2},
    io::Errno,
    process::{Pid, Resource, Rlimit, Signal, getppid, set_parent_process_death_signal, setrlimit},
};
use sha2::{Digest, Sha256};

use crate::{
    creds::{self, Identity},
    kernel,
};

const CHUNK: usize = 256 << 10;
/// The longest message: a pipe takes it in one piece (`PIPE_BUF`).
const MESSAGE: usize = 1024;
/// Above the numbers that the child places its descriptors at.
const LIFTED: RawFd = 64;

/// One file to copy.
pub(super) struct Job<'a> {
    pub(super) source: BorrowedFd<'a>,
    pub(super) target: BorrowedFd<'a>,
    pub(super) file: &'a ImportFile,
    /// The path that the kernel gives for the source: a name in whatever mount namespace it was opened in.
    pub(super) path: PathBuf,
}

/// What holds for the child.
pub(super) struct Terms<'a> {
    pub(super) launcher: Pid,
    /// Who it becomes.
    pub(super) identity: Identity,
    pub(super) manifest: &'a ManifestLimits,
    pub(super) time: Duration,
}

/// What the child found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Every file is what was said of it.
    Copied {
        /// The name that the manifest gives, when it was among them.
        name: Option<String>,
        /// Whether each of them is the file at its path here, and not one in mounts of the supervisor's own.
        in_place: bool,
    },
    /// One is not.
    Wrong {
        /// Its number in the packet.
        index: usize,
        why: Wrong,
    },
}

/// Why a file was not taken.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Wrong {
    /// Not a regular file that is open for reading.
    Kind,
    /// Another size than was said, or it changed while it was read.
    Size,
    /// Other bytes.
    Digest,
    /// Reading it failed.
    Read(i32),
    /// Writing the copy failed.
    Write(i32),
    /// The manifest is not one.
    Manifest(String),
    /// The child itself could not be confined.
    Confine(i32),
}

impl Outcome {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = match self {
            Self::Copied { name, in_place } => {
                [&[0, u8::from(*in_place)][..], name.as_deref().unwrap_or_default().as_bytes()].concat()
            }
            Self::Wrong { index, why } => {
                let (tag, errno, text) = match why {
                    Wrong::Kind => (1, 0, ""),
                    Wrong::Size => (2, 0, ""),
                    Wrong::Digest => (3, 0, ""),
                    Wrong::Read(errno) => (4, *errno, ""),
                    Wrong::Write(errno) => (5, *errno, ""),
                    Wrong::Manifest(text) => (6, 0, text.as_str()),
                    Wrong::Confine(errno) => (7, *errno, ""),
                };
                let index = u8::try_from(*index).unwrap_or(u8::MAX);
                [&[tag, index][..], &errno.to_le_bytes(), text.as_bytes()].concat()
            }
        };
        bytes.truncate(MESSAGE);
        bytes
    }

    /// What the child wrote; `None` when it said nothing.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (tag, rest) = bytes.split_first()?;
        if *tag == 0 {
            let (in_place, name) = rest.split_first()?;
            return Some(Self::Copied { name: (!name.is_empty()).then(|| text(name)), in_place: *in_place == 1 });
        }
        let (index, rest) = rest.split_first()?;
        let (errno, rest) = rest.split_first_chunk::<4>()?;
        let errno = i32::from_le_bytes(*errno);
        let why = match tag {
            1 => Wrong::Kind,
            2 => Wrong::Size,
            3 => Wrong::Digest,
            4 => Wrong::Read(errno),
            5 => Wrong::Write(errno),
            6 => Wrong::Manifest(text(rest)),
            7 => Wrong::Confine(errno),
            _ => return None,
        };
        Some(Self::Wrong { index: usize::from(*index), why })
    }
}

/// Runs the child. Never returns to the launcher's code.
pub(super) fn run(jobs: &[Job<'_>], report: BorrowedFd<'_>, terms: &Terms<'_>) -> ! {
    kernel::set_name(c"plugvisor-import");
    let (outcome, report) = match confine(jobs, report, terms) {
        Ok((pairs, report, in_place)) => (copy_all(jobs, &pairs, terms.manifest, in_place), report),
        Err(errno) => (Outcome::Wrong { index: 0, why: Wrong::Confine(errno) }, report),
    };
    let told = rustix::io::write(report, &outcome.encode()).is_ok();
    kernel::exit_now(i32::from(!told))
}

type Pair = (BorrowedFd<'static>, BorrowedFd<'static>);

/// Gives up everything but the descriptors of the jobs: sources and targets in pairs, and the report.
fn confine(
    jobs: &[Job<'_>],
    report: BorrowedFd<'_>,
    terms: &Terms<'_>,
) -> Result<(Vec<Pair>, BorrowedFd<'static>, bool), i32> {
    let errno = |error: &io::Error| error.raw_os_error().unwrap_or(libc::EIO);
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(Errno::raw_os_error)?;
    if getppid() != Some(terms.launcher) {
        return Err(libc::ESRCH);
    }
    let lift = |fd: BorrowedFd<'_>| kernel::lift(fd.as_raw_fd(), LIFTED).map_err(|error| errno(&error));
    let mut lifted = vec![lift(report)?];
    for job in jobs {
        lifted.extend([lift(job.source)?, lift(job.target)?]);
    }
    let mut placed: RawFd = 0;
    for fd in lifted {
        kernel::place(fd, placed, false).map_err(|error| errno(&error))?;
        placed += 1;
    }
    kernel::close_from(placed).map_err(|error| errno(&error))?;

    // Still with the launcher's rights: the copier need not reach the directories on the way.
    let in_place = jobs.iter().zip(0..).all(|(job, index)| is_at(kernel::fixed(1 + 2 * index), &job.path));

    let largest = jobs.iter().map(|job| job.file.size).max().unwrap_or(0).max(1);
    let limits = [
        (Resource::Core, 0),
        (Resource::Fsize, largest),
        (Resource::Nofile, u64::try_from(placed).unwrap_or(0)),
        (Resource::Cpu, terms.time.as_secs() + 1),
        (Resource::Nproc, 0),
    ];
    for (resource, limit) in limits {
        setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) }).map_err(Errno::raw_os_error)?;
    }
    creds::drop_privileges(&terms.identity).map_err(|failure| failure.errno)?;
    // Cleared by the change of credentials.
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(Errno::raw_os_error)?;
    if getppid() != Some(terms.launcher) {
        return Err(libc::ESRCH);
    }
    rustix::thread::set_no_new_privs(true).map_err(Errno::raw_os_error)?;
    let pairs = (0..jobs.len()).filter_map(|index| RawFd::try_from(1 + 2 * index).ok());
    Ok((pairs.map(|at| (kernel::fixed(at), kernel::fixed(at + 1))).collect(), kernel::fixed(0), in_place))
}

/// Whether the source is the file at this path, as the launcher sees it. In a mount namespace of its own, which a user
/// namespace gives to anybody, the supervisor can mount what it likes at any path, and the kernel then gives that path.
fn is_at(source: BorrowedFd<'_>, path: &Path) -> bool {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(found) = openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS) else { return false };
    match (fstat(source), fstat(&found)) {
        (Ok(source), Ok(found)) => (source.st_dev, source.st_ino) == (found.st_dev, found.st_ino),
        _ => false,
    }
}

fn copy_all(jobs: &[Job<'_>], pairs: &[Pair], limits: &ManifestLimits, in_place: bool) -> Outcome {
    let mut name = None;
    for (index, (job, (source, target))) in jobs.iter().zip(pairs).enumerate() {
        let copied = if job.file.path == Manifest::FILE_NAME {
            copy_manifest(*source, *target, job.file, limits).map(|found| name = Some(found))
        } else {
            copy(*source, *target, job.file)
        };
        if let Err(why) = copied {
            return Outcome::Wrong { index, why };
        }
    }
    Outcome::Copied { name, in_place }
}

/// The size of a file that may be read.
fn size_of(source: BorrowedFd<'_>) -> Result<u64, Wrong> {
    let read = |errno: Errno| Wrong::Read(errno.raw_os_error());
    let flags = fcntl_getfl(source).map_err(read)?;
    let readable = !flags.contains(OFlags::PATH) && flags & OFlags::RWMODE != OFlags::WRONLY;
    let stat = fstat(source).map_err(read)?;
    if !readable || FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Wrong::Kind);
    }
    Ok(u64::try_from(stat.st_size).unwrap_or(u64::MAX))
}

fn copy(source: BorrowedFd<'_>, target: BorrowedFd<'_>, said: &ImportFile) -> Result<(), Wrong> {
    if size_of(source)? != said.size {
        return Err(Wrong::Size);
    }
    let mut hash = Sha256::new();
    let mut offset = 0;
    let mut buffer = vec![0; CHUNK.min(usize::try_from(said.size).unwrap_or(CHUNK).saturating_add(1))];
    loop {
        let read = read_at(source, &mut buffer, offset)?;
        if read == 0 {
            break;
        }
        offset += read as u64;
        // Before it is written: what is too much never reaches the store.
        if offset > said.size {
            return Err(Wrong::Size);
        }
        hash.update(&buffer[..read]);
        write_all(target, &buffer[..read], offset - read as u64)?;
    }
    if offset != said.size {
        return Err(Wrong::Size);
    }
    if <[u8; 32]>::from(hash.finalize()) == said.sha256 { Ok(()) } else { Err(Wrong::Digest) }
}

/// Stores the canonical form, and tells the name.
fn copy_manifest(
    source: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    said: &ImportFile,
    limits: &ManifestLimits,
) -> Result<String, Wrong> {
    size_of(source)?;
    let mut bytes = vec![0; limits.bytes + 1];
    let mut filled = 0;
    while filled < bytes.len() {
        match read_at(source, &mut bytes[filled..], filled as u64)? {
            0 => break,
            read => filled += read,
        }
    }
    bytes.truncate(filled);
    let manifest = Manifest::parse(&bytes, limits).map_err(|problems| Wrong::Manifest(problems.to_string()))?;
    let canonical = manifest.canonical();
    if canonical.len() as u64 != said.size {
        return Err(Wrong::Size);
    }
    if <[u8; 32]>::from(Sha256::digest(&canonical)) != said.sha256 {
        return Err(Wrong::Digest);
    }
    write_all(target, &canonical, 0)?;
    Ok(manifest.name.to_string())
}

/// Positioned: the offset of the description is shared with the supervisor, which could move it.
fn read_at(source: BorrowedFd<'_>, buffer: &mut [u8], offset: u64) -> Result<usize, Wrong> {
    loop {
        match rustix::io::pread(source, &mut *buffer, offset) {
            Err(Errno::INTR) => {}
            Ok(read) => return Ok(read),
            Err(errno) => return Err(Wrong::Read(errno.raw_os_error())),
        }
    }
}

fn write_all(target: BorrowedFd<'_>, mut bytes: &[u8], mut offset: u64) -> Result<(), Wrong> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(target.as_fd(), bytes, offset) {
            Ok(written) => {
                bytes = &bytes[written..];
                offset += written as u64;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Wrong::Write(errno.raw_os_error())),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Outcome, Wrong};

    #[test]
    fn what_the_child_says_is_read_back() {
        for outcome in [
            Outcome::Copied { name: None, in_place: false },
            Outcome::Copied { name: Some("gallery".into()), in_place: true },
            Outcome::Wrong { index: 0, why: Wrong::Kind },
            Outcome::Wrong { index: 7, why: Wrong::Read(5) },
            Outcome::Wrong { index: 3, why: Wrong::Manifest("name: missing".into()) },
        ] {
            assert_eq!(Outcome::decode(&outcome.encode()), Some(outcome));
        }
        for nonsense in [&[][..], &[0], &[1], &[4, 0, 1], &[99, 0, 0, 0, 0, 0]] {
            assert_eq!(Outcome::decode(nonsense), None);
        }
    }
}
