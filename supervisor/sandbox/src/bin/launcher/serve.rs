//! The loop: requests, children, memory events, signals. One thread; nothing in it waits but the one call to epoll.
//!
//! Bounds: at most `max_plugins` launches; replies wait in a queue of [`MAX_QUEUED`], and while it is full no request is
//! read, so a flood of them is held in the socket; notices are bounded by the launches.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use plugvisor_sandbox::{
    codec::{self, DecodeError},
    protocol::{Exit, Launch, LaunchId, Launched, Notice, Refusal, RefusalCode, Reply, Request, VERSION},
    seqpacket::{Packet, Received, Seqpacket},
};
use rustix::{
    event::{Timespec, epoll},
    io::Errno,
    process::{Pid, Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid},
};

use crate::{
    check::{self, refuse},
    closer::Closer,
    launch::{Launcher, Running, SETUP_TIME, remove_sockets},
    readback,
};

const MAX_QUEUED: usize = 64;
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

    // Requests.

    fn read_requests(&mut self) {
        while self.ending.is_none() && self.queue.len() < MAX_QUEUED && self.closer.has_room() {
            match self.closer.receive(&self.connection) {
                Ok(Received::Packet(packet)) => self.packet(packet),
                Ok(Received::Truncated(descriptors)) => {
                    self.closer.take(descriptors);
                    self.reply(
                        0,
                        &refused(RefusalCode::Malformed, "a packet was too long or carried too many descriptors"),
                        vec![],
                    );
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Received::Closed) | Err(_) => self.end(),
            }
        }
    }

    fn packet(&mut self, packet: Packet) {
        let arrived = Instant::now();
        match codec::decode_request(&packet.bytes) {
            Ok((id, request)) => {
                let reply = self.request(id, request, &packet.descriptors, arrived);
                self.closer.take(packet.descriptors);
                if let Some(reply) = reply {
                    self.reply(id, &reply, vec![]);
                }
            }
            Err(error) => {
                let code = match error {
                    DecodeError::Version { .. } => RefusalCode::Version,
                    DecodeError::Short { .. }
                    | DecodeError::Long { .. }
                    | DecodeError::Kind { .. }
                    | DecodeError::Body { .. } => RefusalCode::Malformed,
                };
                self.closer.take(packet.descriptors);
                self.reply(error.id(), &refused(code, &error.to_string()), vec![]);
            }
        }
    }

    /// Answers a request; `None` when the answer comes later.
    fn request(&mut self, id: u64, request: Request, descriptors: &[OwnedFd], arrived: Instant) -> Option<Reply> {
        if !matches!(request, Request::Launch(_)) && !descriptors.is_empty() {
            return Some(refused(RefusalCode::Policy, "only a launch carries descriptors"));
        }
        if !self.greeted && !matches!(request, Request::Hello(_)) {
            return Some(refused(RefusalCode::Policy, "Hello must come first"));
        }
        Some(match request {
            Request::Hello(hello) if hello.version == VERSION => {
                self.greeted = true;
                Reply::Hello { version: VERSION, pid: std::process::id() }
            }
            Request::Hello(hello) => refused(
                RefusalCode::Version,
                &format!(
                    "the launcher speaks protocol version {VERSION}, not {}; install one release of both",
                    hello.version
                ),
            ),
            Request::Probe => Reply::Probe(self.launcher.probed()),
            Request::Launch(launch) => match self.launch(id, &launch, descriptors, arrived) {
                Ok(()) => return None,
                Err(refusal) => Reply::Refused(refusal),
            },
            Request::Signal { launch, signal } => self.signal(launch, signal),
            Request::Kill { launch } => self.with_up(launch, |running| {
                running.kill();
                Reply::Done
            }),
            Request::Inspect { launch } => match self.slots.get(&launch.0) {
                Some(Slot { running, phase: Phase::Up, gone: false }) => {
                    Reply::Inspected(readback::read(&self.launcher, running))
                }
                _ => unknown(launch),
            },
            Request::Freeze { .. }
            | Request::Thaw { .. }
            | Request::Limits { .. }
            | Request::Stats { .. }
            | Request::List { .. }
            | Request::HoldFd { .. }
            | Request::TakeFd { .. }
            | Request::Reattach { .. }
            | Request::Acknowledge { .. } => refused(RefusalCode::Malformed, "this launcher does not do that yet"),
        })
    }

    fn launch(&mut self, id: u64, request: &Launch, descriptors: &[OwnedFd], arrived: Instant) -> Result<(), Refusal> {
        let checked = check::launch(request, descriptors, &self.launcher.roots)?;
        if self.slots.len() >= usize::try_from(self.launcher.options.max_plugins).unwrap_or(usize::MAX) {
            return refuse(
                RefusalCode::Exhausted,
                format!(
                    "{} was not started: {} plugins run already, the most that --max-plugins allows",
                    checked.plugin, self.launcher.options.max_plugins
                ),
            );
        }
        self.launcher.require(request)?;
        let running = self.launcher.start(request, &checked, arrived)?;
        let number = running.id.0;
        let slot =
            Slot { running, phase: Phase::Starting { request: id, deadline: arrived + SETUP_TIME }, gone: false };
        let watched = self.watch(number, &slot.running);
        self.slots.insert(number, slot);
        if let Err(error) = watched {
            self.give_up(number, Refusal { code: RefusalCode::Exhausted, message: format!("epoll: {error}") });
        }
        Ok(())
    }

    fn watch(&self, id: u64, running: &Running) -> io::Result<()> {
        let add = |fd: BorrowedFd<'_>, source: Source, flags| {
            epoll::add(&self.epoll, fd, epoll::EventData::new_u64(source.token()), flags)
        };
        add(running.init.as_fd(), Source::Init(id), epoll::EventFlags::IN)?;
        add(running.report.as_fd(), Source::Report(id), epoll::EventFlags::IN)?;
        if let Some(exec) = &running.exec {
            add(exec.as_fd(), Source::Exec(id), epoll::EventFlags::IN)?;
        }
        if let Some(memory) = &running.memory {
            add(memory.as_fd(), Source::Memory(id), memory.interest())?;
        }
        Ok(())
    }

    fn signal(&self, launch: LaunchId, signal: i32) -> Reply {
        let allowed = [Signal::TERM, Signal::INT, Signal::HUP, Signal::USR1, Signal::USR2, Signal::KILL];
        let Some(signal) = allowed.into_iter().find(|allowed| allowed.as_raw() == signal) else {
            return refused(
                RefusalCode::Policy,
                &format!("signal {signal} may not be sent; TERM, INT, HUP, USR1, USR2 and KILL may"),
            );
        };
        self.with_up(launch, |running| match &running.program {
            Some(program) => match pidfd_send_signal(program, signal) {
                Ok(()) => Reply::Done,
                Err(_) => unknown(launch),
            },
            None => unknown(launch),
        })
    }

    fn with_up(&self, launch: LaunchId, act: impl FnOnce(&Running) -> Reply) -> Reply {
        match self.slots.get(&launch.0) {
            Some(Slot { running, phase: Phase::Up, gone: false }) => act(running),
            _ => unknown(launch),
        }
    }

    // Launches.

    /// Takes what the child said, and finishes the launch if that decided it.
    fn reported(&mut self, id: u64) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let was_open = !slot.running.report_closed;
        slot.running.drain(&mut self.launcher.sealed);
        if was_open && slot.running.report_closed {
            let _ = epoll::delete(&self.epoll, &slot.running.report);
        }
        let Phase::Starting { request, .. } = slot.phase else { return };
        let running = &mut slot.running;
        if let Some(failure) = running.failure {
            let refusal = failure.step.refusal(&running.plugin, failure.errno);
            self.give_up(id, refusal);
        } else if running.exec.is_none() && running.executing && running.program.is_some() {
            let nanos = u64::try_from(running.arrived.elapsed().as_nanos()).unwrap_or(u64::MAX);
            let launched = Launched {
                launch: running.id,
                pid: running.program_pid().and_then(|pid| pid.try_into().ok()).unwrap_or(0),
                uid: running.identity.uid(),
                controls: readback::read(&self.launcher, running),
                cgroups: running.groups.directories(),
                launch_exec_nanos: nanos,
            };
            let pidfd = running.program.as_ref().and_then(|program| program.try_clone().ok());
            let ends: Vec<OwnedFd> = pidfd.into_iter().chain(running.ends.drain(..)).collect();
            slot.phase = Phase::Up;
            self.reply(request, &Reply::Launched(launched), ends);
        }
    }

    /// Kills a launch that has not succeeded; the refusal is sent when nothing is left of it.
    fn give_up(&mut self, id: u64, refusal: Refusal) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        if let Phase::Starting { request, .. } = slot.phase {
            slot.running.kill();
            slot.phase = Phase::Refusing { request, refusal };
        }
    }

    fn overdue(&mut self) {
        let now = Instant::now();
        let late: Vec<u64> = self
            .slots
            .iter()
            .filter(|(_, slot)| matches!(slot.phase, Phase::Starting { deadline, .. } if deadline <= now))
            .map(|(id, _)| *id)
            .collect();
        for id in late {
            let message = format!("it was not set up within {} s; a filesystem may hang", SETUP_TIME.as_secs());
            self.give_up(id, Refusal { code: RefusalCode::Kernel, message });
        }
    }

    fn memory_event(&mut self, id: u64) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let ran_out = slot.running.memory.as_ref().is_some_and(crate::cgroup::MemoryWatch::ran_out);
        if !ran_out || slot.running.oom {
            return;
        }
        slot.running.oom = true;
        slot.running.kill();
        if matches!(slot.phase, Phase::Up) {
            let launch = slot.running.id;
            self.notice(&Notice::OutOfMemory { launch });
        }
    }

    fn init_ended(&mut self, id: u64) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        if let Ok(None) = waitid(WaitId::PidFd(slot.running.init.as_fd()), options) {
            return;
        }
        let _ = epoll::delete(&self.epoll, &slot.running.init);
        slot.gone = true;
        // The last words: how the program ended, or why it never started. Nobody is left to hold the pipe open, though
        // its own event may come later: a program can be executed and end before the launcher looks once.
        slot.running.exec = None;
        self.reported(id);
        let gone = Refusal {
            code: RefusalCode::Kernel,
            message: "its process was killed while it was being set up; its memory limit may be too small".to_owned(),
        };
        self.give_up(id, gone);
    }

    /// Cleans up after launches whose processes are all gone, and says so.
    fn finish_gone(&mut self) {
        let gone: Vec<u64> = self.slots.iter().filter(|(_, slot)| slot.gone).map(|(id, _)| *id).collect();
        for id in gone {
            // The end may have been seen before its cause.
            self.memory_event(id);
            let Some(slot) = self.slots.get_mut(&id) else { continue };
            if let Some(memory) = slot.running.memory.take() {
                let _ = epoll::delete(&self.epoll, memory.as_fd());
            }
            // A process that has been reaped may hold its group for a moment longer.
            if !slot.running.groups.remove() {
                continue;
            }
            let Some(slot) = self.slots.remove(&id) else { continue };
            remove_sockets(slot.running.id);
            match slot.phase {
                Phase::Up => {
                    let exit = slot.running.ended.unwrap_or(Exit::Signal(libc::SIGKILL));
                    self.notice(&Notice::Exited { launch: slot.running.id, exit, oom_killed: slot.running.oom });
                }
                Phase::Refusing { request, refusal } => self.reply(request, &Reply::Refused(refusal), vec![]),
                Phase::Starting { .. } => {}
            }
        }
    }

    // The end.

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

    // Answers.

    fn reply(&mut self, id: u64, reply: &Reply, descriptors: Vec<OwnedFd>) {
        let packet = codec::encode_reply(id, reply).or_else(|error| {
            codec::encode_reply(id, &refused(RefusalCode::Kernel, &format!("the answer cannot be sent: {error}")))
        });
        if let Ok(packet) = packet {
            self.queue.push_back((packet, descriptors));
        }
    }

    fn notice(&mut self, notice: &Notice) {
        if let Ok(packet) = codec::encode_notice(notice) {
            self.queue.push_back((packet, vec![]));
        }
    }

    fn flush(&mut self) {
        while self.ending.is_none()
            && let Some((packet, descriptors)) = self.queue.front()
        {
            let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
            match self.connection.try_send(packet, &borrowed) {
                Ok(()) => {
                    if let Some((_, descriptors)) = self.queue.pop_front() {
                        self.closer.take(descriptors);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.end(),
            }
        }
    }

    /// Asks epoll for room when something waits to be sent, and for requests only when there is room for an answer.
    fn watch_connection(&mut self) -> io::Result<()> {
        let mut interest = epoll::EventFlags::empty();
        if !self.queue.is_empty() {
            interest |= epoll::EventFlags::OUT;
        }
        if self.queue.len() < MAX_QUEUED && self.closer.has_room() {
            interest |= epoll::EventFlags::IN;
        }
        if self.ending.is_some() {
            interest = epoll::EventFlags::empty();
            if self.interest != interest {
                // A closed connection is always ready; it must not spin the loop.
                let _ = epoll::delete(&self.epoll, &self.connection);
                self.interest = interest;
            }
        } else if interest != self.interest {
            let data = epoll::EventData::new_u64(Source::Supervisor.token());
            epoll::modify(&self.epoll, &self.connection, data, interest)?;
            self.interest = interest;
        }
        Ok(())
    }
}

fn refused(code: RefusalCode, message: &str) -> Reply {
    Reply::Refused(Refusal { code, message: message.to_owned() })
}

fn unknown(launch: LaunchId) -> Reply {
    refused(RefusalCode::UnknownLaunch, &format!("launch {} is unknown or over", launch.0))
}
