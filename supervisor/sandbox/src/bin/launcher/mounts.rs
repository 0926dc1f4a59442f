//! The plugin's mount tree: what it sees of the host, and nothing else; at NONE all that the host has, and its own places.
//!
//! Runs in the child, in its own mount namespace, with the launcher's private directory as working directory: there are
//! the plugin's sockets and the mount point `root`. Everything is made on a small tmpfs which becomes the root; the host's
//! tree is detached from the namespace. That part is the same for all plugins and may be made ahead. Then what is one
//! plugin's is attached, and the root becomes read-only.
//!
//! At NONE the host's directories are attached to that root as they are. It is no wall: it gives the bundle and the sockets
//! places that lie beneath no directory which the plugin's user may not enter.

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

use crate::{child::Failure, directories::Detached, kernel, level::Tree, machine, step::Step};

/// Where the bundle is, and the working directory.
pub(crate) const BUNDLE: &str = "/plugin";
/// Where the sockets are. In the host's tree not in /run, which is the host's there.
pub(crate) const fn sockets(tree: Tree) -> &'static str {
    match tree {
        Tree::Own => "/run/plugvisor",
        Tree::Host => "/plugvisor",
    }
}

/// The broker's socket.
pub(crate) fn broker(tree: Tree) -> String {
    format!("{}/broker.sock", sockets(tree))
}

/// Where a plugin that binds its own socket may make it.
pub(crate) fn worker_directory(tree: Tree) -> String {
    format!("{}/worker", sockets(tree))
}

/// The worker socket.
pub(crate) fn worker(tree: Tree, socket: SocketMode) -> String {
    match socket {
        SocketMode::Inherit => format!("{}/worker.sock", sockets(tree)),
        SocketMode::Bind => format!("{}/worker.sock", worker_directory(tree)),
    }
}

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

/// What differs from plugin to plugin, as copies of mounts that are attached nowhere yet.
pub(crate) struct Own {
    pub(crate) bundle: OwnedFd,
    pub(crate) broker: OwnedFd,
    /// The socket itself when it is inherited, the directory for it when the plugin binds it.
    pub(crate) worker: OwnedFd,
    /// What its machine is made of, and where in the tree each lies.
    pub(crate) machine: Vec<(OwnedFd, String)>,
}

impl Own {
    /// And what a machine is made of: its kernel and modules, read-only, and the device that runs it, if one does. Found by
    /// their paths, before the tree is entered; each must be the file that was judged.
    pub(crate) fn with_machine(mut self, parts: &[machine::Part], device: Option<&str>) -> Result<Self, Failure> {
        let source = |path: &Path| open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        let attach = |(number, part): (usize, &machine::Part)| -> Result<(OwnedFd, String), Errno> {
            let source = source(&part.path)?;
            if !part.is(&source)? {
                return Err(Errno::STALE);
            }
            let copied = detached(source.as_fd(), READ_ONLY | libc::MOUNT_ATTR_NOEXEC)?;
            Ok((copied, format!("{}/{number}", &machine::PLACE[1..])))
        };
        let parts: Result<_, _> = parts.iter().enumerate().map(attach).collect();
        self.machine = parts.map_err(at(Step::Machine))?;
        if let Some(device) = device {
            let attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
            let copied = source(Path::new(device)).and_then(|source| detached(source.as_fd(), attributes));
            let copied = copied.map_err(at(Step::Machine))?;
            self.machine.push((copied, device.trim_start_matches('/').to_owned()));
        }
        Ok(self)
    }

    /// Copies the bundle's mount, found by its descriptor: no path is looked up, which could wait for a filesystem. It must
    /// be of the caller's mount namespace.
    pub(crate) fn of(bundle: BorrowedFd<'_>, sockets: &str, socket: SocketMode) -> Result<Self, Failure> {
        let bundle = detached(bundle, READ_ONLY).map_err(at(Step::Bundle))?;
        Self::with(bundle, sockets, socket).map_err(at(Step::Sockets))
    }

