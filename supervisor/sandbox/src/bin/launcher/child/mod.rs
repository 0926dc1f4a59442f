//! The child's side of a launch: from clone3 to exec, in the one order that works.
//!
//! Two processes come out of it. The first is PID 1 of the plugin's namespace and stays this program: a tiny init that
//! holds the parent-death signal, reaps, and tells the launcher how the plugin ended. The second becomes the plugin.
//! Without the init, the plugin would be PID 1 itself, and the kernel would drop every signal that it has no handler
//! for: SIGTERM would do nothing, and abort(3) would look like a segmentation fault.
//!
//! That is from PROCESS up; at NONE there is a guard instead, see `guard`. What else differs from level to level is in the
//! `Walls` of the order (`level`).
//!
//! Everything that can be prepared is prepared by the launcher; what fails here is told as a (step, errno) pair.

pub(crate) mod guard;
mod network;
pub(crate) mod spare;

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, RawFd},
    path::Path,
};

use plugvisor_sandbox::protocol::{Control, Grant, SocketMode};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{Mode, OFlags},
    io::Errno,
    process::{
        DumpableBehavior, PidfdFlags, Resource, Rlimit, Signal, WaitOptions, getpid, getrlimit,
        parent_process_death_signal, pidfd_open, set_dumpable_behavior, set_parent_process_death_signal, setrlimit,
        setsid, umask, wait,
    },
    system::sethostname,
};
use seccompiler::BpfProgram;
use serde::{Deserialize, Serialize};

use crate::{
    creds::{self, Identity},
    directories::{self, Roots},
    kernel::{self, Strings},
    landlock,
    level::{Calls, Kernel, Walls},
    machine, mounts,
    report::{self, Message},
    seccomp::Filters,
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

/// The program.
#[derive(Clone, Copy)]
pub(crate) enum Entry<'a> {
    /// A file of the bundle, at the path that `argv` begins with. By its path, so that a script finds its neighbours; the
    /// bundle comes from the store and is read-only here.
    InBundle,
    /// Sealed memory, for a trial.
    Sealed(BorrowedFd<'a>),
}

/// What a child has of the launcher, whatever it becomes.
pub(crate) struct Kit<'a> {
    /// The launcher's pidfd, readable when it is dead.
    pub(crate) launcher: BorrowedFd<'a>,
    /// To the launcher.
    pub(crate) report: BorrowedFd<'a>,
    /// Member lists of cgroups open for writing, one for each hierarchy to join.
    pub(crate) cgroups: Vec<BorrowedFd<'a>>,
    /// The Landlock version; 0 where there is none and the operator allows that.
    pub(crate) landlock: i32,
    pub(crate) filters: &'a Filters,
}

/// What becomes of a child: everything but descriptors.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) walls: Walls,
    /// The plugin's name, and its host's where it has one of its own.
    pub(crate) plugin: String,
    pub(crate) identity: Identity,
    pub(crate) rlimits: Rlimits,
    pub(crate) socket: SocketMode,
    /// The size of /tmp in bytes, when the plugin has one.
    pub(crate) temp: Option<u64>,
    /// The device that runs its machine, if one does.
    pub(crate) device: Option<String>,
    pub(crate) grants: Vec<Grant>,
    /// Where it may listen in its network namespace.
    pub(crate) listen: Vec<u16>,
    /// How many sockets are made there to connect to it.
    pub(crate) inward: u16,
    pub(crate) argv: Vec<CString>,
    pub(crate) envp: Vec<CString>,
    /// What the launcher has done by now.
    pub(crate) marks: Marks,
}

/// The limits that a process carries itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Rlimits {
    pub(crate) core: u64,
    pub(crate) open_files: u64,
    pub(crate) file_size: Option<u64>,
    pub(crate) processes: Option<u64>,
}

/// What the program holds when it starts.
pub(crate) struct Ends<'a> {
    pub(crate) stdout: BorrowedFd<'a>,
    pub(crate) stderr: BorrowedFd<'a>,
    /// The listening worker socket, when the plugin does not make it.
    pub(crate) worker: Option<BorrowedFd<'a>>,
}

