//! Between two supervisors: what is kept when one goes, and how the next one gets it.
//!
//! ```text
//!              supervisor attached             none
//! output       it reads the pipes      ──▶     drained into rings
//! exits        told, and kept          ──▶     kept                 until acknowledged
//! launches     starting, up            ──▶     starting ones are killed: nobody knows them; the others run on
//! next one     List, then Reattach for each launch, then Acknowledge
//! ```
//!
//! Bounds: a ring of [`output::ROOM`] for each stream, as many ends as plugins may run; the oldest are forgotten and
//! counted.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use plugvisor_sandbox::protocol::{
    Condition, Control, ControlState, Exit, Grant, Known, LIST_PAGE, Launch, LaunchId, Launched, Level, Limits, Listed,
    MAX_DESCRIPTORS, Over, ReattachState, Reattached, Refusal, RefusalCode, Reply, Tier, environment_digest,
};
use rustix::event::epoll;

use super::{
    Phase, Server, Slot, Source,
    requests::{no_launch, refused, unknown},
};
use crate::{
    launch::Running,
    output::{self, Drained, Output},
    readback,
    timing::Part,
};

/// One of a launch's two streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    const BOTH: [Self; 2] = [Self::Stdout, Self::Stderr];
}

/// What was asked for, as far as the next supervisor is told.
#[derive(Clone, Debug)]
pub(super) struct Origin {
    plugin: String,
    generation: u64,
    level: Level,
    bundle: [u8; 32],
    pub(super) limits: Limits,
    grants: Vec<Grant>,
    inward: u16,
    environment: [u8; 32],
    allow_degraded: Vec<Control>,
    tier: Tier,
    arrived: Instant,
    /// From the request to the exec.
    launch_exec: Duration,
}

impl Origin {
    pub(super) fn of(request: &Launch, arrived: Instant) -> Self {
        Self {
            plugin: request.plugin.clone(),
            generation: request.generation,
            level: request.level,
            bundle: request.bundle,
            limits: request.limits.clone(),
            grants: request.grants.clone(),
            inward: request.inward,
            environment: environment_digest(&request.environment),
            allow_degraded: request.allow_degraded.clone(),
            tier: request.tier,
            arrived,
            launch_exec: Duration::ZERO,
        }
    }

    fn known(&self, launch: LaunchId, condition: Condition) -> Known {
        Known {
            launch,
            plugin: self.plugin.clone(),
            generation: self.generation,
            level: self.level,
            tier: self.tier,
            bundle: self.bundle,
            limits: self.limits.clone(),
            grants: self.grants.clone(),
            inward: self.inward,
            environment: self.environment,
            allow_degraded: self.allow_degraded.clone(),
            age_nanos: nanos(self.arrived.elapsed()),
            condition,
        }
    }
}

/// What the launcher holds of a launch for its supervisor.
pub(super) struct Ends {
    broker: OwnedFd,
    worker: OwnedFd,
    /// When egress was granted.
    egress: Option<OwnedFd>,
    /// By which it is connected to.
    inward: Vec<OwnedFd>,
    streams: Streams,
}

/// The output of a launch.
pub(super) struct Streams {
    stdout: Output,
    stderr: Output,
    /// A supervisor reads the pipes.
    attended: bool,
}

impl Streams {
    fn get(&mut self, stream: Stream) -> &mut Output {
        match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        }
    }
}

/// A launch that is over.
pub(super) struct Past {
    origin: Origin,
    exit: Exit,
    oom_killed: bool,
    ended: Instant,
    streams: Option<Streams>,
}

impl Past {
    fn over(&self) -> Over {
        Over { exit: self.exit, oom_killed: self.oom_killed, ago_nanos: nanos(self.ended.elapsed()) }
    }
}

impl Slot {
    /// How it ended, when it was up and its init is gone.
    fn over(&self) -> Option<Over> {
        let gone = self.gone.filter(|_| matches!(self.phase, Phase::Up))?;
        let exit = self.running.ended.unwrap_or(Exit::Signal(libc::SIGKILL));
        Some(Over { exit, oom_killed: self.running.oom, ago_nanos: nanos(gone.elapsed()) })
    }
}

