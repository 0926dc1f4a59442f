//! Starts a real launcher as root or as an ordinary user, talks to it over its socket, and cleans up.
#![allow(unreachable_pub, dead_code, missing_docs, reason = "a module of tests, each of which uses a part")]

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use plugvisor_package::{Bundle, BundleFile, BundleLimits};
use plugvisor_sandbox::{
    codec::{self, FromLauncher},
    options::{BundleRoot, Linger, Listen, Options, Supervisor},
    protocol::{
        Control, Exit, Hello, Import, ImportBegin, ImportFile, Launch, LaunchId, Launched, Level, Limits, Listed,
        MAX_DESCRIPTORS, Notice, ProbeState, Probed, ReattachState, Reattached, Refusal, RefusalCode, Reply, Request,
        SocketMode, Stored, Tier, VERSION,
    },
    seqpacket::{Received, Seqpacket},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::Uid,
};

mod place;

pub use place::Place;

/// How long what is awaited may take: only what never comes takes this long; a machine may stand still for many
/// seconds. `PLUGVISOR_TEST_PATIENCE`, a whole number, says how many times slower than usual
/// this machine is: one that is emulated.
pub fn patience() -> Duration {
    static SLOWNESS: OnceLock<u32> = OnceLock::new();
    let read = || std::env::var("PLUGVISOR_TEST_PATIENCE").map_or(1, |times| times.parse().expect("a whole number"));
    Duration::from_secs(60) * *SLOWNESS.get_or_init(read)
}

/// Stops a scoped thread, also when the test fails: the scope would wait for it for ever.
pub struct Stopping<'a>(pub &'a AtomicBool);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// An ordinary user that needs no entry anywhere.
pub const ORDINARY: u32 = 54_321;

/// Who runs the launcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum As {
    Root,
    Ordinary,
}

impl As {
    /// Both when this process is root, else only the ordinary one; what is left out is printed.
    pub fn possible() -> Vec<Self> {
        if is_root() {
            return vec![Self::Root, Self::Ordinary];
        }
        println!("SKIP privileged-lane: this user is not root");
        vec![Self::Ordinary]
    }
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Who may connect to a launcher that listens.
pub fn supervisor_uid() -> u32 {
    if is_root() { ORDINARY } else { rustix::process::geteuid().as_raw() }
}

pub struct Harness {
    pub process: Child,
    pub connection: Seqpacket,
    pub as_: As,
    pub directory: tempfile::TempDir,
    pub cgroup: String,
    /// How many spares it makes: none without privileges.
    pub spares: usize,
    notices: Vec<Notice>,
    last: u64,
    args: Vec<OsString>,
    /// The bundles that were made for launches: how they run, and where they are.
    made: Mutex<BTreeMap<[u8; 32], (Manner, PathBuf)>>,
    /// Let go of last, when the launcher has ended.
    pub place: Place,
}

/// Where every bundle's manifest says that it listens.
pub const PORTS: [u16; 2] = [8080, 8443];

/// What a bundle's manifest says is executed, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manner {
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
    pub socket: SocketMode,
    /// The whole of `security`.
    pub security: serde_json::Value,
}

impl Default for Manner {
    fn default() -> Self {
        Self {
            args: Vec::new(),
            env: vec![("COLOUR".to_owned(), "blue".to_owned())],
            socket: SocketMode::Inherit,
            security: serde_json::json!({ "capabilities": [
                "filesystem:write-temp", "filesystem:read-config", "filesystem:read-data", "filesystem:write-data",
                "process:spawn-child", "process:signal-handling", "network:http-client", "network:tcp-server"
            ] }),
        }
    }
}

impl Manner {
    pub fn of(args: &[&str]) -> Self {
        Self { args: args.iter().map(ToString::to_string).collect(), ..Self::default() }
    }

    /// The manifest of a bundle that runs so.
    pub fn manifest(&self, name: &str, exec: &str) -> String {
        let Self { args, env, socket, security } = self;
        let env: BTreeMap<&String, &String> = env.iter().map(|(name, value)| (name, value)).collect();
        let socket = if *socket == SocketMode::Bind { "bind" } else { "inherit" };
        let manifest = serde_json::json!({
            "name": name, "version": "1.0.0", "security": security,
            "runtime": { "exec": exec, "args": args, "env": env, "socket": socket, "network": { "listen": PORTS } },
        });
        serde_json::to_string_pretty(&manifest).expect("JSON")
    }
}

