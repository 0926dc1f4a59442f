//! Closes what came from the supervisor, outside of the loop.
//!
//! Whoever sends a descriptor decides how long its close(2) takes: the last close of a TCP socket with `SO_LINGER` and
//! unsent bytes waits for the peer, and every close of a file in FUSE waits for the filesystem's server. Done in the
//! loop, one refused packet would stop kills and reaping. Asking a descriptor first what it is does not help: fstat and
//! fstatfs on FUSE wait for the same server, and what was refused must be closed all the same.
//!
//! So nothing that came from the supervisor, and nothing that was sent to it (a listening socket takes the descriptors
//! in its unaccepted connections with it), is closed by the launcher. A forked child that shares the descriptor table
//! (`CLONE_FILES`) closes it: that frees the launcher's own number at once, and the wait happens in the child. One such
//! child runs at a time, and none before the launches under way are up, so that it costs them nothing (a fork of some
//! 0.2 ms, once for each launch). It dies with the launcher, because while it lives the table does.
//!
//! Fails closed: a child that is not done in [`CLOSE_TIME`] ends the connection. While much is pending no request is
//! read. Receiving has a part of the table to itself, because the kernel closes what finds no number in the receiver.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd},
    time::{Duration, Instant},
};

use plugvisor_sandbox::seqpacket::{MOST_DESCRIPTORS, Received, Seqpacket};
use rustix::{
    net::{SocketFlags, accept_with},
    process::{
        Pid, Resource, Rlimit, Signal, WaitId, WaitIdOptions, getpid, getppid, getrlimit, pidfd_send_signal,
        set_parent_process_death_signal, setrlimit, waitid,
    },
};

use crate::kernel::{self, Cloned};

/// How long a child may take. What is local closes in microseconds, a busy network filesystem within a second or so.
const CLOSE_TIME: Duration = Duration::from_secs(5);
/// How often a fork that failed is tried again.
const RETRY: Duration = Duration::from_millis(50);
/// With more pending no request is read; with half of it launches under way are not waited for. More than one packet can
/// bring, so that one which does not close leaves room for the next request.
const MANY: usize = 256;
/// The numbers at the top of the table that only receiving may use.
const RESERVED: u64 = (MANY + MOST_DESCRIPTORS) as u64;
/// The least that must be left below them: enough for a handful of plugins.
const LEAST: u64 = 192;
/// More numbers than the most plugins need; a hard limit can be in the billions.
const MOST: u64 = 1 << 16;

/// The descriptors that wait to be closed, and the child that closes some.
pub(crate) struct Closer {
    /// Numbers and not owners: dropping them must not close them.
    pending: Vec<RawFd>,
    child: Option<Child>,
    /// Since when no child could be forked.
    failing: Option<Instant>,
    /// The soft limit on open files, usually and while receiving.
    usual: Rlimit,
    receiving: Rlimit,
}

struct Child {
    pidfd: OwnedFd,
    pid: i32,
    closing: usize,
    deadline: Instant,
}

impl Closer {
    /// Divides the descriptor table. An error where the hard limit on open files leaves too little.
    pub(crate) fn new() -> io::Result<Self> {
        let hard = getrlimit(Resource::Nofile).maximum;
        let most = hard.unwrap_or(MOST).min(MOST);
        if most < RESERVED + LEAST {
            return Err(io::Error::other(format!(
                "the hard limit on open files (RLIMIT_NOFILE) is {most}, and the launcher needs {}; raise it \
                 (LimitNOFILE= in a unit, ulimit -Hn in a shell) and start plugvisord again",
                RESERVED + LEAST
            )));
        }
        let soft = |current| Rlimit { current: Some(current), maximum: hard };
        let (usual, receiving) = (soft(most - RESERVED), soft(most));
        setrlimit(Resource::Nofile, usual)?;
        Ok(Self { pending: Vec::new(), child: None, failing: None, usual, receiving })
    }

    /// Receives a packet with room for every descriptor that it may carry.
    pub(crate) fn receive(&self, connection: &Seqpacket) -> io::Result<Received> {
        setrlimit(Resource::Nofile, self.receiving)?;
        let received = connection.try_recv();
        setrlimit(Resource::Nofile, self.usual)?;
        received
    }

