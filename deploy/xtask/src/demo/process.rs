//! Processes as the kernel shows them: `/proc` and pidfds. Nothing here asks the supervisor.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// A process that is known for good: its pid cannot come to mean another one.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    descriptor: OwnedFd,
}

impl Process {
    /// Takes hold of a process.
    ///
    /// # Errors
    /// When there is none with this pid.
    pub(crate) fn open(pid: u32) -> anyhow::Result<Self> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).with_context(|| format!("{pid} is no pid"))?;
        let descriptor = pidfd_open(raw, PidfdFlags::empty()).with_context(|| format!("cannot open process {pid}"))?;
        Ok(Self { pid, descriptor })
    }

    /// Sends SIGKILL.
    ///
    /// # Errors
    /// When it is gone or may not be killed by this user.
    pub(crate) fn kill(&self) -> anyhow::Result<()> {
        pidfd_send_signal(&self.descriptor, Signal::KILL).with_context(|| format!("cannot kill process {}", self.pid))
    }

    /// Sends SIGTERM.
    ///
    /// # Errors
    /// When it is gone or may not be told by this user.
    pub(crate) fn terminate(&self) -> anyhow::Result<()> {
        pidfd_send_signal(&self.descriptor, Signal::TERM).with_context(|| format!("cannot end process {}", self.pid))
    }

    /// Waits until it has ended; `false` when it lives on.
    ///
    /// # Errors
    /// When the kernel refuses to wait.
    pub(crate) fn ended_within(&self, limit: Duration) -> anyhow::Result<bool> {
        let limit = Timespec::try_from(limit).context("the time limit is too long")?;
        let mut entries = [PollFd::new(&self.descriptor, PollFlags::IN)];
        loop {
            match poll(&mut entries, Some(&limit)) {
                Ok(ready) => return Ok(ready > 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).with_context(|| format!("cannot wait for process {}", self.pid)),
            }
        }
    }
}

/// The fields of `/proc/PID/status` (proc_pid_status(5)).
///
/// # Errors
/// When the process is gone.
pub(crate) fn status(pid: u32) -> anyhow::Result<BTreeMap<String, String>> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    Ok(fields.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect())
}

/// Resident memory in bytes.
///
/// # Errors
/// When the process is gone.
pub(crate) fn resident_bytes(pid: u32) -> anyhow::Result<u64> {
    let status = status(pid)?;
    let text = status.get("VmRSS").with_context(|| format!("process {pid} has no memory"))?;
    match text.strip_suffix(" kB").map(|kibibytes| kibibytes.trim().parse::<u64>()) {
        Some(Ok(kibibytes)) => Ok(kibibytes * 1024),
        _ => bail!("process {pid}: VmRSS is {text:?}"),
    }
}

/// The processes below `root`, itself first, each with its depth.
///
/// # Errors
/// When `/proc` cannot be read.
pub(crate) fn tree(root: u32) -> anyhow::Result<Vec<(usize, u32)>> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for entry in fs::read_dir("/proc").context("cannot read /proc")? {
        let name = entry.context("cannot read /proc")?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // A process that ended meanwhile is no longer part of the tree.
        let Ok(fields) = status(pid) else { continue };
        if let Some(parent) = fields.get("PPid").and_then(|parent| parent.parse().ok()) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = Vec::new();
    let mut waiting = vec![(0, root)];
    while let Some((depth, pid)) = waiting.pop() {
        found.push((depth, pid));
        let mut below = children.remove(&pid).unwrap_or_default();
        below.sort_unstable_by(|a, b| b.cmp(a));
        waiting.extend(below.into_iter().map(|child| (depth + 1, child)));
    }
    Ok(found)
}

/// The namespace of a process, such as `mnt:[4026531841]`.
///
/// # Errors
/// When the process is gone or may not be looked at by this user.
pub(crate) fn namespace(pid: u32, kind: &str) -> anyhow::Result<String> {
    let path = format!("/proc/{pid}/ns/{kind}");
    let link = fs::read_link(&path).with_context(|| format!("cannot read {path}"))?;
    Ok(link.to_string_lossy().into_owned())
}

/// The directories of the cgroups of a process, by controller; the v2 hierarchy has the empty name.
///
/// # Errors
/// When the process is gone.
pub(crate) fn cgroups(pid: u32) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let path = format!("/proc/{pid}/cgroup");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let mounts = mounts()?;
    let mut found = BTreeMap::new();
    for line in text.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else { continue };
        for controller in controllers.split(',') {
            if let Some(mount) = mounts.get(controller) {
                found.insert(controller.to_owned(), mount.join(group.trim_start_matches('/')));
            }
        }
    }
    Ok(found)
}

/// Where each controller is mounted; cgroup v2 has the empty name.
fn mounts() -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let text = fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    let mut found = BTreeMap::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let [_, place, kind, options, ..] = fields[..] else { continue };
        match kind {
            "cgroup2" => {
                found.insert(String::new(), PathBuf::from(place));
            }
            // Among the options are the controllers, each by its name.
            "cgroup" => found.extend(options.split(',').map(|option| (option.to_owned(), PathBuf::from(place)))),
            _ => {}
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_killed_process_is_seen_to_end() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let process = Process::open(child.id()).unwrap();
        assert!(!process.ended_within(Duration::ZERO).unwrap());
        assert!(tree(std::process::id()).unwrap().contains(&(1, child.id())));
        assert!(resident_bytes(child.id()).unwrap() > 0);
        process.kill().unwrap();
        assert!(process.ended_within(Duration::from_secs(10)).unwrap());
        child.wait().unwrap();
        assert!(process.kill().is_err(), "the pidfd of a reaped process reaches nobody");
    }

    #[test]
    fn our_own_groups_exist() {
        for (controller, directory) in cgroups(std::process::id()).unwrap() {
            assert!(directory.is_dir(), "{controller}: {}", directory.display());
        }
    }
}
