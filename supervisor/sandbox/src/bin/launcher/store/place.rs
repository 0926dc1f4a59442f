//! Where bundles lie: in a directory that only root can write, or in memory that nobody else can reach.
//!
//! On disk the launcher is root and the store outlives it. Layout 1:
//!
//! ```text
//! layout            "plugvisor store 1"
//! lock              held by the launcher that uses the store
//! uids              who has which uid, see `uids`
//! bundles/<digest>/files/…   the bundle, as a plugin sees it
//! bundles/<digest>/list      its content list; written last, when everything else is on the disk
//! bundles/<digest>/about     what its manifest fixes, what its files ask of their stack, and the directories that it came
//!                            from, as JSON
//! staging/          what is not finished; emptied at the start
//! ```
//!
//! In memory each bundle is a tmpfs of its own, as large as the bundle, mounted in the launcher's own mount namespace and
//! made read-only when it is complete: its pages count for the launcher's cgroup, and removing it frees them. This module
//! knows neither quotas nor tiers.

use std::{
    collections::BTreeSet,
    ffi::CString,
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{DirBuilderExt, MetadataExt, PermissionsExt},
        },
    },
    path::{Path, PathBuf},
};

use plugvisor_package::{BundleFile, Digest, PluginName, read_content_list};
use rustix::{
    fs::{
        FlockOperation, Mode, OFlags, StatVfsMountFlags, fcntl_lock, flock, fstat, fstatvfs, fsync, open, rename,
        unlink,
    },
    io::{Errno, retry_on_intr, write},
    mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount},
    process::getuid,
};
use serde::{Deserialize, Serialize};

use super::{stated::Stated, writable_code::WritableCode};

const LAYOUT: &str = "plugvisor store 1\n";
/// The largest file that is read back.
const MOST_TEXT: u64 = 4 << 20;
/// The most directories that one bundle is known to have come from.
pub(super) const MOST_ORIGINS: usize = 16;

/// Where bundles lie.
pub(crate) enum Place {
    /// In a directory.
    Disk(Disk),
    /// In tmpfs mounts of the launcher's own.
    Memory(Memory),
    /// Nowhere, and why.
    Nowhere(String),
}

/// A directory that only the launcher's user can write.
pub(crate) struct Disk {
    directory: PathBuf,
    /// Locked for as long as it is open, by the launcher or by a child that writes.
    lock: OwnedFd,
    last: u64,
}

/// Tmpfs mounts below a directory of the launcher's own.
pub(crate) struct Memory {
    directory: PathBuf,
    mounted: BTreeSet<u64>,
    last: u64,
}

/// A bundle that is being made.
pub(super) struct Staged {
    /// Where its files go.
    pub(super) files: PathBuf,
    number: u64,
}

/// A bundle that an earlier launcher left.
pub(super) struct Left {
    pub(super) digest: [u8; 32],
    pub(super) files: Vec<BundleFile>,
    pub(super) name: PluginName,
    pub(super) stated: Stated,
    pub(super) writable_code: WritableCode,
    pub(super) origins: Vec<PathBuf>,
}

/// What is known of a bundle besides its files. One that an earlier version wrote, with less in it, is not read: its bundle
/// is imported anew.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct About {
    pub(super) name: String,
    pub(super) stated: Stated,
    pub(super) writable_code: WritableCode,
    pub(super) origins: Vec<String>,
}

impl About {
    pub(super) fn write(&self) -> String {
        serde_json::to_string(self).expect("texts and numbers can be written as JSON")
    }

    fn read(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok().filter(|about: &Self| about.origins.len() <= MOST_ORIGINS)
    }
}

