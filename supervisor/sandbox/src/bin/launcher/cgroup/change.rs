//! Changing the limits of groups that are in use: all that were asked for, or none.

use std::{fs, path::PathBuf};

use plugvisor_sandbox::protocol::{Control, Limits};

use super::{Group, Groups, LimitError, Version, read};

impl Groups {
    /// Whether a limit has a group that can hold it.
    pub(crate) fn can_limit(&self, control: Control) -> bool {
        self.groups.iter().any(|group| group.controls.contains(&control))
    }

    /// Writes the limits that are given and reads them back. On error what was written is taken back. May take as long as
    /// the kernel needs to find the memory that a lower limit takes away, so it is not called by the loop.
    pub(crate) fn change(&self, limits: &Limits) -> Result<(), LimitError> {
        let before = self.before(limits);
        let changed = self.change_each(limits);
        if changed.is_err() {
            restore(&before);
        }
        changed
    }

    fn change_each(&self, limits: &Limits) -> Result<(), LimitError> {
        for group in &self.groups {
            for control in &group.controls {
                let wrong = |why| LimitError { control: *control, why };
                if let (Control::MemoryLimit, Some(bytes)) = (control, limits.memory_bytes) {
                    group.make_way(bytes).map_err(wrong)?;
                }
                group.limit(*control, limits, self.besides).map_err(wrong)?;
            }
        }
        Ok(())
    }

    /// The values of the files that such a change writes, to take it back by [`restore`]; those that this kernel does not
    /// have are not written either.
    pub(crate) fn before(&self, limits: &Limits) -> Vec<(PathBuf, String)> {
        let mut before = Vec::new();
        for group in &self.groups {
            for control in &group.controls {
                let paths = group.files(*control, limits).iter().map(|file| group.directory.join(file));
                before.extend(paths.filter_map(|path| Some((path.clone(), read(&path).ok()?))));
            }
        }
        before
    }
}

/// Writes the values that files had. Every limit in them is one that held, so the kernel has nothing to reclaim.
pub(crate) fn restore(before: &[(PathBuf, String)]) {
    for (path, value) in before.iter().rev() {
        drop(fs::write(path, value));
    }
}

impl Group {
    fn files(&self, control: Control, limits: &Limits) -> &'static [&'static str] {
        match (control, self.version) {
            (Control::MemoryLimit, _) if limits.memory_bytes.is_none() => &[],
            (Control::MemoryLimit, Version::V1) => {
                &["memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.swappiness"]
            }
            (Control::MemoryLimit, Version::V2) => {
                &["memory.max", "memory.high", "memory.swap.max", "memory.oom.group"]
            }
            (Control::CpuLimit, _) if limits.cpu_percent.is_none() => &[],
            (Control::CpuLimit, Version::V1) => &["cpu.cfs_period_us", "cpu.cfs_quota_us"],
            (Control::CpuLimit, Version::V2) => &["cpu.max"],
            (Control::PidsLimit, _) if limits.pids.is_some() => &["pids.max"],
            _ => &[],
        }
    }

    /// Refuses a memory limit below what is used: v2 would kill for it. On v1 memory and swap together may never have
    /// less than memory alone, so a higher limit begins with them.
    fn make_way(&self, bytes: u64) -> Result<(), String> {
        let (usage, limit) = match self.version {
            Version::V1 => ("memory.usage_in_bytes", "memory.limit_in_bytes"),
            Version::V2 => ("memory.current", "memory.max"),
        };
        let number = |file| read(&self.directory.join(file)).ok().and_then(|text| text.parse::<u64>().ok());
        if let Some(used) = number(usage).filter(|used| *used > bytes) {
            return Err(format!("{used} bytes are in use, more than the new limit of {bytes}"));
        }
        let swap = self.directory.join("memory.memsw.limit_in_bytes");
        if self.version == Version::V1 && number(limit).is_some_and(|now| now < bytes) && swap.exists() {
            self.set("memory.memsw.limit_in_bytes", &bytes.to_string(), |_| true)?;
        }
        Ok(())
    }
}
