//! An import: from the first word to the bundle in its place. One at a time.
//!
//! The launcher makes every directory and every file itself, below a directory of its own, from paths that it has
//! checked; a child copies into them. A refusal ends the import and leaves nothing of it.

mod packet;
mod words;

use std::{
    collections::BTreeSet,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    time::{Duration, Instant},
};

use plugvisor_package::{BundleFile, Digest, PluginName, content_digest, content_list};
use plugvisor_sandbox::protocol::{ImportBegin, ImportFile, Refusal, RefusalCode};
use rustix::{
    fs::{Mode, OFlags, open},
    process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid},
};

use self::{
    packet::Given,
    words::{shown, wrong},
};
use super::{
    Bundle, Store,
    chore::Chore,
    copy::{self, Outcome},
    origin::{Doubt, Listing},
    place::{About, Staged},
    stated::Stated,
    writable_code::WritableCode,
};
use crate::{
    check::{self, refuse},
    level,
};

/// With more directories waiting to be removed nothing is imported: the disk does not keep up.
const MANY_CHORES: usize = 64;

/// What has come of a bundle.
pub(super) struct Transaction {
    begin: ImportBegin,
    staged: Staged,
    root: OwnedFd,
    deadline: Instant,
    files: Vec<BundleFile>,
    bytes: u64,
    /// Every directory so far.
    directories: BTreeSet<String>,
    manifest: Option<(PluginName, Stated)>,
    writable_code: WritableCode,
    origin: Origin,
    copying: Option<Copying>,
}

/// Where the files were, as far as they have come.
enum Origin {
    Unknown,
    /// All of them beneath this directory, each at its own path. What it has, once that was looked at.
    Bundle {
        path: PathBuf,
        listing: Option<[u8; 32]>,
    },
    /// Where nothing vouches for them.
    None(Doubt),
}

impl Origin {
    /// The directory that vouches for a bundle with these files.
    fn vouches(self, files: &[BundleFile]) -> Result<PathBuf, Doubt> {
        match self {
            Self::Bundle { path, listing } => {
                let mut came = Listing::default();
                files.iter().for_each(|file| came.add(&file.path, file.executable));
                if listing == Some(came.digest()) { Ok(path) } else { Err(Doubt::Partial { bundle: path }) }
            }
            Self::None(doubt) => Err(doubt),
            Self::Unknown => Err(Doubt::Elsewhere),
        }
    }
}

/// The child that copies the files of one packet.
struct Copying {
    /// Who waits for it; nobody when that supervisor is gone.
    request: Option<u64>,
    pidfd: OwnedFd,
    pid: i32,
    report: OwnedFd,
    files: Vec<ImportFile>,
    deadline: Instant,
    /// It was killed: the answer is this.
    refusal: Option<Refusal>,
}

impl Transaction {
    pub(super) const fn digest(&self) -> [u8; 32] {
        self.begin.bundle
    }

    pub(super) fn is_child(&self, pid: i32) -> bool {
        self.copying.as_ref().is_some_and(|copying| copying.pid == pid)
    }

    pub(super) fn kill(&self) {
        if let Some(copying) = &self.copying {
            let _ = pidfd_send_signal(&copying.pidfd, Signal::KILL);
        }
    }
}

impl Store {
    /// Begins an import.
    pub(crate) fn begin(&mut self, begin: ImportBegin, in_use: &BTreeSet<[u8; 32]>) -> Result<(), Refusal> {
        let named = Digest::from_bytes(begin.bundle);
        if self.transaction.is_some() || self.chores.waiting() > MANY_CHORES {
            return refuse(
                RefusalCode::InUse,
                format!("bundle {named} was not imported: another import is under way; end it first"),
            );
        }
        let limits = &self.limits.bundle;
        if begin.files == 0 || u64::from(begin.files) > limits.entries as u64 || begin.bytes > limits.total_bytes {
            return refuse(
                RefusalCode::Policy,
                format!(
                    "bundle {named} was not imported: a bundle has 1 to {} files of {} bytes together; leave out what the \
                     plugin does not need when it runs",
                    limits.entries, limits.total_bytes
                ),
            );
        }
        // An import of what is here already only tells where it came from, and is not kept.
        if !self.bundles.contains_key(&begin.bundle) {
            self.make_room(begin.bytes, in_use)?;
        }
        let failed = |doing: &str, error: &std::io::Error| Refusal {
            code: RefusalCode::Kernel,
            message: format!("bundle {named} was not imported: {doing} failed: {error}"),
        };
        let staged = self.place.stage(begin.bytes, begin.files.into(), self.limits.bundle.entries as u64);
        let staged = staged.map_err(|error| failed("making room in the store", &error))?;
        let root = open(&staged.files, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        match root {
            Ok(root) => {
                self.transaction = Some(Transaction {
                    begin,
                    staged,
                    root,
                    deadline: Instant::now() + self.limits.import_time,
                    files: Vec::new(),
                    bytes: 0,
                    directories: BTreeSet::new(),
                    manifest: None,
                    writable_code: WritableCode::None,
                    origin: Origin::Unknown,
                    copying: None,
                });
                Ok(())
            }
            Err(errno) => {
                let gone = self.place.discard(&staged);
                self.chores.add(gone.map(Chore::Remove));
                Err(failed("opening its place in the store", &errno.into()))
            }
        }
    }

    /// Takes files. The answer comes when they are copied; the pidfd of who does it is to be watched.
    pub(crate) fn take_files(
        &mut self,
        request: u64,
        files: Vec<ImportFile>,
        descriptors: &[OwnedFd],
        roots: &BTreeSet<PathBuf>,
    ) -> Result<BorrowedFd<'_>, Refusal> {
        let Some(transaction) = &mut self.transaction else { return no_import() };
        if transaction.copying.is_some() {
            return refuse(RefusalCode::InUse, "files of this import are being copied; wait for the answer");
        }
        let (limits, copier, owners) = (&self.limits, self.copier, self.owners);
        match transaction.take(request, files, descriptors, &Given { limits, copier, owners, roots }) {
            Ok(()) => {}
            Err(refusal) => {
                self.abort();
                return Err(refusal);
            }
        }
        match self.transaction.as_ref().and_then(|transaction| transaction.copying.as_ref()) {
            Some(copying) => Ok(copying.pidfd.as_fd()),
            None => no_import(),
        }
    }

