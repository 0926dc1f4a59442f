//! A launcher and somebody who asks it for launches, without a supervisor: `bench spawn` measures one launch with it, from
//! outside. Never packaged.
//!
//! It starts the launcher, imports one program as a bundle, says `ready`, and then makes one launch for each level that it
//! reads. It answers with one line: `seen NANOSECONDS launcher NANOSECONDS ahead|nothing`, the first from just before the
//! request was sent to the moment that the program itself tells on its standard output, the second as the launcher counts;
//! or `refused` and why.

use std::{
    error::Error,
    fs::{self, File},
    io::{self, BufRead as _, Read as _, Write as _},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::PermissionsExt as _,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use plugvisor_package::{BundleFile, Digest, content_digest};
use plugvisor_sandbox::{
    codec::{self, FromLauncher},
    options::{BundleRoot, Options},
    protocol::{
        Control, Hello, Import, ImportBegin, ImportFile, Launch, LaunchId, Launched, Level, Limits, Notice, Reply,
        Request, Tier, VERSION,
    },
    seqpacket::{Received, Seqpacket},
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    time::{ClockId, clock_gettime},
};

type Fallible<T> = Result<T, Box<dyn Error>>;

const NAME: &str = "first-act";
const ENTRY: &str = "bin/first-act";
/// In canonical form, as the store keeps it.
const MANIFEST: &str = r#"{"name":"first-act","runtime":{"exec":"bin/first-act"},"version":"1.0.0"}"#;

fn main() -> Fallible<()> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(launcher), Some(program), Some(directory)) = (arguments.next(), arguments.next(), arguments.next())
    else {
        return Err("usage: launch-alone LAUNCHER PROGRAM DIRECTORY".into());
    };
    let mut asker = Asker::start(&launcher, &directory)?;
    let bundle = asker.import(&directory.join("bundles").join(NAME), &program)?;
    let mut output = io::stdout().lock();
    writeln!(output, "ready")?;
    for line in io::stdin().lock().lines() {
        let line = line?;
        let level = match line.as_str() {
            "none" => Level::None,
            "process" => Level::Process,
            "container" => Level::Container,
            "sandbox" => Level::Sandbox,
            "vm" => Level::Vm,
            other => return Err(format!("{other:?} is no level").into()),
        };
        writeln!(output, "{}", asker.launch(level, bundle)?)?;
    }
    Ok(())
}

/// The launcher and the connection to it. When the connection closes, it ends.
struct Asker {
    launcher: Child,
    connection: Option<Seqpacket>,
    last: u64,
}

impl Drop for Asker {
    fn drop(&mut self) {
        self.connection = None;
        // It ends by itself; its status is of no interest here.
        let _ = self.launcher.wait();
    }
}

impl Asker {
    fn start(launcher: &Path, directory: &Path) -> Fallible<Self> {
        let runtime = directory.join("launcher-run");
        fs::create_dir(&runtime)?;
        let bundles = directory.join("bundles");
        // There when the launcher starts, which looks for it then.
        fs::create_dir(&bundles)?;
        let (connection, other) = Seqpacket::pair()?;
        let mut options = Options::new(0, runtime, vec![BundleRoot { tier: Tier::Internal, path: bundles }]);
        options.cgroup_root = format!("plugvisor-bench-{}", std::process::id());
        let launcher =
            Command::new(launcher).args(options.to_args()).stdin(Stdio::from(OwnedFd::from(other))).spawn()?;
        let mut asker = Self { launcher, connection: Some(connection), last: 0 };
        match asker.ask(&Request::Hello(Hello { version: VERSION }), &[])?.0 {
            Reply::Hello { .. } => Ok(asker),
            other => Err(format!("the launcher said {other:?}").into()),
        }
    }

