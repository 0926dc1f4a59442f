//! The loop: requests, children, memory events, signals. One thread; nothing in it waits but the one call to epoll.
//!
//! Here is what is waited for, and the end. The supervisor's packets are in `connection`, what they ask in `requests`,
//! what becomes of a launch in `launches`.

mod connection;
mod launches;
mod requests;

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use plugvisor_sandbox::{protocol::Refusal, seqpacket::Seqpacket};
use rustix::{
    event::{Timespec, epoll},
    io::Errno,
    process::{Pid, WaitId, WaitIdOptions, waitid},
};

use crate::{
    closer::Closer,
    launch::{Launcher, Running},
};

/// How long the launcher waits for killed plugins when it ends.
const END_TIME: Duration = Duration::from_secs(5);
/// How often it looks again whether the kernel has let go of a group.
const RETRY: Duration = Duration::from_millis(2);

/// What a descriptor in the epoll set stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Supervisor,
    Signals,
    Closer,
    Init(u64),
    Report(u64),
    Exec(u64),
    Memory(u64),
}

impl Source {
    const fn token(self) -> u64 {
        match self {
            Self::Supervisor => 0,
            Self::Signals => 1,
            Self::Closer => 6,
            Self::Init(id) => id << 3 | 2,
            Self::Report(id) => id << 3 | 3,
            Self::Exec(id) => id << 3 | 4,
            Self::Memory(id) => id << 3 | 5,
        }
    }

    const fn of(token: u64) -> Option<Self> {
        match (token & 7, token >> 3) {
            (0, _) => Some(Self::Supervisor),
            (1, _) => Some(Self::Signals),
            (6, _) => Some(Self::Closer),
            (2, id) => Some(Self::Init(id)),
            (3, id) => Some(Self::Report(id)),
            (4, id) => Some(Self::Exec(id)),
            (5, id) => Some(Self::Memory(id)),
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
}

struct Slot {
    running: Running,
    phase: Phase,
    /// The init was reaped.
    gone: bool,
}

/// The loop's state.
pub(crate) struct Server {
    launcher: Launcher,
    connection: Seqpacket,
    signals: OwnedFd,
    closer: Closer,
    epoll: OwnedFd,
    slots: BTreeMap<u64, Slot>,
    queue: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    greeted: bool,
    interest: epoll::EventFlags,
    /// The supervisor is gone or the launcher was told to end, since then.
    ending: Option<Instant>,
    /// Why the launcher ended the connection itself.
    failed: Option<io::Error>,
}

impl Server {
    pub(crate) fn new(launcher: Launcher, connection: Seqpacket, signals: OwnedFd, closer: Closer) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let interest = epoll::EventFlags::IN;
        epoll::add(&epoll, &connection, epoll::EventData::new_u64(Source::Supervisor.token()), interest)?;
        let data = epoll::EventData::new_u64(Source::Signals.token());
        epoll::add(&epoll, &signals, data, epoll::EventFlags::IN)?;
        Ok(Self {
            launcher,
            connection,
            signals,
            closer,
            epoll,
            slots: BTreeMap::new(),
            queue: VecDeque::new(),
            greeted: false,
            interest,
            ending: None,
            failed: None,
        })
    }

    /// Runs until the supervisor is gone, or a signal ends the launcher, and no plugin is left. An error when the launcher
    /// had to end by itself.
    pub(crate) fn run(&mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(64);
        loop {
            if let Some(since) = self.ending
                && (self.slots.is_empty() || since.elapsed() > END_TIME)
            {
                self.launcher.cgroups.tear_down();
                return self.failed.take().map_or(Ok(()), Err);
            }
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), self.timeout().as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in events.drain(..) {
                let flags = event.flags;
                if let Some(source) = Source::of(event.data.u64()) {
                    if source == Source::Supervisor && flags.contains(epoll::EventFlags::HUP) && !self.closer.has_room()
                    {
                        // Nothing is read now that would tell of it.
                        self.end();
                    }
                    self.handle(source)?;
                }
            }
            self.overdue();
            self.finish_gone();
            self.flush();
            self.close_received()?;
            self.watch_connection()?;
        }
    }

    /// Ends the connection without closing it: a closer that hangs holds the descriptor table for as long as it does.
    pub(crate) fn hang_up(&self) {
        let _ = rustix::net::shutdown(&self.connection, rustix::net::Shutdown::Both);
    }

    fn handle(&mut self, source: Source) -> io::Result<()> {
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
        }
        Ok(())
    }

    /// The nearest time at which something must be looked at without an event.
    fn timeout(&self) -> Option<Timespec> {
        let now = Instant::now();
        let starting = self.slots.values().filter_map(|slot| match slot.phase {
            Phase::Starting { deadline, .. } => Some(deadline.saturating_duration_since(now)),
            Phase::Up | Phase::Refusing { .. } => None,
        });
        let retry = self.slots.values().any(|slot| slot.gone).then_some(RETRY);
        let closing = self.closer.due().filter(|_| self.ending.is_none());
        let ending = self.ending.map(|since| END_TIME.saturating_sub(since.elapsed()));
        let next = starting.chain(retry).chain(ending).chain(closing).min()?;
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
            let known = self.closer.is_child(pid) || self.slots.values().any(|slot| slot.running.init_pid == pid);
            if let Some(pid) = Pid::from_raw(pid).filter(|_| !known) {
                let _ = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
            }
        }
    }

    /// Kills every plugin; the loop ends when they are gone. Nothing is kept for a supervisor that might come back.
    fn end(&mut self) {
        if self.ending.is_some() {
            return;
        }
        self.ending = Some(Instant::now());
        self.closer.kill();
        for slot in self.slots.values() {
            slot.running.kill();
        }
    }

    /// Ends because of this.
    fn fail(&mut self, error: io::Error) {
        // A closer that the end itself killed is no failure.
        if self.ending.is_none() {
            self.failed = Some(error);
            self.end();
        }
    }

    /// Has what came from the supervisor closed.
    fn close_received(&mut self) -> io::Result<()> {
        if let Err(error) = self.closer.check() {
            self.fail(error);
        }
        if self.ending.is_some() {
            return Ok(());
        }
        let launching = self.slots.values().any(|slot| matches!(slot.phase, Phase::Starting { .. }));
        if let Some(child) = self.closer.start(launching) {
            let data = epoll::EventData::new_u64(Source::Closer.token());
            epoll::add(&self.epoll, child, data, epoll::EventFlags::IN)?;
        }
        Ok(())
    }
}