/// A launch for a child that begins from nothing.
pub(crate) struct Plan<'a> {
    pub(crate) entry: Entry<'a>,
    /// The bundle's directory, as the launcher checked it, and the device and inode that must be found there.
    pub(crate) bundle_path: &'a Path,
    pub(crate) bundle: BorrowedFd<'a>,
    /// Where the directories of plugins are.
    pub(crate) roots: Roots<'a>,
    /// The directory with this launch's sockets, in the launcher's directory.
    pub(crate) sockets: &'a str,
    /// What its machine is made of, at the level that has one.
    pub(crate) machine: &'a [machine::Part],
    pub(crate) ends: Ends<'a>,
}

/// The numbers of the descriptors when the program starts. Those up to `ENTRY` may stay open across exec.
const WORKER: RawFd = 3;
const ENTRY: RawFd = 4;
const REPORT: RawFd = 5;
/// Descriptors are first lifted above this number, so that placing one cannot close another.
const LIFTED: RawFd = 32;

/// Runs a child with everything there is to know. Never returns to the launcher's code.
pub(crate) fn run(kit: &Kit<'_>, plan: &Plan<'_>, order: &Order) -> ! {
    kernel::set_name(NAME);
    let mut marks = order.marks;
    marks.done(Part::Started);
    let failure = match set_up(kit, plan, order, &mut marks) {
        Ok(()) => start(kit, plan.entry, order, marks),
        Err(failure) => failure,
    };
    fail(kit, failure)
}

/// What an init is called in `ps`, when it is one's.
const NAME: &CStr = c"plugvisor-init";

/// Tells why and ends.
fn fail(kit: &Kit<'_>, failure: Failure) -> ! {
    // On either number is the report socket: before the descriptors were arranged, or after.
    let message = Message::Failed { step: failure.step, errno: failure.errno };
    if report::send(kit.report, &message, None).is_err() {
        drop(report::send(kernel::fixed(REPORT), &message, None));
    }
    kernel::exit_now(1)
}

/// Everything up to the fork of the program.
fn set_up(kit: &Kit<'_>, plan: &Plan<'_>, order: &Order, marks: &mut Marks) -> Result<(), Failure> {
    umask(Mode::empty());
    creds::map_user(&order.identity)?;
    setsid().map_err(at(Step::Session))?;
    build(kit, plan, order, marks)
}

/// From a process in its first namespaces to one behind all walls but the last.
fn build(kit: &Kit<'_>, plan: &Plan<'_>, order: &Order, marks: &mut Marks) -> Result<(), Failure> {
    join(kit)?;
    marks.done(Part::Joined);
    let missing = order.walls.not_born_in(order.identity);
    if missing != 0 {
        kernel::unshare(missing).map_err(|error| Failure::io(Step::Namespaces, &error))?;
    }
    marks.done(Part::Namespaces);
    // In a build for development it may be without that, and the host's is not to be changed.
    if order.walls.namespaces & libc::CLONE_NEWNET != 0 {
        network::bound_buffers();
    }
    network::make(kit, order)?;
    let tree = order.walls.tree;
    mounts::separate(tree)?;
    let mut own = mounts::Own::at(plan.bundle_path, plan.bundle, plan.sockets, order.socket)?;
    if order.walls.kernel == Kernel::Own {
        own = own.with_machine(plan.machine, order.device.as_deref())?;
    }
    let directories = directories::open(plan.roots, &order.plugin, &order.grants, order.identity)?;
    let common = mounts::Common::enter(tree)?;
    common.complete(own, directories, order.socket, order.temp)?;
    marks.done(Part::Tree);
    wall_in(kit, plan.entry, &plan.ends, order, marks)
}

fn join(kit: &Kit<'_>) -> Result<(), Failure> {
    for group in &kit.cgroups {
        // 0 is the writer itself.
        rustix::io::write(group, b"0").map_err(at(Step::Cgroup))?;
    }
    be_as_killable_as_others().map_err(|error| Failure::io(Step::Rlimits, &error))
}