impl Place {
    /// Makes room for a bundle.
    pub(super) fn stage(&mut self, bytes: u64, files: u64, entries: u64) -> io::Result<Staged> {
        let staged = match self {
            Self::Nowhere(why) => return Err(io::Error::other(why.clone())),
            Self::Disk(disk) => {
                disk.last += 1;
                let own = disk.directory.join("staging").join(disk.last.to_string());
                make_directory(&own, 0o700)?;
                Staged { files: own.join("files"), number: disk.last }
            }
            Self::Memory(memory) => {
                memory.last += 1;
                let own = memory.directory.join(memory.last.to_string());
                make_directory(&own, 0o700)?;
                // Each file takes whole pages.
                let size = bytes + files * 4096 + (64 << 10);
                let data = format!("size={size},nr_inodes={},mode=0700", entries + 16);
                let data = CString::new(data).map_err(|_| io::ErrorKind::InvalidInput)?;
                let flags = MountFlags::NOSUID | MountFlags::NODEV;
                mount("tmpfs", &own, "tmpfs", flags, data.as_c_str())?;
                memory.mounted.insert(memory.last);
                Staged { files: own.join("files"), number: memory.last }
            }
        };
        make_directory(&staged.files, 0o755)?;
        Ok(staged)
    }

    /// Puts what was made in its place, and tells where that is. On the disk it is not durable yet, see [`make_durable`].
    pub(super) fn keep(&mut self, staged: &Staged, digest: &Digest) -> io::Result<PathBuf> {
        match self {
            Self::Nowhere(why) => Err(io::Error::other(why.clone())),
            Self::Disk(disk) => {
                let own = disk.directory.join("bundles").join(hex(digest));
                fs::rename(disk.directory.join("staging").join(staged.number.to_string()), &own)?;
                Ok(own.join("files"))
            }
            Self::Memory(memory) => {
                let own = memory.directory.join(staged.number.to_string());
                let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
                mount_remount(&own, flags, c"")?;
                Ok(staged.files.clone())
            }
        }
    }

    /// Lets go of what was being made. On the disk, the directory that is left to be removed.
    pub(super) fn discard(&mut self, staged: &Staged) -> Option<PathBuf> {
        match self {
            Self::Nowhere(_) => None,
            Self::Disk(disk) => Some(disk.directory.join("staging").join(staged.number.to_string())),
            Self::Memory(memory) => {
                memory.free(staged.number);
                None
            }
        }
    }

    /// Takes a bundle, known by where its files are, out of its place. On the disk, the directory that is left to be
    /// removed.
    pub(super) fn take_out(&mut self, files: &Path) -> io::Result<Option<PathBuf>> {
        let own = files.parent().ok_or(io::ErrorKind::InvalidInput)?;
        match self {
            Self::Nowhere(why) => Err(io::Error::other(why.clone())),
            Self::Disk(disk) => {
                disk.last += 1;
                let gone = disk.directory.join("staging").join(disk.last.to_string());
                fs::rename(own, &gone)?;
                Ok(Some(gone))
            }
            Self::Memory(memory) => {
                let number = own.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
                memory.free(number.ok_or(io::ErrorKind::InvalidInput)?);
                Ok(None)
            }
        }
    }

    /// Where the uids are written, and the directory around it; `None` when nothing outlives the launcher.
    pub(crate) fn directory(&self) -> Option<&Path> {
        match self {
            Self::Disk(disk) => Some(&disk.directory),
            Self::Memory(_) | Self::Nowhere(_) => None,
        }
    }

    /// What whoever writes in it keeps open until its end.
    pub(super) fn lock(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Disk(disk) => Some(disk.lock.as_fd()),
            Self::Memory(_) | Self::Nowhere(_) => None,
        }
    }

    /// Whether a bundle is to be made durable.
    pub(super) const fn lasts(&self) -> bool {
        matches!(self, Self::Disk(_))
    }
}

impl Memory {
    /// In a directory that is the launcher's own, after [`crate::store::own_mounts`].
    pub(crate) fn new(directory: &Path) -> io::Result<Self> {
        make_directory(directory, 0o700)?;
        Ok(Self { directory: fs::canonicalize(directory)?, mounted: BTreeSet::new(), last: 0 })
    }

    /// Takes everything down.
    pub(super) fn release(&mut self) {
        for number in self.mounted.clone() {
            self.free(number);
        }
    }

    fn free(&mut self, number: u64) {
        let own = self.directory.join(number.to_string());
        if self.mounted.remove(&number) {
            // A plugin that still ends keeps its own mount of it until then.
            let _ = unmount(&own, UnmountFlags::DETACH);
        }
        drop(fs::remove_dir(own));
    }
}

