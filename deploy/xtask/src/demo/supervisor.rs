//! The supervisor of a demo: started, asked through the `plugvisor` command as an operator would, and stopped.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::process::Process;

/// A running supervisor.
#[derive(Debug)]
pub(crate) struct Supervisor {
    binaries: PathBuf,
    socket: PathBuf,
    log: PathBuf,
    child: Child,
    stopped: bool,
}

impl Supervisor {
    /// Starts plugvisord and waits until it answers.
    ///
    /// # Errors
    /// When it ends or does not answer within a minute; the message holds what it logged.
    pub(crate) fn start(binaries: &Path, configuration: &Path, runtime: &Path, log: &Path) -> anyhow::Result<Self> {
        Self::start_with(binaries, configuration, runtime, log, None)
    }

    /// The same with a policy of its launcher's.
    ///
    /// # Errors
    /// As of [`Supervisor::start`].
    pub(crate) fn start_with(
        binaries: &Path,
        configuration: &Path,
        runtime: &Path,
        log: &Path,
        policy: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let output = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        let child = Command::new(binaries.join("plugvisord"))
            .arg("--config")
            .arg(configuration)
            .args(policy.into_iter().flat_map(|policy| [OsStr::new("--launcher-policy"), policy.as_os_str()]))
            .stdin(Stdio::null())
            .stdout(output.try_clone().context("cannot share the log")?)
            .stderr(output)
            // A group of its own: Ctrl-C in the terminal is for us, and we stop it in our order.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", binaries.join("plugvisord").display()))?;
        let mut supervisor = Self {
            binaries: binaries.to_path_buf(),
            socket: runtime.join("admin.sock"),
            log: log.to_path_buf(),
            child,
            stopped: false,
        };
        let deadline = Instant::now() + Duration::from_secs(60);
        let process = Process::open(supervisor.pid())?;
        while std::os::unix::net::UnixStream::connect(&supervisor.socket).is_err() {
            // No event tells when another program listens, so this asks again; the wait ends early when it dies.
            if process.ended_within(Duration::from_millis(20))? {
                let status = supervisor.child.wait().context("cannot wait for plugvisord")?;
                supervisor.stopped = true;
                bail!("plugvisord ended with {status} before it answered; it said:\n{}", supervisor.log_text());
            }
            if Instant::now() > deadline {
                bail!(
                    "plugvisord does not answer at {}; it said:\n{}",
                    supervisor.socket.display(),
                    supervisor.log_text()
                );
            }
        }
        Ok(supervisor)
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it logged.
    pub(crate) fn log_text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_else(|error| format!("(no log: {error})"))
    }

    /// A `plugvisor` command line for this supervisor.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.binaries.join("plugvisor"));
        command.arg("--socket").arg(&self.socket).args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs a command and returns its JSON. `degraded` (3) is an answer too.
    ///
    /// # Errors
    /// When it fails; the message is what it said.
    pub(crate) fn ask(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let output =
            self.command(arguments).args(["-o", "json"]).output().context("cannot start the plugvisor command")?;
        if !matches!(output.status.code(), Some(0 | 3)) {
            bail!("`plugvisor {}` failed: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
        }
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("`plugvisor {}` printed no JSON", arguments.join(" ")))
    }

    /// The status of one plugin.
    ///
    /// # Errors
    /// When the supervisor does not know it.
    pub(crate) fn plugin(&self, name: &str) -> anyhow::Result<Value> {
        let status = self.ask(&["status"])?;
        let plugins = status["plugins"].as_array().cloned().unwrap_or_default();
        plugins
            .into_iter()
            .find(|plugin| plugin["name"] == name)
            .with_context(|| format!("the supervisor knows no plugin {name}"))
    }

    /// Follows the events from the oldest that is kept.
    ///
    /// # Errors
    /// When the command cannot be started.
    pub(crate) fn follow_events(&self) -> anyhow::Result<EventStream> {
        EventStream::of(self.command(&["events", "--follow", "-o", "jsonl"]))
    }

