//! The Landlock rules from PROCESS up: deny everything that this kernel's Landlock knows, then open the plugin's own tree.
//!
//! Built in the child after it changed its root, because rules hold on to files as the child sees them. What an older
//! Landlock lacks is held elsewhere too: TCP by seccomp (no such sockets without a grant) and the empty network namespace, signals by the PID namespace, abstract Unix
//! sockets by the empty network namespace (see `launch`).

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, NetPort, PathBeneath, PathFd, PathFdError,
    Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, Scope, make_bitflags,
};
use plugvisor_sandbox::protocol::{EGRESS, Grant, SocketMode};
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};

use crate::{
    child::Failure,
    directories::{Kind, Reach},
    kernel,
    level::{Kernel, Walls},
    machine, mounts,
    step::Step,
};

/// The first version with rules for TCP.
const TCP: i32 = 4;
/// The first version that scopes signals and abstract Unix sockets.
const SCOPES: i32 = 6;

/// The version to ask for: the kernel's, up to the newest that the rules below were written for.
pub(crate) fn version() -> i32 {
    kernel::landlock_abi().min(7)
}

/// Restricts the calling process and everything it starts, then tries it.
pub(crate) fn restrict(
    version: i32,
    walls: &Walls,
    socket: SocketMode,
    grants: &[Grant],
    listen: &[u16],
    device: Option<&str>,
) -> Result<(), Failure> {
    let failure = |error: &RulesetError| Failure::new(Step::Landlock, errno(error));
    apply(version, walls, socket, grants, listen, device).map_err(|error| match error {
        Wrong::Rules(error) => failure(&error),
        Wrong::Path => Failure::new(Step::Landlock, Errno::NOENT),
    })?;
    // The kernel shows nobody's Landlock rules, so they are read back by use: / itself was not opened.
    match rustix::fs::open("/", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        Err(Errno::ACCESS) => Ok(()),
        Err(other) => Err(Failure::new(Step::LandlockCheck, other)),
        Ok(_) => Err(Failure::new(Step::LandlockCheck, Errno::PERM)),
    }
}

enum Wrong {
    Rules(RulesetError),
    Path,
}

impl From<RulesetError> for Wrong {
    fn from(error: RulesetError) -> Self {
        Self::Rules(error)
    }
}

impl From<PathFdError> for Wrong {
    fn from(_: PathFdError) -> Self {
        Self::Path
    }
}

fn apply(
    version: i32,
    walls: &Walls,
    socket: SocketMode,
    grants: &[Grant],
    listen: &[u16],
    machine_device: Option<&str>,
) -> Result<(), Wrong> {
    let tree = walls.tree;
    let abi = ABI::from(version);
    let all = AccessFs::from_all(abi);
    let read: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | ReadDir});
    let execute = read | AccessFs::Execute;
    // Devices need IoctlDev where it exists: isatty(3) must say "no", not "denied".
    let device = make_bitflags!(AccessFs::{ReadFile | WriteFile | IoctlDev}) & all;

    let mut ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement).handle_access(all)?;
    if version >= TCP {
        ruleset = ruleset.handle_access(AccessNet::from_all(abi))?;
    }
    if version >= SCOPES {
        ruleset = ruleset.scope(Scope::from_all(abi))?;
    }
    let mut ruleset = ruleset.create()?;
    let mut open = |path: &str, access: BitFlags<AccessFs>| -> Result<(), Wrong> {
        (&mut ruleset).add_rule(PathBeneath::new(PathFd::new(path)?, access))?;
        Ok(())
    };
    for directory in mounts::HOST_DIRECTORIES {
        // Where the host has a symlink, as in /lib -> usr/lib, the rule of its target holds.
        if std::fs::symlink_metadata(directory).is_ok_and(|found| found.is_dir()) {
            open(directory, execute)?;
        }
    }
    open(mounts::BUNDLE, execute)?;
    open("/etc", read)?;
    open("/proc", read)?;
    for name in mounts::DEVICES {
        open(&format!("/dev/{name}"), device)?;
    }
    if walls.kernel == Kernel::Own {
        open(machine::PLACE, read)?;
    }
    if let Some(path) = machine_device {
        open(path, device)?;
    }
    open(mounts::sockets(tree), AccessFs::ReadDir.into())?;
    if socket == SocketMode::Bind {
        open(&mounts::worker_directory(tree), make_bitflags!(AccessFs::{ReadDir | MakeSock | RemoveFile}))?;
    }
    // Where it writes, it executes nothing, and makes neither sockets nor devices.
    let write = all & !make_bitflags!(AccessFs::{Execute | MakeSock | MakeChar | MakeBlock | IoctlDev});
    if grants.contains(&Grant::WriteTemp) {
        open("/tmp", write)?;
    }
    for kind in Kind::BOTH {
        match kind.access(grants) {
            Some(Reach::Read) => open(kind.place(), read)?,
            Some(Reach::Write) => open(kind.place(), write)?,
            None => {}
        }
    }
    if grants.contains(&Grant::Egress) && version >= TCP {
        // Nothing else is there to be reached: without this version, the empty namespace holds it alone.
        ruleset = ruleset.add_rule(NetPort::new(EGRESS.port(), AccessNet::ConnectTcp))?;
    }
    if grants.contains(&Grant::TcpServer) && version >= TCP {
        // Nobody else is in its namespace, and it connects to nothing in it.
        for port in listen {
            ruleset = ruleset.add_rule(NetPort::new(*port, AccessNet::BindTcp))?;
        }
    }
    ruleset.restrict_self()?;
    Ok(())
}

/// The system call's error inside the crate's, or EINVAL: the child can send a number only.
fn errno(error: &RulesetError) -> Errno {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        if let Some(code) = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error) {
            return Errno::from_raw_os_error(code);
        }
        source = error.source();
    }
    Errno::INVAL
}
