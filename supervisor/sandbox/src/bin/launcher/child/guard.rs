//! The child's side of a launch at NONE: a guard, and the program as its child.
//!
//! The guard stays outside of the program's cgroup and keeps the launcher's user, so that a plugin with a uid of its own
//! cannot signal it. It takes in what the program leaves behind (a subreaper), tells how the program ended, and ends all
//! that is left by the cgroup: when the program has ended, and when the launcher has. A parent-death signal alone would not
//! do: a change of user clears it, a plugin can clear it, and its children never have it.
//!
//! Without a cgroup that can, which the operator then allows to be missing, it kills its own children until it has none.

use std::{
    ffi::CString,
    fs,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::Mode,
    io::Errno,
    process::{
        Pid, PidfdFlags, Signal, WaitOptions, getpid, getppid, pidfd_open, pidfd_send_signal, set_child_subreaper,
        setsid, umask, wait,
    },
};

use super::{ENTRY, Failure, Kit, Last, Order, Plan, REPORT, at, build, execute, fail, lift, readable};
use crate::{
    cgroup::Groups,
    kernel::{self, Cloned},
    report::{self, Message},
    step::Step,
    timing::{Marks, Part},
};

/// How often it looks again whether what it killed is gone; the kernel has no event for it on v1.
const RETRY: Timespec = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };

/// Runs the guard. Never returns to the launcher's code. The program is born in the v2 group `born_in`, if there is one.
pub(crate) fn run(
    kit: &Kit<'_>,
    plan: &Plan<'_>,
    order: &Order,
    groups: &Groups,
    born_in: Option<BorrowedFd<'_>>,
) -> ! {
    kernel::set_name(c"plugvisor-guard");
    let mut marks = order.marks;
    marks.done(Part::Started);
    let failure = match prepare() {
        Err(failure) => failure,
        Ok(children) => match kernel::clone3(0, born_in) {
            Ok(Cloned::Child) => fail(kit, become_program(kit, plan, order, marks)),
            Ok(Cloned::Parent { pidfd: _, pid }) => match keep_only(kit, &children) {
                Ok(kept) => watch(&kept, groups, pid),
                Err(error) => Failure::io(Step::Descriptors, &error),
            },
            Err(error) => Failure::io(Step::Fork, &error),
        },
    };
    fail(kit, failure)
}

/// What tells of children that have ended.
fn prepare() -> Result<OwnedFd, Failure> {
    setsid().map_err(at(Step::Session))?;
    set_child_subreaper(Some(getpid())).map_err(at(Step::Fork))?;
    kernel::signalfd(&[libc::SIGCHLD]).map_err(|error| Failure::io(Step::Signals, &error))
}

/// The program's process: why it did not become the program.
fn become_program(kit: &Kit<'_>, plan: &Plan<'_>, order: &Order, mut marks: Marks) -> Failure {
    let guard = getppid();
    let mut ready = || {
        umask(Mode::empty());
        build(kit, plan, order, &mut marks)?;
        // Who ended before the signal of its end was asked for sent none.
        if guard.is_none() || getppid() != guard {
            return Err(Failure::new(Step::LauncherGone, Errno::SRCH));
        }
        let mut envp = order.envp.clone();
        if envp.iter().any(|variable| variable.as_bytes().starts_with(b"LISTEN_FDS=")) {
            let pid = CString::new(format!("LISTEN_PID={}", getpid()));
            envp.extend(pid);
        }
        Ok(envp)
    };
    match ready() {
        Ok(envp) => match Last::of(kit, plan.entry, order, &envp, marks) {
            Ok(last) => execute(&last),
            Err(failure) => failure,
        },
        Err(failure) => failure,
    }
}

/// What the guard keeps open.
struct Kept {
    report: BorrowedFd<'static>,
    launcher: BorrowedFd<'static>,
    children: BorrowedFd<'static>,
}

/// Closes all other descriptors: what the program holds must end with it.
fn keep_only(kit: &Kit<'_>, children: &OwnedFd) -> std::io::Result<Kept> {
    let lifted = [kit.launcher, children.as_fd(), kit.report].map(lift);
    // The line has the number that it has in every child.
    let mut kept = Vec::new();
    for (from, to) in lifted.into_iter().zip(ENTRY - 1..) {
        kernel::place(from?, to, false)?;
        kept.push(kernel::fixed(to));
    }
    for fd in 0..ENTRY - 1 {
        kernel::close(fd);
    }
    kernel::close_from(REPORT + 1)?;
    Ok(Kept { launcher: kept[0], children: kept[1], report: kept[2] })
}

/// Waits for the end of the program or of the launcher.
fn watch(kept: &Kept, groups: &Groups, program: i32) -> ! {
    loop {
        let mut fds = [PollFd::new(&kept.children, PollFlags::IN), PollFd::new(&kept.launcher, PollFlags::IN)];
        let _ = poll(&mut fds, None);
        if readable(kept.launcher) != Ok(false) {
            break;
        }
        // What it says is only that somebody ended.
        while matches!(rustix::io::read(kept.children, &mut [0; 128]), Ok(128)) {}
        if let Some(ended) = reap(program) {
            drop(report::send(kept.report, &ended, None));
            break;
        }
    }
    end_all(groups);
    kernel::exit_now(0)
}

/// Reaps who has ended; how the program did, if it was among them.
fn reap(program: i32) -> Option<Message> {
    let mut told = None;
    while let Ok(Some((ended, status))) = wait(WaitOptions::NOHANG) {
        if ended.as_raw_nonzero().get() == program {
            told = Some(Message::of(status));
        }
    }
    told
}

/// Ends all that is left, and returns when nothing is.
fn end_all(groups: &Groups) {
    loop {
        let gone = groups.kill_members().unwrap_or(true);
        let children = kill_children();
        let _ = reap(0);
        if gone && !children {
            return;
        }
        let _ = poll(&mut [], Some(&RETRY));
    }
}

/// Kills the guard's own children, and tells whether there were any.
fn kill_children() -> bool {
    let own = getpid().as_raw_nonzero();
    let children = fs::read_to_string(format!("/proc/{own}/task/{own}/children")).unwrap_or_default();
    let mut any = false;
    for pid in children.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)) {
        any = true;
        // A child that has ended keeps its number until it is reaped, which only this process does.
        if let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) {
            let _ = pidfd_send_signal(&process, Signal::KILL);
        }
    }
    any
}
