//! Bundles as directories: what is in them, whether it may be there, and the digest of it all.
//!
//! The directory belongs to a stranger and may change while it is read. Every file is opened once, below the
//! directory's descriptor and without following a link; what is judged, hashed and handed on is what that one
//! descriptor gave. This module does not know who launches the entry: the launcher hashes it again as it executes it.

mod entry;
mod services;
mod walk;

use std::{
    fs::File,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags},
    io::Errno,
};

pub use self::services::Services;
use self::{
    entry::Verdict,
    walk::{Found, Wanted},
};
use crate::{BundleFile, BundleLimits, Digest, Manifest, Problems, content_digest, descriptor};

/// An opened bundle.
#[derive(Debug)]
pub struct Bundle {
    /// Its manifest.
    pub manifest: Manifest,
    /// The digest of its content.
    pub digest: Digest,
    /// The program that is started.
    pub entry: Entry,
    /// The services that it serves and offers, by their full names.
    pub services: Services,
    /// The `google.protobuf.FileDescriptorSet` of its services, if the bundle has one.
    pub descriptor_set: Option<Vec<u8>>,
    /// Files in the bundle, sorted by path.
    pub files: Vec<BundleFile>,
    directory: OwnedFd,
    path: PathBuf,
}

impl Bundle {
    /// Opens the bundle at `path`. Links on the way to it are followed, links in it are refused.
    ///
    /// # Errors
    ///
    /// See [`BundleError`].
    pub fn open(path: &Path, limits: &BundleLimits) -> Result<Self, BundleError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty());
        let directory = directory.map_err(|errno| BundleError::Io { path: path.to_owned(), source: errno.into() })?;
        Self::from_directory(directory, path.to_owned(), limits)
    }

    /// Opens the bundle in the subdirectory `name` of `parent`, a descriptor of the directory `parent_path`. A `name`
    /// that is a link or more than one component is refused.
    ///
    /// # Errors
    ///
    /// See [`BundleError`].
    pub fn open_at(
        parent: BorrowedFd<'_>,
        parent_path: &Path,
        name: &str,
        limits: &BundleLimits,
    ) -> Result<Self, BundleError> {
        let path = parent_path.join(name);
        if name.contains('/') || matches!(name, "" | "." | "..") {
            return Err(BundleError::Io { path, source: std::io::ErrorKind::InvalidInput.into() });
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(parent, name, flags, Mode::empty()) {
            Ok(directory) => Self::from_directory(directory, path, limits),
            // With O_DIRECTORY the kernel says ENOTDIR for a link; only ELOOP names it on its own.
            Err(errno @ (Errno::LOOP | Errno::NOTDIR)) => {
                let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW);
                match stat.map(|stat| FileType::from_raw_mode(stat.st_mode)) {
                    Ok(FileType::Symlink) => Err(BundleError::Refused { path, refusal: Refusal::SymbolicLink }),
                    _ => Err(BundleError::Io { path, source: errno.into() }),
                }
            }
            Err(errno) => Err(BundleError::Io { path, source: errno.into() }),
        }
    }

    fn from_directory(directory: OwnedFd, path: PathBuf, limits: &BundleLimits) -> Result<Self, BundleError> {
        let manifest_path = path.join(Manifest::FILE_NAME);
        let most = limits.manifest.bytes as u64;
        let Some(bytes) = walk::read_file(directory.as_fd(), &path, Manifest::FILE_NAME, most)? else {
            return Err(BundleError::NoManifest { path });
        };
        let wrong = |problems| BundleError::Manifest { path: manifest_path.clone(), problems };
        let manifest = Manifest::parse(&bytes, &limits.manifest).map_err(wrong)?;

        let wanted = Wanted {
            keep: manifest.runtime.exec.clone(),
            load: manifest.runtime.descriptor_set.clone(),
            skip: Manifest::FILE_NAME,
        };
        let Found { mut files, kept, loaded } = walk::walk(directory.as_fd(), &path, &wanted, limits)?;
        let entry = Entry::judge(&path, &manifest.runtime.exec, kept, &files)?;

        let canonical = manifest.canonical();
        files.push(BundleFile {
            path: Manifest::FILE_NAME.to_owned(),
            executable: false,
            size: canonical.len() as u64,
            sha256: Digest::of(&canonical),
        });
        files.sort();
        let digest = content_digest(&files);
        if let Some(stated) = manifest.security.checksum.filter(|stated| *stated != digest) {
            return Err(BundleError::Checksum { path, stated, actual: digest });
        }

        let descriptor_path = path.join(&manifest.runtime.descriptor_set);
        if loaded.is_none() && manifest.runtime.descriptor_set_stated {
            return Err(BundleError::DescriptorMissing { path: descriptor_path });
        }
        let known = loaded.as_deref().map(|bytes| descriptor::service_names(bytes, limits.services));
        let known = known.transpose().map_err(|why| BundleError::Descriptor { path: descriptor_path, why })?;
        let services = Services::resolve(&manifest, known.as_deref(), &limits.manifest).map_err(wrong)?;
        Ok(Self { manifest, digest, entry, services, descriptor_set: loaded, files, directory, path })
    }

    /// The bundle's directory, open for reading. The launcher mounts it.
    #[must_use]
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Where the directory was found, for people.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The program that is started.
#[derive(Debug)]
pub struct Entry {
    /// Its path in the bundle.
    pub path: String,
    /// Open for reading, at offset 0.
    pub file: File,
    /// The digest of its bytes.
    pub sha256: Digest,
    /// How the kernel will run it.
    pub kind: EntryKind,
}

