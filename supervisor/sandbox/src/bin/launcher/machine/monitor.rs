//! The program of a launch at VM, behind the walls: it packs the archive, starts the emulator, and relays.
//!
//! It is the launcher's own program, started with [`MONITOR`]. It has no privileges, and its end is that of the machine: it
//! is the plugin to its init and to the supervisor. A signal for it goes to the plugin in the guest, and it ends as the
//! plugin did.

use std::{
    ffi::{CString, OsString},
    fs::File,
    io::{self, BufWriter, Seek, Write},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::{
            ffi::OsStringExt,
            net::{UnixListener, UnixStream},
            process::ExitStatusExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use plugvisor_sandbox::{
    inward,
    protocol::{EGRESS, MAX_INWARD},
};
use rustix::{
    fs::{MemfdFlags, Mode, memfd_create},
    io::{Errno, FdFlags, fcntl_setfd},
    net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with},
    process::umask,
};
use serde::{Deserialize, Serialize};

use super::{
    Accelerator, EXECUTED, GUEST, PLACE, TOLD,
    archive::{Contents, Node},
    emulator,
    files::{Bounds, Files},
    libraries,
    link::{Frame, Target, VERSION},
    pace::Pace,
    plan::{self, Access, Plan},
    relay::{Broken, Event, IN, Poll, Relay, SETTLE, Side, Socket},
    size::CONFIGURATION,
};
use crate::{
    directories::{Kind, Reach},
    kernel,
    level::Tree,
    mounts::{self, BUNDLE},
};

/// The first argument with which the launcher's program is this one.
pub(crate) const MONITOR: &str = "--machine";

/// Signals that are for the plugin. What ends a monitor otherwise ends the machine.
const FORWARDED: [i32; 5] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGUSR1, libc::SIGUSR2];

/// How it ends when the machine did, and not the plugin: an internal software error, by sysexits.h.
const BROKEN: i32 = 70;

/// What the launcher wants: the second argument, as JSON. The plugin's own arguments follow, and its variables are this
/// process's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Orders {
    pub(crate) emulator: PathBuf,
    pub(crate) accelerator: Accelerator,
    /// The guest's memory.
    pub(crate) guest_bytes: u64,
    /// The most that the archive may have.
    pub(crate) archive_bytes: u64,
    pub(crate) modules: u64,
    pub(crate) libraries: Vec<PathBuf>,
    pub(crate) runtime: Vec<PathBuf>,
    /// Otherwise the plugin binds its worker socket.
    pub(crate) inherits: bool,
    pub(crate) egress: bool,
    /// The ports at which the plugin is connected to.
    pub(crate) listen: Vec<u16>,
    /// The most connections to them at once.
    pub(crate) inward: u16,
    /// Its configuration is copied.
    pub(crate) configuration: bool,
    /// Its data are answered for, and for writing.
    pub(crate) data: Option<Reach>,
    pub(crate) temp: Option<u64>,
    pub(crate) memory: Option<u64>,
    pub(crate) pids: Option<u64>,
    pub(crate) open_files: u64,
    pub(crate) file_size: Option<u64>,
}

/// How the machine ended.
enum End {
    Code(i32),
    Signal(i32),
}

/// Runs it with the arguments after [`MONITOR`]. Does not return.
pub(crate) fn run(mut args: impl Iterator<Item = OsString>) -> ! {
    let orders = args.next().and_then(|text| serde_json::from_str(text.to_str()?).ok());
    // The emulator alone closes it, by its exec; without one it lasts as long as this process, so that a launcher which sees it
    // closed sees this one ending too.
    let mut executed = None;
    let end = match orders {
        Some(orders) => watch(&orders, args.collect(), &mut executed).unwrap_or_else(|(doing, error)| {
            eprintln!("plugvisor: the machine was ended: {doing} failed: {error}");
            End::Code(BROKEN)
        }),
        None => End::Code(64),
    };
    match end {
        End::Code(code) => kernel::exit_now(code),
        End::Signal(number) => kernel::end_by(number),
    }
}

