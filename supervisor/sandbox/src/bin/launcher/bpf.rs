//! From decisions per system call to one program of the kernel's classic BPF: a binary search over the numbers.
//!
//! Why not `seccompiler`'s own compiler, which the tests hold this one against: it compares number after number and needs
//! a program for each action, and what the kernel does when a program is installed (check it, translate it, run it for
//! every number to find those that are always allowed) grows with its length. For PROCESS that is 197 instructions in one
//! program against some 530 in three; the part of a launch that installs it and executes fell from 579 to 382 µs when the two
//! took turns. It knows no policy and no plugin.

use seccompiler::{BpfProgram, sock_filter};

/// What happens to a system call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    Allow,
    /// Fails with this error number.
    Fail(u16),
    /// The process is killed.
    Kill,
    /// The call waits for what the holder of the filter's listener says; it fails with ENOSYS when nobody holds it.
    Notify,
    /// It fails as the first alternative says all of whose conditions hold, and is allowed when none does.
    Ask(Vec<(Vec<Test>, u16)>),
}

/// A condition on an argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Test {
    /// 0 to 5.
    pub(crate) argument: u8,
    /// How much of it the kernel reads.
    pub(crate) width: Width,
    pub(crate) comparison: Comparison,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Width {
    /// The low half.
    Half,
    Whole,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Comparison {
    /// The bits of the mask are those of the value.
    Masked {
        mask: u64,
        value: u64,
    },
    /// They are not.
    NotMasked {
        mask: u64,
        value: u64,
    },
    Equal(u64),
    NotEqual(u64),
}

/// `SECCOMP_RET_USER_NOTIF`, Linux 5.0.
pub(crate) const NOTIFY: u32 = 0x7FC0_0000;

// struct seccomp_data: the number, the architecture, the instruction pointer, the arguments.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

#[cfg(target_arch = "x86_64")]
pub(crate) const THIS_ARCHITECTURE: u32 = 0xC000_003E;
#[cfg(target_arch = "aarch64")]
pub(crate) const THIS_ARCHITECTURE: u32 = 0xC000_00B7;

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const AND: u32 = libc::BPF_ALU | libc::BPF_AND | libc::BPF_K;
const JUMP: u32 = libc::BPF_JMP | libc::BPF_JA;
const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const IF_AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

/// The program for these decisions, each of which holds from its number up to the next one's. The first number is 0, and
/// they rise. `None` when a part is longer than a jump reaches.
pub(crate) fn program(decisions: &[(u32, Decision)]) -> Option<BpfProgram> {
    let mut program = vec![
        statement(LOAD, ARCHITECTURE),
        branch(IF_EQUAL, THIS_ARCHITECTURE, 1, 0),
        statement(RETURN, libc::SECCOMP_RET_KILL_PROCESS),
        statement(LOAD, NUMBER),
    ];
    program.extend(search(decisions)?);
    Some(program)
}

/// The program that asks for every call but one, which is let pass: that of this number with this as the low half of its
/// argument. From `kill` on the process is killed, as it is for another architecture's calls.
pub(crate) fn asking_for_all(number: u32, argument: u8, value: u32, kill: Option<u32>) -> BpfProgram {
    let mut program = vec![
        statement(LOAD, ARCHITECTURE),
        branch(IF_EQUAL, THIS_ARCHITECTURE, 1, 0),
        statement(RETURN, libc::SECCOMP_RET_KILL_PROCESS),
        statement(LOAD, NUMBER),
    ];
    if let Some(first) = kill {
        program.extend([branch(IF_AT_LEAST, first, 0, 1), statement(RETURN, libc::SECCOMP_RET_KILL_PROCESS)]);
    }
    program.extend([
        branch(IF_EQUAL, number, 0, 3),
        statement(LOAD, ARGUMENTS + u32::from(argument) * 8),
        branch(IF_EQUAL, value, 0, 1),
        statement(RETURN, libc::SECCOMP_RET_ALLOW),
        statement(RETURN, NOTIFY),
    ]);
    program
}

/// Compares and jumps. Equal answers are shared where every jump to them reaches; else the two halves are searched apart.
fn search(decisions: &[(u32, Decision)]) -> Option<BpfProgram> {
    if let [(_, only)] = decisions {
        return answer(only);
    }
    if let Some(program) = search_shared(decisions) {
        return Some(program);
    }
    let (below, above) = decisions.split_at(decisions.len() / 2);
    let (first, _) = above.first()?;
    let (below, above) = (search(below)?, search(above)?);
    // Conditional jumps reach 255 instructions, unconditional ones everything.
    let mut program = vec![branch(IF_AT_LEAST, *first, 0, 1), statement(JUMP, u32::try_from(below.len()).ok()?)];
    program.extend(below);
    program.extend(above);
    Some(program)
}

/// Where a comparison goes on.
#[derive(Clone, Copy)]
enum Target {
    Comparison(usize),
    Answer(usize),
}

#[derive(Default)]
struct Tree<'a> {
    /// The number, and where to go below it and from it on. Every target stands behind what goes there.
    comparisons: Vec<(u32, Target, Target)>,
    answers: Vec<&'a Decision>,
}

