//! The loop: requests, children, memory events, signals. One thread; nothing in it waits but the one call to epoll.
//!
//! Here is what is waited for, and the end. The supervisor's packets are in `connection`, what they ask in `requests`,
//! what becomes of a launch in `launches` and `change`, and what happens between two supervisors in `attach`.

mod attach;
mod change;
mod connection;
mod launches;
mod requests;
mod store;

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use plugvisor_sandbox::{options::Linger, protocol::Refusal, seqpacket::Seqpacket};
use rustix::{
    event::{Timespec, epoll},
    io::Errno,
    process::{Pid, WaitId, WaitIdOptions, waitid},
};

use self::{
    attach::{Ends, Origin, Past, Stream},
    change::Change,
    connection::Connection,
};
use crate::{
    closer::Closer,
    door::Door,
    held::Held,
    launch::{Launcher, Running},
    machine::Kvm,
};

/// How long the launcher waits for killed plugins when it ends.
const END_TIME: Duration = Duration::from_secs(5);
/// How often it looks again whether the kernel has let go of a group.
const RETRY: Duration = Duration::from_millis(2);

/// For how long a spare that is missing waits for a turn without an event.
const PATIENCE: Duration = Duration::from_millis(25);

/// How long a launcher waits for its first supervisor, whatever its linger is.
const FIRST_TIME: Duration = Duration::from_secs(30);

/// What a descriptor in the epoll set stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Supervisor,
    Signals,
    Closer,
    Door,
    Init(u64),
    Report(u64),
    Exec(u64),
    Memory(u64),
    Listener(u64),
    Output(u64, Stream),
    Change(u64),
    Spare(u64),
    /// The child that copies into the store.
    Copier,
    /// The child that works in the store.
    Chore,
    /// The child that writes the uids.
    Saver,
    /// The child that finds out what makes machines.
    Kvm,
}

impl Source {
    const fn token(self) -> u64 {
        match self {
            Self::Supervisor => 0,
            Self::Signals => 1,
            Self::Closer => 2,
            Self::Door => 3,
            Self::Init(id) => id << 4 | 4,
            Self::Report(id) => id << 4 | 5,
            Self::Exec(id) => id << 4 | 6,
            Self::Memory(id) => id << 4 | 7,
            Self::Output(id, Stream::Stdout) => id << 4 | 8,
            Self::Output(id, Stream::Stderr) => id << 4 | 9,
            Self::Change(id) => id << 4 | 10,
            Self::Spare(number) => number << 4 | 11,
            Self::Listener(id) => id << 4 | 15,
            Self::Copier => 12,
            Self::Chore => 13,
            Self::Saver => 14,
            Self::Kvm => 1 << 4 | 12,
        }
    }

    const fn of(token: u64) -> Option<Self> {
        match (token & 15, token >> 4) {
            (0, _) => Some(Self::Supervisor),
            (1, _) => Some(Self::Signals),
            (2, _) => Some(Self::Closer),
            (3, _) => Some(Self::Door),
            (4, id) => Some(Self::Init(id)),
            (5, id) => Some(Self::Report(id)),
            (6, id) => Some(Self::Exec(id)),
            (7, id) => Some(Self::Memory(id)),
            (8, id) => Some(Self::Output(id, Stream::Stdout)),
            (9, id) => Some(Self::Output(id, Stream::Stderr)),
            (10, id) => Some(Self::Change(id)),
            (11, number) => Some(Self::Spare(number)),
            (15, id) => Some(Self::Listener(id)),
            (12, 1) => Some(Self::Kvm),
            (12, _) => Some(Self::Copier),
            (13, _) => Some(Self::Chore),
            (14, _) => Some(Self::Saver),
            _ => None,
        }
    }
}

/// Where a launch is.
enum Phase {
    /// The child is setting itself up; the request waits.
    Starting { request: u64, deadline: Instant },
    /// The supervisor has been told of it.
    Up,
    /// Its processes are being killed, and then the request is refused.
    Refusing { request: u64, refusal: Refusal },
    /// Its processes are being killed, and the supervisor that asked for it is gone.
    Abandoned,
}