impl Entry {
    fn judge(root: &Path, within: &str, kept: Option<File>, files: &[BundleFile]) -> Result<Self, BundleError> {
        let path = root.join(within);
        let listed = files.iter().find(|file| file.path == within);
        let (Some(file), Some(listed)) = (kept, listed) else {
            return Err(BundleError::EntryMissing { path });
        };
        if !listed.executable {
            return Err(BundleError::EntryNotExecutable { path });
        }
        let mut head = [0; entry::HEAD];
        let mut filled = 0;
        while filled < head.len() {
            match file.read_at(&mut head[filled..], filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(source) => return Err(BundleError::Io { path, source }),
            }
        }
        match entry::judge(&head[..filled], entry::HOST) {
            Verdict::Runs(kind) => Ok(Self { path: within.to_owned(), file, sha256: listed.sha256, kind }),
            Verdict::NotAProgram => Err(BundleError::EntryNotAProgram { path }),
            Verdict::WrongMachine { found } => {
                Err(BundleError::EntryArchitecture { path, found, host: entry::HOST.name })
            }
        }
    }
}

/// How the kernel runs an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A native program.
    Elf,
    /// A text that begins with `#!`.
    Script,
}

/// Why a bundle was not opened. [`BundleError::hint`] says what to do.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// What could not be read.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The directory has no `plugin.json`.
    #[error("{} has no plugin.json", path.display())]
    NoManifest {
        /// The directory.
        path: PathBuf,
    },
    /// The manifest is wrong, or names services that the descriptor set has not.
    #[error("{}: {problems}", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// Everything that is wrong with it.
        problems: Problems,
    },
    /// The directory holds something that a bundle may not.
    #[error("{}: {refusal}", path.display())]
    Refused {
        /// What.
        path: PathBuf,
        /// Why.
        refusal: Refusal,
    },
    /// The entry does not exist.
    #[error("the entry {} does not exist", path.display())]
    EntryMissing {
        /// Where it should be.
        path: PathBuf,
    },
    /// The entry has no executable bit.
    #[error("the entry {} is not executable", path.display())]
    EntryNotExecutable {
        /// The entry.
        path: PathBuf,
    },
    /// The entry is neither a native program nor a script.
    #[error("the entry {} is neither an ELF program nor a script that begins with #!", path.display())]
    EntryNotAProgram {
        /// The entry.
        path: PathBuf,
    },
    /// The entry was built for another machine.
    #[error("the entry {} is built for {found}, this host is {host}", path.display())]
    EntryArchitecture {
        /// The entry.
        path: PathBuf,
        /// What the entry's header names.
        found: String,
        /// What this host is.
        host: &'static str,
    },
    /// The manifest names a descriptor set that is not there.
    #[error("the descriptor set {} does not exist", path.display())]
    DescriptorMissing {
        /// Where it should be.
        path: PathBuf,
    },
    /// The descriptor set is not a `google.protobuf.FileDescriptorSet`, or beyond its limits.
    #[error("the descriptor set {}: {why}", path.display())]
    Descriptor {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The content is not what the manifest's checksum says.
    #[error("security.checksum states {stated}, but the content of {} is {actual}", path.display())]
    Checksum {
        /// The bundle.
        path: PathBuf,
        /// What the manifest states.
        stated: Digest,
        /// What the content is.
        actual: Digest,
    },
}