    /// Sends SIGTERM and waits for the end.
    ///
    /// # Errors
    /// When it does not end within 40 seconds; it is killed then.
    pub(crate) fn stop(mut self) -> anyhow::Result<ExitStatus> {
        let process = Process::open(self.pid())?;
        self.signal(Signal::TERM)?;
        // A drain and the time between SIGTERM and the kill take at most 20 seconds.
        if !process.ended_within(Duration::from_secs(40))? {
            bail!("plugvisord did not end within 40 s of SIGTERM; it said:\n{}", self.log_text());
        }
        self.stopped = true;
        self.child.wait().context("cannot wait for plugvisord")
    }

    /// kill -9: it has no moment to end anything in order. What its launcher holds lives on if that lingers.
    ///
    /// # Errors
    /// When it has ended already.
    pub(crate) fn kill(mut self) -> anyhow::Result<()> {
        self.child.kill().context("cannot kill plugvisord")?;
        self.child.wait().context("cannot wait for plugvisord")?;
        self.stopped = true;
        Ok(())
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        // Our own child, not yet waited for: its pid is still its own.
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw).context("plugvisord has no pid")?;
        kill_process(pid, signal).context("cannot signal plugvisord")
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        if self.stopped {
            return;
        }
        // On the way out of a failure. Politely first: it takes its plugins with it.
        let ended =
            self.signal(Signal::TERM).and_then(|()| Process::open(self.pid())?.ended_within(Duration::from_secs(25)));
        if !ended.unwrap_or(false) {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

/// The events of a supervisor as they arrive, each with the moment when it was seen.
#[derive(Debug)]
pub(crate) struct EventStream {
    child: Child,
    events: Receiver<(Instant, Value)>,
    past: Vec<(Instant, Value)>,
}

impl EventStream {
    /// What this command prints, one event a line.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(crate) fn of(mut command: Command) -> anyhow::Result<Self> {
        let mut child = command.stdout(Stdio::piped()).spawn().context("cannot start the plugvisor command")?;
        let lines = BufReader::new(child.stdout.take().context("the command has no output")?);
        let (sender, events) = mpsc::channel();
        thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                let seen = Instant::now();
                let Ok(event) = serde_json::from_str(&line) else { continue };
                if sender.send((seen, event)).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, events, past: Vec::new() })
    }

    /// The first event, past or coming, that `wanted` accepts.
    ///
    /// # Errors
    /// When none comes in time; the message names the types of those that came.
    pub(crate) fn wait_for(
        &mut self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> anyhow::Result<(Instant, Value)> {
        if let Some(found) = self.past.iter().find(|(_, event)| wanted(event)) {
            return Ok(found.clone());
        }
        let deadline = Instant::now() + limit;
        loop {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(event) => {
                    self.past.push(event.clone());
                    if wanted(&event.1) {
                        return Ok(event);
                    }
                }
                Err(RecvTimeoutError::Timeout) => bail!("no event {what} within {limit:?}; seen: {}", self.types()),
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the stream of events ended before {what}; seen: {}", self.types())
                }
            }
        }
    }

    fn types(&self) -> String {
        let types = self.past.iter().map(|(_, event)| format!("{} {}", event["type"], event["subject"]));
        types.collect::<Vec<_>>().join(", ")
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether an event has this type, such as `plugin.exited`, and is about this plugin.
pub(crate) fn is_about(event: &Value, kind: &str, plugin: &str) -> bool {
    let full = format!("io.plugvisor.{kind}.v1");
    let subject = event["subject"].as_str().unwrap_or_default();
    event["type"] == full && subject.split('/').next() == Some(plugin)
}

/// Reads everything that an HTTP/1 server on this host answers to a GET.
///
/// # Errors
/// When nobody answers with status 200.
pub(crate) fn http_get(address: &str, path: &str) -> anyhow::Result<String> {
    use std::io::Write;

    let mut stream = std::net::TcpStream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).context("cannot set a time limit")?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").context("cannot ask")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).with_context(|| format!("http://{address}{path} does not end"))?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200") => Ok(body.to_owned()),
        _ => bail!("http://{address}{path} answered {:?}", answer.lines().next().unwrap_or_default()),
    }
}
