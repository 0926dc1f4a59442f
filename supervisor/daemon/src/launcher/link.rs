//! Coming by a launcher, before privileges are given up: one that an earlier supervisor left, or a new one. And after:
//! one that was started elsewhere.
//!
//! A launcher that may outlive its supervisor listens in a directory of its own beneath the runtime directory, where
//! only the starter's user, root when root starts it, can put a socket. Whoever listens is believed by `SO_PEERCRED` only.

use std::{
    io,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use plugvisor_sandbox::{
    codec::encode_request,
    options::{BundleRoot, Linger, Listen, Options, Supervisor, Variable},
    protocol::{Hello, Request, VERSION},
    seqpacket::{Received, Seqpacket},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::Mode,
    io::Errno,
    process::{Pid, PidfdFlags, geteuid, pidfd_open},
};

use super::spawn::{SpawnError, spawn};

/// The launcher's exit status for what it was started with (EX_CONFIG of sysexits.h).
pub(crate) const CONFIGURATION: i32 = 78;

/// How long a launcher that was just started may take to answer or to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// The directory of the listening socket in the runtime directory.
const DOOR: &str = "reattach";

/// The socket in it.
const SOCKET: &str = "launcher.sock";

/// A launcher that was not asked anything yet.
#[derive(Debug)]
pub struct Link {
    /// This side of the connection.
    pub connection: Seqpacket,
    /// Whose it is.
    pub tie: Tie,
    /// When the connection was made.
    pub since: Instant,
}

/// What of its policy the launcher is started with: the supervisor's user may write none of it.
#[derive(Clone, Debug, Default)]
pub struct Own {
    /// Where its store is; in memory without one.
    pub store: Option<PathBuf>,
    /// What the administrator approved.
    pub policy: Option<PathBuf>,
    /// Where plugins' configuration directories are.
    pub config_root: Option<PathBuf>,
    /// Where their data directories are.
    pub data_root: Option<PathBuf>,
    /// The variables that plugins may be given.
    pub variables: Vec<Variable>,
}

/// How the launcher's life hangs together with the supervisor's.
#[derive(Debug)]
pub enum Tie {
    /// This supervisor started it, and ends it.
    Started(Child),
    /// An earlier supervisor started it; this one ends it. Its pidfd.
    Found(OwnedFd),
    /// It was started elsewhere and is ended there.
    External,
}

/// Why there is no launcher.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// None could be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// Nobody listens where one was said to.
    #[error("no launcher answers at {}: {source}; start plugvisor-launcher with --listen there, or correct [launcher] socket", path.display())]
    Unreachable {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody else listens there.
    #[error("the launcher at {} runs as uid {uid}, and only root or uid {own} is believed; find out who started it", path.display())]
    Stranger {
        /// Where.
        path: PathBuf,
        /// As whom.
        uid: u32,
        /// Who this supervisor is.
        own: u32,
    },
    /// The directory for its socket.
    #[error("cannot prepare {} for the launcher's socket: {source}; remove it if nothing needs it", path.display())]
    Door {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Link {
    /// The launcher that an earlier supervisor left in this runtime directory, or a new one, which outlives this
    /// supervisor by `linger`. Must be called while the process has one thread.
    pub fn embedded(
        program: &Path,
        runtime: &Path,
        roots: Vec<BundleRoot>,
        linger: Duration,
        files: Own,
    ) -> Result<Self, LinkError> {
        let directory = runtime.join(DOOR);
        let path = directory.join(SOCKET);
        match reach(&path) {
            Ok(connection) => return Self::found(connection, path),
            // None was left, or one that was killed.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {}
            Err(source) => return Err(LinkError::Unreachable { path, source }),
        }
        let own = geteuid().as_raw();
        if !linger.is_zero() {
            make_door(&directory, own).map_err(|source| LinkError::Door { path: directory, source })?;
        }
        let spawned = spawn(program, Stdio::inherit(), |socket| {
            let Own { store, policy, config_root, data_root, variables } = files;
            let usual = Options::new(socket, runtime.to_owned(), roots);
            let mut options = Options { store, policy, config_root, data_root, variables, ..usual };
            if !linger.is_zero() {
                let listen = Listen { path, first: Some(socket), uid: own, linger: Linger::For(linger) };
                options.supervisor = Supervisor::Listen(listen);
            }
            options
        })?;
        Ok(Self { connection: spawned.connection, tie: Tie::Started(spawned.child), since: Instant::now() })
    }

    fn found(connection: Seqpacket, path: PathBuf) -> Result<Self, LinkError> {
        let pid = believed(&connection, &path)?;
        let pidfd = Pid::from_raw(pid).ok_or(Errno::SRCH).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()));
        let pidfd = pidfd.map_err(|error| LinkError::Unreachable { path, source: error.into() })?;
        Ok(Self { connection, tie: Tie::Found(pidfd), since: Instant::now() })
    }

    /// Whether the launcher that this supervisor has started ends because of how it was started. Blocks until it ends or
    /// answers, for a supervisor that does not start itself; the connection is of no use afterwards.
    #[must_use]
    pub fn is_refused(self) -> bool {
        let Self { connection, tie: tie @ Tie::Started(_), since: _ } = self else { return false };
        let Ok(hello) = encode_request(1, &Request::Hello(Hello { version: VERSION })) else { return false };
        // One that has ended already cannot be asked.
        if connection.try_send(&hello, &[]).is_ok() {
            let time = Timespec { tv_sec: PATIENCE.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: 0 };
            match poll(&mut [PollFd::new(&connection, PollFlags::IN)], Some(&time)) {
                Ok(0) | Err(_) => return false,
                Ok(_) => {}
            }
            // The end of one that did not read the question may be an error.
            if let Ok(Received::Packet(_) | Received::Truncated(_)) = connection.try_recv() {
                return false;
            }
        }
        drop(connection);
        let ended = tie.wait(PATIENCE);
        ended.is_ok_and(|status| status.is_some_and(|status| status.code() == Some(CONFIGURATION)))
    }

    /// The launcher that was started elsewhere. It lets in one user, so this is for a process that is that user.
    pub fn external(path: &Path) -> Result<Self, LinkError> {
        let unreachable = |source| LinkError::Unreachable { path: path.to_owned(), source };
        let connection = reach(path).map_err(unreachable)?;
        believed(&connection, path)?;
        Ok(Self { connection, tie: Tie::External, since: Instant::now() })
    }
}

impl Tie {
    /// Whether the launcher, and every plugin with it, ends when this supervisor is told to.
    #[must_use]
    pub const fn ends_with_us(&self) -> bool {
        match self {
            Self::Started(_) | Self::Found(_) => true,
            Self::External => false,
        }
    }

    /// Waits until a launcher that ends with this supervisor has ended; says how when it ended badly. Blocks.
    pub fn wait(self, patience: Duration) -> io::Result<Option<std::process::ExitStatus>> {
        let late = || io::Error::from(io::ErrorKind::TimedOut);
        let ended = |pidfd: &OwnedFd| {
            let time = Timespec { tv_sec: patience.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: 0 };
            match poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&time)) {
                Ok(0) => Err(late()),
                Ok(_) => Ok(()),
                Err(error) => Err(error.into()),
            }
        };
        match self {
            Self::Started(mut child) => {
                let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
                ended(&pidfd)?;
                child.wait().map(|status| (!status.success()).then_some(status))
            }
            // Somebody else's child: how it ended is told to nobody here.
            Self::Found(pidfd) => ended(&pidfd).map(|()| None),
            Self::External => Ok(None),
        }
    }
}

