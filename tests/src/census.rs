//! What a daemon holds on to, counted from outside: `/proc`, the cgroup tree and the directories that it writes to.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use crate::{Daemon, Process};

/// How long the last of something may take to go away: an idle thread of tokio's pool for blocking calls stays 10 s.
const SETTLING: Duration = Duration::from_secs(40);

/// What the launcher makes ahead of launches comes and goes: two children, each with a group in up to four hierarchies
/// and a few descriptors. Whatever is left over by every round is more than that after ten.
const SPARE_PROCESSES: usize = 2;
const SPARE_CGROUPS: usize = 8;
const SPARE_DESCRIPTORS: usize = 6;
/// The launcher lists a bundle in its store some time after it has begun to run; there are two.
const LATE_FILES: usize = 2;
/// A file that the supervisor opens when it first has something to write there.
const LATE_DESCRIPTORS: usize = 2;
/// tokio's pool for blocking calls keeps threads while it has something to do now and then.
const SPARE_THREADS: u64 = 4;

/// One process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// Open descriptors; sockets are among them.
    pub descriptors: usize,
    /// Threads.
    pub threads: u64,
    /// Resident anonymous memory, which is where the heap is, in bytes.
    pub heap: u64,
}

impl Holdings {
    /// Counts what a process holds.
    ///
    /// # Errors
    /// When it has ended.
    pub fn of(process: &Process) -> anyhow::Result<Self> {
        let status = fs::read_to_string(format!("/proc/{}/status", process.pid))
            .with_context(|| format!("{} has ended", process.name))?;
        let number = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok())
        };
        Ok(Self {
            // An ordinary user may not look into a process of another user namespace; the privileged lane does.
            descriptors: process.descriptors().unwrap_or_default(),
            threads: number("Threads:").context("no threads")?,
            heap: number("RssAnon:").context("no RssAnon")? * 1024,
        })
    }
}

/// Everything at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Census {
    /// plugvisord.
    pub supervisor: Holdings,
    /// Its launcher.
    pub launcher: Holdings,
    /// Processes below plugvisord, dead ones that nobody reaped too.
    pub processes: usize,
    /// Directories of cgroups beside and below those that the plugins are in, in every hierarchy.
    pub cgroups: usize,
    /// Files, sockets and directories where the daemon writes.
    pub files: usize,
}

impl Census {
    /// Counts now.
    ///
    /// # Errors
    /// When the daemon or its launcher has ended.
    pub fn take(daemon: &Daemon) -> anyhow::Result<Self> {
        let remains = daemon.remains();
        // The parent is the launcher's own directory in that hierarchy: what it forgot to remove lies there.
        let roots: BTreeSet<PathBuf> =
            remains.cgroups().iter().filter_map(|path| path.parent().map(Path::to_path_buf)).collect();
        Ok(Self {
            supervisor: Holdings::of(daemon.process())?,
            launcher: Holdings::of(daemon.launcher())?,
            processes: remains.processes().len(),
            cgroups: roots.iter().map(|root| below(root, fs::FileType::is_dir)).sum(),
            files: below(&daemon.world().path().join("home"), |_| true),
        })
    }

    /// Waits until there is no more of anything than here, but for `growth` bytes of heap in each process.
    ///
    /// # Errors
    /// Shows both counts when there still is.
    pub async fn settles(&self, daemon: &Daemon, growth: u64) -> anyhow::Result<Self> {
        let begun = Instant::now();
        loop {
            let now = Self::take(daemon)?;
            if now.fits(self, growth) {
                return Ok(now);
            }
            ensure!(
                begun.elapsed() < crate::stretched(SETTLING),
                "something is left over ({growth} bytes of heap are allowed):\nbefore {self:?}\nafter  {now:?}"
            );
            // Nothing tells that a descriptor was closed or a thread has ended.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    fn fits(&self, before: &Self, growth: u64) -> bool {
        let process = |now: &Holdings, before: &Holdings, spare: usize| {
            now.descriptors <= before.descriptors + spare
                && now.threads <= before.threads + SPARE_THREADS
                && now.heap <= before.heap + growth
        };
        process(&self.supervisor, &before.supervisor, LATE_DESCRIPTORS)
            && process(&self.launcher, &before.launcher, SPARE_DESCRIPTORS)
            && self.processes <= before.processes + SPARE_PROCESSES
            && self.cgroups <= before.cgroups + SPARE_CGROUPS
            && self.files <= before.files + LATE_FILES
    }
}

/// How many entries of a kind there are below a directory.
fn below(directory: &Path, wanted: fn(&fs::FileType) -> bool) -> usize {
    let mut count = 0;
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        count += usize::from(wanted(&kind));
        if kind.is_dir() {
            count += below(&entry.path(), wanted);
        }
    }
    count
}