struct Slot {
    running: Running,
    phase: Phase,
    origin: Origin,
    /// What a supervisor needs of it; `None` until it is up.
    ends: Option<Ends>,
    /// A change of its limits that is under way.
    change: Option<Change>,
    /// Since when the init is reaped.
    gone: Option<Instant>,
}

/// The loop's state.
pub(crate) struct Server {
    launcher: Launcher,
    connection: Option<Connection>,
    /// Where the next supervisor may come in; `None` when there can be only the first.
    door: Option<Door>,
    /// Connections of those who were turned away, until they may be closed.
    leaving: VecDeque<(Seqpacket, Instant)>,
    /// Since when there is no supervisor.
    alone: Option<Instant>,
    /// How many were let in: the number of the one that is connected. A late answer names whom it is for.
    connections: u64,
    /// How many of them said Hello.
    visits: u64,
    /// How long there was none before the one that is connected.
    unattended: Option<Duration>,
    signals: OwnedFd,
    closer: Closer,
    epoll: OwnedFd,
    slots: BTreeMap<u64, Slot>,
    /// Launches that are over, until a supervisor acknowledges it.
    past: BTreeMap<u64, Past>,
    /// How many of them were forgotten for lack of room.
    forgotten: u64,
    held: Held,
    /// The supervisor is gone or the launcher was told to end, since then.
    ending: Option<Instant>,
    /// Why the launcher ended the connection itself.
    failed: Option<io::Error>,
}