/// What a bundle may not hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the texts say it")]
pub enum Refusal {
    #[error("it is a symbolic link")]
    SymbolicLink,
    #[error("it is a {0}, not a file or directory")]
    Special(&'static str),
    #[error("it has the set-user-id or set-group-id bit")]
    SetId,
    #[error("its name is not UTF-8")]
    NameNotUtf8,
    #[error("its name has a control character")]
    NameControl,
    #[error("its name is longer than {0} bytes")]
    NameTooLong(usize),
    #[error("the bundle has more than {0} files and directories")]
    TooManyEntries(usize),
    #[error("it lies deeper than {0} directories")]
    TooDeep(usize),
    #[error("it is larger than {0} bytes")]
    FileTooLarge(u64),
    #[error("the bundle is larger than {0} bytes")]
    BundleTooLarge(u64),
    #[error("it changed while it was read")]
    Changed,
}

impl BundleError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> String {
        match self {
            Self::Io { .. } => "check that the file exists and that this user may read it".into(),
            Self::NoManifest { .. } => "add a plugin.json; `plugvisor plugin validate DIRECTORY` checks it".into(),
            Self::Manifest { .. } => "correct the manifest; `plugvisor plugin validate DIRECTORY` checks it".into(),
            Self::Refused { refusal, .. } => refusal.hint(),
            Self::EntryMissing { .. } => "build the program into that place, or set runtime.exec to where it is".into(),
            Self::EntryNotExecutable { path } => format!("chmod +x {}", path.display()),
            Self::EntryNotAProgram { .. } => "put an executable program there, or set runtime.exec to one".into(),
            Self::EntryArchitecture { host, .. } => format!("build the program for {host}"),
            Self::DescriptorMissing { .. } => {
                "write it with `protoc --include_imports --descriptor_set_out`, or take runtime.descriptorSet out"
                    .into()
            }
            Self::Descriptor { .. } => "write it with `protoc --include_imports --descriptor_set_out`".into(),
            Self::Checksum { actual, .. } => {
                let actual = actual.to_string();
                let hash = actual.trim_start_matches("sha256:");
                format!("if you did not change it, do not load it; if you did, set security.checksum.hash to {hash}")
            }
        }
    }
}

impl Refusal {
    fn hint(&self) -> String {
        match self {
            Self::SymbolicLink => "put the file itself in its place".into(),
            Self::Special(_) => "remove it".into(),
            Self::SetId => "chmod u-s,g-s it".into(),
            Self::NameNotUtf8 | Self::NameControl | Self::NameTooLong(_) => "rename it".into(),
            Self::TooManyEntries(_) | Self::TooDeep(_) | Self::FileTooLarge(_) | Self::BundleTooLarge(_) => {
                "leave out what the plugin does not need when it runs".into()
            }
            Self::Changed => "try again when nothing writes to it".into(),
        }
    }
}