impl<'a> Tree<'a> {
    fn grow(&mut self, decisions: &'a [(u32, Decision)]) -> Target {
        if let [(_, only)] = decisions {
            let known = self.answers.iter().position(|answer| *answer == only);
            return Target::Answer(known.unwrap_or_else(|| {
                self.answers.push(only);
                self.answers.len() - 1
            }));
        }
        let (below, above) = decisions.split_at(decisions.len() / 2);
        let at = self.comparisons.len();
        self.comparisons.push((above[0].0, Target::Comparison(at), Target::Comparison(at)));
        let (below, above) = (self.grow(below), self.grow(above));
        self.comparisons[at].1 = below;
        self.comparisons[at].2 = above;
        Target::Comparison(at)
    }
}

/// `None` when a jump does not reach.
fn search_shared(decisions: &[(u32, Decision)]) -> Option<BpfProgram> {
    let mut tree = Tree::default();
    tree.grow(decisions);
    let answers: Vec<BpfProgram> = tree.answers.iter().map(|decision| answer(decision)).collect::<Option<_>>()?;
    let mut starts = Vec::new();
    let mut end = tree.comparisons.len();
    for answer in &answers {
        starts.push(end);
        end += answer.len();
    }
    let mut program = Vec::new();
    for (at, (number, below, above)) in tree.comparisons.iter().enumerate() {
        let left = |target: &Target| {
            let to = match target {
                Target::Comparison(to) => *to,
                Target::Answer(answer) => starts[*answer],
            };
            u8::try_from(to - at - 1).ok()
        };
        program.push(branch(IF_AT_LEAST, *number, left(above)?, left(below)?));
    }
    program.extend(answers.into_iter().flatten());
    Some(program)
}

fn answer(decision: &Decision) -> Option<BpfProgram> {
    Some(match decision {
        Decision::Allow => vec![statement(RETURN, libc::SECCOMP_RET_ALLOW)],
        Decision::Fail(errno) => vec![fail(*errno)],
        Decision::Kill => vec![statement(RETURN, libc::SECCOMP_RET_KILL_PROCESS)],
        Decision::Notify => vec![statement(RETURN, NOTIFY)],
        Decision::Ask(alternatives) => {
            let mut program = Vec::new();
            for (tests, errno) in alternatives {
                program.extend(alternative(tests, *errno)?);
            }
            program.push(statement(RETURN, libc::SECCOMP_RET_ALLOW));
            program
        }
    })
}

/// One alternative; where a test does not hold, it goes on behind it.
fn alternative(tests: &[Test], errno: u16) -> Option<BpfProgram> {
    // Built from its end, so that how far the end is away is known.
    let mut behind: Vec<sock_filter> = vec![fail(errno)];
    for test in tests.iter().rev() {
        let mut program = conditions(test, u8::try_from(behind.len()).ok()?)?;
        program.extend(behind);
        behind = program;
    }
    Some(behind)
}

