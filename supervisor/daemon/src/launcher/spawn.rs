//! Starting the launcher as a child, in the embedded default.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    path::{Path, PathBuf},
    process::{Child, Stdio},
};

use plugvisor_sandbox::{options::Options, seqpacket::Seqpacket};

/// The launcher's name, looked for beside this program.
pub const PROGRAM: &str = "plugvisor-launcher";

/// A launcher that runs and was not asked anything yet.
#[derive(Debug)]
pub struct Spawned {
    /// The process, for its exit status. It ends when `connection` closes.
    pub child: Child,
    /// This side of the connection.
    pub connection: Seqpacket,
}

/// Why the launcher did not start.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// No program there.
    #[error("the launcher {} cannot be started: {source}; build it with `cargo build --workspace`, or name it with --launcher PATH", program.display())]
    Program {
        /// Where it was expected.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No socket pair.
    #[error("no connection to the launcher could be made: {0}; check the limit on open files")]
    Socket(#[source] io::Error),
}

/// The launcher that belongs to this program: the one beside it.
pub fn beside_this_program() -> Result<PathBuf, SpawnError> {
    let this = std::env::current_exe().map_err(|source| SpawnError::Program { program: PROGRAM.into(), source })?;
    Ok(this.with_file_name(PROGRAM))
}

/// Starts the launcher with the policy in `options`, which must name `runtime_directory` and the bundle roots; the
/// connection's descriptor is filled in here. What the launcher has to say goes to `words`.
///
/// Must be called while the process has one thread: for a moment the descriptor is inheritable.
pub fn spawn(program: &Path, words: Stdio, options: impl FnOnce(i32) -> Options) -> Result<Spawned, SpawnError> {
    let (ours, theirs) = Seqpacket::pair().map_err(SpawnError::Socket)?;
    let child = options(theirs.as_raw_fd())
        .spawn(program, &[theirs.as_fd()], words)
        .map_err(|source| SpawnError::Program { program: program.to_owned(), source })?;
    // `theirs` closes here, so that the launcher's end has one owner.
    Ok(Spawned { child, connection: ours })
}