/// A launcher that its service manager protects from the kernel's killing for memory (`OOMScoreAdjust=`) does not hand
/// that protection down. More than that a plugin may have been given from outside, and keeps.
fn be_as_killable_as_others() -> io::Result<()> {
    const SCORE: &str = "/proc/self/oom_score_adj";
    let score = std::fs::read_to_string(SCORE)?;
    match score.trim().parse::<i32>() {
        Ok(0..) => Ok(()),
        Ok(_) | Err(_) => std::fs::write(SCORE, "0"),
    }
}

/// From the finished mount tree on.
fn wall_in(kit: &Kit<'_>, entry: Entry<'_>, ends: &Ends<'_>, order: &Order, marks: &mut Marks) -> Result<(), Failure> {
    let walls = &order.walls;
    enter_late(walls, &order.plugin)?;
    let Rlimits { core, open_files, file_size, processes } = order.rlimits;
    set_limit(Resource::Core, core)?;
    // Only raised here, and lowered by the program itself: the child holds what the launcher has open, under numbers
    // beyond a low limit.
    let most = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX).max(open_files);
    set_limit(Resource::Nofile, most)?;
    if let Some(bytes) = file_size {
        set_limit(Resource::Fsize, bytes)?;
    }
    if let Some(processes) = processes {
        set_limit(Resource::Nproc, processes)?;
    }
    creds::drop_privileges(&order.identity, walls.powerless, walls.without)?;
    // Only now: the kernel clears the parent-death signal when credentials change.
    if !walls.without.has(Control::DiesWithLauncher) {
        tie_to(kit)?;
    }
    if walls.powerless {
        rustix::thread::set_no_new_privs(true).map_err(at(Step::NoNewPrivs))?;
    }
    marks.done(Part::Identity);
    arrange(kit, entry, ends).map_err(|error| Failure::io(Step::Descriptors, &error))?;
    marks.done(Part::Descriptors);
    if walls.landlock && kit.landlock > 0 {
        landlock::restrict(kit.landlock, walls, order.socket, &order.grants, &order.listen, order.device.as_deref())?;
    }
    // A plugin that binds its own socket must let the supervisor's user connect to it; nobody else sees its directory.
    umask(match order.socket {
        SocketMode::Bind => Mode::empty(),
        SocketMode::Inherit => Mode::WGRP | Mode::WOTH,
    });
    marks.done(Part::Landlock);
    Ok(())
}

/// The namespaces that begin with the cgroups that it has joined.
fn enter_late(walls: &Walls, plugin: &str) -> Result<(), Failure> {
    if walls.late == 0 {
        return Ok(());
    }
    kernel::unshare(walls.late).map_err(|error| Failure::io(Step::LateNamespaces, &error))?;
    if walls.late & libc::CLONE_NEWUTS != 0 {
        // At most 64 bytes, as a plugin's name is.
        sethostname(plugin.as_bytes()).map_err(at(Step::HostName))?;
    }
    Ok(())
}

/// Ties the calling process's life to that of its parent and so to the launcher's, and shows its memory to nobody.
fn tie_to(kit: &Kit<'_>) -> Result<(), Failure> {
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(at(Step::ParentDeath))?;
    if parent_process_death_signal() != Ok(Some(Signal::KILL)) {
        return Err(Failure::new(Step::ParentDeath, Errno::INVAL));
    }
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(at(Step::ParentDeath))?;
    if readable(kit.launcher).map_err(at(Step::LauncherGone))? {
        return Err(Failure::new(Step::LauncherGone, Errno::SRCH));
    }
    Ok(())
}

/// What the program's last steps need.
struct Last<'a> {
    filter: Option<(Calls, &'a BpfProgram)>,
    no_write_exec: bool,
    kernel: Kernel,
    /// Where the program is, or else behind `ENTRY`.
    path: Option<&'a CStr>,
    argv: Strings<'a>,
    envp: Strings<'a>,
    open_files: u64,
    marks: Marks,
}

