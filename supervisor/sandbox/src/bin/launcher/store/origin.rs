//! Whether the directory that a bundle was imported from vouches for it.
//!
//! It does when it lies directly in a directory that has a tier, when the import has every file of it and nothing else,
//! and, where the launcher has privileges that the supervisor lacks, when nobody but root can change it: every directory
//! from `/` down and every file belongs to root, and neither their group nor others may write them. A directory on the way
//! that everybody may write is taken when it is sticky, such as `/tmp`: there nobody but its owner, or root, moves what
//! belongs to root. Everything is looked at through descriptors, one component at a time and never through a link.
//!
//! Run by the child that copies, before it drops its privileges: file systems may take their time. This module knows no
//! tiers.

use std::{
    fmt,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use plugvisor_package::{BundleLimits, Manifest};
use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, openat2, statat},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Why no directory vouches for a bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Doubt {
    /// Its files do not lie in one directory, each at its own path, or lie in mounts of the supervisor's own.
    Scattered,
    /// It lies beneath none of the directories that have a tier.
    Elsewhere,
    /// It lies beneath one of them, but not directly.
    Nested {
        /// Where.
        bundle: PathBuf,
    },
    /// The import has not what the directory has.
    Partial {
        /// Where.
        bundle: PathBuf,
    },
    /// Somebody else can change it.
    Shared(Shared),
    /// It holds what no bundle may hold.
    Unfit {
        /// What it is about.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// It could not be looked at.
    Failed {
        /// What it is about.
        path: PathBuf,
        /// Why.
        errno: i32,
    },
}

/// A file or directory that others than root can change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Shared {
    path: PathBuf,
    uid: u32,
    mode: u32,
    /// A directory above the one that has a tier.
    on_the_way: bool,
}

impl fmt::Display for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, uid, mode, on_the_way } = self;
        let path = shown(path);
        write!(f, "{path} can be changed by others than root (owner uid {uid}, mode {mode:04o}): ")?;
        let moved = "put the plugin directory where every directory on the way belongs to root, such as below /opt or \
                     /srv, or ";
        if *on_the_way {
            f.write_str(moved)?;
        }
        match (*uid != 0, mode & 0o022 != 0) {
            (true, true) => write!(f, "`chown root \"{path}\" && chmod go-w \"{path}\"`"),
            (true, false) => write!(f, "`chown root \"{path}\"`"),
            (false, _) => write!(f, "`chmod go-w \"{path}\"`"),
        }?;
        // Whoever has a file open for writing already goes on writing after its owner and mode have changed.
        f.write_str(", and if somebody may have changed it, put a fresh copy there")
    }
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Scattered => f.write_str("its files did not come from one directory, each from its own path there"),
            Self::Elsewhere => f.write_str("it did not come from a directory that has a tier"),
            Self::Nested { bundle } => {
                write!(f, "{} does not lie directly in a plugin directory; move it there", shown(bundle))
            }
            Self::Partial { bundle } => {
                write!(f, "what was imported is not what {} has, every file of it; load it again", shown(bundle))
            }
            Self::Shared(shared) => shared.fmt(f),
            Self::Unfit { path, why } => write!(f, "{} {why}; remove it", shown(path)),
            Self::Failed { path, errno } => {
                write!(f, "{} cannot be looked at: {}", shown(path), std::io::Error::from_raw_os_error(*errno))
            }
        }
    }
}

/// A path for people: short, and without what could forge a line.
fn shown(path: &Path) -> String {
    path.to_string_lossy().chars().take(512).flat_map(char::escape_debug).collect()
}

/// Who may change what vouches for a bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owners {
    /// Root alone: the launcher is root, and the supervisor is not.
    Root,
    /// Anybody: launcher and supervisor are one user, and nothing is claimed.
    Anybody,
}

/// Whether nobody but root can change this directory, or put another one in its place.
pub(crate) fn check_root(root: &Path) -> Result<(), Doubt> {
    reach(root, 1, Owners::Root).map(drop)
}

/// Opens a directory that only its owner and root may change, from `/` on and through no link.
pub(crate) fn open_root(root: &Path, owners: Owners) -> Result<OwnedFd, Doubt> {
    reach(root, 1, owners)
}

/// The listing of the bundle in this directory, see [`Listing`], when nobody else can change it.
pub(super) fn look(bundle: &Path, limits: &BundleLimits, owners: Owners) -> Result<[u8; 32], Doubt> {
    let directory = reach(bundle, 2, owners)?;
    let mut walk = Walk { bundle, limits, owners, entries: 0, listing: Listing::default() };
    walk.directory(directory.as_fd(), "", 0)?;
    Ok(walk.listing.digest())
}

/// Which files there are, and which may be executed: enough to tell whether an import has them all.
#[derive(Debug, Default)]
pub(super) struct Listing(Vec<(String, bool)>);

impl Listing {
    pub(super) fn add(&mut self, path: &str, executable: bool) {
        // Whatever mode the manifest has, it is stored without.
        self.0.push((path.to_owned(), executable && path != Manifest::FILE_NAME));
    }

    pub(super) fn digest(mut self) -> [u8; 32] {
        self.0.sort();
        let mut hash = Sha256::new();
        for (path, executable) in self.0 {
            // No path holds a line feed.
            hash.update(format!("{executable} {path}\n"));
        }
        hash.finalize().into()
    }
}

