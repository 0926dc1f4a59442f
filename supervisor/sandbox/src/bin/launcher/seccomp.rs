//! The seccomp deny-list: from the data file to a program for the kernel, compiled once before any launch.
//!
//! It knows no plugin, only the grants that lift a rule. How a program searches is in `bpf`.

use std::collections::BTreeMap;

use plugvisor_sandbox::protocol::Grant;
use seccompiler::BpfProgram;
use serde::Deserialize;

use crate::{
    bpf::{self, Comparison, Decision, Test, Width},
    syscalls,
};

const PROCESS: &str = include_str!("../../../policy/process.toml");

/// The compiled filters of PROCESS.
pub(crate) struct Filters {
    plain: BpfProgram,
    spawn_child: BpfProgram,
    egress: BpfProgram,
    egress_spawn_child: BpfProgram,
}

impl Filters {
    /// Compiles the data file; an error means that the file is wrong, and nothing may be launched.
    pub(crate) fn compile() -> Result<Self, String> {
        let file: File = toml::from_str(PROCESS).map_err(|error| format!("policy/process.toml: {error}"))?;
        Ok(Self {
            plain: compile(&file, &[])?,
            spawn_child: compile(&file, &[Grant::SpawnChild])?,
            egress: compile(&file, &[Grant::Egress])?,
            egress_spawn_child: compile(&file, &[Grant::Egress, Grant::SpawnChild])?,
        })
    }

