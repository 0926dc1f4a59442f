//! What is known of a launch from the fork until nothing of it is left, and what is done to it meanwhile.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::Instant,
};

use plugvisor_sandbox::{
    notify,
    protocol::{Control, Exit, Grant, LaunchId, Level, Limits, Refusal},
};
use rustix::process::{Signal, pidfd_send_signal};

use super::may_be_allowed;
use crate::{
    cgroup::{Groups, MemoryWatch},
    child::Failure,
    creds::Identity,
    level::{Keeper, Walls},
    report::{self, Message},
    timing::Marks,
    uids::{self, Uids, Unsaved},
};

/// One launch, from the fork until nothing of it is left.
pub(crate) struct Running {
    pub(crate) id: LaunchId,
    pub(crate) plugin: String,
    pub(crate) level: Level,
    pub(crate) walls: Walls,
    pub(crate) identity: Identity,
    pub(crate) limits: Limits,
    pub(crate) grants: Vec<Grant>,
    pub(crate) allow_degraded: Vec<Control>,
    pub(crate) arrived: Instant,
    /// The same by the clock of the marks.
    pub(crate) began: u64,
    pub(crate) marks: Marks,
    /// The init or the guard, a child of the launcher.
    pub(crate) init: OwnedFd,
    pub(crate) init_pid: i32,
    /// From the child; closed when all of it is gone.
    pub(crate) report: OwnedFd,
    pub(crate) report_closed: bool,
    /// Readable when the program was executed or died.
    pub(crate) exec: Option<OwnedFd>,
    /// What the monitor of its machine tells beside how the plugin ended.
    pub(crate) told: Option<OwnedFd>,
    pub(crate) program: Option<OwnedFd>,
    /// Readable when the program asks for its exec; closed when it was let pass.
    pub(crate) listener: Option<OwnedFd>,
    /// How many more execs are let pass.
    pub(crate) execs: u8,
    pub(crate) executing: bool,
    pub(crate) failure: Option<Failure>,
    pub(crate) ended: Option<Exit>,
    pub(crate) groups: Groups,
    pub(crate) memory: Option<MemoryWatch>,
    pub(crate) oom: bool,
    /// For the supervisor: broker, worker, stdout, stderr. Taken when the launch has succeeded.
    pub(crate) ends: Vec<OwnedFd>,
    /// For the supervisor, when egress was granted: what its child listens with in its network namespace.
    pub(crate) egress: Option<OwnedFd>,
    /// For the supervisor, with the grant to serve: what connects to it in its network namespace.
    pub(crate) inward: Vec<OwnedFd>,
    /// The content digest of its bundle.
    pub(crate) bundle: [u8; 32],
    /// The program waits for its uid to be on the disk.
    pub(super) unsaved: Option<Unsaved>,
}

impl Running {
    /// Takes what the child reported. The socket is read until it has no more.
    pub(crate) fn drain(&mut self) {
        loop {
            let (message, descriptor) = match report::receive(self.report.as_fd()) {
                Ok(Some(received)) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // Told once, of a child that ended before it read all that was sent to it; what it said comes after.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => continue,
                Ok(None) | Err(_) => {
                    self.report_closed = true;
                    return;
                }
            };
            match message {
                Message::Failed { step, errno } => self.failure = self.failure.or(Some(Failure { step, errno })),
                Message::Ready => {}
                Message::Listening => self.egress = descriptor,
                Message::Inward => self.inward.extend(descriptor),
                Message::Asks => self.listener = descriptor,
                Message::Executing { marks } => {
                    self.program = descriptor;
                    self.executing = true;
                    self.marks = marks;
                }
                Message::Ended { signal: false, value } => self.ended = Some(Exit::Code(value)),
                Message::Ended { signal: true, value } => self.ended = Some(Exit::Signal(value)),
            }
        }
    }

    /// Whether its machine's monitor told that the guest's kernel killed it for memory. Asked once, when it has ended.
    pub(crate) fn ran_out_in_its_machine(&mut self) -> bool {
        self.told.take().is_some_and(|told| rustix::io::read(&told, &mut [0; 1]) == Ok(1))
    }

    /// Lets the program be executed if what it waits for is on the disk now.
    pub(crate) fn release_if_saved(&mut self, uids: &Uids) {
        if self.unsaved.is_some_and(|unsaved| uids.is_saved(unsaved)) {
            self.unsaved = None;
            // A child that is dead already is told of by its own event.
            drop(report::release(self.report.as_fd()));
        }
    }

    /// Why it cannot be executed when the saver has failed with this error; `None` when it does not wait for it.
    pub(crate) fn unsaved(&self, errno: i32) -> Option<Refusal> {
        self.unsaved.map(|_| uids::unwritten(&self.plugin, errno))
    }

    /// Lets the program execute what it asks for, as often as its level does: then the listener is closed, and who asks again
    /// is told ENOSYS. Called when the listener is readable. Gives the listener when it is not waited for any more.
    pub(crate) fn let_execute(&mut self) -> Option<OwnedFd> {
        // Fails only when the program died while it asked; its end follows.
        let _ = notify::let_pass(self.listener.as_ref()?.as_fd());
        self.execs = self.execs.saturating_sub(1);
        if self.execs == 0 { self.listener.take() } else { None }
    }

    /// What is left when its first process is gone, of a launch without a PID namespace.
    pub(crate) fn kill_left(&self) {
        if self.walls.keeper == Keeper::Guard {
            self.groups.kill_members();
        }
    }

    /// Kills every process: the init's end ends its PID namespace. Who has none is killed with its groups, here and until
    /// they are empty.
    pub(crate) fn kill(&self) {
        self.groups.kill();
        if self.walls.keeper == Keeper::Guard {
            self.groups.kill_members();
        }
        // Fails only when the init is gone already.
        let _ = pidfd_send_signal(&self.init, Signal::KILL);
        // What is frozen does not die; a group that is gone needs no thaw. Members that are being killed thaw when all are.
        if self.walls.keeper == Keeper::Init {
            let _ = self.groups.thaw();
        }
    }

    /// Whether the operator allowed this launch to be without a control that its level may be without.
    pub(crate) fn may_lack(&self, control: Control) -> bool {
        may_be_allowed(self.level, control) && self.allow_degraded.contains(&control)
    }

    /// The program's number in the launcher's PID namespace.
    pub(crate) fn program_pid(&self) -> Option<i32> {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", self.program.as_ref()?.as_raw_fd())).ok()?;
        info.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse().ok().filter(|pid| *pid > 0)
    }
}
