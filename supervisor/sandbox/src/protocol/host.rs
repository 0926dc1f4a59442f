//! What a host can enforce.

use serde::{Deserialize, Serialize};

use super::{Control, Level};

/// The launcher's policy file. While it cannot be used every launch is refused with
/// [`RefusalCode::PolicyFile`](super::RefusalCode::PolicyFile).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PolicyFile {
    /// The starter named none.
    Absent,
    /// It holds.
    Usable {
        /// Where it is.
        path: String,
    },
    /// It does not hold.
    Unusable {
        /// Where it is.
        path: String,
        /// What is wrong with it, for people; each problem in a line of its own.
        why: String,
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
