//! The messages between the supervisor and the launcher: what may be asked, what comes back.
//!
//! The transport is `SOCK_SEQPACKET`: one packet is one message, with descriptors by `SCM_RIGHTS`. A packet is a fixed
//! header (version, kind, request id) and a postcard body; the kinds are numbered here and never reused. The launcher
//! does not believe what it reads: these types are only shapes, and the launcher checks every field against its policy.

mod keep;
mod store;

use std::{
    fmt,
    net::{Ipv4Addr, SocketAddrV4},
};

use plugvisor_package::{Capability, Digest, IsolationLevel};
use serde::{Deserialize, Serialize};

pub use self::keep::{
    Condition, Kept, Known, LIST_PAGE, Limited, Listed, MAX_HELD, MAX_HELD_NAME, Over, ReattachState, Reattached, Stats,
};
pub use self::store::{Approval, Import, ImportBegin, ImportFile, Imported, Stored, Tier, approval_text};

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

/// Isolation levels on the wire, weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the levels of the manifest, see plugvisor_package::IsolationLevel")]
pub enum Level {
    None,
    Process,
    Container,
    Sandbox,
    Vm,
}

impl Level {
    /// Every level, weakest first.
    pub const ALL: [Self; 5] = [Self::None, Self::Process, Self::Container, Self::Sandbox, Self::Vm];

    /// The name in manifests and reports.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => IsolationLevel::None.as_str(),
            Self::Process => IsolationLevel::Process.as_str(),
            Self::Container => IsolationLevel::Container.as_str(),
            Self::Sandbox => IsolationLevel::Sandbox.as_str(),
            Self::Vm => IsolationLevel::Vm.as_str(),
        }
    }

    /// The weakest level that has this control; every stronger one has it too.
    #[must_use]
    pub const fn first_with(control: Control) -> Self {
        match control {
            Control::OwnUid
            | Control::Rlimits
            | Control::MemoryLimit
            | Control::CpuLimit
            | Control::PidsLimit
            | Control::WholeKill
            | Control::DiesWithLauncher => Self::None,
            Control::NoCapabilities
            | Control::NoNewPrivs
            | Control::MountNamespace
            | Control::PidNamespace
            | Control::IpcNamespace
            | Control::NetworkNamespace
            | Control::Seccomp
            | Control::Landlock => Self::Process,
            Control::UtsNamespace | Control::CgroupNamespace => Self::Container,
            Control::NoWriteExec | Control::SingleExec => Self::Sandbox,
            Control::OwnKernel => Self::Vm,
        }
    }

    /// The controls of this level, in the order of [`Control::ALL`]. A limit among them counts when one was asked for.
    pub fn controls(self) -> impl Iterator<Item = Control> {
        Control::ALL.into_iter().filter(move |control| Self::first_with(*control) <= self)
    }
}

impl From<IsolationLevel> for Level {
    fn from(level: IsolationLevel) -> Self {
        match level {
            IsolationLevel::None => Self::None,
            IsolationLevel::Process => Self::Process,
            IsolationLevel::Container => Self::Container,
            IsolationLevel::Sandbox => Self::Sandbox,
            IsolationLevel::Vm => Self::Vm,
        }
    }
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

/// Capabilities that open something in the kernel; the others are held by the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Grant {
    /// A sized, non-executable `/tmp`.
    WriteTemp,
    /// fork, vfork and clone without namespace flags.
    SpawnChild,
    /// TCP sockets in its own network namespace, where somebody listens at [`EGRESS`] and nothing else is: the supervisor,
    /// as a proxy.
    Egress,
    /// TCP sockets in its own network namespace, where it may listen at the ports of its manifest; the supervisor connects
    /// there with sockets that were made inside.
    TcpServer,
    /// The operator's variables.
    AccessEnv,
    /// Signals to others in its own PID namespace: its children.
    SignalHandling,
    /// Its configuration directory, read-only.
    ReadConfig,
    /// Its data directory, read-only.
    ReadData,
    /// Its data directory.
    WriteData,
}

impl Grant {
    /// Every grant.
    pub const ALL: [Self; 9] = [
        Self::WriteTemp,
        Self::SpawnChild,
        Self::Egress,
        Self::TcpServer,
        Self::AccessEnv,
        Self::SignalHandling,
        Self::ReadConfig,
        Self::ReadData,
        Self::WriteData,
    ];

