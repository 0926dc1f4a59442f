//! The requests: what each does, once it is one.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::Instant,
};

use plugvisor_sandbox::{
    options::Linger,
    protocol::{Import, Launch, LaunchId, Refusal, RefusalCode, Reply, Request, VERSION},
};
use rustix::process::{Signal, pidfd_send_signal};

use super::{Phase, Server, Slot, attach::Origin};
use crate::{
    admit::Admitted,
    check::{self, refuse},
    child::Entry,
    launch::{Program, Running, SETUP_TIME},
    level::Kernel,
    readback,
};

impl Server {
    /// Answers a request; `None` when the answer comes later.
    pub(super) fn request(
        &mut self,
        id: u64,
        request: Request,
        descriptors: &[OwnedFd],
        arrived: Instant,
    ) -> Option<Reply> {
        let carries = matches!(request, Request::Import(Import::Files(_)) | Request::HoldFd { .. });
        if !carries && !descriptors.is_empty() {
            return Some(refused(RefusalCode::Policy, "this request carries no descriptors"));
        }
        let greeted = self.connection.as_ref().is_some_and(|connection| connection.greeted);
        if !greeted && !matches!(request, Request::Hello(_)) {
            return Some(refused(RefusalCode::Policy, "Hello must come first"));
        }
        Some(match request {
            Request::Hello(hello) if hello.version == VERSION => {
                self.greeted();
                Reply::Hello { version: VERSION, pid: std::process::id() }
            }
            Request::Hello(hello) => refused(
                RefusalCode::Version,
                &format!(
                    "the launcher speaks protocol version {VERSION}, not {}; install one release of both",
                    hello.version
                ),
            ),
            Request::Probe => {
                self.look_for_machines();
                Reply::Probe(self.launcher.probed())
            }
            Request::Policy => Reply::Policy(self.launcher.policy.state()),
            Request::Launch(launch) => match self.launch(id, &launch, arrived) {
                Ok(()) => return None,
                Err(refusal) => Reply::Refused(refusal),
            },
            Request::Signal { launch, signal } => self.signal(launch, signal),
            Request::Kill { launch } => self.with_up(launch, |running| {
                running.kill();
                Reply::Done
            }),
            Request::Inspect { launch } => match self.slots.get(&launch.0) {
                Some(Slot { running, phase: Phase::Up, gone: None, .. }) => {
                    Reply::Inspected(readback::read(&self.launcher, running))
                }
                _ => unknown(launch),
            },
            Request::List { after } => self.list(after),
            Request::Reattach { launch } => match self.reattach(launch) {
                Ok((reply, descriptors)) => {
                    self.reply(id, &reply, descriptors);
                    return None;
                }
                Err(refusal) => Reply::Refused(refusal),
            },
            Request::Inward { launch, from } => match self.inward(launch, from) {
                Ok((reply, sockets)) => {
                    self.reply(id, &reply, sockets);
                    return None;
                }
                Err(refusal) => Reply::Refused(refusal),
            },
            Request::Acknowledge { launch } => self.acknowledge(launch),
            Request::End => match &mut self.connection {
                Some(_) if self.door.as_ref().is_some_and(|door| door.linger == Linger::Forever) => {
                    refused(RefusalCode::Policy, "this launcher is a service of its own; end it where it was started")
                }
                Some(connection) => {
                    connection.last = true;
                    Reply::Done
                }
                None => refused(RefusalCode::Policy, "Hello must come first"),
            },
            Request::HoldFd { name } => match self.held.hold(name, descriptors) {
                Ok(replaced) => {
                    self.closer.take(replaced.into_iter().collect());
                    Reply::Done
                }
                Err(refusal) => Reply::Refused(refusal),
            },
            Request::TakeFd { name, keep } => match self.held.take(&name, keep) {
                Ok(socket) => {
                    self.reply(id, &Reply::Taken, vec![socket]);
                    return None;
                }
                Err(refusal) => Reply::Refused(refusal),
            },
            Request::Freeze { launch } => done(self.freeze(launch, true)),
            Request::Thaw { launch } => done(self.freeze(launch, false)),
            Request::Limits { launch, limits } => match self.limit(id, launch, limits) {
                Ok(()) => return None,
                Err(refusal) => Reply::Refused(refusal),
            },
            Request::Stats { launch } => self.stats(launch).map_or_else(Reply::Refused, Reply::Stats),
            Request::Import(step) => return self.import(id, step, descriptors),
            Request::Forget { bundle } => self.forget_bundle(&bundle),
        })
    }

