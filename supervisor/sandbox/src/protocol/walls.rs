//! The levels, and the controls that they are made of.

use std::fmt;

use plugvisor_package::IsolationLevel;
use serde::{Deserialize, Serialize};

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
