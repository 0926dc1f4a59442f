//! The first process of a guest: makes the world that a plugin knows from the other levels, starts the plugin, and relays
//! its connections to the host over one virtio-serial port.
//!
//! It is built by itself, static and without any crate (`build.rs` of `plugvisor-sandbox`), and lies in the launcher. It is
//! the guest's only process that is root. Nothing on the host rests on it: whoever takes over a guest says over the port
//! whatever it likes, and the host takes it for that.
//!
//! ```text
//! plugin ── /run/plugvisor/broker.sock ──▶ ┐
//! plugin ── 127.0.0.1:3128 ──────────────▶ ├─ frames ── /dev/vport0p1 ── host
//! plugin ◀─ /run/plugvisor/worker.sock ─── ┤
//! plugin ◀─ 127.0.0.1, its own ports ───── ┤
//! plugin ── /plugvisor/data ─────────────▶ ┘
//! ```

mod files;
#[allow(dead_code, reason = "each side uses its half")]
mod link;
#[allow(dead_code, reason = "each side uses its half")]
mod plan;
#[allow(dead_code, reason = "each side uses its half")]
mod relay;
#[allow(unsafe_code, reason = "raw system calls, one operation per block, each with its reasons")]
mod system;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Read},
    net::TcpListener,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            fs::{OpenOptionsExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::Path,
    time::{Duration, Instant},
};

use self::{
    files::Files,
    link::{Frame, Target, VERSION},
    plan::{Access, Plan, USER},
    relay::{BUFFER, Broken, Event, IN, Poll, Relay, SETTLE, Side, Socket},
    system::{NO_DEVICES, NO_EXEC, NO_SUID},
};

/// The first port of the first controller, after the one that is reserved for a console.
const PORT: &str = "/dev/vport0p1";

/// Its cgroup.
const GROUP: &str = "/sys/fs/cgroup/plugin";

/// Do not wait, in flags of open(2).
const NOT_WAITING: i32 = 0o4000;

fn main() {
    if let Err((doing, error)) = run() {
        // To the console, which the host shows with what the plugin prints.
        eprintln!("plugvisor: the guest ends: {doing}: {error}");
    }
    system::power_off()
}

type Step<T> = Result<T, (&'static str, io::Error)>;

fn doing<T>(what: &'static str, result: io::Result<T>) -> Step<T> {
    result.map_err(|error| (what, error))
}

fn run() -> Step<()> {
    doing("mounting its file systems", mount_all())?;
    let plan = doing("reading its plan", fs::read(Path::new("/").join(plan::PATH)))?;
    let plan = Plan::read(&plan).ok_or(("reading its plan", ErrorKind::InvalidData.into()))?;
    doing("loading its modules", load_modules(plan.modules))?;
    doing("closing a device", files::close_device())?;
    doing("removing its plan", fs::remove_file(Path::new("/").join(plan::PATH)))?;
    doing("raising its loopback interface", system::raise_loopback())?;
    if let Some(size) = plan.temp {
        let limits = std::ffi::CString::new(format!("size={size},nr_inodes=16384,mode=1777"));
        let limits = limits.map_err(|_| ("mounting its /tmp", ErrorKind::InvalidInput.into()))?;
        doing("mounting its /tmp", system::mounted(c"tmpfs", c"/tmp", NO_SUID | NO_DEVICES | NO_EXEC, &limits))?;
    }
    doing("setting its limits", limit(&plan))?;
    let port = doing("opening its port", port())?;
    let children = doing("waiting for its children", system::children())?;
    let mut guest = doing("making its sockets", Guest::new(&plan, port))?;
    guest.relay.tell(Frame::Hello { version: VERSION });
    let data = match plan.data {
        Some(access) => Some(doing(
            "mounting its data, for which its kernel needs FUSE (fuse.ko in [vm] modules)",
            guest.mount(access),
        )?),
        None => None,
    };
    let plugin = doing("starting the plugin", guest.start(&plan))?;
    // Only now: a process with several threads must not fork. What the plugin asks for meanwhile waits.
    doing("answering for its data", data.map_or(Ok(()), Files::serve))?;
    match guest.serve(&children, plugin) {
        // The host ended it.
        Ok(()) | Err(Broken::Gone) => Ok(()),
        Err(Broken::Link(error)) => Err(("relaying", error)),
        Err(Broken::Malformed(_) | Broken::Unexpected(_)) => Err(("relaying", ErrorKind::InvalidData.into())),
    }
}

fn mount_all() -> io::Result<()> {
    for directory in ["/proc", "/sys", "/dev", "/tmp", "/run"] {
        match fs::create_dir(directory) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    let harmless = NO_SUID | NO_DEVICES | NO_EXEC;
    system::mounted(c"devtmpfs", c"/dev", NO_SUID | NO_EXEC, c"mode=0755")?;
    system::mounted(c"proc", c"/proc", harmless, c"hidepid=2")?;
    system::mounted(c"sysfs", c"/sys", harmless, c"")?;
    system::mounted(c"cgroup2", c"/sys/fs/cgroup", harmless, c"")?;
    system::mounted(c"tmpfs", c"/run", harmless, c"size=1m,nr_inodes=64,mode=0755")?;
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        std::os::unix::fs::symlink(target, Path::new("/dev").join(name))?;
    }
    Ok(())
}

/// Those that the host put into the archive.
fn load_modules(count: u64) -> io::Result<()> {
    for number in 0..count {
        let path = Path::new("/").join(plan::MODULES).join(number.to_string());
        match system::load_module(&File::open(&path)?) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
            _ => fs::remove_file(path)?,
        }
    }
    Ok(())
}

