//! What the supervisor remembers when it ends: what operators asked for, how far generations have counted, how often
//! plugins failed.
//!
//! One SQLite file in a directory of its own, written by one thread. At start everything is read at once; from then on
//! the supervisor only writes. A disk that is full, a file that another process holds or that is damaged never stops a
//! plugin: what cannot be written is kept in memory and written when that is possible again, and meanwhile only what
//! must be remembered is refused. Secrets and configuration are never in it.

mod database;
mod directory;
mod record;
#[cfg(test)]
mod tests;
mod writer;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::mpsc::{SyncSender, TrySendError, sync_channel},
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use plugvisor_core::{Code, Error};
use plugvisor_package::PluginName;
use tokio::sync::{oneshot, watch};

use self::{
    database::{Database, FILE, Trouble, VERSION},
    writer::{Command, Writer},
};
pub use self::{
    directory::{StateDirectory, StateDirectoryError},
    record::{BreakerRecord, Desired, Note, PluginRecord, TRANSITIONS_KEPT, TransitionRecord},
};

/// How long another process may hold the file before whoever waits is told.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Commands that may wait for the thread. It empties the queue several times a second even while it cannot write.
const QUEUE: usize = 4096;

/// Why the state cannot be used. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Written by a later version, or by another program.
    #[error("{} cannot be used: {why}; {fix}", path.display())]
    Incompatible {
        /// The file.
        path: PathBuf,
        /// What it is.
        why: String,
        /// What to do.
        fix: &'static str,
    },
    /// Another process held it for longer than [`PATIENCE`].
    #[error(
        "{} is held by another process for more than {} s; find it with `fuser {0}` and end it",
        path.display(), PATIENCE.as_secs()
    )]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// The user that the supervisor has become cannot get there.
    #[error(
        "cannot use {}: user {uid} may not enter {}; let it in (chmod o+x), or set [supervisor] state_directory",
        path.display(), directory.display()
    )]
    Barred {
        /// The file.
        path: PathBuf,
        /// What is in the way.
        directory: PathBuf,
        /// Who.
        uid: u32,
    },
    /// It cannot be read or written.
    #[error("cannot use {}: {why}; free space on its disk, check its owner, or set [supervisor] state_directory", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
}

/// What the state was when it was opened.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Every plugin that is remembered, whether its bundle is still there or not.
    pub plugins: BTreeMap<PluginName, PluginRecord>,
    /// Set when the file was damaged and begun anew.
    pub rebuilt: Option<Rebuilt>,
}

/// A damaged file was moved aside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rebuilt {
    /// Where it lies now.
    pub moved_to: PathBuf,
    /// What was wrong with it.
    pub why: String,
}

/// Whether what happens is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// Whether it can be written now.
    pub writing: Writing,
    /// The last time that a damaged file was moved aside since the supervisor started.
    pub rebuilt: Option<Rebuilt>,
    /// Notes that were lost because the queue was full. The state they speak of is written with a later one.
    pub lost: u64,
}

/// See [`Health::writing`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Writing {
    /// It is.
    Works,
    /// It is not; what must be remembered is refused.
    Fails {
        /// Since when.
        since: SystemTime,
        /// "disk_full", "locked" or "io".
        cause: &'static str,
        /// In words.
        why: String,
    },
}

/// The opened file, before its thread runs. Opening is for a process with one thread, after privileges were given up.
#[derive(Debug)]
pub struct Opened {
    database: Database,
    directory: StateDirectory,
    snapshot: Snapshot,
    /// Whether the file holds moments of another boot.
    stale: bool,
}

impl Opened {
    /// Opens the file in `directory`, or makes it. `boot` identifies the present boot of the host: moments that were
    /// written in another one mean nothing any more.
    ///
    /// # Errors
    ///
    /// [`StateError`]; a damaged file is none: it is moved aside and begun anew.
    pub fn open(directory: StateDirectory, boot: &str) -> Result<Self, StateError> {
        let path = directory.path().join(FILE);
        let open = || {
            let database = Database::open(directory.path(), boot, PATIENCE)?;
            let read = database.read()?;
            Ok((database, read))
        };
        let (opened, rebuilt) = match open() {
            Err(Trouble::Corrupt(why)) => {
                let moved_to = database::move_aside(directory.path()).map_err(|error| StateError::Io {
                    path: path.clone(),
                    why: format!("it is damaged ({why}) and cannot be moved aside: {error}"),
                })?;
                tracing::error!(%why, moved_to = %moved_to.display(), "the state was damaged and is begun anew");
                (open(), Some(Rebuilt { moved_to, why }))
            }
            other => (other, None),
        };
        match opened {
            Ok((database, (plugins, stale))) => {
                Ok(Self { database, directory, snapshot: Snapshot { plugins, rebuilt }, stale })
            }
            Err(trouble @ (Trouble::Later(_) | Trouble::Foreign(_))) => Err(StateError::Incompatible {
                why: trouble.why(),
                fix: match trouble {
                    Trouble::Later(_) => {
                        "start the Plugvisor that wrote it, or name another [supervisor] state_directory"
                    }
                    _ => "name another [supervisor] state_directory",
                },
                path,
            }),
            Err(Trouble::Locked) => Err(StateError::Locked { path }),
            Err(trouble @ (Trouble::Full(_) | Trouble::Io(_) | Trouble::Corrupt(_))) => Err(match barred(&path) {
                Some(directory) => {
                    let (directory, uid) = (directory.to_owned(), rustix::process::geteuid().as_raw());
                    StateError::Barred { path, directory, uid }
                }
                None => StateError::Io { path, why: trouble.why() },
            }),
        }
    }

