//! Where the workspace and its target directory are, and how its binaries are built.
//!
//! Every build here selects the whole workspace: the features of shared dependencies are then the same in each, and each
//! dependency is compiled once per profile.

use std::fs;
use std::os::unix::fs::PermissionsExt;
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
    /// Its directory below the target directory.
    pub(crate) const fn directory(self) -> &'static str {
        match self {
            Self::Dev => "debug",
            Self::Release => "release",
        }
    }
}

/// The workspace's root directory: that of the cargo that runs us, which may be another clone than the one that we were
/// built in when the two share a target directory. Without cargo it is the latter.
pub(crate) fn workspace_root() -> PathBuf {
    let running =
        std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from).filter(|path| path.ends_with("deploy/xtask"));
    let manifest = running.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")));
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
    build.args(["build", "--locked", "--workspace", "--all-features", "--bins"]);
    if profile == Profile::Release {
        build.arg("--release");
    }
    steps::run(&mut build)?;
    Ok(target_directory()?.join(profile.directory()))
}

/// Where the checked-in part of the example plugins' bundles is, below the workspace's root.
pub(crate) const BUNDLES: &str = "worker-sdk/examples/bundles";

/// Builds the binaries that the benchmarks start and returns the directory that holds them.
///
/// # Errors
/// When the build fails.
pub(crate) fn bench_binaries(profile: Profile) -> anyhow::Result<PathBuf> {
    let mut build = cargo();
    build.args(["build", "--locked", "--workspace", "--all-features"]);
    build.args(["--bin", "xtask", "--bin", "broker-alone", "--bin", "egress-alone"]);
    if profile == Profile::Release {
        build.arg("--release");
    }
    steps::run(&mut build)?;
    Ok(target_directory()?.join(profile.directory()))
}

/// Puts the example plugins' bundles into `into`, one directory each.
///
/// # Errors
/// When a plugin is not in `binaries`, or a file cannot be copied.
pub(crate) fn bundle_examples(root: &Path, binaries: &Path, into: &Path) -> anyhow::Result<()> {
    let sources = root.join(BUNDLES);
    for entry in fs::read_dir(&sources).with_context(|| format!("cannot read {}", sources.display()))? {
        let source = entry.with_context(|| format!("cannot read {}", sources.display()))?.path();
        if let Some(name) = source.file_name().filter(|_| source.is_dir()) {
            bundle(&source, &binaries.join(name), &into.join(name))
                .with_context(|| format!("cannot bundle {}", name.to_string_lossy()))?;
        }
    }
    Ok(())
}

/// A bundle is the checked-in files, the program, and the descriptor set that the program prints.
///
/// # Errors
/// When `program` does not run, or a file cannot be copied.
pub(crate) fn bundle(source: &Path, program: &Path, into: &Path) -> anyhow::Result<()> {
    let name = source.file_name().context("the bundle has no name")?;
    let binaries = into.join("bin");
    fs::create_dir_all(&binaries).with_context(|| format!("cannot make {}", binaries.display()))?;
    for directory in [into, &binaries] {
        mode(directory, 0o755)?;
    }
    for entry in fs::read_dir(source).with_context(|| format!("cannot read {}", source.display()))? {
        let file = entry.with_context(|| format!("cannot read {}", source.display()))?.path();
        copy(&file, &into.join(file.file_name().unwrap_or_default()), 0o644)?;
    }
    copy(program, &binaries.join(name), 0o755)?;
    let output = Command::new(program)
        .arg("--descriptor-set")
        .output()
        .with_context(|| format!("cannot start {}", program.display()))?;
    if !output.status.success() || output.stdout.is_empty() {
        anyhow::bail!(
            "`{} --descriptor-set` ended with {} and printed nothing of use",
            program.display(),
            output.status
        );
    }
    let descriptors = into.join("descriptor.binpb");
    fs::write(&descriptors, output.stdout).with_context(|| format!("cannot write {}", descriptors.display()))?;
    mode(&descriptors, 0o644)
}

/// A bundle once more. Its program is the same file: a benchmark of many plugins needs no copies of it.
///
/// # Errors
/// When `bundle` cannot be read or `into` not be written.
pub(crate) fn copy_bundle(bundle: &Path, into: &Path) -> anyhow::Result<()> {
    let binaries = into.join("bin");
    fs::create_dir_all(&binaries).with_context(|| format!("cannot make {}", binaries.display()))?;
    for directory in [into, &binaries] {
        mode(directory, 0o755)?;
    }
    for name in ["plugin.json", "descriptor.binpb"] {
        copy(&bundle.join(name), &into.join(name), 0o644)?;
    }
    for entry in fs::read_dir(bundle.join("bin")).context("the bundle has no programs")? {
        let program = entry.context("cannot read the bundle's programs")?;
        let link = binaries.join(program.file_name());
        fs::hard_link(program.path(), &link).with_context(|| format!("cannot make {}", link.display()))?;
    }
    Ok(())
}

fn copy(from: &Path, to: &Path, permissions: u32) -> anyhow::Result<()> {
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    mode(to, permissions)
}

/// Whatever our umask is: a plugin's own user reads these.
fn mode(path: &Path, permissions: u32) -> anyhow::Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(permissions))
        .with_context(|| format!("cannot set the permissions of {}", path.display()))
}