/// The limits of the plugin alone. What the whole guest may use is the host's.
fn limit(plan: &Plan) -> io::Result<()> {
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory +pids")?;
    // A guest has little more memory than its plugin may use, and runtimes reserve more than they use: as on a larger host
    // that is granted, and what is used is held.
    fs::write("/proc/sys/vm/overcommit_memory", "1")?;
    // As in the network namespaces of other levels: what lies in the buffers of its connections counts for the plugin.
    fs::write("/proc/sys/net/ipv4/tcp_rmem", format!("4096 {0} {0}", 2 * BUFFER))?;
    fs::write("/proc/sys/net/ipv4/tcp_wmem", format!("4096 16384 {}", 2 * BUFFER))?;
    fs::create_dir(GROUP)?;
    let group = Path::new(GROUP);
    if let Some(memory) = plan.memory {
        fs::write(group.join("memory.max"), memory.to_string())?;
        fs::write(group.join("memory.oom.group"), "1")?;
    }
    if let Some(pids) = plan.pids {
        fs::write(group.join("pids.max"), pids.to_string())?;
    }
    Ok(())
}

/// The port, when the kernel has found it.
fn port() -> io::Result<File> {
    /// No such device: its node is there, and the port behind it not quite.
    const NOT_YET: i32 = 6;
    let mut made = system::watch(c"/dev")?;
    loop {
        match OpenOptions::new().read(true).write(true).custom_flags(NOT_WAITING).open(PORT) {
            // Which file it was does not matter.
            Err(error) if error.kind() == ErrorKind::NotFound => drop(made.read(&mut [0; 4096])?),
            // The kernel makes the node first and tells nobody when it has the port: a moment later (`add_port`).
            Err(error) if error.raw_os_error() == Some(NOT_YET) => std::thread::sleep(Duration::from_millis(1)),
            other => return other,
        }
    }
}

/// What is relayed.
struct Guest {
    relay: Relay<File>,
    broker: UnixListener,
    egress: Option<TcpListener>,
    worker: Option<UnixListener>,
}

impl Guest {
    fn new(plan: &Plan, port: File) -> io::Result<Self> {
        let sockets = Path::new(plan::SOCKETS);
        fs::create_dir(sockets)?;
        let listener = |path: &Path| {
            let listener = UnixListener::bind(path)?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
            Ok::<_, io::Error>(listener)
        };
        let broker = listener(&sockets.join("broker.sock"))?;
        broker.set_nonblocking(true)?;
        let worker = if plan.inherits {
            Some(listener(&sockets.join("worker.sock"))?)
        } else {
            let directory = sockets.join("worker");
            fs::create_dir(&directory)?;
            std::os::unix::fs::chown(&directory, Some(USER), Some(USER))?;
            None
        };
        let egress = match plan.egress {
            true => {
                let egress = TcpListener::bind(("127.0.0.1", 3128))?;
                egress.set_nonblocking(true)?;
                Some(egress)
            }
            false => None,
        };
        let ports = usize::try_from(plan.inward).unwrap_or(0);
        let relay = Relay::new(Side::Guest, port, ports, system::break_off);
        Ok(Self { relay, broker, egress, worker })
    }

    /// Mounts the plugin's data.
    fn mount(&mut self, access: Access) -> io::Result<Files> {
        let (files, connection) = files::mount(access)?;
        self.relay.begin(Target::Files, Socket::Unix(connection))?;
        Ok(files)
    }

    /// Starts the plugin with its output on the link.
    fn start(&mut self, plan: &Plan) -> io::Result<i32> {
        let ((stdout, its_stdout), (stderr, its_stderr)) = (io::pipe()?, io::pipe()?);
        // So that it may open /dev/stdout, which opens the pipe anew.
        for end in [&its_stdout, &its_stderr] {
            std::os::unix::fs::fchown(end, Some(USER), Some(USER))?;
        }
        let null = File::open("/dev/null")?;
        let pid = system::start(&system::Program {
            argv: &plan.argv,
            envp: &plan.envp,
            user: USER,
            open_files: plan.open_files,
            file_size: plan.file_size,
            stdin: null.as_raw_fd(),
            stdout: its_stdout.as_raw_fd(),
            stderr: its_stderr.as_raw_fd(),
            worker: self.worker.as_ref().map(AsRawFd::as_raw_fd),
            directory: plan::BUNDLE,
            group: &format!("{GROUP}/cgroup.procs"),
        })?;
        self.relay.begin(Target::Stdout, Socket::Pipe(File::from(OwnedFd::from(stdout))))?;
        self.relay.begin(Target::Stderr, Socket::Pipe(File::from(OwnedFd::from(stderr))))?;
        // The plugin alone has it from here on: when it ends, nobody listens.
        self.worker = None;
        Ok(pid)
    }

