//! What a launch uses, read from its groups.

use std::{fs, path::Path};

use plugvisor_sandbox::protocol::{Control, Stats};

use super::{Groups, Version, read};

/// How many processes are looked at where no controller counts CPU time.
const MOST_PROCESSES: usize = 256;
/// The unit of times in `/proc/PID/stat`: 1/USER_HZ s, which is 100 on every architecture that this runs on.
const TICK_NANOS: u64 = 10_000_000;

impl Groups {
    /// What the groups of a launch say; `init` is its first process, for what only processes say.
    pub(crate) fn stats(&self, init: i32) -> Stats {
        let mut stats = Stats { frozen: self.is_frozen(), ..Stats::default() };
        for group in &self.groups {
            let file = |name: &str| read(&group.directory.join(name)).ok();
            let number = |name: &str| file(name).and_then(|text| text.parse::<u64>().ok());
            let field = |name: &str, key: &str| file(name).and_then(|text| keyed(&text, key));
            let counts = |control| group.controls.contains(&control);
            match group.version {
                Version::V1 => {
                    if counts(Control::MemoryLimit) {
                        stats.memory_bytes = number("memory.usage_in_bytes");
                        stats.memory_peak_bytes = number("memory.max_usage_in_bytes");
                        // Without a limit it is the largest multiple of a page.
                        stats.memory_limit_bytes = number("memory.limit_in_bytes").filter(|bytes| *bytes < 1 << 62);
                        stats.oom_kills = field("memory.oom_control", "oom_kill");
                    }
                    if counts(Control::CpuLimit) {
                        stats.cpu_periods = field("cpu.stat", "nr_periods");
                        stats.cpu_throttled_periods = field("cpu.stat", "nr_throttled");
                        stats.cpu_throttled_nanos = field("cpu.stat", "throttled_time");
                    }
                    // Where both controllers are mounted together.
                    stats.cpu_nanos = stats.cpu_nanos.or_else(|| number("cpuacct.usage"));
                }
                Version::V2 => {
                    if counts(Control::MemoryLimit) {
                        stats.memory_bytes = number("memory.current");
                        stats.memory_peak_bytes = number("memory.peak");
                        stats.memory_limit_bytes = number("memory.max");
                        stats.oom_kills = field("memory.events", "oom_kill");
                    }
                    let micros = |key| field("cpu.stat", key).map(|micros| micros.saturating_mul(1000));
                    if counts(Control::CpuLimit) {
                        stats.cpu_periods = field("cpu.stat", "nr_periods");
                        stats.cpu_throttled_periods = field("cpu.stat", "nr_throttled");
                        stats.cpu_throttled_nanos = micros("throttled_usec");
                    }
                    // Counted in every v2 group, whatever is enabled.
                    stats.cpu_nanos = micros("usage_usec").or(stats.cpu_nanos);
                }
            }
            if counts(Control::PidsLimit) {
                stats.pids = number("pids.current");
            }
        }
        stats.cpu_nanos = stats.cpu_nanos.or_else(|| self.cpu_of_processes(init));
        stats
    }

    /// The CPU time of the processes that live, each with the children that it has waited for.
    fn cpu_of_processes(&self, init: i32) -> Option<u64> {
        let members = self.groups.first().and_then(|group| read(&group.directory.join("cgroup.procs")).ok());
        let members: Vec<i32> = members.map_or_else(
            || vec![init],
            |text| text.lines().take(MOST_PROCESSES + 1).filter_map(|pid| pid.parse().ok()).collect(),
        );
        if members.len() > MOST_PROCESSES {
            return None;
        }
        let ticks: u64 = members.into_iter().filter_map(ticks).sum();
        Some(ticks.saturating_mul(TICK_NANOS))
    }
}

/// How many descriptors a process has open.
pub(crate) fn open_files(pid: i32) -> Option<u64> {
    const MOST: usize = 1 << 16;
    let directory = Path::new("/proc").join(pid.to_string()).join("fd");
    // The kernel counts them itself since Linux 6.2.
    match fs::metadata(&directory).ok()?.len() {
        0 => Some(fs::read_dir(directory).ok()?.take(MOST).count() as u64),
        count => Some(count),
    }
}

/// utime, stime, cutime and cstime of proc_pid_stat(5).
fn ticks(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before it may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<u64> = rest.split_whitespace().skip(11).take(4).filter_map(|field| field.parse().ok()).collect();
    (fields.len() == 4).then(|| fields.iter().sum())
}

/// The number behind a key, one pair on a line.
fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_whole_words() {
        let text = "oom_kill_disable 0\nunder_oom 0\noom_kill 7";
        assert_eq!(keyed(text, "oom_kill"), Some(7));
        assert_eq!(keyed(text, "oom"), None);
    }

    #[test]
    fn a_process_is_measured() {
        let own = rustix::process::getpid().as_raw_nonzero().get();
        let before = open_files(own).expect("a number");
        let _open: Vec<_> = (0..64).map(|_| fs::File::open("/dev/null").expect("opens")).collect();
        assert!(open_files(own).expect("a number") >= before.min(3) + 61, "other tests open and close too");
        assert!(ticks(own).is_some());
        assert_eq!(ticks(-1), None);
    }
}