/// The test; when it does not hold, `left` instructions behind it are skipped.
fn conditions(test: &Test, left: u8) -> Option<BpfProgram> {
    // Little-endian: the low half comes first.
    let low = ARGUMENTS + u32::from(test.argument) * 8;
    let halves = |value: u64| (u32::try_from(value & 0xFFFF_FFFF), u32::try_from(value >> 32));
    let equal = |mask: u64, value: u64| -> Option<BpfProgram> {
        let ((low_mask, high_mask), (low_value, high_value)) = (halves(mask), halves(value));
        let half = |at, mask: u32, value, left| {
            let mut program = vec![statement(LOAD, at)];
            if mask != u32::MAX {
                program.push(statement(AND, mask));
            }
            program.push(branch(IF_EQUAL, value, 0, left));
            program
        };
        let mut last = half(low, low_mask.ok()?, low_value.ok()?, left);
        if test.width == Width::Whole {
            let skipped = left.checked_add(u8::try_from(last.len()).ok()?)?;
            let mut first = half(low + 4, high_mask.ok()?, high_value.ok()?, skipped);
            first.append(&mut last);
            last = first;
        }
        Some(last)
    };
    let other = |mask: u64, value: u64| -> Option<BpfProgram> {
        let ((low_mask, high_mask), (low_value, high_value)) = (halves(mask), halves(value));
        let masked = |at, mask: u32| {
            let mask = (mask != u32::MAX).then(|| statement(AND, mask));
            [statement(LOAD, at)].into_iter().chain(mask).collect::<BpfProgram>()
        };
        let mut last = masked(low, low_mask.ok()?);
        last.push(branch(IF_EQUAL, low_value.ok()?, left, 0));
        if test.width == Width::Whole {
            let mut first = masked(low + 4, high_mask.ok()?);
            first.push(branch(IF_EQUAL, high_value.ok()?, 0, u8::try_from(last.len()).ok()?));
            first.append(&mut last);
            last = first;
        }
        Some(last)
    };
    match test.comparison {
        Comparison::Masked { mask, value } => equal(mask, value),
        Comparison::Equal(value) => equal(u64::MAX, value),
        Comparison::NotMasked { mask, value } => other(mask, value),
        Comparison::NotEqual(value) => other(u64::MAX, value),
    }
}

fn fail(errno: u16) -> sock_filter {
    statement(RETURN, libc::SECCOMP_RET_ERRNO | u32::from(errno))
}

fn statement(code: u32, value: u32) -> sock_filter {
    branch(code, value, 0, 0)
}

fn branch(code: u32, value: u32, holds: u8, else_: u8) -> sock_filter {
    sock_filter { code: u16::try_from(code).unwrap_or(u16::MAX), jt: holds, jf: else_, k: value }
}

