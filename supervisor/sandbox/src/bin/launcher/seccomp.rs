//! The seccomp rules: from the data files to programs for the kernel, compiled once before any launch.
//!
//! Two lists: what PROCESS and CONTAINER deny, and all that SANDBOX allows. It knows no plugin, only the grants that lift a
//! rule. How a program searches is in `bpf`, and what becomes of the one exec of SANDBOX in `once`.

use std::collections::BTreeMap;

use plugvisor_sandbox::{
    protocol::{Control, Grant},
    rules::{AllowFile, Calling, Condition, File, Granted, MACHINE, MachineFile, PROCESS, Rule, SANDBOX, syscalls},
};
use seccompiler::BpfProgram;

use crate::{
    bpf::{self, Comparison, Decision, Test, Width},
    level::Calls,
    report,
};

/// The compiled filters, one for each list and set of grants that lift rules.
pub(crate) struct Filters {
    programs: Vec<(Calls, Vec<Granted>, BpfProgram)>,
}

impl Filters {
    /// Compiles the data files; an error means that one is wrong, and nothing may be launched. `without` are the controls
    /// that the escape suite leaves out.
    pub(crate) fn compile(without: &[Control]) -> Result<Self, String> {
        let denied: File = toml::from_str(PROCESS).map_err(|error| format!("policy/process.toml: {error}"))?;
        let mut allowed: AllowFile =
            toml::from_str(SANDBOX).map_err(|error| format!("policy/sandbox.toml: {error}"))?;
        if cfg!(debug_assertions) {
            allowed.leave_out(without);
        }
        let mut programs = Vec::new();
        for lifted in Granted::sets() {
            programs.push((Calls::Listed, lifted.clone(), deny_list(&denied, &lifted)?));
            programs.push((Calls::Only, lifted.clone(), allow_list(&denied, &allowed, &lifted)?));
        }
        let mut machine: MachineFile = toml::from_str(MACHINE).map_err(|error| format!("policy/vm.toml: {error}"))?;
        allowed.allow.append(&mut machine.allow);
        allowed.rule.append(&mut machine.rule);
        // Whatever is granted: who traces a launch knows that.
        let unseen = report::UNSEEN.bits();
        let kill = cfg!(target_arch = "x86_64").then_some(X32);
        let sendmsg = number("sendmsg")?.ok_or("sendmsg has no number")?;
        programs.push((Calls::Traced, Vec::new(), bpf::asking_for_all(sendmsg, 2, unseen, kill)));
        for lifted in Granted::machines() {
            let program = allow_list(&denied, &allowed, &lifted).map_err(|error| format!("policy/vm.toml: {error}"))?;
            programs.push((Calls::Machine, lifted, program));
        }
        Ok(Self { programs })
    }

    /// The filter for a plugin with these grants, or for a machine's monitor and emulator, by a device or not.
    pub(crate) fn of(&self, calls: Calls, grants: &[Grant], device: bool) -> Option<&BpfProgram> {
        let lifted = match calls {
            Calls::Listed | Calls::Only => Granted::of(grants),
            Calls::Machine => Granted::machine(Granted::Tcp.of_any(grants), device),
            Calls::Traced => Vec::new(),
        };
        let found = self.programs.iter().find(|(list, lifts, _)| *list == calls && *lifts == lifted);
        found.map(|(_, _, program)| program)
    }
}

/// The test that a condition is.
fn compile(condition: &Condition) -> Result<Test, String> {
    let Condition { arg, bits, mask, equals, not } = *condition;
    let width = match bits {
        32 => Width::Half,
        64 => Width::Whole,
        other => return Err(format!("bits is {other}, it must be 32 or 64")),
    };
    let comparison = match (mask, equals, not) {
        (Some(mask), Some(value), None) => Comparison::Masked { mask, value },
        (None, Some(value), None) => Comparison::Equal(value),
        (None, None, Some(value)) => Comparison::NotEqual(value),
        (Some(mask), None, Some(value)) => Comparison::NotMasked { mask, value },
        _ => return Err("a condition has `equals` or `not`, and perhaps a `mask`".to_owned()),
    };
    if arg > 5 {
        return Err(format!("arg is {arg}, the last one is 5"));
    }
    Ok(Test { argument: arg, width, comparison })
}

/// Everything is allowed but what the rules deny.
fn deny_list(file: &File, lifted: &[Granted]) -> Result<BpfProgram, String> {
    let mut decisions = BTreeMap::new();
    decide(&mut decisions, &file.rule, lifted)?;
    program(decisions, &Decision::Allow, None)
}

