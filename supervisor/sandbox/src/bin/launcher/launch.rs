//! The launcher's side of a launch: prepares everything, forks the child, and holds what belongs to a launch until the
//! last of its processes is gone. What a child does is in `child`; the event loop is in `serve`.

mod pipes;
mod running;
mod sockets;

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use plugvisor_package::PluginName;
use plugvisor_sandbox::{
    options::Options,
    protocol::{Control, Grant, Launch, LaunchId, Level, Limits, Refusal, RefusalCode},
    seqpacket::Seqpacket,
};
use rustix::{
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
    process::{PidfdFlags, Resource, getgid, getpid, getrlimit, getuid, pidfd_open},
};

use self::{pipes::Pipes, sockets::Sockets};
pub(crate) use self::{running::Running, sockets::remove_sockets};
use crate::{
    cgroup::{Cgroups, Groups, LimitError, MemoryWatch},
    check::{Checked, refuse},
    child::{self, Ends, Entry, Kit, Order, Plan, Rlimits},
    creds::Identity,
    directories::{self, Roots},
    kernel::{self, Cloned},
    landlock,
    level::{self, Keeper, Kernel, Walls},
    machine::{self, Machines},
    mounts::Own,
    policy::Policy,
    probe::Trial,
    report,
    seccomp::Filters,
    spares::{Spare, Spares},
    step,
    store::Store,
    timing::{self, Marks, Part},
    uids::{Uids, Unsaved},
};

/// Open files when the manifest says nothing: what most systems give.
pub(crate) const OPEN_FILES: u64 = 1024;
/// The largest core: none, also where a handler takes them.
pub(crate) const CORE_BYTES: u64 = 1;
/// The size of /tmp when the plugin has one.
pub(crate) const TEMP_BYTES: u64 = 64 << 20;
/// How long a child may take to set itself up: far more than ever needed, unless a filesystem hangs.
pub(crate) const SETUP_TIME: Duration = Duration::from_secs(10);

/// What all launches share.
pub(crate) struct Launcher {
    pub(crate) options: Options,
    pub(crate) cgroups: Cgroups,
    pub(crate) filters: Filters,
    /// The Landlock version in use; 0 when there is none.
    pub(crate) landlock: i32,
    pub(crate) store: Store,
    pub(crate) policy: Policy,
    pub(crate) spares: Spares,
    /// What was tried at the start.
    pub(crate) trial: Trial,
    privileged: bool,
    pub(crate) uids: Uids,
    pub(crate) machines: Machines,
    /// Where the listeners of launches go when it was started to trace them.
    pub(crate) trace: Option<Seqpacket>,
    pidfd: OwnedFd,
    /// Whether it may mount what only it and its plugins see.
    own_mounts: bool,
    last: u64,
}

/// What a launcher is made of that can refuse to be made.
pub(crate) struct Parts {
    pub(crate) store: Store,
    pub(crate) policy: Policy,
    pub(crate) uids: Uids,
    /// To who traces launches.
    pub(crate) trace: Option<Seqpacket>,
    /// Whether the launcher is in a mount namespace of its own.
    pub(crate) own_mounts: bool,
}

/// What a launch runs.
pub(crate) struct Program<'a> {
    /// The bundle's directory, and where it is.
    pub(crate) directory: BorrowedFd<'a>,
    pub(crate) path: &'a Path,
    pub(crate) entry: Entry<'a>,
    /// Who runs it, when that does not go by its name.
    pub(crate) identity: Option<Identity>,
    /// What its machine is made of, and the device that runs it; at the level that has one.
    pub(crate) machine: &'a [machine::Part],
    pub(crate) device: Option<&'static str>,
}

