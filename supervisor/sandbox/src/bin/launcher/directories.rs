//! The directories of a plugin's name: its configuration, which is the administrator's, and its data, which is its own.
//!
//! Both are `<root>/<name>`: the roots are the launcher's own policy, the name is that of the plugin, and no path comes from
//! a supervisor. The child finds them while it still sees the host's tree, through descriptors, one component at a time
//! and never through a link, and shows them at fixed places; so the launcher itself waits for no file system. As root the
//! roots, and all on the way to them, are root's alone, so that nobody moves what a plugin is shown. A data directory is
//! made when it is missing, for the uid that the plugin's name has for good. What is in either is never walked through.
//!
//! It sets no quota: a data directory may fill its file system. What bounds it is for the administrator, who has a uid for
//! each plugin and a directory to mount something at.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use plugvisor_sandbox::{
    options::Options,
    protocol::{DirectoryState, Grant, Launch, Refusal, RefusalCode},
};
use rustix::{
    fs::{AtFlags, Dir, Gid, Mode, OFlags, ResolveFlags, Stat, Uid, chownat, fstat, mkdir, mkdirat, openat2},
    io::Errno,
};
use serde::{Deserialize, Serialize};

use crate::{
    check::refuse,
    child::Failure,
    creds::Identity,
    level::Kernel,
    mounts,
    step::Step,
    store::{self, Doubt, Owners},
};

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Config,
    Data,
}

impl Kind {
    pub(crate) const BOTH: [Self; 2] = [Self::Config, Self::Data];

    /// Where the plugin sees it, at every level.
    pub(crate) const fn place(self) -> &'static str {
        match self {
            Self::Config => "/plugvisor/config",
            Self::Data => "/plugvisor/data",
        }
    }

    /// The variable that says so.
    pub(crate) const fn variable(self) -> &'static str {
        match self {
            Self::Config => "PLUGVISOR_CONFIG_DIR",
            Self::Data => "PLUGVISOR_DATA_DIR",
        }
    }

    /// Whether these grants open it, and for writing.
    pub(crate) fn access(self, grants: &[Grant]) -> Option<Reach> {
        let has = |grant| grants.contains(&grant);
        match self {
            Self::Config => has(Grant::ReadConfig).then_some(Reach::Read),
            Self::Data if has(Grant::WriteData) => Some(Reach::Write),
            Self::Data => has(Grant::ReadData).then_some(Reach::Read),
        }
    }

    const fn what(self) -> &'static str {
        match self {
            Self::Config => "configuration",
            Self::Data => "data",
        }
    }

    const fn flag(self) -> &'static str {
        match self {
            Self::Config => "--config-root",
            Self::Data => "--data-root",
        }
    }

    pub(crate) const fn step(self) -> Step {
        match self {
            Self::Config => Step::ConfigDirectory,
            Self::Data => Step::DataDirectory,
        }
    }

    const fn shared(self) -> Step {
        match self {
            Self::Config => Step::ConfigShared,
            Self::Data => Step::DataShared,
        }
    }
}

/// What a plugin may do with one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Reach {
    Read,
    Write,
}

/// Where plugins' directories are; one that is not there is given to nobody.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Roots<'a> {
    config: Option<&'a Path>,
    data: Option<&'a Path>,
}

impl<'a> Roots<'a> {
    pub(crate) fn of(options: &'a Options) -> Self {
        Self { config: options.config_root.as_deref(), data: options.data_root.as_deref() }
    }

    const fn get(self, kind: Kind) -> Option<&'a Path> {
        match kind {
            Kind::Config => self.config,
            Kind::Data => self.data,
        }
    }
}

/// A directory as a copy of its mount that is attached nowhere yet.
pub(crate) struct Detached {
    pub(crate) kind: Kind,
    pub(crate) tree: OwnedFd,
}

/// Whether any of the grants opens a directory.
pub(crate) fn any(grants: &[Grant]) -> bool {
    Kind::BOTH.iter().any(|kind| kind.access(grants).is_some())
}

/// Whether the launcher can give what is asked for. `lasting`: whether a name has its uid for good.
pub(crate) fn check(request: &Launch, roots: Roots<'_>, lasting: bool) -> Result<(), Refusal> {
    let asked = Kind::BOTH.into_iter().filter(|kind| kind.access(&request.grants).is_some());
    for kind in asked {
        let why = match (roots.get(kind), kind) {
            (None, _) => format!("the launcher was started without {}; start it with one", kind.flag()),
            (Some(_), Kind::Data) if !lasting => {
                "the launcher forgets who has which uid, so that another plugin could meet its files; start it with --store"
                    .to_owned()
            }
            (Some(_), _) => continue,
        };
        return refuse(
            RefusalCode::Policy,
            format!("{} was not started: it was granted its {} directory, and {why}", request.plugin, kind.what()),
        );
    }
    Ok(())
}