    /// The same, with the bundle found by its path, without a symlink on the way: in another mount namespace than that of
    /// its descriptor, the same directory must be there.
    pub(crate) fn at(path: &Path, bundle: BorrowedFd<'_>, sockets: &str, socket: SocketMode) -> Result<Self, Failure> {
        let find = || -> Result<OwnedFd, Errno> {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let found = openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)?;
            let (found_stat, asked) = (fstat(&found)?, fstat(bundle)?);
            if (found_stat.st_dev, found_stat.st_ino) != (asked.st_dev, asked.st_ino) {
                return Err(Errno::STALE);
            }
            detached(found.as_fd(), READ_ONLY)
        };
        let bundle = find().map_err(at(Step::Bundle))?;
        Self::with(bundle, sockets, socket).map_err(at(Step::Sockets))
    }

    /// The sockets are in a directory of this name in the working directory.
    fn with(bundle: OwnedFd, sockets: &str, socket: SocketMode) -> Result<Self, Errno> {
        let attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
        let copy = |name: &str, more| {
            let source = path_only(&Path::new(sockets).join(name))?;
            detached(source.as_fd(), attributes | more)
        };
        let worker = match socket {
            SocketMode::Inherit => copy("worker.sock", libc::MOUNT_ATTR_RDONLY)?,
            SocketMode::Bind => copy("worker", 0)?,
        };
        Ok(Self { bundle, broker: copy("broker.sock", libc::MOUNT_ATTR_RDONLY)?, worker, machine: Vec::new() })
    }
}

/// The part of the tree that is the same for every plugin, before anything of one is in it.
pub(crate) struct Common {
    root: OwnedFd,
    tree: Tree,
}

/// Makes the calling process's mounts its own. First of all: nothing made later may propagate to the host. What the host
/// mounts later comes in where its tree is shown whole.
pub(crate) fn separate(tree: Tree) -> Result<(), Failure> {
    let propagation = match tree {
        Tree::Own => MountPropagationFlags::PRIVATE,
        Tree::Host => MountPropagationFlags::DOWNSTREAM,
    };
    mount_change("/", propagation | MountPropagationFlags::REC).map_err(at(Step::Propagation))
}

impl Common {
    /// Makes it and changes into it. The caller is the only process in its mount namespace, which is separate.
    pub(crate) fn enter(tree: Tree) -> Result<Self, Failure> {
        let limits = c"size=1m,nr_inodes=256,mode=0755";
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        mount("tmpfs", ROOT, "tmpfs", flags, limits).map_err(at(Step::Root))?;
        let root =
            open(ROOT, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(at(Step::Root))?;

        let directory = |path: &str| mkdirat(&root, path, Mode::from_raw_mode(0o755));
        match tree {
            Tree::Own => {
                host(&root).map_err(at(Step::HostDirectories))?;
                devices(&root).map_err(at(Step::Devices))?;
                directory("run").map_err(at(Step::Sockets))?;
                directory("tmp").map_err(at(Step::Temp))?;
                mkdirat(&root, "proc", Mode::from_raw_mode(0o555)).map_err(at(Step::Proc))?;
            }
            Tree::Host => whole_host(&root).map_err(at(Step::HostTree))?,
        }
        directory(&BUNDLE[1..]).map_err(at(Step::Bundle))?;
        directory(&sockets(tree)[1..]).map_err(at(Step::Sockets))?;
        touch(&root, &broker(tree)[1..]).map_err(at(Step::Sockets))?;
        rustix::process::fchdir(&root).map_err(at(Step::Pivot))?;
        if tree == Tree::Own {
            let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            mount("proc", "proc", "proc", flags, c"hidepid=2,subset=pid").map_err(at(Step::Proc))?;
        }

        pivot_root(".", ".").map_err(at(Step::Pivot))?;
        // The old root now lies over the new one at ".".
        unmount(".", UnmountFlags::DETACH).map_err(at(Step::Pivot))?;
        chdir("/").map_err(at(Step::Pivot))?;
        let root =
            open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(at(Step::Pivot))?;
        Ok(Self { root, tree })
    }

    /// Puts in what is one plugin's, closes the tree for writing, and changes to the bundle. `temp` is the size of /tmp in
    /// bytes, when the plugin has one; the host's tree has its own.
    pub(crate) fn complete(
        self,
        own: Own,
        directories: Vec<Detached>,
        socket: SocketMode,
        temp: Option<u64>,
    ) -> Result<(), Failure> {
        let Self { root, tree } = &self;
        let Own { bundle, broker: own_broker, worker: own_worker, machine } = own;
        attach(&bundle, root, &BUNDLE[1..]).map_err(at(Step::Bundle))?;
        let made = match socket {
            SocketMode::Inherit => {
                let path = worker(*tree, socket);
                touch(root, &path[1..]).map(|()| path)
            }
            SocketMode::Bind => {
                let path = worker_directory(*tree);
                mkdirat(root, &path[1..], Mode::from_raw_mode(0o755)).map(|()| path)
            }
        };
        let put = || {
            attach(&own_worker, root, &made?[1..])?;
            attach(&own_broker, root, &broker(*tree)[1..])
        };
        put().map_err(at(Step::Sockets))?;
        if !machine.is_empty() {
            let put = || {
                mkdirat(root, &machine::PLACE[1..], Mode::from_raw_mode(0o755))?;
                machine.iter().try_for_each(|(part, path)| {
                    touch(root, path)?;
                    attach(part, root, path)
                })
            };
            put().map_err(at(Step::Machine))?;
        }
        for Detached { kind, tree: directory } in directories {
            let put = || {
                let place = &kind.place()[1..];
                for part in [sockets(Tree::Host).trim_start_matches('/'), place] {
                    match mkdirat(root, part, Mode::from_raw_mode(0o755)) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(errno) => return Err(errno),
                    }
                }
                attach(&directory, root, place)
            };
            put().map_err(at(kind.step()))?;
        }
        if let Some(size) = temp.filter(|_| *tree == Tree::Own) {
            let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            let limits = std::ffi::CString::new(format!("size={size},nr_inodes=16384,mode=1777"));
            let limits = limits.map_err(|_| Failure::new(Step::Temp, Errno::INVAL))?;
            mount("tmpfs", "/tmp", "tmpfs", flags, limits.as_c_str()).map_err(at(Step::Temp))?;
        }
        kernel::mount_setattr(root.as_fd(), false, READ_ONLY).map_err(|error| Failure::io(Step::Pivot, &error))?;
        chdir(BUNDLE).map_err(at(Step::Pivot))
    }
}

