//! The seccomp deny-list: from the data file to programs for the kernel, compiled once before any launch.
//!
//! Each action is a filter of its own, because a filter made by `seccompiler` has one action for what matches; the
//! kernel takes the strictest answer of all. It knows no plugin, only the grants that lift a rule.

use std::collections::BTreeMap;

use plugvisor_sandbox::protocol::Grant;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    sock_filter,
};
use serde::Deserialize;

use crate::syscalls;

const PROCESS: &str = include_str!("../../../policy/process.toml");

/// The compiled filters of PROCESS.
pub(crate) struct Filters {
    plain: Vec<BpfProgram>,
    spawn_child: Vec<BpfProgram>,
}

impl Filters {
    /// Compiles the data file; an error means that the file is wrong, and nothing may be launched.
    pub(crate) fn compile() -> Result<Self, String> {
        let file: File = toml::from_str(PROCESS).map_err(|error| format!("policy/process.toml: {error}"))?;
        Ok(Self { plain: compile(&file, &[])?, spawn_child: compile(&file, &[Grant::SpawnChild])? })
    }

    /// The filters for a plugin with these grants, in the order in which they are installed.
    pub(crate) fn for_grants(&self, grants: &[Grant]) -> &[BpfProgram] {
        if grants.contains(&Grant::SpawnChild) { &self.spawn_child } else { &self.plain }
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
    unless: Option<Lift>,
}

#[derive(Clone, Copy, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "UPPERCASE")]
enum Action {
    Enosys,
    Eperm,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Lift {
    SpawnChild,
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
    fn compile(&self) -> Result<SeccompCondition, String> {
        let len = match self.bits {
            32 => SeccompCmpArgLen::Dword,
            64 => SeccompCmpArgLen::Qword,
            other => return Err(format!("bits is {other}, it must be 32 or 64")),
        };
        let (op, value) = match (self.mask, self.equals, self.not) {
            (Some(mask), Some(value), None) => (SeccompCmpOp::MaskedEq(mask), value),
            (None, Some(value), None) => (SeccompCmpOp::Eq, value),
            (None, None, Some(value)) => (SeccompCmpOp::Ne, value),
            _ => return Err("a condition has `equals`, `mask` and `equals`, or `not`".to_owned()),
        };
        SeccompCondition::new(self.arg, len, op, value).map_err(|error| error.to_string())
    }
}

fn compile(file: &File, grants: &[Grant]) -> Result<Vec<BpfProgram>, String> {
    let mut by_action: BTreeMap<Action, BTreeMap<i64, Vec<SeccompRule>>> = BTreeMap::new();
    for rule in &file.rule {
        if rule.reason.is_empty() {
            return Err(format!("the rule for {:?} has no reason", rule.syscalls));
        }
        if rule.unless.is_some_and(|Lift::SpawnChild| grants.contains(&Grant::SpawnChild)) {
            continue;
        }
        let filter = by_action.entry(rule.action).or_default();
        for name in &rule.syscalls {
            let Some(number) = syscalls::number(name).map_err(|()| format!("{name:?} is not a known system call"))?
            else {
                continue;
            };
            let known = filter.get(&number);
            if known.is_some_and(|rules| rules.is_empty() || rule.when.is_empty()) {
                return Err(format!("{name} is denied twice, once without a condition"));
            }
            let rules = filter.entry(number).or_default();
            for conditions in &rule.when {
                let conditions = conditions.iter().map(Condition::compile).collect::<Result<Vec<_>, _>>()?;
                rules.push(SeccompRule::new(conditions).map_err(|error| error.to_string())?);
            }
        }
    }
    let arch = std::env::consts::ARCH.try_into().map_err(|error: seccompiler::BackendError| error.to_string())?;
    let mut programs = Vec::new();
    for (action, rules) in by_action {
        let errno = match action {
            Action::Enosys => libc::ENOSYS,
            Action::Eperm => libc::EPERM,
        };
        let deny = SeccompAction::Errno(errno.unsigned_abs());
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, deny, arch).map_err(|error| error.to_string())?;
        programs.push(filter.try_into().map_err(|error: seccompiler::BackendError| error.to_string())?);
    }
    programs.extend(x32_killer());
    Ok(programs)
}

/// Kills what calls by x32 numbers. They carry the x86-64 architecture, so the check that `seccompiler` puts first lets
/// them through, and every number in a filter would miss them.
#[cfg(target_arch = "x86_64")]
fn x32_killer() -> Option<BpfProgram> {
    const X32_BIT: u32 = 0x4000_0000;
    // struct seccomp_data begins with the system call's number.
    const NUMBER: u32 = 0;
    let statement = |code: u32, jt, jf, k| sock_filter { code: u16::try_from(code).unwrap_or(u16::MAX), jt, jf, k };
    Some(vec![
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, NUMBER),
        statement(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 0, 1, X32_BIT),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ])
}

#[cfg(not(target_arch = "x86_64"))]
fn x32_killer() -> Option<BpfProgram> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_file_compiles_and_stays_small() {
        let filters = Filters::compile().expect("policy/process.toml");
        let plain: usize = filters.for_grants(&[]).iter().map(Vec::len).sum();
        let spawn: usize = filters.for_grants(&[Grant::SpawnChild]).iter().map(Vec::len).sum();
        // The kernel takes 4096 instructions per filter; each installed one costs launch time.
        assert!(plain < 1024, "{plain} instructions");
        assert!(spawn < plain, "the grant lifts rules: {spawn} < {plain}");
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
}
