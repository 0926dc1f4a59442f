//! The messages between the supervisor and the launcher: what may be asked, what comes back.
//!
//! The transport is `SOCK_SEQPACKET`: one packet is one message, with descriptors by `SCM_RIGHTS`. A packet is a fixed
//! header (version, kind, request id) and a postcard body; the kinds are numbered here and never reused. The launcher
//! does not believe what it reads: these types are only shapes, and the launcher checks every field against its policy.

mod grant;
mod host;
mod keep;
mod launched;
mod refusal;
mod store;
mod walls;

use plugvisor_package::Digest;
use serde::{Deserialize, Serialize};

pub use self::{
    grant::{EGRESS, Grant, MAX_INWARD},
    host::{Host, Lacking, PolicyFile, ProbeState, Probed, ProbedLevel},
    keep::{
        Condition, Kept, Known, LIST_PAGE, Limited, Listed, MAX_HELD, MAX_HELD_NAME, Over, ReattachState, Reattached,
        Stats,
    },
    launched::{ControlState, DirectoryState, Launched},
    refusal::{Refusal, RefusalCode},
    store::{Approval, Import, ImportBegin, ImportFile, Imported, Stored, Tier, approval_text},
    walls::{Control, Level},
};

/// The protocol's version, exchanged in [`Hello`] and repeated in each header.
pub const VERSION: u16 = 5;

/// The largest packet, in bytes. A longer one is refused unread.
pub const MAX_PACKET: usize = 64 * 1024;

/// The most descriptors in one packet.
pub const MAX_DESCRIPTORS: usize = 8;

/// Identifies one launch for the launcher's life; never reused, and chosen by the launcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LaunchId(pub u64);

/// What the supervisor asks. Every request gets exactly one [`Reply`] with the same request id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Must come first.
    Hello(Hello),
    /// Which controls work here, found by using them.
    Probe,
    /// Whether the launcher's policy file can be used as it is at this moment: it is read anew if it has changed. Launches
    /// nothing and changes nothing.
    Policy,
    /// Starts a plugin from a bundle in the store.
    Launch(Box<Launch>),
    /// Sends a signal to the plugin's first process.
    Signal {
        /// The launch to signal.
        launch: LaunchId,
        /// The signal's number; only SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2 and SIGKILL are accepted.
        signal: i32,
    },
    /// Kills every process of the launch. The exit event follows when none is left.
    Kill {
        /// The launch to end.
        launch: LaunchId,
    },
    /// Reads every control of a running launch again from the kernel.
    Inspect {
        /// The launch to read.
        launch: LaunchId,
    },
    /// Stops every process of the launch, until [`Request::Thaw`] or [`Request::Kill`]. The kernel needs a moment:
    /// [`Stats`] says when all are stopped.
    Freeze {
        /// The launch to stop.
        launch: LaunchId,
    },
    /// Lets a frozen launch run on.
    Thaw {
        /// The launch to let run.
        launch: LaunchId,
    },
    /// Changes limits of a running launch: memory, CPU, processes. `None` leaves a limit as it is. The limits on files
    /// are fixed at the launch and must be `None`. A memory limit below what is used now is refused.
    Limits {
        /// The launch to limit.
        launch: LaunchId,
        /// The new limits.
        limits: Limits,
    },
    /// What a running launch uses.
    Stats {
        /// The launch to measure.
        launch: LaunchId,
    },
    /// The launches that the launcher knows, a page at a time.
    List {
        /// Only those with a higher id; 0 for all.
        after: LaunchId,
    },
    /// Holds a listening socket under a name, so that it outlives the supervisor; one that was held under this name is
    /// let go. Descriptor 0: the socket, Unix or TCP.
    HoldFd {
        /// The name.
        name: String,
    },
    /// Gives a held socket back.
    TakeFd {
        /// The name.
        name: String,
        /// Go on holding it.
        keep: bool,
    },
    /// Hands over a launch that another supervisor started, or that this one has dropped. May be repeated.
    Reattach {
        /// The launch.
        launch: LaunchId,
    },
    /// Hands over some of the sockets by which a running launch is connected to.
    Inward {
        /// The launch.
        launch: LaunchId,
        /// From which one on, counted from 0.
        from: u16,
    },
    /// What was kept for this launch has arrived and may be forgotten: its end, and the output of [`Reattached`]. Until
    /// then it is told to every supervisor anew.
    Acknowledge {
        /// The launch.
        launch: LaunchId,
    },
    /// No supervisor is expected after this one: when this connection closes, the launcher kills what still runs and
    /// ends, as without `--listen`. Refused by a launcher that waits for ever: ending it is for who started it.
    End,
    /// One step of bringing a bundle into the launcher's store. One import may be under way at a time.
    Import(Import),
    /// Removes a bundle from the store. One that is running, or being imported, is refused.
    Forget {
        /// Its content digest.
        bundle: [u8; 32],
    },
}

/// The first message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The supervisor's protocol version; another one is refused.
    pub version: u16,
}

