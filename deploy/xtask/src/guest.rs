//! A kernel for the tests of the level VM: Debian's for virtual machines, with its modules, out of its package and not
//! installed. Kept in the target directory; remove `target/guest` to have a newer one.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

use crate::build::target_directory;
use crate::setup;
use crate::steps::run;

/// What names the directory to the tests.
pub(crate) const VARIABLE: &str = "PLUGVISOR_TEST_GUEST";

const KERNEL: &str = "linux-image-cloud-amd64";

/// The directory with `boot` and `lib/modules`; made when it is not there. `None`, and said, where there cannot be one: the
/// tests then say that they are skipped.
pub(crate) fn kernel() -> Option<PathBuf> {
    let found = find();
    if let Err(why) = &found {
        eprintln!("    no kernel for the tests of the level VM: {why:#}");
    }
    found.ok()
}

/// What the launcher's policy file says of a copy of it in this directory: a root launcher takes a kernel only from where root
/// alone writes, and the target directory may be somebody else's.
///
/// # Errors
/// When the directory has not the kernel that it is made of, or it cannot be copied.
pub(crate) fn settings(place: &Path, into: &Path) -> anyhow::Result<String> {
    let kernels = fs::read_dir(place.join("boot")).context("cannot read what was unpacked")?;
    let found = kernels.flatten().find_map(|entry| {
        let version = entry.file_name().to_str()?.strip_prefix("vmlinuz-")?.to_owned();
        Some((entry.path(), version))
    });
    let (kernel, version) = found.with_context(|| format!("there is no kernel in {}", place.display()))?;
    let place = place.join("lib/modules").join(version).join("kernel");
    let modules = [
        "drivers/virtio/virtio_ring.ko",
        "drivers/virtio/virtio.ko",
        "drivers/virtio/virtio_mmio.ko",
        "drivers/char/virtio_console.ko",
        "fs/fuse/fuse.ko",
    ];
    let copy = |from: PathBuf| -> anyhow::Result<PathBuf> {
        let to = into.join(from.file_name().unwrap_or_default());
        fs::copy(&from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o644)).context("cannot chmod it")?;
        Ok(to)
    };
    let kernel = copy(kernel)?;
    let modules = modules.iter().map(|module| copy(place.join(module))).collect::<anyhow::Result<Vec<_>>>()?;
    Ok(format!("version = 1\n[vm]\nkernel = {kernel:?}\nmodules = {modules:?}\n"))
}

fn find() -> anyhow::Result<PathBuf> {
    setup::for_guests()?;
    let finished = target_directory()?.join("guest");
    if finished.exists() {
        return Ok(finished);
    }
    let here = target_directory()?;
    let making = tempfile::Builder::new().prefix("guest-").tempdir_in(&here).context("cannot make a directory")?;
    let mut package = package()?;
    if package.is_none() && rustix::process::geteuid().is_root() {
        setup::package_lists()?;
        package = self::package()?;
    }
    let package = package.with_context(|| format!("apt knows no {KERNEL}; run: sudo apt-get update"))?;
    // As root, apt-get would warn that its own user cannot write here.
    run(Command::new("apt-get")
        .args(["-qq", "-o", "APT::Sandbox::User=root", "download", &package])
        .current_dir(making.path()))?;
    let file = fs::read_dir(making.path())?.flatten().map(|entry| entry.path()).next().context("nothing came")?;
    let unpacked = making.path().join("guest");
    run(Command::new("dpkg-deb").arg("--extract").arg(&file).arg(&unpacked))?;
    // Whole or not there.
    fs::rename(&unpacked, &finished).with_context(|| format!("cannot make {}", finished.display()))?;
    Ok(finished)
}

/// The package of the newest kernel, which the one without a version depends on; `None` when apt does not know it.
fn package() -> anyhow::Result<Option<String>> {
    let depends = Command::new("apt-cache").args(["depends", "--no-recommends", KERNEL]).output();
    let depends = depends.context("cannot start apt-cache")?.stdout;
    let depends = String::from_utf8_lossy(&depends);
    Ok(depends.lines().find_map(|line| line.trim().strip_prefix("Depends: ")).map(str::to_owned))
}
