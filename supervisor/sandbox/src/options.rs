//! The launcher's command line, for both sides: the starter writes it, the launcher reads it.
//!
//! In the embedded default this is the launcher's whole policy: it is fixed before the starter drops its privileges, and
//! nothing that comes through the socket later can widen it.

mod args;
#[cfg(test)]
mod tests;

use std::{
    io,
    ops::RangeInclusive,
    os::{
        fd::{BorrowedFd, RawFd},
        unix::process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use plugvisor_package::{PluginName, VariableName};
use rustix::io::FdFlags;

use crate::protocol::{Control, Tier};

/// The uids that plugins get when the starter names none: the part of the uid space that systemd's `UIDS-GIDS` lists as
/// unused, so that neither people, services, nor containers are met there.
pub const DEFAULT_UIDS: RangeInclusive<u32> = 1_879_048_192..=1_879_113_727;

/// The uids of plugins that are traced, in no service manager's range either: a trace knows no book of who has which uid, and
/// the kernel counts processes, signals and watches by uid, whatever the namespace.
pub const TRACED_UIDS: RangeInclusive<u32> = 1_879_113_728..=1_879_179_263;

/// The size of all bundles in the store together when the starter names none.
pub const DEFAULT_STORE_BYTES: u64 = 4 << 30;

/// How many bundles the store holds when the starter names no number.
pub const DEFAULT_STORE_BUNDLES: u32 = 256;

/// How long an import may take when the starter names no time.
pub const DEFAULT_IMPORT_TIME: Duration = Duration::from_mins(2);

/// Spares when the starter says nothing: for a few plugins that start together. Each is some 0.3 MiB.
const DEFAULT_SPARES: u32 = 4;

/// What the launcher may do. Written as flags by [`Options::to_args`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// How the supervisor comes.
    pub supervisor: Supervisor,
    /// `--uid-range A-B`: uids for plugins, used when the launcher is root; never holding 0.
    pub uids: RangeInclusive<u32>,
    /// `--cgroup-root NAME`: the group below the launcher's own in each hierarchy in which each launch gets a child.
    pub cgroup_root: String,
    /// `--bundle-root TIER=DIR`, repeatable: bundles whose files were imported from beneath DIR have this tier.
    pub bundle_roots: Vec<BundleRoot>,
    /// `--store DIR`: where bundles are kept, absolute, writable by root alone on the whole way. Without it they are kept
    /// in memory, for the launcher's life.
    pub store: Option<PathBuf>,
    /// `--store-bytes N`: the size of all bundles together.
    pub store_bytes: u64,
    /// `--store-bundles N`: how many bundles.
    pub store_bundles: u32,
    /// `--import-seconds N`: how long one import may take.
    pub import_time: Duration,
    /// `--policy FILE`: what the administrator approved, see `docs/adr/0004`. It must belong to the launcher's user, and
    /// nobody else may write it. Read anew when it changes.
    pub policy: Option<PathBuf>,
    /// `--config-root DIR`: where plugins' configuration directories are, `DIR/NAME`. As root it, and all on the way to it,
    /// must be root's alone.
    pub config_root: Option<PathBuf>,
    /// `--data-root DIR`: where plugins' data directories are, `DIR/NAME`, made when they are needed. The same holds.
    pub data_root: Option<PathBuf>,
    /// `--env PLUGIN=NAME`, repeatable: a variable of the operator's that this plugin may be given. Its value comes with the
    /// launch.
    pub variables: Vec<Variable>,
    /// `--max-plugins N`: how many may run at once.
    pub max_plugins: u32,
    /// `--spares N`: how many children are made ready ahead of launches, so that these are quick; used when the launcher
    /// is root. Each costs a process, a network namespace and a group in each cgroup hierarchy. 0 to 16.
    pub spares: u32,
    /// `--runtime-directory DIR`: an existing private directory in which the launcher makes `launcher/` for its
    /// sockets. Absolute.
    pub runtime_directory: PathBuf,
    /// `--trace-fd N`: launches are traced by the process that started the launcher, over this inherited connection: in place
    /// of a filter, it answers for every system call. Weaker walls than any level's own, so that no launcher that listens, and
    /// none that a service manager started, takes it; nor can anything that comes over a socket ask for it.
    pub trace: Option<RawFd>,
    /// `--without CONTROL`, repeatable: a wall that is left out of every launch, so that the escape suite can show that the
    /// attempts which it holds would succeed. Only a build for development knows it: in a release build it is an unknown
    /// flag, and nothing reads this field.
    pub without: Vec<Control>,
}

/// A directory of bundles, and what the operator says of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BundleRoot {
    /// The tier of what was imported from it.
    pub tier: Tier,
    /// Absolute.
    pub path: PathBuf,
}

/// A variable that a plugin may be given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    /// Which plugin.
    pub plugin: PluginName,
    /// The variable's name.
    pub name: VariableName,
}

