//! `plugvisor-launcher`: the plugins' parent, and the only part of Plugvisor that may be root while plugins run.
//!
//! One thread, no async runtime, few dependencies. Its policy is its command line (`plugvisor_sandbox::options`); what
//! comes through the socket is checked against it and never believed. It knows no gRPC, no manifests and no states.
//!
//! ```text
//! supervisor ── door ──▶ serve ──▶ check ──▶ launch ──▶ child: mounts, creds, landlock, seccomp, exec
//!                         │ ▲                  │
//!                         │ └── output, held   └── cgroup
//!                         └── closer: what came from outside is closed outside of the loop
//! ```
#![deny(unsafe_code)]

mod admit;
mod bpf;
mod cgroup;
mod check;
mod child;
mod closer;
mod creds;
mod directories;
mod door;
mod expiry;
mod held;
mod kernel;
mod landlock;
mod launch;
mod level;
mod machine;
mod mounts;
mod output;
mod own_program;
mod policy;
mod probe;
mod readback;
mod report;
mod resident;
mod sealing;
mod seccomp;
mod serve;
mod spares;
mod step;
mod store;
mod timing;
mod uids;

use std::{
    fs, io,
    os::{
        fd::{OwnedFd, RawFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
    process::ExitCode,
};

use plugvisor_sandbox::{
    options::{Options, Supervisor},
    seqpacket::{Peer, Seqpacket},
    service_manager,
};
use rustix::{
    fs::{Mode, OFlags, fstat},
    process::{DumpableBehavior, fchdir, getppid, getuid, set_child_subreaper, set_dumpable_behavior, umask},
};

use crate::{
    closer::Closer,
    creds::Identity,
    door::Door,
    launch::{Launcher, Parts},
    policy::Policy,
    seccomp::Filters,
    serve::Server,
    store::Store,
    uids::Uids,
};

/// In place of a launcher: after one, for its service.
const CLEAR_CGROUP: &str = "--clear-cgroup";

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1).peekable();
    if args.peek().is_some_and(|first| first == probe::TRIAL) {
        return ExitCode::SUCCESS;
    }
    if args.next_if(|first| first == machine::MONITOR).is_some() {
        machine::run_monitor(args);
    }
    if args.peek().is_some_and(|first| first == CLEAR_CGROUP) {
        return match cgroup::clear() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("plugvisor-launcher: {CLEAR_CGROUP} failed: {error}; the next start may end in 219/CGROUP");
                ExitCode::from(74)
            }
        };
    }
    match Options::parse(args).map_err(|error| Wrong::Policy(error.to_string())).and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Wrong::Policy(why)) => {
            eprintln!("plugvisor-launcher: {why}");
            ExitCode::from(78)
        }
        Err(Wrong::System(doing, error)) => {
            eprintln!("plugvisor-launcher: {doing} failed: {error}");
            ExitCode::from(74)
        }
    }
}

