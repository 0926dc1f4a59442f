//! What the rules say of one call, and which of them do. Pure.
//!
//! The rules that mean a call with its arguments are one set of bits, and everything that can be decided of the call, at each
//! level and with each grant, follows from that set: so calls are counted by it, whatever their other arguments were.

use std::collections::{BTreeMap, BTreeSet};

use super::names;
use crate::{
    protocol::Level,
    rules::{AllowFile, File, Granted, PROCESS, Rule, SANDBOX, syscalls},
};

/// Which rules mean a call: a bit for each, in the order of process.toml and then sandbox.toml.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Meaning(u64);

/// A kind of call: all that is decided alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kind {
    /// The call's number.
    pub number: i64,
    /// The rules that mean it.
    pub meaning: Meaning,
}

/// What a level says of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is let through.
    Allowed,
    /// It fails with this error number.
    Refused(i32),
}

/// The rules of this build.
#[derive(Debug)]
pub struct Book {
    rules: Vec<Rule>,
    /// How many of them are those of process.toml.
    denied: usize,
    /// The rules that name a number.
    naming: BTreeMap<i64, Vec<usize>>,
    allowed: BTreeSet<i64>,
    once: BTreeSet<i64>,
    newest: i64,
}

impl Book {
    /// Reads the rules that are compiled into this program.
    ///
    /// # Errors
    /// What is wrong with them: this build is broken then.
    pub fn of_this_build() -> Result<Self, String> {
        let denied: File = toml::from_str(PROCESS).map_err(|error| format!("policy/process.toml: {error}"))?;
        let listed: AllowFile = toml::from_str(SANDBOX).map_err(|error| format!("policy/sandbox.toml: {error}"))?;
        Self::of(denied, listed)
    }

    /// The rules of these two lists.
    pub(crate) fn of(denied: File, listed: AllowFile) -> Result<Self, String> {
        let count = denied.rule.len();
        let AllowFile { newest, allow, once, rule } = listed;
        let rules: Vec<Rule> = denied.rule.into_iter().chain(rule).collect();
        if rules.len() > 64 {
            return Err(format!("{} rules are more than a trace tells apart, which is 64", rules.len()));
        }
        let number = |name: &String| {
            syscalls::number(name).map_err(|syscalls::Unknown| format!("{name:?} is not a known system call"))
        };
        let numbers = |names: Vec<String>| -> Result<Vec<i64>, String> {
            names.iter().filter_map(|name| number(name).transpose()).collect()
        };
        let mut naming: BTreeMap<i64, Vec<usize>> = BTreeMap::new();
        for (at, rule) in rules.iter().enumerate() {
            for name in &rule.syscalls {
                if let Some(number) = number(name)? {
                    naming.entry(number).or_default().push(at);
                }
            }
        }
        let of = |callings: Vec<crate::rules::Calling>| -> Result<BTreeSet<i64>, String> {
            let all: Vec<Vec<i64>> =
                callings.into_iter().map(|calling| numbers(calling.syscalls)).collect::<Result<_, _>>()?;
            Ok(all.into_iter().flatten().collect())
        };
        Ok(Self { denied: count, naming, allowed: of(allow)?, once: of(once)?, newest: newest.into(), rules })
    }

    /// The kind of this call.
    #[must_use]
    pub fn kind(&self, number: i64, arguments: [u64; 6]) -> Kind {
        let naming = self.naming.get(&number).map(Vec::as_slice).unwrap_or_default();
        let meaning = naming.iter().filter(|at| self.rules[**at].means(arguments)).fold(0, |bits, at| bits | 1 << at);
        Kind { number, meaning: Meaning(meaning) }
    }

    /// What a level says of it with these grants. NONE and VM refuse no call: the one has no filter, and at the other the
    /// calls are for a kernel of the plugin's own.
    #[must_use]
    pub fn verdict(&self, kind: Kind, level: Level, lifted: &[Granted]) -> Verdict {
        let last = match level {
            Level::None | Level::Vm => return Verdict::Allowed,
            Level::Process | Level::Container => self.denied,
            Level::Sandbox => self.rules.len(),
        };
        if let Some(at) = self.refusing(kind, last, lifted) {
            return Verdict::Refused(self.rules[at].action.errno());
        }
        // The first execve is the launcher's own, which no trace counts.
        match level {
            Level::Sandbox if self.once.contains(&kind.number) => Verdict::Refused(libc::ENOSYS),
            Level::Sandbox if self.allowed.contains(&kind.number) => Verdict::Allowed,
            Level::Sandbox if kind.number > self.newest => Verdict::Refused(libc::ENOSYS),
            Level::Sandbox => Verdict::Refused(libc::EPERM),
            Level::None | Level::Process | Level::Container | Level::Vm => Verdict::Allowed,
        }
    }

