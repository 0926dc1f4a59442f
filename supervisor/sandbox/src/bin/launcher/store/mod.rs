//! The store: every file of every bundle that may be launched, brought in by copying and hashing, known by the content
//! digest of what was written.
//!
//! What a plugin executes and reads is what lies here, and only the launcher writes here: so the bytes hashed are the
//! bytes executed, for the whole bundle. The digest is the one that authors, operators and registries see, because what is
//! stored of `plugin.json` is its canonical form (ADR 4). The store knows no tiers: it remembers which directories a
//! bundle came from, and `policy` says what that is worth.

mod chore;
mod copy;
mod import;
mod origin;
mod place;
mod stated;
mod writable_code;
mod writer;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::{BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use plugvisor_package::{BundleFile, BundleLimits, Digest, PluginName};
use plugvisor_sandbox::{
    options::Options,
    protocol::{Refusal, RefusalCode},
};
use rustix::{
    fs::{Mode, OFlags},
    process::{getgid, getuid},
};

use self::{
    chore::{Chore, Chores},
    import::Transaction,
    place::{Disk, MOST_ORIGINS, Memory, Place},
};
pub(crate) use self::{
    origin::{Doubt, Owners, check_root, open_root},
    place::{Durable, only_ours},
    stated::Stated,
    writable_code::{Asking, WritableCode},
    writer::become_writer,
};
use crate::{
    check::refuse,
    creds::{self, Identity},
    kernel,
};

/// The directory for a store in memory, in the launcher's own.
const IN_MEMORY: &str = "store";

/// What the store takes at most.
#[derive(Clone, Debug)]
pub(crate) struct StoreLimits {
    /// Bounds on each bundle.
    pub(crate) bundle: BundleLimits,
    /// The size of all bundles together, in bytes.
    pub(crate) bytes: u64,
    /// How many bundles.
    pub(crate) bundles: usize,
    /// How long copying the files of one packet may take.
    pub(crate) copy_time: Duration,
    /// How long a whole import may take.
    pub(crate) import_time: Duration,
}

impl StoreLimits {
    pub(crate) fn of(options: &Options) -> Self {
        let copy_time = options.import_time / 4;
        Self {
            bundle: BundleLimits::default(),
            bytes: options.store_bytes,
            bundles: usize::try_from(options.store_bundles).unwrap_or(usize::MAX),
            copy_time,
            import_time: options.import_time,
        }
    }
}

/// A bundle in the store.
pub(crate) struct Bundle {
    /// Where its files are.
    path: PathBuf,
    pub(crate) files: Vec<BundleFile>,
    /// The name that its manifest gives.
    pub(crate) name: PluginName,
    /// What else its manifest fixes.
    pub(crate) stated: Stated,
    /// Whether its files ask for memory that is written and executed.
    pub(crate) writable_code: WritableCode,
    pub(crate) bytes: u64,
    /// The directories that it came from, each of which vouched for it.
    pub(crate) origins: BTreeSet<PathBuf>,
    /// Why the last one that it came from did not.
    pub(crate) doubt: Option<Doubt>,
    /// When it was last used, by the store's own count.
    used: u64,
}

impl Bundle {
    /// Opens its directory, as the child that mounts it wants it.
    pub(crate) fn open(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::open(&self.path, flags, Mode::empty())?)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// It was imported once more. The directories that have a tier now are `roots`.
    fn came_from(&mut self, origin: Result<PathBuf, Doubt>, roots: &BTreeSet<PathBuf>) {
        match origin {
            Ok(origin) => {
                // What gives nothing any more makes room for what does.
                if self.origins.len() >= MOST_ORIGINS {
                    self.origins.retain(|origin| origin.parent().is_some_and(|parent| roots.contains(parent)));
                }
                if self.origins.len() >= MOST_ORIGINS && !self.origins.contains(&origin) {
                    self.origins.pop_first();
                }
                self.origins.insert(origin);
                self.doubt = None;
            }
            Err(doubt) => self.doubt = Some(doubt),
        }
    }
}

/// The store of one launcher.
pub(crate) struct Store {
    place: Place,
    limits: StoreLimits,
    bundles: BTreeMap<[u8; 32], Bundle>,
    transaction: Option<Transaction>,
    chores: Chores,
    /// Who copies.
    copier: Identity,
    /// Who may change what vouches for a bundle.
    owners: Owners,
    uses: u64,
}

impl Store {
    /// Takes over the store on the disk, or makes one in memory in the working directory, in the launcher's `mounts`.
    /// An error when the one on the disk cannot be used; what memory lacks is told when something is imported.
    pub(crate) fn open(options: &Options, mounts: io::Result<()>, copier: Identity) -> Result<Self, String> {
        let limits = StoreLimits::of(options);
        let mut bundles = BTreeMap::new();
        let place = match &options.store {
            Some(directory) => {
                let (disk, left) = Disk::open(directory)?;
                for left in left {
                    let path = disk.files_of(&Digest::from_bytes(left.digest));
                    let bytes = left.files.iter().map(|file| file.size).sum();
                    let origins = left.origins.into_iter().collect();
                    bundles.insert(
                        left.digest,
                        Bundle {
                            path,
                            files: left.files,
                            name: left.name,
                            stated: left.stated,
                            writable_code: left.writable_code,
                            bytes,
                            origins,
                            doubt: None,
                            used: 0,
                        },
                    );
                }
                Place::Disk(disk)
            }
            None => match mounts.and_then(|()| Memory::new(Path::new(IN_MEMORY))) {
                Ok(memory) => Place::Memory(memory),
                Err(error) => Place::Nowhere(format!("the launcher has no mounts of its own: {error}")),
            },
        };
        let owners = if rustix::process::geteuid().is_root() { Owners::Root } else { Owners::Anybody };
        Ok(Self { place, limits, bundles, transaction: None, chores: Chores::default(), copier, owners, uses: 0 })
    }

