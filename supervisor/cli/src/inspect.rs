//! What plugvisord finds out without serving: its own answer about this host and about a configuration.
//!
//! The supervisor's program is asked, since only it knows how its configuration reads and how its launcher is started.

use std::path::Path;
use std::process::{Command, Stdio};

use prost::Message;

use crate::failure::{Failure, Outcome};

/// Flags of plugvisord that name files, as far as they are given.
pub(crate) type Files<'a> = &'a [(&'a str, Option<&'a Path>)];

/// Asks the plugvisord beside this program. `what` is its hidden command, which answers with one message.
pub(crate) fn ask<M: Message + Default>(what: &str, files: Files<'_>) -> Result<M, Failure> {
    let failed = |why: String| {
        Failure::new(Outcome::Failed, why, "plugvisor and plugvisord belong into one directory; install them together")
    };
    let own = std::env::current_exe().map_err(|error| failed(format!("cannot find my own path: {error}")))?;
    let program = own.with_file_name("plugvisord");
    let mut command = Command::new(&program);
    for (flag, file) in files.iter().filter_map(|(flag, file)| Some((flag, (*file)?))) {
        command.arg(flag).arg(file);
    }
    let output = command.arg(what).stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.map_err(|error| failed(format!("cannot start {}: {error}", program.display())))?;
    if !output.status.success() {
        return Err(failed(format!("{} {what} ended with {}", program.display(), output.status)));
    }
    M::decode(output.stdout.as_slice())
        .map_err(|error| failed(format!("{} is of another version: {error}", program.display())))
}