impl Disk {
    /// Takes the store over, makes it when there is none, and tells which bundles are complete. May block: called before
    /// any request is read.
    pub(super) fn open(directory: &Path) -> Result<(Self, Vec<Left>), String> {
        let wrong = |doing: &str, error: &io::Error| {
            format!("--store {}: {doing} failed: {error}; correct it, or name another directory", directory.display())
        };
        if let Some(parent) = directory.parent().filter(|_| !directory.exists()) {
            let made = fs::create_dir_all(parent).and_then(|()| make_directory(directory, 0o700));
            made.map_err(|error| wrong("making it", &error))?;
        }
        let directory = fs::canonicalize(directory).map_err(|error| wrong("looking for it", &error))?;
        check_ancestors(&directory)?;
        let opened = open(&directory, OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
        let opened = opened.map_err(|error| wrong("opening it", &error.into()))?;
        if fstatvfs(&opened).is_ok_and(|host| host.f_flag.contains(StatVfsMountFlags::NOEXEC)) {
            return Err(format!(
                "--store {}: programs cannot be executed there (it is mounted noexec), and plugins are executed from the \
                 store; name a directory elsewhere",
                directory.display()
            ));
        }
        let lock =
            open(directory.join("lock"), OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC, Mode::from_raw_mode(0o600));
        let lock = lock.map_err(|error| wrong("opening its lock", &error.into()))?;
        // Two locks. The first is this process's alone, and goes when it ends: whoever holds it is a launcher.
        if fcntl_lock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(format!(
                "--store {}: another launcher uses it; give each plugvisord a directory of its own",
                directory.display()
            ));
        }
        // The second is inherited. A launcher that was killed may have left a child that is not dead yet, and that could
        // still write here: it keeps this lock (`writer`), and dies with its launcher, so this is a short wait and no
        // other launcher's life.
        retry_on_intr(|| flock(&lock, FlockOperation::LockExclusive))
            .map_err(|error| wrong("waiting for the last launcher's children", &error.into()))?;
        let layout = directory.join("layout");
        match fs::read_to_string(&layout) {
            Ok(text) if text == LAYOUT => {}
            Ok(_) => {
                return Err(format!(
                    "--store {}: its layout is not one that this version knows; use the version that made it, or move the \
                     directory away (bundles are imported again; plugins get new uids)",
                    directory.display()
                ));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                write_durable(&layout, LAYOUT).map_err(|error| wrong("writing its layout", &error))?;
            }
            Err(error) => return Err(wrong("reading its layout", &error)),
        }
        let mut this = Self { directory, lock, last: 0 };
        let left = this.clean().map_err(|error| wrong("cleaning it", &error))?;
        Ok((this, left))
    }

    /// Removes what no launcher finished.
    fn clean(&mut self) -> io::Result<Vec<Left>> {
        let staging = self.directory.join("staging");
        match fs::remove_dir_all(&staging) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        make_directory(&staging, 0o700)?;
        let bundles = self.directory.join("bundles");
        if !bundles.exists() {
            make_directory(&bundles, 0o700)?;
        }
        let mut complete = Vec::new();
        for entry in fs::read_dir(&bundles)? {
            let path = entry?.path();
            match read_left(&path) {
                Some(left) => complete.push(left),
                None => fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path))?,
            }
        }
        Ok(complete)
    }

    /// Where the files of a bundle are.
    pub(super) fn files_of(&self, digest: &Digest) -> PathBuf {
        self.directory.join("bundles").join(hex(digest)).join("files")
    }
}

/// A complete bundle: it has a list, and the list's digest is its name.
fn read_left(own: &Path) -> Option<Left> {
    let text = read_text(&own.join("list"))?;
    let digest = Digest::of(text.as_bytes());
    if own.file_name()?.to_str()? != hex(&digest) {
        return None;
    }
    let files = read_content_list(&text)?;
    let about = read_text(&own.join("about"))?;
    let About { name, stated, writable_code, origins } = About::read(&about)?;
    let origins = origins.into_iter().map(PathBuf::from).collect();
    Some(Left { digest: *digest.as_bytes(), files, name: name.parse().ok()?, stated, writable_code, origins })
}

fn read_text(path: &Path) -> Option<String> {
    let size = fs::symlink_metadata(path).ok().filter(fs::Metadata::is_file)?.len();
    if size > MOST_TEXT { None } else { fs::read_to_string(path).ok() }
}

