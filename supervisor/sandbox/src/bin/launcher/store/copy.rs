//! The child that copies and hashes what the supervisor brought: unprivileged, with nothing open but what it copies,
//! limited in time and size.
//!
//! Everything that could wait or lie is met here and not in the launcher: a FIFO, a device, a file that grows, a server
//! behind a mount. It is also the one place where a manifest is parsed: its canonical form, which the content digest
//! covers, is what is stored. And it looks at what each file asks of its stack. What it finds for a launch goes to the launcher in one bounded message.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    path::{Path, PathBuf},
    time::Duration,
};

use plugvisor_package::{BundleLimits, Manifest, ManifestLimits};
use plugvisor_sandbox::protocol::ImportFile;
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fcntl_getfl, fstat, openat2},
    io::Errno,
    net::SendFlags,
    process::{Pid, Resource, Rlimit, Signal, getppid, set_parent_process_death_signal, setrlimit},
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{
    origin::{self, Doubt, Owners},
    stated::{self, Stated},
    writable_code::{self, Asking},
};
use crate::{
    creds::{self, Identity},
    kernel,
    level::Without,
};

const CHUNK: usize = 256 << 10;
/// The longest message, in bytes.
pub(super) const MESSAGE: usize = stated::MOST + (8 << 10);
/// The most that is told of a manifest that is none, in bytes.
const MOST_PROBLEMS: usize = 1 << 10;
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
    pub(super) limits: &'a BundleLimits,
    /// The directory that may vouch for the bundle, when its manifest is among the files.
    pub(super) vouching: Option<PathBuf>,
    /// Who may change it.
    pub(super) owners: Owners,
    pub(super) time: Duration,
}

/// What the child found.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Outcome {
    /// Every file is what was said of it.
    Copied {
        /// What the manifest says, when it was among them.
        told: Option<Told>,
        /// Whether each of them is the file at its path here, and not one in mounts of the supervisor's own.
        in_place: bool,
        /// What the directory that may vouch for them has, when it was to be looked at.
        listing: Option<Result<[u8; 32], Doubt>>,
        /// The number of the first that asks for memory to be written and executed, and by what.
        writable_code: Option<(usize, Asking)>,
    },
    /// One is not.
    Wrong {
        /// Its number in the packet.
        index: usize,
        why: Wrong,
    },
}

/// What a manifest says that the launcher needs.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Told {
    pub(super) name: String,
    pub(super) stated: Stated,
}

/// Why a file was not taken.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// The program's arguments and variables are too much.
    TooMuch,
    /// The child itself could not be confined.
    Confine(i32),
}

impl Outcome {
    fn encode(mut self) -> Vec<u8> {
        if let Self::Wrong { why: Wrong::Manifest(problems), .. } = &mut self {
            problems.truncate(problems.floor_char_boundary(MOST_PROBLEMS));
        }
        // Nothing that is bounded as above fails to be written, and saying nothing is a refusal.
        postcard::to_extend(&self, Vec::new()).unwrap_or_default()
    }

    /// What the child wrote; `None` when it said nothing.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        postcard::from_bytes(bytes).ok()
    }
}

