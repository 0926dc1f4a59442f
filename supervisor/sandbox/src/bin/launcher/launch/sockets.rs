//! The sockets of a launch.

use std::{
    ffi::CStr,
    fs, io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use plugvisor_sandbox::protocol::{LaunchId, SocketMode};
use rustix::{
    fs::{Mode, OFlags},
    mount::{MountFlags, UnmountFlags, mount, unmount},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with},
};

use crate::creds::Identity;

/// Connections that may wait on a plugin's sockets.
const BACKLOG: i32 = 4096;
/// The file system of the directory in which a plugin binds its socket: room for the socket and a lock beside it.
const WORKER_DIRECTORY: &CStr = c"size=64k,nr_inodes=16,mode=0711";

/// The sockets of a launch, in a directory of its own in the launcher's private one, which is the working directory.
pub(super) struct Sockets {
    pub(super) broker: OwnedFd,
    pub(super) worker: OwnedFd,
    pub(super) listener: Option<OwnedFd>,
}

impl Sockets {
    pub(super) fn make(id: LaunchId, mode: SocketMode, identity: Identity, own_mounts: bool) -> io::Result<Self> {
        let directory = PathBuf::from(id.0.to_string());
        fs::DirBuilder::new().mode(0o700).create(&directory)?;
        let broker = listener(&directory.join("broker.sock"), SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        let (path, listener) = match mode {
            SocketMode::Inherit => {
                let path = directory.join("worker.sock");
                // Blocking, as programs expect of what they inherit; whoever wants it otherwise sets it.
                let listener = listener(&path, SocketFlags::CLOEXEC)?;
                (path, Some(listener))
            }
            SocketMode::Bind => {
                let path = directory.join("worker");
                fs::create_dir(&path)?;
                // The plugin binds in it, and may make whatever else: without a file system of its own that would be as
                // many inodes of the host's as it likes. An ordinary user's launcher with a store on the disk has no mounts
                // of its own, and its plugins have that user's file system anyway.
                if own_mounts {
                    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
                    mount("tmpfs", &path, "tmpfs", flags, WORKER_DIRECTORY)?;
                }
                // The supervisor's user connects through its descriptor.
                fs::set_permissions(&path, fs::Permissions::from_mode(0o711))?;
                if let Identity::Own { uid } = identity {
                    std::os::unix::fs::chown(&path, Some(uid), Some(uid))?;
                }
                (path, None)
            }
        };
        let worker = rustix::fs::open(&path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { broker, worker, listener })
    }
}

fn listener(path: &Path, flags: SocketFlags) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    // Who may reach the path is what protects it: nobody but root gets into the directory, and in the plugin's tree
    // only its own sockets are mounted.
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Removes what [`Sockets::make`] made, and what a plugin bound.
pub(crate) fn remove_sockets(id: LaunchId) {
    let directory = PathBuf::from(id.0.to_string());
    // Fails when nothing is mounted there. What the plugin made goes with the mount, and need not be walked through.
    let _ = unmount(directory.join("worker"), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
    drop(fs::remove_dir_all(directory));
}