impl Launcher {
    pub(crate) fn new(options: Options, filters: Filters, parts: Parts) -> io::Result<Self> {
        let privileged = rustix::process::geteuid().is_root();
        let Parts { store, policy, uids, trace, own_mounts } = parts;
        let cgroups = Cgroups::set_up(&options.cgroup_root);
        let last = cgroups.highest_left();
        Ok(Self {
            cgroups,
            filters,
            landlock: landlock::version(),
            store,
            policy,
            uids,
            machines: Machines::default(),
            trace,
            spares: Spares::new(match (privileged, options.without.as_slice()) {
                (true, []) => usize::try_from(options.spares).unwrap_or(0),
                // A spare is born behind walls that may be among those left out.
                (true, _) | (false, _) => 0,
            }),
            trial: Trial::default(),
            privileged,
            pidfd: pidfd_open(getpid(), PidfdFlags::empty())?,
            own_mounts,
            last,
            options,
        })
    }

    /// The launcher itself, readable when it is dead.
    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Whether plugins get uids of their own.
    pub(crate) const fn privileged(&self) -> bool {
        self.privileged
    }

    /// The identity for this name: as root the same uid for good, and nobody else's.
    fn identity(&mut self, plugin: &PluginName) -> Result<(Identity, Option<Unsaved>), Refusal> {
        if !self.privileged {
            return Ok((Identity::Mapped { uid: getuid().as_raw(), gid: getgid().as_raw() }, None));
        }
        let (uid, unsaved) = self.uids.of(plugin)?;
        Ok((Identity::Own { uid }, unsaved))
    }

    /// Refuses a launch that needs a control which this host lacks, unless the operator allows that.
    pub(crate) fn require(&self, request: &Launch) -> Result<(), Refusal> {
        let level = request.level;
        if let Some(why) = self.missing(level) {
            return refuse(
                RefusalCode::ControlUnavailable,
                format!("{} was not started: {why}; {}", request.plugin, step::FIX_NAMESPACES),
            );
        }
        // Controls that fail for one reason are told together.
        let mut missing: Vec<(Vec<&str>, String)> = Vec::new();
        for control in level.controls().filter(|control| asked(&request.limits, *control)) {
            let allowed = may_be_allowed(level, control) && request.allow_degraded.contains(&control);
            let Some(why) = self.lacking(level, control).filter(|_| !allowed) else { continue };
            let reason = format!("{why}; {}", step::fix_at(level, control));
            match missing.iter_mut().find(|(_, other)| *other == reason) {
                Some((names, _)) => names.push(control.as_str()),
                None => missing.push((vec![control.as_str()], reason)),
            }
        }
        let missing: Vec<String> =
            missing.into_iter().map(|(names, reason)| format!("{}: {reason}", names.join(", "))).collect();
        if missing.is_empty() {
            return Ok(());
        }
        refuse(
            RefusalCode::ControlUnavailable,
            format!(
                "{} was not started at the level {}: this host cannot enforce {}",
                request.plugin,
                level.as_str(),
                missing.join("; and ")
            ),
        )
    }

