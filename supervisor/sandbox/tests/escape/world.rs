//! What the attempts are made against, and how one is made: a launcher, and victims that the suite started itself.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufRead, BufReader, Write},
    net::{TcpListener, UdpSocket},
    os::{
        fd::{AsFd, AsRawFd},
        linux::net::SocketAddrExt,
        unix::{
            fs::{PermissionsExt, chown},
            net::{SocketAddr, UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use plugvisor_sandbox::protocol::{Control, Exit, Grant, Level, Limits};

use super::{
    guest::Guest,
    harness::{As, Harness, ORDINARY, Plugin, is_root, read_all},
    table::{Outside, Row},
};

/// Everything around the attempts of one lane.
pub(crate) struct World {
    pub(crate) harness: Harness,
    pub(crate) lane: As,
    without: Vec<Control>,
    machine: Option<Guest>,
    victim: Victim,
    sibling: Plugin,
    /// Of the plugin that attempts.
    generation: Plugin,
    tcp: TcpListener,
    udp: UdpSocket,
    socket: UnixListener,
    abstract_name: String,
    abstract_socket: UnixListener,
    group: Option<PathBuf>,
    /// The bundle that was swapped last.
    pub(crate) swapped: PathBuf,
    /// Inherited by whatever is started here: what a careless parent leaves open.
    _leak: File,
}

/// A process of the supervisor's user.
struct Victim {
    process: Child,
    address: String,
    key: i64,
}

impl Drop for Victim {
    fn drop(&mut self) {
        // Its input ends with this, and it removes what it made.
        drop(self.process.stdin.take());
        drop(self.process.wait());
    }
}

impl World {
    pub(crate) fn start(lane: As, without: &[Control], number: i64) -> Self {
        Self::around(lane, without, None, number)
    }

    /// One whose launcher has machines with this kernel.
    pub(crate) fn start_with_machines(lane: As, machine: &Guest, number: i64) -> Self {
        Self::around(lane, &[], Some(machine.clone()), number)
    }

    fn around(lane: As, without: &[Control], machine: Option<Guest>, number: i64) -> Self {
        let leak = File::open("/").expect("a directory");
        rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).expect("to be inherited");
        let mut harness = launcher(lane, without, machine.as_ref());
        let owner = (lane == As::Ordinary && is_root()).then_some(ORDINARY);
        let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
        let key = harness.path("key");
        fs::write(&key, "of the supervisor").expect("a key");
        mode(&key, 0o600);
        chown(&key, owner, owner).expect("chown");
        let scratch = harness.path("scratch");
        fs::create_dir(&scratch).expect("a directory");
        mode(&scratch, 0o1777);
        let program = harness.path("bundles/walled/bin/walled");
        let set_uid = harness.path("set-uid");
        fs::copy(&program, &set_uid).expect("a copy");
        mode(&set_uid, 0o4755);

        let socket = harness.path("service.sock");
        let listener = UnixListener::bind(&socket).expect("a service");
        mode(&socket, 0o666);
        let abstract_name = format!("plugvisor-escape-{}-{number}", std::process::id());
        let address = SocketAddr::from_abstract_name(&abstract_name).expect("a name");
        let group = is_root().then(|| own_group(number)).flatten();
        let victim = Victim::start(&program, owner, number);
        let mut bystander = |plugin: &str| {
            let mut request = harness.request_at(Level::Process, &["pause"]);
            request.plugin = plugin.to_owned();
            request.grants = vec![Grant::WriteData];
            harness.launch(request)
        };
        let (sibling, generation) = (bystander("walled-sibling"), bystander("walled"));
        Self {
            lane,
            without: without.to_vec(),
            machine,
            victim,
            sibling,
            generation,
            tcp: silent(TcpListener::bind("127.0.0.1:0"), TcpListener::set_nonblocking),
            udp: silent(UdpSocket::bind("127.0.0.1:0"), UdpSocket::set_nonblocking),
            socket: silent(Ok(listener), UnixListener::set_nonblocking),
            abstract_socket: silent(UnixListener::bind_addr(&address), UnixListener::set_nonblocking),
            abstract_name,
            group,
            swapped: PathBuf::new(),
            harness,
            _leak: leak,
        }
    }

    /// How an attempt from inside ends.
    pub(crate) fn attempt(&mut self, row: &Row, level: Level) -> String {
        let mut plugin = match self.launch(row, level, &row.words(level)) {
            Ok(plugin) => plugin,
            Err(refused) => return refused,
        };
        let text = read_all(&mut plugin.stdout);
        let errors = read_all(&mut plugin.stderr);
        match self.harness.exit_of(plugin.launched.launch) {
            (Exit::Code(0), _) => last_told(&text),
            (Exit::Code(code), _) => format!("it ended with {code}: {errors}"),
            (Exit::Signal(number), false) => signal(number),
            (Exit::Signal(number), true) => format!("{} for memory", signal(number)),
        }
    }

    /// A launch for this row at this level, which is told to do this; else the refusal. A limit that the host lacks is not
    /// allowed to be missing.
    pub(crate) fn launch(&mut self, row: &Row, level: Level, words: &[&str]) -> Result<Plugin, String> {
        self.launch_with(level, row.grants(level), row.limits(level, &self.without), words)
    }

    pub(crate) fn launch_with(
        &mut self,
        level: Level,
        grants: Vec<Grant>,
        limits: Limits,
        words: &[&str],
    ) -> Result<Plugin, String> {
        let mut request = self.harness.request_at(level, &["obey"]);
        (request.grants, request.limits) = (grants, limits);
        request.allow_degraded.retain(|control| !matches!(control, Control::MemoryLimit | Control::CpuLimit));
        let plugin = self.harness.try_launch(request).map_err(|refusal| format!("{:?}", refusal.code))?;
        let words: Vec<String> = words.iter().map(|word| self.fill_one(word, level)).collect();
        let path = format!("/proc/self/fd/{}", plugin.worker.as_raw_fd());
        // The end of the connection is the end of what it is told.
        let told = UnixStream::connect(path).and_then(|mut worker| worker.write_all(words.join("\n").as_bytes()));
        told.expect("it is told");
        Ok(plugin)
    }

    /// Another launcher like this one.
    pub(crate) fn another(&self, without: &[Control]) -> Harness {
        launcher(self.lane, without, self.machine.as_ref())
    }

    /// What of the host an attempt might change, as it is now. What is waited for by nobody is taken in passing: a connection
    /// or datagram that came is seen once.
    pub(crate) fn host(&self) -> BTreeMap<&'static str, String> {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_else(|error| error.to_string());
        let file = |path: &Path| {
            let found =
                fs::metadata(path).map(|found| (found.len(), found.permissions().mode(), found.modified().ok()));
            format!(
                "{found:?} {:?}",
                fs::read(path).map(|bytes| bytes.iter().map(|byte| u64::from(*byte)).sum::<u64>())
            )
        };
        let names = |path: &Path| {
            let mut names: Vec<_> =
                fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
            names.sort();
            format!("{names:?}")
        };
        // Its name and state, its nice value, and its limits.
        let process = |pid: u32| {
            let stat = text(&format!("/proc/{pid}/stat"));
            let fields: Vec<&str> = stat.split_whitespace().collect();
            let of = |at: usize| fields.get(at).copied().unwrap_or("gone");
            format!("{} {} {} {}", of(1), of(2), of(18), text(&format!("/proc/{pid}/limits")))
        };
        let came = |came: io::Result<()>| match came {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => "nobody came".to_owned(),
            other => format!("{other:?}"),
        };
        let keys = text("/proc/keys").lines().filter(|line| line.contains("plugvisor-escape")).count();
        let memory = text("/proc/sysvipc/shm");
        let memory = memory.lines().find(|line| line.split_whitespace().next() == Some(&self.victim.key.to_string()));
        // Without the times of its last uses.
        let memory = memory.map(|line| line.split_whitespace().take(11).collect::<Vec<_>>().join(" "));
        BTreeMap::from([
            ("the key", file(&self.harness.path("key"))),
            ("the set-uid program", file(&self.harness.path("set-uid"))),
            ("the bundle's program", file(&self.harness.path("bundles/walled/bin/walled"))),
            ("the writable directory", names(&self.harness.path("scratch"))),
            ("the data of plugins", names(&self.harness.path("data"))),
            ("the directory of everything", names(&self.harness.path(""))),
            ("the supervisor's process", process(self.victim.process.id())),
            ("the launcher", process(self.harness.process.id())),
            ("the sibling", process(self.sibling.launched.pid)),
            ("the other generation", process(self.generation.launched.pid)),
            ("core_pattern", text("/proc/sys/kernel/core_pattern")),
            ("the host's name", text("/proc/sys/kernel/hostname")),
            (
                "the group",
                self.group
                    .as_ref()
                    .map_or_else(String::new, |group| text(&group.join("cgroup.procs").display().to_string())),
            ),
            ("keys", keys.to_string()),
            ("the shared memory", format!("{memory:?}")),
            ("the TCP listener", came(self.tcp.accept().map(drop))),
            ("the UDP socket", came(self.udp.recv(&mut [0; 16]).map(drop))),
            ("the service", came(self.socket.accept().map(drop))),
            ("the abstract socket", came(self.abstract_socket.accept().map(drop))),
        ])
    }

    /// How it ends without any wall, as the user who runs the suite.
    pub(crate) fn outside(&self, row: &Row, outside: &Outside) -> String {
        let probe = outside.probe.as_ref().unwrap_or(&row.probe);
        let words = self.fill(&[outside.before.as_slice(), probe].concat(), Level::None);
        let program = self.harness.path("bundles/walled/bin/walled");
        let output = Command::new(program).args(&words).stdin(Stdio::null()).output().expect("it starts");
        let text = String::from_utf8_lossy(&output.stdout);
        if output.status.success() { last_told(&text) } else { format!("{}: {text}", output.status) }
    }

    /// Puts what the words name in its place.
    fn fill(&self, words: &[String], level: Level) -> Vec<String> {
        words.iter().map(|word| self.fill_one(word, level)).collect()
    }

    fn fill_one(&self, word: &str, level: Level) -> String {
        let mut filled = word.to_owned();
        while let Some((before, rest)) = filled.split_once('{') {
            let (name, after) = rest.split_once('}').unwrap_or_else(|| panic!("{word:?} is not closed"));
            filled = format!("{before}{}{after}", self.named(name, level));
        }
        filled
    }

    fn named(&self, name: &str, level: Level) -> String {
        let path = |inside: &str| self.harness.path(inside).display().to_string();
        let own_tree = level != Level::None;
        match name {
            "secret" => path("key"),
            "temp" | "memory-files" if own_tree => "/tmp".to_owned(),
            "scratch" | "temp" => path("scratch"),
            "memory-files" => "/dev/shm".to_owned(),
            "data" => path("data"),
            "set-uid" => path("set-uid"),
            "socket" => path("service.sock"),
            "run" => path("run"),
            "victim" => self.victim.process.id().to_string(),
            "address" => self.victim.address.clone(),
            "shm" => self.victim.key.to_string(),
            "launcher" => self.harness.process.id().to_string(),
            "sibling" => self.sibling.launched.pid.to_string(),
            "sibling-launch" => self.sibling.launched.launch.0.to_string(),
            "generation" => self.generation.launched.pid.to_string(),
            "abstract" => self.abstract_name.clone(),
            "tcp" => self.tcp.local_addr().expect("its address").port().to_string(),
            "udp" => self.udp.local_addr().expect("its address").port().to_string(),
            "group" => self.group.clone().unwrap_or_else(foreign_group).join("cgroup.procs").display().to_string(),
            "release-agent" => release_agent(),
            "cgroup-root" => self.harness.cgroup.clone(),
            "host-name" => fs::read_to_string("/proc/sys/kernel/hostname").expect("a name").trim().to_owned(),
            "nr:ptrace" => libc::SYS_ptrace.to_string(),
            "nr:socket" => libc::SYS_socket.to_string(),
            "nr:unshare" => libc::SYS_unshare.to_string(),
            "nr:userfaultfd" => libc::SYS_userfaultfd.to_string(),
            "nr:mmap" => libc::SYS_mmap.to_string(),
            other => panic!("{{{other}}} is not known"),
        }
    }
}

fn launcher(lane: As, without: &[Control], machine: Option<&Guest>) -> Harness {
    match machine {
        Some(machine) => Harness::start_trusting_with_machines(lane, |place| machine.settings(place)),
        None => Harness::start_trusting_without(lane, without),
    }
}

/// A socket at which nobody waits.
fn silent<T>(socket: io::Result<T>, set: impl FnOnce(&T, bool) -> io::Result<()>) -> T {
    socket.and_then(|socket| set(&socket, true).map(|()| socket)).expect("a socket")
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(group) = &self.group {
            drop(fs::remove_dir(group));
        }
    }
}

