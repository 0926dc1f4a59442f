//! Figures of processes, read from cgroups and `/proc`. Reads only; limits are the launcher's.
//!
//! cgroup v1, v2 and hybrid: each figure is taken from the first of a launch's directories that has its file.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// What a launch uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of memory.
    pub memory_bytes: Option<u64>,
    /// The limit on memory in bytes; `None` when there is none.
    pub memory_limit_bytes: Option<u64>,
    /// CPU time.
    pub cpu: Option<Duration>,
    /// Time held back by the CPU limit.
    pub throttled: Option<Duration>,
    /// Processes and threads.
    pub pids: Option<u64>,
    /// For how long at least one of its tasks waited for want of a resource; only the kernel's v2 groups count it.
    pub stalled: Stalled,
}

/// Time lost to want of each resource (`*.pressure` of the kernel's cgroup v2, the line `some`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stalled {
    /// A CPU.
    pub cpu: Option<Duration>,
    /// Memory.
    pub memory: Option<Duration>,
    /// Input and output.
    pub io: Option<Duration>,
}

/// Reads what a launch uses now.
#[must_use]
pub fn usage(cgroups: &[PathBuf]) -> Usage {
    let number = |name: &str| find(cgroups, name)?.trim().parse::<u64>().ok();
    Usage {
        memory_bytes: number("memory.current").or_else(|| number("memory.usage_in_bytes")),
        // v1 writes "no limit" as the largest multiple of a page, v2 as "max".
        memory_limit_bytes: number("memory.max")
            .or_else(|| number("memory.limit_in_bytes"))
            .filter(|bytes| *bytes < 1 << 62),
        cpu: key(cgroups, "cpu.stat", "usage_usec")
            .map(Duration::from_micros)
            .or_else(|| number("cpuacct.usage").map(Duration::from_nanos)),
        throttled: throttled(cgroups),
        pids: number("pids.current"),
        stalled: Stalled {
            cpu: stalled(cgroups, "cpu.pressure"),
            memory: stalled(cgroups, "memory.pressure"),
            io: stalled(cgroups, "io.pressure"),
        },
    }
}

/// How long the kernel has held a launch back for its CPU limit.
#[must_use]
pub fn throttled(cgroups: &[PathBuf]) -> Option<Duration> {
    key(cgroups, "cpu.stat", "throttled_usec")
        .map(Duration::from_micros)
        .or_else(|| key(cgroups, "cpu.stat", "throttled_time").map(Duration::from_nanos))
}

/// Resident memory of a process, in bytes (`VmRSS` of proc_pid_status(5)).
#[must_use]
pub fn resident_bytes(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=12345`, in microseconds.
fn stalled(cgroups: &[PathBuf], file: &str) -> Option<Duration> {
    let text = find(cgroups, file)?;
    let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let total = some.split_ascii_whitespace().find_map(|field| field.strip_prefix("total="))?;
    total.parse().ok().map(Duration::from_micros)
}

fn find(cgroups: &[PathBuf], name: &str) -> Option<String> {
    cgroups.iter().find_map(|directory: &PathBuf| fs::read_to_string(Path::new(directory).join(name)).ok())
}

fn key(cgroups: &[PathBuf], file: &str, key: &str) -> Option<u64> {
    // Hybrid hosts have a cpu.stat in more than one hierarchy; the key decides which is meant.
    cgroups.iter().find_map(|directory| {
        let text = fs::read_to_string(directory.join(file)).ok()?;
        text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_worlds_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let (v1, v2) = (directory.path().join("v1"), directory.path().join("v2"));
        for path in [&v1, &v2] {
            fs::create_dir(path).unwrap();
        }
        fs::write(v1.join("memory.usage_in_bytes"), "4096\n").unwrap();
        fs::write(v1.join("memory.limit_in_bytes"), "9223372036854771712\n").unwrap();
        fs::write(v1.join("cpu.stat"), "nr_periods 4\nthrottled_time 1500\n").unwrap();
        fs::write(v1.join("cpuacct.usage"), "2000\n").unwrap();
        fs::write(v2.join("pids.current"), "3\n").unwrap();
        let pressure =
            "some avg10=0.00 avg60=0.10 avg300=0.02 total=12345\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=9\n";
        fs::write(v2.join("memory.pressure"), pressure).unwrap();
        let both = usage(&[v1.clone(), v2.clone()]);
        let expected = Usage {
            memory_bytes: Some(4096),
            memory_limit_bytes: None,
            cpu: Some(Duration::from_nanos(2000)),
            throttled: Some(Duration::from_nanos(1500)),
            pids: Some(3),
            stalled: Stalled { memory: Some(Duration::from_micros(12_345)), ..Stalled::default() },
        };
        assert_eq!(both, expected);
        fs::write(v2.join("cpu.stat"), "usage_usec 7\nthrottled_usec 2\n").unwrap();
        fs::write(v2.join("memory.max"), "max\n").unwrap();
        let second = usage(&[v2]);
        assert_eq!((second.cpu, second.throttled), (Some(Duration::from_micros(7)), Some(Duration::from_micros(2))));
        assert_eq!(usage(&[]), Usage::default());
    }

    #[test]
    fn this_process_is_resident() {
        assert!(resident_bytes(std::process::id()).unwrap() > 1024);
    }
}