    /// A bundle by its digest.
    pub(crate) fn get(&self, digest: &[u8; 32]) -> Option<&Bundle> {
        self.bundles.get(digest)
    }

    /// The same, to be launched.
    pub(crate) fn use_bundle(&mut self, digest: &[u8; 32]) -> Result<&Bundle, Refusal> {
        self.uses += 1;
        let uses = self.uses;
        let Some(bundle) = self.bundles.get_mut(digest) else {
            return refuse(
                RefusalCode::UnknownBundle,
                format!("the store has no bundle {}; import it first", Digest::from_bytes(*digest)),
            );
        };
        bundle.used = uses;
        Ok(bundle)
    }

    /// The directory of a store that outlives the launcher.
    pub(crate) fn directory(&self) -> Option<&Path> {
        self.place.directory()
    }

    /// The lock of a store that outlives the launcher: kept open by every child that writes in it.
    pub(crate) fn lock(&self) -> Option<BorrowedFd<'_>> {
        self.place.lock()
    }

    /// Removes a bundle.
    pub(crate) fn forget(&mut self, digest: &[u8; 32], in_use: &BTreeSet<[u8; 32]>) -> Result<(), Refusal> {
        let named = Digest::from_bytes(*digest);
        let importing = self.transaction.as_ref().is_some_and(|transaction| transaction.digest() == *digest);
        if in_use.contains(digest) || importing {
            return refuse(
                RefusalCode::InUse,
                format!("bundle {named} was not removed: it is in use; stop the plugin that runs from it first"),
            );
        }
        let Some(bundle) = self.bundles.get(digest) else {
            return refuse(RefusalCode::UnknownBundle, format!("the store has no bundle {named}"));
        };
        match self.place.take_out(&bundle.path) {
            Ok(gone) => {
                self.bundles.remove(digest);
                self.chores.add(gone.map(Chore::Remove));
                Ok(())
            }
            Err(error) => refuse(RefusalCode::Kernel, format!("bundle {named} was not removed: {error}")),
        }
    }

    /// Makes room for a bundle by removing those that are not in use, the longest unused first.
    fn make_room(&mut self, bytes: u64, in_use: &BTreeSet<[u8; 32]>) -> Result<(), Refusal> {
        loop {
            let used = self.bundles.values().map(|bundle| bundle.bytes).sum::<u64>();
            if self.bundles.len() < self.limits.bundles && used.saturating_add(bytes) <= self.limits.bytes {
                return Ok(());
            }
            let unused = self.bundles.iter().filter(|(digest, _)| !in_use.contains(*digest));
            let Some(oldest) = unused.min_by_key(|(_, bundle)| bundle.used).map(|(digest, _)| *digest) else {
                return refuse(
                    RefusalCode::Exhausted,
                    format!(
                        "the launcher's store is full: {} bundles of {used} bytes are in use, {} bundles and {} bytes are \
                         allowed, and {bytes} bytes more were asked for; unload a plugin, make its bundle smaller, or \
                         raise --store-bytes and --store-bundles",
                        self.bundles.len(),
                        self.limits.bundles,
                        self.limits.bytes
                    ),
                );
            };
            self.forget(&oldest, in_use)?;
        }
    }

    // The children.

    /// Starts the next chore if one waits; the pidfd to watch.
    pub(crate) fn start_chore(&mut self) -> Option<BorrowedFd<'_>> {
        self.chores.start(self.place.lock())
    }

    /// The chore's child has ended.
    pub(crate) fn chore_ended(&mut self) -> Option<OwnedFd> {
        self.chores.ended()
    }

    /// Whether this is one of the store's children, which reaps itself.
    pub(crate) fn is_child(&self, pid: i32) -> bool {
        self.chores.is_child(pid) || self.transaction.as_ref().is_some_and(|transaction| transaction.is_child(pid))
    }

    /// Takes down what is mounted: the launcher ends.
    pub(crate) fn release(&mut self) {
        if let Place::Memory(memory) = &mut self.place {
            memory.release();
        }
    }

    /// Kills what is under way: the launcher ends.
    pub(crate) fn kill(&self) {
        self.chores.kill();
        if let Some(transaction) = &self.transaction {
            transaction.kill();
        }
    }
}

/// Gives the launcher a mount namespace of its own, and a user namespace where it needs one for that. Called once, before
/// anything is opened by path.
///
/// The host's mounts still come in, so that plugins see a /usr that was mounted later; nothing goes out.
pub(crate) fn own_mounts() -> io::Result<()> {
    // Read before: in a new user namespace nobody has a number until it is given one.
    let (user, group) = (getuid(), getgid());
    let flags = if user.is_root() { libc::CLONE_NEWNS } else { libc::CLONE_NEWNS | libc::CLONE_NEWUSER };
    kernel::unshare(flags)?;
    if !user.is_root() {
        let identity = Identity::Mapped { uid: user.as_raw(), gid: group.as_raw() };
        creds::map_user(&identity).map_err(|failure| io::Error::from_raw_os_error(failure.errno))?;
    }
    let slave = rustix::mount::MountPropagationFlags::DOWNSTREAM | rustix::mount::MountPropagationFlags::REC;
    Ok(rustix::mount::mount_change("/", slave)?)
}
