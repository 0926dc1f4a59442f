//! Cgroups: a group of its own for each launch, with limits that are read back after they are written.
//!
//! Plain files in the launcher's own part of the tree: below the group that the launcher was started in, so that every
//! cap around it stays. It works with v1 hierarchies, v2, and both at once; it knows nothing of what a plugin is.

mod change;
mod clear;
mod freeze;
mod kill;
mod locate;
mod stats;

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
};

use plugvisor_sandbox::protocol::{Control, Limits};
use rustix::{
    event::{EventfdFlags, epoll::EventFlags, eventfd},
    fs::{FlockOperation, Mode, OFlags},
};

use self::locate::{Own, Version};
pub(crate) use self::{change::restore, clear::clear, stats::open_files};

/// The controllers that hold limits.
const CONTROLLERS: [(&str, Control); 3] =
    [("memory", Control::MemoryLimit), ("cpu", Control::CpuLimit), ("pids", Control::PidsLimit)];

/// The length of the kernel's accounting period for the CPU limit, in microseconds.
const PERIOD_US: u64 = 100_000;

/// The launcher's parent groups.
#[derive(Debug)]
pub(crate) struct Cgroups {
    parents: Vec<Parent>,
    /// Why each control that has no parent has none.
    lacking: Vec<(Control, String)>,
    /// The v2 group that the launcher left for a leaf of its own, and the leaf.
    moved: Option<(PathBuf, PathBuf)>,
    /// The highest number that ends the name of a group which a killed launcher left and which cannot be removed yet.
    highest_left: u64,
}

/// How the default policy names a launcher's groups, see `plugvisor_sandbox::options`.
const NAME: &str = "plugvisor-";

#[derive(Debug)]
struct Parent {
    version: Version,
    directory: PathBuf,
    controls: Vec<Control>,
    /// Its groups can be frozen.
    freezer: bool,
    /// The directory, locked (flock(2)) for as long as this launcher lives: the next one sees that it is not a leftover.
    _lock: OwnedFd,
}

/// The groups of one launch.
#[derive(Debug)]
pub(crate) struct Groups {
    groups: Vec<Group>,
    /// Processes in them that are not the plugin's, and do not count for its limit: its init.
    besides: u32,
}

#[derive(Debug)]
struct Group {
    version: Version,
    directory: PathBuf,
    controls: Vec<Control>,
    freezer: bool,
}

/// A limit that could not be set.
#[derive(Debug)]
pub(crate) struct LimitError {
    pub(crate) control: Control,
    pub(crate) why: String,
}

impl Cgroups {
    /// Makes a parent group of this name below the launcher's own in every hierarchy that has a useful controller.
    pub(crate) fn set_up(name: &str) -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let own = locate::own_groups(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup"));
        let mut cgroups = Self { parents: Vec::new(), lacking: Vec::new(), moved: None, highest_left: 0 };
        for group in own.iter().filter(|group| group.version == Version::V1) {
            let has = |name: &str| group.controllers.iter().any(|other| other == name);
            let controls: Vec<Control> =
                CONTROLLERS.iter().filter(|(name, _)| has(name)).map(|(_, control)| *control).collect();
            let freezer = has("freezer");
            if freezer || !controls.is_empty() {
                let directory = group.directory.join(name);
                cgroups.adopt(Version::V1, directory, controls, freezer, |_| Ok(()));
            }
        }
        if let Some(group) = own.iter().find(|group| group.version == Version::V2) {
            cgroups.set_up_v2(group, name);
        }
        for (_, control) in CONTROLLERS {
            let known = cgroups.parent(control).is_some() || cgroups.lacking.iter().any(|(other, _)| *other == control);
            if !known {
                cgroups.lacking.push((control, "no cgroup hierarchy with its controller is mounted".to_owned()));
            }
        }
        cgroups
    }

    /// Launches are to be numbered above this, so that no group of a new one has the name of one that was left.
    pub(crate) const fn highest_left(&self) -> u64 {
        self.highest_left
    }