    /// The child that copies has ended: who is to be answered, what, and the pidfd that is no longer to be watched.
    pub(crate) fn copied(&mut self) -> Option<(Option<u64>, Result<(), Refusal>, OwnedFd)> {
        let transaction = self.transaction.as_mut()?;
        let copying = transaction.copying.as_ref()?;
        if let Ok(None) = waitid(WaitId::PidFd(copying.pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
            return None;
        }
        let Copying { request, pidfd, report, files, refusal, .. } = transaction.copying.take()?;
        let mut message = vec![0; copy::MESSAGE];
        let read = rustix::io::read(&report, &mut message).unwrap_or(0);
        let result = match (refusal, Outcome::decode(&message[..read])) {
            (Some(refusal), _) => Err(refusal),
            (None, Some(Outcome::Copied { told, in_place, listing, writable_code })) => {
                transaction.seen(in_place, listing);
                if let (Some((index, by)), WritableCode::None) = (writable_code, &transaction.writable_code) {
                    let file = files.get(index).map(|file| file.path.clone()).unwrap_or_default();
                    transaction.writable_code = WritableCode::Asked { file, by };
                }
                transaction.arrived(told)
            }
            (None, Some(Outcome::Wrong { index, why })) => Err(wrong(files.get(index), &why)),
            (None, None) => refuse(
                RefusalCode::File,
                "the process that copied the files was killed: one of them is larger than was said, or memory is short",
            ),
        };
        if result.is_err() {
            self.abort();
        }
        Some((request, result, pidfd))
    }

    /// Ends the import.
    pub(crate) fn commit(&mut self, roots: &BTreeSet<PathBuf>) -> Result<[u8; 32], Refusal> {
        if self.transaction.as_ref().is_some_and(|transaction| transaction.copying.is_some()) {
            return refuse(RefusalCode::InUse, "files of this import are being copied; wait for the answer");
        }
        let Some(transaction) = self.transaction.take() else { return no_import() };
        let Transaction { begin, staged, files, bytes, manifest, writable_code, origin, .. } = transaction;
        let result = complete(&begin, &files, bytes).and_then(|()| {
            let (name, stated) = manifest.ok_or_else(|| Refusal {
                code: RefusalCode::File,
                message: "the bundle was not imported: no plugin.json came; a bundle has one".to_owned(),
            })?;
            runnable(&name, &stated, &files).map(|()| (name, stated))
        });
        let (name, stated) = match result {
            Ok(manifest) => manifest,
            Err(refusal) => {
                self.let_go(&staged);
                return Err(refusal);
            }
        };
        let origin = origin.vouches(&files);
        self.uses += 1;
        let uses = self.uses;
        if let Some(known) = self.bundles.get_mut(&begin.bundle) {
            known.used = uses;
            known.came_from(origin, roots);
            self.let_go(&staged);
        } else {
            let digest = Digest::from_bytes(begin.bundle);
            let path = match self.place.keep(&staged, &digest) {
                Ok(path) => path,
                Err(error) => {
                    self.let_go(&staged);
                    return refuse(RefusalCode::Kernel, format!("bundle {digest} was not imported: {error}"));
                }
            };
            let origins = BTreeSet::new();
            let mut bundle =
                Bundle { path, files, name, stated, writable_code, bytes, origins, doubt: None, used: uses };
            bundle.came_from(origin, roots);
            self.bundles.insert(begin.bundle, bundle);
        }
        self.make_durable(&begin.bundle);
        Ok(begin.bundle)
    }

    /// The supervisor is gone, and with it whoever waits for an answer.
    pub(crate) fn abandon(&mut self) {
        if let Some(Transaction { copying: Some(copying), .. }) = &mut self.transaction {
            copying.request = None;
        }
        self.abort();
    }

    /// Ends the import without a result.
    pub(crate) fn abort(&mut self) {
        match &mut self.transaction {
            // Its end is awaited: until then it may write.
            Some(Transaction { copying: Some(copying), .. }) => {
                let _ = pidfd_send_signal(&copying.pidfd, Signal::KILL);
                copying.refusal.get_or_insert_with(|| Refusal {
                    code: RefusalCode::InUse,
                    message: "the import was ended while files of it were being copied".to_owned(),
                });
            }
            Some(_) => {
                if let Some(transaction) = self.transaction.take() {
                    self.let_go(&transaction.staged);
                }
            }
            None => {}
        }
    }

    /// When something must be looked at without an event.
    pub(crate) fn due(&self) -> Option<Duration> {
        let transaction = self.transaction.as_ref()?;
        let deadline = transaction.copying.as_ref().map_or(transaction.deadline, |copying| {
            // One that was killed ends by itself.
            if copying.refusal.is_some() { transaction.deadline } else { copying.deadline.min(transaction.deadline) }
        });
        Some(deadline.saturating_duration_since(Instant::now()))
    }

    /// Ends what takes too long.
    pub(crate) fn overdue(&mut self) {
        let now = Instant::now();
        let Some(transaction) = &mut self.transaction else { return };
        let late = transaction.deadline <= now;
        match &mut transaction.copying {
            Some(copying) if copying.refusal.is_none() => {
                if !late && copying.deadline > now {
                    return;
                }
                let message = format!(
                    "the bundle was not imported: its files were not copied in time ({} s a packet, {} s altogether); look \
                     at the file system that they are on",
                    self.limits.copy_time.as_secs(),
                    self.limits.import_time.as_secs()
                );
                copying.refusal = Some(Refusal { code: RefusalCode::File, message });
                let _ = pidfd_send_signal(&copying.pidfd, Signal::KILL);
            }
            // A child that no signal ends keeps the import open, so that there is never a second one.
            Some(_) => transaction.deadline = transaction.deadline.max(now + self.limits.import_time),
            None if late => self.abort(),
            None => {}
        }
    }

    fn let_go(&mut self, staged: &Staged) {
        let gone = self.place.discard(staged);
        self.chores.add(gone.map(Chore::Remove));
    }

    fn make_durable(&mut self, digest: &[u8; 32]) {
        let Some(bundle) = self.bundles.get(digest).filter(|_| self.place.lasts()) else { return };
        let about = About {
            name: bundle.name.to_string(),
            stated: bundle.stated.clone(),
            writable_code: bundle.writable_code.clone(),
            // A path that is no text is not written: nobody is approved by it.
            origins: bundle.origins.iter().filter_map(|origin| origin.to_str()).map(str::to_owned).collect(),
        };
        self.chores.add([Chore::MakeDurable {
            files: bundle.path.clone(),
            list: content_list(&bundle.files),
            about: about.write(),
        }]);
    }
}

/// Whether it has the program that it names, and may be given what it asks for.
fn runnable(name: &PluginName, stated: &Stated, files: &[BundleFile]) -> Result<(), Refusal> {
    if !files.iter().any(|file| file.path == stated.exec && file.executable) {
        return refuse(
            RefusalCode::Entry,
            format!(
                "the bundle of {name} was not imported: it has no executable file {}, which its runtime.exec names; \
                 correct the bundle",
                shown(&stated.exec)
            ),
        );
    }
    // Where its sockets are makes no difference.
    let asked = check::Asked { generation: 0, grants: &stated.grants(), environment: &[] };
    check::program(name, &asked, stated, level::PROCESS).map(drop)
}

fn no_import<T>() -> Result<T, Refusal> {
    refuse(RefusalCode::Policy, "no import is under way; begin one")
}

/// Whether everything that was said has come.
fn complete(begin: &ImportBegin, files: &[BundleFile], bytes: u64) -> Result<(), Refusal> {
    if files.len() as u64 != u64::from(begin.files) || bytes != begin.bytes {
        return refuse(
            RefusalCode::Policy,
            format!(
                "the bundle was not imported: {} files of {bytes} bytes came, {} of {} bytes were said to come",
                files.len(),
                begin.files,
                begin.bytes
            ),
        );
    }
    let found = content_digest(files);
    if *found.as_bytes() != begin.bundle {
        let named = Digest::from_bytes(begin.bundle);
        return refuse(
            RefusalCode::DigestMismatch,
            format!("the bundle was not imported: its content is {found}, not {named}; verify it again"),
        );
    }
    Ok(())
}