/// What a program answers, as the kernel runs it; for tests.
#[cfg(test)]
pub(crate) fn run(program: &[sock_filter], number: u32, architecture: u32, arguments: [u64; 6]) -> u32 {
    let mut data = vec![number, architecture, 0, 0];
    for argument in arguments {
        let half = |part: u64| u32::try_from(part & 0xFFFF_FFFF).expect("half");
        data.extend([half(argument), half(argument >> 32)]);
    }
    let (mut at, mut held) = (0, 0_u32);
    loop {
        let step = &program[at];
        at += 1;
        let jump = |holds: bool| usize::from(if holds { step.jt } else { step.jf });
        match u32::from(step.code) {
            LOAD => held = data[step.k as usize / 4],
            AND => held &= step.k,
            JUMP => at += step.k as usize,
            IF_EQUAL => at += jump(held == step.k),
            IF_AT_LEAST => at += jump(held >= step.k),
            code if code == libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K => at += jump(held > step.k),
            RETURN => return step.k,
            code => panic!("instruction {code:#x}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(argument: u8, width: Width, comparison: Comparison) -> Decision {
        Decision::Ask(vec![(vec![Test { argument, width, comparison }], 1)])
    }

    fn answers(decision: Decision, argument: u64) -> bool {
        let program = program(&[(0, Decision::Allow), (7, decision), (8, Decision::Allow)]).expect("a program");
        let arguments = [argument; 6];
        assert_eq!(run(&program, 6, THIS_ARCHITECTURE, arguments), libc::SECCOMP_RET_ALLOW);
        assert_eq!(run(&program, 8, THIS_ARCHITECTURE, arguments), libc::SECCOMP_RET_ALLOW);
        match run(&program, 7, THIS_ARCHITECTURE, arguments) {
            libc::SECCOMP_RET_ALLOW => false,
            answer => {
                assert_eq!(answer, libc::SECCOMP_RET_ERRNO | 1);
                true
            }
        }
    }

    #[test]
    fn half_an_argument_is_compared_without_its_high_bits() {
        let high = 0xFFFF_0000_0000_0000;
        for width in [Width::Half, Width::Whole] {
            let ignored = width == Width::Half;
            assert!(answers(ask(3, width, Comparison::Equal(5)), 5));
            assert_eq!(answers(ask(3, width, Comparison::Equal(5)), 5 | high), ignored);
            assert!(!answers(ask(3, width, Comparison::NotEqual(5)), 5));
            assert_eq!(answers(ask(3, width, Comparison::NotEqual(5)), 5 | high), !ignored);
            assert!(answers(ask(0, width, Comparison::NotEqual(5)), 6));
            assert!(answers(ask(5, width, Comparison::Masked { mask: 6, value: 4 }), 5 | high));
            assert!(!answers(ask(5, width, Comparison::Masked { mask: 6, value: 4 }), 6));
            let other = Comparison::NotMasked { mask: 0xFF00, value: 0xAE00 };
            assert!(!answers(ask(1, width, other), 0x4020_AE46) && !answers(ask(1, width, other), 0xAE01 | high));
            assert!(answers(ask(1, width, other), 0x5412) && answers(ask(1, width, other), 0xAF01 | high));
        }
        let other = Comparison::NotMasked { mask: 0xF_0000_00FF, value: 0x3_0000_0001 };
        assert!(!answers(ask(1, Width::Whole, other), 0x13_0000_0101));
        assert!(
            answers(ask(1, Width::Whole, other), 0x12_0000_0001)
                && answers(ask(1, Width::Whole, other), 0x13_0000_0002)
        );
        let both = Comparison::Masked { mask: 0xF_0000_0001, value: 0x3_0000_0001 };
        assert!(answers(ask(1, Width::Whole, both), 0x13_0000_0009));
        assert!(!answers(ask(1, Width::Whole, both), 0x13_0000_0008));
        assert!(!answers(ask(1, Width::Whole, both), 0x12_0000_0009));
    }

    #[test]
    fn all_tests_of_an_alternative_must_hold_and_the_first_that_does_answers() {
        let test = |argument, value| Test { argument, width: Width::Whole, comparison: Comparison::Equal(value) };
        let decision = Decision::Ask(vec![
            (vec![test(0, 1), test(1, 2), test(2, 3)], 10),
            (vec![test(0, 1), test(1, 2)], 11),
            (vec![], 12),
        ]);
        let program = program(&[(0, decision)]).expect("a program");
        let errno = |arguments| run(&program, 0, THIS_ARCHITECTURE, arguments) & 0xFFFF;
        assert_eq!(errno([1, 2, 3, 0, 0, 0]), 10);
        assert_eq!(errno([1, 2, 4, 0, 0, 0]), 11);
        assert_eq!(errno([1, 3, 3, 0, 0, 0]), 12);
    }

    #[test]
    fn long_programs_find_every_number() {
        let decisions: Vec<_> = (0..2000_u16).map(|number| (u32::from(number) * 2, Decision::Fail(number))).collect();
        let program = program(&decisions).expect("a program");
        for number in 0..4000 {
            let answer = run(&program, number, THIS_ARCHITECTURE, [0; 6]);
            assert_eq!(answer, libc::SECCOMP_RET_ERRNO | (number / 2));
        }
        assert_eq!(run(&program, 1, 0x4000_0003, [0; 6]), libc::SECCOMP_RET_KILL_PROCESS, "int 0x80");
    }
}
