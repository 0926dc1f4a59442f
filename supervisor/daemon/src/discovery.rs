//! Finding bundles in the configured directories.
//!
//! Directories are opened once, before privileges are given up, and everything in them is reached through those
//! descriptors. What a bundle may hold is the package's business; which of two bundles of one name counts is decided
//! here: neither of the later ones.

use std::{
    collections::BTreeSet,
    fmt,
    io::Read as _,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use plugvisor_core::{CapabilitySet, Code, Error};
use plugvisor_package::{Approval, Bundle, BundleError, BundleLimits, Capability, Manifest, PluginName, TrustTier};
use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags},
    io::Errno,
};

use crate::config::DirectoryConfig;

/// The most subdirectories that are looked at in one directory.
const MAX_BUNDLES: usize = 1024;

/// A configured directory, open.
#[derive(Debug)]
pub struct PluginDirectory {
    descriptor: OwnedFd,
    path: PathBuf,
    /// As it was configured.
    configured: PathBuf,
    tier: TrustTier,
    grants: CapabilitySet,
}

/// Why a configured directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the plugin directory {}: {source}; {}", path.display(), self.fix())]
pub struct DirectoryError {
    path: PathBuf,
    #[source]
    source: std::io::Error,
}

impl DirectoryError {
    /// What to do about it.
    #[must_use]
    pub fn fix(&self) -> &'static str {
        match self.source.kind() {
            std::io::ErrorKind::PermissionDenied => {
                "let the supervisor's user read it and pass the directories above it (chmod o+rx), or name another user in \
                 [supervisor] user"
            }
            _ => "create it, or correct its [[directory]] path",
        }
    }
}

/// The subdirectories of a plugin directory.
#[derive(Debug)]
pub struct Found {
    /// Those that have a manifest, or of which that cannot be told.
    pub candidates: Vec<Source>,
    /// The names of those without, which somebody may take for bundles.
    pub strays: Vec<String>,
}

/// Where one bundle lies; enough to open it again.
#[derive(Clone)]
pub struct Source {
    directory: Arc<PluginDirectory>,
    /// The subdirectory.
    name: String,
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Source").field(&self.path()).finish()
    }
}

impl PluginDirectory {
    /// Opens a configured directory. Links on the way to it are followed.
    pub fn open(config: &DirectoryConfig) -> Result<Self, DirectoryError> {
        let failed = |source: std::io::Error| DirectoryError { path: config.path.clone(), source };
        let path = config.path.canonicalize().map_err(failed)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let descriptor = rustix::fs::open(&path, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
        let grants: CapabilitySet = config.grants.iter().copied().collect::<Vec<Capability>>().into_iter().collect();
        Ok(Self { descriptor, path, configured: config.path.clone(), tier: config.tier, grants })
    }

    /// Whether it was opened for this setting: its path is real and the setting's may lead there by links, so that the
    /// latter is kept as it was.
    #[must_use]
    pub fn is(&self, config: &DirectoryConfig) -> bool {
        self.configured == config.path
    }

    /// Its real path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads it once, sorted by name.
    pub fn look(self: &Arc<Self>) -> Result<Found, DirectoryError> {
        let failed = |error: Errno| DirectoryError { path: self.path.clone(), source: error.into() };
        let (mut names, mut strays) = (BTreeSet::new(), BTreeSet::new());
        for entry in Dir::read_from(&self.descriptor).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let Ok(name) = entry.file_name().to_str() else { continue };
            if name.starts_with('.') || matches!(entry.file_type(), FileType::RegularFile) {
                continue;
            }
            let manifest = format!("{name}/{}", Manifest::FILE_NAME);
            match rustix::fs::statat(&self.descriptor, &manifest, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) if strays.len() < MAX_BUNDLES => {
                    strays.insert(name.to_owned());
                }
                Err(Errno::NOTDIR | Errno::NOENT) => {}
                // One that may not be looked into is shown with the reason, and not as if it were not there.
                Ok(_) | Err(_) => {
                    names.insert(name.to_owned());
                }
            }
            if names.len() >= MAX_BUNDLES {
                tracing::warn!(directory = %self.path.display(), "only the first {MAX_BUNDLES} bundles are read");
                break;
            }
        }
        let candidates = names.into_iter().map(|name| self.source(name)).collect();
        Ok(Found { candidates, strays: strays.into_iter().collect() })
    }

    /// The tier that the operator gave it.
    #[must_use]
    pub fn tier(&self) -> TrustTier {
        self.tier
    }

    /// The bundle in the subdirectory `name`.
    #[must_use]
    pub fn source(self: &Arc<Self>, name: String) -> Source {
        Source { directory: Arc::clone(self), name }
    }
}

