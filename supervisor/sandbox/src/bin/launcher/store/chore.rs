//! What the store does on the disk and nobody waits for: making a bundle durable, removing one. A forked child does it,
//! one at a time, in the order in which it was asked for.
//!
//! A bundle is launched before it is durable. What a crash leaves unfinished has no list and is removed at the next
//! start; a supervisor then imports it again.

use std::{
    collections::VecDeque,
    fs,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, getpid, pidfd_send_signal, waitid};

use super::{place::make_durable, writer::become_writer};
use crate::kernel::{self, Cloned};

/// One thing to do.
#[derive(Clone, Debug)]
pub(super) enum Chore {
    /// Everything to the disk, the list last.
    MakeDurable { files: PathBuf, list: String, about: String },
    /// A directory and all that is in it.
    Remove(PathBuf),
}

/// What is to be done, and the child that does the first of it.
#[derive(Default)]
pub(super) struct Chores {
    waiting: VecDeque<Chore>,
    child: Option<(OwnedFd, i32)>,
}

impl Chores {
    pub(super) fn add(&mut self, chore: impl IntoIterator<Item = Chore>) {
        self.waiting.extend(chore);
    }

    /// How many wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Starts the next one, which keeps the store's lock until it has ended.
    pub(super) fn start(&mut self, lock: Option<BorrowedFd<'_>>) -> Option<BorrowedFd<'_>> {
        if self.child.is_some() {
            return None;
        }
        let chore = self.waiting.pop_front()?;
        let launcher = getpid();
        match kernel::clone3(0, None) {
            Ok(Cloned::Child) => run(&chore, launcher, lock),
            Ok(Cloned::Parent { pidfd, pid }) => Some(self.child.insert((pidfd, pid)).0.as_fd()),
            Err(_) => {
                // Tried again when something else happens; nothing depends on it.
                self.waiting.push_front(chore);
                None
            }
        }
    }

    pub(super) fn ended(&mut self) -> Option<OwnedFd> {
        let (pidfd, _) = self.child.as_ref()?;
        match waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
            Ok(None) => None,
            _ => self.child.take().map(|(pidfd, _)| pidfd),
        }
    }

    pub(super) fn is_child(&self, pid: i32) -> bool {
        self.child.as_ref().is_some_and(|(_, child)| *child == pid)
    }

    pub(super) fn kill(&self) {
        if let Some((pidfd, _)) = &self.child {
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
    }
}

fn run(chore: &Chore, launcher: Pid, lock: Option<BorrowedFd<'_>>) -> ! {
    kernel::set_name(c"plugvisor-store");
    let done = become_writer(launcher, lock).and_then(|()| match chore {
        Chore::MakeDurable { files, list, about } => make_durable(files, list, about),
        Chore::Remove(path) => fs::remove_dir_all(path),
    });
    kernel::exit_now(i32::from(done.is_err()))
}
