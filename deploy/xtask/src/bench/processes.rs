//! The processes of a measurement: started, waited for, and ended by their own handles whatever happens.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::Context as _;

const PATIENCE: Duration = Duration::from_secs(10);

/// One process; killed and reaped when dropped.
#[derive(Debug)]
pub(super) struct Process {
    name: String,
    child: Child,
    input: Option<ChildStdin>,
    output: Option<BufReader<ChildStdout>>,
}

impl Process {
    /// Starts one of ours and waits until it says that it is ready.
    pub(super) fn ours(name: &str, command: &mut Command) -> anyhow::Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {name}: {command:?}"))?;
        let input = child.stdin.take();
        let output = child.stdout.take().map(BufReader::new);
        let mut process = Self { name: name.to_owned(), child, input, output };
        let line = process.read()?;
        anyhow::ensure!(line == "ready", "{name} said {line:?}");
        Ok(process)
    }

    /// Starts somebody else's server and waits until its socket accepts.
    pub(super) fn theirs(name: &str, command: &mut Command, socket: &Path) -> anyhow::Result<Self> {
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {name}: {command:?}"))?;
        let mut process = Self { name: name.to_owned(), child, input: None, output: None };
        let began = Instant::now();
        // A foreign server says nothing when it is ready, so its socket is tried.
        while UnixStream::connect(socket).is_err() {
            if let Some(status) = process.child.try_wait()? {
                anyhow::bail!("{name} ended at once: {status}");
            }
            anyhow::ensure!(began.elapsed() < PATIENCE, "{name} made no socket at {}", socket.display());
            sleep(Duration::from_millis(10));
        }
        Ok(process)
    }

    /// Sends a line and reads the line that answers it.
    pub(super) fn ask(&mut self, line: &str) -> anyhow::Result<String> {
        let input = self.input.as_mut().context("this process takes no orders")?;
        writeln!(input, "{line}").with_context(|| format!("{} takes no orders any more", self.name))?;
        self.read()
    }

    fn read(&mut self) -> anyhow::Result<String> {
        let output = self.output.as_mut().context("this process says nothing")?;
        let mut line = String::new();
        output.read_line(&mut line).with_context(|| format!("cannot read what {} says", self.name))?;
        anyhow::ensure!(line.ends_with('\n'), "{} ended", self.name);
        Ok(line.trim_end().to_owned())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Ours end with their input; the others, and ours that do not, are killed by their handle.
        self.input = None;
        let began = Instant::now();
        while self.output.is_some() && began.elapsed() < Duration::from_secs(2) {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            sleep(Duration::from_millis(5));
        }
        // An error means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