type Step<T> = Result<T, (&'static str, io::Error)>;

fn doing<T, E: Into<io::Error>>(what: &'static str, result: Result<T, E>) -> Step<T> {
    result.map_err(|error| (what, error.into()))
}

fn watch(orders: &Orders, argv: Vec<OsString>, executed: &mut Option<OwnedFd>) -> Step<End> {
    *executed = Some(doing("taking its descriptors", take(EXECUTED))?);
    let told = File::from(doing("taking its descriptors", take(TOLD))?);
    let signals = doing("waiting for signals", kernel::signalfd(&FORWARDED))?;
    let worker = if orders.inherits { Some(doing("taking its worker socket", take(WORKER))?) } else { None };
    let ports = doing("binding its ports", orders.listen.iter().map(|port| Port::bind(*port)).collect())?;
    let pace = Pace::begin();
    let archive = doing("packing its archive", pack(orders, argv))?;
    let khz = pace.khz();
    let (link, its_link) = doing("making a pair of sockets", UnixStream::pair())?;
    doing("making a pair of sockets", link.set_nonblocking(true))?;
    let machine = Machine(doing("starting the emulator", start(orders, khz, &archive, &its_link))?);
    // The emulator alone has them from here on: its end is that of the link.
    drop((archive, its_link));
    drop(executed.take());
    let worker = worker.map(UnixListener::from);
    let relay = Relay::new(Side::Host, link, usize::from(orders.inward), break_off);
    Monitor { machine, relay, worker, ports, deaf: None, launcher: Some(told) }.serve(&signals, orders)
}

/// How long nobody is let in when that failed.
const DEAF: Duration = Duration::from_millis(100);

/// The number under which the launcher leaves the worker socket.
const WORKER: RawFd = 3;

/// Takes a descriptor that the launcher left open under this number, for this process alone.
fn take(number: RawFd) -> io::Result<OwnedFd> {
    kernel::inherited(number)
}

/// Makes the archive, in memory.
fn pack(orders: &Orders, argv: Vec<OsString>) -> io::Result<File> {
    let mut contents = Contents::default();
    contents.put(Path::new("/init"), Node::Init(GUEST));
    // What the first process prints goes there.
    contents.put(Path::new("/dev/console"), Node::Device { major: 5, minor: 1 });
    for number in 0..orders.modules {
        let from = Path::new(PLACE).join((number + 1).to_string());
        contents.put_tree(&from, &Path::new(plan::MODULES).join(number.to_string()))?;
    }
    let texts = |all: Vec<OsString>| -> io::Result<Vec<CString>> {
        all.into_iter().map(|text| CString::new(text.into_vec()).map_err(io::Error::other)).collect()
    };
    let envp = std::env::vars_os().filter(|(name, _)| name != "LISTEN_PID").map(|(mut name, value)| {
        name.push("=");
        name.push(value);
        name
    });
    let plan = Plan {
        argv: texts(argv)?,
        envp: texts(envp.collect())?,
        inherits: orders.inherits,
        egress: orders.egress,
        inward: orders.inward.into(),
        data: orders.data.map(|reach| match reach {
            Reach::Read => Access::Read,
            Reach::Write => Access::Write,
        }),
        modules: orders.modules,
        temp: orders.temp,
        memory: orders.memory,
        pids: orders.pids,
        open_files: orders.open_files,
        file_size: orders.file_size,
    };
    contents.put(Path::new(plan::PATH), Node::Bytes(plan.write()));
    contents.put_tree(Path::new(BUNDLE), Path::new(plan::BUNDLE))?;
    if orders.configuration {
        let place = Path::new(Kind::Config.place());
        contents.put_data(place, place, CONFIGURATION)?;
        for file in contents.files().iter().filter(|file| file.starts_with(place)) {
            File::open(file).map_err(|error| {
                let (user, file) = (rustix::process::geteuid().as_raw(), file.display());
                let why = format!(
                    "{file}: {error}; in its configuration directory on the host, let its user ({user}) read that file \
                     (chmod o+r, or chgrp {user} and chmod g+r)"
                );
                io::Error::new(error.kind(), why)
            })?;
        }
    }
    for path in &orders.runtime {
        // What it names by a link is there by that name, wherever it lies on the host.
        let there = path.canonicalize().unwrap_or_else(|_| path.clone());
        contents.put_tree(&there, path).map_err(|error| {
            io::Error::other(format!("{}, which [vm] runtime of the launcher's policy names: {error}", path.display()))
        })?;
    }
    libraries::complete(&mut contents, &orders.libraries, &libraries::Bounds::default());
    let mut archive = File::from(memfd_create(c"archive", MemfdFlags::CLOEXEC)?);
    let mut writer = BufWriter::with_capacity(1 << 20, &mut archive);
    contents.write(&mut writer, orders.archive_bytes)?;
    writer.flush()?;
    drop(writer);
    archive.rewind()?;
    Ok(archive)
}

/// Executes the emulator. Its standard error and its console are this process's standard error: what a guest's kernel says
/// before its end is told with what the plugin printed.
fn start(orders: &Orders, khz: u64, archive: &File, link: &UnixStream) -> io::Result<Child> {
    for fd in [archive.as_fd(), link.as_fd()] {
        fcntl_setfd(fd, FdFlags::empty())?;
    }
    let console = io::stderr().as_fd().try_clone_to_owned()?;
    let machine = emulator::Machine { accelerator: orders.accelerator, bytes: orders.guest_bytes, khz };
    emulator::command(&orders.emulator, machine, archive.as_raw_fd(), link.as_raw_fd())
        .stdin(Stdio::null())
        .stdout(console)
        .spawn()
}

/// The emulator, which ends with this.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // Our own child; of one that was waited for, this does nothing.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Monitor {
    machine: Machine,
    relay: Relay<UnixStream>,
    worker: Option<UnixListener>,
    ports: Vec<Port>,
    /// Until when nobody is let in.
    deaf: Option<Instant>,
    /// To the launcher, until it was told that the plugin was killed for memory.
    launcher: Option<File>,
}