    /// Why a level refuses it, in the words of its policy.
    #[must_use]
    pub fn reason(&self, kind: Kind, level: Level, lifted: &[Granted]) -> &str {
        let last = if level == Level::Sandbox { self.rules.len() } else { self.denied };
        match self.refusing(kind, last, lifted) {
            Some(at) => &self.rules[at].reason,
            None if self.once.contains(&kind.number) => "its own program is executed, and no other",
            None => "it is not among the calls that sandbox allows",
        }
    }

    fn refusing(&self, kind: Kind, last: usize, lifted: &[Granted]) -> Option<usize> {
        (0..last).find(|at| kind.meaning.0 & 1 << at != 0 && self.rules[*at].holds(lifted))
    }

    /// How a call fails that no grant lets through at any level with a filter; `None` for the others. It is never carried out,
    /// in a trace either.
    #[must_use]
    pub fn always_refused(&self, kind: Kind) -> Option<i32> {
        let verdicts = Granted::sets().into_iter().map(|lifted| self.verdict(kind, Level::Process, &lifted));
        let mut refused = None;
        for verdict in verdicts {
            match verdict {
                Verdict::Allowed => return None,
                Verdict::Refused(errno) => refused = refused.or(Some(errno)),
            }
        }
        refused
    }

    /// Which arguments its rules look at.
    #[must_use]
    pub fn arguments_looked_at(&self, kind: Kind) -> Vec<usize> {
        let naming = self.naming.get(&kind.number).map(Vec::as_slice).unwrap_or_default();
        let meant = naming.iter().filter(|at| kind.meaning.0 & 1 << **at != 0);
        let conditions = meant.flat_map(|at| self.rules[*at].when.iter().flatten());
        let all: BTreeSet<usize> = conditions.map(|condition| usize::from(condition.arg)).collect();
        all.into_iter().collect()
    }

    /// The call's name, or `#` and its number.
    #[must_use]
    pub fn name(&self, kind: Kind) -> String {
        names::name(kind.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn book() -> Book {
        Book::of_this_build().expect("the data files")
    }

    fn kind(name: &str, arguments: [u64; 6]) -> Kind {
        book().kind(syscalls::number(name).expect("a name").expect("a number"), arguments)
    }

    #[test]
    fn what_would_weaken_a_wall_is_carried_out_for_nobody() {
        let book = book();
        for (name, argument) in [
            ("mount", 0),
            ("ptrace", 0),
            ("bpf", 0),
            ("init_module", 0),
            ("finit_module", 0),
            ("kexec_load", 0),
            ("setns", 0),
            ("unshare", 0),
            ("clone", 0x1000_0000),
            ("keyctl", 0),
            ("io_uring_setup", 0),
            ("open_by_handle_at", 0),
            ("process_vm_readv", 0),
            ("userfaultfd", 0),
            ("perf_event_open", 0),
            // AF_NETLINK and AF_VSOCK.
            ("socket", 16),
            ("socket", 40),
        ] {
            let kind = kind(name, [argument, 1, 0, 0, 0, 0]);
            assert_eq!(book.always_refused(kind), Some(libc::EPERM), "{name}");
        }
        assert_eq!(book.always_refused(kind("clone3", [0; 6])), Some(libc::ENOSYS));
        for (name, arguments) in [("kill", [7, 0, 0, 0, 0, 0]), ("fork", [0; 6]), ("socket", [2, 1, 0, 0, 0, 0])] {
            assert_eq!(book.always_refused(kind(name, arguments)), None, "{name}");
        }
    }

    #[test]
    fn a_level_and_its_grants_decide() {
        let book = book();
        let fork = kind("fork", [0; 6]);
        assert_eq!(book.verdict(fork, Level::Process, &[]), Verdict::Refused(libc::EPERM));
        assert_eq!(book.verdict(fork, Level::Sandbox, &[Granted::SpawnChild]), Verdict::Allowed);
        assert!(book.reason(fork, Level::Process, &[]).contains("process:spawn-child"));
        let write_exec = kind("mmap", [0, 0, 7, 0, 0, 0]);
        assert_eq!(book.verdict(write_exec, Level::Container, &[]), Verdict::Allowed);
        assert_eq!(book.verdict(write_exec, Level::Sandbox, &[]), Verdict::Refused(libc::EPERM));
        assert_eq!(book.arguments_looked_at(write_exec), [2]);
        assert_eq!(book.verdict(kind("execve", [0; 6]), Level::Sandbox, &[]), Verdict::Refused(libc::ENOSYS));
        assert_eq!(book.verdict(kind("read", [0; 6]), Level::Sandbox, &[]), Verdict::Allowed);
        // UDP: refused with the grant and without.
        assert_eq!(book.always_refused(kind("socket", [2, 2, 0, 0, 0, 0])), Some(libc::EPERM));
        // tkill is refused to who may have children and no signals.
        let tkill = kind("tkill", [0; 6]);
        assert_eq!(book.verdict(tkill, Level::Process, &[]), Verdict::Allowed);
        assert_eq!(book.verdict(tkill, Level::Process, &[Granted::SpawnChild]), Verdict::Refused(libc::EPERM));
    }
}
