//! Whether the host's processor runs guests, found by running one: a device that opens proves nothing, and a guest that is
//! never run neither.
//!
//! The trial is made by a child with a time limit, because where it fails it may as well hang. It runs a
//! loop that ends in `hlt` in a machine with one page of memory, and expects to be told of that in time.

use std::{
    fmt, fs,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Signal, WaitId, WaitIdOptions, getpid, pidfd_send_signal, waitid},
};
use serde::{Deserialize, Serialize};

use crate::{
    kernel::{self, Cloned},
    store,
};

/// The device.
pub(crate) const DEVICE: &str = "/dev/kvm";

/// How long the loop may take: a processor needs a small part of it.
const PATIENCE: Duration = Duration::from_secs(1);

/// What makes a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Accelerator {
    Kvm,
    Emulation,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "KVM",
            Self::Emulation => "emulation",
        })
    }
}

/// What is known of KVM.
#[derive(Debug)]
pub(crate) enum Kvm {
    Untried,
    Trying(Attempt),
    /// Guests run and plugins' users may open the device; otherwise why not.
    Known(Result<(), String>),
}

/// The child that runs a guest.
#[derive(Debug)]
pub(crate) struct Attempt {
    pub(crate) pidfd: OwnedFd,
    pub(crate) pid: i32,
    pub(crate) deadline: Instant,
}

impl Kvm {
    /// Begins to find out; does not wait.
    pub(super) fn begin(now: Instant) -> Self {
        let open = || {
            let found = fs::metadata(DEVICE).map_err(|error| format!("{DEVICE}: {error}"))?;
            if found.permissions().mode() & 0o006 != 0o006 {
                return Err(format!(
                    "{DEVICE} may not be opened by everybody (chmod 666 {DEVICE}), and plugins have users of their own"
                ));
            }
            Attempt::begin(now)
        };
        open().map_or_else(|why| Self::Known(Err(why)), Self::Trying)
    }

    /// Looks whether the child has ended or is late; it is known from then on. Gives the child's pidfd, not to be watched any
    /// more.
    pub(crate) fn look(&mut self, now: Instant) -> Option<OwnedFd> {
        let Self::Trying(attempt) = self else { return None };
        let found = attempt.found(now)?;
        match std::mem::replace(self, Self::Known(found)) {
            Self::Trying(attempt) => Some(attempt.pidfd),
            Self::Untried | Self::Known(_) => None,
        }
    }

    /// Waits until it is known.
    pub(super) fn wait(&mut self) {
        while let Self::Trying(attempt) = self {
            attempt.wait();
            drop(self.look(Instant::now()));
        }
    }
}

impl Attempt {
    /// Whoever may open the device.
    fn begin(now: Instant) -> Result<Self, String> {
        let device =
            fs::File::options().read(true).write(true).open(DEVICE).map_err(|error| format!("{DEVICE}: {error}"))?;
        let launcher = getpid();
        match kernel::clone3(0, None).map_err(|error| format!("no process could be made to try it: {error}"))? {
            Cloned::Child => {
                kernel::set_name(c"plugvisor-kvm");
                // It may hang, and must hold nothing of the launcher's then; the device has the first number.
                let alone = store::become_writer(launcher, Some(device.as_fd()));
                kernel::exit_now(i32::from(alone.and_then(|()| kernel::runs_guest(3)).is_err()))
            }
            Cloned::Parent { pidfd, pid } => Ok(Self { pidfd, pid, deadline: now + PATIENCE }),
        }
    }

    /// What came of it; `None` while nothing has.
    fn found(&self, now: Instant) -> Option<Result<(), String>> {
        let status = waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
        match status {
            Ok(None) if now < self.deadline => None,
            Ok(None) => {
                // One that the kernel does not let go of is left to it; reaped it is as any orphan.
                self.kill();
                Some(Err(format!("{DEVICE} opens, and a guest does not run: it did nothing for {PATIENCE:?}")))
            }
            Ok(Some(status)) if status.exit_status() == Some(0) => Some(Ok(())),
            _ => Some(Err(format!("{DEVICE} opens, and a guest does not run"))),
        }
    }

    fn wait(&self) {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let left =
            Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(1), tv_nsec: i64::from(left.subsec_nanos()) };
        // What came of it is looked at anyway.
        let _ = poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&left));
    }

    pub(crate) fn kill(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever this host has: it is known in time, and said; and nobody waits for it who does not want to.
    #[test]
    fn a_guest_runs_or_it_is_said_why_not() {
        let begun = Instant::now();
        let mut kvm = Attempt::begin(begun).map_or_else(|why| Kvm::Known(Err(why)), Kvm::Trying);
        kvm.wait();
        let Kvm::Known(found) = kvm else { panic!("{kvm:?}") };
        println!("{found:?} after {:?}", begun.elapsed());
        assert!(begun.elapsed() < PATIENCE * 10);
        assert!(found.err().is_none_or(|why| why.contains(DEVICE)));
    }

    /// A child that hangs holds nobody up, and is given up in time.
    #[test]
    fn a_guest_that_hangs_is_not_waited_for() {
        let now = Instant::now();
        let (pidfd, pid) = match kernel::clone3(0, None).expect("a child") {
            Cloned::Child => loop {
                let _ = poll(&mut [], None);
            },
            Cloned::Parent { pidfd, pid } => (pidfd, pid),
        };
        let mut kvm = Kvm::Trying(Attempt { pidfd, pid, deadline: now + PATIENCE });
        assert!(kvm.look(now).is_none() && matches!(kvm, Kvm::Trying(_)));
        let pidfd = kvm.look(now + PATIENCE).expect("it is late");
        assert!(matches!(&kvm, Kvm::Known(Err(why)) if why.contains("did nothing")), "{kvm:?}");
        assert!(
            waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED).expect("waitid").expect("a status").killed()
        );
    }
}