    /// Makes a bundle of the program and has it imported.
    fn import(&mut self, bundle: &Path, program: &Path) -> Fallible<[u8; 32]> {
        fs::create_dir_all(bundle.join("bin"))?;
        fs::copy(program, bundle.join(ENTRY))?;
        fs::write(bundle.join("plugin.json"), MANIFEST)?;
        // As the store keeps them, whatever the umask is.
        for (path, mode) in [("", 0o755), ("bin", 0o755), (ENTRY, 0o755), ("plugin.json", 0o644)] {
            fs::set_permissions(bundle.join(path), fs::Permissions::from_mode(mode))?;
        }
        let mut files = Vec::new();
        for (path, executable) in [(ENTRY, true), ("plugin.json", false)] {
            let bytes = fs::read(bundle.join(path))?;
            let size = bytes.len().try_into()?;
            files.push(BundleFile { path: path.to_owned(), executable, size, sha256: Digest::of(&bytes) });
        }
        let digest = *content_digest(&files).as_bytes();
        let begin = ImportBegin {
            bundle: digest,
            files: files.len().try_into()?,
            bytes: files.iter().map(|file| file.size).sum(),
        };
        let opened = files.iter().map(|file| File::open(bundle.join(&file.path))).collect::<Result<Vec<_>, _>>()?;
        let descriptors: Vec<BorrowedFd<'_>> = opened.iter().map(AsFd::as_fd).collect();
        let files = files.into_iter().map(|file| ImportFile {
            path: file.path,
            executable: file.executable,
            size: file.size,
            sha256: *file.sha256.as_bytes(),
        });
        for (step, descriptors) in [
            (Import::Begin(begin), &[][..]),
            (Import::Files(files.collect()), &descriptors[..]),
            (Import::Commit, &[][..]),
        ] {
            match self.ask(&Request::Import(step), descriptors)?.0 {
                Reply::Done | Reply::Imported(_) => {}
                other => return Err(format!("the import ended with {other:?}").into()),
            }
        }
        Ok(digest)
    }

    /// Launches the program and waits for its end.
    fn launch(&mut self, level: Level, bundle: [u8; 32]) -> Fallible<String> {
        let request = Request::Launch(Box::new(Launch {
            plugin: NAME.to_owned(),
            generation: 1,
            level,
            bundle,
            tier: Tier::Untrusted,
            approval: None,
            limits: Limits {
                memory_bytes: Some(256 << 20),
                cpu_percent: Some(100),
                pids: Some(64),
                file_size_bytes: None,
                open_files: None,
            },
            grants: Vec::new(),
            environment: Vec::new(),
            inward: 0,
            allow_degraded: Control::ALL.to_vec(),
        }));
        let began = clock_gettime(ClockId::Monotonic);
        let (reply, descriptors) = self.ask(&request, &[])?;
        let launched = match reply {
            Reply::Launched(launched) => launched,
            Reply::Refused(refusal) => return Ok(format!("refused {}", refusal.message.replace('\n', " "))),
            other => return Err(format!("the launch ended with {other:?}").into()),
        };
        // The fourth is its standard output. It does not block.
        let mut output = File::from(descriptors.into_iter().nth(3).ok_or("the launch came without its output")?);
        let mut told = [0; 8];
        poll(&mut [PollFd::new(&output, PollFlags::IN)], None)?;
        output.read_exact(&mut told)?;
        self.await_end(launched.launch)?;
        let began = u64::try_from(began.tv_sec)? * 1_000_000_000 + u64::try_from(began.tv_nsec)?;
        let seen = u64::from_ne_bytes(told).saturating_sub(began);
        Ok(format!("seen {seen} launcher {} {}", launched.launch_exec_nanos, beginning(&launched)))
    }

    fn ask(&mut self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Fallible<(Reply, Vec<OwnedFd>)> {
        self.last += 1;
        let packet = codec::encode_request(self.last, request)?;
        self.connection()?.try_send(&packet, descriptors)?;
        loop {
            if let (FromLauncher::Reply { id, reply }, descriptors) = self.receive()?
                && id == self.last
            {
                return Ok((reply, descriptors));
            }
        }
    }

    fn await_end(&self, of: LaunchId) -> Fallible<()> {
        loop {
            if let (FromLauncher::Notice(Notice::Exited { launch, .. }), _) = self.receive()?
                && launch == of
            {
                return Ok(());
            }
        }
    }

    fn receive(&self) -> Fallible<(FromLauncher, Vec<OwnedFd>)> {
        let connection = self.connection()?;
        loop {
            match connection.try_recv() {
                Ok(Received::Packet(packet)) => {
                    return Ok((codec::decode_from_launcher(&packet.bytes)?, packet.descriptors));
                }
                Ok(Received::Closed | Received::Truncated(_)) => return Err("the launcher is gone".into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    poll(&mut [PollFd::new(&connection.as_fd(), PollFlags::IN)], None)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn connection(&self) -> Fallible<&Seqpacket> {
        self.connection.as_ref().ok_or_else(|| "the launcher is gone".into())
    }
}

/// Whether the launch had a child made ahead: that one is in its cgroups already.
fn beginning(launched: &Launched) -> &'static str {
    if launched.parts.iter().any(|(part, _)| part == "join") { "nothing" } else { "ahead" }
}
