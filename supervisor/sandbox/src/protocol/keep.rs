//! What the launcher keeps for a supervisor that was away: launches, exits, output, listening sockets. And what can be
//! read and changed of a running launch.

use serde::{Deserialize, Serialize};

use super::{Control, ControlState, Exit, Grant, LaunchId, Launched, Level, Limits, Tier};

/// The most descriptors that are held under names.
pub const MAX_HELD: usize = 64;

/// The longest name of a held descriptor: 1 to this many of `a-z`, `0-9`, `.` and `-`.
pub const MAX_HELD_NAME: usize = 64;

/// The most launches in one [`Listed`].
pub const LIST_PAGE: usize = 64;

/// One page of what the launcher knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// The launches after the one that was named, in the order of their ids: those that run, and those whose end was
    /// not acknowledged. A launch that is still being started is not among them.
    pub launches: Vec<Known>,
    /// There are more: ask again with the last id of these.
    pub more: bool,
    /// Names of the held descriptors, in order.
    pub held: Vec<String>,
    /// Ends that nobody acknowledged and that were forgotten, the oldest first, because there were too many.
    pub ends_forgotten: u64,
    /// For how long there was no supervisor before this one; `None` when it is the first.
    pub unattended_nanos: Option<u64>,
}

/// A launch that the launcher knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// The launch.
    pub launch: LaunchId,
    /// The plugin's name, as it was launched.
    pub plugin: String,
    /// The plugin's generation.
    pub generation: u64,
    /// How strong its walls are.
    pub level: Level,
    /// The tier that the supervisor counted on, and the launcher found to be no more than its own.
    pub tier: Tier,
    /// The content digest of its bundle. It covers the manifest, and so what was executed, how, and with which socket.
    pub bundle: [u8; 32],
    /// The limits in force, as far as they were enforced.
    pub limits: Limits,
    /// What it was granted.
    pub grants: Vec<Grant>,
    /// How many sockets connect to it.
    pub inward: u16,
    /// The [`environment_digest`](super::environment_digest) of the operator's variables.
    pub environment: [u8; 32],
    /// What was allowed to be missing.
    pub allow_degraded: Vec<Control>,
    /// Since the request for it arrived.
    pub age_nanos: u64,
    /// Whether it runs.
    pub condition: Condition,
}

/// Whether a launch runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Condition {
    /// It does.
    Up {
        /// Its first process, as the supervisor's PID namespace sees it. For people only.
        pid: u32,
        /// The uid that it runs as.
        uid: u32,
        /// It was frozen and not thawed.
        frozen: bool,
    },
    /// It is over.
    Over(Over),
}

/// How a launch ended that nobody acknowledged yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Over {
    /// How its first process ended.
    pub exit: Exit,
    /// The kernel killed one of its processes for memory.
    pub oom_killed: bool,
    /// Since it ended.
    pub ago_nanos: u64,
}

/// A launch, handed to a supervisor that did not start it.
///
/// Descriptors: 0 what stdout and 1 what stderr wrote while nobody read them, sealed memory files to be read from
/// offset 0; and when it is up, those from 2 on are those of a new launch: a pidfd, the broker's listener, the worker
/// socket, stdout, stderr, and the egress proxy's listener when it was granted. What the memory files hold was written before what is still in the pipes; nothing is in both.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reattached {
    /// The launch: as it was answered when it was launched, but with its controls read anew; or how it ended.
    pub state: ReattachState,
    /// What is in descriptor 0.
    pub stdout: Kept,
    /// What is in descriptor 1.
    pub stderr: Kept,
}

/// What was reattached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReattachState {
    /// A launch that runs. From now on the supervisor reads its output.
    Up(Launched),
    /// One that is over.
    Over(Over),
}

/// Output that was kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// How many bytes: the newest ones.
    pub bytes: u64,
    /// How many older ones were thrown away for lack of room.
    pub lost: u64,
}

/// What a launch uses, as the kernel says at this moment. `None` where no controller of this host counts it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Bytes of memory of all processes together.
    pub memory_bytes: Option<u64>,
    /// The most that it ever was.
    pub memory_peak_bytes: Option<u64>,
    /// The limit in force; `None` also when there is none.
    pub memory_limit_bytes: Option<u64>,
    /// CPU time of all processes together.
    pub cpu_nanos: Option<u64>,
    /// Accounting periods of the CPU limit that have passed while it wanted to run.
    pub cpu_periods: Option<u64>,
    /// Those in which it was made to wait.
    pub cpu_throttled_periods: Option<u64>,
    /// For how long it was made to wait.
    pub cpu_throttled_nanos: Option<u64>,
    /// Processes and threads, its init included.
    pub pids: Option<u64>,
    /// Processes that the kernel killed for memory.
    pub oom_kills: Option<u64>,
    /// Open descriptors of its first process.
    pub open_files: Option<u64>,
    /// Every process is frozen. While a freeze is under way it is false.
    pub frozen: Option<bool>,
}

/// The limits of a running launch after a change, each as read back: memory, CPU and processes.
pub type Limited = Vec<ControlState>;
