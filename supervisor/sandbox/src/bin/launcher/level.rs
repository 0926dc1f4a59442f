//! What each level is made of: one value for each, read by whoever puts up, tries or reads back a wall. Pure.
//!
//! | | NONE | PROCESS | CONTAINER | SANDBOX |
//! |---|---|---|---|---|
//! | keeper | guard, outside of its cgroup | init of its PID namespace | same | same |
//! | tree | the host's, and its own places | its own | same | same |
//! | namespaces | mount, to have its places | and PID, IPC, network | and UTS, cgroup | same |
//! | rights | none dropped but by its uid | no capabilities, no_new_privs | same | same |
//! | Landlock | | deny all but its tree | same | same |
//! | system calls | all | deny-list | same | allow-list, memory and exec rules |
//!
//! VM is SANDBOX with a machine's monitor as its program, which executes the emulator (`machine`): the plugin is in there,
//! with a kernel of its own. Its allow-list has two calls more, and one exec more.
//!
//! A user namespace is added where the launcher has no privileges, from PROCESS up. Which controls a level promises is said
//! in `plugvisor_sandbox::protocol`; limits are the same at each.

use plugvisor_sandbox::protocol::{Control, Level};
use serde::{Deserialize, Serialize};

use crate::creds::Identity;

/// What a level is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Walls {
    pub(crate) keeper: Keeper,
    pub(crate) tree: Tree,
    /// The namespaces that it has before its mounts, `CLONE_NEW*`. A spare has those of PROCESS.
    pub(crate) namespaces: i32,
    /// Those that it enters when it has joined its cgroups: what it is then in is the root that its cgroup namespace shows.
    pub(crate) late: i32,
    /// No capabilities, and no way to gain any.
    pub(crate) powerless: bool,
    pub(crate) landlock: bool,
    pub(crate) calls: Option<Calls>,
    /// `PR_SET_MDWE`, where the kernel has it.
    pub(crate) no_write_exec: bool,
    /// Whose kernel the plugin runs on.
    pub(crate) kernel: Kernel,
    pub(crate) without: Without,
}

impl Walls {
    /// These without some controls: for the escape suite, and in a build for development alone (`Options::without`). A
    /// control that is not named here is a limit, which is left out by not asking for it, or one that others rest on.
    pub(crate) fn leaving_out(mut self, controls: &[Control]) -> Self {
        if !cfg!(debug_assertions) {
            return self;
        }
        for control in controls {
            match control {
                Control::MountNamespace => self.tree = Tree::Host,
                Control::PidNamespace => self.namespaces &= !libc::CLONE_NEWPID,
                Control::IpcNamespace => self.namespaces &= !libc::CLONE_NEWIPC,
                Control::NetworkNamespace => self.namespaces &= !libc::CLONE_NEWNET,
                Control::UtsNamespace => self.late &= !libc::CLONE_NEWUTS,
                Control::CgroupNamespace => self.late &= !libc::CLONE_NEWCGROUP,
                Control::Seccomp => self.calls = None,
                Control::Landlock => self.landlock = false,
                Control::NoWriteExec => self.no_write_exec = false,
                Control::OwnUid
                | Control::NoCapabilities
                | Control::NoNewPrivs
                | Control::Rlimits
                | Control::SingleExec
                | Control::OwnKernel
                | Control::MemoryLimit
                | Control::CpuLimit
                | Control::PidsLimit
                | Control::WholeKill
                | Control::DiesWithLauncher => {}
            }
            self.without = Without(self.without.0 | Without::bit(*control));
        }
        self
    }
}

/// Controls that are left out, see [`Walls::leaving_out`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Without(u32);

impl Without {
    pub(crate) const NOTHING: Self = Self(0);

    const fn bit(control: Control) -> u32 {
        1 << control as u32
    }

    /// Whether one is left out; never in a release build.
    pub(crate) const fn anything(self) -> bool {
        cfg!(debug_assertions) && self.0 != 0
    }

    /// Whether this one is left out; never in a release build.
    pub(crate) const fn has(self, control: Control) -> bool {
        cfg!(debug_assertions) && self.0 & Self::bit(control) != 0
    }
}

/// Who waits for the plugin's end, ends what it left behind, and ends it when the launcher is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Keeper {
    /// PID 1 of its namespace: the kernel kills everything in the namespace when it ends. See `child`.
    Init,
    /// A process beside it, which kills its cgroup. See `child::guard`.
    Guard,
}

