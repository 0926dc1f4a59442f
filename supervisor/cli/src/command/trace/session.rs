//! A launcher of the trace's own, and the one launch that it makes.
//!
//! It is started as plugvisord starts its own one: beside this program, over an inherited connection, with a policy that is
//! its command line. It sees a copy of the bundle in a directory that only this user can write, and ends with this program.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Read as _},
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    },
    path::PathBuf,
    process::Child,
    sync::Arc,
};

use plugvisor_package::{Bundle, BundleFile, BundleLimits, Manifest};
use plugvisor_sandbox::{
    codec::{self, FromLauncher},
    options::{BundleRoot, Options, TRACED_UIDS},
    protocol::{
        Control, Exit, Grant, Hello, Import, ImportBegin, ImportFile, Launch, LaunchId, Launched, Level, Limits,
        MAX_DESCRIPTORS, Notice, Reply, Request, Tier, VERSION,
    },
    seqpacket::{Received, Seqpacket},
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{Mode, OFlags, ResolveFlags, openat2},
    io::Errno,
};
use serde_json::{Value, json};

use crate::failure::{Failure, Outcome};

/// Processes and threads of a plugin that is traced, which may fork without being granted it.
const PIDS: u32 = 512;

fn failed(doing: &str, error: impl std::fmt::Display) -> Failure {
    Failure::new(
        Outcome::Failed,
        format!("the trace cannot begin: {doing}: {error}"),
        "see `plugvisor doctor --offline`",
    )
}

/// A private directory that goes with its owner.
struct Scratch(PathBuf);

impl Scratch {
    fn make() -> Result<Self, Failure> {
        // To root's launcher a bundle counts only where nobody but root can put another one on the way.
        let parent = if rustix::process::geteuid().is_root() { PathBuf::from("/tmp") } else { std::env::temp_dir() };
        let mut random = [0; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| failed("random bytes", error))?;
        let parent = fs::canonicalize(&parent).map_err(|error| failed(&parent.display().to_string(), error))?;
        let path = parent.join(format!("plugvisor-trace-{:016x}", u64::from_ne_bytes(random)));
        DirBuilder::new().mode(0o700).create(&path).map_err(|error| failed(&path.display().to_string(), error))?;
        Ok(Self(path))
    }

    fn directory(&self, name: &str) -> Result<PathBuf, Failure> {
        let path = self.0.join(name);
        DirBuilder::new()
            .mode(0o755)
            .recursive(true)
            .create(&path)
            .map_err(|error| failed(&path.display().to_string(), error))?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("{} is left behind: {error}; remove it", self.0.display());
        }
    }
}

/// A plugin that is being traced.
pub(crate) struct Session {
    pub(crate) plugin: String,
    /// The launch.
    pub(crate) launched: Launched,
    /// The worker socket, or the directory in which it is bound.
    pub(crate) worker: OwnedFd,
    pub(crate) outputs: Vec<OwnedFd>,
    pub(crate) connection: Arc<Seqpacket>,
    /// Kept, so that a connection to them waits and is not refused.
    _broker: OwnedFd,
    _egress: Option<OwnedFd>,
    launcher: Child,
    _scratch: Scratch,
}

/// The level at which a bundle of this level is traced: that of its tree and namespaces, without a filter.
pub(crate) fn traced_at(level: Level) -> Level {
    match level {
        Level::None | Level::Process => Level::Process,
        Level::Container | Level::Sandbox | Level::Vm => Level::Container,
    }
}

