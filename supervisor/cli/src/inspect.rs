//! What plugvisord finds out without serving: its own answer about this host and about a configuration.
//!
//! The supervisor's program is asked, since only it knows how its configuration reads and how its launcher is started.

use std::ffi::OsStr;
use std::process::{Command, Stdio};

use prost::Message;

use crate::failure::{Failure, Outcome};

/// Asks the plugvisord beside this program. `what` is its hidden command, which answers with one message.
pub(crate) fn ask<M: Message + Default>(what: &str, config: Option<&OsStr>) -> Result<M, Failure> {
    let failed = |why: String| {
        Failure::new(Outcome::Failed, why, "plugvisor and plugvisord belong into one directory; install them together")
    };
    let own = std::env::current_exe().map_err(|error| failed(format!("cannot find my own path: {error}")))?;
    let program = own.with_file_name("plugvisord");
    let mut command = Command::new(&program);
    if let Some(file) = config {
        command.arg("--config").arg(file);
    }
    let output = command.arg(what).stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.map_err(|error| failed(format!("cannot start {}: {error}", program.display())))?;
    if !output.status.success() {
        return Err(failed(format!("{} {what} ended with {}", program.display(), output.status)));
    }
    M::decode(output.stdout.as_slice())
        .map_err(|error| failed(format!("{} is of another version: {error}", program.display())))
}
