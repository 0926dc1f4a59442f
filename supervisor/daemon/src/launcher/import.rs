//! Bringing a bundle into the launcher's store.
//!
//! The launcher copies and hashes every file itself and believes nothing that is said here; what was verified only says
//! what to expect, so that a file which changed since then is refused by its name.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
    time::Duration,
};

use plugvisor_package::{BundleFile, Digest};
use plugvisor_sandbox::protocol::{Import, ImportBegin, ImportFile, MAX_DESCRIPTORS, Reply, Request, Stored, Tier};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use super::client::{Answer, Launcher, LauncherError, PATIENCE};

/// How long the files of one packet may take: longer than the launcher allows, so that its refusal is what is told.
const COPY_PATIENCE: Duration = Duration::from_mins(3);

/// A verified bundle, as it can be imported.
#[derive(Debug)]
pub struct BundleFiles {
    /// Its content digest.
    pub digest: Digest,
    /// Its files.
    pub files: Vec<BundleFile>,
    /// Its directory.
    pub directory: OwnedFd,
}

impl Launcher {
    /// Makes sure that the launcher's store has the bundle and that to the launcher it has at least this tier, as far as
    /// importing it from where it lies can give it. What is there already is not copied again.
    pub async fn import(&self, bundle: Arc<BundleFiles>, tier: Tier) -> Result<(), LauncherError> {
        if self.stored(&bundle.digest).await?.is_some_and(|stored| stored.tier >= tier) {
            return Ok(());
        }
        let this = self.clone();
        // In a task of its own: an import that is begun is ended, whoever asked for it.
        let import = tokio::spawn(async move {
            let _one = this.importing.lock().await;
            if this.stored(&bundle.digest).await?.is_some_and(|stored| stored.tier >= tier) {
                return Ok(());
            }
            let imported = this.import_all(&bundle).await;
            if imported.is_err() {
                // A refusal has ended it already; anything else must not leave it open.
                let _ = this.step(Import::Abort, Vec::new(), PATIENCE).await;
            }
            imported.map(drop)
        });
        import.await.unwrap_or_else(|panic| Err(LauncherError::Request(panic.to_string())))
    }

    async fn stored(&self, digest: &Digest) -> Result<Option<Stored>, LauncherError> {
        self.step(Import::Find { bundle: *digest.as_bytes() }, Vec::new(), PATIENCE).await
    }

    async fn import_all(&self, bundle: &Arc<BundleFiles>) -> Result<Stored, LauncherError> {
        let begin = ImportBegin {
            bundle: *bundle.digest.as_bytes(),
            files: u32::try_from(bundle.files.len()).unwrap_or(u32::MAX),
            bytes: bundle.files.iter().map(|file| file.size).sum(),
        };
        self.step(Import::Begin(begin), Vec::new(), PATIENCE).await?;
        for at in (0..bundle.files.len()).step_by(MAX_DESCRIPTORS) {
            let end = bundle.files.len().min(at + MAX_DESCRIPTORS);
            let same = Arc::clone(bundle);
            // Opening a file may block.
            let opened = tokio::task::spawn_blocking(move || open(&same, at, end)).await;
            let opened = opened.unwrap_or_else(|panic| Err(io::Error::other(panic)));
            let descriptors = opened.map_err(|error| LauncherError::Request(error.to_string()))?;
            let files = bundle.files[at..end].iter().map(|file| ImportFile {
                path: file.path.clone(),
                executable: file.executable,
                size: file.size,
                sha256: *file.sha256.as_bytes(),
            });
            self.step(Import::Files(files.collect()), descriptors, COPY_PATIENCE).await?;
        }
        self.step(Import::Commit, Vec::new(), PATIENCE).await?.ok_or(LauncherError::Mismatch)
    }

    async fn step(
        &self,
        step: Import,
        descriptors: Vec<OwnedFd>,
        patience: Duration,
    ) -> Result<Option<Stored>, LauncherError> {
        match self.ask(Request::Import(step), descriptors, patience).await? {
            Answer::Plain(Reply::Imported(stored)) => Ok(stored),
            Answer::Plain(Reply::Done) => Ok(None),
            Answer::Plain(_) | Answer::Launched(_) | Answer::Reattached(_) | Answer::Socket(_) | Answer::Inward(..) => {
                Err(LauncherError::Mismatch)
            }
        }
    }
}

/// Opens some of its files, below the directory and without following a link.
fn open(bundle: &BundleFiles, at: usize, end: usize) -> io::Result<Vec<OwnedFd>> {
    let open = |file: &BundleFile| {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        openat2(bundle.directory.as_fd(), &file.path, flags, Mode::empty(), resolve)
            .map_err(|errno| io::Error::new(io::Error::from(errno).kind(), format!("{}: {errno}", file.path)))
    };
    bundle.files[at..end].iter().map(open).collect()
}
