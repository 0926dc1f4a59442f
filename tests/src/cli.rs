//! The command line tool, run as an operator would.

use std::{path::Path, process::Stdio, time::Duration};

use anyhow::Context;
use tokio::process::Command;

/// The longest that a command may take. Its own limits are below it, so that what it says of them is seen.
const LONGEST: Duration = Duration::from_secs(180);

/// What a command printed and how it ended.
#[derive(Clone, Debug)]
pub struct CliOutput {
    /// The exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl CliOutput {
    /// Standard output as one JSON document.
    ///
    /// # Errors
    /// When it is not JSON.
    pub fn json(&self) -> anyhow::Result<serde_json::Value> {
        serde_json::from_str(&self.stdout).with_context(|| format!("not JSON: {self:?}"))
    }
}

/// Runs the tool with these arguments against this admin socket.
pub(crate) async fn run(program: &Path, socket: &Path, arguments: &[&str]) -> anyhow::Result<CliOutput> {
    let running = Command::new(program)
        .arg("--socket")
        .arg(socket)
        .args(arguments)
        // Its usual limits are for people; a machine that stands still for some seconds is not what a test is about.
        .args(if arguments.contains(&"--timeout") { &[][..] } else { &["--timeout", "120s"] })
        .env_clear()
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(crate::stretched(LONGEST), running)
        .await
        .with_context(|| format!("`plugvisor {}` did not end in {LONGEST:?}", arguments.join(" ")))?
        .with_context(|| format!("cannot start {}", program.display()))?;
    Ok(CliOutput {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
