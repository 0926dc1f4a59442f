//! What is enforced, as the kernel says: `/proc/PID/status`, namespaces, limits, cgroup files.
//!
//! Two things the kernel shows nobody from outside: Landlock rules and the parent-death signal. The child reads those
//! back itself before it executes the plugin (opening `/` must be denied; `PR_GET_PDEATHSIG` must answer SIGKILL), and
//! a launch whose child could not confirm them is refused.
//!
//! A control that was set and is not confirmed here is not known to hold: [`judge`] refuses the launch for it.

use std::{fs, io};

use plugvisor_sandbox::protocol::{Control, ControlState, DirectoryState, Refusal, RefusalCode};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{
    creds::Identity,
    directories::{self, Roots},
    kernel,
    launch::{CORE_BYTES, Launcher, Running, asked},
    level::{Calls, Keeper, Kernel},
    step,
};

/// What becomes of a launch whose program is executed.
pub(crate) enum Judgement {
    /// It may run, or has ended already; its controls as they were read.
    Comes(Vec<ControlState>),
    /// It is ending by itself, and what could not be read is gone with it: to be judged again when it has ended.
    Ending,
    /// It may not run.
    Refused(Refusal),
}

/// Reads every control of a launch that was executed, and refuses it for one that is not confirmed, unless the operator
/// allowed that one to be missing.
pub(crate) fn judge(launcher: &Launcher, running: &Running) -> Judgement {
    let states = read(launcher, running);
    let unconfirmed: Vec<String> = states
        .iter()
        .filter(|state| state.enforced.is_none() && !running.may_lack(state.control))
        .map(|state| format!("{} is not confirmed by {}: {}", state.control, state.read_from, state.unavailable))
        .chain(directories(launcher, running).iter().filter(|state| state.enforced.is_none()).map(|state| {
            format!("{} is not confirmed by {}: it should be {}", state.place, state.read_from, state.requested)
        }))
        .collect();
    // Where the escape suite leaves a wall out, so does what rests on it; never in a release build.
    if unconfirmed.is_empty() || running.walls.without.anything() {
        return Judgement::Comes(states);
    }
    // In this order: who was reaped before it was looked at has ended, and whoever is ending is marked so before anything
    // of it is gone.
    let ending = running.program_pid().is_some_and(is_ending);
    if has_ended(running) {
        return Judgement::Comes(states);
    }
    if ending {
        return Judgement::Ending;
    }
    let message = format!(
        "{} was not started at the level {}: {}",
        running.plugin,
        running.level.as_str(),
        unconfirmed.join("; and ")
    );
    Judgement::Refused(Refusal { code: RefusalCode::ControlUnavailable, message })
}

/// Whether all threads of the program have ended.
fn has_ended(running: &Running) -> bool {
    let Some(program) = &running.program else { return running.ended.is_some() };
    let mut fds = [PollFd::new(program, PollFlags::IN)];
    let polled = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    running.ended.is_some() || polled.is_ok_and(|ready| ready > 0)
}

/// Whether the kernel has begun to take a process down (`PF_EXITING`), after which its namespaces cannot be read.
fn is_ending(pid: i32) -> bool {
    const PF_EXITING: u64 = 0x4;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Behind the name, which may hold anything: the state, five numbers, the flags.
    let flags = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(6)?.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & PF_EXITING != 0)
}

/// Why what was read does not confirm a control, and the fix.
fn unconfirmed(running: &Running, control: Control, read_from: &str) -> String {
    let read = match read_from.strip_prefix("/proc/").and_then(|rest| rest.split_once("/ns/")) {
        Some(_) => fs::read_link(read_from).map(drop),
        None if read_from.starts_with('/') => fs::read(read_from).map(drop),
        None => Ok(()),
    };
    match read {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => format!(
            "the launcher may not read it ({error}), so that nobody knows whether it holds; let plugvisord have \
             CAP_SYS_PTRACE (CapabilityBoundingSet= of its unit, or --cap-add SYS_PTRACE of its container)"
        ),
        Err(error) => format!("it could not be read ({error}); the process may have ended meanwhile"),
        Ok(()) => format!(
            "what the kernel says there is something else, or the process ended meanwhile; {}",
            step::fix_at(running.level, control)
        ),
    }
}