/// What it sees of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Tree {
    /// All that the host has, with the bundle and the sockets at places that only this plugin has.
    Host,
    /// A root of its own.
    Own,
}

/// Which system calls it may make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Calls {
    /// All but those in `policy/process.toml`.
    Listed,
    /// Only those in `policy/sandbox.toml`, and one exec.
    Only,
    /// Those in `policy/vm.toml` too, and the emulator's exec.
    Machine,
    /// Each of them waits for whoever traces the launch, who lets it pass or not.
    Traced,
}

impl Walls {
    /// The same for a launch that is traced: who traces it answers for every call, in place of a filter. `None` for a level
    /// that has no filter, or more than that, of which a trace would show less than what is there: it is made at PROCESS and
    /// CONTAINER alone.
    pub(crate) fn traced(mut self) -> Option<Self> {
        self.calls = Some(Calls::Traced);
        (self.powerless && !self.no_write_exec && self.kernel == Kernel::Host).then_some(self)
    }
}

/// Whose kernel a plugin runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kernel {
    /// The host's.
    Host,
    /// One in a machine of its own.
    Own,
}

const NAMESPACES: i32 = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWNET;

/// Those that a child of a privileged launcher enters when it is born.
pub(crate) const BORN_IN: i32 = libc::CLONE_NEWPID;

/// Those of PROCESS that it makes itself.
pub(crate) const LATER: i32 = NAMESPACES & !BORN_IN;

impl Walls {
    /// What of its namespaces a child is not born in: an init of a launcher without privileges is born in all, together
    /// with its user namespace.
    pub(crate) const fn not_born_in(&self, identity: Identity) -> i32 {
        match (self.keeper, identity) {
            (Keeper::Guard, _) => self.namespaces,
            (Keeper::Init, Identity::Own { .. }) => self.namespaces & !BORN_IN,
            (Keeper::Init, Identity::Mapped { .. }) => 0,
        }
    }
}

const NONE: Walls = Walls {
    keeper: Keeper::Guard,
    tree: Tree::Host,
    namespaces: libc::CLONE_NEWNS,
    late: 0,
    powerless: false,
    landlock: false,
    calls: None,
    no_write_exec: false,
    kernel: Kernel::Host,
    without: Without::NOTHING,
};

/// The network namespace is empty, whatever Landlock can do: in the host's, a plugin without any socket of its own could
/// still read /proc/self/net, ask a Unix socket for the host's addresses (SIOCGIFCONF), and bind an abstract name that a
/// program of the host connects to. Landlock scopes only what a plugin connects to.
pub(crate) const PROCESS: Walls = Walls {
    keeper: Keeper::Init,
    tree: Tree::Own,
    namespaces: NAMESPACES,
    late: 0,
    powerless: true,
    landlock: true,
    calls: Some(Calls::Listed),
    no_write_exec: false,
    kernel: Kernel::Host,
    without: Without::NOTHING,
};

const CONTAINER: Walls = Walls { late: libc::CLONE_NEWUTS | libc::CLONE_NEWCGROUP, ..PROCESS };

const SANDBOX: Walls = Walls { calls: Some(Calls::Only), no_write_exec: true, ..CONTAINER };

const VM: Walls = Walls { calls: Some(Calls::Machine), kernel: Kernel::Own, ..SANDBOX };

/// The walls of a level.
pub(crate) const fn walls(level: Level) -> Walls {
    match level {
        Level::None => NONE,
        Level::Process => PROCESS,
        Level::Container => CONTAINER,
        Level::Sandbox => SANDBOX,
        Level::Vm => VM,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stronger_level_lacks_nothing_that_a_weaker_one_has() {
        let all: Vec<Walls> = Level::ALL.into_iter().map(walls).collect();
        for pair in all.windows(2) {
            let (weak, strong) = (&pair[0], &pair[1]);
            assert_eq!(weak.namespaces & !strong.namespaces, 0);
            assert_eq!(weak.late & !strong.late, 0);
            let has = |walls: &Walls| [walls.powerless, walls.landlock, walls.no_write_exec, walls.calls.is_some()];
            let kept = has(weak).into_iter().zip(has(strong)).all(|(weak, strong)| !weak || strong);
            assert!(kept, "{weak:?} {strong:?}");
        }
    }
}