    /// Starts the thread that writes.
    ///
    /// # Errors
    ///
    /// When the system grants no thread.
    pub fn start(self) -> std::io::Result<(Store, Snapshot, Closing)> {
        let Self { database, directory, snapshot, stale } = self;
        let (commands, inbox) = sync_channel(QUEUE);
        let (health, seen) =
            watch::channel(Health { writing: Writing::Works, rebuilt: snapshot.rebuilt.clone(), lost: 0 });
        let writer = Writer::new(database, directory, snapshot.plugins.clone(), stale, health);
        let thread = thread::Builder::new().name("state".to_owned()).spawn(move || writer.run(&inbox))?;
        let store = Store { commands, health: seen };
        Ok((store.clone(), snapshot, Closing { store, thread }))
    }
}

/// The state, to write to. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    commands: SyncSender<Command>,
    health: watch::Receiver<Health>,
}

impl Store {
    /// Remembers what an operator wants of a plugin. When this returns it outlives a crash of the host.
    ///
    /// # Errors
    ///
    /// When it could not be written; then nothing is remembered, and nothing should be done.
    pub async fn desire(&self, plugin: PluginName, desired: Desired) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        let command = Command::Desire { plugin, desired, asked: Instant::now(), reply };
        self.send(command).map_err(|_| locked())?;
        answer.await.unwrap_or_else(|_| Err(stopped()))
    }

    /// Remembers something. Never waits: a note that cannot be taken is counted, and a later one says the same again.
    pub fn note(&self, plugin: &PluginName, note: Note) {
        if self.send(Command::Note { plugin: plugin.clone(), note }).is_err() {
            tracing::warn!(%plugin, "a change of state was not noted: too many wait to be written");
        }
    }

    /// Waits until what was noted before is written, or cannot be at present.
    pub async fn written(&self) {
        let (reply, answer) = oneshot::channel();
        if self.send(Command::Written(reply)).is_ok() {
            let _ = answer.await;
        }
    }

    /// Whether it can be written.
    #[must_use]
    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.clone()
    }

    /// Refuses what must be remembered while nothing can be.
    ///
    /// # Errors
    ///
    /// When the state cannot be written at present.
    pub fn check_writable(&self) -> Result<(), Error> {
        match &self.health.borrow().writing {
            Writing::Works => Ok(()),
            Writing::Fails { cause: "locked", .. } => Err(locked()),
            Writing::Fails { why, .. } => Err(read_only(why)),
        }
    }

    fn send(&self, command: Command) -> Result<(), TrySendError<Command>> {
        self.commands.try_send(command)
    }
}

/// The end of the thread.
#[derive(Debug)]
pub struct Closing {
    store: Store,
    thread: JoinHandle<()>,
}

impl Closing {
    /// Writes what is left, folds the files into one and gives up the directory's lock. Blocks.
    pub fn close(self) {
        let Self { store, thread } = self;
        // Blocking: the queue may be full. The thread ends by itself if it was already told.
        let _ = store.commands.send(Command::Close);
        if thread.join().is_err() {
            tracing::error!("the thread of the state ended with a panic; this is a bug");
        }
    }
}

/// The first directory on the way that this process may not enter: SQLite says no more than that it cannot open the file.
fn barred(path: &Path) -> Option<&Path> {
    use rustix::fs::{Access, AtFlags, CWD, accessat};
    let closed = |directory: &&Path| {
        accessat(CWD, *directory, Access::EXEC_OK, AtFlags::EACCESS) == Err(rustix::io::Errno::ACCESS)
    };
    // From the file upwards, everything beneath what is closed is closed too.
    path.ancestors().skip(1).filter(closed).last()
}

fn locked() -> Error {
    Error::new(
        Code::StateLocked,
        format!("the supervisor's state is held by another process for more than {} s", PATIENCE.as_secs()),
        "find it with `fuser` on state.db in the state directory, end it, and try again",
    )
}

fn read_only(why: &str) -> Error {
    Error::new(
        Code::StateReadOnly,
        format!("the supervisor's state cannot be written ({why}), so that nothing can be changed; plugins run on"),
        "free space on the disk of the state directory; the supervisor tries again by itself",
    )
}

fn stopped() -> Error {
    Error::new(Code::Stopping, "the supervisor is stopping", "start it again")
}

/// Identifies the present boot.
#[must_use]
pub fn boot_id() -> String {
    // Without it every start looks like the same boot, and moments of another one may be believed; they only decide
    // how soon a failed plugin is tried again.
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

const _: () = assert!(VERSION > 0, "0 is SQLite's own: a file without tables");
