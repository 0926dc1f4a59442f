//! systemd as an administrator sees it: units, their properties, and the journal as it is written.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::Value;

/// `MESSAGE_ID` of what PID 1 writes when a unit's start job is done (sd-messages.h, `SD_MESSAGE_UNIT_STARTED`).
pub(super) const STARTED: &str = "39f53479d3a045ac8e11786248231fbf";

/// The same for a stop (`SD_MESSAGE_UNIT_STOPPED`).
pub(super) const STOPPED: &str = "9d1aaa27d60140bd96365438aad20286";

/// Runs a command and returns what it printed.
///
/// # Errors
/// When it fails; the message is what it said.
pub(super) fn output(command: &mut Command) -> anyhow::Result<String> {
    let line = format!("{command:?}").replace('"', "");
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start `{line}`"))?;
    if !output.status.success() {
        let said = [output.stderr, output.stdout].map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned());
        bail!("`{line}` ended with {}: {}", output.status, said.join(" "));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs systemctl and waits until it is done, which for a start is until the units are ready.
///
/// # Errors
/// When it fails.
pub(super) fn systemctl(arguments: &[&str]) -> anyhow::Result<String> {
    output(Command::new("systemctl").args(arguments))
}

/// What our units said last.
pub(super) fn journal() -> String {
    let units = ["--unit=plugvisor-launcher.service", "--unit=plugvisor.service"];
    let text =
        output(Command::new("journalctl").args(["--no-pager", "--output=short-monotonic", "--lines=60"]).args(units));
    text.unwrap_or_else(|error| format!("(no journal: {error:#})"))
}

/// A property of a unit.
///
/// # Errors
/// When systemd does not answer.
pub(super) fn property(unit: &str, name: &str) -> anyhow::Result<String> {
    Ok(systemctl(&["show", "--value", "--property", name, unit])?.trim().to_owned())
}

/// The journal from one moment on.
#[derive(Debug)]
pub(super) struct Journal {
    reader: Child,
    entries: Receiver<Value>,
}

/// A place in the journal.
#[derive(Debug)]
pub(super) struct Mark(String);

impl Mark {
    /// Everything that is written from here on comes after it.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub(super) fn now() -> anyhow::Result<Self> {
        // The cursor of the last entry; PID 1 has written some by now.
        let text = output(Command::new("journalctl").args(["--lines=1", "--output=json", "--no-pager"]))?;
        let entry: Value = serde_json::from_str(text.trim()).context("the journal is not JSON")?;
        Ok(Self(entry["__CURSOR"].as_str().context("an entry without a cursor")?.to_owned()))
    }

    /// What is written about these units after it, as it comes.
    ///
    /// # Errors
    /// When the journal cannot be read.
    pub(super) fn follow(&self, unit: &str) -> anyhow::Result<Journal> {
        let mut reader = Command::new("journalctl")
            .args(["--follow", "--output=json", "--no-tail", "--unit", unit, "--after-cursor", &self.0])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start journalctl")?;
        let lines = BufReader::new(reader.stdout.take().context("journalctl has no standard output")?);
        let (sender, entries) = mpsc::channel();
        thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                if serde_json::from_str(&line).is_ok_and(|entry| sender.send(entry).is_err()) {
                    break;
                }
            }
        });
        Ok(Journal { reader, entries })
    }
}

impl Journal {
    /// Waits for an entry.
    ///
    /// # Errors
    /// When it does not come in time; the message has what came.
    pub(super) fn wait(&self, what: &str, longest: Duration, wanted: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
        let deadline = Instant::now() + longest;
        let mut seen = Vec::new();
        loop {
            match self.entries.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(entry) if wanted(&entry) => return Ok(entry),
                Ok(entry) => seen.push(entry["MESSAGE"].as_str().unwrap_or_default().to_owned()),
                Err(RecvTimeoutError::Timeout) => {
                    bail!("the journal says not within {longest:?} that {what}; it says:\n{}", seen.join("\n"))
                }
                Err(RecvTimeoutError::Disconnected) => bail!("the journal ended before it said that {what}"),
            }
        }
    }

    /// Waits until a start of the unit is done.
    ///
    /// # Errors
    /// As [`Journal::wait`].
    pub(super) fn started(&self, longest: Duration) -> anyhow::Result<()> {
        self.wait("the unit was started", longest, |entry| entry["MESSAGE_ID"] == STARTED).map(drop)
    }

    /// Waits until a stop of the unit is done.
    ///
    /// # Errors
    /// As [`Journal::wait`].
    pub(super) fn stopped(&self, longest: Duration) -> anyhow::Result<()> {
        self.wait("the unit was stopped", longest, |entry| entry["MESSAGE_ID"] == STOPPED).map(drop)
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        let _ = self.reader.kill();
        let _ = self.reader.wait();
    }
}