    /// What a capability opens in the kernel; `None` for those that the supervisor holds alone.
    #[must_use]
    pub const fn of(capability: Capability) -> Option<Self> {
        match capability {
            Capability::WriteTemp => Some(Self::WriteTemp),
            Capability::SpawnChild => Some(Self::SpawnChild),
            Capability::HttpClient | Capability::WebSocket | Capability::DnsResolve => Some(Self::Egress),
            Capability::TcpServer => Some(Self::TcpServer),
            Capability::AccessEnv => Some(Self::AccessEnv),
            Capability::SignalHandling => Some(Self::SignalHandling),
            Capability::ReadConfig => Some(Self::ReadConfig),
            Capability::ReadData => Some(Self::ReadData),
            Capability::WriteData => Some(Self::WriteData),
            _ => None,
        }
    }

    /// Whether it opens something that belongs to a plugin's name, and so only to a bundle that an administrator approved
    /// under that name.
    #[must_use]
    pub const fn is_of_name(self) -> bool {
        match self {
            Self::AccessEnv | Self::ReadConfig | Self::ReadData | Self::WriteData => true,
            Self::WriteTemp | Self::SpawnChild | Self::Egress | Self::TcpServer | Self::SignalHandling => false,
        }
    }

    /// What these capabilities open, each once: several of them open the way to the proxy.
    #[must_use]
    pub fn of_all(capabilities: impl IntoIterator<Item = Capability>) -> Vec<Self> {
        let mut grants = Vec::new();
        for grant in capabilities.into_iter().filter_map(Self::of) {
            if !grants.contains(&grant) {
                grants.push(grant);
            }
        }
        grants
    }
}

/// Where the egress proxy is reached inside the network namespace of a launch with [`Grant::Egress`].
pub const EGRESS: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 3128);

/// The most sockets by which one plugin is connected to.
pub const MAX_INWARD: u16 = 256;

/// One control of the walls, each with its name in `allow_degraded` and in every report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Control {
    /// A uid that only this plugin has.
    OwnUid,
    /// No capability in any of the five sets.
    NoCapabilities,
    /// `no_new_privs`.
    NoNewPrivs,
    /// The rlimits of the plan.
    Rlimits,
    /// A mount namespace with the plugin's own tree.
    MountNamespace,
    /// A PID namespace.
    PidNamespace,
    /// An IPC namespace.
    IpcNamespace,
    /// A network namespace with nothing in it but `lo`.
    NetworkNamespace,
    /// A UTS namespace: a host name of its own.
    UtsNamespace,
    /// A cgroup namespace: its own group is the root that it sees.
    CgroupNamespace,
    /// A seccomp filter.
    Seccomp,
    /// A Landlock ruleset.
    Landlock,
    /// No memory that is both written and executed, nor first one and then the other.
    NoWriteExec,
    /// No other program is executed in place of the plugin's, nor by its children.
    SingleExec,
    /// The memory limit.
    MemoryLimit,
    /// The CPU limit.
    CpuLimit,
    /// The limit on processes.
    PidsLimit,
    /// Every process of the plugin dies together: by a cgroup, or by the PID namespace's init.
    WholeKill,
    /// The plugin dies with the launcher.
    DiesWithLauncher,
    /// A kernel of its own, in a virtual machine.
    OwnKernel,
}

impl Control {
    /// Every control, in the order reports show them.
    pub const ALL: [Self; 20] = [
        Self::OwnUid,
        Self::NoCapabilities,
        Self::NoNewPrivs,
        Self::Rlimits,
        Self::MountNamespace,
        Self::PidNamespace,
        Self::IpcNamespace,
        Self::NetworkNamespace,
        Self::UtsNamespace,
        Self::CgroupNamespace,
        Self::Seccomp,
        Self::Landlock,
        Self::NoWriteExec,
        Self::SingleExec,
        Self::OwnKernel,
        Self::MemoryLimit,
        Self::CpuLimit,
        Self::PidsLimit,
        Self::WholeKill,
        Self::DiesWithLauncher,
    ];

    /// The name used in `allow_degraded` and in every report.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::OwnUid => "own-uid",
            Self::NoCapabilities => "no-capabilities",
            Self::NoNewPrivs => "no-new-privs",
            Self::Rlimits => "rlimits",
            Self::MountNamespace => "mount-namespace",
            Self::PidNamespace => "pid-namespace",
            Self::IpcNamespace => "ipc-namespace",
            Self::NetworkNamespace => "network-namespace",
            Self::UtsNamespace => "uts-namespace",
            Self::CgroupNamespace => "cgroup-namespace",
            Self::Seccomp => "seccomp",
            Self::Landlock => "landlock",
            Self::NoWriteExec => "no-write-exec",
            Self::SingleExec => "single-exec",
            Self::MemoryLimit => "memory-limit",
            Self::CpuLimit => "cpu-limit",
            Self::PidsLimit => "pids-limit",
            Self::WholeKill => "whole-kill",
            Self::DiesWithLauncher => "dies-with-launcher",
            Self::OwnKernel => "own-kernel",
        }
    }
}

