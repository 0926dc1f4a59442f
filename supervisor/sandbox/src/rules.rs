//! The rules for system calls as their data files write them (`policy/*.toml`), for both who read them: the launcher, which
//! compiles them into programs for the kernel, and the trace of a plugin, which says what they would refuse. Pure.

pub mod syscalls;

use serde::Deserialize;

use crate::protocol::{Control, Grant};

/// The deny-list of PROCESS.
pub const PROCESS: &str = include_str!("../policy/process.toml");
/// The allow-list of SANDBOX.
pub const SANDBOX: &str = include_str!("../policy/sandbox.toml");
/// What a machine needs beyond it.
pub const MACHINE: &str = include_str!("../policy/vm.toml");

/// A deny-list.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// What it denies.
    pub rule: Vec<Rule>,
}

/// An allow-list.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AllowFile {
    /// The highest number that was looked at; calls beyond it are newer than the file.
    pub newest: u32,
    /// What it allows.
    pub allow: Vec<Calling>,
    /// Calls of which the first is let pass.
    pub once: Vec<Calling>,
    /// What of it all is denied nevertheless.
    pub rule: Vec<Rule>,
}

/// What a machine needs beyond SANDBOX.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineFile {
    /// What it allows too.
    pub allow: Vec<Calling>,
    /// What of it is denied nevertheless.
    pub rule: Vec<Rule>,
}

impl AllowFile {
    /// Without the rules that hold these controls.
    pub fn leave_out(&mut self, controls: &[Control]) {
        if controls.contains(&Control::NoWriteExec) {
            self.rule.retain(|rule| rule.control != Some(Ruled::NoWriteExec));
        }
        if controls.contains(&Control::SingleExec) {
            self.allow.append(&mut self.once);
        }
    }
}

/// Calls that are allowed, and why.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calling {
    /// Why.
    pub reason: String,
    /// Their names.
    pub syscalls: Vec<String>,
}

/// Calls that are denied, when, and why.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Why.
    pub reason: String,
    /// How they fail.
    pub action: Action,
    /// Their names.
    pub syscalls: Vec<String>,
    /// Alternatives, each a list of conditions that all hold; none means always.
    #[serde(default)]
    pub when: Vec<Vec<Condition>>,
    /// The grant that lifts it.
    pub unless: Option<Granted>,
    /// The grant with which alone it holds.
    pub only: Option<Granted>,
    /// The control that rests on this rule alone, where one does.
    pub control: Option<Ruled>,
}

/// A control that is made of rules.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Ruled {
    /// No memory that is written and executed.
    NoWriteExec,
}

impl Rule {
    /// Whether it holds with these grants.
    #[must_use]
    pub fn holds(&self, grants: &[Granted]) -> bool {
        let granted = |by: Granted| grants.contains(&by);
        !self.unless.is_some_and(granted) && self.only.is_none_or(granted)
    }

    /// Whether it means a call with these arguments.
    #[must_use]
    pub fn means(&self, arguments: [u64; 6]) -> bool {
        self.when.is_empty() || self.when.iter().any(|all| all.iter().all(|condition| condition.holds(arguments)))
    }
}

/// How a call fails.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "UPPERCASE")]
pub enum Action {
    /// As if the kernel were older: libraries fall back.
    Enosys,
    /// Not permitted.
    Eperm,
}

impl Action {
    /// The error's number.
    #[must_use]
    pub const fn errno(self) -> i32 {
        match self {
            Self::Enosys => libc::ENOSYS,
            Self::Eperm => libc::EPERM,
        }
    }
}

/// A grant that lifts rules, or that some are for.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Granted {
    /// Children.
    SpawnChild,
    /// TCP sockets in its own network namespace, for whichever network grant.
    Tcp,
    /// Signals to its children.
    SignalHandling,
    /// Not a plugin's: what a machine is made by.
    Machine,
    /// The same by a device of the host.
    MachineDevice,
}

impl Granted {
    /// Those that a plugin may have.
    pub const ALL: [Self; 3] = [Self::SpawnChild, Self::Tcp, Self::SignalHandling];

    /// The grants of which each brings it.
    #[must_use]
    pub const fn grants(self) -> &'static [Grant] {
        match self {
            Self::SpawnChild => &[Grant::SpawnChild],
            Self::Tcp => &[Grant::Egress, Grant::TcpServer],
            Self::SignalHandling => &[Grant::SignalHandling],
            Self::Machine | Self::MachineDevice => &[],
        }
    }

    /// Whether one of these grants brings it.
    #[must_use]
    pub fn of_any(self, grants: &[Grant]) -> bool {
        self.grants().iter().any(|grant| grants.contains(grant))
    }

    /// Those of a machine. Its monitor starts the emulator.
    #[must_use]
    pub fn machine(tcp: bool, device: bool) -> Vec<Self> {
        // The emulator signals its own threads. Nobody else is in its PID namespace but the monitor.
        let all = [
            (Self::SpawnChild, true),
            (Self::Tcp, tcp),
            (Self::SignalHandling, true),
            (Self::Machine, true),
            (Self::MachineDevice, device),
        ];
        all.into_iter().filter(|(_, has)| *has).map(|(lift, _)| lift).collect()
    }

    /// Every set that a machine may have.
    #[must_use]
    pub fn machines() -> [Vec<Self>; 4] {
        [(false, false), (false, true), (true, false), (true, true)].map(|(tcp, device)| Self::machine(tcp, device))
    }

    /// Those of a plugin with these grants, in order.
    #[must_use]
    pub fn of(grants: &[Grant]) -> Vec<Self> {
        Self::ALL.into_iter().filter(|lift| lift.of_any(grants)).collect()
    }

    /// Every set that a plugin may have.
    #[must_use]
    pub fn sets() -> Vec<Vec<Self>> {
        let mut sets = vec![Vec::new()];
        for lift in Self::ALL {
            let with: Vec<Vec<Self>> = sets.iter().map(|set| set.iter().copied().chain([lift]).collect()).collect();
            sets.extend(with);
        }
        sets
    }
}

/// A condition on an argument: it is `equals`, or it is `not`; with a `mask`, only these bits of it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Condition {
    /// Which, from 0.
    pub arg: u8,
    /// How much of it the kernel reads, 32 or 64.
    pub bits: u8,
    /// The bits that are compared.
    pub mask: Option<u64>,
    /// What they are.
    pub equals: Option<u64>,
    /// What it is not.
    pub not: Option<u64>,
}

impl Condition {
    /// Whether it holds of these arguments. One that the launcher would not compile holds of none.
    #[must_use]
    pub fn holds(&self, arguments: [u64; 6]) -> bool {
        let Some(whole) = arguments.get(usize::from(self.arg)) else { return false };
        let part = |value: u64| if self.bits == 32 { value & 0xFFFF_FFFF } else { value };
        match (self.mask, self.equals, self.not) {
            (mask, Some(value), None) => part(*whole) & part(mask.unwrap_or(u64::MAX)) == part(value),
            (mask, None, Some(value)) => part(*whole) & part(mask.unwrap_or(u64::MAX)) != part(value),
            _ => false,
        }
    }
}
