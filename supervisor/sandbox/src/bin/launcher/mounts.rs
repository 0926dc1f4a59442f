//! The plugin's mount tree: what it sees of the host, and nothing else.
//!
//! Runs in the child, in its own mount namespace, with the launcher's private directory as working directory: there are
//! the plugin's sockets and the mount point `root`. Everything is made on a small tmpfs which becomes the root and is
//! then read-only; the host's tree is detached from the namespace.

use std::{
    fs,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use plugvisor_sandbox::protocol::SocketMode;
use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags, fstat, mkdirat, open, openat, openat2, symlinkat},
    io::Errno,
    mount::{
        MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_change,
        move_mount, open_tree, unmount,
    },
    process::{chdir, pivot_root},
};

use crate::{child::Failure, kernel, step::Step};

/// Where the bundle is, and the working directory.
pub(crate) const BUNDLE: &str = "/plugin";
/// Where the sockets are.
pub(crate) const SOCKETS: &str = "/run/plugvisor";
/// Where a plugin that binds its own socket may make it.
pub(crate) const WORKER_DIRECTORY: &str = "/run/plugvisor/worker";
/// The mount point for the new root, in the launcher's directory.
pub(crate) const ROOT: &str = "root";

/// Programs, interpreters and libraries. World-readable on every distribution and without secrets; set-uid bits in them
/// are dead (nosuid and no_new_privs). The others are symlinks into /usr on merged hosts and directories on older ones:
/// the dynamic loader's path stands in every ELF header as /lib64/... or /lib/....
pub(crate) const HOST_DIRECTORIES: [&str; 6] = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64"];

/// Files and directories of /etc that programs need, each with its reason. Never all of /etc.
const HOST_ETC: [(&str, &str); 6] = [
    ("ld.so.cache", "the loader finds libraries outside the default directories by it"),
    ("localtime", "local time"),
    ("ssl/certs", "TLS roots, public"),
    ("ca-certificates", "where ssl/certs of some distributions points"),
    ("pki/ca-trust", "TLS roots on Fedora and its kin, public"),
    ("alternatives", "links such as /usr/bin/java go through it on Debian"),
];

/// The device files: data sinks and sources without state.
pub(crate) const DEVICES: [&str; 5] = ["null", "zero", "full", "random", "urandom"];

/// Links that programs expect in /dev; /dev/fd is also how the kernel names a script to its interpreter.
const DEVICE_LINKS: [(&str, &str); 4] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

const READ_ONLY: u64 = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;

/// What differs from plugin to plugin.
pub(crate) struct Tree<'a> {
    /// The bundle's directory, as the launcher checked it.
    pub(crate) bundle_path: &'a Path,
    /// The device and inode that must be found there.
    pub(crate) bundle: BorrowedFd<'a>,
    /// The directory with this launch's sockets, in the launcher's directory.
    pub(crate) sockets: String,
    pub(crate) socket: SocketMode,
    /// The size of /tmp in bytes, when the plugin has one.
    pub(crate) temp: Option<u64>,
}