impl<'a> Last<'a> {
    fn of(
        kit: &Kit<'a>,
        entry: Entry<'_>,
        order: &'a Order,
        envp: &'a [CString],
        marks: Marks,
    ) -> Result<Self, Failure> {
        let filter = match order.walls.calls {
            None => None,
            Some(calls) => {
                let program = kit.filters.of(calls, &order.grants, order.device.is_some());
                let program = program.ok_or(Failure::new(Step::Seccomp, Errno::INVAL))?;
                // Without that control its filter asks nobody.
                let asks = !order.walls.without.has(Control::SingleExec);
                Some((if asks { calls } else { Calls::Listed }, program))
            }
        };
        Ok(Self {
            filter,
            no_write_exec: order.walls.no_write_exec,
            kernel: order.walls.kernel,
            path: match entry {
                Entry::InBundle => order.argv.first().map(CString::as_c_str),
                Entry::Sealed(_) => None,
            },
            argv: Strings::new(&order.argv),
            envp: Strings::new(envp),
            open_files: order.rlimits.open_files,
            marks,
        })
    }
}

/// Starts the program and becomes its init. Returns only when it could not be started.
fn start(kit: &Kit<'_>, entry: Entry<'_>, order: &Order, marks: Marks) -> Failure {
    let last = match Last::of(kit, entry, order, &order.envp, marks) {
        Ok(last) => last,
        Err(failure) => return failure,
    };
    // It shares this process's memory until it executes, and takes nothing from it.
    let program = kernel::vfork(|| {
        let failure = execute(&last);
        let message = Message::Failed { step: failure.step, errno: failure.errno };
        drop(report::send(kernel::fixed(REPORT), &message, None));
        kernel::exit_now(1)
    });
    match program {
        Ok(pid) => init(pid),
        Err(error) => Failure::io(Step::Fork, &error),
    }
}

/// The last steps: returns why the program could not be executed.
fn execute(last: &Last<'_>) -> Failure {
    let mut marks = last.marks;
    marks.done(Part::Forked);
    // Its own session, so that the program's process group is not its init's.
    if let Err(errno) = setsid() {
        return Failure::new(Step::Session, errno);
    }
    if let Err(error) = kernel::reset_signals() {
        return Failure::io(Step::Signals, &error);
    }
    let report = kernel::fixed(REPORT);
    // What the launcher sees closed when the program is executed. The program alone has it: an init that the machine has
    // no time for would hold it open.
    match report::receive_descriptors(report) {
        // Never closed by hand: the launcher must hear of a failure first.
        Ok((exec, told)) => {
            let (exec, told) = (exec.into_raw_fd(), told.map(IntoRawFd::into_raw_fd));
            // A monitor hands it on: what the launcher is to see is the emulator's exec.
            if last.kernel == Kernel::Own
                && let Err(error) = hand_to_monitor(exec, told)
            {
                return Failure::io(Step::Descriptors, &error);
            }
        }
        Err(error) => return Failure::io(Step::Exec, &error),
    }
    // Limits and uid are the launcher's to see to, which it does while this child sets itself up.
    if let Err(error) = report::await_release(report) {
        return Failure::io(Step::Exec, &error);
    }
    marks.done(Part::Released);
    let told = pidfd_open(getpid(), PidfdFlags::empty())
        .map_err(io::Error::from)
        .and_then(|own| report::send(report, &Message::Executing { marks }, Some(own.as_fd())));
    if let Err(error) = told {
        return Failure::io(Step::Exec, &error);
    }
    // Only now: descriptors under way in sockets are counted for the whole uid and held against the sender's limit, so
    // that other launches could make the message above fail (ETOOMANYREFS).
    if let Err(failure) = set_limit(Resource::Nofile, last.open_files) {
        return failure;
    }
    if last.no_write_exec
        && let Err(failure) = refuse_exec_gain()
    {
        return failure;
    }
    if let Some((calls, filter)) = last.filter
        && let Err(failure) = filter_calls(calls, filter)
    {
        return failure;
    }
    let error = match last.path {
        Some(path) => kernel::execve(path, &last.argv, &last.envp),
        None => kernel::execveat(ENTRY, &last.argv, &last.envp),
    };
    Failure::io(Step::Exec, &error)
}

