//! Where the launcher's own group is in each cgroup hierarchy. Pure: from the text of `/proc/self/mountinfo` and
//! `/proc/self/cgroup` (cgroups(7), proc_pid_mountinfo(5)).

use std::path::{Path, PathBuf};

/// Which interface a hierarchy has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    /// One hierarchy for each controller, or for a few together.
    V1,
    /// One hierarchy for all.
    V2,
}

/// The launcher's own group in one hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Own {
    pub(crate) version: Version,
    pub(crate) directory: PathBuf,
    /// The v1 controllers of the hierarchy; empty for v2, whose controllers stand in a file.
    pub(crate) controllers: Vec<String>,
}

/// Every hierarchy that is mounted and shows the launcher's own group.
pub(crate) fn own_groups(mountinfo: &str, self_cgroup: &str) -> Vec<Own> {
    let mut found: Vec<Own> = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let left: Vec<&str> = left.split(' ').collect();
        let right: Vec<&str> = right.split(' ').collect();
        let (&[_, _, _, root, mount_point, ..], &[kind, _, options, ..]) = (left.as_slice(), right.as_slice()) else {
            continue;
        };
        let version = match kind {
            "cgroup" => Version::V1,
            "cgroup2" => Version::V2,
            _ => continue,
        };
        let options: Vec<&str> = options.split(',').collect();
        let membership = self_cgroup.lines().find_map(|line| {
            let (number, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            let ours = match version {
                Version::V1 => !controllers.is_empty() && controllers.split(',').all(|name| options.contains(&name)),
                Version::V2 => number == "0" && controllers.is_empty(),
            };
            ours.then_some((controllers, path))
        });
        let Some((controllers, path)) = membership else { continue };
        let Some(directory) = beneath(&unescape(mount_point), &unescape(root), path) else { continue };
        let controllers = match version {
            Version::V1 => controllers.split(',').map(str::to_owned).collect(),
            Version::V2 => Vec::new(),
        };
        if !found.iter().any(|own| own.version == version && own.controllers == controllers) {
            found.push(Own { version, directory, controllers });
        }
    }
    found
}

/// The group's directory, when the part of the hierarchy that is mounted holds it.
fn beneath(mount_point: &str, root: &str, path: &str) -> Option<PathBuf> {
    let inside = Path::new(path).strip_prefix(root).ok()?;
    // A group outside of the cgroup namespace's root is shown as "/..".
    let plain = inside.components().all(|part| matches!(part, std::path::Component::Normal(_)));
    plain.then(|| Path::new(mount_point).join(inside))
}

/// Undoes the kernel's octal escapes for space, tab, newline and backslash.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(version: Version, directory: &str, controllers: &[&str]) -> Own {
        let controllers = controllers.iter().map(ToString::to_string).collect();
        Own { version, directory: directory.into(), controllers }
    }

    #[test]
    fn v2_only() {
        let mounts = "29 22 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        let found = own_groups(mounts, "0::/user.slice/user-1000.slice/user@1000.service/app.slice/run-1.scope\n");
        let path = "/sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/app.slice/run-1.scope";
        assert_eq!(found, [own(Version::V2, path, &[])]);
    }

    #[test]
    fn hybrid_keeps_outer_groups() {
        let mounts = "\
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
42 31 0:38 / /elsewhere rw - cgroup2 cgroup2 rw
";
        let groups = "9:name=systemd:/\n4:memory:/outer/cap\n2:cpu,cpuacct:/\n0::/\n";
        assert_eq!(
            own_groups(mounts, groups),
            [
                own(Version::V1, "/sys/fs/cgroup/cpu,cpuacct", &["cpu", "cpuacct"]),
                own(Version::V1, "/sys/fs/cgroup/memory/outer/cap", &["memory"]),
                own(Version::V1, "/sys/fs/cgroup/systemd", &["name=systemd"]),
                own(Version::V2, "/sys/fs/cgroup/unified", &[]),
            ]
        );
    }

    #[test]
    fn a_part_of_the_hierarchy_is_mounted() {
        let mounts = "35 31 0:32 /docker/abc /sys/fs/cgroup/my\\040memory rw - cgroup cgroup rw,memory\n";
        let found = own_groups(mounts, "4:memory:/docker/abc/inner\n");
        assert_eq!(found, [own(Version::V1, "/sys/fs/cgroup/my memory/inner", &["memory"])]);
        assert_eq!(own_groups(mounts, "4:memory:/docker/other\n"), []);
        let namespaced = "29 22 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(own_groups(namespaced, "0::/../sibling\n"), []);
    }

    #[test]
    fn garbage_is_passed_over() {
        assert_eq!(own_groups("", ""), []);
        assert_eq!(own_groups("1 2 3\n - \na - cgroup2\n", "x\n0:\n::\n"), []);
    }
}