/// Finds, and makes, what the grants open. In the child, which is in a mount namespace of its own with the host's tree.
pub(crate) fn open(
    roots: Roots<'_>,
    plugin: &str,
    grants: &[Grant],
    identity: Identity,
) -> Result<Vec<Detached>, Failure> {
    let mut opened = Vec::new();
    for kind in Kind::BOTH {
        let Some(access) = kind.access(grants) else { continue };
        let root = roots.get(kind).ok_or_else(|| Failure::new(kind.step(), Errno::NOENT))?;
        let owners = match identity {
            Identity::Own { .. } => Owners::Root,
            Identity::Mapped { .. } => Owners::Anybody,
        };
        let directory = match kind {
            Kind::Config => config(root, plugin, owners),
            Kind::Data => data(root, plugin, owners, identity),
        }?;
        let more = if access == Reach::Read { libc::MOUNT_ATTR_RDONLY } else { 0 };
        let attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC | more;
        let tree = mounts::detached(directory.as_fd(), attributes).map_err(|errno| Failure::new(kind.step(), errno))?;
        opened.push(Detached { kind, tree });
    }
    Ok(opened)
}

fn config(root: &Path, plugin: &str, owners: Owners) -> Result<OwnedFd, Failure> {
    let root = reach(root, Kind::Config, owners)?;
    let directory = enter(&root, plugin).map_err(|errno| Failure::new(Step::ConfigDirectory, errno))?;
    let found = fstat(&directory).map_err(|errno| Failure::new(Step::ConfigDirectory, errno))?;
    if owners == Owners::Root && (found.st_uid != 0 || found.st_mode & 0o022 != 0) {
        return Err(Failure::new(Step::ConfigShared, Errno::PERM));
    }
    Ok(directory)
}

fn data(root: &Path, plugin: &str, owners: Owners, identity: Identity) -> Result<OwnedFd, Failure> {
    let failed = |errno| Failure::new(Step::DataDirectory, errno);
    let private = Mode::RWXU;
    let root = match reach(root, Kind::Data, owners) {
        Err(missing) if missing.errno == libc::ENOENT => {
            // The last component alone: who may write above it is asked when it is reached.
            match mkdir(root, private) {
                Ok(()) | Err(Errno::EXIST) => reach(root, Kind::Data, owners)?,
                Err(errno) => return Err(failed(errno)),
            }
        }
        reached => reached?,
    };
    match mkdirat(&root, plugin, private) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(failed(errno)),
    }
    let directory = enter(&root, plugin).map_err(failed)?;
    let Identity::Own { uid } = identity else { return Ok(directory) };
    let found = fstat(&directory).map_err(failed)?;
    if found.st_uid == uid {
        return Ok(directory);
    }
    // Just made, or made by the administrator; or by a launcher that was killed before it had written down who has which
    // uid, and then nothing is in it.
    if found.st_uid != 0 && !is_empty(&directory).map_err(failed)? {
        return Err(Failure::new(Step::DataOwner, Errno::PERM));
    }
    give(&directory, &found, uid).map_err(failed)?;
    Ok(directory)
}

fn give(directory: &OwnedFd, found: &Stat, uid: u32) -> Result<(), Errno> {
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    debug_assert!(found.st_uid != uid, "it has not got it yet");
    chownat(directory, "", Some(user), Some(group), AtFlags::EMPTY_PATH)
}

fn is_empty(directory: &OwnedFd) -> Result<bool, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let open = openat2(directory, ".", flags, Mode::empty(), ResolveFlags::BENEATH)?;
    for entry in Dir::new(open)? {
        if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
            return Ok(false);
        }
    }
    Ok(true)
}

fn reach(root: &Path, kind: Kind, owners: Owners) -> Result<OwnedFd, Failure> {
    store::open_root(root, owners).map_err(|doubt| match doubt {
        Doubt::Failed { errno, .. } => Failure { step: kind.step(), errno },
        _ => Failure::new(kind.shared(), Errno::PERM),
    })
}

fn enter(root: &OwnedFd, plugin: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    openat2(root, plugin, flags, Mode::empty(), resolve)
}