    /// Starts a checked launch. On error nothing is left of it.
    pub(crate) fn start(
        &mut self,
        request: &Launch,
        checked: &Checked,
        program: &Program<'_>,
        arrived: Instant,
    ) -> Result<Running, Refusal> {
        let began = timing::now().saturating_sub(u64::try_from(arrived.elapsed().as_nanos()).unwrap_or(0));
        let mut marks = Marks::default();
        marks.done(Part::Checked);
        let plugin = request.plugin.as_str();
        let (identity, unsaved) = match program.identity {
            Some(identity) => (identity, None),
            None => self.identity(&checked.plugin)?,
        };
        self.last += 1;
        let id = LaunchId(self.last);
        match self.begin(request, checked, program, identity, unsaved, id, marks) {
            Ok(begun) => Ok(Running {
                id,
                plugin: plugin.to_owned(),
                level: request.level,
                walls: checked.walls,
                identity,
                limits: request.limits.clone(),
                grants: request.grants.clone(),
                allow_degraded: request.allow_degraded.clone(),
                arrived,
                began,
                marks,
                init: begun.init,
                init_pid: begun.init_pid,
                report: begun.report,
                report_closed: false,
                exec: Some(begun.exec),
                told: begun.told,
                program: None,
                listener: None,
                execs: match checked.walls.kernel {
                    Kernel::Host => 1,
                    Kernel::Own => machine::EXECS,
                },
                executing: false,
                failure: None,
                ended: None,
                groups: begun.groups,
                memory: begun.memory,
                oom: false,
                ends: begun.ends,
                egress: None,
                inward: Vec::new(),
                bundle: request.bundle,
                unsaved,
            }),
            Err(refusal) => {
                remove_sockets(id);
                Err(refusal)
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "each is one thing of the launch")]
    fn begin(
        &mut self,
        request: &Launch,
        checked: &Checked,
        program: &Program<'_>,
        identity: Identity,
        unsaved: Option<Unsaved>,
        id: LaunchId,
        mut marks: Marks,
    ) -> Result<Begun, Refusal> {
        let failed = |(doing, error): (&'static str, io::Error)| Refusal {
            code: match error.raw_os_error() {
                Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOSPC | libc::EDQUOT) => {
                    RefusalCode::Exhausted
                }
                _ => RefusalCode::Kernel,
            },
            message: format!("{} was not started: {doing} failed: {error}", request.plugin),
        };
        let unenforceable = |error: LimitError| Refusal {
            code: RefusalCode::ControlUnavailable,
            message: format!("{} was not started: {} cannot be enforced: {}", request.plugin, error.control, error.why),
        };
        let sockets = Sockets::make(id, checked.socket, identity, self.own_mounts)
            .map_err(|error| failed(("making its sockets", error)))?;
        let pipes = Pipes::make(identity, checked.walls.kernel).map_err(|error| failed(("making its pipes", error)))?;
        marks.done(Part::Sockets);
        let name = format!("{}-{}-{}", request.plugin, request.generation, id.0);
        let walls = checked.walls;
        let limits = self.enforceable(request);
        let mut order = Order {
            walls,
            plugin: request.plugin.clone(),
            identity,
            rlimits: self.rlimits(request, &walls),
            socket: checked.socket,
            // In a machine it is the guest's.
            temp: (walls.kernel == Kernel::Host && request.grants.contains(&Grant::WriteTemp)).then_some(TEMP_BYTES),
            device: program.device.map(str::to_owned),
            grants: request.grants.clone(),
            listen: checked.listen.clone(),
            inward: request.inward,
            argv: checked.argv.clone(),
            envp: checked.envp.clone(),
            marks,
        };
        let ends = Ends {
            stdout: pipes.stdout_write.as_fd(),
            stderr: pipes.stderr_write.as_fd(),
            worker: sockets.listener.as_ref().map(AsFd::as_fd),
        };

        // A spare executes nothing from memory, is the init of its namespace, and no longer sees the host's tree.
        let spare = match (program.entry, walls.keeper) {
            (Entry::InBundle, Keeper::Init) if !directories::any(&request.grants) => self.spares.take(),
            (Entry::InBundle | Entry::Sealed(_), _) => None,
        };
        let ready = spare.and_then(|mut spare| {
            match self.send_order(&mut spare, request, program, id, &name, &mut order, &ends, &pipes) {
                Ok(memory) => Some((spare, memory)),
                Err(()) => {
                    self.spares.discard(spare);
                    None
                }
            }
        });
        let (init, init_pid, report, groups, memory) = match ready {
            Some((spare, memory)) => (spare.init, spare.init_pid, spare.report, spare.groups, memory),
            None => {
                let made = self.cgroups.create(&name, &Limits::default(), besides(&walls));
                let mut groups = made.map_err(unenforceable)?;
                order.marks.done(Part::Groups);
                let (init, init_pid, report) = match self.fork(program, id, &groups, &order, ends, &pipes) {
                    Ok(forked) => forked,
                    Err(error) => {
                        groups.remove();
                        return Err(failed(error));
                    }
                };
                // While the child sets itself up. It is not released before.
                let watched = watch_memory(request, &groups).map_err(|error| failed(("watching its memory", error)));
                let held =
                    watched.and_then(|memory| groups.set_limits(&limits).map(|()| memory).map_err(unenforceable));
                match held {
                    Ok(memory) => (init, init_pid, report, groups, memory),
                    Err(refusal) => {
                        self.spares.abandon(init, init_pid, report, groups);
                        return Err(refusal);
                    }
                }
            }
        };
        if unsaved.is_none() {
            // A child that is dead already is told of by its own event.
            drop(report::release(report.as_fd()));
        }
        let Pipes { stdout, stderr, exec, told, .. } = pipes;
        let told = told.map(|(told, _)| told);
        let ends = vec![sockets.broker, sockets.worker, stdout, stderr];
        Ok(Begun { init, init_pid, report, exec, told, memory, groups, ends })
    }

