//! Where launchers are put on a host that has cgroup v2 alone: each into a group of its own, as a service manager would.
//!
//! A v2 group with processes in it gives no controllers to its children, so of launchers that shared the test program's
//! group none could set a limit. The test program moves into a leaf, and launchers get groups beside it. Where the test
//! program's own group is not its to divide, or has no controllers, launchers stay where the test program is.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "two crates of tests, each of which uses a part")]

use std::{
    fs, io,
    os::unix::{fs::chown, process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
};

const CONTROLLERS: &str = "+memory +cpu +pids";

/// How long the kernel may take to let go of processes that were killed.
const LETTING_GO: std::time::Duration = std::time::Duration::from_secs(20);

/// A place for one launcher at a time, or for a supervisor that starts one. Its group goes when this is dropped.
#[derive(Debug)]
pub struct Place {
    group: Option<PathBuf>,
    /// Who runs there, when it is somebody else than this process.
    user: Option<u32>,
}

impl Place {
    /// A place for this user, or for the user of this process.
    pub fn new(user: Option<u32>) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let group = ground().map(|ground| {
            let group = ground.join(format!("launcher-{}", COUNT.fetch_add(1, Ordering::Relaxed)));
            fs::create_dir(&group).expect("a group");
            for file in ["", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"] {
                // Delegated as cgroups(7) says.
                chown(group.join(file), user, user).expect("chown");
            }
            group
        });
        Self { group, user }
    }

    /// Whether whoever runs there can set limits.
    pub fn has_limits(&self) -> bool {
        self.group.is_some()
    }

    /// A command that runs the program there.
    pub fn command(&self, program: &Path) -> Command {
        let mut command;
        match (&self.group, self.user) {
            (None, user) => {
                command = Command::new(program);
                if let Some(user) = user {
                    command.uid(user).gid(user);
                }
            }
            (Some(group), user) => {
                // The shell becomes the program, so that the process is this one's child. Only it may leave this
                // process's group for the new one, so it changes its user afterwards.
                command = Command::new("/bin/sh");
                command.args(["-c", "echo $$ >\"$0/cgroup.procs\" && exec \"$@\""]).arg(group);
                if let Some(user) = user {
                    let user = user.to_string();
                    command.args(["/usr/bin/setpriv", "--reuid", &user, "--regid", &user, "--clear-groups", "--"]);
                }
                command.arg(program);
            }
        }
        command
    }

    /// Makes the place as it was: what a launcher left that was killed. Everything in it has ended or is about to.
    pub fn clear(&self) {
        let Some(group) = &self.group else { return };
        remove_beneath(group);
        fs::write(group.join("cgroup.subtree_control"), CONTROLLERS.replace('+', "-")).expect("no controllers");
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(group) = &self.group {
            remove_beneath(group);
            drop(remove(group));
        }
    }
}

fn remove_beneath(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_beneath(&entry.path());
            drop(remove(&entry.path()));
        }
    }
}

/// Removes a group, once the last of its processes is gone: they have been killed by now.
fn remove(group: &Path) -> io::Result<()> {
    let began = std::time::Instant::now();
    loop {
        match fs::remove_dir(group) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && began.elapsed() < LETTING_GO => {
                // The kernel tells of it by inotify, which is more than this is worth.
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            ended => return ended,
        }
    }
}

/// The test program's own group, with controllers for groups beneath it.
fn ground() -> Option<&'static Path> {
    static GROUND: OnceLock<Option<PathBuf>> = OnceLock::new();
    GROUND.get_or_init(divide).as_deref()
}

fn divide() -> Option<PathBuf> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    // With v1 hierarchies there are more lines.
    let own = groups.strip_prefix("0::/")?.strip_suffix('\n').filter(|path| !path.contains('\n'))?;
    let own = Path::new("/sys/fs/cgroup").join(own);
    let offered = fs::read_to_string(own.join("cgroup.controllers")).ok()?;
    let has = |wanted: &str| offered.split_whitespace().any(|offered| offered == &wanted[1..]);
    if !CONTROLLERS.split(' ').all(has) {
        return None;
    }
    let leaf = own.join("tests");
    let divided = fs::create_dir(&leaf)
        .and_then(|()| move_into(&own, &leaf))
        .and_then(|()| fs::write(own.join("cgroup.subtree_control"), CONTROLLERS));
    if divided.is_err() {
        // Another program is in the group, or it is somebody else's.
        drop(fs::write(own.join("cgroup.procs"), std::process::id().to_string()));
        drop(fs::remove_dir(&leaf));
        return None;
    }
    Some(own)
}

/// Moves this process, and then what other tests have started meanwhile: who is started from here on is born in the leaf.
/// The kernel does not move one that is ending, and does not say so: it is in the way until it has ended.
fn move_into(own: &Path, leaf: &Path) -> io::Result<()> {
    let entry = leaf.join("cgroup.procs");
    fs::write(&entry, std::process::id().to_string())?;
    for child in children_in(own)? {
        let ended = match pidfd_open(child, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            // One that has ended is in nobody's way.
            Err(Errno::SRCH) => continue,
            Err(error) => return Err(error.into()),
        };
        match fs::write(&entry, child.as_raw_nonzero().to_string()) {
            Err(error) if error.raw_os_error() != Some(Errno::SRCH.raw_os_error()) => return Err(error),
            _ => {}
        }
        if children_in(own)?.contains(&child) {
            let longest = Timespec::try_from(LETTING_GO).expect("some seconds");
            if poll(&mut [PollFd::new(&ended, PollFlags::IN)], Some(&longest))? == 0 {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }
    Ok(())
}

/// The processes in a group whose parent this one is.
fn children_in(group: &Path) -> io::Result<Vec<Pid>> {
    let this = std::process::id().to_string();
    let is_child = |pid: &&str| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
        parent.is_some_and(|parent| parent.trim() == this)
    };
    let listed = fs::read_to_string(group.join("cgroup.procs"))?;
    Ok(listed.lines().filter(is_child).filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect())
}
