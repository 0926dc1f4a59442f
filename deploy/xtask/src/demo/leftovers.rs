//! After the end nothing may be left: no process, no cgroup, no socket, no mount.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;

use super::checks::Checks;
use super::process::{Process, cgroups, tree};

/// What belongs to a running supervisor.
#[derive(Debug)]
pub(crate) struct Belongings {
    processes: Vec<Process>,
    groups: BTreeSet<PathBuf>,
}

impl Belongings {
    /// Notes everything below the supervisor's process.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub(crate) fn of(pid: u32) -> anyhow::Result<Self> {
        let ours: BTreeSet<PathBuf> = cgroups(std::process::id())?.into_values().collect();
        let mut belongings = Self { processes: Vec::new(), groups: BTreeSet::new() };
        for (_, pid) in tree(pid)? {
            // A process that ends meanwhile leaves nothing behind to hold against it.
            let (Ok(process), Ok(groups)) = (Process::open(pid), cgroups(pid)) else { continue };
            belongings.processes.push(process);
            belongings.groups.extend(groups.into_values().filter(|group| !ours.contains(group)));
        }
        // The groups that hold the groups are its own too, up to the one that we are in.
        for group in belongings.groups.clone() {
            let above = group.ancestors().skip(1).take_while(|above| !ours.contains(*above));
            let named = above
                .filter(|above| above.file_name().is_some_and(|name| name.to_string_lossy().starts_with("plugvisor")));
            belongings.groups.extend(named.map(Path::to_path_buf).collect::<Vec<_>>());
        }
        Ok(belongings)
    }

    /// The processes and cgroups of it that are left.
    ///
    /// # Errors
    /// When the kernel refuses to tell.
    pub(crate) fn left(&self) -> anyhow::Result<Vec<String>> {
        let mut left = Vec::new();
        for process in &self.processes {
            if !process.ended_within(Duration::ZERO)? {
                left.push(format!("process {}", process.pid));
            }
        }
        left.extend(self.groups.iter().filter(|group| group.exists()).map(|group| group.display().to_string()));
        Ok(left)
    }

    /// Checks that nothing of it is left. `runtime` is where its sockets were.
    ///
    /// # Errors
    /// When the kernel's lists cannot be read.
    pub(crate) fn are_gone(&self, runtime: &Path, checks: &mut Checks) -> anyhow::Result<()> {
        let mut alive = Vec::new();
        for process in &self.processes {
            if !process.ended_within(Duration::ZERO)? {
                alive.push(process.pid);
            }
        }
        let next = "kill them, and report it";
        let count = self.processes.len();
        checks.check(
            "no process is left",
            alive.is_empty(),
            format!("{count} ended, alive: {alive:?}"),
            "none alive",
            next,
        );
        let groups: Vec<_> = self.groups.iter().filter(|group| group.exists()).collect();
        let count = self.groups.len();
        let next = "rmdir them, and report it";
        checks.check(
            "no cgroup is left",
            groups.is_empty(),
            format!("{count} noted, left: {groups:?}"),
            "none left",
            next,
        );
        let files: Vec<PathBuf> = match fs::read_dir(runtime) {
            Ok(entries) => entries.filter_map(Result::ok).map(|entry| entry.path()).collect(),
            Err(_) => Vec::new(),
        };
        let next = "remove them, and report it";
        checks.check("no socket or lock is left", files.is_empty(), format!("left: {files:?}"), "none left", next);
        for list in ["/proc/net/unix", "/proc/self/mounts"] {
            let text = fs::read_to_string(list).with_context(|| format!("cannot read {list}"))?;
            let runtime = runtime.to_string_lossy();
            let lines: Vec<&str> = text.lines().filter(|line| line.contains(&*runtime)).collect();
            checks.check(
                &format!("nothing is left in {list}"),
                lines.is_empty(),
                format!("left: {lines:?}"),
                "none left",
                next,
            );
        }
        Ok(())
    }
}