impl fmt::Display for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
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

/// What the host can enforce.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Each control, in the order of [`Control::ALL`].
    pub controls: Vec<Probed>,
    /// Each level, in the order of [`Level::ALL`].
    pub levels: Vec<ProbedLevel>,
}

/// What is missing for a level.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbedLevel {
    /// The level.
    pub level: Level,
    /// What it lacks here; empty when all of it can be enforced.
    pub lacking: Vec<Lacking>,
}

/// Something that a level lacks on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lacking {
    /// The control; `None` when this launcher does not have the level at all.
    pub control: Option<Control>,
    /// What was tried and how it failed.
    pub why: String,
    /// What the operator can do.
    pub fix: String,
    /// Whether `allow_degraded` lets plugins of this level run without it.
    pub may_be_allowed: bool,
}

/// One feature of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probed {
    /// The control that the feature serves.
    pub control: Control,
    /// What holds it here, or why nothing does and the fix.
    pub state: ProbeState,
}

/// Whether a control can be enforced on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProbeState {
    /// It works, by this mechanism, such as "cgroup v1 memory at /sys/fs/cgroup/memory/…".
    Works(String),
    /// It does not.
    Lacking {
        /// What was tried and how it failed.
        why: String,
        /// What the operator can do.
        fix: String,
    },
}

/// A plugin that runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launched {
    /// The launch.
    pub launch: LaunchId,
    /// The first process, as the supervisor's PID namespace sees it. For people only: the pidfd is the identity.
    pub pid: u32,
    /// The uid that it runs as.
    pub uid: u32,
    /// Every control asked for, as read back from the kernel after it was set.
    pub controls: Vec<ControlState>,
    /// The directories that its grants opened, as its mounts show them.
    pub directories: Vec<DirectoryState>,
    /// The cgroup directories of the launch; empty when there is none.
    pub cgroups: Vec<String>,
    /// Nanoseconds from the request's arrival to the exec, by the launcher's clock.
    pub launch_exec_nanos: u64,
    /// What each part of it took, in nanoseconds, in the order in which they were done.
    pub parts: Vec<(String, u64)>,
}

/// A control as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlState {
    /// Which one.
    pub control: Control,
    /// What was asked for, such as "67108864 bytes".
    pub requested: String,
    /// What the kernel said when it was read back; `None` when it is not enforced.
    pub enforced: Option<String>,
    /// The file or call that was read.
    pub read_from: String,
    /// Why it is not enforced, and the fix; empty when it is.
    pub unavailable: String,
}

/// A directory that a grant opened, as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectoryState {
    /// Where the plugin sees it.
    pub place: String,
    /// What of the host it is, and what may be done with it.
    pub requested: String,
    /// The mount's options and file system as they were read back; `None` when they are not what they must be.
    pub enforced: Option<String>,
    /// The file that was read.
    pub read_from: String,
}

/// Why a request was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// For programs.
    pub code: RefusalCode,
    /// What was refused, why, and the fix.
    pub message: String,
}

/// Kinds of refusals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RefusalCode {
    /// The packet is not a message of this protocol.
    Malformed,
    /// Another protocol version.
    Version,
    /// A field is outside the launcher's policy.
    Policy,
    /// The launcher's policy file cannot be used as it is now. It is read again at the next launch.
    PolicyFile,
    /// The launch id is unknown, or its processes are gone.
    UnknownLaunch,
    /// The level is not implemented by this launcher.
    LevelUnsupported,
    /// A control that is required and not in `allow_degraded` cannot be enforced here.
    ControlUnavailable,
    /// The program that the manifest names is missing or not executable here.
    Entry,
    /// The entry's bytes have another digest.
    DigestMismatch,
    /// A limit of the launcher is reached: plugins, descriptors, memory.
    Exhausted,
    /// A system call failed that should not have.
    Kernel,
    /// Another supervisor is connected; the connection is closed after this.
    Busy,
    /// No descriptor is held under this name.
    NotHeld,
    /// The store has no bundle with this digest.
    UnknownBundle,
    /// A file of an import is not what a bundle may hold, or not what was said of it.
    File,
    /// What is to be removed is in use, or an import is under way already.
    InUse,
    /// The walls are too weak for the bundle's tier, and the directory that it came from gives none: somebody else can
    /// write it, or not all of the bundle came from there.
    Directory,
    /// The approval that came with the launch does not hold.
    Approval,
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
