//! `plugvisor plugin trace`: runs a bundle's program with what its level would refuse recorded, and says what its manifest must
//! ask for.
//!
//! One thread answers the program's system calls (`plugvisor_sandbox::trace`), one hands on what it prints, one waits for its
//! end; this one asks it what a supervisor would, and waits for what ends the trace.

mod plugin;
mod report;
mod session;

use std::{
    fs::File,
    io::Read as _,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use plugvisor_package::{Bundle, BundleError, BundleLimits, IsolationLevel, Manifest};
use plugvisor_sandbox::{
    protocol::Level,
    trace::{Book, Seen, Survival, propose, rules_file, watch},
    worker_socket,
};
use rustix::event::{PollFd, PollFlags, poll};
use tokio::{process::Command, sync::oneshot};

use crate::{
    args::TraceArgs,
    failure::{Failure, Outcome},
    output::Output,
    text::clean,
};

/// How long the program has to end when it is told to, as with a supervisor.
const GRACE: Duration = Duration::from_secs(10);

/// Traces, and prints what came of it.
pub(crate) fn trace(output: &Output, arguments: &TraceArgs) -> Result<(), Failure> {
    let bundle = open(&arguments.bundle)?;
    // Before anything runs: it may not be possible to write it later.
    let policy = arguments.policy.as_deref().map(create).transpose()?;
    let level = level(&bundle.manifest);
    let book = Arc::new(Book::of_this_build().map_err(|why| {
        Failure::new(Outcome::Failed, format!("the rules in this program are broken: {why}"), "reinstall it")
    })?);
    let name = bundle.manifest.name.to_string();
    eprintln!(
        "{name} runs with WEAKER WALLS while it is traced: those of {}, where it may fork, signal, open TCP sockets and write /tmp \
         unasked; trace what you would also run",
        session::traced_at(level).as_str()
    );
    let mut watcher: Option<JoinHandle<std::io::Result<Seen>>> = None;
    let session = session::start(&bundle, level, |listener| {
        let book = Arc::clone(&book);
        watcher = Some(std::thread::spawn(move || watch(&listener, &book)));
    })?;
    let readers: Vec<JoinHandle<()>> = session
        .outputs
        .iter()
        .filter_map(|pipe| pipe.try_clone().ok())
        .map(|pipe| {
            let name = session.plugin.clone();
            std::thread::spawn(move || hand_on(&name, pipe))
        })
        .collect();
    let ended = follow(&bundle.manifest, &session, arguments);
    // Every process is gone when the launcher is, and with them who makes calls.
    session.end()?;
    for reader in readers {
        // It has nothing to say.
        let _ = reader.join();
    }
    let Followed { ended, driver, served } = ended?;
    let seen = match watcher.map(JoinHandle::join) {
        Some(Ok(Ok(seen))) => seen,
        Some(Ok(Err(error))) => return Err(broken(&name, &error)),
        Some(Err(_)) | None => return Err(broken(&name, &"the launcher handed over no listener")),
    };
    let capabilities = &bundle.manifest.security.capabilities;
    if let Some((mut file, path)) = policy {
        use std::io::Write as _;
        file.write_all(rules_file(&seen, &book, &name).as_bytes()).map_err(|error| unwritten(path, &error))?;
    }
    let driven = driver.is_none_or(|status| status.success());
    let survival = if served == Served::Yes && driven { Survival::ToTheEnd } else { Survival::Unknown };
    let proposal = propose(&seen, &book, level, capabilities, survival);
    let subject =
        report::Subject { name: &name, level, capabilities, ended: &ended, policy: arguments.policy.as_deref() };
    report::print(output, &subject, &seen, &proposal)?;
    if served == Served::Never {
        return Err(Failure::new(
            Outcome::Failed,
            format!("{name} ended before it served: {ended}"),
            "what it does when it serves is not in the trace; see what it printed, mend it and trace again",
        ));
    }
    match driver {
        Some(status) if !status.success() => Err(Failure::new(
            Outcome::Failed,
            format!("the trace ended with its driver, which ended with {status}"),
            "what it did not drive is not in the trace; correct it and trace again",
        )),
        Some(_) | None => Ok(()),
    }
}

fn broken(plugin: &str, why: &dyn std::fmt::Display) -> Failure {
    Failure::new(
        Outcome::Failed,
        format!("the trace of {plugin} broke off: {why}"),
        "another seccomp listener may be on this host's programs, as with some container managers; trace outside of it",
    )
}

fn open(path: &Path) -> Result<Bundle, Failure> {
    Bundle::open(path, &BundleLimits::default()).map_err(|error| {
        let hint = match &error {
            BundleError::Io { .. } => "give the path of a bundle directory".to_owned(),
            BundleError::Manifest { .. } => {
                format!("`plugvisor plugin validate {}` lists every problem", path.display())
            }
            other => other.hint(),
        };
        let outcome = match &error {
            BundleError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => Outcome::NotFound,
            BundleError::Io { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => Outcome::Denied,
            _ => Outcome::Failed,
        };
        Failure::new(outcome, format!("{} cannot be traced: {error}", path.display()), hint)
    })
}

fn create(path: &Path) -> Result<(File, &Path), Failure> {
    File::create(path).map(|file| (file, path)).map_err(|error| unwritten(path, &error))
}

fn unwritten(path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(
        Outcome::Failed,
        format!("{} cannot be written: {error}", path.display()),
        "name another file with --policy",
    )
}

/// The weakest level that the manifest accepts.
fn level(manifest: &Manifest) -> Level {
    let sandbox = &manifest.security.sandbox;
    let stated = sandbox.isolation_level.unwrap_or(IsolationLevel::Process);
    if sandbox.enabled { stated.into() } else { Level::None }
}

/// How a trace went.
struct Followed {
    /// Why it ended.
    ended: String,
    /// How the driver did, when that was why.
    driver: Option<ExitStatus>,
    served: Served,
}

/// Whether the plugin came to serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Served {
    /// It did, until others ended the trace.
    Yes,
    /// It did, and then ended by itself.
    Once,
    /// The trace ended otherwise before that was known.
    Unknown,
    /// It ended before.
    Never,
}

/// Asks the plugin what a supervisor asks, runs the driver, and waits for the end of the trace.
fn follow(manifest: &Manifest, session: &session::Session, arguments: &TraceArgs) -> Result<Followed, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| {
        Failure::new(Outcome::Failed, format!("cannot start: {error}"), "is the system out of descriptors?")
    })?;
    let (told, mut end) = oneshot::channel();
    let (connection, launch) = (Arc::clone(&session.connection), session.launched.launch);
    let waiter = std::thread::spawn(move || {
        // Nobody listens any more when the trace has ended otherwise.
        let _ = told.send(session::await_end(&connection, launch));
    });
    let followed = runtime.block_on(async {
        let mut driver = None;
        // Open until the driver has ended, which has only its path.
        let mut worker = None;
        let greeting = async {
            let socket = worker.insert(plugin::socket(&session.worker, manifest).await?);
            let path = PathBuf::from(worker_socket::path_of(socket, Some(std::process::id())));
            Ok::<_, String>((plugin::greet(&path, manifest).await, path))
        };
        tokio::pin!(greeting);
        let (mut greeted, mut served) = (false, Served::Unknown);
        let deadline = async {
            match arguments.time {
                Some(time) => tokio::time::sleep(time).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(deadline);
        let ended = loop {
            let driven = async {
                match &mut driver {
                    Some(driver) => tokio::process::Child::wait(driver).await,
                    None => std::future::pending().await,
                }
            };
            // Each may be dropped: what it waits for is still there the next time.
            tokio::select! {
                // What comes first of two that are ready is of no interest.
                end = &mut end => {
                    served = match served {
                        Served::Yes | Served::Once => Served::Once,
                        Served::Unknown | Served::Never => Served::Never,
                    };
                    break Ok((end.ok().flatten().unwrap_or_else(|| "its launcher ended".to_owned()), None));
                }
                greeting = &mut greeting, if !greeted => {
                    greeted = true;
                    let (why, path) = match greeting {
                        Ok((Ok(()), path)) => (None, Some(path)),
                        Ok((Err(why), path)) => (Some(why), Some(path)),
                        Err(why) => (Some(why), None),
                    };
                    match why {
                        None => {
                            served = Served::Yes;
                            eprintln!("{} serves", session.plugin);
                        }
                        Some(why) => eprintln!("{} does not serve: {}", session.plugin, clean(&why)),
                    }
                    // Without a socket there is nothing to drive.
                    if let Some(path) = path.filter(|_| !arguments.driver.is_empty()) {
                        driver = match start_driver(&arguments.driver, &path) {
                            Ok(driver) => Some(driver),
                            Err(failure) => break Err(failure),
                        };
                    }
                }
                status = driven => match status {
                    Ok(status) => break Ok(("its driver ended".to_owned(), Some(status))),
                    Err(error) => break Err(Failure::new(
                        Outcome::Failed, format!("the end of the driver cannot be waited for: {error}"), "")),
                },
                () = &mut deadline => break Ok(("its time was over".to_owned(), None)),
                _ = tokio::signal::ctrl_c() => break Ok(("you ended it".to_owned(), None)),
            }
        };
        // Its own end is a part of what it does.
        session.signal(rustix::process::Signal::TERM.as_raw());
        let _ = tokio::time::timeout(GRACE, async {
            if let Err(oneshot::error::TryRecvError::Empty) = end.try_recv() {
                let _ = end.await;
            }
        })
        .await;
        ended.map(|(ended, driver)| Followed { ended, driver, served })
    });
    drop(waiter);
    followed
}

fn start_driver(command: &[std::ffi::OsString], worker: &Path) -> Result<tokio::process::Child, Failure> {
    let Some((program, arguments)) = command.split_first() else {
        return Err(Failure::new(Outcome::Usage, "there is no driver", "write it behind --"));
    };
    let wrong = |error: std::io::Error| {
        Failure::new(
            Outcome::Failed,
            format!("the driver {} cannot be started: {error}", program.display()),
            "write a command behind --, such as -- grpcurl ...",
        )
    };
    // Standard output is the report's.
    let stdout = std::io::stderr().as_fd().try_clone_to_owned().map_err(wrong)?;
    let mut driver = Command::new(program);
    driver.args(arguments).env("PLUGVISOR_WORKER", worker).stdout(Stdio::from(stdout)).kill_on_drop(true);
    driver.spawn().map_err(wrong)
}

/// Writes what a plugin prints to standard error, until nobody can print any more.
fn hand_on(plugin: &str, pipe: OwnedFd) {
    let mut pipe = File::from(pipe);
    let (mut bytes, mut line) = ([0; 4096], Vec::new());
    let say = |line: &[u8]| eprintln!("{plugin} | {}", clean(&String::from_utf8_lossy(line)));
    loop {
        match pipe.read(&mut bytes) {
            Ok(0) => break,
            Ok(read) => {
                for byte in &bytes[..read] {
                    if *byte == b'\n' || line.len() >= 4096 {
                        say(&line);
                        line.clear();
                    }
                    if *byte != b'\n' {
                        line.push(*byte);
                    }
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                let mut fds = [PollFd::new(&pipe, PollFlags::IN)];
                if poll(&mut fds, None).is_err_and(|errno| errno != rustix::io::Errno::INTR) {
                    break;
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    if !line.is_empty() {
        say(&line);
    }
}

/// A file of the golden outputs, for tests.
#[cfg(test)]
fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

#[cfg(test)]
fn hold(name: &str, actual: &str) {
    if std::env::var_os("PLUGVISOR_BLESS").is_some() {
        std::fs::write(golden(name), actual).expect("the golden file");
    }
    let expected = std::fs::read_to_string(golden(name)).unwrap_or_default();
    assert!(expected == actual, "{name} differs\n--- expected\n{expected}\n--- actual\n{actual}");
}