impl Monitor {
    fn serve(mut self, signals: &OwnedFd, orders: &Orders) -> Step<End> {
        let mut listens = false;
        // Nobody answers for them yet.
        let mut data = orders.data;
        let mut ended: Option<(End, Instant)> = None;
        let mut polls = Vec::new();
        loop {
            // What it said last on its connections, too; of one that nobody takes for some time only.
            let left = ended.as_ref().map(|(_, until)| until.saturating_duration_since(Instant::now()));
            let settled = self.relay.has_passed_on_all() || left == Some(Duration::ZERO);
            if let Some((end, _)) = ended.take_if(|_| settled && self.relay.has_printed_all()) {
                return Ok(end);
            }
            let now = Instant::now();
            self.deaf.take_if(|until| *until <= now);
            polls.clear();
            polls.push(Poll::new(signals, IN));
            let accepts = listens && self.deaf.is_none() && self.relay.has_room(Target::Worker);
            polls.push(match &self.worker {
                Some(worker) if accepts => Poll::new(worker, IN),
                Some(_) | None => Poll { fd: -1, events: 0, found: 0 },
            });
            polls.extend(self.ports.iter().map(|port| {
                let accepts = listens && self.deaf.is_none() && self.relay.has_room(Target::Port(port.number));
                if accepts { Poll::new(&port.listener, IN) } else { Poll { fd: -1, events: 0, found: 0 } }
            }));
            self.relay.interests(&mut polls);
            // The pipes are waited for as long as it takes.
            let deaf = self.deaf.map(|until| until.saturating_duration_since(now));
            let most = [left.filter(|left| !left.is_zero()), self.relay.patience(now), deaf];
            doing("waiting", kernel::wait(&mut polls, most.into_iter().flatten().min()))?;
            let (own, rest) = polls.split_at(2 + self.ports.len());
            let events = match self.relay.turn(rest, |target| connect(target, orders, &mut data)) {
                Ok(events) => events,
                Err(broken) => return Ok(self.broken(&broken)),
            };
            for event in events {
                match event {
                    Event::Hello { version: VERSION } if !listens => {
                        listens = true;
                        if self.worker.is_none() {
                            self.worker = Some(doing("binding its worker socket", bind())?);
                        }
                        if let Some(worker) = &self.worker {
                            doing("listening", worker.set_nonblocking(true))?;
                        }
                        doing("listening", self.ports.iter().try_for_each(Port::listen))?;
                    }
                    Event::OutOfMemory => self.out_of_memory(),
                    Event::Ended { signal: false, value } => {
                        ended = Some((End::Code(value & 0xff), Instant::now() + SETTLE));
                    }
                    Event::Ended { signal: true, value } if ends(value) => {
                        ended = Some((End::Signal(value), Instant::now() + SETTLE));
                    }
                    Event::Hello { .. } | Event::Signal { .. } | Event::Ended { .. } => {
                        let what = "a second greeting, another version's, or an end by a signal that ends nothing";
                        return Ok(self.broken(&Broken::Unexpected(what)));
                    }
                }
            }
            if ended.is_some() {
                // Refused from here on, as where a plugin has ended: who connects waits for the next one.
                self.ports.clear();
            }
            if own[0].is_readable() {
                for number in kernel::signals_of(signals) {
                    self.relay.tell(Frame::Signal { number });
                }
            }
            if let Some(worker) = self.worker.as_ref().filter(|_| own[1].is_readable()) {
                match worker.accept() {
                    Ok((socket, _)) => drop(self.relay.begin(Target::Worker, Socket::Unix(socket))),
                    Err(error) => self.deaf = deaf_after(&error).or(self.deaf),
                }
            }
            for (port, _) in self.ports.iter().zip(&own[2..]).filter(|(_, poll)| poll.is_readable()) {
                let target = Target::Port(port.number);
                // The place that there was may have been another port's.
                if !self.relay.has_room(target) {
                    continue;
                }
                match port.listener.accept() {
                    Ok((socket, _)) => drop(self.relay.begin(target, Socket::Tcp(socket))),
                    Err(error) => self.deaf = deaf_after(&error).or(self.deaf),
                }
            }
        }
    }