impl Server {
    /// What a launch that is now up gives to its supervisor; the launcher keeps what the next one will need.
    pub(super) fn come_up(
        &mut self,
        id: u64,
        controls: Vec<ControlState>,
    ) -> Result<(Launched, Vec<OwnedFd>), Refusal> {
        let gone = |message: &str| Refusal { code: RefusalCode::Exhausted, message: message.to_owned() };
        let Some(slot) = self.slots.get_mut(&id) else { return Err(gone("the launch is gone")) };
        let running = &mut slot.running;
        slot.origin.launch_exec = running.arrived.elapsed();
        running.marks.done(Part::Executed);
        let exhausted = |error: std::io::Error| {
            let plugin = &running.plugin;
            gone(&format!(
                "{plugin} was not started: its output cannot be kept: {error}; raise the limit on open files"
            ))
        };
        let pidfd = running.program.as_ref().ok_or_else(|| gone("the launch has no process"))?;
        let [broker, worker, stdout, stderr] = running.ends.as_slice() else {
            return Err(gone("the launch has no descriptors"));
        };
        let streams = Streams {
            stdout: Output::of(stdout.as_fd(), output::ROOM).map_err(exhausted)?,
            stderr: Output::of(stderr.as_fd(), output::ROOM).map_err(exhausted)?,
            attended: true,
        };
        let copy = |fd: &OwnedFd| fd.try_clone().map_err(exhausted);
        let mut descriptors = vec![copy(pidfd)?, copy(broker)?, copy(worker)?];
        if running.egress.is_some() != slot.origin.grants.contains(&Grant::Egress) {
            return Err(gone("the launch has no socket for its egress proxy"));
        }
        if running.inward.len() != usize::from(slot.origin.inward) {
            return Err(gone("the launch has not all of the sockets that connect to it"));
        }
        let egress = running.egress.as_ref().map(copy).transpose()?;
        let mut ends = running.ends.drain(..);
        let (Some(broker), Some(worker)) = (ends.next(), ends.next()) else {
            return Err(gone("the launch has no descriptors"));
        };
        descriptors.extend(ends);
        descriptors.extend(egress);
        slot.ends = Some(Ends {
            broker,
            worker,
            egress: running.egress.take(),
            inward: std::mem::take(&mut running.inward),
            streams,
        });
        slot.phase = Phase::Up;
        let launched = self.launched(id, controls).ok_or_else(|| gone("the launch is gone"))?;
        Ok((launched, descriptors))
    }

    /// A launch that is up, with its controls as they were read.
    fn launched(&self, id: u64, controls: Vec<ControlState>) -> Option<Launched> {
        let Slot { running, origin, .. } = self.slots.get(&id)?;
        Some(Launched {
            launch: running.id,
            pid: pid(running),
            uid: running.identity.uid(),
            controls,
            directories: readback::directories(&self.launcher, running),
            cgroups: running.groups.directories(),
            launch_exec_nanos: nanos(origin.launch_exec),
            parts: running.marks.since(running.began),
        })
    }

    // When a supervisor goes.

    /// Keeps what the next supervisor needs. Launches that nobody was told of end.
    pub(super) fn detach(&mut self) {
        for slot in self.slots.values_mut() {
            match slot.phase {
                Phase::Starting { .. } => {
                    slot.running.kill();
                    slot.phase = Phase::Abandoned;
                }
                Phase::Refusing { .. } => slot.phase = Phase::Abandoned,
                Phase::Up | Phase::Abandoned => {}
            }
        }
        let up = self.slots.iter_mut().filter_map(|(id, slot)| Some((*id, &mut slot.ends.as_mut()?.streams)));
        let past = self.past.iter_mut().filter_map(|(id, past)| Some((*id, past.streams.as_mut()?)));
        for (id, streams) in up.chain(past).filter(|(_, streams)| streams.attended) {
            streams.attended = false;
            for stream in Stream::BOTH {
                let output = streams.get(stream);
                if let Some(fd) = output.as_fd().filter(|_| !output.ended()) {
                    let data = epoll::EventData::new_u64(Source::Output(id, stream).token());
                    // Without room in the kernel's table of events this stream is read when it is handed over.
                    let _ = epoll::add(&self.epoll, fd, data, epoll::EventFlags::IN);
                }
            }
        }
    }

    fn streams(&mut self, id: u64) -> Option<&mut Streams> {
        streams_of(&mut self.slots, &mut self.past, id)
    }

