//! A kernel for machines of the tests. Knows the standard library alone: the scenarios use the same file.
#![allow(unreachable_pub, missing_docs, reason = "two crates of tests")]

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

const MODULES: [&str; 5] = [
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_mmio.ko",
    "drivers/char/virtio_console.ko",
    "fs/fuse/fuse.ko",
];

/// Where there is a kernel for virtual machines, and its modules.
#[derive(Clone, Debug)]
pub struct Guest {
    kernel: PathBuf,
    modules: PathBuf,
}

/// The kernel here; `None`, and said, when there is none.
pub fn find() -> Option<Guest> {
    let place = std::env::var_os("PLUGVISOR_TEST_GUEST").map_or_else(|| PathBuf::from("/"), PathBuf::from);
    let kernels = fs::read_dir(place.join("boot")).into_iter().flatten().flatten();
    let found = kernels.into_iter().find_map(|entry| {
        let version = entry.file_name().to_str()?.strip_prefix("vmlinuz-")?.to_owned();
        version.ends_with("cloud-amd64").then(|| (entry.path(), version))
    });
    let Some((kernel, version)) = found.filter(|_| Path::new("/usr/bin/qemu-system-x86_64").exists()) else {
        println!("SKIP machines: no QEMU, or no kernel (linux-image-cloud-amd64) below {}", place.display());
        return None;
    };
    Some(Guest { kernel, modules: place.join("lib/modules").join(version).join("kernel") })
}

impl Guest {
    /// What `[vm]` says of a copy in this directory. A root launcher takes a kernel only from where root alone writes, and
    /// whoever checked the project out may not be root.
    pub fn settings(&self, place: &Path) -> io::Result<String> {
        let place = place.join("guest");
        fs::create_dir_all(&place)?;
        fs::set_permissions(&place, fs::Permissions::from_mode(0o755))?;
        let copy = |from: &Path| -> io::Result<PathBuf> {
            let to = place.join(from.file_name().unwrap_or_default());
            if !to.exists() {
                fs::copy(from, &to)?;
                fs::set_permissions(&to, fs::Permissions::from_mode(0o644))?;
            }
            Ok(to)
        };
        let kernel = copy(&self.kernel)?;
        let modules = MODULES.iter().map(|module| copy(&self.modules.join(module))).collect::<io::Result<Vec<_>>>()?;
        Ok(format!("[vm]\nkernel = {kernel:?}\nmodules = {modules:?}\n"))
    }
}