/// Shows all that the host has, as it is. What has the name of a place of the plugin's own is hidden by it.
fn whole_host(root: &OwnedFd) -> Result<(), Errno> {
    let own = [BUNDLE, sockets(Tree::Host)].map(Path::new);
    let entries = fs::read_dir("/").map_err(|_| Errno::IO)?;
    for path in entries.flatten().map(|entry| entry.path()).filter(|path| !own.contains(&path.as_path())) {
        let Ok(found) = fs::symlink_metadata(&path) else { continue };
        let Ok(inside) = path.strip_prefix("/") else { continue };
        if found.is_symlink() {
            symlinkat(fs::read_link(&path).map_err(|_| Errno::NOENT)?, root, inside)?;
            continue;
        }
        if found.is_dir() {
            mkdirat(root, inside, Mode::from_raw_mode(0o755))?;
        } else {
            touch(root, inside)?;
        }
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH
            | OpenTreeFlags::AT_RECURSIVE;
        let tree = open_tree(path_only(&path)?, "", flags)?;
        move_mount(&tree, "", root, inside, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    }
    Ok(())
}

fn host(root: &OwnedFd) -> Result<(), Errno> {
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

fn touch(root: &OwnedFd, path: impl AsRef<Path>) -> Result<(), Errno> {
    openat(root, path.as_ref(), OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC, Mode::from_raw_mode(0o444)).map(drop)
}

/// Mounts a copy of the tree at the source.
fn bind(source: &OwnedFd, root: &OwnedFd, inside: &str, attributes: u64) -> Result<(), Errno> {
    attach(&detached(source.as_fd(), attributes)?, root, inside)
}

/// A copy of the tree at the source, submounts included: leaving them out would uncover what they hide, which a user
/// namespace rightly refuses. The attributes are set before the copy is attached, so no moment without them exists.
pub(crate) fn detached(source: BorrowedFd<'_>, attributes: u64) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(source, "", flags)?;
    kernel::mount_setattr(tree.as_fd(), true, attributes)
        .map_err(|error| error.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error))?;
    Ok(tree)
}

fn attach(tree: &OwnedFd, root: &OwnedFd, inside: &str) -> Result<(), Errno> {
    move_mount(tree, "", root, inside, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

fn at(step: Step) -> impl Fn(Errno) -> Failure {
    move |errno| Failure::new(step, errno)
}
