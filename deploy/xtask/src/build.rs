//! Where the workspace and its target directory are, and how its binaries are built.
//!
//! Every build here selects the whole workspace: the features of shared dependencies are then the same in each, and each
//! dependency is compiled once per profile.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

use crate::steps;

/// A cargo profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Profile {
    /// Quick to build.
    Dev,
    /// Optimised, as it is shipped.
    Release,
}

impl Profile {
    const fn directory(self) -> &'static str {
        match self {
            Self::Dev => "debug",
            Self::Release => "release",
        }
    }
}

/// The workspace's root directory.
pub(crate) fn workspace_root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.ancestors().nth(2).expect("xtask lives two directories below the root").to_path_buf()
}

/// The target directory of the cargo that runs us.
///
/// # Errors
/// When our own path cannot be read.
pub(crate) fn target_directory() -> anyhow::Result<PathBuf> {
    // We are <target>/<profile>/xtask, wherever CARGO_TARGET_DIR or a configuration file put it.
    let own = std::env::current_exe().context("cannot read the path of the running xtask")?;
    own.ancestors().nth(2).map(Path::to_path_buf).with_context(|| format!("{} has no target directory", own.display()))
}

/// `cargo`, the one that runs us, in the workspace's root.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace_root());
    command
}

/// Builds every binary of the workspace and returns the directory that holds them.
///
/// # Errors
/// When the build fails.
pub(crate) fn binaries(profile: Profile) -> anyhow::Result<PathBuf> {
    let mut build = cargo();
    build.args(["build", "--locked", "--workspace", "--bins"]);
    if profile == Profile::Release {
        build.arg("--release");
    }
    steps::run(&mut build)?;
    Ok(target_directory()?.join(profile.directory()))
}
