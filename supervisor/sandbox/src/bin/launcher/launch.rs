//! The launcher's side of a launch: prepares everything, forks the child, and holds what belongs to a launch until the
//! last of its processes is gone. What a child does is in `child`; the event loop is in `serve`.

use std::{
    collections::HashMap,
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::{DirBuilderExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use plugvisor_sandbox::{
    options::Options,
    protocol::{Control, Exit, Grant, Launch, LaunchId, Limits, Refusal, RefusalCode, SocketMode},
};
use rustix::{
    fs::{Gid, Mode, OFlags, Uid},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with, socketpair},
    pipe::{PipeFlags, pipe_with},
    process::{PidfdFlags, Resource, Signal, getgid, getpid, getrlimit, getuid, pidfd_open, pidfd_send_signal},
};

use crate::{
    cgroup::{Cgroups, Groups, MemoryWatch},
    check::{Checked, refuse},
    child::{self, Entry, Failure, Plan},
    creds::Identity,
    kernel::{self, Cloned},
    landlock,
    mounts::Tree,
    probe::Trial,
    report::{self, Message},
    sealed::SealedEntries,
    seccomp::Filters,
    step,
    timing::{self, Marks, Part},
};

/// Connections that may wait on a plugin's sockets.
const BACKLOG: i32 = 4096;
/// Open files when the manifest says nothing: what most systems give.
const OPEN_FILES: u64 = 1024;
/// The largest core: none, also where a handler takes them.
pub(crate) const CORE_BYTES: u64 = 1;
/// The size of /tmp when the plugin has one.
const TEMP_BYTES: u64 = 64 << 20;
/// How long a child may take to set itself up: far more than ever needed, unless a filesystem hangs.
pub(crate) const SETUP_TIME: Duration = Duration::from_secs(10);

/// What all launches share.
pub(crate) struct Launcher {
    pub(crate) options: Options,
    /// The bundle roots without symlinks.
    pub(crate) roots: Vec<PathBuf>,
    pub(crate) cgroups: Cgroups,
    pub(crate) filters: Filters,
    /// The Landlock version in use; 0 when there is none.
    pub(crate) landlock: i32,
    pub(crate) sealed: SealedEntries,
    /// What was tried at the start.
    pub(crate) trial: Trial,
    privileged: bool,
    uids: HashMap<String, u32>,
    pidfd: OwnedFd,
    last: u64,
}

/// One launch, from the fork until nothing of it is left.
pub(crate) struct Running {
    pub(crate) id: LaunchId,
    pub(crate) plugin: String,
    pub(crate) identity: Identity,
    pub(crate) limits: Limits,
    pub(crate) allow_degraded: Vec<Control>,
    pub(crate) arrived: Instant,
    /// The same by the clock of the marks.
    pub(crate) began: u64,
    pub(crate) marks: Marks,
    /// The init, a child of the launcher.
    pub(crate) init: OwnedFd,
    pub(crate) init_pid: i32,
    /// From the child; closed when all of it is gone.
    pub(crate) report: OwnedFd,
    pub(crate) report_closed: bool,
    /// Readable when the program was executed or died.
    pub(crate) exec: Option<OwnedFd>,
    pub(crate) program: Option<OwnedFd>,
    pub(crate) executing: bool,
    pub(crate) failure: Option<Failure>,
    pub(crate) ended: Option<Exit>,
    pub(crate) groups: Groups,
    pub(crate) memory: Option<MemoryWatch>,
    pub(crate) oom: bool,
    /// For the supervisor: broker, worker, stdout, stderr. Taken when the launch has succeeded.
    pub(crate) ends: Vec<OwnedFd>,
    sha256: [u8; 32],
}

impl Launcher {
    pub(crate) fn new(options: Options, filters: Filters) -> io::Result<Self> {
        let privileged = rustix::process::geteuid().is_root();
        let roots = options.bundle_roots.iter().filter_map(|root| fs::canonicalize(root).ok()).collect();
        Ok(Self {
            roots,
            cgroups: Cgroups::set_up(&options.cgroup_root),
            filters,
            landlock: landlock::version(),
            sealed: SealedEntries::default(),
            trial: Trial::default(),
            privileged,
            uids: HashMap::new(),
            pidfd: pidfd_open(getpid(), PidfdFlags::empty())?,
            last: 0,
            options,
        })
    }

    /// Whether plugins get uids of their own.
    pub(crate) const fn privileged(&self) -> bool {
        self.privileged
    }

    /// The uid for this name: the same for the launcher's life, and nobody else's.
    fn identity(&mut self, plugin: &str) -> Result<Identity, Refusal> {
        if !self.privileged {
            return Ok(Identity::Mapped { uid: getuid().as_raw(), gid: getgid().as_raw() });
        }
        if let Some(uid) = self.uids.get(plugin) {
            return Ok(Identity::Own { uid: *uid });
        }
        let given = u32::try_from(self.uids.len()).unwrap_or(u32::MAX);
        let next = self.options.uids.start().checked_add(given).filter(|uid| self.options.uids.contains(uid));
        let Some(uid) = next else {
            return refuse(
                RefusalCode::Exhausted,
                format!(
                    "{plugin} was not started: every uid of --uid-range is taken; widen it and start plugvisord again"
                ),
            );
        };
        self.uids.insert(plugin.to_owned(), uid);
        Ok(Identity::Own { uid })
    }

    /// Refuses a launch that needs a control which this host lacks, unless the operator allows that.
    pub(crate) fn require(&self, request: &Launch) -> Result<(), Refusal> {
        let limits = &request.limits;
        let needed = |control: &Control| match control {
            Control::MemoryLimit => limits.memory_bytes.is_some(),
            Control::CpuLimit => limits.cpu_percent.is_some(),
            Control::PidsLimit => limits.pids.is_some(),
            _ => true,
        };
        // What the other walls rest on cannot be left out by anyone.
        let optional = |control: &Control| {
            matches!(
                control,
                Control::OwnUid | Control::Landlock | Control::MemoryLimit | Control::CpuLimit | Control::PidsLimit
            )
        };
        // Controls that fail for one reason are told together.
        let mut missing: Vec<(Vec<&str>, String)> = Vec::new();
        for control in Control::ALL {
            let allowed = optional(&control) && request.allow_degraded.contains(&control);
            let Some(why) = self.lacking(control).filter(|_| needed(&control) && !allowed) else { continue };
            let reason = format!("{why}; {}", step::fix(control));
            match missing.iter_mut().find(|(_, other)| *other == reason) {
                Some((names, _)) => names.push(control.as_str()),
                None => missing.push((vec![control.as_str()], reason)),
            }
        }
        let missing: Vec<String> =
            missing.into_iter().map(|(names, reason)| format!("{}: {reason}", names.join(", "))).collect();
        if missing.is_empty() {
            return Ok(());
        }
        refuse(
            RefusalCode::ControlUnavailable,
            format!("{} was not started: this host cannot enforce {}", request.plugin, missing.join("; and ")),
        )
    }

    /// Starts a checked launch. On error nothing is left of it.
    pub(crate) fn start(
        &mut self,
        request: &Launch,
        checked: &Checked<'_>,
        arrived: Instant,
    ) -> Result<Running, Refusal> {
        let began = timing::now().saturating_sub(u64::try_from(arrived.elapsed().as_nanos()).unwrap_or(0));
        let mut marks = Marks::default();
        marks.done(Part::Checked);
        let plugin = request.plugin.as_str();
        let identity = self.identity(plugin)?;
        self.last += 1;
        let id = LaunchId(self.last);
        let failed = |doing: &str, error: &io::Error| Refusal {
            code: match error.raw_os_error() {
                Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOSPC | libc::EDQUOT) => {
                    RefusalCode::Exhausted
                }
                _ => RefusalCode::Kernel,
            },
            message: format!("{plugin} was not started: {doing} failed: {error}"),
        };

        let name = format!("{plugin}-{}-{}", request.generation, id.0);
        let mut groups = self.cgroups.create(&name, &self.enforceable(&request.limits)).map_err(|error| Refusal {
            code: RefusalCode::ControlUnavailable,
            message: format!("{plugin} was not started: {} cannot be enforced: {}", error.control, error.why),
        })?;
        marks.done(Part::Groups);
        let result =
            self.fork(request, checked, identity, id, &groups, marks).map_err(|(doing, error)| failed(doing, &error));
        match result {
            Ok(forked) => {
                let memory = forked.memory;
                Ok(Running {
                    id,
                    plugin: plugin.to_owned(),
                    identity,
                    limits: request.limits.clone(),
                    allow_degraded: request.allow_degraded.clone(),
                    arrived,
                    began,
                    marks,
                    init: forked.init,
                    init_pid: forked.init_pid,
                    report: forked.report,
                    report_closed: false,
                    exec: Some(forked.exec),
                    program: None,
                    executing: false,
                    failure: None,
                    ended: None,
                    groups,
                    memory,
                    oom: false,
                    ends: forked.ends,
                    sha256: request.entry_sha256,
                })
            }
            Err(refusal) => {
                groups.remove();
                remove_sockets(id);
                Err(refusal)
            }
        }
    }

    fn fork(
        &self,
        request: &Launch,
        checked: &Checked<'_>,
        identity: Identity,
        id: LaunchId,
        groups: &Groups,
        mut marks: Marks,
    ) -> Result<Forked, (&'static str, io::Error)> {
        let sockets = Sockets::make(id, request.socket, identity).map_err(|error| ("making its sockets", error))?;
        let memory = match request.limits.memory_bytes {
            Some(_) => groups.watch_memory().map_err(|error| ("watching its memory", error))?,
            None => None,
        };
        let sealed = self.sealed.get(&request.entry_sha256);
        // A child that must copy the entry first joins afterwards, so that the copy is not charged to the plugin.
        let opening = |error| ("opening its cgroup", error);
        let born_in = if sealed.is_some() { groups.v2_directory().map_err(opening)? } else { None };
        let joins = groups.joins(born_in.is_some()).map_err(opening)?;
        let pipe = || -> io::Result<(OwnedFd, OwnedFd)> {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
            rustix::io::ioctl_fionbio(&read, true)?;
            if let Identity::Own { uid } = identity {
                // So that the plugin may open /dev/stdout, which opens the pipe anew.
                rustix::fs::fchown(&write, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid)))?;
            }
            Ok((read, write))
        };
        let (stdout, stdout_write) = pipe().map_err(|error| ("making its stdout", error))?;
        let (stderr, stderr_write) = pipe().map_err(|error| ("making its stderr", error))?;
        let (exec, exec_write) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| ("making a pipe", error.into()))?;
        let (report, child_report) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|error| ("making a socket pair", error.into()))?;

        let entry = match sealed {
            Some(entry) => Entry::Sealed(entry),
            None => Entry::Copy { file: checked.entry, name: &checked.title, sha256: &request.entry_sha256 },
        };
        marks.done(Part::Sockets);
        let plan = Plan {
            entry,
            tree: Tree {
                bundle_path: &checked.bundle_path,
                bundle: checked.bundle,
                sockets: id.0.to_string(),
                socket: request.socket,
                temp: request.grants.contains(&Grant::WriteTemp).then_some(TEMP_BYTES),
            },
            cgroups: joins.iter().map(AsFd::as_fd).collect(),
            rlimits: self.rlimits(&request.limits),
            identity,
            launcher: self.pidfd.as_fd(),
            stdout: stdout_write.as_fd(),
            stderr: stderr_write.as_fd(),
            worker: sockets.listener.as_ref().map(AsFd::as_fd),
            exec: exec_write.as_fd(),
            report: child_report.as_fd(),
            landlock: self.landlock,
            filter: self.filters.for_grants(&request.grants),
            argv: &checked.argv,
            envp: &checked.envp,
            marks,
        };
        match kernel::clone3(self.namespaces(), born_in.as_ref().map(AsFd::as_fd))
            .map_err(|error| ("making its namespaces (clone3)", error))?
        {
            Cloned::Child => child::run(&plan),
            Cloned::Parent { pidfd, pid } => Ok(Forked {
                init: pidfd,
                init_pid: pid,
                report,
                exec,
                memory,
                ends: vec![sockets.broker, sockets.worker, stdout, stderr],
            }),
        }
    }

    /// The limits without those that this host lacks, which the operator allowed to be missing.
    fn enforceable(&self, limits: &Limits) -> Limits {
        let here = |control| self.lacking(control).is_none();
        Limits {
            memory_bytes: limits.memory_bytes.filter(|_| here(Control::MemoryLimit)),
            cpu_percent: limits.cpu_percent.filter(|_| here(Control::CpuLimit)),
            ..limits.clone()
        }
    }

    /// The namespaces of PROCESS. The network one is empty, whatever Landlock can do: in the host's, a plugin without any
    /// socket of its own could still read /proc/self/net, ask a Unix socket for the host's addresses (SIOCGIFCONF), and
    /// bind an abstract name that a program of the host connects to. Landlock scopes only what a plugin connects to.
    fn namespaces(&self) -> u64 {
        let mut flags = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWNET;
        if !self.privileged {
            flags |= libc::CLONE_NEWUSER;
        }
        flags.unsigned_abs().into()
    }

    fn rlimits(&self, limits: &Limits) -> Vec<(Resource, u64)> {
        let hard = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
        let files = limits.open_files.map_or(OPEN_FILES.min(hard), u64::from);
        // 1 and not 0: the kernel starts a core handler (`|` in core_pattern) whatever the limit is, except for 1, and
        // no core fits into one byte.
        let mut rlimits = vec![(Resource::Core, CORE_BYTES), (Resource::Nofile, files)];
        if let Some(bytes) = limits.file_size_bytes {
            rlimits.push((Resource::Fsize, bytes));
        }
        if let Some(pids) = limits.pids {
            let with_init = u64::from(pids) + 1;
            // The kernel counts per uid and user namespace. Without privileges that is this launch alone, and holds the
            // limit where there is no cgroup; with them it is every generation of the plugin, and only a backstop.
            rlimits.push((Resource::Nproc, if self.privileged { with_init * 4 } else { with_init }));
        }
        rlimits
    }
}