/// Opens a directory, from `/` on, and judges each on the way; the last `own` of them by the stricter rule.
fn reach(path: &Path, own: usize, owners: Owners) -> Result<OwnedFd, Doubt> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |errno: Errno| Doubt::Failed { path, errno: errno.raw_os_error() }
    };
    let names: Vec<_> = path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut at = PathBuf::from("/");
    let mut directory = openat2(CWD, "/", flags, Mode::empty(), ResolveFlags::empty()).map_err(failed(&at))?;
    for (index, name) in names.iter().enumerate() {
        judge(&fstat(&directory).map_err(failed(&at))?, &at, names.len() - index >= own, owners)?;
        at.push(name);
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        directory = openat2(&directory, Path::new(name), flags, Mode::empty(), resolve).map_err(failed(&at))?;
    }
    judge(&fstat(&directory).map_err(failed(&at))?, &at, false, owners)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat2(&directory, ".", flags, Mode::empty(), ResolveFlags::BENEATH).map_err(failed(&at))
}

fn judge(stat: &Stat, path: &Path, on_the_way: bool, owners: Owners) -> Result<(), Doubt> {
    let mode = stat.st_mode & 0o7777;
    let sticky = on_the_way && mode & 0o1000 != 0;
    let closed = stat.st_uid == 0 && (mode & 0o022 == 0 || sticky);
    match owners {
        Owners::Anybody => Ok(()),
        Owners::Root if closed => Ok(()),
        Owners::Root => Err(Doubt::Shared(Shared { path: path.to_owned(), uid: stat.st_uid, mode, on_the_way })),
    }
}

struct Walk<'a> {
    bundle: &'a Path,
    limits: &'a BundleLimits,
    owners: Owners,
    entries: usize,
    listing: Listing,
}

impl Walk<'_> {
    /// `prefix` is empty or ends with `/`. The recursion is as deep as the limit allows; the rules are those of
    /// `plugvisor_package::Bundle`.
    fn directory(&mut self, directory: BorrowedFd<'_>, prefix: &str, depth: usize) -> Result<(), Doubt> {
        let here = self.bundle.join(prefix);
        let failed = |path: &Path, errno: Errno| Doubt::Failed { path: path.to_owned(), errno: errno.raw_os_error() };
        for entry in Dir::read_from(directory).map_err(|errno| failed(&here, errno))? {
            let entry = entry.map_err(|errno| failed(&here, errno))?;
            let bytes = entry.file_name().to_bytes();
            if matches!(bytes, b"." | b"..") {
                continue;
            }
            let path = here.join(String::from_utf8_lossy(bytes).as_ref());
            let unfit = |why: &str| Err(Doubt::Unfit { path: path.clone(), why: why.to_owned() });
            let Ok(name) = std::str::from_utf8(bytes) else { return unfit("has a name that is not UTF-8") };
            if name.chars().any(char::is_control) || name.len() > self.limits.name_bytes {
                return unfit("has a name that is too long, or with a control character");
            }
            self.entries += 1;
            if self.entries > self.limits.entries {
                return unfit("is one file more than a bundle may have");
            }
            let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).map_err(|errno| failed(&path, errno))?;
            let within = format!("{prefix}{name}");
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory if depth >= self.limits.depth => return unfit("lies too deep"),
                FileType::Directory => {
                    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
                    let below = openat2(directory, name, flags, Mode::empty(), resolve);
                    let below = below.map_err(|errno| failed(&path, errno))?;
                    judge(&fstat(&below).map_err(|errno| failed(&path, errno))?, &path, false, self.owners)?;
                    self.directory(below.as_fd(), &format!("{within}/"), depth + 1)?;
                }
                FileType::RegularFile if stat.st_mode & 0o6000 != 0 => return unfit("has a set-id bit"),
                FileType::RegularFile => {
                    judge(&stat, &path, false, self.owners)?;
                    self.listing.add(&within, stat.st_mode & 0o100 != 0);
                }
                _ => return unfit("is neither a file nor a directory"),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_tells_names_and_modes_in_any_order() {
        let of = |files: &[(&str, bool)]| {
            let mut listing = Listing::default();
            files.iter().for_each(|(path, executable)| listing.add(path, *executable));
            listing.digest()
        };
        assert_eq!(of(&[("a", true), ("b", false)]), of(&[("b", false), ("a", true)]));
        assert_eq!(of(&[("plugin.json", true)]), of(&[("plugin.json", false)]));
        assert_ne!(of(&[("a", true)]), of(&[("a", false)]));
        assert_ne!(of(&[("a", true)]), of(&[("a", true), ("b", false)]));
    }

    #[test]
    fn what_others_can_change_is_told_with_the_fix() {
        let shared = |uid, mode, on_the_way| Shared { path: "/opt/p".into(), uid, mode, on_the_way }.to_string();
        assert_eq!(
            shared(1000, 0o775, false),
            "/opt/p can be changed by others than root (owner uid 1000, mode 0775): `chown root \"/opt/p\" && chmod \
             go-w \"/opt/p\"`, and if somebody may have changed it, put a fresh copy there"
        );
        assert!(shared(1000, 0o755, false).contains(": `chown root \"/opt/p\"`, and"));
        assert!(shared(0, 0o757, false).contains(": `chmod go-w \"/opt/p\"`, and"));
        assert!(shared(1000, 0o755, true).contains("put the plugin directory where"));
    }
}