    fn adopt(
        &mut self,
        version: Version,
        directory: PathBuf,
        controls: Vec<Control>,
        freezer: bool,
        prepare: impl FnOnce(&Path) -> io::Result<()>,
    ) {
        remove_leftovers(&directory);
        let made = match make_readable(&directory) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.highest_left = self.highest_left.max(remove_empty_children(&directory));
                prepare(&directory)
            }
            made => made.and_then(|()| prepare(&directory)),
        };
        // Without the right to write the group's member list no child could join.
        let made = made.and_then(|()| members(version, &directory).map(drop)).and_then(|()| lock(&directory));
        match made {
            Ok(lock) => self.parents.push(Parent { version, directory, controls, freezer, _lock: lock }),
            Err(error) => {
                let why = format!("{} cannot be made or used: {error}", directory.display());
                self.lacking.extend(controls.into_iter().map(|control| (control, why.clone())));
                drop(fs::remove_dir(&directory));
            }
        }
    }

    /// On v2 a group with processes cannot give controllers to its children (all but the root), so the launcher and
    /// its starter move into a leaf inside the delegated group first.
    fn set_up_v2(&mut self, own: &Own, name: &str) {
        let available = fs::read_to_string(own.directory.join("cgroup.controllers")).unwrap_or_default();
        let wanted: Vec<(&str, Control)> = CONTROLLERS
            .into_iter()
            .filter(|(name, control)| {
                self.parent(*control).is_none() && available.split_whitespace().any(|c| c == *name)
            })
            .collect();
        if wanted.is_empty() {
            return;
        }
        let enable: String = wanted.iter().map(|(name, _)| format!("+{name} ")).collect();
        let controls: Vec<Control> = wanted.iter().map(|(_, control)| *control).collect();
        let subtree = |directory: &Path| fs::write(directory.join("cgroup.subtree_control"), enable.trim());
        let leaf = own.directory.join(format!("{name}-supervisor"));
        let ready = subtree(&own.directory).or_else(|error| {
            if error.raw_os_error() != Some(libc::EBUSY) {
                return Err(error);
            }
            fs::create_dir(&leaf).or_else(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => Ok(()),
                _ => Err(error),
            })?;
            self.moved = Some((own.directory.clone(), leaf.clone()));
            for pid in to_move(&own.directory)? {
                fs::write(leaf.join("cgroup.procs"), pid.to_string())?;
            }
            subtree(&own.directory)
        });
        match ready {
            Ok(()) => self.adopt(Version::V2, own.directory.join(name), controls, true, subtree),
            Err(error) => {
                let why = format!(
                    "{} is not delegated to the launcher, or holds other processes: {error}",
                    own.directory.display()
                );
                self.lacking.extend(controls.into_iter().map(|control| (control, why.clone())));
                self.move_back();
            }
        }
    }

    fn parent(&self, control: Control) -> Option<&Parent> {
        self.parents.iter().find(|parent| parent.controls.contains(&control))
    }

    /// Where this control's groups are made, or why it has none.
    pub(crate) fn place(&self, control: Control) -> Result<String, String> {
        if let Some(parent) = self.parent(control) {
            let version = match parent.version {
                Version::V1 => "v1",
                Version::V2 => "v2",
            };
            return Ok(format!("cgroup {version} at {}", parent.directory.display()));
        }
        let why = self.lacking.iter().find(|(other, _)| *other == control).map(|(_, why)| why.clone());
        Err(why.unwrap_or_else(|| "it is not a limit of a cgroup".to_owned()))
    }

    /// Makes a launch's groups, writes the limits that have a controller, and reads them back. `besides` is the number of
    /// processes in it that are not the plugin's.
    pub(crate) fn create(&self, name: &str, limits: &Limits, besides: u32) -> Result<Groups, LimitError> {
        let mut groups = Groups { groups: Vec::new(), besides };
        let made = self.fill(&mut groups, name, limits);
        if made.is_err() {
            groups.remove();
        }
        made.map(|()| groups)
    }

    fn fill(&self, groups: &mut Groups, name: &str, limits: &Limits) -> Result<(), LimitError> {
        for parent in &self.parents {
            let directory = parent.directory.join(name);
            let fails = |error: io::Error| LimitError {
                // A group that only freezes is there so that all processes can be ended together.
                control: parent.controls.first().copied().unwrap_or(Control::WholeKill),
                why: format!("{} cannot be made: {error}", directory.display()),
            };
            make_readable(&directory).map_err(fails)?;
            groups.groups.push(Group {
                version: parent.version,
                directory: directory.clone(),
                controls: parent.controls.clone(),
                freezer: parent.freezer,
            });
        }
        groups.set_limits(limits)
    }

    /// Uses no groups from here on: they cannot be joined.
    pub(crate) fn give_up(&mut self, why: &str) {
        for (_, control) in CONTROLLERS {
            if self.parent(control).is_some() {
                self.lacking.push((control, why.to_owned()));
            }
        }
        self.tear_down();
    }

    /// Removes the parent groups, if nothing is left in them.
    pub(crate) fn tear_down(&mut self) {
        for parent in self.parents.drain(..) {
            drop(fs::remove_dir(&parent.directory));
        }
        self.move_back();
    }

    fn move_back(&mut self) {
        let Some((own, leaf)) = self.moved.take() else { return };
        let off: String = CONTROLLERS.iter().map(|(name, _)| format!("-{name} ")).collect();
        drop(fs::write(own.join("cgroup.subtree_control"), off.trim()));
        for pid in fs::read_to_string(leaf.join("cgroup.procs")).unwrap_or_default().lines() {
            drop(fs::write(own.join("cgroup.procs"), pid));
        }
        drop(fs::remove_dir(leaf));
    }
}

