//! Children made ahead of the launches that will need them: a few, each used once. What such a child does is in
//! `child::spare`.
//!
//! Most of a launch is the same for every plugin: namespaces (the network one above all), cgroups, the host's part of the
//! mount tree. With a spare that is done before the request comes. Bounded by `--spares`; made one after the other, while
//! nothing is being launched; whatever goes wrong with one, the launch begins from nothing instead.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use plugvisor_sandbox::protocol::Limits;
use rustix::{
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
    process::{Signal, pidfd_send_signal},
};

use crate::{
    cgroup::Groups,
    child::{self, Kit},
    kernel::{self, Cloned},
    launch::{Launcher, SETUP_TIME},
    report::{self, Message},
};

/// No spare is made for so long after one has failed.
const AFTER_FAILURE: Duration = Duration::from_secs(10);

/// The children.
#[derive(Debug)]
pub(crate) struct Spares {
    spares: Vec<Spare>,
    /// How many are kept.
    wanted: usize,
    made: u64,
    not_before: Instant,
}

/// One child.
#[derive(Debug)]
pub(crate) struct Spare {
    pub(crate) number: u64,
    pub(crate) init: OwnedFd,
    pub(crate) init_pid: i32,
    pub(crate) report: OwnedFd,
    pub(crate) groups: Groups,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Preparing {
        deadline: Instant,
    },
    Ready,
    /// It was killed; its groups go when it is gone.
    Leaving {
        silent: bool,
    },
}

impl Spares {
    pub(crate) fn new(wanted: usize) -> Self {
        Self { spares: Vec::new(), wanted, made: 0, not_before: Instant::now() }
    }

    /// One that is ready, for one launch.
    pub(crate) fn take(&mut self) -> Option<Spare> {
        let at = self.spares.iter().position(|spare| spare.state == State::Ready)?;
        // Another one is due from now on.
        self.not_before = self.not_before.max(Instant::now());
        Some(self.spares.remove(at))
    }

    /// Kills one that was taken and cannot be used.
    pub(crate) fn discard(&mut self, mut spare: Spare) {
        // The launch that begins from nothing now has groups of the name that these were given.
        drop(spare.groups.rename(&group(spare.number)));
        spare.leave();
        self.spares.push(spare);
    }

    /// Kills a child that began from nothing and cannot go on.
    pub(crate) fn abandon(&mut self, init: OwnedFd, init_pid: i32, report: OwnedFd, groups: Groups) {
        self.made += 1;
        // Nobody watches its line.
        let state = State::Leaving { silent: true };
        let spare = Spare { number: self.made, init, init_pid, report, groups, state };
        spare.kill();
        self.spares.push(spare);
    }

    /// When the next one is to be made, if one is missing and none is being made: two at a time would only take the
    /// processors from the plugins.
    pub(crate) fn due(&self) -> Option<Instant> {
        let preparing = self.spares.iter().any(|spare| matches!(spare.state, State::Preparing { .. }));
        let living = self.spares.iter().filter(|spare| !matches!(spare.state, State::Leaving { .. })).count();
        (living < self.wanted && !preparing).then_some(self.not_before)
    }

    /// When to look without an event: for one that does not get ready, or whose group the kernel still holds.
    pub(crate) fn deadlines(&self, retry: Duration) -> Option<Instant> {
        let deadline = |spare: &Spare| match spare.state {
            State::Preparing { deadline } => Some(deadline),
            State::Ready => None,
            State::Leaving { .. } => Some(Instant::now() + retry),
        };
        self.spares.iter().filter_map(deadline).min()
    }

    /// Takes what this one reported. Its line, when nothing more will come of it.
    pub(crate) fn reported(&mut self, number: u64) -> Option<BorrowedFd<'_>> {
        let spare = self.spares.iter_mut().find(|spare| spare.number == number)?;
        match report::receive(spare.report.as_fd()) {
            Ok(Some((Message::Ready, _))) if matches!(spare.state, State::Preparing { .. }) => {
                spare.state = State::Ready;
                // The next one is due from now on.
                self.not_before = self.not_before.max(Instant::now());
                None
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Ok(Some(_)) => {
                self.not_before = Instant::now() + AFTER_FAILURE;
                spare.leave();
                None
            }
            Ok(None) | Err(_) => {
                if !matches!(spare.state, State::Leaving { .. }) {
                    self.not_before = Instant::now() + AFTER_FAILURE;
                    spare.leave();
                }
                spare.state = State::Leaving { silent: true };
                Some(spare.report.as_fd())
            }
        }
    }

    /// Kills those that do not get ready, and lets go of those that are gone.
    pub(crate) fn tidy(&mut self) {
        let now = Instant::now();
        for spare in &mut self.spares {
            if matches!(spare.state, State::Preparing { deadline } if deadline <= now) {
                self.not_before = now + AFTER_FAILURE;
                spare.leave();
            }
        }
        self.spares.retain_mut(|spare| spare.state != State::Leaving { silent: true } || !spare.groups.remove());
    }

    /// Kills all and makes no more.
    pub(crate) fn end(&mut self) {
        self.wanted = 0;
        for spare in &mut self.spares {
            spare.leave();
        }
    }

    /// Whether nothing is left of any.
    pub(crate) const fn is_empty(&self) -> bool {
        self.spares.is_empty()
    }
}

impl Spare {
    fn kill(&self) {
        self.groups.kill();
        // Fails only when it is gone already.
        let _ = pidfd_send_signal(&self.init, Signal::KILL);
    }

    fn leave(&mut self) {
        self.kill();
        if !matches!(self.state, State::Leaving { .. }) {
            self.state = State::Leaving { silent: false };
        }
    }
}

/// What its groups are called until it has a launch.
fn group(number: u64) -> String {
    format!("spare-{number}")
}

impl Launcher {
    /// Makes a spare; its number and its line, to wait for what it reports. `None` when it could not be made.
    pub(crate) fn make_spare(&mut self) -> Option<(u64, BorrowedFd<'_>)> {
        self.spares.made += 1;
        let number = self.spares.made;
        let made = match self.cgroups.create(&group(number), &Limits::default(), 1) {
            Ok(groups) => self.fork_spare(number, groups).ok(),
            Err(_) => None,
        };
        let Some(spare) = made else {
            self.spares.not_before = Instant::now() + AFTER_FAILURE;
            return None;
        };
        self.spares.spares.push(spare);
        self.spares.spares.last().map(|spare| (number, spare.report.as_fd()))
    }

    fn fork_spare(&self, number: u64, mut groups: Groups) -> io::Result<Spare> {
        let fork = || -> io::Result<(OwnedFd, i32, OwnedFd)> {
            let born_in = groups.v2_directory()?;
            let joins = groups.joins(born_in.is_some())?;
            let (ours, its) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
            let kit = Kit {
                launcher: self.pidfd(),
                report: its.as_fd(),
                cgroups: joins.iter().map(AsFd::as_fd).collect(),
                landlock: self.landlock,
                filters: &self.filters,
            };
            let own_processes = libc::CLONE_NEWPID.unsigned_abs().into();
            match kernel::clone3(own_processes, born_in.as_ref().map(AsFd::as_fd))? {
                Cloned::Child => child::spare::run(&kit),
                Cloned::Parent { pidfd, pid } => Ok((pidfd, pid, ours)),
            }
        };
        match fork() {
            Ok((init, init_pid, report)) => {
                let state = State::Preparing { deadline: Instant::now() + SETUP_TIME };
                Ok(Spare { number, init, init_pid, report, groups, state })
            }
            Err(error) => {
                groups.remove();
                Err(error)
            }
        }
    }
}