    /// Drains a stream that no supervisor reads.
    pub(super) fn drain(&mut self, id: u64, stream: Stream) {
        let Some(streams) = self.streams(id).filter(|streams| !streams.attended) else { return };
        let output = streams.get(stream);
        if output.drain() == Drained::Ended {
            self.unwatch(id, stream);
        }
    }

    fn unwatch(&mut self, id: u64, stream: Stream) {
        let streams = streams_of(&mut self.slots, &mut self.past, id);
        if let Some(fd) = streams.and_then(|streams| streams.get(stream).as_fd()) {
            let _ = epoll::delete(&self.epoll, fd);
        }
    }

    /// Keeps a launch that is over until a supervisor acknowledges it. Where no other one can come, nothing is kept.
    pub(super) fn keep(&mut self, id: u64, slot: Slot) {
        let Some(over) = slot.over() else { return };
        let Slot { origin, ends, gone, .. } = slot;
        let mut streams = None;
        if let Some(Ends { broker, worker, egress, inward, streams: mut last }) = ends {
            // The backlog of the broker's socket may hold connections with anything in them.
            self.closer.take([broker, worker].into_iter().chain(egress).chain(inward).collect());
            if last.attended {
                last.stdout.close_if_over();
                last.stderr.close_if_over();
            }
            streams = Some(last);
        }
        if self.door.is_none() {
            return;
        }
        let ended = gone.unwrap_or_else(Instant::now);
        self.past.insert(id, Past { origin, exit: over.exit, oom_killed: over.oom_killed, ended, streams });
        let most = usize::try_from(self.launcher.options.max_plugins).unwrap_or(usize::MAX);
        while self.past.len() > most
            && let Some(oldest) = self.past.keys().next().copied()
        {
            self.forget(oldest);
            self.forgotten += 1;
        }
    }

    fn forget(&mut self, id: u64) {
        for stream in Stream::BOTH {
            self.unwatch(id, stream);
        }
        self.past.remove(&id);
    }

    // When the next one comes.

    pub(super) fn list(&self, after: LaunchId) -> Reply {
        let above = after.0.saturating_add(1)..;
        let up = self.slots.range(above.clone()).filter_map(|(id, slot)| {
            let condition = match (&slot.phase, slot.over()) {
                (_, Some(over)) => Condition::Over(over),
                (Phase::Up, None) => Condition::Up {
                    pid: pid(&slot.running),
                    uid: slot.running.identity.uid(),
                    frozen: slot.running.groups.is_freezing(),
                },
                (Phase::Starting { .. } | Phase::Refusing { .. } | Phase::Abandoned, None) => return None,
            };
            Some(slot.origin.known(LaunchId(*id), condition))
        });
        let up: Vec<Known> = up.take(LIST_PAGE + 1).collect();
        let past = self.past.range(above).take(LIST_PAGE + 1);
        let past = past.map(|(id, past)| past.origin.known(LaunchId(*id), Condition::Over(past.over())));
        let mut launches: Vec<Known> = up.into_iter().chain(past).collect();
        launches.sort_by_key(|known| known.launch);
        let more = launches.len() > LIST_PAGE;
        launches.truncate(LIST_PAGE);
        Reply::Listed(Listed {
            launches,
            more,
            held: self.held.names(),
            ends_forgotten: self.forgotten,
            unattended_nanos: self.unattended.map(nanos),
        })
    }

