//! Changing a running launch, and measuring it: freeze and thaw, limits, statistics.
//!
//! The kernel looks for memory to take away within the write(2) of a lower limit, and may look for long. So limits are
//! written by a forked child that has [`CHANGE_TIME`], and the answer comes when it is done: applied as a whole, or taken
//! back.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::PathBuf,
    time::{Duration, Instant},
};

use plugvisor_sandbox::protocol::{Control, LaunchId, Limits, Refusal, RefusalCode, Reply, Stats};
use rustix::{
    event::epoll,
    pipe::{PipeFlags, pipe_with},
    process::{
        Signal, WaitId, WaitIdOptions, getpid, getppid, pidfd_send_signal, set_parent_process_death_signal, waitid,
    },
};

use super::{Phase, Server, Slot, Source, requests::no_launch};
use crate::{
    cgroup::{self, Groups},
    check::{self, refuse},
    kernel::{self, Cloned},
    launch::Running,
    level::Kernel,
    readback,
};

/// How long the kernel may take.
const CHANGE_TIME: Duration = Duration::from_secs(2);
/// The longest reason that a child gives, in bytes; a pipe takes it at once.
const WHY: usize = 2048;

/// A change of limits that a child is making.
pub(super) struct Change {
    request: u64,
    /// Which connection it came by.
    connection: u64,
    limits: Limits,
    before: Vec<(PathBuf, String)>,
    pidfd: OwnedFd,
    pub(super) pid: i32,
    why: OwnedFd,
    pub(super) deadline: Instant,
}

impl Change {
    /// How it went; `None` while the child is at it.
    fn ended(&self) -> Option<Result<(), String>> {
        let status = match waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
            Ok(None) => return None,
            Ok(status) => status.and_then(|status| status.exit_status()),
            Err(_) => None,
        };
        if status == Some(0) {
            return Some(Ok(()));
        }
        let mut bytes = [0; WHY];
        let read = rustix::io::read(&self.why, &mut bytes).unwrap_or(0);
        Some(Err(match read {
            0 => format!("the kernel did not apply it within {} s, or its process was killed", CHANGE_TIME.as_secs()),
            _ => String::from_utf8_lossy(&bytes[..read]).into_owned(),
        }))
    }

    fn kill(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

impl Server {
    fn up(&self, launch: LaunchId) -> Result<&Running, Refusal> {
        match self.slots.get(&launch.0) {
            Some(Slot { running, phase: Phase::Up, gone: None, .. }) => Ok(running),
            _ => Err(no_launch(launch)),
        }
    }

    pub(super) fn stats(&self, launch: LaunchId) -> Result<Stats, Refusal> {
        let running = self.up(launch)?;
        let mut stats = running.groups.stats(running.init_pid);
        stats.open_files = running.program_pid().and_then(cgroup::open_files);
        Ok(stats)
    }

    pub(super) fn freeze(&self, launch: LaunchId, freeze: bool) -> Result<(), Refusal> {
        let running = self.up(launch)?;
        let plugin = &running.plugin;
        match if freeze { running.groups.freeze() } else { running.groups.thaw() } {
            Some(Ok(())) => Ok(()),
            Some(Err(error)) => refuse(RefusalCode::Kernel, format!("{plugin} cannot be frozen or thawed: {error}")),
            None => refuse(
                RefusalCode::ControlUnavailable,
                format!(
                    "{plugin} cannot be frozen or thawed: the launcher has no cgroup that can; start it as root, or \
                     in a delegated cgroup"
                ),
            ),
        }
    }

    /// Begins a change of limits; the answer comes later.
    pub(super) fn limit(&mut self, request: u64, launch: LaunchId, limits: Limits) -> Result<(), Refusal> {
        let running = self.up(launch)?;
        check_change(running, &limits)?;
        if self.slots.get(&launch.0).is_some_and(|slot| slot.change.is_some()) {
            let why = format!("another change of the limits of {} is under way; wait for its answer", running.plugin);
            return refuse(RefusalCode::Exhausted, why);
        }
        let before = running.groups.before(&limits);
        let forked = fork(&running.groups, &limits);
        let (pidfd, pid, why) = forked.or_else(|error| {
            refuse(RefusalCode::Exhausted, format!("no process could be made to change the limits: {error}"))
        })?;
        let data = epoll::EventData::new_u64(Source::Change(launch.0).token());
        let watched = epoll::add(&self.epoll, &pidfd, data, epoll::EventFlags::IN);
        let deadline = Instant::now() + CHANGE_TIME;
        let change = Change { request, connection: self.connections, limits, before, pidfd, pid, why, deadline };
        if let Err(error) = watched {
            change.kill();
            cgroup::restore(&change.before);
            return refuse(RefusalCode::Exhausted, format!("epoll: {error}"));
        }
        if let Some(slot) = self.slots.get_mut(&launch.0) {
            slot.change = Some(change);
        }
        Ok(())
    }

    /// A child that changes limits has ended.
    pub(super) fn changed(&mut self, id: u64) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let Some(ended) = slot.change.as_ref().and_then(Change::ended) else { return };
        let Some(change) = slot.change.take() else { return };
        let _ = epoll::delete(&self.epoll, &change.pidfd);
        let Change { request, connection, limits, before, .. } = change;
        let plugin = slot.running.plugin.clone();
        let result = ended.and_then(|()| {
            for kept in [&mut slot.running.limits, &mut slot.origin.limits] {
                kept.memory_bytes = limits.memory_bytes.or(kept.memory_bytes);
                kept.cpu_percent = limits.cpu_percent.or(kept.cpu_percent);
                kept.pids = limits.pids.or(kept.pids);
            }
            if limits.memory_bytes.is_some() && slot.running.memory.is_none() {
                let memory = slot.running.groups.watch_memory().map_err(|error| error.to_string())?;
                if let Some(memory) = &memory {
                    let data = epoll::EventData::new_u64(Source::Memory(id).token());
                    epoll::add(&self.epoll, memory.as_fd(), data, memory.interest())
                        .map_err(|error| error.to_string())?;
                }
                slot.running.memory = memory;
            }
            Ok(())
        });
        let reply = match result {
            Ok(()) => {
                let limit = |control| matches!(control, Control::MemoryLimit | Control::CpuLimit | Control::PidsLimit);
                let mut states = readback::read(&self.launcher, &slot.running);
                states.retain(|state| limit(state.control));
                Reply::Limited(states)
            }
            Err(why) => {
                cgroup::restore(&before);
                let message = format!("the limits of {plugin} were not changed: {why}");
                Reply::Refused(Refusal { code: RefusalCode::ControlUnavailable, message })
            }
        };
        self.answer(connection, request, &reply);
    }

    /// A launch has ended while a child was changing its limits.
    pub(super) fn abandon_change(&mut self, id: u64) {
        let Some(change) = self.slots.get_mut(&id).and_then(|slot| slot.change.take()) else { return };
        let _ = epoll::delete(&self.epoll, &change.pidfd);
        change.kill();
        // Unless it is dead already it is reaped as a stranger, when the kernel tells of it.
        let _ = change.ended();
        self.answer(change.connection, change.request, &Reply::Refused(no_launch(LaunchId(id))));
    }

    /// Ends the changes that take too long; their own events follow.
    pub(super) fn overdue_changes(&mut self) {
        let now = Instant::now();
        for change in self.slots.values_mut().filter_map(|slot| slot.change.as_mut()) {
            if change.deadline <= now {
                change.kill();
                // A kill takes effect when the kernel next looks; asking often would not make it sooner.
                change.deadline = now + CHANGE_TIME;
            }
        }
    }

    /// Answers the supervisor that asked, if it is still there.
    fn answer(&mut self, connection: u64, request: u64, reply: &Reply) {
        if self.connections == connection && self.connection.is_some() {
            self.reply(request, reply, vec![]);
        }
    }
}