    /// Has a spare become this launch, up to the exec, for which it must be released. On error the spare must be discarded,
    /// and the launch may begin from nothing. The limits are set while the spare sets itself up.
    #[expect(clippy::too_many_arguments, reason = "each is one thing of the launch")]
    fn send_order(
        &self,
        spare: &mut Spare,
        request: &Launch,
        program: &Program<'_>,
        id: LaunchId,
        name: &str,
        order: &mut Order,
        ends: &Ends<'_>,
        pipes: &Pipes,
    ) -> Result<Option<MemoryWatch>, ()> {
        let own = Own::of(program.directory, &id.0.to_string(), order.socket).map_err(drop)?;
        order.marks.done(Part::Attached);
        child::spare::send(spare.report.as_fd(), order, &own, ends).map_err(drop)?;
        report::send_packet(spare.report.as_fd(), &[0], &[pipes.exec_write.as_fd()]).map_err(drop)?;
        spare.groups.rename(name).map_err(drop)?;
        let memory = watch_memory(request, &spare.groups).map_err(drop)?;
        spare.groups.set_limits(&self.enforceable(request)).map_err(drop)?;
        Ok(memory)
    }

    /// Forks a child that does everything from the beginning.
    fn fork(
        &self,
        program: &Program<'_>,
        id: LaunchId,
        groups: &Groups,
        order: &Order,
        ends: Ends<'_>,
        pipes: &Pipes,
    ) -> Result<(OwnedFd, i32, OwnedFd), (&'static str, io::Error)> {
        let opening = |error| ("opening its cgroup", error);
        let born_in = groups.v2_directory().map_err(opening)?;
        let joins = groups.joins(born_in.is_some()).map_err(opening)?;
        let (report, child_report) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|error| ("making a socket pair", error.into()))?;
        let told = pipes.told.as_ref().map(|(_, told)| told.as_fd());
        let handed: Vec<BorrowedFd<'_>> = [pipes.exec_write.as_fd()].into_iter().chain(told).collect();
        report::send_packet(report.as_fd(), &[0], &handed).map_err(|error| ("sending over a socket pair", error))?;
        let kit = Kit {
            launcher: self.pidfd.as_fd(),
            report: child_report.as_fd(),
            cgroups: joins.iter().map(AsFd::as_fd).collect(),
            landlock: self.landlock,
            filters: &self.filters,
        };
        let sockets = id.0.to_string();
        let plan = Plan {
            entry: program.entry,
            bundle_path: program.path,
            bundle: program.directory,
            roots: Roots::of(&self.options),
            sockets: &sockets,
            machine: program.machine,
            ends,
        };
        let born_in = born_in.as_ref().map(AsFd::as_fd);
        let cloned = match order.walls.keeper {
            Keeper::Init => kernel::clone3(self.namespaces(&order.walls), born_in),
            Keeper::Guard => kernel::clone3(0, None),
        };
        match (cloned.map_err(|error| ("making its namespaces (clone3)", error))?, order.walls.keeper) {
            (Cloned::Child, Keeper::Init) => child::run(&kit, &plan, order),
            (Cloned::Child, Keeper::Guard) => child::guard::run(&kit, &plan, order, groups, born_in),
            (Cloned::Parent { pidfd, pid }, _) => Ok((pidfd, pid, report)),
        }
    }

    /// The limits without those that this host lacks, which the operator allowed to be missing.
    fn enforceable(&self, request: &Launch) -> Limits {
        let here = |control| self.lacking(request.level, control).is_none();
        let limits = &request.limits;
        Limits {
            memory_bytes: limits.memory_bytes.filter(|_| here(Control::MemoryLimit)),
            cpu_percent: limits.cpu_percent.filter(|_| here(Control::CpuLimit)),
            ..limits.clone()
        }
    }

    /// The namespaces that a plugin's init is born in; with privileges it makes the others itself, so that the launcher
    /// need not wait: the network one takes the longest of all. Without, all are made with the user namespace.
    fn namespaces(&self, walls: &Walls) -> u64 {
        let flags =
            if self.privileged { walls.namespaces & level::BORN_IN } else { walls.namespaces | libc::CLONE_NEWUSER };
        flags.unsigned_abs().into()
    }

    fn rlimits(&self, request: &Launch, walls: &Walls) -> Rlimits {
        let limits = &request.limits;
        let hard = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
        if walls.without.has(Control::Rlimits) {
            return Rlimits { core: CORE_BYTES, open_files: hard, file_size: None, processes: None };
        }
        let processes = limits.pids.and_then(|pids| {
            let with_init = u64::from(pids) + 1;
            // The kernel counts per uid and user namespace. Without privileges that is this launch alone, and holds the
            // limit where there is no cgroup; with them it is every generation of the plugin, and only a backstop. What
            // shares the launcher's user namespace without a uid of its own would be counted together with it.
            match (self.privileged, walls.keeper) {
                (true, _) => Some(with_init * 4),
                (false, Keeper::Init) => Some(with_init),
                (false, Keeper::Guard) => None,
            }
        });
        Rlimits {
            // 1 and not 0: the kernel starts a core handler (`|` in core_pattern) whatever the limit is, except for 1, and
            // no core fits into one byte.
            core: CORE_BYTES,
            open_files: limits.open_files.map_or(OPEN_FILES.min(hard), u64::from),
            file_size: limits.file_size_bytes,
            processes,
        }
    }
}