/// The directories of its name, read now.
pub(crate) fn directories(launcher: &Launcher, running: &Running) -> Vec<DirectoryState> {
    let pid = running.program_pid().unwrap_or(-1);
    directories::read_back(Roots::of(&launcher.options), &running.plugin, &running.grants, running.walls.kernel, pid)
}

/// Every control of this launch, read now.
pub(crate) fn read(launcher: &Launcher, running: &Running) -> Vec<ControlState> {
    let process = Process::read(running.program_pid().unwrap_or(-1));
    let asked = running.level.controls().filter(|control| asked(&running.limits, *control));
    asked.map(|control| state(launcher, running, &process, control)).collect()
}

fn state(launcher: &Launcher, running: &Running, process: &Process, control: Control) -> ControlState {
    let limits = &running.limits;
    let (requested, read): (String, (Option<String>, String)) = match control {
        Control::OwnUid => ("a uid of its own".into(), process.own_uid(running.identity)),
        Control::NoCapabilities => ("no capability in any set".into(), process.no_capabilities()),
        Control::NoNewPrivs => ("no_new_privs".into(), process.status_is("NoNewPrivs", "1")),
        Control::Seccomp => {
            let list = match running.walls.calls {
                Some(Calls::Machine) => "the allow-list of SANDBOX, and what a machine needs",
                Some(Calls::Only) => "the allow-list of SANDBOX",
                Some(Calls::Listed) | None => "the deny-list of PROCESS",
                Some(Calls::Traced) => "what its trace answers",
            };
            (list.into(), process.seccomp())
        }
        Control::MountNamespace => ("its own mounts".into(), process.namespace("mnt")),
        Control::PidNamespace => ("its own processes".into(), process.namespace("pid")),
        Control::IpcNamespace => ("its own IPC".into(), process.namespace("ipc")),
        Control::NetworkNamespace => ("a network of its own, empty".into(), process.namespace("net")),
        Control::UtsNamespace => ("a host name of its own".into(), process.namespace("uts")),
        Control::CgroupNamespace => ("its own cgroup as the root".into(), process.namespace("cgroup")),
        Control::NoWriteExec => {
            let (filtered, from) = process.seccomp();
            let held = filtered.map(|_| {
                let by = match kernel::refuses_exec_gain() {
                    Some(_) => "PR_SET_MDWE, confirmed before exec, and the allow-list",
                    None => "the allow-list; this kernel has no PR_SET_MDWE",
                };
                match running.walls.kernel {
                    Kernel::Host => by.to_owned(),
                    Kernel::Own => format!("{by}; but for memory files, which the emulator has"),
                }
            });
            ("no memory that is written and executed".into(), (held, format!("PR_GET_MDWE inside, and {from}")))
        }
        Control::SingleExec => {
            let (filtered, from) = process.seccomp();
            let held = filtered.filter(|_| running.executing && running.listener.is_none());
            let held = held.map(|_| match running.walls.kernel {
                Kernel::Host => "one exec was let pass, and the listener is closed".to_owned(),
                Kernel::Own => {
                    "the monitor's exec and the emulator's were let pass, and the listener is closed".to_owned()
                }
            });
            ("no exec after the first".into(), (held, format!("the filter's listener, and {from}")))
        }
        Control::Rlimits => {
            let mut wanted = vec![("Max core file size", CORE_BYTES)];
            wanted.extend(limits.open_files.map(|files| ("Max open files", files.into())));
            wanted.extend(limits.file_size_bytes.map(|bytes| ("Max file size", bytes)));
            let text: Vec<String> = wanted.iter().map(|(name, value)| format!("{name} {value}")).collect();
            (text.join(", "), process.limits(&wanted))
        }
        Control::Landlock => {
            let held = (launcher.landlock > 0)
                .then(|| format!("Landlock version {}, opening / was denied before exec", launcher.landlock));
            ("deny all but its own tree".into(), (held, "open(\"/\") inside the walls".into()))
        }
        Control::MemoryLimit => {
            (format!("{} bytes", limits.memory_bytes.unwrap_or_default()), from_group(running, control))
        }
        Control::CpuLimit => {
            (format!("{} percent of one CPU", limits.cpu_percent.unwrap_or_default()), from_group(running, control))
        }
        Control::PidsLimit => {
            let pids = u64::from(limits.pids.unwrap_or_default());
            let read = match from_group(running, control) {
                (None, _) if !launcher.privileged() && running.walls.keeper == Keeper::Init => {
                    process.limits(&[("Max processes", pids + 1)])
                }
                other => other,
            };
            let asked = match running.walls.keeper {
                Keeper::Init => format!("{pids}, and one for its init"),
                Keeper::Guard => pids.to_string(),
            };
            (asked, read)
        }
        Control::WholeKill => {
            let read = match running.walls.keeper {
                Keeper::Init => whole_kill(running),
                Keeper::Guard => kill_by_group(running),
            };
            ("all processes end together".into(), read)
        }
        Control::OwnKernel => ("a kernel of its own, in a machine".into(), own_kernel(launcher, running)),
        Control::DiesWithLauncher => ("dies with the launcher".into(), dies_with_launcher(running)),
    };
    let (enforced, read_from) = read;
    let unavailable = match &enforced {
        Some(_) => String::new(),
        None => {
            let why = launcher.lacking(running.level, control).map_or_else(
                || unconfirmed(running, control, &read_from),
                |why| format!("{why}; {}", step::fix_at(running.level, control)),
            );
            if running.may_lack(control) { format!("{why} (allowed by allow_degraded)") } else { why }
        }
    };
    ControlState { control, requested, enforced, read_from, unavailable }
}

