//! The child's side of a launch: from clone3 to exec, in the one order that works.
//!
//! Two processes come out of it. The first is PID 1 of the plugin's namespace and stays this program: a tiny init that
//! holds the parent-death signal, reaps, and tells the launcher how the plugin ended. The second becomes the plugin.
//! Without the init, the plugin would be PID 1 itself, and the kernel would drop every signal that it has no handler
//! for: SIGTERM would do nothing, and abort(3) would look like a segmentation fault.
//!
//! Everything that can be prepared is prepared by the launcher; what fails here is told as a (step, errno) pair.

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd},
};

use plugvisor_sandbox::protocol::SocketMode;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags},
    io::Errno,
    process::{
        DumpableBehavior, Resource, Rlimit, Signal, WaitOptions, getrlimit, parent_process_death_signal,
        set_dumpable_behavior, set_parent_process_death_signal, setrlimit, setsid, umask, wait,
    },
};
use seccompiler::BpfProgram;

use crate::{
    creds, entry,
    kernel::{self, Cloned},
    landlock,
    mounts::Tree,
    report::{self, Message},
    step::Step,
    timing::{Marks, Part},
};

/// Why the child could not become the plugin.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Failure {
    pub(crate) step: Step,
    pub(crate) errno: i32,
}

impl Failure {
    pub(crate) fn new(step: Step, errno: Errno) -> Self {
        Self { step, errno: errno.raw_os_error() }
    }

    pub(crate) fn io(step: Step, error: &io::Error) -> Self {
        Self { step, errno: error.raw_os_error().unwrap_or(libc::EIO) }
    }
}

/// Where the entry's bytes come from.
pub(crate) enum Entry<'a> {
    /// Sealed memory with the right digest, from an earlier launch.
    Sealed(BorrowedFd<'a>),
    /// A file to copy, hash and compare.
    Copy { file: BorrowedFd<'a>, name: &'a CStr, sha256: &'a [u8; 32] },
}

/// Everything the child needs, made ready by the launcher.
pub(crate) struct Plan<'a> {
    pub(crate) entry: Entry<'a>,
    pub(crate) tree: Tree<'a>,
    /// `cgroup.procs` files open for writing, one for each hierarchy to join.
    pub(crate) cgroups: Vec<BorrowedFd<'a>>,
    pub(crate) rlimits: Vec<(Resource, u64)>,
    pub(crate) identity: creds::Identity,
    /// The launcher's pidfd, readable when it is dead.
    pub(crate) launcher: BorrowedFd<'a>,
    pub(crate) stdout: BorrowedFd<'a>,
    pub(crate) stderr: BorrowedFd<'a>,
    pub(crate) worker: Option<BorrowedFd<'a>>,
    /// Closed by the exec, which is how the launcher sees it.
    pub(crate) exec: BorrowedFd<'a>,
    /// To the launcher.
    pub(crate) report: BorrowedFd<'a>,
    /// The Landlock version; 0 where there is none and the operator allows that.
    pub(crate) landlock: i32,
    pub(crate) filter: &'a BpfProgram,
    pub(crate) argv: &'a [CString],
    pub(crate) envp: &'a [CString],
    /// What the launcher has done by now.
    pub(crate) marks: Marks,
}

/// The numbers of the descriptors when the program starts. Those up to `ENTRY` may stay open across exec.
const WORKER: RawFd = 3;
const ENTRY: RawFd = 4;
const EXEC: RawFd = 5;
const REPORT: RawFd = 6;
/// Descriptors are first lifted above this number, so that placing one cannot close another.
const LIFTED: RawFd = 32;

/// Runs the child. Never returns to the launcher's code.
pub(crate) fn run(plan: &Plan<'_>) -> ! {
    kernel::set_name(c"plugvisor-init");
    let mut marks = plan.marks;
    marks.done(Part::Cloned);
    let failure = match set_up(plan, &mut marks) {
        Ok(()) => start(plan, marks),
        Err(failure) => failure,
    };
    // On either number is the report socket: before the descriptors were arranged, or after.
    let message = Message::Failed { step: failure.step, errno: failure.errno };
    if report::send(plan.report, &message, None).is_err() {
        drop(report::send(kernel::fixed(REPORT), &message, None));
    }
    kernel::exit_now(1)
}