impl Source {
    /// The bundle's directory.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.directory.path.join(&self.name)
    }

    /// The subdirectory's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The tier that the operator gave to the directory.
    #[must_use]
    pub fn tier(&self) -> TrustTier {
        self.directory.tier
    }

    /// The approval that lies beside the bundle, if one does; an error says why it is none. Blocks. It is no more than a
    /// claim: the launcher verifies it.
    pub fn approval(&self) -> Result<Option<Approval>, String> {
        let Self { directory, name } = self;
        let file = format!("{name}{}", Approval::SUFFIX);
        let wrong = |why: &dyn fmt::Display| format!("{}: {why}", directory.path.join(&file).display());
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let opened = match rustix::fs::openat(&directory.descriptor, &file, flags, Mode::empty()) {
            Ok(opened) => std::fs::File::from(opened),
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(wrong(&errno)),
        };
        let found = opened.metadata().map_err(|error| wrong(&error))?;
        if !found.is_file() || found.len() > Approval::MOST_BYTES {
            return Err(wrong(&"it is not a small regular file"));
        }
        // One that does not hold keeps the plugin from running: who may not change the bundle may not do that either.
        let bundle = rustix::fs::statat(&directory.descriptor, name, AtFlags::SYMLINK_NOFOLLOW);
        let bundle = bundle.map_err(|errno| wrong(&errno))?;
        if ![0, rustix::process::geteuid().as_raw(), bundle.st_uid].contains(&found.uid()) {
            let why =
                format!("it belongs to uid {}, and not to root, the supervisor or the bundle's owner", found.uid());
            return Err(wrong(&why));
        }
        let mut bytes = Vec::new();
        opened.take(Approval::MOST_BYTES).read_to_end(&mut bytes).map_err(|error| wrong(&error))?;
        Approval::read(&bytes).map(Some).map_err(|error| wrong(&error))
    }

    /// The capabilities that the operator gave to the directory.
    #[must_use]
    pub fn grants(&self) -> CapabilitySet {
        self.directory.grants
    }

    /// Reads, judges and hashes the bundle. Blocks.
    pub fn open(&self) -> Result<Bundle, Rejection> {
        let Self { directory, name } = self;
        use std::os::fd::AsFd as _;
        Bundle::open_at(directory.descriptor.as_fd(), &directory.path, name, &BundleLimits::default())
            .map_err(|error| Rejection::of(&error))
    }
}

/// Why a bundle is not used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// What is wrong and what to do.
    pub error: Error,
    /// Each problem, when the manifest has several.
    pub problems: Vec<String>,
}

impl Rejection {
    fn of(error: &BundleError) -> Self {
        let code = match error {
            BundleError::Io { .. } | BundleError::Refused { .. } => Code::BundleInvalid,
            BundleError::NoManifest { .. } | BundleError::Manifest { .. } => Code::ManifestInvalid,
            BundleError::EntryMissing { .. } => Code::EntryMissing,
            BundleError::EntryNotExecutable { .. } => Code::EntryNotExecutable,
            BundleError::EntryNotAProgram { .. } | BundleError::EntryArchitecture { .. } => Code::EntryWrongFormat,
            BundleError::DescriptorMissing { .. } | BundleError::Descriptor { .. } => Code::DescriptorInvalid,
            BundleError::Checksum { .. } => Code::DigestMismatch,
        };
        let problems = match error {
            BundleError::Manifest { problems, .. } => problems.all().iter().map(ToString::to_string).collect(),
            _ => Vec::new(),
        };
        Self { error: Error::new(code, error.to_string(), error.hint()), problems }
    }

    /// The bundle bears a name that an earlier one has.
    #[must_use]
    pub fn duplicate(name: &PluginName, this: &Path, first: &Path) -> Self {
        let error = Error::new(
            Code::ManifestDuplicate,
            format!("{} bears the name {name}, which {} has already", this.display(), first.display()),
            "rename one of them, or take one out of the plugin directories",
        );
        Self { error, problems: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(path: &Path) -> Arc<PluginDirectory> {
        let config =
            DirectoryConfig { index: 0, path: path.to_owned(), tier: TrustTier::Verified, grants: BTreeSet::new() };
        Arc::new(PluginDirectory::open(&config).unwrap())
    }

    #[test]
    fn only_subdirectories_with_a_manifest_are_candidates() {
        let parent = tempfile::tempdir().unwrap();
        for name in ["b", "a", ".hidden", "empty"] {
            std::fs::create_dir(parent.path().join(name)).unwrap();
        }
        for name in ["b", "a", ".hidden"] {
            std::fs::write(parent.path().join(name).join("plugin.json"), "{").unwrap();
        }
        std::fs::write(parent.path().join("file"), "").unwrap();
        let Found { candidates: found, strays } = directory(parent.path()).look().unwrap();
        assert_eq!(strays, ["empty"]);
        assert_eq!(found.iter().map(Source::name).collect::<Vec<_>>(), ["a", "b"]);
        let rejection = found[0].open().expect_err("a broken manifest");
        assert_eq!(rejection.error.code, Code::ManifestInvalid);
        assert!(!rejection.problems.is_empty());
    }

    #[test]
    fn a_missing_directory_is_named() {
        let path = PathBuf::from("/no/such/directory");
        let config = DirectoryConfig { index: 0, path, tier: TrustTier::Verified, grants: BTreeSet::new() };
        let error = PluginDirectory::open(&config).unwrap_err().to_string();
        assert!(error.contains("/no/such/directory") && error.contains("[[directory]]"), "{error}");
    }
}