    /// Relays until the plugin has ended and the host was told.
    fn serve(&mut self, children: &OwnedFd, plugin: i32) -> Result<(), Broken> {
        let mut ended: Option<(Frame<'static>, Instant)> = None;
        let mut polls = Vec::new();
        loop {
            // What it said last on its connections, too; of one that nobody takes for some time only.
            let left = ended.map(|(_, until)| until.saturating_duration_since(Instant::now()));
            if let Some((last, _)) = ended
                && self.relay.has_said_all()
                && (self.relay.has_heard_all() || left == Some(Duration::ZERO))
            {
                self.relay.tell(last);
                return self.told(&mut polls);
            }
            polls.clear();
            polls.push(Poll::new(children, IN));
            let accepts = if self.relay.has_room(Target::Broker) { IN } else { 0 };
            polls.push(Poll::new(&self.broker, accepts));
            polls.push(self.egress.as_ref().map_or(Poll { fd: -1, events: 0, found: 0 }, |it| Poll::new(it, accepts)));
            self.relay.interests(&mut polls);
            // The pipes are waited for as long as it takes.
            let most = [left.filter(|left| !left.is_zero()), self.relay.patience(Instant::now())];
            system::wait(&mut polls, most.into_iter().flatten().min()).map_err(Broken::Link)?;
            let (own, rest) = polls.split_at(3);
            for event in self.relay.turn(rest, connect)? {
                if let Event::Signal { number } = event {
                    system::send_signal(plugin, number.try_into().unwrap_or(0));
                }
            }
            if own[1].is_readable() {
                accept(&mut self.relay, Target::Broker, || {
                    self.broker.accept().map(|(socket, _)| Socket::Unix(socket))
                });
            }
            if let Some(egress) = self.egress.as_ref().filter(|_| own[2].is_readable()) {
                accept(&mut self.relay, Target::Egress, || egress.accept().map(|(socket, _)| Socket::Tcp(socket)));
            }
            if own[0].is_readable()
                && let Some(frame) = self.reap(children, plugin)
            {
                ended = Some((frame, Instant::now() + SETTLE));
            }
        }
    }

    /// Waits until all that was told has left.
    fn told(&mut self, polls: &mut Vec<Poll>) -> Result<(), Broken> {
        while !self.relay.has_said_all() {
            polls.clear();
            self.relay.interests(polls);
            system::wait(polls, None).map_err(Broken::Link)?;
            self.relay.turn(polls, connect)?;
        }
        // The host ends the machine; what is under way in it goes with it. Until then there is nothing to do but to wait.
        loop {
            polls.clear();
            self.relay.interests(polls);
            system::wait(polls, None).map_err(Broken::Link)?;
            self.relay.turn(polls, connect)?;
        }
    }

    /// Reaps whoever has ended; how the plugin did, if it was among them. What it left behind ends with it.
    fn reap(&mut self, children: &OwnedFd, plugin: i32) -> Option<Frame<'static>> {
        let mut signals = children.try_clone().map(File::from).ok()?;
        // What it says is only that somebody ended.
        while matches!(signals.read(&mut [0; 128]), Ok(128)) {}
        let mut ended = None;
        while let Some((pid, signal, value)) = system::reap() {
            if pid == plugin {
                ended = Some(Frame::Ended { signal, value });
            }
        }
        if ended.is_some() {
            if was_out_of_memory() {
                self.relay.tell(Frame::OutOfMemory);
            }
            system::send_signal(-1, 9);
        }
        ended
    }
}

/// Takes one connection and gives it to the relay.
fn accept(relay: &mut Relay<File>, target: Target, accept: impl FnOnce() -> io::Result<Socket>) {
    // One that was given up meanwhile, or for which there is no descriptor left: its peer sees it closed.
    if let Ok(socket) = accept() {
        drop(relay.begin(target, socket));
    }
}

/// For the host: to a port at which the plugin listens, or to its worker socket, which it inherited or has bound.
fn connect(target: Target) -> io::Result<Socket> {
    if let Target::Port(port) = target {
        return system::connect_inside(port).map(Socket::Tcp);
    }
    let inherited = UnixStream::connect(Path::new(plan::SOCKETS).join("worker.sock"));
    let socket = match inherited {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            UnixStream::connect(Path::new(plan::SOCKETS).join("worker/worker.sock"))
        }
        other => other,
    };
    socket.map(Socket::Unix)
}

/// Whether the kernel killed for the plugin's memory.
fn was_out_of_memory() -> bool {
    let events = fs::read_to_string(Path::new(GROUP).join("memory.events")).unwrap_or_default();
    let killed = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
    killed.is_some_and(|count| count.trim() != "0")
}