/// Everything up to the fork of the program.
fn set_up(plan: &Plan<'_>, marks: &mut Marks) -> Result<(), Failure> {
    umask(Mode::empty());
    creds::map_user(&plan.identity)?;
    let entry = match plan.entry {
        Entry::Sealed(entry) => {
            // Rootless, an earlier launch owned it too and may have made a script unreadable to this one.
            rustix::fs::fchmod(entry, Mode::from_raw_mode(0o755)).map_err(at(Step::EntryRead))?;
            entry
        }
        Entry::Copy { file, name, sha256 } => {
            let sealed = entry::seal(file, name, sha256)?;
            report::send(plan.report, &Message::Sealed, Some(sealed.as_fd()))
                .map_err(|error| Failure::io(Step::EntryRead, &error))?;
            // Owned by nobody from here on: it is closed with all others when the descriptors are arranged.
            kernel::fixed(sealed.into_raw_fd())
        }
    };
    let script = entry::is_script(entry);
    marks.done(Part::Entry);
    for group in &plan.cgroups {
        // 0 is the writer itself.
        rustix::io::write(group, b"0").map_err(at(Step::Cgroup))?;
    }
    marks.done(Part::Joined);
    setsid().map_err(at(Step::Session))?;
    plan.tree.enter()?;
    marks.done(Part::Tree);
    for (resource, limit) in &plan.rlimits {
        let mut limit = *limit;
        if *resource == Resource::Nofile {
            // Only raised for now: the child holds what the launcher has open, under numbers beyond a low limit.
            limit = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX).max(limit);
        }
        set_limit(*resource, limit)?;
    }
    creds::drop_privileges(&plan.identity)?;
    // Only now: the kernel clears the parent-death signal when credentials change.
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(at(Step::ParentDeath))?;
    if parent_process_death_signal() != Ok(Some(Signal::KILL)) {
        return Err(Failure::new(Step::ParentDeath, Errno::INVAL));
    }
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(at(Step::ParentDeath))?;
    if readable(plan.launcher).map_err(at(Step::LauncherGone))? {
        return Err(Failure::new(Step::LauncherGone, Errno::SRCH));
    }
    rustix::thread::set_no_new_privs(true).map_err(at(Step::NoNewPrivs))?;
    marks.done(Part::Identity);
    arrange(plan, entry, script).map_err(|error| Failure::io(Step::Descriptors, &error))?;
    marks.done(Part::Descriptors);
    if plan.landlock > 0 {
        landlock::restrict(plan.landlock, plan.tree.socket, plan.tree.temp.is_some())?;
    }
    if let Some((resource, limit)) = plan.rlimits.iter().find(|(resource, _)| *resource == Resource::Nofile) {
        set_limit(*resource, *limit)?;
    }
    // A plugin that binds its own socket must let the supervisor's user connect to it; nobody else sees its directory.
    umask(match plan.tree.socket {
        SocketMode::Bind => Mode::empty(),
        SocketMode::Inherit => Mode::WGRP | Mode::WOTH,
    });
    marks.done(Part::Landlock);
    Ok(())
}

/// Forks the program and becomes its init; in the program, returns why it could not be executed.
fn start(plan: &Plan<'_>, marks: Marks) -> Failure {
    match kernel::clone3(0, None) {
        Ok(Cloned::Parent { pidfd, pid }) => init(&pidfd, pid),
        Ok(Cloned::Child) => execute(plan, marks),
        Err(error) => Failure::io(Step::Fork, &error),
    }
}

fn execute(plan: &Plan<'_>, mut marks: Marks) -> Failure {
    marks.done(Part::Forked);
    // Its own session, so that the program's process group is not its init's.
    if let Err(errno) = setsid() {
        return Failure::new(Step::Session, errno);
    }
    if let Err(error) = kernel::reset_signals() {
        return Failure::io(Step::Signals, &error);
    }
    if let Err(error) = report::send(kernel::fixed(REPORT), &Message::Executing { marks }, None) {
        return Failure::io(Step::Exec, &error);
    }
    if let Err(error) = seccompiler::apply_filter(plan.filter) {
        let source = std::error::Error::source(&error).and_then(|source| source.downcast_ref::<io::Error>());
        return source.map_or(Failure::new(Step::Seccomp, Errno::INVAL), |error| Failure::io(Step::Seccomp, error));
    }
    let error = kernel::execveat(ENTRY, plan.argv, plan.envp);
    Failure::io(Step::Exec, &error)
}

/// PID 1 of the plugin's namespace: reaps until the program ends, tells how, and ends; the kernel then kills whatever
/// the program left behind. It has no privileges, no descriptor but its line to the launcher, and no handlers, so that
/// nothing inside the namespace can signal it.
fn init(program: &OwnedFd, pid: i32) -> ! {
    drop(report::send(kernel::fixed(REPORT), &Message::Started, Some(program.as_fd())));
    for fd in [0, 1, 2, WORKER, ENTRY, EXEC] {
        // What the program holds must end with it. A number that is not open is no harm.
        kernel::close(fd);
    }
    loop {
        let status = match wait(WaitOptions::empty()) {
            Ok(Some((ended, status))) if ended.as_raw_nonzero().get() == pid => status,
            Ok(_) | Err(Errno::INTR) => continue,
            Err(_) => kernel::exit_now(1),
        };
        let message = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Message::Ended { signal: false, value: code },
            (None, signal) => Message::Ended { signal: true, value: signal.unwrap_or(libc::SIGKILL) },
        };
        drop(report::send(kernel::fixed(REPORT), &message, None));
        kernel::exit_now(0)
    }
}

/// Gives each descriptor its number and closes all others.
fn arrange(plan: &Plan<'_>, entry: BorrowedFd<'_>, script: bool) -> io::Result<()> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let lift = |fd: BorrowedFd<'_>| kernel::lift(fd.as_raw_fd(), LIFTED);
    let (null, stdout, stderr) = (lift(kernel::fixed(null.into_raw_fd()))?, lift(plan.stdout)?, lift(plan.stderr)?);
    let worker = plan.worker.map(lift).transpose()?;
    let (entry, exec, report) = (lift(entry)?, lift(plan.exec)?, lift(plan.report)?);
    for (from, to) in [(null, 0), (stdout, 1), (stderr, 2)] {
        kernel::place(from, to, true)?;
    }
    match worker {
        Some(worker) => kernel::place(worker, WORKER, true)?,
        None => kernel::place(null, WORKER, false)?,
    }
    // The entry stays open only for a script: its interpreter opens it again by number.
    kernel::place(entry, ENTRY, script)?;
    kernel::place(exec, EXEC, false)?;
    kernel::place(report, REPORT, false)?;
    kernel::close_from(REPORT + 1)
}

fn set_limit(resource: Resource, limit: u64) -> Result<(), Failure> {
    setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) }).map_err(at(Step::Rlimits))
}

fn readable(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).map(|ready| ready > 0)
}

fn at(step: Step) -> impl Fn(Errno) -> Failure {
    move |errno| Failure::new(step, errno)
}
