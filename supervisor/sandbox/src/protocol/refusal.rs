//! A request that was refused.

use serde::{Deserialize, Serialize};

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