/// Nothing is allowed but what stands in the list, and of that only what the rules of both files let through.
fn allow_list(denied: &File, file: &AllowFile, lifted: &[Granted]) -> Result<BpfProgram, String> {
    let mut ruled = BTreeMap::new();
    decide(&mut ruled, &denied.rule, lifted)?;
    decide(&mut ruled, &file.rule, lifted)?;
    let mut decisions = BTreeMap::new();
    for (callings, usual) in [(&file.allow, Decision::Allow), (&file.once, Decision::Notify)] {
        for Calling { reason, syscalls } in callings {
            if reason.is_empty() {
                return Err(format!("the entry for {syscalls:?} has no reason"));
            }
            for name in syscalls {
                let Some(number) = number(name)? else { continue };
                let decision = ruled.get(&number).cloned().unwrap_or_else(|| usual.clone());
                if decisions.insert(number, decision).is_some() {
                    return Err(format!("{name} is allowed twice"));
                }
            }
        }
    }
    // What is denied by name keeps its error number, on which libraries may rely.
    for (number, decision) in ruled {
        if let Decision::Fail(_) = decision {
            decisions.entry(number).or_insert(decision);
        }
    }
    let (denied, unknown) = (Decision::Fail(errno(libc::EPERM)?), Decision::Fail(errno(libc::ENOSYS)?));
    if decisions.keys().any(|number| *number > file.newest) {
        return Err(format!("a call has a higher number than newest, which is {}", file.newest));
    }
    program(decisions, &denied, Some((file.newest + 1, unknown)))
}

/// The program for these decisions. `usual` is what happens to every other call, and from a number behind them on it may be
/// something else.
fn program(
    decisions: BTreeMap<u32, Decision>,
    usual: &Decision,
    newer: Option<(u32, Decision)>,
) -> Result<BpfProgram, String> {
    let mut ranges: Vec<(u32, Decision)> = vec![(0, usual.clone())];
    // From a number to the next one the same decision holds: neighbours that are decided alike are one range.
    let mut begin = |number: u32, decision: Decision| match ranges.last_mut() {
        Some((start, held)) if *start == number => *held = decision,
        Some((_, held)) if *held == decision => {}
        _ => ranges.push((number, decision)),
    };
    for (number, decision) in decisions {
        begin(number, decision);
        begin(number + 1, usual.clone());
    }
    if let Some((number, decision)) = newer {
        begin(number, decision);
    }
    if cfg!(target_arch = "x86_64") {
        begin(X32, Decision::Kill);
    }
    bpf::program(&ranges).ok_or_else(|| "its rules are too many for one program".to_owned())
}

/// From this number on are the x32 calls. They carry the x86-64 architecture, and every number below would miss them.
const X32: u32 = 0x4000_0000;

/// The number of a call; `None` where this architecture does not have it.
fn number(name: &str) -> Result<Option<u32>, String> {
    let number = syscalls::number(name).map_err(|syscalls::Unknown| format!("{name:?} is not a known system call"))?;
    let Some(number) = number else { return Ok(None) };
    let plain = u32::try_from(number).ok().filter(|number| *number < X32 - 1);
    plain.map(Some).ok_or_else(|| format!("{name} has no plain number"))
}

fn errno(number: i32) -> Result<u16, String> {
    u16::try_from(number).map_err(|error| error.to_string())
}