/// Starts the launcher and has the bundle launched; the program's first call waits at the listener.
pub(crate) fn start(bundle: &Bundle, level: Level, hand_over: impl FnOnce(OwnedFd)) -> Result<Session, Failure> {
    let scratch = Scratch::make()?;
    let manifest = &bundle.manifest;
    let plugin = manifest.name.to_string();
    let copy = copy(bundle, level, &scratch)?;
    let (launcher, asker, traced) = start_launcher(manifest, &scratch)?;
    let mut asker = asker;
    asker.import(&copy)?;
    let mut grants = Grant::of_all(manifest.security.capabilities.iter().copied());
    if !grants.contains(&Grant::WriteTemp) {
        grants.push(Grant::WriteTemp);
    }
    let limits = &manifest.security.sandbox.resource_limits;
    let request = Request::Launch(Box::new(Launch {
        plugin: plugin.clone(),
        generation: 1,
        level: traced_at(level),
        bundle: *copy.digest.as_bytes(),
        tier: Tier::Untrusted,
        approval: None,
        limits: Limits {
            memory_bytes: limits.max_memory.map(plugvisor_package::ByteSize::bytes),
            cpu_percent: limits.max_cpu_percent,
            pids: Some(PIDS),
            file_size_bytes: limits.max_file_size.map(plugvisor_package::ByteSize::bytes),
            open_files: None,
        },
        grants,
        environment: Vec::new(),
        inward: 0,
        // What an author's machine cannot hold, it cannot hold in a trace.
        allow_degraded: vec![Control::OwnUid, Control::MemoryLimit, Control::CpuLimit, Control::PidsLimit],
    }));
    let id = asker.send(&request, &[])?;
    let mut hand_over = Some(hand_over);
    let (launched, descriptors) = loop {
        let mut fds = [PollFd::new(&asker.connection, PollFlags::IN), PollFd::new(&traced, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(failed("waiting for the launcher", error)),
        }
        if let Ok(Received::Packet(packet)) = traced.try_recv()
            && let Some(listener) = packet.descriptors.into_iter().next()
            && let Some(hand_over) = hand_over.take()
        {
            hand_over(listener);
        }
        match asker.received()? {
            Some((FromLauncher::Reply { id: of, reply: Reply::Launched(launched) }, descriptors)) if of == id => {
                break (launched, descriptors);
            }
            Some((FromLauncher::Reply { id: of, reply: Reply::Refused(refusal) }, _)) if of == id => {
                return Err(Failure::new(
                    Outcome::Failed,
                    format!("the trace cannot begin: {}", refusal.message),
                    "see `plugvisor doctor --offline` for what this host can enforce",
                ));
            }
            Some(_) | None => {}
        }
    };
    let mut descriptors = descriptors.into_iter().skip(1);
    let mut next = || descriptors.next().ok_or_else(|| failed("the launcher", "it is of another version"));
    let (broker, worker, stdout, stderr) = (next()?, next()?, next()?, next()?);
    Ok(Session {
        plugin,
        launched,
        worker,
        outputs: vec![stdout, stderr],
        connection: Arc::new(asker.connection),
        _broker: broker,
        _egress: next().ok(),
        launcher,
        _scratch: scratch,
    })
}

impl Session {
    /// Sends the program a signal, as the supervisor does at its end.
    pub(crate) fn signal(&self, signal: i32) {
        let request = Request::Signal { launch: self.launched.launch, signal };
        // A launcher that is gone has ended it.
        let _ = codec::encode_request(u64::MAX, &request).map(|packet| self.connection.try_send(&packet, &[]));
    }

    /// Ends what still runs, and the launcher.
    pub(crate) fn end(mut self) -> Result<(), Failure> {
        let _ = rustix::net::shutdown(self.connection.as_fd(), rustix::net::Shutdown::Both);
        let status = self.launcher.wait().map_err(|error| failed("waiting for the launcher's end", error))?;
        if status.success() {
            return Ok(());
        }
        Err(Failure::new(Outcome::Failed, format!("the launcher of the trace ended with {status}"), "report this"))
    }
}

/// Waits for the end of the launch; `None` when the launcher is gone first.
pub(crate) fn await_end(connection: &Seqpacket, launch: LaunchId) -> Option<String> {
    loop {
        match connection.try_recv() {
            Ok(Received::Packet(packet)) => {
                if let Ok(FromLauncher::Notice(Notice::Exited { launch: of, exit, oom_killed })) =
                    codec::decode_from_launcher(&packet.bytes)
                    && of == launch
                {
                    return Some(match exit {
                        _ if oom_killed => "it ran out of memory".to_owned(),
                        Exit::Code(code) => format!("it exited with {code}"),
                        Exit::Signal(signal) => format!("signal {signal} ended it"),
                    });
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let mut fds = [PollFd::new(connection, PollFlags::IN)];
                if !matches!(poll(&mut fds, None), Ok(_) | Err(Errno::INTR)) {
                    return None;
                }
            }
            Ok(Received::Closed | Received::Truncated(_)) | Err(_) => return None,
        }
    }
}

/// The bundle as it is traced: with room for temporary files, at a level that has no filter, and for this launcher alone.
fn copy(bundle: &Bundle, level: Level, scratch: &Scratch) -> Result<Bundle, Failure> {
    let name = bundle.manifest.name.as_str();
    let to = scratch.directory(&format!("bundles/{name}"))?;
    let longest = u64::try_from(BundleLimits::default().manifest.bytes).unwrap_or(u64::MAX);
    for BundleFile { path, executable, size, .. } in &bundle.files {
        let wrong = |error: &dyn std::fmt::Display| failed(path, error);
        let target = to.join(path);
        if let Some(parent) = target.parent() {
            DirBuilder::new().mode(0o755).recursive(true).create(parent).map_err(|error| wrong(&error))?;
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let from = openat2(bundle.directory(), path.as_str(), flags, Mode::empty(), resolve);
        let from = File::from(from.map_err(|error| wrong(&error))?);
        let mode = if *executable { 0o755 } else { 0o644 };
        let mut file = File::options().write(true).create_new(true).mode(mode).open(&target).map_err(|e| wrong(&e))?;
        if path == Manifest::FILE_NAME {
            let stated: Value = serde_json::from_reader(from.take(longest)).map_err(|error| wrong(&error))?;
            let security = stated.get("security").is_none_or(Value::is_object);
            let sandbox = stated.pointer("/security/sandbox").is_none_or(Value::is_object);
            if !stated.is_object() || !security || !sandbox {
                return Err(wrong(&"it was changed while it was copied"));
            }
            serde_json::to_writer_pretty(&file, &for_trace(stated, level)).map_err(|error| wrong(&error))?;
        } else {
            // No more than was judged, however it grows meanwhile.
            io::copy(&mut from.take(*size), &mut file).map_err(|error| wrong(&error))?;
        }
    }
    Bundle::open(&to, &BundleLimits::default()).map_err(|error| failed("the copy of the bundle", error))
}

/// What the manifest says for the trace.
fn for_trace(mut manifest: Value, level: Level) -> Value {
    let security = &mut manifest["security"];
    if let Some(security) = security.as_object_mut() {
        security.remove("signature");
        security.remove("checksum");
    }
    let temp = json!("filesystem:write-temp");
    match security["capabilities"].as_array_mut() {
        Some(capabilities) if capabilities.contains(&temp) => {}
        Some(capabilities) => capabilities.push(temp),
        None => security["capabilities"] = json!([temp]),
    }
    security["sandbox"]["enabled"] = json!(true);
    security["sandbox"]["isolationLevel"] = json!(traced_at(level).as_str());
    manifest
}

fn start_launcher(manifest: &Manifest, scratch: &Scratch) -> Result<(Child, Asker, Seqpacket), Failure> {
    let own = std::env::current_exe().map_err(|error| failed("finding my own path", error))?;
    let program = own.with_file_name("plugvisor-launcher");
    let ((ours, theirs), (traced, traces)) = match (Seqpacket::pair(), Seqpacket::pair()) {
        (Ok(connection), Ok(trace)) => (connection, trace),
        (Err(error), _) | (_, Err(error)) => return Err(failed("a socket pair", error)),
    };
    let root = BundleRoot { tier: Tier::Internal, path: scratch.directory("bundles")? };
    let mut options = Options::new(theirs.as_raw_fd(), scratch.directory("run")?, vec![root]);
    options.cgroup_root = format!("plugvisor-trace-{}", std::process::id());
    options.max_plugins = 1;
    options.spares = 0;
    options.uids = TRACED_UIDS;
    options.trace = Some(traces.as_raw_fd());
    let capabilities = manifest.security.capabilities.iter().copied();
    if Grant::of_all(capabilities).into_iter().any(Grant::is_of_name) {
        scratch.directory(&format!("config/{}", manifest.name))?;
        options.config_root = Some(scratch.directory("config")?);
        options.data_root = Some(scratch.directory("data")?);
        if rustix::process::geteuid().is_root() {
            options.store = Some(scratch.directory("store")?);
        }
    }
    // This process has one thread still.
    let launcher = options.spawn(&program, &[theirs.as_fd(), traces.as_fd()], std::process::Stdio::inherit()).map_err(
        |error| {
            Failure::new(
                Outcome::Failed,
                format!("the trace cannot begin: {} cannot be started: {error}", program.display()),
                "plugvisor and plugvisor-launcher belong into one directory; install them together",
            )
        },
    )?;
    drop((theirs, traces));
    let mut asker = Asker { connection: ours, last: 0 };
    match asker.ask(&Request::Hello(Hello { version: VERSION }), &[])? {
        Reply::Hello { .. } => Ok((launcher, asker, traced)),
        other => Err(failed("the launcher", format!("it is of another version: {other:?}"))),
    }
}

/// Asks a launcher and waits.
struct Asker {
    connection: Seqpacket,
    last: u64,
}

impl Asker {
    fn send(&mut self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<u64, Failure> {
        self.last += 1;
        let packet = codec::encode_request(self.last, request).map_err(|error| failed("a request", error))?;
        self.connection.try_send(&packet, descriptors).map_err(|error| failed("the launcher", error))?;
        Ok(self.last)
    }

    /// What has come, if something has.
    fn received(&self) -> Result<Option<(FromLauncher, Vec<OwnedFd>)>, Failure> {
        match self.connection.try_recv() {
            Ok(Received::Packet(packet)) => {
                let message =
                    codec::decode_from_launcher(&packet.bytes).map_err(|error| failed("the launcher", error))?;
                Ok(Some((message, packet.descriptors)))
            }
            Ok(Received::Closed | Received::Truncated(_)) => {
                Err(failed("the launcher", "it ended; what it said stands above"))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(failed("the launcher", error)),
        }
    }

    fn ask(&mut self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<Reply, Failure> {
        let id = self.send(request, descriptors)?;
        loop {
            match self.received()? {
                Some((FromLauncher::Reply { id: of, reply: Reply::Refused(refusal) }, _)) if of == id => {
                    return Err(failed("the launcher", refusal.message));
                }
                Some((FromLauncher::Reply { id: of, reply }, _)) if of == id => return Ok(reply),
                Some(_) => {}
                None => {
                    let mut fds = [PollFd::new(&self.connection, PollFlags::IN)];
                    match poll(&mut fds, None) {
                        Ok(_) | Err(Errno::INTR) => {}
                        Err(error) => return Err(failed("waiting for the launcher", error)),
                    }
                }
            }
        }
    }

    fn import(&mut self, bundle: &Bundle) -> Result<(), Failure> {
        let begin = ImportBegin {
            bundle: *bundle.digest.as_bytes(),
            files: u32::try_from(bundle.files.len()).unwrap_or(u32::MAX),
            bytes: bundle.files.iter().map(|file| file.size).sum(),
        };
        self.ask(&Request::Import(Import::Begin(begin)), &[])?;
        for some in bundle.files.chunks(MAX_DESCRIPTORS) {
            let open = |file: &BundleFile| {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                openat2(bundle.directory(), file.path.as_str(), flags, Mode::empty(), ResolveFlags::BENEATH)
            };
            let opened: Vec<OwnedFd> =
                some.iter().map(open).collect::<Result<_, _>>().map_err(|error| failed("the bundle", error))?;
            let descriptors: Vec<BorrowedFd<'_>> = opened.iter().map(AsFd::as_fd).collect();
            let files = some.iter().map(|file| ImportFile {
                path: file.path.clone(),
                executable: file.executable,
                size: file.size,
                sha256: *file.sha256.as_bytes(),
            });
            self.ask(&Request::Import(Import::Files(files.collect())), &descriptors)?;
        }
        self.ask(&Request::Import(Import::Commit), &[]).map(drop)
    }
}