/// A launched plugin and its ends.
pub struct Plugin {
    pub launched: Launched,
    pub pidfd: OwnedFd,
    pub broker: OwnedFd,
    pub worker: OwnedFd,
    pub stdout: File,
    pub stderr: File,
    /// Where the egress proxy accepts, when it was granted.
    pub egress: Option<OwnedFd>,
}

impl Plugin {
    fn of(launched: Launched, mut descriptors: Vec<OwnedFd>) -> Self {
        let egress = (descriptors.len() == 6).then(|| descriptors.remove(5));
        let [pidfd, broker, worker, stdout, stderr] =
            <[OwnedFd; 5]>::try_from(descriptors).expect("five descriptors, or six with egress");
        Self { launched, pidfd, broker, worker, stdout: stdout.into(), stderr: stderr.into(), egress }
    }
}

impl Harness {
    pub fn start(as_: As) -> Self {
        Self::start_with(as_, |_| ())
    }

    pub fn start_with(as_: As, change: impl FnOnce(&mut Options)) -> Self {
        let mut harness = Self::spawn(as_, change);
        harness.greet();
        harness
    }

    /// One to which the plugins are the operator's own, so that each level may be asked for.
    pub fn start_trusting(as_: As) -> Self {
        Self::start_with(as_, |options| {
            for root in &mut options.bundle_roots {
                root.tier = Tier::Internal;
            }
        })
    }

    /// The same, with directories for plugins, and a store in which uids last.
    pub fn start_with_directories(as_: As) -> Self {
        Self::start_with(as_, |options| {
            with_directories(as_, options);
            for root in &mut options.bundle_roots {
                root.tier = Tier::Internal;
            }
        })
    }

    /// The same, with walls left out of every launch.
    pub fn start_trusting_without(as_: As, without: &[Control]) -> Self {
        Self::start_with(as_, |options| {
            with_directories(as_, options);
            options.without = without.to_vec();
            if !without.is_empty() {
                options.spares = 0;
            }
            for root in &mut options.bundle_roots {
                root.tier = Tier::Internal;
            }
        })
    }