/// What the rules say of each call that they name.
fn decide(decisions: &mut BTreeMap<u32, Decision>, rules: &[Rule], lifted: &[Granted]) -> Result<(), String> {
    for rule in rules {
        if rule.reason.is_empty() {
            return Err(format!("the rule for {:?} has no reason", rule.syscalls));
        }
        if !rule.holds(lifted) {
            continue;
        }
        let errno = errno(rule.action.errno())?;
        for name in &rule.syscalls {
            let Some(number) = number(name)? else { continue };
            let mut alternatives = Vec::new();
            for conditions in &rule.when {
                let tests = conditions.iter().map(compile).collect::<Result<Vec<_>, _>>()?;
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
    Ok(())
}

#[cfg(test)]
mod tests {
    use seccompiler::{
        SeccompAction, SeccompCmpArgLen as CmpLen, SeccompCmpOp as CmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    };

    use plugvisor_sandbox::rules::Action;

    use super::*;

    #[test]
    fn the_data_file_compiles_and_stays_small() {
        let filters = Filters::compile(&[]).expect("the data files");
        for (calls, most) in [(Calls::Listed, 320), (Calls::Only, 512)] {
            let length = |grants| filters.of(calls, grants, false).expect("a program").len();
            let (plain, spawn, egress) = (length(&[]), length(&[Grant::SpawnChild]), length(&[Grant::Egress]));
            let signals = length(&[Grant::SignalHandling]);
            // The kernel takes 4096 instructions; each costs launch time.
            println!(
                "{calls:?}: {plain} instructions, {spawn} with process:spawn-child, {egress} with egress, {signals} with process:signal-handling"
            );
            assert!(plain < most && egress < most, "{plain}, {egress} instructions");
            assert!(spawn < plain && signals < plain, "the grants lift rules: {spawn}, {signals} < {plain}");
        }
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
            let error = deny_list(&toml::from_str(text).expect(text), &[]).expect_err(text);
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn a_trace_is_asked_for_every_call_but_that_which_sends_its_listener() {
        let filters = Filters::compile(&[]).expect("the data files");
        let program = filters.of(Calls::Traced, &[Grant::Egress], false).expect("a program");
        let sendmsg = number("sendmsg").expect("a name").expect("a number");
        let (flags, here) = (u64::from(report::UNSEEN.bits()), bpf::THIS_ARCHITECTURE);
        for number in 0..600 {
            for flags in [0, flags, flags | 1, 0x4000, flags | 1 << 32] {
                let unseen = number == sendmsg && flags & 0xFFFF_FFFF == u64::from(report::UNSEEN.bits());
                let wanted = if unseen { libc::SECCOMP_RET_ALLOW } else { bpf::NOTIFY };
                assert_eq!(bpf::run(program, number, here, [5, 1, flags, 0, 0, 0]), wanted, "{number} {flags:x}");
            }
        }
        let kill = libc::SECCOMP_RET_KILL_PROCESS;
        assert_eq!(bpf::run(program, 1, 0x4000_0003, [0; 6]), kill, "int 0x80");
        if cfg!(target_arch = "x86_64") {
            assert_eq!(bpf::run(program, X32 | 1, here, [0; 6]), kill);
        }
    }

    /// The same rules by `seccompiler`, one program for each action.
    fn oracle(file: &File, grants: &[Grant]) -> Vec<BpfProgram> {
        let mut programs = Vec::new();
        for action in [Action::Enosys, Action::Eperm] {
            let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
            for rule in file.rule.iter().filter(|rule| rule.action == action) {
                if !rule.holds(&Granted::of(grants)) {
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
            vec![0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 15, 33, 34, 35, 36, 0x5411, 0x5412, 0x541c, 0x8901, 0x8902, u64::MAX];
        values.extend((0..64).step_by(3).map(|bit| 1_u64 << bit));
        values.extend([0x5412, 1, 0, 35].map(|low: u64| low | 0xFFFF_FFFF_0000_0000));
        for lifted in Granted::sets() {
            let grants: Vec<Grant> = lifted.iter().flat_map(|lift| lift.grants()).copied().collect();
            let (ours, theirs) = (deny_list(&file, &lifted).expect("compiles"), oracle(&file, &grants));
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

    fn names(list: &[String], number: u32) -> bool {
        list.iter().any(|name| syscalls::number(name).expect("a name") == Some(i64::from(number)))
    }

    /// What the two files say of a call, read in the plainest way.
    fn said(denied: &File, allowed: &AllowFile, lifted: &[Granted], number: u32, arguments: [u64; 6]) -> u32 {
        let fail = |errno: i32| libc::SECCOMP_RET_ERRNO | errno.unsigned_abs();
        let names = |list: &[String]| names(list, number);
        let holds = |condition: &Condition| {
            let whole = arguments[usize::from(condition.arg)];
            let part = |value: u64| if condition.bits == 32 { value & 0xFFFF_FFFF } else { value };
            match (condition.mask, condition.equals, condition.not) {
                (mask, Some(value), _) => part(whole) & part(mask.unwrap_or(u64::MAX)) == part(value),
                (mask, _, value) => part(whole) & part(mask.unwrap_or(u64::MAX)) != part(value.expect("a value")),
            }
        };
        for rule in denied.rule.iter().chain(&allowed.rule).filter(|rule| names(&rule.syscalls)) {
            if rule.holds(lifted) && (rule.when.is_empty() || rule.when.iter().any(|all| all.iter().all(holds))) {
                return fail(if rule.action == Action::Eperm { libc::EPERM } else { libc::ENOSYS });
            }
        }
        if allowed.once.iter().any(|once| names(&once.syscalls)) {
            return bpf::NOTIFY;
        }
        if allowed.allow.iter().any(|allow| names(&allow.syscalls)) {
            return libc::SECCOMP_RET_ALLOW;
        }
        fail(if number > allowed.newest { libc::ENOSYS } else { libc::EPERM })
    }

    #[test]
    fn the_allow_list_lets_through_what_it_says_and_nothing_else() {
        let denied: File = toml::from_str(PROCESS).expect("policy/process.toml");
        let allowed: AllowFile = toml::from_str(SANDBOX).expect("policy/sandbox.toml");
        let mut values: Vec<u64> = (0..16).chain([35, 66, 0x5401, 0x5412, 0x541b, 0x541c, u64::MAX]).collect();
        values.extend((0..64).step_by(4).map(|bit| 1_u64 << bit));
        values.extend([0x5412, 0x5401, 1, 0].map(|low: u64| low | 0xFFFF_FFFF_0000_0000));
        for lifted in Granted::sets() {
            let ours = allow_list(&denied, &allowed, &lifted).expect("compiles");
            for number in (0..512).chain([1023, 0x3FFF_FFFF]) {
                // Arguments count for few calls.
                let ruled = denied
                    .rule
                    .iter()
                    .chain(&allowed.rule)
                    .any(|rule| !rule.when.is_empty() && names(&rule.syscalls, number));
                for value in values.iter().take(if ruled { values.len() } else { 1 }) {
                    for place in 0..3 {
                        let mut arguments = [1; 6];
                        arguments[place] = *value;
                        let got = bpf::run(&ours, number, bpf::THIS_ARCHITECTURE, arguments);
                        let wanted = said(&denied, &allowed, &lifted, number, arguments);
                        assert_eq!(got, wanted, "call {number} with {arguments:x?}");
                    }
                }
            }
        }
        // A second listener would let a plugin answer for itself, see the data file.
        let plain = allow_list(&denied, &allowed, &[]).expect("compiles");
        let seccomp = u32::try_from(libc::SYS_seccomp).expect("a number");
        let answer = bpf::run(&plain, seccomp, bpf::THIS_ARCHITECTURE, [1, 8, 0, 0, 0, 0]);
        assert_eq!(answer, libc::SECCOMP_RET_ERRNO | 1);
    }

    #[test]
    fn a_machine_asks_its_device_alone_for_more_and_installs_no_filter_that_answers_or_logs() {
        let filters = Filters::compile(&[]).expect("the data files");
        let (ioctl, seccomp) = (16, u32::try_from(libc::SYS_seccomp).expect("a number"));
        let asks = |device, call, argument: u64| {
            let program = filters.of(Calls::Machine, &[Grant::SpawnChild], device).expect("a program");
            bpf::run(program, call, bpf::THIS_ARCHITECTURE, [1, argument, 0, 0, 0, 0]) == libc::SECCOMP_RET_ALLOW
        };
        // KVM_CREATE_VM, KVM_RUN, KVM_SET_USER_MEMORY_REGION; the kernel reads the low half alone.
        for request in [0xae01, 0xae80, 0x4020_ae46, 0xffff_ffff_0000_ae01] {
            assert!(asks(true, ioctl, request) && !asks(false, ioctl, request), "{request:#x}");
        }
        // TUNSETIFF, SIOCGIFCONF, TIOCSTI with and without high bits, one whose type is beside KVM's, and nothing.
        for request in [0x4004_54ca, 0x8912, 0x5412, 0xae01_0000_5412, 0xaf01, 0xad01, 0xae, 0] {
            assert!(!asks(true, ioctl, request) && !asks(false, ioctl, request), "{request:#x}");
        }
        // TCGETS and FIONBIO, as everybody.
        assert!(asks(true, ioctl, 0x5401) && asks(false, ioctl, 0x5421));
        // None, and TSYNC; then LOG, SPEC_ALLOW, NEW_LISTENER, all of them, and one that the kernel does not read.
        for device in [false, true] {
            assert!([0, 1, 0xffff_ffff_0000_0001].iter().all(|flags| asks(device, seccomp, *flags)));
            assert!(![2, 4, 8, 9, 16, 3, 0xff, 0x8000_0000].iter().any(|flags| asks(device, seccomp, *flags)));
        }
    }
}