struct Forked {
    init: OwnedFd,
    init_pid: i32,
    report: OwnedFd,
    exec: OwnedFd,
    memory: Option<MemoryWatch>,
    ends: Vec<OwnedFd>,
}

/// The sockets of a launch, in a directory of its own in the launcher's private one, which is the working directory.
struct Sockets {
    broker: OwnedFd,
    worker: OwnedFd,
    listener: Option<OwnedFd>,
}

impl Sockets {
    fn make(id: LaunchId, mode: SocketMode, identity: Identity) -> io::Result<Self> {
        let directory = PathBuf::from(id.0.to_string());
        fs::DirBuilder::new().mode(0o700).create(&directory)?;
        let broker = listener(&directory.join("broker.sock"), SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        let (path, listener) = match mode {
            SocketMode::Inherit => {
                let path = directory.join("worker.sock");
                // Blocking, as programs expect of what they inherit; whoever wants it otherwise sets it.
                let listener = listener(&path, SocketFlags::CLOEXEC)?;
                (path, Some(listener))
            }
            SocketMode::Bind => {
                let path = directory.join("worker");
                fs::create_dir(&path)?;
                // The plugin binds in it, the supervisor's user connects through its descriptor.
                fs::set_permissions(&path, fs::Permissions::from_mode(0o711))?;
                if let Identity::Own { uid } = identity {
                    std::os::unix::fs::chown(&path, Some(uid), Some(uid))?;
                }
                (path, None)
            }
        };
        let worker = rustix::fs::open(&path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { broker, worker, listener })
    }
}

fn listener(path: &Path, flags: SocketFlags) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    // Who may reach the path is what protects it: nobody but root gets into the directory, and in the plugin's tree
    // only its own sockets are mounted.
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Removes what [`Sockets::make`] made, and what a plugin bound.
pub(crate) fn remove_sockets(id: LaunchId) {
    drop(fs::remove_dir_all(id.0.to_string()));
}

impl Running {
    /// Takes what the child reported. The socket is read until it has no more.
    pub(crate) fn drain(&mut self, sealed: &mut SealedEntries) {
        loop {
            let (message, descriptor) = match report::receive(self.report.as_fd()) {
                Ok(Some(received)) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Ok(None) | Err(_) => {
                    self.report_closed = true;
                    return;
                }
            };
            match message {
                Message::Failed { step, errno } => self.failure = self.failure.or(Some(Failure { step, errno })),
                Message::Sealed => {
                    if let Some(entry) = descriptor {
                        sealed.insert(self.sha256, entry);
                    }
                }
                Message::Started => self.program = descriptor,
                Message::Executing { marks } => {
                    self.executing = true;
                    self.marks = marks;
                }
                Message::Ended { signal: false, value } => self.ended = Some(Exit::Code(value)),
                Message::Ended { signal: true, value } => self.ended = Some(Exit::Signal(value)),
            }
        }
    }

    /// Kills every process: the init's end ends its PID namespace.
    pub(crate) fn kill(&self) {
        self.groups.kill();
        // Fails only when the init is gone already.
        let _ = pidfd_send_signal(&self.init, Signal::KILL);
        // What is frozen does not die; a group that is gone needs no thaw.
        let _ = self.groups.thaw();
    }

    /// The program's number in the launcher's PID namespace.
    pub(crate) fn program_pid(&self) -> Option<i32> {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", self.program.as_ref()?.as_raw_fd())).ok()?;
        info.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse().ok().filter(|pid| *pid > 0)
    }
}