fn check_change(running: &Running, limits: &Limits) -> Result<(), Refusal> {
    let plugin = &running.plugin;
    let unchanged = |why: &str| format!("the limits of {plugin} were not changed: {why}");
    if let Some(why) = check::bounds(limits) {
        return refuse(RefusalCode::Policy, unchanged(why));
    }
    let Limits { memory_bytes, cpu_percent, pids, file_size_bytes, open_files } = limits;
    if file_size_bytes.is_some() || open_files.is_some() {
        return refuse(RefusalCode::Policy, unchanged("the limits on files are set when it is launched; reload it"));
    }
    if running.walls.kernel == Kernel::Own && (memory_bytes.is_some() || pids.is_some()) {
        let why = "those on memory and processes are its guest's, and are set when its machine is started; reload it";
        return refuse(RefusalCode::Policy, unchanged(why));
    }
    // The resource limit that backs this one up was set at the launch.
    let most = running.limits.pids.map(|pids| (pids.saturating_add(1)).saturating_mul(4).saturating_sub(1));
    if pids.zip(most).is_some_and(|(pids, most)| pids > most) {
        return refuse(RefusalCode::Policy, unchanged("at most four times as many processes as now; reload it"));
    }
    let asked = [
        (Control::MemoryLimit, memory_bytes.is_some()),
        (Control::CpuLimit, cpu_percent.is_some()),
        (Control::PidsLimit, pids.is_some()),
    ];
    match asked.into_iter().find(|(control, asked)| *asked && !running.groups.can_limit(*control)) {
        Some((control, _)) => refuse(
            RefusalCode::ControlUnavailable,
            unchanged(&format!("no cgroup holds its {control}; start the launcher as root, or in a delegated cgroup")),
        ),
        None => Ok(()),
    }
}

/// Forks a child that changes the limits, and ends with 0 or says why not.
fn fork(groups: &Groups, limits: &Limits) -> io::Result<(OwnedFd, i32, OwnedFd)> {
    let (why, said) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    let launcher = getpid();
    match kernel::clone3(0, None)? {
        Cloned::Parent { pidfd, pid } => Ok((pidfd, pid, why)),
        Cloned::Child => {
            kernel::set_name(c"plugvisor-limit");
            let tied = set_parent_process_death_signal(Some(Signal::KILL)).is_ok() && getppid() == Some(launcher);
            // Nothing else may stay open for as long as the kernel needs: the supervisor's connection above all.
            let alone = kernel::place(said.as_raw_fd(), 3, false).and_then(|()| kernel::close_from(4));
            if !tied || alone.is_err() {
                kernel::exit_now(1);
            }
            if let Err(error) = groups.change(limits) {
                let text = format!("{}: {}", error.control, error.why);
                let _ = rustix::io::write(kernel::fixed(3), &text.as_bytes()[..text.len().min(WHY)]);
                kernel::exit_now(1);
            }
            kernel::exit_now(0)
        }
    }
}
