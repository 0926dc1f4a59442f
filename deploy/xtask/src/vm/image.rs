//! The guest's kernel and root, made once from Debian's packages and kept in the target directory.
//!
//! Everything comes from where the host's own apt takes its packages: no mirror is named here.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use plugvisor_package::Digest;

use crate::build::workspace_root;
use crate::steps::run;

/// The release, which must be the host's.
pub(super) const RELEASE: &str = "bookworm";

/// What the root has beyond Debian's minimal set.
const PACKAGES: &str = "systemd,systemd-sysv,dbus,udev,iproute2,procps";

/// The kernel. Debian's one for virtual machines; it has everything that is needed built in.
const KERNEL: &str = "linux-image-cloud-amd64";

/// Nobody reads these in the guest, and the root lives in its memory.
const NOT_PACKED: [&str; 7] = [
    "var/cache/apt",
    "var/lib/apt/lists",
    "usr/share/doc",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/man",
    "usr/share/zoneinfo",
];

/// How the names of directories begin that are being filled.
pub(super) const PREFIX: &str = "making-";

/// The finished files.
#[derive(Debug)]
pub(super) struct Image {
    /// The kernel.
    pub(super) kernel: PathBuf,
    /// The root as a cpio archive.
    pub(super) root: PathBuf,
}

/// The image of this recipe; made when it is not there.
///
/// # Errors
/// When a package cannot be had, or debootstrap fails.
pub(super) fn image(here: &Path) -> anyhow::Result<Image> {
    let init = init()?;
    let recipe = format!("{RELEASE} {PACKAGES} {KERNEL} {NOT_PACKED:?}\n{init}");
    let digest = Digest::of(recipe.as_bytes()).to_string();
    let key: String = digest.chars().filter(char::is_ascii_hexdigit).rev().take(16).collect();
    let finished = here.join(format!("image-{key}"));
    let image = Image { kernel: finished.join("vmlinuz"), root: finished.join("root.cpio") };
    if finished.exists() {
        return Ok(image);
    }
    eprintln!("    making the image in {} (once, two to three minutes)", finished.display());
    let making = tempfile::Builder::new().prefix(PREFIX).tempdir_in(here).context("cannot make a directory")?;
    // The lists of a fresh container are empty.
    run(Command::new("apt-get").args(["-qq", "update"]))?;
    let root = making.path().join("root");
    run(Command::new("debootstrap")
        .args(["--variant=minbase", "--include", PACKAGES, RELEASE])
        .arg(&root)
        .arg(mirror()?)
        .stdout(Stdio::null()))?;
    for directory in NOT_PACKED {
        let path = root.join(directory);
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", path.display()));
            }
            _ => {}
        }
    }
    let path = root.join("init");
    fs::write(&path, init).with_context(|| format!("cannot write {}", path.display()))?;
    run(Command::new("chmod").arg("755").arg(&path))?;
    let done = making.path().join("done");
    fs::create_dir(&done).context("cannot make a directory")?;
    pack(&root, &done.join("root.cpio"))?;
    kernel(making.path(), &done.join("vmlinuz"))?;
    // Whole or not there.
    fs::rename(&done, &finished).with_context(|| format!("cannot make {}", finished.display()))?;
    Ok(image)
}

fn init() -> anyhow::Result<String> {
    let path = workspace_root().join("tests/vm/init");
    fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

/// Where the host's apt has this release from.
fn mirror() -> anyhow::Result<String> {
    let fields = "$(ORIGIN) $(CODENAME) $(COMPONENT) $(REPO_URI)";
    let wanted = format!("Debian {RELEASE} main ");
    let output = output(Command::new("apt-get").args(["indextargets", "--format", fields, "Created-By: Packages"]))?;
    let found = output.lines().find_map(|line| line.strip_prefix(&wanted));
    found.map(str::to_owned).with_context(|| format!("apt's sources name no mirror of Debian {RELEASE}"))
}

/// The kernel's file out of its package: no module of it is needed, so none is unpacked into the root.
fn kernel(making: &Path, to: &Path) -> anyhow::Result<()> {
    let depends = output(Command::new("apt-cache").args(["depends", "--no-recommends", KERNEL]))?;
    let package = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: linux-image-"));
    let package = package.with_context(|| format!("{KERNEL} depends on no kernel"))?;
    // As root, apt-get would warn that its own user cannot write here.
    run(Command::new("apt-get")
        .args(["-qq", "-o", "APT::Sandbox::User=root", "download", &format!("linux-image-{package}")])
        .current_dir(making))?;
    let file = only_child(making, |name| name.ends_with(".deb"))?;
    let unpacked = making.join("kernel");
    run(Command::new("dpkg-deb").arg("--extract").arg(&file).arg(&unpacked))?;
    let image = only_child(&unpacked.join("boot"), |name| name.starts_with("vmlinuz-"))?;
    fs::copy(&image, to).with_context(|| format!("cannot copy {}", image.display()))?;
    Ok(())
}

fn only_child(directory: &Path, wanted: impl Fn(&str) -> bool) -> anyhow::Result<PathBuf> {
    for entry in fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))? {
        let entry = entry.with_context(|| format!("cannot read {}", directory.display()))?;
        if entry.file_name().to_str().is_some_and(&wanted) {
            return Ok(entry.path());
        }
    }
    bail!("{} has nothing of the expected name", directory.display())
}

/// A tree as a cpio archive in the kernel's format, everything root's.
pub(super) fn pack(tree: &Path, to: &Path) -> anyhow::Result<()> {
    let file = File::create(to).with_context(|| format!("cannot write {}", to.display()))?;
    let mut find = Command::new("find")
        .args([".", "-xdev", "-print0"])
        .current_dir(tree)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start find")?;
    let names = find.stdout.take().context("find has no standard output")?;
    run(Command::new("cpio")
        .args(["--create", "--null", "--format=newc", "--owner=+0:+0", "--quiet"])
        .current_dir(tree)
        .stdin(names)
        .stdout(file))?;
    let found = find.wait().context("cannot wait for find")?;
    if !found.success() {
        bail!("find in {} ended with {found}", tree.display());
    }
    Ok(())
}

fn output(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("cannot start {}", command.get_program().display()))?;
    if !output.status.success() {
        bail!("{} ended with {}", command.get_program().display(), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
