//! Stopping and resuming all processes of a launch: `cgroup.freeze` of v2, the freezer controller of v1.
//!
//! What is killed while it is frozen must be thawed: on v1 a frozen process does not look at its signals, and on both the
//! frozen init cannot reap. So a kill thaws, after the signal.

use std::{fs, io};

use super::{Group, Groups, Version, read};

impl Groups {
    /// The group by which the launch is frozen.
    fn freezer(&self) -> Option<&Group> {
        let of = |version| self.groups.iter().find(move |group| group.freezer && group.version == version);
        of(Version::V2).or_else(|| of(Version::V1))
    }

    /// Stops every process; `None` when no group can. The kernel has it done a moment later.
    pub(crate) fn freeze(&self) -> Option<io::Result<()>> {
        self.freezer().map(|group| match group.version {
            Version::V1 => fs::write(group.directory.join("freezer.state"), "FROZEN"),
            Version::V2 => fs::write(group.directory.join("cgroup.freeze"), "1"),
        })
    }

    /// Lets them run on.
    pub(crate) fn thaw(&self) -> Option<io::Result<()>> {
        self.freezer().map(|group| match group.version {
            Version::V1 => fs::write(group.directory.join("freezer.state"), "THAWED"),
            Version::V2 => fs::write(group.directory.join("cgroup.freeze"), "0"),
        })
    }

    /// Whether a freeze was asked for and not taken back.
    pub(crate) fn is_freezing(&self) -> bool {
        self.freezer().is_some_and(|group| match group.version {
            Version::V1 => read(&group.directory.join("freezer.state")).is_ok_and(|state| state != "THAWED"),
            Version::V2 => read(&group.directory.join("cgroup.freeze")).is_ok_and(|state| state == "1"),
        })
    }

    /// Whether every process is stopped now.
    pub(super) fn is_frozen(&self) -> Option<bool> {
        let group = self.freezer()?;
        match group.version {
            Version::V1 => read(&group.directory.join("freezer.state")).ok().map(|state| state == "FROZEN"),
            Version::V2 => {
                let events = read(&group.directory.join("cgroup.events")).ok()?;
                Some(events.lines().any(|line| line == "frozen 1"))
            }
        }
    }
}
