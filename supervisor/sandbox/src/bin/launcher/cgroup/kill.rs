//! Ending all processes of a launch: `cgroup.kill` of v2; on v1 freeze, kill, thaw, until nobody is left.
//!
//! Where a plugin has a PID namespace, the end of its init does that everywhere, and v2 only makes it quicker. Without one
//! the groups are all there is.

use std::{collections::BTreeSet, fs, os::fd::OwnedFd};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::{Cgroups, Group, Groups, Version, read};

impl Cgroups {
    /// By which groups a launch can be ended as a whole, or why by none.
    pub(crate) fn kills(&self) -> Result<String, String> {
        let of = |version| self.parents.iter().find(move |parent| parent.version == version && parent.freezer);
        match (of(Version::V2), of(Version::V1)) {
            (Some(parent), _) => Ok(format!("cgroup.kill of cgroup v2 at {}", parent.directory.display())),
            (None, Some(parent)) => Ok(format!("freezer of cgroup v1 at {}", parent.directory.display())),
            (None, None) => {
                let why = self.lacking.first().map(|(_, why)| why.clone());
                Err(why.unwrap_or_else(|| "no cgroup hierarchy that can freeze is mounted".to_owned()))
            }
        }
    }
}

impl Groups {
    /// Kills every member at once where v2 can.
    pub(crate) fn kill(&self) {
        for group in self.groups.iter().filter(|group| group.version == Version::V2) {
            drop(fs::write(group.directory.join("cgroup.kill"), "1"));
        }
    }

    /// The group by which every member can be ended.
    fn killer(&self) -> Option<&Group> {
        let of = |version| self.groups.iter().find(move |group| group.freezer && group.version == version);
        of(Version::V2).or_else(|| of(Version::V1))
    }

    /// Kills the members, as far as one attempt can, and tells whether none was left at its beginning; `None` when no group
    /// can. To be repeated until then: on v1 who is not frozen yet may fork once more. Waits for nothing.
    pub(crate) fn kill_members(&self) -> Option<bool> {
        let group = self.killer()?;
        let members = || read(&group.directory.join("cgroup.procs")).unwrap_or_default();
        match group.version {
            Version::V2 => {
                let gone = members().is_empty();
                drop(fs::write(group.directory.join("cgroup.kill"), "1"));
                Some(gone)
            }
            Version::V1 => {
                let state = group.directory.join("freezer.state");
                drop(fs::write(&state, "FROZEN"));
                // Read before the members: when all are frozen then, no other comes.
                let frozen = read(&state).is_ok_and(|state| state == "FROZEN");
                let found = members();
                let opened: Vec<(&str, OwnedFd)> = found
                    .lines()
                    .filter_map(|pid| {
                        let number = Pid::from_raw(pid.parse().ok()?)?;
                        Some((pid, pidfd_open(number, PidfdFlags::empty()).ok()?))
                    })
                    .collect();
                // A number may be another process's by now; one that is a member still is the one opened.
                let still = members();
                let still: BTreeSet<&str> = still.lines().collect();
                for (_, process) in opened.iter().filter(|(pid, _)| still.contains(pid)) {
                    let _ = pidfd_send_signal(process, Signal::KILL);
                }
                if frozen {
                    // What is frozen does not die.
                    drop(fs::write(&state, "THAWED"));
                }
                Some(found.is_empty())
            }
        }
    }

    /// The file that says that a process can be ended with its group, and what it says of this one.
    pub(crate) fn member_of_killer(&self, pid: i32) -> Option<(bool, String)> {
        let file = self.killer()?.directory.join("cgroup.procs");
        let member = read(&file).is_ok_and(|members| members.lines().any(|member| member == pid.to_string()));
        Some((member, file.display().to_string()))
    }
}
