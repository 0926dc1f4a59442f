//! Installs what the other commands need and the host lacks. It never starts a service.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};

use crate::steps;

/// What a command needs, and the Debian package that has it.
#[derive(Clone, Copy, Debug)]
struct Tool {
    /// A program's name, or the whole path of a file.
    needs: &'static str,
    package: &'static str,
    needed_for: &'static str,
}

/// `demo` needs only what building with Rust needs anyway.
const BUILD: &[Tool] = &[Tool { needs: "cc", package: "gcc", needed_for: "linking" }];

/// The plugin without an SDK is in Python; Debian's packages are where plugins see them.
const TESTS: &[Tool] = &[
    Tool {
        needs: "/usr/lib/python3/dist-packages/grpc/__init__.py",
        package: "python3-grpcio",
        needed_for: "the test of a plugin without an SDK",
    },
    Tool {
        needs: "/usr/lib/python3/dist-packages/google/protobuf/__init__.py",
        package: "python3-protobuf",
        needed_for: "the test of a plugin without an SDK",
    },
];

/// What runs the machines of the level VM and the one that tests run in.
const EMULATOR: &[Tool] =
    &[Tool { needs: "/usr/bin/qemu-system-x86_64", package: "qemu-system-x86", needed_for: "virtual machines" }];

/// The virtual machine that tests run in: its root, and the archives that become its memory.
const MACHINE: &[Tool] = &[
    Tool { needs: "debootstrap", package: "debootstrap", needed_for: "the tests in a virtual machine" },
    Tool { needs: "cpio", package: "cpio", needed_for: "the tests in a virtual machine" },
    Tool { needs: "strip", package: "binutils", needed_for: "the tests in a virtual machine" },
];

/// The peers of the benchmarks.
const PEERS: &[Tool] = &[
    Tool { needs: "haproxy", package: "haproxy", needed_for: "bench broker" },
    Tool { needs: "nginx", package: "nginx", needed_for: "bench broker" },
    Tool { needs: "bwrap", package: "bubblewrap", needed_for: "bench spawn" },
    Tool { needs: "runc", package: "runc", needed_for: "bench spawn" },
];

/// Installs everything for every command.
///
/// # Errors
/// When something is missing and cannot be installed here; the message is the command to run.
pub(crate) fn run() -> anyhow::Result<()> {
    install(BUILD)?;
    install(TESTS)?;
    install(EMULATOR)?;
    install(MACHINE)?;
    install(PEERS)
}

/// Installs what building needs.
///
/// # Errors
/// As [`run`].
pub(crate) fn for_build() -> anyhow::Result<()> {
    install(BUILD)
}

/// Installs what the tests need beside it.
///
/// # Errors
/// As [`run`].
pub(crate) fn for_tests() -> anyhow::Result<()> {
    install(TESTS)
}

/// Installs what the tests in a virtual machine need.
///
/// # Errors
/// As [`run`].
pub(crate) fn for_vm() -> anyhow::Result<()> {
    install(EMULATOR)?;
    install(MACHINE)
}

/// Installs what runs the machines of the level VM. A caller that can do without prints the error and goes on.
///
/// # Errors
/// As [`run`].
pub(crate) fn for_guests() -> anyhow::Result<()> {
    install(EMULATOR)
}

/// Fetches the lists of packages, which are empty in a fresh container; only root may.
///
/// # Errors
/// When apt-get fails.
pub(crate) fn package_lists() -> anyhow::Result<()> {
    steps::run(Command::new("apt-get").args(["-qq", "update"]))
}

/// Installs the peers of the benchmarks. A caller that can do without prints the error and goes on.
///
/// # Errors
/// As [`run`].
pub(crate) fn for_bench() -> anyhow::Result<()> {
    install(PEERS)
}

fn install(tools: &[Tool]) -> anyhow::Result<()> {
    let missing: Vec<Tool> = tools.iter().copied().filter(|tool| !is_installed(tool.needs)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<&str> = missing.iter().map(|tool| tool.package).collect();
    let names: Vec<String> = missing.iter().map(|tool| format!("{} ({})", tool.needs, tool.needed_for)).collect();
    let names = names.join(", ");
    let command = format!("apt-get install --no-install-recommends {}", packages.join(" "));
    if !Path::new("/etc/debian_version").exists() {
        bail!("missing: {names}; this is not Debian, so install them with your own package manager");
    }
    if !rustix::process::geteuid().is_root() {
        bail!("missing: {names}; run: sudo {command}");
    }
    eprintln!("installing {names}");
    let quiet_services = ServicesStayOff::new()?;
    package_lists()?;
    steps::run(
        Command::new("apt-get")
            .args(["-qq", "-y", "--no-install-recommends", "install"])
            .args(&packages)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )?;
    drop(quiet_services);
    match missing.iter().find(|tool| !is_installed(tool.needs)) {
        None => Ok(()),
        Some(tool) => bail!("{} was installed and {} is still not there", tool.package, tool.needs),
    }
}

/// Looks for a whole path where it says, for a program through `PATH` and the directories of administrators' programs.
fn is_installed(needs: &str) -> bool {
    if needs.starts_with('/') {
        return Path::new(needs).is_file();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(Into::into)).any(|directory| {
        fs::metadata(directory.join(needs)).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    })
}

/// While it lives, a package's scripts may not start services: Debian asks `/usr/sbin/policy-rc.d` (invoke-rc.d(8)),
/// and 101 is "forbidden". An administrator's own file is left as it is.
struct ServicesStayOff {
    made: bool,
}

const POLICY: &str = "/usr/sbin/policy-rc.d";

impl ServicesStayOff {
    fn new() -> anyhow::Result<Self> {
        if Path::new(POLICY).exists() {
            return Ok(Self { made: false });
        }
        fs::write(POLICY, "#!/bin/sh\nexit 101\n").with_context(|| format!("cannot write {POLICY}"))?;
        fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755))
            .with_context(|| format!("cannot chmod {POLICY}"))?;
        Ok(Self { made: true })
    }
}

impl Drop for ServicesStayOff {
    fn drop(&mut self) {
        if self.made
            && let Err(error) = fs::remove_file(POLICY)
        {
            eprintln!("warning: cannot remove {POLICY}: {error}; services will not start until it is removed");
        }
    }
}