/// Which bundle to start, and how walled in. What is executed, with which arguments, variables and socket, is nothing that
/// can be asked for: it stands in the bundle's manifest, and the launcher has it from there. The operator's variables are
/// those whose names the launcher's own policy has for this plugin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// The plugin's name, in the grammar of `PluginName`.
    pub plugin: String,
    /// The plugin's generation, for its environment and its cgroup's name.
    pub generation: u64,
    /// How strong the walls are: at least as strong as the manifest asks.
    pub level: Level,
    /// The content digest of a bundle in the store.
    pub bundle: [u8; 32],
    /// The tier that the supervisor counts on for what it grants itself. The launch is refused when the launcher trusts
    /// the bundle less, with the approval.
    pub tier: Tier,
    /// What an administrator signed for this bundle, if anything.
    pub approval: Option<Approval>,
    /// Limits that the kernel holds.
    pub limits: Limits,
    /// Granted capabilities that open something in the kernel: none that the manifest does not ask for.
    pub grants: Vec<Grant>,
    /// The operator's variables, with [`Grant::AccessEnv`] only: by name, each once.
    pub environment: Vec<(String, String)>,
    /// Sockets by which the supervisor connects to it, with [`Grant::TcpServer`] only; at most [`MAX_INWARD`].
    pub inward: u16,
    /// Controls that the operator allows to be missing.
    pub allow_degraded: Vec<Control>,
}

/// The digest of an operator's variables, by which a launch with them is told from one with others.
#[must_use]
pub fn environment_digest(environment: &[(String, String)]) -> [u8; 32] {
    // Neither a name nor a value holds a NUL.
    let text: String = environment.iter().map(|(name, value)| format!("{name}={value}\0")).collect();
    *Digest::of(text.as_bytes()).as_bytes()
}

/// Who makes the worker socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SocketMode {
    /// The launcher binds and listens; the plugin inherits it as descriptor 3.
    Inherit,
    /// The plugin binds the path in `PLUGVISOR_LISTEN` itself.
    Bind,
}

/// Limits that the kernel holds. `None` means that none was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes of memory of all processes together.
    pub memory_bytes: Option<u64>,
    /// Percent of one CPU, 100 is one whole CPU.
    pub cpu_percent: Option<u32>,
    /// Processes and threads together.
    pub pids: Option<u32>,
    /// The largest file that may be written, in bytes (`RLIMIT_FSIZE`).
    pub file_size_bytes: Option<u64>,
    /// Open descriptors of one process (`RLIMIT_NOFILE`).
    pub open_files: Option<u32>,
}

/// What the launcher answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// To [`Request::Hello`].
    Hello {
        /// The launcher's protocol version.
        version: u16,
        /// The launcher's own pid, as the supervisor sees it.
        pid: u32,
    },
    /// To [`Request::Probe`].
    Probe(Host),
    /// To [`Request::Policy`].
    Policy(PolicyFile),
    /// To [`Request::Launch`]. Descriptors: 0 a pidfd, 1 the listening broker socket, 2 an `O_PATH` descriptor through
    /// which the worker socket is reached (the socket itself when inherited, its directory when the plugin binds it),
    /// 3 stdout and 4 stderr, the reading ends; with [`Grant::Egress`], 5 a TCP socket that listens at [`EGRESS`] in the
    /// plugin's network namespace.
    Launched(Launched),
    /// To [`Request::Signal`], [`Request::Kill`], [`Request::Freeze`], [`Request::Thaw`], [`Request::HoldFd`] and
    /// [`Request::Acknowledge`] and [`Request::End`].
    Done,
    /// To [`Request::Inspect`]: every control as the kernel shows it at this moment.
    Inspected(Vec<ControlState>),
    /// To [`Import::Find`] and [`Import::Commit`]; `None` when the store has no such bundle.
    Imported(Imported),
    /// The request was refused and changed nothing.
    Refused(Refusal),
    /// To [`Request::Limits`].
    Limited(Limited),
    /// To [`Request::Stats`].
    Stats(Stats),
    /// To [`Request::List`].
    Listed(Listed),
    /// To [`Request::TakeFd`]. Descriptor 0: the socket.
    Taken,
    /// To [`Request::Reattach`]. Its descriptors are described there.
    Reattached(Reattached),
    /// To [`Request::Inward`]. Descriptors: at most [`MAX_DESCRIPTORS`] TCP sockets that were made in the plugin's network
    /// namespace, the first ones from the one that was named on; one that a supervisor left connected was disconnected.
    Inward {
        /// How many the launch has in all.
        all: u16,
    },
}

/// What the launcher tells unasked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Notice {
    /// Every process of the launch is gone and its cgroups are removed.
    Exited {
        /// The launch that ended.
        launch: LaunchId,
        /// How its first process ended.
        exit: Exit,
        /// The kernel killed one of its processes for memory.
        oom_killed: bool,
    },
    /// The kernel killed a process of the launch for memory; the whole launch is being killed.
    OutOfMemory {
        /// The launch.
        launch: LaunchId,
    },
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// By itself, with this status.
    Code(i32),
    /// By this signal.
    Signal(i32),
}