    pub(super) fn reattach(&mut self, launch: LaunchId) -> Result<(Reply, Vec<OwnedFd>), Refusal> {
        let id = launch.0;
        let exhausted = |error: std::io::Error| {
            let message = format!("launch {id} cannot be handed over: {error}; raise the limit on open files");
            Refusal { code: RefusalCode::Exhausted, message }
        };
        let over = self.slots.get(&id).map_or_else(|| self.past.get(&id).map(Past::over), Slot::over);
        let up = self.slots.get(&id).is_some_and(|slot| matches!(slot.phase, Phase::Up) && slot.gone.is_none());
        let mut ends = Vec::new();
        let state = match over {
            Some(over) => {
                // Its writers are gone; what is left in the pipes is bounded by their size.
                let unattended = self.streams(id).filter(|streams| !streams.attended);
                for output in unattended.into_iter().flat_map(|streams| [&mut streams.stdout, &mut streams.stderr]) {
                    while output.drain() == Drained::Some {}
                }
                ReattachState::Over(over)
            }
            None if up => {
                let slot = self.slots.get(&id).ok_or_else(|| no_launch(launch))?;
                // Whether it may be kept is for the supervisor, which knows what the operator allows now.
                let controls = readback::read(&self.launcher, &slot.running);
                let launched = self.launched(id, controls).ok_or_else(|| no_launch(launch))?;
                let Some(Slot { running: Running { program: Some(pidfd), .. }, ends: Some(held), .. }) =
                    self.slots.get(&id)
                else {
                    return Err(no_launch(launch));
                };
                for fd in [pidfd, &held.broker, &held.worker] {
                    ends.push(fd.try_clone().map_err(exhausted)?);
                }
                ends.push(held.streams.stdout.reading_end().map_err(exhausted)?);
                ends.push(held.streams.stderr.reading_end().map_err(exhausted)?);
                ends.extend(held.egress.as_ref().map(OwnedFd::try_clone).transpose().map_err(exhausted)?);
                ReattachState::Up(launched)
            }
            None => return Err(no_launch(launch)),
        };
        let (mut kept, mut files) = (Vec::new(), Vec::new());
        for stream in Stream::BOTH {
            let output = self.streams(id).map(|streams| streams.get(stream));
            let Some(output) = output else { return Err(no_launch(launch)) };
            let (held, file) = output.kept().map_err(exhausted)?;
            kept.push(held);
            files.push(file);
        }
        if up {
            // Nothing can fail any more: from here on the supervisor reads the pipes.
            for stream in Stream::BOTH {
                self.unwatch(id, stream);
            }
            if let Some(streams) = self.streams(id) {
                streams.attended = true;
            }
        }
        files.append(&mut ends);
        Ok((Reply::Reattached(Reattached { state, stdout: kept[0], stderr: kept[1] }), files))
    }

    /// Some of the sockets by which a running launch is connected to.
    pub(super) fn inward(&self, launch: LaunchId, from: u16) -> Result<(Reply, Vec<OwnedFd>), Refusal> {
        let up = self.slots.get(&launch.0).filter(|slot| matches!(slot.phase, Phase::Up) && slot.gone.is_none());
        let ends = up.and_then(|slot| slot.ends.as_ref()).ok_or_else(|| no_launch(launch))?;
        let some = ends.inward.iter().skip(usize::from(from)).take(MAX_DESCRIPTORS);
        let sockets = some.map(OwnedFd::try_clone).collect::<Result<Vec<_>, _>>().map_err(|error| {
            let message = format!(
                "the sockets that connect to launch {} cannot be handed over: {error}; raise the limit on open files",
                launch.0
            );
            Refusal { code: RefusalCode::Exhausted, message }
        })?;
        let all = u16::try_from(ends.inward.len()).unwrap_or(u16::MAX);
        Ok((Reply::Inward { all }, sockets))
    }

    pub(super) fn acknowledge(&mut self, launch: LaunchId) -> Reply {
        if self.past.contains_key(&launch.0) {
            self.forget(launch.0);
            return Reply::Done;
        }
        let up = self.slots.get_mut(&launch.0).filter(|slot| matches!(slot.phase, Phase::Up) && slot.gone.is_none());
        let Some(ends) = up.and_then(|slot| slot.ends.as_mut()) else { return unknown(launch) };
        if !ends.streams.attended {
            let why = format!("launch {} was not reattached: what was kept of it would be lost", launch.0);
            return refused(RefusalCode::Policy, &why);
        }
        ends.streams.stdout.forget();
        ends.streams.stderr.forget();
        Reply::Done
    }
}

fn streams_of<'a>(
    slots: &'a mut BTreeMap<u64, Slot>,
    past: &'a mut BTreeMap<u64, Past>,
    id: u64,
) -> Option<&'a mut Streams> {
    match slots.get_mut(&id) {
        Some(slot) => slot.ends.as_mut().map(|ends| &mut ends.streams),
        None => past.get_mut(&id)?.streams.as_mut(),
    }
}

fn pid(running: &Running) -> u32 {
    running.program_pid().and_then(|pid| pid.try_into().ok()).unwrap_or(0)
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