    /// The same, with machines: `settings` gives what the policy file says of them, for files in a directory.
    pub fn start_trusting_with_machines(as_: As, settings: impl FnOnce(&Path) -> io::Result<String>) -> Self {
        let mut harness = Self::start_with_store(as_, |options| {
            with_directories(as_, options);
            for root in &mut options.bundle_roots {
                root.tier = Tier::Internal;
            }
        });
        let machine = settings(&harness.path("")).expect("a copy of the kernel");
        harness.write_policy(&format!("version = 1\n{machine}"));
        // [vm] is new: launches are refused while it is tried what makes machines. There is no event for it.
        let deadline = Instant::now() + patience();
        loop {
            let Reply::Probe(host) = harness.ask(&Request::Probe, &[]).0 else { panic!("no probe") };
            let tried = |probed: &Probed| {
                probed.control == Control::OwnKernel
                    && matches!(&probed.state, ProbeState::Works(how) if how.contains("is being tried"))
            };
            if !host.controls.iter().any(tried) {
                return harness;
            }
            assert!(Instant::now() < deadline, "what makes machines is not found out");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// With a store on the disk, as root.
    pub fn start_with_store(as_: As, change: impl FnOnce(&mut Options)) -> Self {
        let mut harness = Self::spawn_in(as_, tempfile::tempdir().expect("a temporary directory"), |options, path| {
            options.store = (as_ == As::Root).then(|| path.join("store"));
            options.policy = Some(path.join("policy.toml"));
            change(options);
        });
        harness.greet();
        harness
    }

    /// One that is expected to refuse to run.
    pub fn start_with_refusal(as_: As, change: impl FnOnce(&mut Options)) -> Self {
        Self::spawn(as_, change)
    }

    fn greet(&mut self) {
        let reply = self.ask(&Request::Hello(Hello { version: VERSION }), &[]).0;
        assert_eq!(reply, Reply::Hello { version: VERSION, pid: self.process.id() });
    }

    /// A new launcher in the place of one that has ended, without a Hello.
    pub fn respawn(&mut self) {
        let (connection, other) = Seqpacket::pair().expect("a socket pair");
        self.place.clear();
        let mut command = self.place.command(&self.path("plugvisor-launcher"));
        command.args(&self.args).stdin(Stdio::from(OwnedFd::from(other))).stderr(Stdio::null());
        self.process = command.spawn().expect("the launcher starts");
        self.connection = connection;
    }

    /// A new launcher in the place of one that has ended.
    pub fn restart(&mut self) {
        self.respawn();
        self.greet();
    }

    /// What the administrator approves from now on.
    pub fn write_policy(&self, text: &str) {
        let new = self.path("policy.new");
        fs::write(&new, text).expect("the policy");
        fs::set_permissions(&new, fs::Permissions::from_mode(0o644)).expect("chmod");
        if self.as_ == As::Ordinary && is_root() {
            std::os::unix::fs::chown(&new, Some(ORDINARY), Some(ORDINARY)).expect("chown");
        }
        fs::rename(new, self.path("policy.toml")).expect("the policy");
    }

    /// Without a Hello.
    pub fn start_silent(as_: As) -> Self {
        Self::spawn(as_, |_| ())
    }

    /// A launcher that listens, with this process connected as its first supervisor.
    pub fn start_listening(as_: As, linger: Linger) -> Self {
        let mut harness = Self::spawn_listening(as_, linger);
        harness.connect();
        harness
    }

    /// A launcher that listens, to which nobody has connected.
    pub fn spawn_listening(as_: As, linger: Linger) -> Self {
        Self::spawn_listening_with(as_, linger, |_| ())
    }

    pub fn spawn_listening_with(as_: As, linger: Linger, change: impl FnOnce(&mut Options)) -> Self {
        let mut harness = Self::spawn(as_, |options| {
            let path = options.runtime_directory.join("launcher.sock");
            options.supervisor = Supervisor::Listen(Listen { path, first: None, uid: supervisor_uid(), linger });
            change(options);
        });
        harness.disconnect();
        harness
    }

    /// Connects as the supervisor's user and says Hello.
    pub fn connect(&mut self) {
        let deadline = Instant::now() + patience();
        loop {
            self.connection = self.knock();
            let hello = codec::encode_request(0, &Request::Hello(Hello { version: VERSION })).expect("encodes");
            // Whoever is turned away may be told so before it has sent anything.
            let _ = self.connection.try_send(&hello, &[]);
            match self.receive(deadline) {
                Some((FromLauncher::Reply { reply: Reply::Hello { version: VERSION, pid }, .. }, _))
                    if pid == self.process.id() =>
                {
                    return;
                }
                // A process that another test forks holds a copy of the last connection until it executes. And where
                // very many are turned away, not everybody is told why.
                Some((
                    FromLauncher::Reply { reply: Reply::Refused(Refusal { code: RefusalCode::Busy, .. }), .. },
                    _,
                ))
                | None
                    if Instant::now() < deadline =>
                {
                    std::thread::sleep(Duration::from_millis(2));
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// A further connection, by the supervisor's user.
    pub fn knock(&self) -> Seqpacket {
        self.knock_as(supervisor_uid())
    }

    /// A further connection, by this user; waits until the launcher listens.
    pub fn knock_as(&self, uid: u32) -> Seqpacket {
        let deadline = Instant::now() + patience();
        loop {
            // The credentials are those of the thread.
            let connected = std::thread::scope(|scope| {
                let connect = scope.spawn(|| {
                    if is_root() {
                        let uid = Uid::from_raw(uid);
                        rustix::thread::set_thread_res_uid(uid, uid, uid).expect("becomes another user");
                    }
                    Seqpacket::connect(&self.path("run/launcher.sock"))
                });
                connect.join().expect("the thread")
            });
            match connected {
                Ok(connection) => return connection,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            // There is no event for a path that comes to be listened at.
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// As if this supervisor were killed: its connection and what it knows is gone.
    pub fn disconnect(&mut self) {
        let (unused, _) = Seqpacket::pair().expect("a pair");
        self.connection = unused;
        self.notices.clear();
    }

    /// Everything that the launcher knows.
    pub fn list(&mut self) -> Listed {
        let mut all: Option<Listed> = None;
        loop {
            let after = all.as_ref().and_then(|all| all.launches.last()).map_or(LaunchId(0), |known| known.launch);
            let Reply::Listed(mut page) = self.ask(&Request::List { after }, &[]).0 else { panic!("not listed") };
            let more = page.more;
            match &mut all {
                None => all = Some(page),
                Some(all) => all.launches.append(&mut page.launches),
            }
            if !more {
                return all.expect("a page");
            }
        }
    }

    /// Takes a launch over: how it is, and what its two streams wrote meanwhile.
    pub fn reattach(&mut self, launch: LaunchId) -> (Reattached, [String; 2], Option<Plugin>) {
        let (reply, mut descriptors) = self.ask(&Request::Reattach { launch }, &[]);
        let Reply::Reattached(reattached) = reply else { panic!("{reply:?}") };
        let ends = descriptors.split_off(2);
        let mut texts = descriptors.into_iter().map(|file| {
            let mut bytes = Vec::new();
            let mut file = File::from(file);
            file.seek(SeekFrom::Start(0)).expect("seek");
            file.read_to_end(&mut bytes).expect("reads");
            String::from_utf8_lossy(&bytes).into_owned()
        });
        let texts = [texts.next().expect("stdout"), texts.next().expect("stderr")];
        assert_eq!([reattached.stdout.bytes, reattached.stderr.bytes], [texts[0].len() as u64, texts[1].len() as u64]);
        let plugin = match &reattached.state {
            ReattachState::Up(launched) => Some(Plugin::of(launched.clone(), ends)),
            ReattachState::Over(_) => {
                assert!(ends.is_empty());
                None
            }
        };
        (reattached, texts, plugin)
    }

    fn spawn(as_: As, change: impl FnOnce(&mut Options)) -> Self {
        Self::spawn_in(as_, tempfile::tempdir().expect("a temporary directory"), |options, _| change(options))
    }

    fn spawn_in(as_: As, directory: tempfile::TempDir, change: impl FnOnce(&mut Options, &Path)) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let path = directory.path();
        fs::create_dir_all(path.join("bundles")).expect("the bundles");
        make_bundle(&path.join("bundles"), "walled");
        fs::write(path.join("secret"), "of the supervisor").expect("a secret");
        // The launcher's own file may lie where an ordinary user cannot go.
        let program = path.join("plugvisor-launcher");
        // Another build of it, such as the release one, can be tested by naming it.
        let built = std::env::var_os("PLUGVISOR_TEST_LAUNCHER").map(PathBuf::from);
        let built = built.unwrap_or_else(|| env!("CARGO_BIN_EXE_plugvisor-launcher").into());
        // By a process of its own: a descriptor that is open for writing here would be inherited by whatever another test
        // forks at that moment, and executing the copy would be ETXTBSY until that child has executed itself.
        let copied = std::process::Command::new("cp").arg("--").args([&built, &program]).status().expect("cp");
        assert!(copied.success(), "the launcher was not copied: {copied}");
        let run = path.join("run");
        fs::create_dir(&run).expect("the runtime directory");
        let open = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
        open(path, 0o755);
        open(&run, 0o755);
        open(&path.join("secret"), 0o600);

        let (connection, other) = Seqpacket::pair().expect("a socket pair");
        let cgroup = format!("plugvisor-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mut options =
            Options::new(0, run.clone(), vec![BundleRoot { tier: Tier::Verified, path: path.join("bundles") }]);
        options.cgroup_root.clone_from(&cgroup);
        change(&mut options, path);
        if let Some(policy) = &options.policy {
            fs::write(policy, "version = 1\n").expect("the policy");
            open(policy, 0o644);
            if as_ == As::Ordinary && is_root() {
                std::os::unix::fs::chown(policy, Some(ORDINARY), Some(ORDINARY)).expect("chown");
            }
        }
        let args = options.to_args();
        let other_user = (as_ == As::Ordinary && is_root()).then_some(ORDINARY);
        std::os::unix::fs::chown(&run, other_user, other_user).expect("chown");
        let place = Place::new(other_user);
        let mut command = place.command(&program);
        command.args(&args).stdin(Stdio::from(OwnedFd::from(other)));
        let process = command.spawn().expect("the launcher starts");
        drop(command);
        let spares = if as_ == As::Root { usize::try_from(options.spares).expect("few") } else { 0 };
        let made = Mutex::default();
        Self { process, connection, as_, directory, cgroup, spares, notices: Vec::new(), last: 0, args, made, place }
    }

    pub fn path(&self, inside: &str) -> PathBuf {
        self.directory.path().join(inside)
    }

    /// Sends a request and waits for its answer; notices on the way are kept.
    pub fn ask(&mut self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> (Reply, Vec<OwnedFd>) {
        let id = self.send(request, descriptors);
        let deadline = Instant::now() + patience();
        loop {
            match self.receive(deadline).expect("an answer") {
                (FromLauncher::Reply { id: of, reply }, descriptors) if of == id => return (reply, descriptors),
                (FromLauncher::Reply { .. }, _) => {}
                (FromLauncher::Notice(notice), _) => self.notices.push(notice),
            }
        }
    }

    pub fn send(&mut self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> u64 {
        self.last += 1;
        let packet = codec::encode_request(self.last, request).expect("encodes");
        self.connection.try_send(&packet, descriptors).expect("sends");
        self.last
    }

    /// The next message; `None` when the launcher closed the connection.
    pub fn receive(&self, deadline: Instant) -> Option<(FromLauncher, Vec<OwnedFd>)> {
        loop {
            match self.connection.try_recv() {
                Ok(Received::Packet(packet)) => {
                    let message = codec::decode_from_launcher(&packet.bytes).expect("decodes");
                    return Some((message, packet.descriptors));
                }
                Ok(Received::Closed) => return None,
                Ok(Received::Truncated(_)) => panic!("a truncated packet"),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    assert!(wait_readable(self.connection.as_fd(), deadline), "nothing came in time");
                }
                Err(error) => panic!("recv: {error}"),
            }
        }
    }

    /// Waits until a notice matches, now or among those that came before.
    pub fn await_notice<T>(&mut self, mut matches: impl FnMut(&Notice) -> Option<T>) -> T {
        let deadline = Instant::now() + patience();
        loop {
            if let Some(at) = self.notices.iter().position(|notice| matches(notice).is_some()) {
                return matches(&self.notices.remove(at)).expect("it matched");
            }
            if let (FromLauncher::Notice(notice), _) = self.receive(deadline).expect("the launcher lives") {
                self.notices.push(notice);
            }
        }
    }

    pub fn exit_of(&mut self, id: LaunchId) -> (Exit, bool) {
        self.await_notice(|notice| match notice {
            Notice::Exited { launch, exit, oom_killed } if *launch == id => Some((*exit, *oom_killed)),
            _ => None,
        })
    }

    /// A launch of the test plugin with these arguments, with what is lacking allowed, so that the rest can be seen.
    pub fn request(&self, args: &[&str]) -> Launch {
        self.request_in(&Manner::of(args))
    }

    /// A launch of the test plugin as it runs in a bundle made for it.
    pub fn request_in(&self, manner: &Manner) -> Launch {
        let lacking = [Control::OwnUid, Control::MemoryLimit, Control::CpuLimit, Control::PidsLimit];
        Launch {
            plugin: "walled".to_owned(),
            generation: 7,
            level: Level::Process,
            bundle: self.made("walled", manner),
            tier: Tier::Untrusted,
            approval: None,
            limits: Limits::default(),
            grants: Vec::new(),
            environment: Vec::new(),
            inward: 0,
            allow_degraded: if self.as_ == As::Ordinary { lacking.to_vec() } else { Vec::new() },
        }
    }

    /// The same at a level. At NONE an ordinary user also lacks the cgroup that would end all of it together.
    pub fn request_at(&self, level: Level, args: &[&str]) -> Launch {
        self.request_at_in(level, &Manner::of(args))
    }

    /// The same as it runs in a bundle made for it.
    pub fn request_at_in(&self, level: Level, manner: &Manner) -> Launch {
        let mut launch = self.request_in(manner);
        launch.level = level;
        if level == Level::None && self.as_ == As::Ordinary {
            launch.allow_degraded.extend([Control::WholeKill, Control::DiesWithLauncher]);
        }
        launch
    }

    /// The digest of a bundle of this name that runs so; it is made when there is none.
    pub fn made(&self, name: &str, manner: &Manner) -> [u8; 32] {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.path("bundles").join(format!("made-{name}-{}", made.len()));
        let known = made.iter().find(|(_, (known, path))| known == manner && named(path, name));
        if let Some((digest, _)) = known {
            return *digest;
        }
        fs::create_dir_all(path.join("bin")).expect("the bundle");
        // The same file: a bundle is a manifest's worth.
        fs::hard_link(self.path("bundles/walled/bin/walled"), path.join("bin/walled")).expect("the entry");
        fs::write(path.join("plugin.json"), manner.manifest(name, "bin/walled")).expect("the manifest");
        open_to_all(&path);
        let digest = digest(&path);
        made.insert(digest, (manner.clone(), path));
        digest
    }

    /// Where a bundle is that was made.
    pub fn place_of(&self, bundle: [u8; 32]) -> PathBuf {
        let made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        made.get(&bundle).map(|(_, path)| path.clone()).expect("it was made")
    }

    /// Launches; the bundle of the plugin's name is made and imported first, when there is none.
    pub fn try_launch(&mut self, launch: Launch) -> Result<Plugin, Refusal> {
        let launch = self.try_prepare(launch)?;
        self.launch_stored(launch)
    }

    /// The launch, with its bundle in the store.
    pub fn prepared(&mut self, launch: Launch) -> Launch {
        self.try_prepare(launch).unwrap_or_else(|refusal| panic!("refused: {refusal:?}"))
    }

    fn try_prepare(&mut self, mut launch: Launch) -> Result<Launch, Refusal> {
        let known = |harness: &Self, bundle| {
            let made = harness.made.lock().unwrap_or_else(PoisonError::into_inner);
            made.get(&bundle).cloned()
        };
        if let Some((manner, _)) = known(self, launch.bundle).filter(|_| launch.plugin.starts_with("walled-")) {
            launch.bundle = self.made(&launch.plugin, &manner);
        }
        if let Some((_, path)) = known(self, launch.bundle)
            && self.find(launch.bundle).is_none()
        {
            self.import(&path)?;
        }
        Ok(launch)
    }

    /// Launches from what the store has.
    pub fn launch_stored(&mut self, launch: Launch) -> Result<Plugin, Refusal> {
        match self.ask(&Request::Launch(Box::new(launch)), &[]) {
            (Reply::Launched(launched), descriptors) => Ok(Plugin::of(launched, descriptors)),
            (Reply::Refused(refusal), descriptors) => {
                assert!(descriptors.is_empty());
                Err(refusal)
            }
            (other, _) => panic!("{other:?}"),
        }
    }

    /// What the store has under this digest.
    pub fn find(&mut self, bundle: [u8; 32]) -> Option<Stored> {
        match self.ask(&Request::Import(Import::Find { bundle }), &[]).0 {
            Reply::Imported(found) => found,
            other => panic!("{other:?}"),
        }
    }

    /// Imports a bundle as a supervisor does.
    pub fn import(&mut self, path: &Path) -> Result<Stored, Refusal> {
        let (begin, files) = listed(path);
        self.import_listed(begin, &files, path)
    }

    /// Imports what is said of a bundle.
    pub fn import_listed(&mut self, begin: ImportBegin, files: &[ImportFile], path: &Path) -> Result<Stored, Refusal> {
        self.step(Import::Begin(begin), &[])?;
        for packet in files.chunks(MAX_DESCRIPTORS) {
            let open: Vec<File> =
                packet.iter().map(|file| File::open(path.join(&file.path)).expect("a file of the bundle")).collect();
            let descriptors: Vec<BorrowedFd<'_>> = open.iter().map(AsFd::as_fd).collect();
            self.step(Import::Files(packet.to_vec()), &descriptors)?;
        }
        Ok(self.step(Import::Commit, &[])?.expect("what was committed"))
    }

    /// One step of an import.
    pub fn step(&mut self, step: Import, descriptors: &[BorrowedFd<'_>]) -> Result<Option<Stored>, Refusal> {
        match self.ask(&Request::Import(step), descriptors).0 {
            Reply::Done => Ok(None),
            Reply::Imported(found) => Ok(found),
            Reply::Refused(refusal) => Err(refusal),
            other => panic!("{other:?}"),
        }
    }

    pub fn launch(&mut self, launch: Launch) -> Plugin {
        self.try_launch(launch).unwrap_or_else(|refusal| panic!("refused: {refusal:?}"))
    }

    /// Launches, reads its output to the end, and gives the lines by name.
    pub fn attempt(&mut self, change: impl FnOnce(&mut Launch), args: &[&str]) -> Vec<(String, String)> {
        let mut request = self.request(args);
        change(&mut request);
        let mut plugin = self.launch(request);
        let text = read_all(&mut plugin.stdout);
        let errors = read_all(&mut plugin.stderr);
        let exit = self.exit_of(plugin.launched.launch);
        assert_eq!(exit, (Exit::Code(0), false), "stdout: {text}, stderr: {errors}");
        text.lines()
            .map(|line| line.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())).expect("NAME RESULT"))
            .collect()
    }

    /// Every cgroup directory of this launcher that exists now.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        fn walk(directory: &Path, name: &str, depth: u32, found: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                let path = entry.path();
                if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    continue;
                }
                if path.iter().any(|part| part == name) {
                    found.push(path.clone());
                }
                if depth > 0 {
                    walk(&path, name, depth - 1, found);
                }
            }
        }
        let mut found = Vec::new();
        walk(Path::new("/sys/fs/cgroup"), &self.cgroup, 8, &mut found);
        found
    }

    /// Whether a child of the launcher is closing descriptors, or may be about to.
    fn closing(&self, only_named: bool) -> bool {
        let pid = self.process.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("its children");
        children.split_whitespace().any(|child| {
            let name = fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
            let name = name.trim();
            let others = ["plugvisor-init", "plugvisor-guard", "plugvisor-early", "plugvisor-spare"];
            name == "plugvisor-close" || (!only_named && !others.contains(&name))
        })
    }

    /// The processes that wait for a launch.
    pub fn waiting(&self) -> Vec<i32> {
        let pid = self.process.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("its children");
        let spare = |pid: &i32| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "plugvisor-spare")
        };
        children.split_whitespace().filter_map(|pid| pid.parse().ok()).filter(spare).collect()
    }

    /// Waits until there are as many spares as there should be. There is no event for it.
    pub fn await_spares(&self) -> Vec<i32> {
        let deadline = Instant::now() + patience();
        loop {
            let waiting = self.waiting();
            if waiting.len() == self.spares {
                return waiting;
            }
            assert!(Instant::now() < deadline, "{waiting:?} are not {} spares", self.spares);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Signals the launcher.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.process);
        rustix::process::kill_process(pid, signal).expect("the launcher lives");
    }

    /// Waits until a child of the launcher is closing descriptors. There is no event for it.
    pub fn await_closing(&self) {
        let deadline = Instant::now() + patience();
        while !self.closing(true) {
            assert!(Instant::now() < deadline, "nothing is closed");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until the launcher has no more descriptors open than this: /proc leaves out a child that closes some while another
    /// one ends (proc_pid_task_tid_children(5)), so that one count may be of a moment in between. A leak stays.
    pub fn await_descriptors(&mut self, most: Option<usize>, after: &str) {
        let deadline = Instant::now() + patience();
        loop {
            let open = self.descriptors();
            if open <= most {
                return;
            }
            if Instant::now() >= deadline {
                let directory = format!("/proc/{}/fd", self.process.id());
                let links = fs::read_dir(directory).into_iter().flatten().flatten();
                let links: Vec<_> = links.filter_map(|entry| fs::read_link(entry.path()).ok()).collect();
                panic!("{open:?} descriptors {after}, and {most:?} before: {links:?}");
            }
        }
    }

    /// How many descriptors the launcher has open when it has closed what it got; `None`, and said so, where only root may
    /// see that: the launcher is not dumpable.
    pub fn descriptors(&mut self) -> Option<usize> {
        let deadline = Instant::now() + patience();
        // An answer comes in a later turn of its loop than what was before: the closing child has begun by then, and in
        // the turn that reaps it lets go of it too.
        let turn = |harness: &mut Self| assert!(matches!(harness.ask(&Request::Probe, &[]).0, Reply::Probe(_)));
        turn(self);
        self.await_spares();
        // One child may follow another: none runs when there is none after a turn that began with none.
        loop {
            while self.closing(false) {
                assert!(Instant::now() < deadline, "the closing does not end");
                std::thread::sleep(Duration::from_millis(1));
            }
            turn(self);
            if !self.closing(false) {
                break;
            }
        }
        match fs::read_dir(format!("/proc/{}/fd", self.process.id())) {
            Ok(open) => Some(open.count()),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !is_root() => {
                println!("SKIP privileged-lane: only root may count the launcher's descriptors");
                None
            }
            Err(error) => panic!("its descriptors: {error}"),
        }
    }
}

impl Drop for Harness {
    fn drop(&mut self) {
        // One that lingers must be told.
        if let Some(pid) = rustix::process::Pid::from_raw(self.process.id().cast_signed()) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        // Gone, so that the launcher ends by itself and cleans up; one that was killed has left its groups.
        if let Ok((unused, _)) = Seqpacket::pair() {
            self.connection = unused;
        }
        let deadline = Instant::now() + patience();
        while matches!(self.process.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                drop(self.process.kill());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        // A launcher without one of its walls, or one that was killed, may have left processes.
        while Instant::now() < deadline && !self.cgroups().is_empty() {
            for directory in self.cgroups().iter().rev() {
                end_all(directory);
                drop(fs::remove_dir(directory));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Gives a launcher its store and the roots of plugins' directories: `config`, with a directory of the plugin `walled` in
/// it, and `data`.
pub fn with_directories(as_: As, options: &mut Options) {
    let place = options.runtime_directory.parent().expect("it is in a directory").to_owned();
    options.store = (as_ == As::Root).then(|| place.join("store"));
    let (config, data) = (place.join("config"), place.join("data"));
    fs::create_dir_all(config.join("walled")).expect("a configuration");
    fs::write(config.join("walled/greeting"), "hello").expect("a file");
    fs::create_dir(&data).expect("the data");
    let owner = (as_ == As::Ordinary && is_root()).then_some(ORDINARY);
    for (path, mode) in
        [(&config, 0o700), (&config.join("walled"), 0o755), (&config.join("walled/greeting"), 0o644), (&data, 0o700)]
    {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
        std::os::unix::fs::chown(path, owner, owner).expect("chown");
    }
    (options.config_root, options.data_root) = (Some(config), Some(data));
}

/// Kills what is in this group, which is the test's own: known by its pidfd, and still there when it was opened.
fn end_all(group: &Path) {
    let members = || fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    for member in members().lines() {
        let Some(pid) = member.parse().ok().and_then(rustix::process::Pid::from_raw) else { continue };
        let Ok(process) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) else { continue };
        if members().lines().any(|still| still == member) {
            let _ = rustix::process::pidfd_send_signal(process, rustix::process::Signal::KILL);
        }
    }
}

/// A bundle with the test plugin under this name.
pub fn make_bundle(bundles: &Path, name: &str) {
    let bundle = bundles.join(name);
    fs::create_dir_all(bundle.join("bin")).expect("the bundle");
    fs::copy(env!("CARGO_BIN_EXE_plugvisor-walled"), bundle.join("bin/walled")).expect("the entry");
    write_manifest(&bundle, name, "bin/walled");
    fs::set_permissions(bundles, fs::Permissions::from_mode(0o755)).expect("chmod");
    open_to_all(&bundle);
}

/// Whether the bundle here has been made under this name.
fn named(path: &Path, name: &str) -> bool {
    let own = path.file_name().and_then(|file| file.to_str()).and_then(|file| file.strip_prefix("made-"));
    own.and_then(|own| own.rsplit_once('-')).is_some_and(|(own, _)| own == name)
}

/// Whatever the umask is, everybody reads a bundle and its owner alone writes it.
pub fn open_to_all(bundle: &Path) {
    for directory in [bundle, &bundle.join("bin")] {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).expect("chmod");
    }
    fs::set_permissions(bundle.join("plugin.json"), fs::Permissions::from_mode(0o644)).expect("chmod");
}

pub fn write_manifest(bundle: &Path, name: &str, exec: &str) {
    fs::write(bundle.join("plugin.json"), Manner::default().manifest(name, exec)).expect("the manifest");
}

/// What a supervisor says of a bundle.
pub fn listed(path: &Path) -> (ImportBegin, Vec<ImportFile>) {
    let bundle = Bundle::open(path, &BundleLimits::default()).expect("a bundle");
    let file = |file: BundleFile| ImportFile {
        path: file.path,
        executable: file.executable,
        size: file.size,
        sha256: *file.sha256.as_bytes(),
    };
    let digest = *bundle.digest.as_bytes();
    let files: Vec<ImportFile> = bundle.files.into_iter().map(file).collect();
    (announce(digest, &files), files)
}

/// The beginning of an import of these files.
pub fn announce(bundle: [u8; 32], files: &[ImportFile]) -> ImportBegin {
    let bytes = files.iter().map(|file| file.size).sum();
    ImportBegin { bundle, files: files.len().try_into().expect("few"), bytes }
}

/// The content digest of a bundle.
pub fn digest(path: &Path) -> [u8; 32] {
    listed(path).0.bundle
}

pub fn wait_readable(fd: BorrowedFd<'_>, deadline: Instant) -> bool {
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = Timespec { tv_sec: left.as_secs().try_into().expect("fits"), tv_nsec: left.subsec_nanos().into() };
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    poll(&mut fds, Some(&timeout)).expect("poll") > 0
}

/// Reads a pipe to its end, waiting for what is not there yet.
pub fn read_all(pipe: &mut File) -> String {
    let deadline = Instant::now() + patience();
    let mut text = Vec::new();
    let mut bytes = [0; 4096];
    loop {
        match pipe.read(&mut bytes) {
            Ok(0) => return String::from_utf8_lossy(&text).into_owned(),
            Ok(read) => text.extend_from_slice(&bytes[..read]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                assert!(
                    wait_readable(pipe.as_fd(), deadline),
                    "the pipe stays open: {}",
                    String::from_utf8_lossy(&text)
                );
            }
            Err(error) => panic!("read: {error}"),
        }
    }
}