impl Groups {
    /// Each group's member list, open for writing, for the child to join; without the v2 group when the child is to be
    /// born there.
    pub(crate) fn joins(&self, born_in_v2: bool) -> io::Result<Vec<OwnedFd>> {
        let joined = self.groups.iter().filter(|group| !(born_in_v2 && group.version == Version::V2));
        joined.map(|group| members(group.version, &group.directory)).collect()
    }

    /// The v2 group's directory, for `CLONE_INTO_CGROUP`: joining by a write costs an RCU grace period there.
    pub(crate) fn v2_directory(&self) -> io::Result<Option<OwnedFd>> {
        let group = self.groups.iter().find(|group| group.version == Version::V2);
        group.map(|group| open(&group.directory, OFlags::RDONLY | OFlags::DIRECTORY)).transpose()
    }

    /// Names the groups anew. v2 knows no renaming; there the name stays.
    pub(crate) fn rename(&mut self, name: &str) -> io::Result<()> {
        for group in self.groups.iter_mut().filter(|group| group.version == Version::V1) {
            let named = group.directory.with_file_name(name);
            fs::rename(&group.directory, &named)?;
            group.directory = named;
        }
        Ok(())
    }

    /// Writes the limits that have a controller, and reads them back.
    pub(crate) fn set_limits(&self, limits: &Limits) -> Result<(), LimitError> {
        for group in &self.groups {
            for control in &group.controls {
                group.limit(*control, limits, self.besides).map_err(|why| LimitError { control: *control, why })?;
            }
        }
        Ok(())
    }

    /// The directories, for people.
    pub(crate) fn directories(&self) -> Vec<String> {
        self.groups.iter().map(|group| group.directory.display().to_string()).collect()
    }

    /// What the kernel says about a limit now, and the file that says it.
    pub(crate) fn read_back(&self, control: Control) -> Option<(io::Result<String>, String)> {
        let group = self.groups.iter().find(|group| group.controls.contains(&control))?;
        let file = group.directory.join(match (control, group.version) {
            (Control::MemoryLimit, Version::V1) => "memory.limit_in_bytes",
            (Control::MemoryLimit, Version::V2) => "memory.max",
            (Control::CpuLimit, Version::V1) => "cpu.cfs_quota_us",
            (Control::CpuLimit, Version::V2) => "cpu.max",
            (Control::PidsLimit, _) => "pids.max",
            _ => return None,
        });
        let value = read(&file).map(|value| match (control, group.version) {
            (Control::MemoryLimit, _) => format!("{value} bytes"),
            (Control::CpuLimit, Version::V1) => format!("{value} of {PERIOD_US} microseconds"),
            (Control::CpuLimit, Version::V2) => format!("{} microseconds", value.replace(' ', " of ")),
            _ => value,
        });
        Some((value, file.display().to_string()))
    }