impl Tree<'_> {
    /// Makes the tree and changes into it. The caller is the only process in its mount namespace.
    pub(crate) fn enter(&self) -> Result<(), Failure> {
        // First of all: nothing made below may propagate to the host.
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).map_err(at(Step::Propagation))?;

        let limits = c"size=1m,nr_inodes=256,mode=0755";
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        mount("tmpfs", ROOT, "tmpfs", flags, limits).map_err(at(Step::Root))?;
        let root =
            open(ROOT, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(at(Step::Root))?;

        self.host(&root).map_err(at(Step::HostDirectories))?;
        self.bundle(&root).map_err(at(Step::Bundle))?;
        devices(&root).map_err(at(Step::Devices))?;
        self.sockets(&root).map_err(at(Step::Sockets))?;

        rustix::process::fchdir(&root).map_err(at(Step::Pivot))?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        mkdirat(&root, "proc", Mode::from_raw_mode(0o555)).map_err(at(Step::Proc))?;
        mount("proc", "proc", "proc", flags, c"hidepid=2,subset=pid").map_err(at(Step::Proc))?;
        mkdirat(&root, "tmp", Mode::from_raw_mode(0o755)).map_err(at(Step::Temp))?;
        if let Some(size) = self.temp {
            let limits = std::ffi::CString::new(format!("size={size},nr_inodes=16384,mode=1777"));
            let limits = limits.map_err(|_| Failure::new(Step::Temp, Errno::INVAL))?;
            mount("tmpfs", "tmp", "tmpfs", flags, limits.as_c_str()).map_err(at(Step::Temp))?;
        }

        pivot_root(".", ".").map_err(at(Step::Pivot))?;
        // The old root now lies over the new one at ".".
        unmount(".", UnmountFlags::DETACH).map_err(at(Step::Pivot))?;
        chdir("/").map_err(at(Step::Pivot))?;
        let root =
            open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(at(Step::Pivot))?;
        kernel::mount_setattr(root.as_fd(), false, READ_ONLY).map_err(|error| Failure::io(Step::Pivot, &error))?;
        chdir(BUNDLE).map_err(at(Step::Pivot))
    }

    fn host(&self, root: &OwnedFd) -> Result<(), Errno> {
        for path in HOST_DIRECTORIES {
            show(root, Path::new(path), path.trim_start_matches('/'))?;
        }
        mkdirat(root, "etc", Mode::from_raw_mode(0o755))?;
        for (name, _) in HOST_ETC {
            let inside = format!("etc/{name}");
            show(root, &Path::new("/etc").join(name), &inside)?;
        }
        Ok(())
    }

    fn bundle(&self, root: &OwnedFd) -> Result<(), Errno> {
        // The launcher checked the path behind the descriptor; here, in the new namespace, the same directory must be
        // found by that path, without a symlink on the way.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let found = openat2(CWD, self.bundle_path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)?;
        let (found_stat, asked) = (fstat(&found)?, fstat(self.bundle)?);
        if (found_stat.st_dev, found_stat.st_ino) != (asked.st_dev, asked.st_ino) {
            return Err(Errno::STALE);
        }
        mkdirat(root, &BUNDLE[1..], Mode::from_raw_mode(0o755))?;
        bind(&found, root, &BUNDLE[1..], READ_ONLY)
    }

    fn sockets(&self, root: &OwnedFd) -> Result<(), Errno> {
        mkdirat(root, "run", Mode::from_raw_mode(0o755))?;
        mkdirat(root, &SOCKETS[1..], Mode::from_raw_mode(0o755))?;
        let attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
        let files: &[&str] = match self.socket {
            SocketMode::Inherit => &["broker.sock", "worker.sock"],
            SocketMode::Bind => {
                mkdirat(root, &WORKER_DIRECTORY[1..], Mode::from_raw_mode(0o755))?;
                let source = path_only(Path::new(&format!("{}/worker", self.sockets)))?;
                bind(&source, root, &WORKER_DIRECTORY[1..], attributes)?;
                &["broker.sock"]
            }
        };
        for file in files {
            let inside = format!("{}/{file}", &SOCKETS[1..]);
            touch(root, &inside)?;
            let source = path_only(Path::new(&format!("{}/{file}", self.sockets)))?;
            bind(&source, root, &inside, attributes | libc::MOUNT_ATTR_RDONLY)?;
        }
        Ok(())
    }
}

fn devices(root: &OwnedFd) -> Result<(), Errno> {
    mkdirat(root, "dev", Mode::from_raw_mode(0o755))?;
    for name in DEVICES {
        let inside = format!("dev/{name}");
        touch(root, &inside)?;
        let source = path_only(&Path::new("/dev").join(name))?;
        bind(&source, root, &inside, libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC)?;
    }
    for (name, target) in DEVICE_LINKS {
        symlinkat(target, root, format!("dev/{name}"))?;
    }
    Ok(())
}

/// Shows a file, directory or symlink of the host read-only at the same place; what the host lacks is left out.
fn show(root: &OwnedFd, host: &Path, inside: &str) -> Result<(), Errno> {
    let Ok(found) = fs::symlink_metadata(host) else { return Ok(()) };
    if let Some((parents, _)) = inside.rsplit_once('/') {
        let mut so_far = String::new();
        for part in parents.split('/') {
            so_far.push_str(part);
            match mkdirat(root, &so_far, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => so_far.push('/'),
                Err(error) => return Err(error),
            }
        }
    }
    if found.is_symlink() {
        let target = fs::read_link(host).map_err(|_| Errno::NOENT)?;
        return symlinkat(target, root, inside);
    }
    if found.is_dir() {
        mkdirat(root, inside, Mode::from_raw_mode(0o755))?;
    } else {
        touch(root, inside)?;
    }
    bind(&path_only(host)?, root, inside, READ_ONLY)
}

fn path_only(path: &Path) -> Result<OwnedFd, Errno> {
    open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

fn touch(root: &OwnedFd, path: &str) -> Result<(), Errno> {
    openat(root, path, OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC, Mode::from_raw_mode(0o444)).map(drop)
}

/// Mounts a copy of the tree at the source, submounts included: leaving them out would uncover what they hide, which a
/// user namespace rightly refuses. The attributes are set before the copy is attached, so no moment without them exists.
fn bind(source: &OwnedFd, root: &OwnedFd, inside: &str, attributes: u64) -> Result<(), Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(source, "", flags)?;
    kernel::mount_setattr(tree.as_fd(), true, attributes)
        .map_err(|error| error.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error))?;
    move_mount(&tree, "", root, inside, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

fn at(step: Step) -> impl Fn(Errno) -> Failure {
    move |errno| Failure::new(step, errno)
}