    /// Accepts a connection, with room for it even when the table is full of plugins.
    pub(crate) fn accept(&self, listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        setrlimit(Resource::Nofile, self.receiving)?;
        let accepted = accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
        setrlimit(Resource::Nofile, self.usual)?;
        Ok(accepted?)
    }

    /// Whether receiving still has room.
    pub(crate) fn has_room(&self) -> bool {
        self.pending.len() + self.child.as_ref().map_or(0, |child| child.closing) <= MANY
    }

    /// Takes what is to be closed.
    pub(crate) fn take(&mut self, descriptors: Vec<OwnedFd>) {
        self.pending.extend(descriptors.into_iter().map(IntoRawFd::into_raw_fd));
    }

    /// Starts a child if there is something to close and none runs; its pidfd, if one was started. While launches are
    /// under way it waits for more.
    pub(crate) fn start(&mut self, launching: bool) -> Option<BorrowedFd<'_>> {
        if self.pending.is_empty() || self.child.is_some() || (launching && self.pending.len() < MANY / 2) {
            return None;
        }
        let launcher = getpid();
        match kernel::clone3(libc::CLONE_FILES.unsigned_abs().into(), None) {
            Ok(Cloned::Child) => close(launcher, &self.pending),
            Ok(Cloned::Parent { pidfd, pid }) => {
                let closing = std::mem::take(&mut self.pending).len();
                self.failing = None;
                let child = Child { pidfd, pid, closing, deadline: Instant::now() + CLOSE_TIME };
                Some(self.child.insert(child).pidfd.as_fd())
            }
            Err(_) => {
                self.failing.get_or_insert_with(Instant::now);
                None
            }
        }
    }

    /// Reaps the child if it has ended, and gives its pidfd and how it went: an error when it did not end well, and nobody
    /// knows what it left open.
    pub(crate) fn ended(&mut self) -> Option<(OwnedFd, io::Result<()>)> {
        let child = self.child.as_ref()?;
        let result = match waitid(WaitId::PidFd(child.pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
            Ok(None) => return None,
            Ok(Some(status)) if status.exit_status() == Some(0) => Ok(()),
            _ => Err(io::Error::other(
                "the process that closes descriptors for the launcher was killed, so every plugin was killed; if the \
                 kernel log tells of too little memory, give plugvisord more",
            )),
        };
        self.child.take().map(|child| (child.pidfd, result))
    }

    /// Whether this is the child, which reaps itself by [`Closer::ended`].
    pub(crate) fn is_child(&self, pid: i32) -> bool {
        self.child.as_ref().is_some_and(|child| child.pid == pid)
    }

    /// When to look again without an event.
    pub(crate) fn due(&self) -> Option<Duration> {
        let child = self.child.as_ref().map(|child| child.deadline.saturating_duration_since(Instant::now()));
        child.or_else(|| self.failing.map(|_| RETRY))
    }

    /// An error when something has been waiting too long.
    pub(crate) fn check(&self) -> io::Result<()> {
        if self.child.as_ref().is_some_and(|child| child.deadline <= Instant::now()) {
            return Err(io::Error::other(format!(
                "closing a descriptor that came from the supervisor took more than {} s, so every plugin was killed; \
                 either a network filesystem with bundles hangs, or the supervisor was taken over: look at both \
                 before plugvisord is started again",
                CLOSE_TIME.as_secs()
            )));
        }
        if self.failing.is_some_and(|since| since.elapsed() > CLOSE_TIME) {
            return Err(io::Error::other(format!(
                "no process could be forked for {} s to close descriptors, so every plugin was killed; raise the \
                 launcher's process and memory limits",
                CLOSE_TIME.as_secs()
            )));
        }
        Ok(())
    }

    /// Kills the child. It may be where no signal reaches it; nobody waits for it.
    pub(crate) fn kill(&self) {
        if let Some(child) = &self.child {
            let _ = pidfd_send_signal(&child.pidfd, Signal::KILL);
        }
    }
}

/// The child: closes and ends.
fn close(launcher: Pid, descriptors: &[RawFd]) -> ! {
    kernel::set_name(c"plugvisor-close");
    let tied = set_parent_process_death_signal(Some(Signal::KILL)).is_ok();
    if !tied || getppid() != Some(launcher) {
        kernel::exit_now(1);
    }
    for fd in descriptors {
        kernel::close(*fd);
    }
    kernel::exit_now(0)
}