    /// Watches for the kernel killing a member for memory.
    pub(crate) fn watch_memory(&self) -> io::Result<Option<MemoryWatch>> {
        let Some(group) = self.groups.iter().find(|group| group.controls.contains(&Control::MemoryLimit)) else {
            return Ok(None);
        };
        match group.version {
            Version::V1 => {
                let control = open(&group.directory.join("memory.oom_control"), OFlags::RDONLY)?;
                let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
                let line = format!("{} {}", raw(&event), raw(&control));
                fs::write(group.directory.join("cgroup.event_control"), line)?;
                Ok(Some(MemoryWatch { event, version: Version::V1 }))
            }
            Version::V2 => {
                let event = open(&group.directory.join("memory.events"), OFlags::RDONLY)?;
                Ok(Some(MemoryWatch { event, version: Version::V2 }))
            }
        }
    }

    /// Removes the groups; false while the kernel still holds one for a process that is on its way out.
    pub(crate) fn remove(&mut self) -> bool {
        self.groups.retain(|group| match fs::remove_dir(&group.directory) {
            Ok(()) => false,
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        });
        self.groups.is_empty()
    }
}

/// Tells of kills for memory in one launch.
#[derive(Debug)]
pub(crate) struct MemoryWatch {
    event: OwnedFd,
    version: Version,
}

impl MemoryWatch {
    /// Ready for reading (v1) or with priority data (v2) when something happened.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// What to wait for.
    pub(crate) const fn interest(&self) -> EventFlags {
        match self.version {
            Version::V1 => EventFlags::IN,
            Version::V2 => EventFlags::PRI,
        }
    }

    /// Whether the group ran out of memory; called when the descriptor is ready, and once more at the end.
    pub(crate) fn ran_out(&self) -> bool {
        match self.version {
            // The eventfd counts times out of memory. It comes before the kill, so no file need say so yet.
            Version::V1 => matches!(rustix::io::read(&self.event, &mut [0; 8]), Ok(8)),
            Version::V2 => {
                let mut bytes = [0; 512];
                let read = rustix::io::pread(&self.event, &mut bytes, 0).unwrap_or(0);
                let text = String::from_utf8_lossy(&bytes[..read]).into_owned();
                text.lines().any(|line| line.strip_prefix("oom_kill ").is_some_and(|count| count.trim() != "0"))
            }
        }
    }
}

impl Group {
    /// Writes the limit, if one was asked for, and checks what the kernel made of it.
    fn limit(&self, control: Control, limits: &Limits, besides: u32) -> Result<(), String> {
        match (control, self.version) {
            (Control::MemoryLimit, version) => {
                let Some(bytes) = limits.memory_bytes else { return Ok(()) };
                // The kernel counts in pages, which have 64 KiB at most.
                let holds = |file: &str, most: u64| {
                    let rounded = |got: u64| got <= most && most - got < 65_536;
                    self.set(file, &most.to_string(), |value| value.parse().is_ok_and(rounded))
                };
                match version {
                    Version::V1 => {
                        holds("memory.limit_in_bytes", bytes)?;
                        // Absent when the kernel does not account swap; then there is nothing to cap.
                        if self.directory.join("memory.memsw.limit_in_bytes").exists() {
                            holds("memory.memsw.limit_in_bytes", bytes)?;
                        }
                        self.set("memory.swappiness", "0", |value| value == "0")
                    }
                    Version::V2 => {
                        holds("memory.max", bytes)?;
                        // No threshold below it: what a plugin has taken for good is not had back by slowing it down, ADR 17.
                        self.set("memory.high", "max", |value| value == "max")?;
                        if self.directory.join("memory.swap.max").exists() {
                            self.set("memory.swap.max", "0", |value| value == "0")?;
                        }
                        self.set("memory.oom.group", "1", |value| value == "1")
                    }
                }
            }
            (Control::CpuLimit, version) => {
                let Some(percent) = limits.cpu_percent else { return Ok(()) };
                let quota = (u64::from(percent) * PERIOD_US / 100).to_string();
                match version {
                    Version::V1 => {
                        let period = PERIOD_US.to_string();
                        self.set("cpu.cfs_period_us", &period, |value| value == period)?;
                        self.set("cpu.cfs_quota_us", &quota, |value| value == quota)
                    }
                    Version::V2 => {
                        let line = format!("{quota} {PERIOD_US}");
                        self.set("cpu.max", &line, |value| value == line)
                    }
                }
            }
            (Control::PidsLimit, _) => {
                let Some(pids) = limits.pids else { return Ok(()) };
                let max = (u64::from(pids) + u64::from(besides)).to_string();
                self.set("pids.max", &max, |value| value == max)
            }
            _ => Ok(()),
        }
    }