    pub(super) fn launch(&mut self, id: u64, request: &Launch, arrived: Instant) -> Result<(), Refusal> {
        let (plugin, mut walls) = check::launch(request, &self.launcher.options.without)?;
        if self.launcher.trace.is_some() {
            let Some(traced) = walls.traced() else {
                let level = request.level.as_str();
                return refuse(
                    RefusalCode::Policy,
                    format!(
                        "{plugin} was not started: a trace is made at the levels process and container, not at {level}"
                    ),
                );
            };
            walls = traced;
        }
        if self.slots.len() >= usize::try_from(self.launcher.options.max_plugins).unwrap_or(usize::MAX) {
            return refuse(
                RefusalCode::Exhausted,
                format!(
                    "{plugin} was not started: {} plugins run already, the most that --max-plugins allows",
                    self.launcher.options.max_plugins
                ),
            );
        }
        // First, because what the file says decides over more than this launch: at VM over what machines are made of.
        self.launcher.policy.check_file()?;
        if walls.kernel == Kernel::Own {
            self.look_for_machines();
        }
        self.launcher.require(request)?;
        let Admitted { directory, path, checked, bytes, files } = self.launcher.admit(request, &plugin, walls)?;
        let bundle = Program {
            directory: directory.as_fd(),
            path: &path,
            entry: Entry::InBundle,
            identity: None,
            machine: &[],
            device: None,
        };
        let running = match walls.kernel {
            Kernel::Host => self.launcher.start(request, &checked, &bundle, arrived)?,
            Kernel::Own => {
                let machine = self.launcher.prepare_machine(request, checked, bytes, files)?;
                let entry = Entry::Sealed(machine.monitor.as_fd());
                let monitor = Program { entry, machine: &machine.files, device: machine.device, ..bundle };
                self.launcher.start(&machine.request, &machine.checked, &monitor, arrived)?
            }
        };
        let number = running.id.0;
        let slot = Slot {
            running,
            phase: Phase::Starting { request: id, deadline: arrived + SETUP_TIME },
            origin: Origin::of(request, arrived),
            ends: None,
            change: None,
            gone: None,
        };
        let watched = self.watch(number, &slot.running);
        self.slots.insert(number, slot);
        if let Err(error) = watched {
            self.give_up(number, Refusal { code: RefusalCode::Exhausted, message: format!("epoll: {error}") });
        }
        Ok(())
    }

    pub(super) fn signal(&self, launch: LaunchId, signal: i32) -> Reply {
        let allowed = [Signal::TERM, Signal::INT, Signal::HUP, Signal::USR1, Signal::USR2, Signal::KILL];
        let Some(signal) = allowed.into_iter().find(|allowed| allowed.as_raw() == signal) else {
            return refused(
                RefusalCode::Policy,
                &format!("signal {signal} may not be sent; TERM, INT, HUP, USR1, USR2 and KILL may"),
            );
        };
        self.with_up(launch, |running| match &running.program {
            Some(program) => match pidfd_send_signal(program, signal) {
                Ok(()) => {
                    if signal == Signal::KILL {
                        // Frozen, it would not die, and its init would not see it die.
                        let _ = running.groups.thaw();
                    }
                    Reply::Done
                }
                Err(_) => unknown(launch),
            },
            None => unknown(launch),
        })
    }

    pub(super) fn with_up(&self, launch: LaunchId, act: impl FnOnce(&Running) -> Reply) -> Reply {
        match self.slots.get(&launch.0) {
            Some(Slot { running, phase: Phase::Up, gone: None, .. }) => act(running),
            _ => unknown(launch),
        }
    }
}

fn done(result: Result<(), Refusal>) -> Reply {
    result.map_or_else(Reply::Refused, |()| Reply::Done)
}

pub(super) fn refused(code: RefusalCode, message: &str) -> Reply {
    Reply::Refused(Refusal { code, message: message.to_owned() })
}

pub(super) fn unknown(launch: LaunchId) -> Reply {
    Reply::Refused(no_launch(launch))
}

pub(super) fn no_launch(launch: LaunchId) -> Refusal {
    Refusal { code: RefusalCode::UnknownLaunch, message: format!("launch {} is unknown or over", launch.0) }
}
