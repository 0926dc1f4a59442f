//! Where the built binaries are. Builds nothing itself.

use std::{
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};

/// The binaries beside the running test program.
#[derive(Clone, Debug)]
pub struct Binaries {
    directory: PathBuf,
}

impl Binaries {
    /// Finds the directory of the profile that the running program was built with: `target/<profile>`, for a test in
    /// `target/<profile>/deps` and for a program in the directory itself.
    ///
    /// # Errors
    /// When the path of the running program cannot be read.
    pub fn find() -> anyhow::Result<Self> {
        let own = std::env::current_exe().context("cannot read the path of the running program")?;
        let mut directory = own.parent().with_context(|| format!("{} has no directory", own.display()))?;
        if directory.ends_with("deps") {
            directory = directory.parent().with_context(|| format!("{} has no directory", directory.display()))?;
        }
        Ok(Self { directory: directory.to_path_buf() })
    }

    /// The binary's path.
    ///
    /// # Errors
    /// When it was not built; the message names the command that builds it.
    pub fn path(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.directory.join(name);
        if !path.is_file() {
            bail!(
                "{name} is not built: {} does not exist; run `cargo xtask test`, or `cargo build --workspace` and the \
                 test again",
                path.display()
            );
        }
        Ok(path)
    }
}

/// Puts the file at `from` under the name `to` as well, or copies it when they are on different file systems.
///
/// The copy is made by a process of its own. A descriptor that is open for writing here would be inherited by whatever
/// another test forks at that moment, and executing the copy would be ETXTBSY until that child has executed itself.
pub(crate) fn place(from: &Path, to: &Path) -> anyhow::Result<()> {
    // A link has the owner and the mode of what was built, and to root's launcher a bundle is root's alone.
    let built = std::fs::metadata(from).with_context(|| format!("cannot look at {}", from.display()))?;
    let ours = !crate::lane::is_root() || (built.uid() == 0 && built.mode() & 0o022 == 0);
    if ours && std::fs::hard_link(from, to).is_ok() {
        return Ok(());
    }
    let copied = std::process::Command::new("cp").arg("--").args([from, to]).status().context("cannot run cp")?;
    anyhow::ensure!(copied.success(), "cannot copy {} to {}: cp ended with {copied}", from.display(), to.display());
    std::fs::set_permissions(to, std::fs::Permissions::from_mode(0o755))?;
    Ok(())
}