    fn set(&self, file: &str, value: &str, good: impl Fn(&str) -> bool) -> Result<(), String> {
        let path = self.directory.join(file);
        fs::write(&path, value).map_err(|error| format!("writing {value:?} to {} failed: {error}", path.display()))?;
        let got = read(&path).map_err(|error| format!("reading {} failed: {error}", path.display()))?;
        if good(&got) { Ok(()) } else { Err(format!("{} is {got} after {value} was written", path.display())) }
    }
}

/// Who must leave the group for a leaf: the launcher, and its starter if that is in the same group. One that is
/// elsewhere, such as a service manager, is none of the launcher's business.
fn to_move(group: &Path) -> io::Result<Vec<i32>> {
    let raw = |pid: rustix::process::Pid| pid.as_raw_nonzero().get();
    let starter = rustix::process::getppid().map(raw);
    let members = read(&group.join("cgroup.procs"))?;
    let here = |pid: &i32| members.lines().any(|line| line == pid.to_string());
    Ok(starter.filter(here).into_iter().chain([raw(rustix::process::getpid())]).collect())
}

/// A group that others may read: the supervisor, which is another user, shows what a plugin uses. The umask says no.
fn make_readable(directory: &Path) -> io::Result<()> {
    fs::create_dir(directory)?;
    fs::set_permissions(directory, PermissionsExt::from_mode(0o755))
}

/// Removes what launchers left beside `directory` that were killed. Such a group has the name of the default policy
/// ([`NAME`] and the number of the process that started the launcher), that process is gone, and nobody holds its lock.
/// Groups with processes cannot be removed and stay.
fn remove_leftovers(directory: &Path) {
    for entry in directory.parent().map(fs::read_dir).into_iter().flatten().flatten().flatten() {
        let name = entry.file_name();
        let starter = name.to_str().and_then(|name| name.strip_prefix(NAME)?.parse::<u32>().ok());
        let gone = starter.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists());
        let path = entry.path();
        // The lock is let go at once: who removes an empty directory first does not matter.
        if gone && path != directory && lock(&path).is_ok() {
            remove_empty_children(&path);
            drop(fs::remove_dir(&path));
        }
    }
}

fn lock(directory: &Path) -> io::Result<OwnedFd> {
    let descriptor = open(directory, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW)?;
    rustix::fs::flock(&descriptor, FlockOperation::NonBlockingLockExclusive)?;
    Ok(descriptor)
}

/// Removes what a launcher of the same name left when it was killed. Groups with processes, which may take a while to die,
/// cannot be removed and stay: tells the highest number that the name of one ends with. A number that no launcher counts up
/// to is a plugin's joke: a rootless one can have a group of any name there.
fn remove_empty_children(directory: &Path) -> u64 {
    let mut highest = 0;
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let name = entry.file_name();
            let number = || name.to_str()?.rsplit_once('-')?.1.parse().ok().filter(|number| *number < u64::MAX >> 1);
            if fs::remove_dir(entry.path()).is_err() {
                highest = highest.max(number().unwrap_or(0));
            }
        }
    }
    highest
}

fn read(path: &Path) -> io::Result<String> {
    fs::read_to_string(path).map(|text| text.trim().to_owned())
}

/// The file by which a process joins. On v1 it is `tasks` and not `cgroup.procs`: a thread that moves itself needs no
/// lock over all thread groups of the machine, for which the kernel waits an RCU grace period (measured: 0.04 ms against
/// 11 ms). The child has one thread, so it makes no other difference.
fn members(version: Version, directory: &Path) -> io::Result<OwnedFd> {
    let file = match version {
        Version::V1 => "tasks",
        Version::V2 => "cgroup.procs",
    };
    open(&directory.join(file), OFlags::WRONLY)
}

fn open(path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())?)
}

fn raw(fd: &OwnedFd) -> i32 {
    use std::os::fd::AsRawFd;
    fd.as_raw_fd()
}