/// Processes in its groups that are not the plugin's.
fn besides(walls: &Walls) -> u32 {
    match walls.keeper {
        Keeper::Init => 1,
        Keeper::Guard => 0,
    }
}

/// Whether a control of the level is part of a launch with these limits.
pub(crate) fn asked(limits: &Limits, control: Control) -> bool {
    match control {
        Control::MemoryLimit => limits.memory_bytes.is_some(),
        Control::CpuLimit => limits.cpu_percent.is_some(),
        Control::PidsLimit => limits.pids.is_some(),
        _ => true,
    }
}

/// Whether the operator may allow a control to be missing. What the other walls rest on cannot be left out by anyone; at
/// NONE there are no others.
pub(crate) fn may_be_allowed(level: Level, control: Control) -> bool {
    match control {
        Control::OwnUid | Control::Landlock | Control::MemoryLimit | Control::CpuLimit | Control::PidsLimit => true,
        Control::WholeKill | Control::DiesWithLauncher => level == Level::None,
        _ => false,
    }
}

fn watch_memory(request: &Launch, groups: &Groups) -> io::Result<Option<MemoryWatch>> {
    if request.limits.memory_bytes.is_some() { groups.watch_memory() } else { Ok(None) }
}

/// A launch whose child is under way.
struct Begun {
    init: OwnedFd,
    init_pid: i32,
    report: OwnedFd,
    exec: OwnedFd,
    told: Option<OwnedFd>,
    memory: Option<MemoryWatch>,
    groups: Groups,
    ends: Vec<OwnedFd>,
}