/// What a failure of the child about a directory becomes: the child knows no paths, and the operator needs them.
pub(crate) fn refusal(roots: Roots<'_>, plugin: &str, failure: Failure) -> Option<Refusal> {
    let kind = match failure.step {
        Step::ConfigDirectory | Step::ConfigShared => Kind::Config,
        Step::DataDirectory | Step::DataShared | Step::DataOwner => Kind::Data,
        _ => return None,
    };
    let root = roots.get(kind)?;
    let path = root.join(plugin);
    let (what, shown) = (kind.what(), path.display());
    let error = std::io::Error::from_raw_os_error(failure.errno);
    let grant = match kind {
        Kind::Config => "filesystem:read-config",
        Kind::Data => "filesystem:read-data and write-data",
    };
    let why = match (failure.step, failure.errno) {
        (Step::DataOwner, _) => format!(
            "its {what} directory {shown} has files of another user: restore the launcher's uids file, or if these are its own, \
             `chown -R` them to the uid that `plugvisor describe {plugin}` showed"
        ),
        (Step::ConfigShared | Step::DataShared, _) => match store::open_root(root, Owners::Root) {
            Err(doubt) => format!("the place of its {what} directory is not root's alone: {doubt}"),
            Ok(_) => format!(
                "its {what} directory {shown} can be changed by others than root: `chown root \"{shown}\" && chmod go-w \
                 \"{shown}\"`"
            ),
        },
        (_, libc::ENOENT) => format!(
            "its {what} directory {shown} is not there: `mkdir -p \"{shown}\"`, or take {grant} out of its grants"
        ),
        (_, libc::ELOOP | libc::ENOTDIR) => {
            format!(
                "its {what} directory {shown} is, or lies behind, a link or no directory: put the directory itself there"
            )
        }
        _ => format!("its {what} directory {shown} could not be opened: {error}"),
    };
    Some(Refusal { code: RefusalCode::Policy, message: format!("{plugin} was not started: {why}") })
}

/// What the kernel says of the directories of a process, as its mounts show them.
pub(crate) fn read_back(
    roots: Roots<'_>,
    plugin: &str,
    grants: &[Grant],
    kernel: Kernel,
    pid: i32,
) -> Vec<DirectoryState> {
    let path = format!("/proc/{pid}/mountinfo");
    let mountinfo = std::fs::read_to_string(&path).unwrap_or_default();
    let state = |kind: Kind| {
        let access = kind.access(grants)?;
        let source: PathBuf = roots.get(kind).map(|root| root.join(plugin)).unwrap_or_default();
        let (how, wanted) = match access {
            Reach::Read => ("read", "ro"),
            Reach::Write => ("read and written", "rw"),
        };
        Some(DirectoryState {
            place: kind.place().to_owned(),
            requested: format!("{} at {}, {how}", source.display(), kind.place()),
            enforced: mounted(&mountinfo, kind.place(), wanted).map(|found| match kind {
                Kind::Config if kernel == Kernel::Own => format!("{found}; a copy as of its start is in its machine"),
                Kind::Config => found,
                Kind::Data => format!("{found}; Plugvisor sets no quota"),
            }),
            read_from: path.clone(),
        })
    };
    Kind::BOTH.into_iter().filter_map(state).collect()
}

/// The options and the file system of what is mounted at a place, when they are what they must be (proc(5)).
fn mounted(mountinfo: &str, place: &str, wanted: &str) -> Option<String> {
    let line = mountinfo.lines().find(|line| line.split(' ').nth(4) == Some(place))?;
    let options = line.split(' ').nth(5)?;
    let has = |option: &str| options.split(',').any(|one| one == option);
    let filesystem = line.split_once(" - ")?.1.split(' ').next()?;
    // One that is read-only as a whole shows `rw` here, and can be written by nobody.
    let held = ["nosuid", "nodev", "noexec", wanted].into_iter().all(has);
    held.then(|| format!("{options} on {filesystem}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_confirmed_by_its_own_mount_alone() {
        let of = |options: &str| {
            format!(
                "36 35 0:30 / / ro,nosuid,nodev shared:1 - tmpfs tmpfs rw\n\
                 37 36 8:1 /data/a /plugvisor/data {options} - ext4 /dev/sda1 rw\n"
            )
        };
        let all = "rw,nosuid,nodev,noexec,relatime";
        assert_eq!(
            mounted(&of(all), "/plugvisor/data", "rw").as_deref(),
            Some("rw,nosuid,nodev,noexec,relatime on ext4")
        );
        assert_eq!(mounted(&of(all), "/plugvisor/data", "ro"), None);
        assert_eq!(mounted(&of(all), "/plugvisor/config", "rw"), None);
        assert_eq!(mounted(&of("rw,nosuid,nodev"), "/plugvisor/data", "rw"), None);
        assert_eq!(mounted("", "/plugvisor/data", "rw"), None);
    }

    #[test]
    fn writing_is_reading_too_and_nothing_else_opens_a_directory() {
        assert_eq!(Kind::Data.access(&[Grant::WriteData]), Some(Reach::Write));
        assert_eq!(Kind::Data.access(&[Grant::ReadData, Grant::WriteData]), Some(Reach::Write));
        assert_eq!(Kind::Data.access(&[Grant::ReadData, Grant::ReadConfig]), Some(Reach::Read));
        assert_eq!(Kind::Config.access(&[Grant::ReadConfig]), Some(Reach::Read));
        for grant in Grant::ALL.into_iter().filter(|grant| !any(&[*grant])) {
            assert!(Kind::BOTH.iter().all(|kind| kind.access(&[grant]).is_none()), "{grant:?}");
        }
        assert_eq!(Kind::Config.access(&[Grant::ReadData, Grant::WriteData]), None);
    }
}