enum Wrong {
    /// It was started wrongly.
    Policy(String),
    /// A system call failed.
    System(&'static str, io::Error),
}

fn run(mut options: Options) -> Result<(), Wrong> {
    let system = |doing| move |error: io::Error| Wrong::System(doing, error);
    // With a service manager come launchers that supervisors use; `LISTEN_FDS` counts with --listen alone, which excludes it.
    if options.trace.is_some() && ["LISTEN_FDS", "NOTIFY_SOCKET"].iter().any(|name| std::env::var_os(name).is_some()) {
        return Err(Wrong::Policy("--trace-fd is refused: a service manager started this launcher".to_owned()));
    }
    let first = match &options.supervisor {
        Supervisor::Inherited(fd) => Some(*fd),
        Supervisor::Listen(listen) => listen.first,
    };
    let connection = first.map(|fd| take_over(fd, "taking over --socket-fd")).transpose()?;
    let trace = options.trace.map(|fd| take_over(fd, "taking over --trace-fd")).transpose()?;
    let door_directory = options.door_directory().map(Path::to_owned);
    // Before anything is opened: descriptors of directories stay in the mounts that they were opened in.
    let (mounts, own_mounts) = match options.store {
        // Needs none itself, and an ordinary user would have to be in another user namespace for it.
        Some(_) if !rustix::process::geteuid().is_root() => (Ok(()), false),
        Some(_) | None => {
            let mounts = store::own_mounts();
            if let (Some(_), Err(error)) = (&options.store, &mounts) {
                eprintln!(
                    "plugvisor-launcher: it has no mounts of its own ({error}): a plugin with runtime.socket \"bind\" can \
                     fill the runtime directory's file system; start it with CAP_SYS_ADMIN"
                );
            }
            let own = mounts.is_ok();
            (mounts, own)
        }
    };
    // Nobody of the same uid, such as a plugin of a rootless launcher, may read its memory or its descriptors.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|error| Wrong::System("PR_SET_DUMPABLE", error.into()))?;
    set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(|error| Wrong::System("PR_SET_CHILD_SUBREAPER", error.into()))?;
    umask(Mode::RWXG | Mode::RWXO);
    // Before anything is touched that another launcher in the same place may use.
    let door = match &options.supervisor {
        Supervisor::Inherited(_) => None,
        Supervisor::Listen(listen) => Some(Door::open(listen).map_err(system("listening at --listen"))?),
    };
    let signals =
        kernel::signalfd(&[libc::SIGTERM, libc::SIGINT, libc::SIGCHLD]).map_err(system("making a signalfd"))?;
    let filters = Filters::compile(&options.without).map_err(Wrong::Policy)?;
    let closer = Closer::new().map_err(system("dividing its descriptor table"))?;
    let directory =
        own_directory(&options.runtime_directory).map_err(system("making its directory in --runtime-directory"))?;
    let mut policy = Policy::load(&mut options).map_err(Wrong::Policy)?;
    if rustix::process::geteuid().is_root() {
        policy.shared_roots().iter().for_each(|shared| eprintln!("plugvisor-launcher: {shared}"));
    }
    let copier = Identity::copier(&options.uids);
    let store = Store::open(&options, mounts, copier).map_err(Wrong::Policy)?;
    let uids = Uids::open(options.uids.clone(), store.directory()).map_err(Wrong::Policy)?;
    let parts = Parts { store, policy, uids, trace, own_mounts };
    let mut launcher = Launcher::new(options, filters, parts).map_err(system("pidfd_open of itself"))?;
    launcher.try_controls();
    let mut server = Server::new(launcher, connection, door, signals, closer).map_err(system("making an epoll set"))?;
    if let Err(error) = resident::let_go_of_code() {
        eprintln!("plugvisor-launcher: what only its start needed stays in memory: {error}");
    }
    tell("READY=1");
    let served = server.run();
    tell("STOPPING=1");
    server.release_store();
    let _ = rustix::process::chdir("/");
    drop(fs::remove_dir_all(directory));
    // The end of the process closes what it holds. Closing the connection would close the descriptors in packets that
    // nobody has read, and that can block; in a process that exits, sockets do not linger.
    server.hang_up();
    if let Some(directory) = door_directory {
        // Only when nothing else is in it.
        drop(fs::remove_dir(directory));
    }
    std::mem::forget(server);
    served.map_err(system("serving the supervisor"))
}

/// Tells the service manager, which may be none.
fn tell(state: &str) {
    if let Err(error) = service_manager::tell(state) {
        eprintln!("plugvisor-launcher: {state} could not be told to the service manager: {error}");
    }
}

/// The connection that the starter left open under this number.
fn take_over(fd: RawFd, doing: &'static str) -> Result<Seqpacket, Wrong> {
    let system = |error: io::Error| Wrong::System(doing, error);
    let socket = kernel::inherited(fd).map_err(system)?;
    let connection = Seqpacket::from_fd(socket).map_err(system)?;
    check_peer(&connection.peer().map_err(system)?)?;
    Ok(connection)
}

/// Embedded, the other end is the process that started the launcher and made the pair: as root or as the same user.
fn check_peer(peer: &Peer) -> Result<(), Wrong> {
    let starter = getppid().map(|pid| pid.as_raw_nonzero().get());
    let user = peer.uid == 0 || peer.uid == getuid().as_raw();
    if starter == Some(peer.pid) && user {
        return Ok(());
    }
    Err(Wrong::Policy(format!(
        "its connection is to process {} of uid {}, not to the process that started the launcher",
        peer.pid, peer.uid
    )))
}

/// Makes the launcher's private directory and makes it the working directory, by which alone it is used from now on:
/// the supervisor's user may own the directory around it.
fn own_directory(runtime: &Path) -> io::Result<PathBuf> {
    let path = fs::canonicalize(runtime)?.join("launcher");
    match fs::remove_dir_all(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::DirBuilder::new().mode(0o700).create(&path)?;
    let directory: OwnedFd =
        rustix::fs::open(&path, OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let found = fstat(&directory)?;
    if found.st_uid != getuid().as_raw() || found.st_mode & 0o077 != 0 {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "somebody else made it"));
    }
    fchdir(&directory)?;
    fs::create_dir(mounts::ROOT)?;
    Ok(path)
}