fn reach(path: &Path) -> io::Result<Seqpacket> {
    Seqpacket::connect(path)
}

/// The pid of who listens, when it is root or of our own user.
fn believed(connection: &Seqpacket, path: &Path) -> Result<i32, LinkError> {
    let peer = connection.peer().map_err(|source| LinkError::Unreachable { path: path.to_owned(), source })?;
    let own = geteuid().as_raw();
    if peer.uid != 0 && peer.uid != own {
        return Err(LinkError::Stranger { path: path.to_owned(), uid: peer.uid, own });
    }
    Ok(peer.pid)
}

/// Makes the directory, or finds that it is as it would have been made.
fn make_door(directory: &Path, own: u32) -> io::Result<()> {
    match rustix::fs::mkdir(directory, Mode::RWXU) {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) => {
            let found = directory.symlink_metadata()?;
            if found.is_dir() && found.uid() == own && found.mode() & 0o7777 == 0o700 {
                return Ok(());
            }
            Err(io::Error::new(io::ErrorKind::PermissionDenied, "somebody else may change what is in it"))
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn the_door_is_nobody_elses() {
        let parent = tempfile::tempdir().unwrap();
        let own = geteuid().as_raw();
        let door = parent.path().join(DOOR);
        make_door(&door, own).unwrap();
        make_door(&door, own).unwrap();
        assert!(make_door(&door, own + 1).is_err(), "of another user");
        std::fs::set_permissions(&door, std::fs::Permissions::from_mode(0o770)).unwrap();
        assert!(make_door(&door, own).is_err(), "others may write to it");
        let link = parent.path().join("link");
        symlink(&door, &link).unwrap();
        assert!(make_door(&link, own).is_err(), "a link");
    }

    #[test]
    fn a_launcher_that_is_not_there_is_named_with_the_way_out() {
        let error = Link::external(Path::new("/no/such/launcher.sock")).unwrap_err().to_string();
        assert!(error.contains("/no/such/launcher.sock") && error.contains("--listen"), "{error}");
    }
}
