//! How launchers are started: with which options, as whom, and anew in the place of one that has ended.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::fs::PermissionsExt},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use plugvisor_sandbox::{
    options::{BundleRoot, Linger, Listen, Options, Supervisor},
    protocol::{Control, Hello, ProbeState, Probed, Reply, Request, Tier, VERSION},
    seqpacket::Seqpacket,
};

use super::{As, Harness, ORDINARY, Place, is_root, make_bundle, patience, supervisor_uid};

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
        Self::start_with(as_, trust)
    }

    /// The same, with directories for plugins, and a store in which uids last.
    pub fn start_with_directories(as_: As) -> Self {
        Self::start_with(as_, |options| {
            with_directories(as_, options);
            trust(options);
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
            trust(options);
        })
    }

    /// The same, with machines: `settings` gives what the policy file says of them, for files in a directory.
    pub fn start_trusting_with_machines(as_: As, settings: impl FnOnce(&Path) -> io::Result<String>) -> Self {
        let mut harness = Self::start_with_store(as_, |options| {
            with_directories(as_, options);
            trust(options);
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

    fn greet(&mut self) {
        let reply = self.ask(&Request::Hello(Hello { version: VERSION }), &[]).0;
        assert_eq!(reply, Reply::Hello { version: VERSION, pid: self.process.id() });
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
}

/// The plugins are the operator's own.
fn trust(options: &mut Options) {
    for root in &mut options.bundle_roots {
        root.tier = Tier::Internal;
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