/// How the supervisor comes to the launcher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Supervisor {
    /// `--socket-fd N`: by the inherited connection, and when it closes, everything ends. 0 (standard input) is the
    /// easiest to hand over; 1 and 2 are refused.
    Inherited(RawFd),
    /// By a socket that the launcher makes, one supervisor at a time, and another may come when it is gone.
    Listen(Listen),
}

/// Where the launcher listens, for whom, and how long it waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// `--listen PATH`: where the socket is made, absolute, in a directory that only root or the launcher's own user can
    /// write to. A socket from systemd (`LISTEN_FDS`) is used instead of making one; then the path is for people.
    pub path: PathBuf,
    /// `--socket-fd N` beside `--listen`: the connection of the first supervisor, which started the launcher and so need
    /// not wait for the path. Its uid is that of the starter, not the one below.
    pub first: Option<RawFd>,
    /// `--supervisor-uid UID`: who may connect, by `SO_PEERCRED`. Nobody else, not even root. A name is looked up in
    /// `/etc/passwd`, where systemd-sysusers puts the users of services.
    pub uid: u32,
    /// `--linger SECONDS` or `--linger forever`: how long plugins are kept without a supervisor; then the launcher ends,
    /// and they with it. 0, the default, ends at once.
    pub linger: Linger,
}

/// How long the launcher goes on without a supervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Linger {
    /// So long. Whole seconds on the command line.
    For(Duration),
    /// Until it is told to end: for a service of its own.
    Forever,
}

/// Why a command line was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// A flag that does not exist.
    #[error(
        "unknown flag {0:?}; the flags are --socket-fd, --listen, --supervisor-uid, --linger, --uid-range, --cgroup-root, --bundle-root, --store, --store-bytes, --store-bundles, --import-seconds, --policy, --config-root, --data-root, --env, --max-plugins, --spares, --runtime-directory and --trace-fd"
    )]
    Unknown(String),
    /// A flag without its value.
    #[error("{0} needs a value")]
    NoValue(&'static str),
    /// A flag given twice that may be given once.
    #[error("{0} was given twice")]
    Twice(&'static str),
    /// A value that does not fit its flag.
    #[error("{flag}: {value:?} is refused: {why}")]
    Value {
        /// The flag.
        flag: &'static str,
        /// What was given.
        value: String,
        /// What it must be.
        why: &'static str,
    },
    /// A required flag is missing.
    #[error("{0} is required")]
    Missing(&'static str),
    /// A flag that a launcher of this kind never takes.
    #[error("{0} is for a launcher that its starter alone uses, not beside {1}")]
    Beside(&'static str, &'static str),
    /// A flag that means nothing without another one.
    #[error("{0} means nothing without {1}")]
    Without(&'static str, &'static str),
}

impl Options {
    /// The defaults for what the starter seldom sets: [`DEFAULT_UIDS`], the cgroup `plugvisor-<pid of the starter>`, 64
    /// plugins.
    #[must_use]
    pub fn new(socket_fd: RawFd, runtime_directory: PathBuf, bundle_roots: Vec<BundleRoot>) -> Self {
        Self {
            supervisor: Supervisor::Inherited(socket_fd),
            uids: DEFAULT_UIDS,
            cgroup_root: format!("plugvisor-{}", std::process::id()),
            bundle_roots,
            store: None,
            store_bytes: DEFAULT_STORE_BYTES,
            store_bundles: DEFAULT_STORE_BUNDLES,
            import_time: DEFAULT_IMPORT_TIME,
            policy: None,
            config_root: None,
            data_root: None,
            variables: Vec::new(),
            max_plugins: 64,
            spares: DEFAULT_SPARES,
            runtime_directory,
            trace: None,
            without: Vec::new(),
        }
    }

    /// The directory of the listening socket, when it is beneath the runtime directory: then it is there for this
    /// launcher alone, and goes with it.
    #[must_use]
    pub fn door_directory(&self) -> Option<&Path> {
        let Supervisor::Listen(listen) = &self.supervisor else { return None };
        let parent = listen.path.parent()?;
        (parent != self.runtime_directory && parent.starts_with(&self.runtime_directory)).then_some(parent)
    }

    /// Starts this launcher with this policy, and with the descriptors that it names, which it takes over. What it has to say
    /// goes to `words`.
    ///
    /// Must be called while the process has one thread: for a moment the descriptors are inheritable, and they stay so until
    /// they are closed.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn spawn(&self, program: &Path, named: &[BorrowedFd<'_>], words: Stdio) -> io::Result<Child> {
        for descriptor in named {
            rustix::io::fcntl_setfd(descriptor, FdFlags::empty())?;
        }
        Command::new(program)
            .args(self.to_args())
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(words)
            // Ctrl-C on a terminal reaches the whole foreground group; plugins must outlive it by their drain.
            .process_group(0)
            .spawn()
    }
}
