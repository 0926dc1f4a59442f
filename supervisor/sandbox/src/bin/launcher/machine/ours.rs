//! Whether a file or directory that the administrator names is the administrator's: followed from `/` on, one component at a
//! time, with everything judged on the way. It knows nothing of what the file is for.
//!
//! Where the launcher is root, every directory, link and the file itself must be root's, and nobody else may write them; a
//! directory on the way that others may write is taken when it is sticky, such as `/tmp`: there nobody but root moves what
//! is root's. An ordinary user's launcher runs what its user names, and in its user namespace sees whose file it is of none
//! but its own.

use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    fmt,
    fs::Metadata,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStringExt, fs::MetadataExt},
    },
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, openat2, readlinkat},
    io::Errno,
};

/// The most links that are followed, as the kernel has it.
const MOST_LINKS: usize = 40;

/// A file that was judged, and is held: nothing else comes to have its number.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) path: PathBuf,
    file: Arc<OwnedFd>,
}

impl Part {
    /// Whether this is the file that was judged: in another mount namespace it is found by its path anew.
    pub(crate) fn is(&self, found: impl AsFd) -> Result<bool, Errno> {
        let (judged, found) = (fstat(&*self.file)?, fstat(found)?);
        Ok((judged.st_dev, judged.st_ino) == (found.st_dev, found.st_ino))
    }
}

/// Who may change it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owners {
    Root,
    Anybody,
}

impl Owners {
    /// What holds for this process.
    pub(super) fn here() -> Self {
        if rustix::process::geteuid().is_root() { Self::Root } else { Self::Anybody }
    }
}

/// Why it is not.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Doubt {
    /// It, or what leads to it, can be changed by others.
    Shared(PathBuf),
    Failed(PathBuf, Errno),
    /// It is no file, or longer than one may be.
    Unfit,
    /// It is neither a directory nor a file.
    NoPlace,
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shared(path) => {
                let path = path.display();
                write!(f, "{path} can be changed by others than root: `chown root \"{path}\" && chmod go-w \"{path}\"`")
            }
            Self::Failed(path, errno) => write!(f, "{}: {}", path.display(), std::io::Error::from(*errno)),
            Self::Unfit => f.write_str("it is not a file, or too long for one"),
            Self::NoPlace => f.write_str("it is neither a directory nor a file"),
        }
    }
}

/// Follows the path and judges it; the file may have so many bytes.
pub(super) fn judged(path: &Path, most: u64, owners: Owners) -> Result<Part, Doubt> {
    let (found, stat, at) = followed(path, owners)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Doubt::Unfit);
    }
    judge(&stat, &at, Kind::Named, owners)?;
    if u64::try_from(stat.st_size).unwrap_or(u64::MAX) > most {
        return Err(Doubt::Unfit);
    }
    Ok(Part { path: path.to_owned(), file: Arc::new(found) })
}

/// Follows the path to a directory, or a file of any length, and judges it. A directory that others may write is not taken
/// when it is sticky either: what lies in it is used by its name.
pub(super) fn judge_place(path: &Path, owners: Owners) -> Result<(), Doubt> {
    let (_, stat, at) = followed(path, owners)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile | FileType::Directory => judge(&stat, &at, Kind::Named, owners),
        _ => Err(Doubt::NoPlace),
    }
}

/// Whether something that lies in a judged directory is the administrator's too; of a link, whose mode says nothing, its owner.
pub(super) fn judge_entry(found: &Metadata, owners: Owners) -> Result<(), &'static str> {
    match owners {
        Owners::Root if found.uid() != 0 => Err("it is not root's"),
        Owners::Root if !found.is_symlink() && found.mode() & 0o022 != 0 => Err("others than root may write it"),
        Owners::Root | Owners::Anybody => Ok(()),
    }
}

/// What the path names, and where that is; all that leads there is judged.
fn followed(path: &Path, owners: Owners) -> Result<(OwnedFd, Stat, PathBuf), Doubt> {
    let mut left: VecDeque<OsString> = names(path);
    let mut links = 0;
    let mut at = PathBuf::from("/");
    let mut directories = vec![open(None, OsStr::new("/"), &at)?];
    judge(&stat(&directories[0], &at)?, &at, Kind::OnTheWay, owners)?;
    while let Some(name) = left.pop_front() {
        if name == ".." {
            // The root's is the root.
            if directories.len() > 1 {
                directories.pop();
                at.pop();
            }
            continue;
        }
        let found_at = at.join(&name);
        let found = open(directories.last(), &name, &found_at)?;
        let found_stat = stat(&found, &found_at)?;
        match FileType::from_raw_mode(found_stat.st_mode) {
            FileType::Symlink => {
                judge(&found_stat, &found_at, Kind::Link, owners)?;
                links += 1;
                if links > MOST_LINKS {
                    return Err(Doubt::Failed(found_at, Errno::LOOP));
                }
                let failed = |errno| Doubt::Failed(found_at.clone(), errno);
                let target = readlinkat(&found, "", Vec::new()).map_err(failed)?;
                let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
                if target.is_absolute() {
                    directories.truncate(1);
                    at = PathBuf::from("/");
                }
                let mut target = names(&target);
                target.append(&mut left);
                left = target;
            }
            FileType::Directory => {
                judge(&found_stat, &found_at, Kind::OnTheWay, owners)?;
                directories.push(found);
                at = found_at;
            }
            _ if left.is_empty() => return Ok((found, found_stat, found_at)),
            _ => return Err(Doubt::Failed(found_at, Errno::NOTDIR)),
        }
    }
    let directory = directories.pop().ok_or(Doubt::Unfit)?;
    let stat = stat(&directory, &at)?;
    Ok((directory, stat, at))
}