/// Runs the child. Never returns to the launcher's code.
pub(super) fn run(jobs: &[Job<'_>], report: BorrowedFd<'_>, terms: &Terms<'_>) -> ! {
    kernel::set_name(c"plugvisor-import");
    let (outcome, report) = match confine(jobs, report, terms) {
        Ok(Confined { pairs, report, in_place, listing }) => {
            let outcome = match copy_all(jobs, &pairs, &terms.limits.manifest) {
                Ok((told, writable_code)) => Outcome::Copied { told, in_place, listing, writable_code },
                Err((index, why)) => Outcome::Wrong { index, why },
            };
            (outcome, report)
        }
        Err(errno) => (Outcome::Wrong { index: 0, why: Wrong::Confine(errno) }, report),
    };
    let told = rustix::net::send(report, &outcome.encode(), SendFlags::NOSIGNAL).is_ok();
    kernel::exit_now(i32::from(!told))
}

type Pair = (BorrowedFd<'static>, BorrowedFd<'static>);

/// A child that has given everything up but the descriptors of its jobs, and what it saw before.
struct Confined {
    /// Sources and targets.
    pairs: Vec<Pair>,
    report: BorrowedFd<'static>,
    in_place: bool,
    listing: Option<Result<[u8; 32], Doubt>>,
}

/// Gives up everything but the descriptors of the jobs and the report.
fn confine(jobs: &[Job<'_>], report: BorrowedFd<'_>, terms: &Terms<'_>) -> Result<Confined, i32> {
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
    let listing = terms.vouching.as_ref().filter(|_| in_place);
    let listing = listing.map(|bundle| origin::look(bundle, terms.limits, terms.owners));

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
    creds::drop_privileges(&terms.identity, true, Without::NOTHING).map_err(|failure| failure.errno)?;
    // Cleared by the change of credentials.
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(Errno::raw_os_error)?;
    if getppid() != Some(terms.launcher) {
        return Err(libc::ESRCH);
    }
    rustix::thread::set_no_new_privs(true).map_err(Errno::raw_os_error)?;
    let pairs = (0..jobs.len()).filter_map(|index| RawFd::try_from(1 + 2 * index).ok());
    let pairs = pairs.map(|at| (kernel::fixed(at), kernel::fixed(at + 1))).collect();
    Ok(Confined { pairs, report: kernel::fixed(0), in_place, listing })
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

/// What a packet told: of its manifest, and of the first file that asks for memory to be written and executed.
type Read = (Option<Told>, Option<(usize, Asking)>);

fn copy_all(jobs: &[Job<'_>], pairs: &[Pair], limits: &ManifestLimits) -> Result<Read, (usize, Wrong)> {
    let (mut told, mut first_asking) = (None, None);
    for (index, (job, (source, target))) in jobs.iter().zip(pairs).enumerate() {
        let copied = if job.file.path == Manifest::FILE_NAME {
            copy_manifest(*source, *target, job.file, limits).map(|found| told = Some(found))
        } else {
            // The copy, which nobody else can change, and of which it is known that it is what was said.
            let asking = copy(*source, *target, job.file)
                .and_then(|()| writable_code::asks(|buffer, offset| fill(*target, buffer, offset)));
            asking.map(|by| first_asking = first_asking.or(by.map(|by| (index, by))))
        };
        copied.map_err(|why| (index, why))?;
    }
    Ok((told, first_asking))
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

/// Stores the canonical form, and tells what it says.
fn copy_manifest(
    source: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    said: &ImportFile,
    limits: &ManifestLimits,
) -> Result<Told, Wrong> {
    size_of(source)?;
    let mut bytes = vec![0; limits.bytes + 1];
    let filled = fill(source, &mut bytes, 0)?;
    bytes.truncate(filled);
    let manifest = Manifest::parse(&bytes, limits).map_err(|problems| Wrong::Manifest(problems.to_string()))?;
    let canonical = manifest.canonical();
    if canonical.len() as u64 != said.size {
        return Err(Wrong::Size);
    }
    if <[u8; 32]>::from(Sha256::digest(&canonical)) != said.sha256 {
        return Err(Wrong::Digest);
    }
    let stated = Stated::of(&manifest);
    if postcard::to_extend(&stated, Vec::new()).map_or(usize::MAX, |bytes| bytes.len()) > stated::MOST {
        return Err(Wrong::TooMuch);
    }
    write_all(target, &canonical, 0)?;
    Ok(Told { name: manifest.name.to_string(), stated })
}

/// Reads until the buffer is full or the file ends, and tells how much that was.
fn fill(source: BorrowedFd<'_>, buffer: &mut [u8], offset: u64) -> Result<usize, Wrong> {
    let mut filled = 0;
    while filled < buffer.len() {
        match read_at(source, &mut buffer[filled..], offset + filled as u64)? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(filled)
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
    use plugvisor_package::{Manifest, ManifestLimits};

    use super::{Asking, Doubt, MESSAGE, Outcome, Stated, Told, Wrong, stated};

    fn told(args: &str) -> Told {
        let text = format!(r#"{{"name":"gallery","version":"1.0.0","runtime":{{"args":[{args}]}}}}"#);
        let manifest = Manifest::parse(text.as_bytes(), &ManifestLimits::default()).expect("a manifest");
        Told { name: manifest.name.to_string(), stated: Stated::of(&manifest) }
    }

    #[test]
    fn what_the_child_says_is_read_back() {
        let copied = |told, listing| Outcome::Copied {
            told,
            in_place: true,
            listing,
            writable_code: Some((3, Asking::Segment)),
        };
        for outcome in [
            || Outcome::Copied { told: None, in_place: false, listing: None, writable_code: None },
            || Outcome::Wrong { index: 0, why: Wrong::Kind },
            || Outcome::Wrong { index: 7, why: Wrong::Read(5) },
            || Outcome::Wrong { index: 3, why: Wrong::Manifest("name: missing".into()) },
        ] {
            assert_eq!(Outcome::decode(&outcome().encode()), Some(outcome()));
        }
        for listing in [None, Some(Ok([7; 32])), Some(Err(Doubt::Scattered))] {
            let outcome = || copied(Some(told(r#""--fast""#)), listing.clone());
            assert_eq!(Outcome::decode(&outcome().encode()), Some(outcome()));
        }
        for nonsense in [&[][..], &[0], &[1], &[4, 0, 1], &[99, 0, 0, 0, 0, 0]] {
            assert_eq!(Outcome::decode(nonsense), None);
        }
    }

    #[test]
    fn no_message_is_longer_than_its_reader_takes() {
        let long = "x".repeat(4096);
        let path = std::path::PathBuf::from("/".repeat(7000));
        let told = told(&vec![format!("\"{long}\""); stated::MOST / 4100].join(","));
        let listing = Some(Err(Doubt::Unfit { path, why: "has a name that is not UTF-8".into() }));
        let writable_code = Some((usize::MAX, Asking::Stack));
        let most = Outcome::Copied { told: Some(told), in_place: true, listing, writable_code };
        let most = most.encode().len();
        assert!((stated::MOST..=MESSAGE).contains(&most), "{most}");
        let wrong = Outcome::Wrong { index: 1, why: Wrong::Manifest("…".repeat(5000)) };
        assert!(wrong.encode().len() < MESSAGE);
    }
}
