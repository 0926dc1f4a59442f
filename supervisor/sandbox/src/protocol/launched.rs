//! A launch that succeeded: what the kernel says of it.

use serde::{Deserialize, Serialize};

use super::{Control, LaunchId};

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
