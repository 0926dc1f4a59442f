//! Emptying the group of a service whose launcher did not do it: `--clear-cgroup`, for `ExecStopPost=`.
//!
//! systemd runs that in the group `.control` beneath the unit's (systemd.exec(5), `Delegate=`), so the launcher's groups are
//! its neighbours, and nothing else is.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::OFlags,
};

use super::{locate, locate::Version, open, read};

/// The group that systemd gives to the commands of a unit beside its main process.
const CONTROL: &str = ".control";

/// How long killed processes may take to be gone.
const GONE: Duration = Duration::from_secs(5);

/// Kills what is in the groups beside this process's own, removes them, and takes the controllers back. Does nothing when
/// this process is not such a command, or where no v2 hierarchy is mounted.
pub(crate) fn clear() -> io::Result<()> {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo")?;
    let groups = locate::own_groups(&mountinfo, &fs::read_to_string("/proc/self/cgroup")?);
    let Some(own) = groups.into_iter().find(|own| own.version == Version::V2) else { return Ok(()) };
    let Some(unit) = own.directory.parent().filter(|_| own.directory.ends_with(CONTROL)) else { return Ok(()) };
    for group in beneath(unit)? {
        if group != own.directory {
            end(&group)?;
        }
    }
    let enabled = read(&unit.join("cgroup.subtree_control"))?;
    let off: Vec<String> = enabled.split_whitespace().map(|name| format!("-{name}")).collect();
    if off.is_empty() { Ok(()) } else { fs::write(unit.join("cgroup.subtree_control"), off.join(" ")) }
}

fn beneath(group: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(group)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Kills everything in the group and beneath it, waits until it is gone, and removes it.
fn end(group: &Path) -> io::Result<()> {
    fs::write(group.join("cgroup.kill"), "1")?;
    await_empty(group)?;
    for inner in beneath(group)? {
        end(&inner)?;
    }
    fs::remove_dir(group)
}

/// `cgroup.events` is ready with priority data whenever it has changed (cgroups(7)).
fn await_empty(group: &Path) -> io::Result<()> {
    let events = open(&group.join("cgroup.events"), OFlags::RDONLY)?;
    let deadline = Instant::now() + GONE;
    loop {
        let mut bytes = [0; 256];
        let length = rustix::io::pread(&events, &mut bytes, 0)?;
        if String::from_utf8_lossy(&bytes[..length]).lines().any(|line| line == "populated 0") {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        if poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&left))? == 0 {
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("{} has processes", group.display())));
        }
    }
}