fn names(path: &Path) -> VecDeque<OsString> {
    let name = |part: Component<'_>| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::Prefix(_) | Component::RootDir | Component::CurDir => None,
    };
    path.components().filter_map(name).collect()
}

/// One component, and a link itself rather than what it names.
fn open(directory: Option<&OwnedFd>, name: &OsStr, at: &Path) -> Result<OwnedFd, Doubt> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = match directory {
        Some(directory) => openat2(directory, name, flags, Mode::empty(), ResolveFlags::BENEATH),
        None => openat2(CWD, name, flags, Mode::empty(), ResolveFlags::empty()),
    };
    opened.map_err(|errno| Doubt::Failed(at.to_owned(), errno))
}

fn stat(found: &OwnedFd, at: &Path) -> Result<Stat, Doubt> {
    fstat(found).map_err(|errno| Doubt::Failed(at.to_owned(), errno))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    OnTheWay,
    Link,
    Named,
}

fn judge(stat: &Stat, at: &Path, kind: Kind, owners: Owners) -> Result<(), Doubt> {
    let closed = match kind {
        // Its mode says nothing.
        Kind::Link => true,
        Kind::OnTheWay => stat.st_mode & 0o022 == 0 || stat.st_mode & 0o1000 != 0,
        Kind::Named => stat.st_mode & 0o022 == 0,
    };
    match owners {
        Owners::Anybody => Ok(()),
        Owners::Root if stat.st_uid == 0 && closed => Ok(()),
        Owners::Root => Err(Doubt::Shared(at.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt, chown, symlink},
    };

    use super::*;

    const OTHER: u32 = 54_321;

    #[test]
    fn what_leads_to_it_is_judged_too() {
        if Owners::here() != Owners::Root {
            println!("SKIP privileged-lane: only root's files are judged");
            return;
        }
        let directory = tempfile::tempdir().expect("a directory");
        let top = fs::canonicalize(directory.path()).expect("a path");
        let (inner, link) = (top.join("a/b"), top.join("link"));
        fs::create_dir_all(&inner).expect("directories");
        let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
        for path in [&top, &top.join("a"), &inner] {
            mode(path, 0o755);
        }
        let file = inner.join("file");
        fs::write(&file, "text").expect("writes");
        mode(&file, 0o644);
        symlink("a/../a/b", &link).expect("a link");
        let by_link = link.join("file");
        let judged_here = |path: &Path| judged(path, 4, Owners::Root).map(|part| part.path);
        assert_eq!(judged_here(&file), Ok(file.clone()));
        assert_eq!(judged_here(&by_link), Ok(by_link.clone()));
        let place = |path: &Path| judge_place(path, Owners::Root);
        assert_eq!([place(&link), place(&file), place(Path::new("/"))], [Ok(()), Ok(()), Ok(())]);
        assert_eq!(judge_place(Path::new("/dev/null"), Owners::Root), Err(Doubt::NoPlace));
        let part = judged(&by_link, 4, Owners::Root).expect("it is root's");
        assert_eq!(part.is(fs::File::open(&file).expect("opens")), Ok(true));
        assert_eq!(part.is(fs::File::open("/dev/null").expect("opens")), Ok(false));

        let shared = |path: &Path| Err(Doubt::Shared(path.to_owned()));
        for (path, wrong, right) in [(&inner, 0o775, 0o755), (&top, 0o757, 0o755), (&file, 0o664, 0o644)] {
            mode(path, wrong);
            assert_eq!(judged_here(&by_link), shared(path), "{wrong:o}");
            assert!(judged(&by_link, 4, Owners::Anybody).is_ok());
            assert_eq!(place(&by_link), shared(path).map(drop), "{wrong:o}");
            mode(path, right);
        }
        // In a sticky directory nobody else moves it.
        mode(&inner, 0o1777);
        assert_eq!(judged_here(&by_link), Ok(by_link.clone()));
        // But puts more into it.
        assert_eq!(place(&link), Err(Doubt::Shared(inner.clone())));
        mode(&inner, 0o755);
        for path in [&inner, &file] {
            chown(path, Some(OTHER), None).expect("chown");
            assert_eq!(judged_here(&file), shared(path));
            chown(path, Some(0), None).expect("chown");
        }
        std::os::unix::fs::lchown(&link, Some(OTHER), None).expect("chown");
        assert_eq!(judged_here(&by_link), shared(&link));
    }

    #[test]
    fn what_is_no_file_is_told() {
        let directory = tempfile::tempdir().expect("a directory");
        let top = fs::canonicalize(directory.path()).expect("a path");
        let (file, circle) = (top.join("file"), top.join("circle"));
        fs::write(&file, "text").expect("writes");
        symlink("circle", &circle).expect("a link");
        let doubt = |path: &Path, most| judged(path, most, Owners::Anybody).map(|_| ()).expect_err("it is no file");
        assert_eq!(doubt(&file, 3), Doubt::Unfit);
        assert_eq!(doubt(&top, 3), Doubt::Unfit);
        assert_eq!(doubt(Path::new("/"), 3), Doubt::Unfit);
        assert_eq!(doubt(&top.join("none"), 3), Doubt::Failed(top.join("none"), Errno::NOENT));
        assert_eq!(doubt(&file.join("in"), 9), Doubt::Failed(file.clone(), Errno::NOTDIR));
        assert_eq!(doubt(&circle, 9), Doubt::Failed(circle.clone(), Errno::LOOP));
        // What is above the root is the root.
        let above = Path::new("/../..").join(file.strip_prefix("/").expect("absolute"));
        assert!(judged(&above, 4, Owners::Anybody).is_ok());
    }
}