fn from_group(running: &Running, control: Control) -> (Option<String>, String) {
    match running.groups.read_back(control) {
        Some((value, path)) => (value.ok(), path),
        None => (None, "no cgroup".to_owned()),
    }
}

fn whole_kill(running: &Running) -> (Option<String>, String) {
    let path = format!("/proc/{}/status", running.init_pid);
    let init = Process::read(running.init_pid);
    let numbers = init.field("NSpid").unwrap_or_default();
    let first = numbers.split_whitespace().count() > 1 && numbers.split_whitespace().last() == Some("1");
    (first.then(|| format!("process {} is PID 1 of its namespace", running.init_pid)), path)
}

fn kill_by_group(running: &Running) -> (Option<String>, String) {
    match running.program_pid().and_then(|pid| running.groups.member_of_killer(pid)) {
        Some((member, file)) => (member.then(|| "its group is killed with all in it".to_owned()), file),
        None => (None, "no cgroup".to_owned()),
    }
}

fn dies_with_launcher(running: &Running) -> (Option<String>, String) {
    let init = running.init_pid;
    let launcher = parent(init).filter(|pid| *pid == rustix::process::getpid().as_raw_nonzero().get());
    match running.walls.keeper {
        Keeper::Init => {
            let held = launcher.map(|pid| format!("SIGKILL when launcher {pid} ends"));
            (held, format!("PR_GET_PDEATHSIG in its init, and PPid in /proc/{init}/status"))
        }
        Keeper::Guard => {
            let (group, file) = kill_by_group(running);
            let held = launcher.filter(|_| group.is_some());
            let held = held.map(|pid| format!("guard {init} kills its group when launcher {pid} ends"));
            (held, format!("PPid in /proc/{init}/status, and {file}"))
        }
    }
}