/// Everything of a bundle to the disk, and then its list. Run by a child: the disk may take its time.
pub(super) fn make_durable(files: &Path, list: &str, about: &str) -> io::Result<()> {
    fn sync_all(directory: &Path) -> io::Result<()> {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if fs::symlink_metadata(&path)?.is_dir() {
                sync_all(&path)?;
            } else {
                fs::File::open(&path)?.sync_all()?;
            }
        }
        fs::File::open(directory)?.sync_all()
    }
    let own = files.parent().ok_or(io::ErrorKind::InvalidInput)?;
    sync_all(files)?;
    write_durable(&own.join("about"), about)?;
    write_durable(&own.join("list"), list)?;
    fs::File::open(own.parent().ok_or(io::ErrorKind::InvalidInput)?)?.sync_all()
}

/// Writes a file so that after a crash it is the old one or the new one. The disk may take its time.
pub(crate) fn write_durable(path: &Path, text: &str) -> io::Result<()> {
    Durable::prepare(path, text.to_owned())?.write()
}

/// A file that is to be written so, with all that needs memory done: a child that is forked from a process with several
/// threads, as tests are, must not allocate, for another thread may have held the allocator's lock.
pub(crate) struct Durable {
    path: CString,
    /// The name under which it is written before it takes the place of the old one.
    beside: CString,
    parent: CString,
    text: String,
}

impl Durable {
    pub(crate) fn prepare(path: &Path, text: String) -> io::Result<Self> {
        let parent = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        let name = |path: &Path| CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from);
        Ok(Self { path: name(path)?, beside: name(&path.with_extension("new"))?, parent: name(parent)?, text })
    }

    pub(crate) fn write(&self) -> io::Result<()> {
        let written = self.write_beside()?;
        fsync(&written)?;
        rename(&self.beside, &self.path)?;
        fsync(open(&self.parent, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)?;
        Ok(())
    }

    /// Writes the new file beside the old one; it still has to be renamed.
    fn write_beside(&self) -> io::Result<OwnedFd> {
        match unlink(&self.beside) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = open(&self.beside, flags, Mode::RUSR | Mode::WUSR)?;
        let mut rest = self.text.as_bytes();
        while !rest.is_empty() {
            match write(&file, rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(file)
    }
}

/// Whoever can write a directory on the way can put another store in this one's place.
fn check_ancestors(directory: &Path) -> Result<(), String> {
    let own = getuid().as_raw();
    for (at, path) in directory.ancestors().enumerate() {
        let Ok(found) = fs::symlink_metadata(path) else {
            return Err(format!("--store {}: {} cannot be looked at", directory.display(), path.display()));
        };
        let owned = found.uid() == own || (at > 0 && found.uid() == 0);
        // In a sticky directory such as /tmp nobody moves what another one owns.
        let closed = found.mode() & 0o022 == 0 || (at > 0 && found.mode() & 0o1000 != 0);
        if !owned || !closed {
            return Err(format!(
                "--store {}: {} can be written by others than the launcher's user (it belongs to uid {}, mode {:o}); \
                 name a directory that only root can write, on the whole way to it",
                directory.display(),
                path.display(),
                found.uid(),
                found.mode() & 0o7777
            ));
        }
    }
    Ok(())
}

fn make_directory(path: &Path, mode: u32) -> io::Result<()> {
    fs::DirBuilder::new().mode(mode).create(path)?;
    // The launcher's umask leaves nothing to others.
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

pub(super) fn hex(digest: &Digest) -> String {
    digest.to_string().trim_start_matches("sha256:").to_owned()
}

/// Whether the file belongs to the launcher's user and nobody else may write it.
pub(crate) fn only_ours(file: &OwnedFd) -> Result<(), String> {
    let found = fstat(file).map_err(|error| error.to_string())?;
    if found.st_uid != getuid().as_raw() {
        return Err(format!("it belongs to uid {}, not to the launcher's", found.st_uid));
    }
    if found.st_mode & 0o022 != 0 {
        return Err(format!("others may write it (mode {:o})", found.st_mode & 0o7777));
    }
    Ok(())
}
