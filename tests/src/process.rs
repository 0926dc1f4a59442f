//! Processes as the kernel shows them, known by pidfd: a number that was used again is never waited for or killed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

use crate::stretched;

/// A process that ran when it was opened.
#[derive(Debug)]
pub struct Process {
    /// Its number, for people and for `/proc`.
    pub pid: u32,
    /// Its name (`comm`).
    pub name: String,
    pidfd: OwnedFd,
}

impl Process {
    /// Opens a running process; `None` when there is none with this number.
    #[must_use]
    pub fn open(pid: u32) -> Option<Self> {
        let pidfd = pidfd_open(Pid::from_raw(i32::try_from(pid).ok()?)?, PidfdFlags::empty()).ok()?;
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned();
        Some(Self { pid, name, pidfd })
    }

    /// Whether it has ended, reaped or not.
    #[must_use]
    pub fn ended(&self) -> bool {
        ended_within(&self.pidfd, Duration::ZERO).unwrap_or(false)
    }

    /// Waits until it has ended, on a slow machine accordingly longer.
    ///
    /// # Errors
    /// When it still runs after `longest`.
    pub async fn wait(&self, longest: Duration) -> anyhow::Result<()> {
        let pidfd = self.pidfd.try_clone()?;
        let longest = stretched(longest);
        // A thread that polls: registering a descriptor with the runtime is an unsafe operation since tokio 1.54.
        let ended = tokio::task::spawn_blocking(move || ended_within(&pidfd, longest)).await??;
        anyhow::ensure!(ended, "process {} ({}) still runs after {longest:?}", self.pid, self.name);
        Ok(())
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When it has ended or may not be signalled.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(pidfd_send_signal(&self.pidfd, signal)?)
    }

    /// The directories of its cgroups, outside the ones that this test run is in itself.
    #[must_use]
    pub fn own_cgroups(&self) -> BTreeSet<PathBuf> {
        let mine = cgroups(std::process::id());
        cgroups(self.pid).into_iter().filter(|path| !mine.iter().any(|my| my.starts_with(path))).collect()
    }

    /// How many descriptors it has open; `None` when that cannot be read.
    #[must_use]
    pub fn descriptors(&self) -> Option<usize> {
        Some(fs::read_dir(format!("/proc/{}/fd", self.pid)).ok()?.count())
    }

    /// Its resident memory in bytes; `None` when it has ended.
    #[must_use]
    pub fn resident_bytes(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        Some(line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? * 1024)
    }

    /// Its user, as `/proc` says; `None` when it has ended.
    #[must_use]
    pub fn uid(&self) -> Option<u32> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
        line.split_whitespace().next()?.parse().ok()
    }
}

/// A pidfd is readable once its process has ended (pidfd_open(2)).
fn ended_within(pidfd: &OwnedFd, longest: Duration) -> anyhow::Result<bool> {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    let time = Timespec { tv_sec: longest.as_secs().try_into()?, tv_nsec: longest.subsec_nanos().into() };
    Ok(poll(&mut fds, Some(&time))? > 0)
}

/// Every running descendant of a process, itself not counted.
#[must_use]
pub fn descendants(root: u32) -> Vec<Process> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        if let Some(parent) = parent_of(pid) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = Vec::new();
    let mut left = vec![root];
    while let Some(parent) = left.pop() {
        for pid in children.get(&parent).into_iter().flatten() {
            left.push(*pid);
            found.extend(Process::open(*pid));
        }
    }
    found
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, so the fields begin after the last one (proc_pid_stat(5)).
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

/// The directories of a process's cgroups, found through the mounts that show their hierarchy's root.
fn cgroups(pid: u32) -> BTreeSet<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let lines = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let mut found = BTreeSet::new();
    for line in lines.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else { continue };
        for mount in mounts.lines() {
            let fields: Vec<&str> = mount.split(' ').collect();
            let Some(dash) = fields.iter().position(|field| *field == "-") else { continue };
            let (Some(kind), Some(options)) = (fields.get(dash + 1), fields.get(dash + 3)) else { continue };
            let belongs = if controllers.is_empty() {
                *kind == "cgroup2"
            } else {
                *kind == "cgroup" && controllers.split(',').all(|name| options.split(',').any(|o| o == name))
            };
            if belongs {
                found.insert(Path::new(fields[4]).join(path.trim_start_matches('/')));
            }
        }
    }
    found
}