    /// The filter for a plugin with these grants.
    pub(crate) fn for_grants(&self, grants: &[Grant]) -> &BpfProgram {
        match (grants.contains(&Grant::Egress), grants.contains(&Grant::SpawnChild)) {
            (false, false) => &self.plain,
            (false, true) => &self.spawn_child,
            (true, false) => &self.egress,
            (true, true) => &self.egress_spawn_child,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    rule: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    reason: String,
    action: Action,
    syscalls: Vec<String>,
    #[serde(default)]
    when: Vec<Vec<Condition>>,
    /// The grant that lifts it.
    unless: Option<Granted>,
    /// The grant with which alone it holds.
    only: Option<Granted>,
}

impl Rule {
    fn holds(&self, grants: &[Grant]) -> bool {
        let granted = |by: Granted| grants.contains(&by.grant());
        !self.unless.is_some_and(granted) && self.only.is_none_or(granted)
    }
}

#[derive(Clone, Copy, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "UPPERCASE")]
enum Action {
    Enosys,
    Eperm,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Granted {
    SpawnChild,
    Egress,
}

impl Granted {
    const fn grant(self) -> Grant {
        match self {
            Self::SpawnChild => Grant::SpawnChild,
            Self::Egress => Grant::Egress,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Condition {
    arg: u8,
    bits: u8,
    mask: Option<u64>,
    equals: Option<u64>,
    not: Option<u64>,
}

impl Condition {
    fn compile(&self) -> Result<Test, String> {
        let width = match self.bits {
            32 => Width::Half,
            64 => Width::Whole,
            other => return Err(format!("bits is {other}, it must be 32 or 64")),
        };
        let comparison = match (self.mask, self.equals, self.not) {
            (Some(mask), Some(value), None) => Comparison::Masked { mask, value },
            (None, Some(value), None) => Comparison::Equal(value),
            (None, None, Some(value)) => Comparison::NotEqual(value),
            _ => return Err("a condition has `equals`, `mask` and `equals`, or `not`".to_owned()),
        };
        if self.arg > 5 {
            return Err(format!("arg is {}, the last one is 5", self.arg));
        }
        Ok(Test { argument: self.arg, width, comparison })
    }
}

fn compile(file: &File, grants: &[Grant]) -> Result<BpfProgram, String> {
    let decisions = decisions(file, grants)?;
    let mut ranges: Vec<(u32, Decision)> = vec![(0, Decision::Allow)];
    // From a number to the next one the same decision holds: neighbours that are decided alike are one range.
    let mut begin = |number: u32, decision: Decision| match ranges.last_mut() {
        Some((start, held)) if *start == number => *held = decision,
        Some((_, held)) if *held == decision => {}
        _ => ranges.push((number, decision)),
    };
    for (number, decision) in decisions {
        begin(number, decision);
        begin(number + 1, Decision::Allow);
    }
    if cfg!(target_arch = "x86_64") {
        begin(X32, Decision::Kill);
    }
    bpf::program(&ranges).ok_or_else(|| "its rules are too many for one program".to_owned())
}

/// From this number on are the x32 calls. They carry the x86-64 architecture, and every number below would miss them.
const X32: u32 = 0x4000_0000;

fn decisions(file: &File, grants: &[Grant]) -> Result<BTreeMap<u32, Decision>, String> {
    let mut decisions: BTreeMap<u32, Decision> = BTreeMap::new();
    for rule in &file.rule {
        if rule.reason.is_empty() {
            return Err(format!("the rule for {:?} has no reason", rule.syscalls));
        }
        if !rule.holds(grants) {
            continue;
        }
        let errno = match rule.action {
            Action::Enosys => libc::ENOSYS,
            Action::Eperm => libc::EPERM,
        };
        let errno = u16::try_from(errno).map_err(|error| error.to_string())?;
        for name in &rule.syscalls {
            let Some(number) = syscalls::number(name).map_err(|()| format!("{name:?} is not a known system call"))?
            else {
                continue;
            };
            let number = u32::try_from(number).ok().filter(|number| *number < X32 - 1);
            let number = number.ok_or_else(|| format!("{name} has no plain number"))?;
            let mut alternatives = Vec::new();
            for conditions in &rule.when {
                let tests = conditions.iter().map(Condition::compile).collect::<Result<Vec<_>, _>>()?;
                alternatives.push((tests, errno));
            }
            match decisions.get_mut(&number) {
                None if alternatives.is_empty() => {
                    decisions.insert(number, Decision::Fail(errno));
                }
                None => {
                    decisions.insert(number, Decision::Ask(alternatives));
                }
                Some(Decision::Ask(known)) if !alternatives.is_empty() => known.append(&mut alternatives),
                Some(_) => return Err(format!("{name} is denied twice, once without a condition")),
            }
        }
    }
    Ok(decisions)
}

#[cfg(test)]
mod tests {
    use seccompiler::{
        SeccompAction, SeccompCmpArgLen as CmpLen, SeccompCmpOp as CmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    };

    use super::*;

    #[test]
    fn the_data_file_compiles_and_stays_small() {
        let filters = Filters::compile().expect("policy/process.toml");
        let plain = filters.for_grants(&[]).len();
        let spawn = filters.for_grants(&[Grant::SpawnChild]).len();
        // The kernel takes 4096 instructions; each costs launch time.
        assert!(plain < 256, "{plain} instructions");
        assert!(spawn < plain, "the grant lifts rules: {spawn} < {plain}");
        let egress = filters.for_grants(&[Grant::Egress]).len();
        assert!(egress < 320, "{egress} instructions");
    }

    #[test]
    fn mistakes_in_the_file_are_named() {
        for (text, named) in [
            ("[[rule]]\nreason='x'\naction='EPERM'\nsyscalls=['mnt']", "mnt"),
            ("[[rule]]\nreason=''\naction='EPERM'\nsyscalls=['bpf']", "no reason"),
            ("[[rule]]\nreason='x'\naction='EPERM'\nsyscalls=['bpf', 'bpf']", "twice"),
            ("[[rule]]\nreason='x'\naction='EPERM'\nsyscalls=['bpf']\nwhen=[[{arg=0,bits=31,not=1}]]", "bits"),
            ("[[rule]]\nreason='x'\naction='EPERM'\nsyscalls=['bpf']\nwhen=[[{arg=0,bits=32}]]", "condition"),
        ] {
            let error = compile(&toml::from_str(text).expect(text), &[]).expect_err(text);
            assert!(error.contains(named), "{error}");
        }
    }

    /// The same rules by `seccompiler`, one program for each action.
    fn oracle(file: &File, grants: &[Grant]) -> Vec<BpfProgram> {
        let mut programs = Vec::new();
        for action in [Action::Enosys, Action::Eperm] {
            let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
            for rule in file.rule.iter().filter(|rule| rule.action == action) {
                if !rule.holds(grants) {
                    continue;
                }
                for number in rule.syscalls.iter().filter_map(|name| syscalls::number(name).expect("a name")) {
                    let of = rules.entry(number).or_default();
                    of.extend(rule.when.iter().map(|conditions| {
                        let conditions = conditions.iter().map(|condition| {
                            let length = if condition.bits == 32 { CmpLen::Dword } else { CmpLen::Qword };
                            let (operator, value) = match (condition.mask, condition.equals, condition.not) {
                                (Some(mask), Some(value), _) => (CmpOp::MaskedEq(mask), value),
                                (None, Some(value), _) => (CmpOp::Eq, value),
                                (_, _, value) => (CmpOp::Ne, value.expect("a value")),
                            };
                            SeccompCondition::new(condition.arg, length, operator, value).expect("a condition")
                        });
                        SeccompRule::new(conditions.collect()).expect("a rule")
                    }));
                }
            }
            let errno = if action == Action::Eperm { libc::EPERM } else { libc::ENOSYS };
            let deny = SeccompAction::Errno(errno.unsigned_abs());
            let architecture = std::env::consts::ARCH.try_into().expect("a known architecture");
            let filter = SeccompFilter::new(rules, SeccompAction::Allow, deny, architecture).expect("a filter");
            programs.push(filter.try_into().expect("a program"));
        }
        programs
    }

    #[test]
    fn every_call_is_decided_as_by_another_compiler() {
        let file: File = toml::from_str(PROCESS).expect("policy/process.toml");
        let mut values: Vec<u64> =
            vec![0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 33, 34, 35, 36, 0x5411, 0x5412, 0x541c, u64::MAX];
        values.extend((0..64).step_by(3).map(|bit| 1_u64 << bit));
        values.extend([0x5412, 1, 0, 35].map(|low: u64| low | 0xFFFF_FFFF_0000_0000));
        for grants in [&[][..], &[Grant::SpawnChild], &[Grant::Egress], &[Grant::Egress, Grant::SpawnChild]] {
            let (ours, theirs) = (compile(&file, grants).expect("compiles"), oracle(&file, grants));
            for number in (0..512).chain([1023, 0x3FFF_FFFF]) {
                for value in &values {
                    for place in 0..4 {
                        let mut arguments = [2; 6];
                        arguments[place] = *value;
                        let got = bpf::run(&ours, number, bpf::THIS_ARCHITECTURE, arguments);
                        // The kernel takes the strictest answer of several programs; errors are all alike.
                        let answers =
                            theirs.iter().map(|each| bpf::run(each, number, bpf::THIS_ARCHITECTURE, arguments));
                        let wanted = answers.min().expect("programs");
                        assert_eq!(got, wanted, "call {number} with {arguments:x?}");
                    }
                }
            }
            if cfg!(target_arch = "x86_64") {
                for number in [X32, X32 | 1, u32::MAX] {
                    let got = bpf::run(&ours, number, bpf::THIS_ARCHITECTURE, [0; 6]);
                    assert_eq!(got, libc::SECCOMP_RET_KILL_PROCESS);
                }
            }
        }
    }
}
