//! A kernel for machines of the tests. Knows the standard library alone: the scenarios use the same file.
#![allow(unreachable_pub, missing_docs, reason = "two crates of tests")]

use std::{
    fs,
    path::{Path, PathBuf},
};

/// What `[vm]` says here; `None`, and said, when there is no kernel.
pub fn settings() -> Option<String> {
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
    let drivers = place.join("lib/modules").join(version).join("kernel/drivers");
    let modules = ["virtio/virtio_ring.ko", "virtio/virtio.ko", "virtio/virtio_mmio.ko", "char/virtio_console.ko"];
    let modules: Vec<PathBuf> = modules.iter().map(|module| drivers.join(module)).collect();
    Some(format!("[vm]\nkernel = {kernel:?}\nmodules = {modules:?}\n"))
}