/// Leaves both under the numbers that a monitor knows.
fn hand_to_monitor(exec: RawFd, told: Option<RawFd>) -> io::Result<()> {
    let told = told.ok_or(io::ErrorKind::NotFound)?;
    // Lifted first: either may have the other one's number.
    for (from, lifted) in [exec, told].into_iter().zip(LIFTED..) {
        kernel::place(from, lifted, false)?;
        kernel::close(from);
    }
    kernel::place(LIFTED, machine::EXECUTED, true)?;
    kernel::place(LIFTED + 1, machine::TOLD, true)
}

/// Where the kernel does not know how, the filter holds it alone.
fn refuse_exec_gain() -> Result<(), Failure> {
    match kernel::refuse_exec_gain() {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) && kernel::refuses_exec_gain().is_none() => Ok(()),
        Err(error) => Err(Failure::io(Step::WriteExec, &error)),
        // The kernel shows it nobody else, so it is read back here.
        Ok(()) if kernel::refuses_exec_gain() == Some(true) => Ok(()),
        Ok(()) => Err(Failure::new(Step::WriteExec, Errno::INVAL)),
    }
}

fn filter_calls(calls: Calls, filter: &BpfProgram) -> Result<(), Failure> {
    match calls {
        Calls::Listed => kernel::filter_calls(filter).map_err(|error| Failure::io(Step::Seccomp, &error)),
        // The exec waits until the launcher, which gets the listener, lets it pass; nobody else ever has it.
        Calls::Only | Calls::Machine => kernel::filter_calls_with_listener(filter)
            .and_then(|listener| report::send(kernel::fixed(REPORT), &Message::Asks, Some(listener.as_fd())))
            .map_err(|error| Failure::io(Step::Listener, &error)),
        // And so does every call, but for the one that sends the listener.
        Calls::Traced => kernel::filter_calls_with_patient_listener(filter)
            .and_then(|listener| report::send_listener(kernel::fixed(REPORT), listener.as_fd()))
            .map_err(|error| Failure::io(Step::Listener, &error)),
    }
}

/// PID 1 of the plugin's namespace: reaps until the program ends, tells how, and ends; the kernel then kills whatever
/// the program left behind. It has no privileges, no descriptor but its line to the launcher, and no handlers, so that
/// nothing inside the namespace can signal it.
fn init(pid: i32) -> ! {
    for fd in [0, 1, 2, WORKER, ENTRY] {
        // What the program holds must end with it. A number that is not open is no harm.
        kernel::close(fd);
    }
    loop {
        let status = match wait(WaitOptions::empty()) {
            Ok(Some((ended, status))) if ended.as_raw_nonzero().get() == pid => status,
            Ok(_) | Err(Errno::INTR) => continue,
            Err(_) => kernel::exit_now(1),
        };
        drop(report::send(kernel::fixed(REPORT), &Message::of(status), None));
        kernel::exit_now(0)
    }
}

/// Gives each descriptor its number and closes all others.
fn arrange(kit: &Kit<'_>, entry: Entry<'_>, ends: &Ends<'_>) -> io::Result<()> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let (null, stdout, stderr) = (lift(kernel::fixed(null.into_raw_fd()))?, lift(ends.stdout)?, lift(ends.stderr)?);
    let worker = ends.worker.map(lift).transpose()?;
    let entry = match entry {
        Entry::InBundle => null,
        Entry::Sealed(entry) => lift(entry)?,
    };
    let report = lift(kit.report)?;
    for (from, to) in [(null, 0), (stdout, 1), (stderr, 2)] {
        kernel::place(from, to, true)?;
    }
    match worker {
        Some(worker) => kernel::place(worker, WORKER, true)?,
        None => kernel::place(null, WORKER, false)?,
    }
    kernel::place(entry, ENTRY, false)?;
    kernel::place(report, REPORT, false)?;
    kernel::close_from(REPORT + 1)
}

fn lift(fd: BorrowedFd<'_>) -> io::Result<RawFd> {
    kernel::lift(fd.as_raw_fd(), LIFTED)
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