    /// Told once, however often a guest says so: it is a guest's word, and the cause of that plugin's own end.
    fn out_of_memory(&mut self) {
        let Some(mut launcher) = self.launcher.take() else { return };
        // A launcher that is gone asks nothing.
        let _ = launcher.write_all(&[1]);
        say("the kernel of its machine killed the plugin for memory; raise maxMemory, or make it use less");
    }

    /// The machine is of no more use. How that is told.
    fn broken(&mut self, broken: &Broken) -> End {
        let why = match broken {
            Broken::Gone => match self.machine.0.wait().map(|status| (status.code(), status.signal())) {
                Ok((Some(0), _)) => {
                    "its kernel ended without saying how the plugin did; what it said last is above".to_owned()
                }
                Ok((_, Some(signal))) => format!("the emulator was killed by signal {signal}"),
                Ok((code, None)) => format!("the emulator ended with {}", code.unwrap_or_default()),
                Err(error) => format!("the emulator cannot be waited for: {error}"),
            },
            Broken::Link(error) => format!("its port cannot be used: {error}"),
            Broken::Malformed(what) => format!("its guest sent what is no message: {what:?}"),
            Broken::Unexpected(what) => format!("its guest sent {what}"),
        };
        say(&format!("the machine was ended: {why}"));
        End::Code(BROKEN)
    }
}

/// Until when nobody is let in after this came of letting somebody in; `None` after who gave up meanwhile. With no descriptor or
/// no memory left the listener stays readable, and poll would find it so again at once.
pub(super) fn deaf_after(error: &io::Error) -> Option<Instant> {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => None,
        _ => Some(Instant::now() + DEAF),
    }
}

