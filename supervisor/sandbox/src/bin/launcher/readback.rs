//! What is enforced, as the kernel says: `/proc/PID/status`, namespaces, limits, cgroup files.
//!
//! Two things the kernel shows nobody from outside: Landlock rules and the parent-death signal. The child reads those
//! back itself before it executes the plugin (opening `/` must be denied; `PR_GET_PDEATHSIG` must answer SIGKILL), and
//! a launch whose child could not confirm them is refused.

use std::fs;

use plugvisor_sandbox::protocol::{Control, ControlState};

use crate::{
    creds::Identity,
    launch::{CORE_BYTES, Launcher, Running},
    step,
};

/// Every control of this launch, read now.
pub(crate) fn read(launcher: &Launcher, running: &Running) -> Vec<ControlState> {
    let process = Process::read(running.program_pid().unwrap_or(-1));
    let asked = |control: &Control| match control {
        Control::MemoryLimit => running.limits.memory_bytes.is_some(),
        Control::CpuLimit => running.limits.cpu_percent.is_some(),
        Control::PidsLimit => running.limits.pids.is_some(),
        Control::OwnUid
        | Control::NoCapabilities
        | Control::NoNewPrivs
        | Control::Rlimits
        | Control::MountNamespace
        | Control::PidNamespace
        | Control::IpcNamespace
        | Control::Seccomp
        | Control::Landlock
        | Control::WholeKill
        | Control::DiesWithLauncher => true,
    };
    Control::ALL.into_iter().filter(asked).map(|control| state(launcher, running, &process, control)).collect()
}

fn state(launcher: &Launcher, running: &Running, process: &Process, control: Control) -> ControlState {
    let limits = &running.limits;
    let (requested, read): (String, (Option<String>, String)) = match control {
        Control::OwnUid => ("a uid of its own".into(), process.own_uid(running.identity)),
        Control::NoCapabilities => ("no capability in any set".into(), process.no_capabilities()),
        Control::NoNewPrivs => ("no_new_privs".into(), process.status_is("NoNewPrivs", "1")),
        Control::Seccomp => ("the deny-list of PROCESS".into(), process.seccomp()),
        Control::MountNamespace => ("its own mounts".into(), process.namespace("mnt")),
        Control::PidNamespace => ("its own processes".into(), process.namespace("pid")),
        Control::IpcNamespace => ("its own IPC".into(), process.namespace("ipc")),
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
                (None, _) if !launcher.privileged() => process.limits(&[("Max processes", pids + 1)]),
                other => other,
            };
            (format!("{pids}, and one for its init"), read)
        }
        Control::WholeKill => ("all processes end together".into(), whole_kill(running)),
        Control::DiesWithLauncher => {
            let held = parent(running.init_pid)
                .filter(|pid| *pid == rustix::process::getpid().as_raw_nonzero().get())
                .map(|pid| format!("SIGKILL when launcher {pid} ends"));
            let from = format!("PR_GET_PDEATHSIG in its init, and PPid in /proc/{}/status", running.init_pid);
            ("dies with the launcher".into(), (held, from))
        }
    };
    let (enforced, read_from) = read;
    let unavailable = match &enforced {
        Some(_) => String::new(),
        None => {
            let why = launcher.lacking(control).map_or_else(
                || "the kernel did not confirm it; the process may have ended meanwhile".to_owned(),
                |why| format!("{why}; {}", step::fix(control)),
            );
            let allowed = running.allow_degraded.contains(&control);
            if allowed { format!("{why} (allowed by allow_degraded)") } else { why }
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
        let held = (self.field("Seccomp") == Some("2")).then(|| format!("filter mode, {filters} filters"));
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
        let held = wanted.iter().all(|(name, value)| hard(name) == Some(value.to_string()));
        let names: Vec<String> =
            wanted.iter().map(|(name, _)| format!("{name} {}", hard(name).unwrap_or_default())).collect();
        (held.then(|| names.join(", ")), path)
    }
}
