//! How strongly a plugin is walled in.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Isolation levels, from weakest to strongest. The order is the order of strength.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum IsolationLevel {
    /// No security claim: environment scrubbed, descriptors closed, own session.
    None,
    /// Own uid, no capabilities, Landlock, a seccomp deny-list, mount, PID and IPC namespaces, cgroup limits.
    Process,
    /// All seven namespaces, own read-only root, no network.
    Container,
    /// A seccomp allow-list, no writable and executable memory, no second exec.
    Sandbox,
    /// A virtual machine.
    Vm,
}

impl IsolationLevel {
    /// The level as the manifest writes it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Process => "process",
            Self::Container => "container",
            Self::Sandbox => "sandbox",
            Self::Vm => "vm",
        }
    }
}

impl fmt::Display for IsolationLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