impl Victim {
    fn start(program: &Path, owner: Option<u32>, number: i64) -> Self {
        // A key that nobody else has, for as long as this process lives.
        let key = 0x5056_0000_0000_i64.wrapping_add(i64::from(std::process::id()) * 64 + number) & 0x7fff_ffff;
        let mut command = Command::new(program);
        command.args(["victim", &key.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        if let Some(owner) = owner {
            command.uid(owner).gid(owner);
        }
        let mut process = command.spawn().expect("the victim starts");
        let mut line = String::new();
        BufReader::new(process.stdout.take().expect("its output")).read_line(&mut line).expect("a line");
        let words: Vec<&str> = line.split_whitespace().collect();
        assert!(matches!(*words, ["victim", _, "true"]), "{line}");
        Self { process, address: words[1].to_owned(), key }
    }
}

const HIERARCHIES: [&str; 3] = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup/pids", "/sys/fs/cgroup"];

/// The host's, which no ordinary user may write to.
fn foreign_group() -> PathBuf {
    let found = HIERARCHIES.into_iter().map(PathBuf::from).find(|group| group.join("cgroup.procs").exists());
    found.unwrap_or_else(|| PathBuf::from("/sys/fs/cgroup"))
}

/// A group of the suite's own, for a process that breaks out of the plugin's.
fn own_group(number: i64) -> Option<PathBuf> {
    let name = format!("plugvisor-escape-{}-{number}", std::process::id());
    let made = HIERARCHIES.map(|hierarchy| Path::new(hierarchy).join(&name));
    made.into_iter().find(|group| fs::create_dir(group).is_ok() && group.join("cgroup.procs").exists())
}

/// One of the host's, where there is one: cgroup v1 has it.
fn release_agent() -> String {
    let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
    let found = hierarchies.map(|entry| entry.path().join("release_agent")).find(|path| path.exists());
    found.unwrap_or_else(|| PathBuf::from("/sys/fs/cgroup/release_agent")).display().to_string()
}

/// The last result, with errors by their names.
pub(crate) fn last_told(text: &str) -> String {
    let told = text.lines().last().and_then(|line| line.split_once(' ')).map_or("nothing", |(_, result)| result);
    told.parse().map_or_else(|_| told.to_owned(), |number: i32| errno(number))
}

fn errno(number: i32) -> String {
    let names = [
        (libc::EPERM, "EPERM"),
        (libc::ENOENT, "ENOENT"),
        (libc::ESRCH, "ESRCH"),
        (libc::EIO, "EIO"),
        (libc::EBADF, "EBADF"),
        (libc::ENOMEM, "ENOMEM"),
        (libc::EACCES, "EACCES"),
        (libc::EFAULT, "EFAULT"),
        (libc::ENOTDIR, "ENOTDIR"),
        (libc::EINVAL, "EINVAL"),
        (libc::EMFILE, "EMFILE"),
        (libc::ENOTTY, "ENOTTY"),
        (libc::EFBIG, "EFBIG"),
        (libc::ENOSPC, "ENOSPC"),
        (libc::EROFS, "EROFS"),
        (libc::ENOSYS, "ENOSYS"),
        (libc::EPROTONOSUPPORT, "EPROTONOSUPPORT"),
        (libc::EAFNOSUPPORT, "EAFNOSUPPORT"),
        (libc::EADDRNOTAVAIL, "EADDRNOTAVAIL"),
        (libc::ENETUNREACH, "ENETUNREACH"),
        (libc::ETOOMANYREFS, "ETOOMANYREFS"),
        (libc::ECONNREFUSED, "ECONNREFUSED"),
    ];
    names.iter().find(|(known, _)| *known == number).map_or_else(|| number.to_string(), |(_, name)| (*name).to_owned())
}

pub(crate) fn signal(number: i32) -> String {
    let names =
        [(libc::SIGKILL, "SIGKILL"), (libc::SIGSYS, "SIGSYS"), (libc::SIGSEGV, "SIGSEGV"), (libc::SIGTERM, "SIGTERM")];
    let known = names.iter().find(|(known, _)| *known == number);
    known.map_or_else(|| format!("signal {number}"), |(_, name)| (*name).to_owned())
}

/// Reads what a plugin prints until a line begins with this.
pub(crate) fn read_until(plugin: &mut Plugin, beginning: &str) -> String {
    use std::io::Read;
    let deadline = std::time::Instant::now() + super::harness::patience();
    let mut text = String::new();
    while !text.lines().any(|line| line.starts_with(beginning)) || !text.ends_with('\n') {
        assert!(super::harness::wait_readable(plugin.stdout.as_fd(), deadline), "no {beginning:?} in {text:?}");
        let mut bytes = [0; 256];
        let read = plugin.stdout.read(&mut bytes).expect("reads");
        assert!(read > 0, "it ended: {text:?}");
        text.push_str(&String::from_utf8_lossy(&bytes[..read]));
    }
    text
}
