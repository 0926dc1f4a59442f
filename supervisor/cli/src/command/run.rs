//! `plugvisor run`: becomes plugvisord, the one beside this program.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::failure::{Failure, Outcome};

/// Replaces this process by plugvisord; returns only when that fails.
pub(crate) fn run(arguments: &[OsString]) -> Failure {
    let own = match std::env::current_exe() {
        Ok(own) => own,
        Err(error) => {
            return Failure::new(
                Outcome::Failed,
                format!("cannot find my own path: {error}"),
                "start plugvisord itself",
            );
        }
    };
    let daemon = own.with_file_name("plugvisord");
    // As it was called, so that its help and its errors name what to write.
    let error = Command::new(&daemon).arg0("plugvisor run").args(arguments).exec();
    let hint = match error.kind() {
        io::ErrorKind::NotFound => "plugvisor and plugvisord belong into one directory; install them together",
        _ => "check the file's permissions and that it is made for this machine",
    };
    Failure::new(Outcome::Failed, format!("cannot start {}: {error}", daemon.display()), hint)
}