impl Server {
    /// With the first supervisor's connection, a door for more of them, or both.
    pub(crate) fn new(
        launcher: Launcher,
        connection: Option<Seqpacket>,
        door: Option<Door>,
        signals: OwnedFd,
        closer: Closer,
    ) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let data = epoll::EventData::new_u64(Source::Signals.token());
        epoll::add(&epoll, &signals, data, epoll::EventFlags::IN)?;
        let mut server = Self {
            launcher,
            connection: None,
            door,
            leaving: VecDeque::new(),
            alone: Some(Instant::now()),
            connections: 0,
            visits: 0,
            unattended: None,
            signals,
            closer,
            epoll,
            slots: BTreeMap::new(),
            past: BTreeMap::new(),
            forgotten: 0,
            held: Held::default(),
            ending: None,
            failed: None,
        };
        if let Some(connection) = connection {
            server.attach(connection)?;
        }
        Ok(server)
    }

    /// Runs until the supervisor is gone, or a signal ends the launcher, and no plugin is left. An error when the launcher
    /// had to end by itself.
    pub(crate) fn run(&mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(64);
        loop {
            if let Some(since) = self.ending
                && (self.slots.is_empty() && self.launcher.spares.is_empty() || since.elapsed() > END_TIME)
            {
                self.launcher.cgroups.tear_down();
                return self.failed.take().map_or(Ok(()), Err);
            }
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), self.timeout().as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let quiet = events.is_empty();
            for event in events.drain(..) {
                let flags = event.flags;
                if let Some(source) = Source::of(event.data.u64()) {
                    if source == Source::Supervisor && flags.contains(epoll::EventFlags::HUP) && !self.closer.has_room()
                    {
                        // Nothing is read now that would tell of it.
                        self.lost();
                    }
                    self.handle(source);
                }
            }
            self.overdue();
            self.overdue_changes();
            self.mute();
            self.show_out();
            self.lonely();
            self.launcher.store.overdue();
            self.tried();
            self.start_saver()?;
            self.start_chore()?;
            self.finish_gone();
            self.flush();
            self.make_spare(quiet)?;
            self.close_received()?;
            self.watch_connection()?;
            self.watch_door()?;
        }
    }

    /// Ends the connection without closing it: a closer that hangs holds the descriptor table for as long as it does.
    pub(crate) fn hang_up(&self) {
        if let Some(connection) = &self.connection {
            connection.hang_up();
        }
        if let Some(door) = &self.door {
            door.remove();
        }
    }

    fn handle(&mut self, source: Source) {
        match source {
            Source::Supervisor => self.read_requests(),
            Source::Signals => self.read_signals(),
            Source::Closer => {
                if let Some((pidfd, result)) = self.closer.ended() {
                    let _ = epoll::delete(&self.epoll, &pidfd);
                    if let Err(error) = result {
                        self.fail(error);
                    }
                }
            }
            Source::Init(id) => self.init_ended(id),
            Source::Report(id) => self.reported(id),
            Source::Exec(id) => {
                if let Some(slot) = self.slots.get_mut(&id) {
                    // Closed by exec or death; the end of the descriptor takes it out of the epoll set.
                    slot.running.exec = None;
                }
                self.reported(id);
            }
            Source::Memory(id) => self.memory_event(id),
            Source::Listener(id) => self.asked_to_execute(id),
            Source::Door => self.accept(),
            Source::Output(id, stream) => self.drain(id, stream),
            Source::Change(id) => self.changed(id),
            Source::Spare(number) => {
                if let Some(silent) = self.launcher.spares.reported(number) {
                    let _ = epoll::delete(&self.epoll, silent);
                }
            }
            Source::Copier => self.copied(),
            Source::Saver => self.saved(),
            Source::Kvm => self.tried(),
            Source::Chore => {
                if let Some(pidfd) = self.launcher.store.chore_ended() {
                    let _ = epoll::delete(&self.epoll, &pidfd);
                }
            }
        }
    }

    /// The nearest time at which something must be looked at without an event.
    fn timeout(&self) -> Option<Timespec> {
        let now = Instant::now();
        let starting = self.slots.values().filter_map(|slot| match slot.phase {
            Phase::Starting { deadline, .. } => Some(deadline.saturating_duration_since(now)),
            Phase::Up | Phase::Refusing { .. } | Phase::Abandoned => None,
        });
        let changing = self.slots.values().filter_map(|slot| slot.change.as_ref());
        let changing = changing.map(|change| change.deadline.saturating_duration_since(now));
        let retry = self.slots.values().any(|slot| slot.gone.is_some()).then_some(RETRY);
        let closing = self.closer.due().filter(|_| self.ending.is_none());
        let ending = self.ending.map(|since| END_TIME.saturating_sub(since.elapsed()));
        let lonely = self.lingers_for().filter(|_| self.ending.is_none());
        let mute = self.greets_within().filter(|_| self.ending.is_none());
        let leave = self.leaves_within().filter(|_| self.ending.is_none());
        let trying = match &self.launcher.machines.kvm {
            Kvm::Trying(attempt) => Some(attempt.deadline.saturating_duration_since(now)),
            Kvm::Untried | Kvm::Known(_) => None,
        };
        let importing = self.launcher.store.due().filter(|_| self.ending.is_none());
        let rest = self.door.as_ref().and_then(|door| door.rests_until);
        let rest = rest.map(|until| until.saturating_duration_since(now));
        let spares = self.launcher.spares.due().filter(|_| self.ending.is_none() && !self.launching());
        let spares = spares.into_iter().chain(self.launcher.spares.deadlines(RETRY));
        let spares = spares.map(|at| at.saturating_duration_since(now));
        let next = starting
            .chain(changing)
            .chain(retry)
            .chain(spares)
            .chain(ending)
            .chain(closing)
            .chain(lonely)
            .chain(mute)
            .chain(leave)
            .chain(rest)
            .chain(importing)
            .chain(trying)
            .min()?;
        // Rounded up, so that a deadline has passed when the wait ends.
        let next = next + Duration::from_millis(1);
        Some(Timespec { tv_sec: next.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: next.subsec_nanos().into() })
    }

    fn read_signals(&mut self) {
        // Struct signalfd_siginfo is 128 bytes and begins with the signal's number.
        let mut info = [0; 128];
        while rustix::io::read(&self.signals, &mut info) == Ok(128) {
            let number = u32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
            if number == libc::SIGCHLD.unsigned_abs() {
                self.reap_strangers();
            } else {
                self.end();
            }
        }
    }

    /// Reaps what is not one of the launches: the launcher is a subreaper, so orphans of its children become its own.
    /// Its inits are reaped by their own events.
    fn reap_strangers(&self) {
        let own = std::process::id();
        let children = std::fs::read_to_string(format!("/proc/self/task/{own}/children")).unwrap_or_default();
        for pid in children.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            let of = |slot: &Slot| {
                slot.running.init_pid == pid || slot.change.as_ref().is_some_and(|change| change.pid == pid)
            };
            let of_launcher = self.launcher.store.is_child(pid)
                || self.launcher.uids.is_child(pid)
                || self.launcher.machines.is_child(pid);
            let known = self.closer.is_child(pid) || of_launcher || self.slots.values().any(of);
            if let Some(pid) = Pid::from_raw(pid).filter(|_| !known) {
                let _ = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
            }
        }
    }

    /// How long the launcher still waits for a supervisor; `None` when there is one, or it waits for ever.
    fn lingers_for(&self) -> Option<Duration> {
        let alone = self.alone.filter(|_| self.connection.is_none())?;
        let linger = match self.door.as_ref()?.linger {
            Linger::For(time) if self.connections == 0 => time.max(FIRST_TIME),
            Linger::For(time) => time,
            Linger::Forever => return None,
        };
        Some(linger.saturating_sub(alone.elapsed()))
    }

    /// Ends when no supervisor came in time.
    fn lonely(&mut self) {
        if self.lingers_for().is_some_and(|left| left.is_zero()) {
            self.end();
        }
    }

    /// Kills every plugin; the loop ends when they are gone. Nothing is kept for a supervisor that might come back.
    fn end(&mut self) {
        if self.ending.is_some() {
            return;
        }
        self.ending = Some(Instant::now());
        self.closer.kill();
        self.launcher.store.kill();
        self.launcher.uids.kill();
        if let Kvm::Trying(attempt) = &self.launcher.machines.kvm {
            attempt.kill();
        }
        for slot in self.slots.values() {
            slot.running.kill();
        }
        self.launcher.spares.end();
    }

    /// Ends because of this.
    fn fail(&mut self, error: io::Error) {
        // A closer that the end itself killed is no failure.
        if self.ending.is_none() {
            self.failed = Some(error);
            self.end();
        }
    }

    /// Looks for what machines are made of, and waits for what that takes in the loop.
    fn look_for_machines(&mut self) {
        self.launcher.look_for_machines();
        if let Kvm::Trying(attempt) = &self.launcher.machines.kvm {
            let data = epoll::EventData::new_u64(Source::Kvm.token());
            // Watched already, or seen by its deadline.
            let _ = epoll::add(&self.epoll, &attempt.pidfd, data, epoll::EventFlags::IN);
        }
    }

    /// It is known what makes machines, or may be.
    fn tried(&mut self) {
        if let Some(pidfd) = self.launcher.machines.kvm.look(Instant::now()) {
            let _ = epoll::delete(&self.epoll, &pidfd);
        }
    }

    /// Whether a child is being set up.
    fn launching(&self) -> bool {
        self.slots.values().any(|slot| matches!(slot.phase, Phase::Starting { .. }))
    }

    /// Makes a spare when one is missing and nothing else is to be done: after a turn without an event, which waited a
    /// moment for one, or when there has been none for long.
    fn make_spare(&mut self, quiet: bool) -> io::Result<()> {
        self.launcher.spares.tidy();
        let now = Instant::now();
        let due = |at: Instant| at <= now && (quiet || at + PATIENCE <= now);
        if !self.launcher.spares.due().is_some_and(due) || self.ending.is_some() || self.launching() {
            return Ok(());
        }
        if let Some((number, line)) = self.launcher.make_spare() {
            let data = epoll::EventData::new_u64(Source::Spare(number).token());
            epoll::add(&self.epoll, line, data, epoll::EventFlags::IN)?;
        }
        Ok(())
    }

    /// Has what came from the supervisor closed.
    fn close_received(&mut self) -> io::Result<()> {
        // A launcher that was stopped, or stood still with its machine, sees the time before it sees what ended meanwhile.
        if self.closer.check().is_err() {
            self.handle(Source::Closer);
        }
        if let Err(error) = self.closer.check() {
            self.fail(error);
        }
        if self.ending.is_some() {
            return Ok(());
        }
        let launching = self.launching();
        if let Some(child) = self.closer.start(launching) {
            let data = epoll::EventData::new_u64(Source::Closer.token());
            epoll::add(&self.epoll, child, data, epoll::EventFlags::IN)?;
        }
        Ok(())
    }
}