/// A port at which the plugin is connected to, in this network namespace: the supervisor connects there as at other levels,
/// and nobody else is in it.
struct Port {
    number: u16,
    /// Nobody is let in before the guest is there.
    listener: TcpListener,
}

impl Port {
    fn bind(number: u16) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
        // What is accepted has its buffers, which then do not grow: they are in the machine's memory, see `Size`.
        inward::bound_buffers(&socket)?;
        net::bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, number))?;
        Ok(Self { number, listener: socket.into() })
    }

    fn listen(&self) -> io::Result<()> {
        Ok(net::listen(&self.listener, MAX_INWARD.into())?)
    }
}

/// Has the other end told by a reset when this one is closed.
pub(super) fn break_off(socket: &TcpStream) {
    // One that it fails for is closed without.
    let _ = net::sockopt::set_socket_linger(socket, Some(Duration::ZERO));
}

/// Whether a program ends by this signal when it does nothing about it (signal(7)); this one will.
fn ends(signal: i32) -> bool {
    const OTHERS: [i32; 8] = [
        libc::SIGCHLD,
        libc::SIGCONT,
        libc::SIGSTOP,
        libc::SIGTSTP,
        libc::SIGTTIN,
        libc::SIGTTOU,
        libc::SIGURG,
        libc::SIGWINCH,
    ];
    (1..=libc::SIGRTMAX()).contains(&signal) && !OTHERS.contains(&signal)
}

/// For the plugin's log. Its pipe does not block once the emulator has it too, and is full when a guest floods it: then
/// nobody reads this either, and nothing else ends for it.
fn say(what: &str) {
    let _ = writeln!(io::stderr(), "plugvisor: {what}");
}

/// Where a plugin that binds its worker socket does so at other levels.
fn bind() -> io::Result<UnixListener> {
    UnixListener::bind(mounts::worker(Tree::Own, plugvisor_sandbox::protocol::SocketMode::Bind))
}

/// To a listener at this path. Where no more may wait to be accepted, it fails at once.
pub(super) fn reach(path: &Path) -> io::Result<Socket> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(Socket::Unix(socket.into()))
}

/// For the guest: to what a plugin of any level reaches. Never waits: nobody may accept there for as long as a supervisor is
/// away, and the plugin's own connections would wait with it.
fn connect(target: Target, orders: &Orders, data: &mut Option<Reach>) -> io::Result<Socket> {
    match target {
        Target::Broker => reach(Path::new(&mounts::broker(Tree::Own))),
        Target::Egress if orders.egress => {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
            match net::connect(&socket, &EGRESS) {
                // Until it is, nothing can be read or written, and poll says neither.
                Ok(()) | Err(Errno::INPROGRESS) => Ok(Socket::Tcp(socket.into())),
                Err(errno) => Err(errno.into()),
            }
        }
        Target::Stdout => io::stdout().as_fd().try_clone_to_owned().map(|end| Socket::Pipe(end.into())),
        Target::Stderr => io::stderr().as_fd().try_clone_to_owned().map(|end| Socket::Pipe(end.into())),
        // Once: each is a thread, and one that waits for a disk would outlive its connection.
        Target::Files if data.take().is_some() => files(orders.file_size),
        Target::Egress | Target::Files | Target::Worker | Target::Port(_) => {
            Err(io::ErrorKind::PermissionDenied.into())
        }
    }
}

/// Who answers for the plugin's data, in a thread of its own: a disk may take its time.
fn files(file_size: Option<u64>) -> io::Result<Socket> {
    // What a plugin makes has the mode that it asked for: its guest has taken off what its mask says.
    umask(Mode::empty());
    let files = Files::open(Path::new(Kind::Data.place()), Bounds { file_size }, plan::USER)?;
    let (near, far) = UnixStream::pair()?;
    thread::Builder::new().name("files".to_owned()).spawn(move || {
        if let Err(error) = files.serve(far)
            && error.kind() == io::ErrorKind::InvalidData
        {
            say("what its machine asks of its data is no request, and is not answered any more");
        }
    })?;
    Ok(Socket::Unix(near))
}