/// The emulator is the monitor's one child.
fn own_kernel(launcher: &Launcher, running: &Running) -> (Option<String>, String) {
    let monitor = running.program_pid().unwrap_or(-1);
    let children = fs::read_to_string(format!("/proc/{monitor}/task/{monitor}/children")).unwrap_or_default();
    let Some(child) = children.split_whitespace().next() else {
        return (None, format!("/proc/{monitor}/task/{monitor}/children"));
    };
    let path = format!("/proc/{child}/exe");
    let wanted = launcher.machines.emulator().and_then(|emulator| fs::canonicalize(emulator).ok());
    let runs = fs::read_link(&path).ok().filter(|program| Some(program) == wanted.as_ref());
    (
        runs.map(|program| format!("process {child} is {}, by {}", program.display(), launcher.machines.accelerator())),
        path,
    )
}

fn parent(pid: i32) -> Option<i32> {
    Process::read(pid).field("PPid")?.parse().ok()
}

/// One process as /proc shows it.
struct Process {
    directory: String,
    status: String,
}

impl Process {
    fn read(pid: i32) -> Self {
        let directory = format!("/proc/{pid}");
        let status = fs::read_to_string(format!("{directory}/status")).unwrap_or_default();
        Self { directory, status }
    }

    fn field(&self, name: &str) -> Option<&str> {
        let find = |line: &'_ str| line.strip_prefix(name).and_then(|rest| rest.strip_prefix(':')).is_some();
        self.status.lines().find(|line| find(line)).map(|line| line[name.len() + 1..].trim())
    }

    fn status_path(&self) -> String {
        format!("{}/status", self.directory)
    }

    fn status_is(&self, name: &str, value: &str) -> (Option<String>, String) {
        let held = self.field(name).filter(|found| *found == value).map(|found| format!("{name} {found}"));
        (held, self.status_path())
    }

    fn own_uid(&self, identity: Identity) -> (Option<String>, String) {
        let held = match identity {
            Identity::Own { uid } => {
                let all = self.field("Uid").unwrap_or_default();
                let same =
                    all.split_whitespace().count() == 4 && all.split_whitespace().all(|id| id == uid.to_string());
                let groups = self.field("Groups").unwrap_or_default();
                (same && groups.is_empty()).then(|| format!("uid {uid}, no supplementary groups"))
            }
            Identity::Mapped { .. } => None,
        };
        (held, self.status_path())
    }

    fn no_capabilities(&self) -> (Option<String>, String) {
        let sets = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];
        let empty = |name: &&str| self.field(name).is_some_and(|set| !set.is_empty() && set.bytes().all(|b| b == b'0'));
        let held = sets.iter().all(empty).then(|| "all five sets are empty".to_owned());
        (held, self.status_path())
    }

    fn seccomp(&self) -> (Option<String>, String) {
        let filters = self.field("Seccomp_filters").unwrap_or("?");
        let held = match self.field("Seccomp") {
            Some("2") => Some(format!("filter mode, {filters} filters")),
            // For the moment between a call that is answered with death, and death.
            Some("3") => Some(format!("filter mode, {filters} filters, which have killed it")),
            _ => None,
        };
        (held, self.status_path())
    }

    fn namespace(&self, kind: &str) -> (Option<String>, String) {
        let path = format!("{}/ns/{kind}", self.directory);
        let link = |path: &str| fs::read_link(path).ok().map(|target| target.display().to_string());
        let (its, ours) = (link(&path), link(&format!("/proc/self/ns/{kind}")));
        (its.filter(|its| ours.is_some_and(|ours| ours != *its)), path)
    }

    fn limits(&self, wanted: &[(&str, u64)]) -> (Option<String>, String) {
        let path = format!("{}/limits", self.directory);
        let text = fs::read_to_string(&path).unwrap_or_default();
        let hard = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().nth(1).map(str::to_owned)
        };
        // A program may lower its own as soon as it runs.
        let within =
            |name, most: u64| hard(name).and_then(|hard| hard.parse().ok()).is_some_and(|hard: u64| hard <= most);
        let held = wanted.iter().all(|(name, most)| within(name, *most));
        let names: Vec<String> =
            wanted.iter().map(|(name, _)| format!("{name} {}", hard(name).unwrap_or_default())).collect();
        (held.then(|| names.join(", ")), path)
    }
}
