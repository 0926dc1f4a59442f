//! The package under systemd: installed, started, restarted, killed and stopped, and looked at from outside each time.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use super::guest::say;
use super::units::{self, Mark, output, property, systemctl};
use crate::demo::process::{self, Process};
use crate::demo::supervisor::EventStream;

const TARGET: &str = "plugvisor.target";
const LAUNCHER: &str = "plugvisor-launcher.service";
const SUPERVISOR: &str = "plugvisor.service";
const PLUGINS: [&str; 3] = ["gallery", "markdown", "thumbnailer"];

/// Processes and threads that a plugin of the tier verified may have when nobody says otherwise; its init is one more.
const PIDS: i64 = 128;

/// How long what is awaited may take in this slow machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// How soon a killed supervisor is there again, by the clock of this machine; twice as long as a restart takes where that
/// is more.
const BACK: Duration = Duration::from_secs(3);

/// The exposure that `systemd-analyze security` may find at most, in tenths. Reached, not wished for; of the supervisor's a
/// tenth is AF_NETLINK, by which the egress proxy asks for the host's own addresses.
const EXPOSURE: [(&str, u32); 2] = [(SUPERVISOR, 16), (LAUNCHER, 75)];

type Step = fn() -> anyhow::Result<()>;

/// Everything, in order; each step leaves what the next one begins with.
pub(super) fn check() -> anyhow::Result<()> {
    let steps: [(&str, Step); 10] = [
        ("installed", install),
        ("started", start),
        ("walls are read back", walls),
        ("doctor finds what is here", doctor),
        ("a restart of the supervisor keeps the plugins", restart),
        ("a killed supervisor is back", kill_supervisor),
        ("a killed launcher takes its plugins along, and all comes back", kill_launcher),
        ("stopped, nothing is left", stop),
        ("stopped and started in every order", orders),
        ("exposure", exposure),
    ];
    for (name, step) in steps {
        let began = Instant::now();
        count_starts_anew()?;
        step().with_context(|| name.to_owned()).inspect_err(|_| tell_what_was_said())?;
        say(format!("{name} ({:.1} s)", began.elapsed().as_secs_f64()))?;
    }
    Ok(())
}

/// Nobody starts it ten times in a minute by hand, and a machine that is quick enough does so here: systemd would take it for
/// one that fails over and over (`StartLimitBurst=`).
fn count_starts_anew() -> anyhow::Result<()> {
    let known = output(Command::new("systemctl").args(["list-units", "--all", "--plain", "--no-legend"]))?;
    let mut ours = [LAUNCHER, SUPERVISOR].into_iter().filter(|unit| known.contains(unit));
    ours.try_for_each(|unit| systemctl(&["reset-failed", unit]).map(drop))
}

/// What the units said last, and how the plugins are: beside the failure, for people.
fn tell_what_was_said() {
    for line in units::journal().lines() {
        let _ = say(line);
    }
    let status = output(Command::new("plugvisor").arg("status"));
    for line in status.unwrap_or_else(|error| error.to_string()).lines() {
        let _ = say(line);
    }
}

fn install() -> anyhow::Result<()> {
    output(Command::new("cp").args(["-a", "/lane/package/.", "/"]))?;
    output(&mut Command::new("systemd-sysusers"))?;
    output(Command::new("systemd-tmpfiles").arg("--create"))?;
    systemctl(&["daemon-reload"])?;
    let units = [TARGET, LAUNCHER, SUPERVISOR].map(|unit| format!("/usr/lib/systemd/system/{unit}"));
    let said = output(Command::new("systemd-analyze").arg("verify").args(&units))?;
    ensure!(said.trim().is_empty(), "systemd-analyze verify: {said}");
    systemctl(&["enable", "--quiet", TARGET, LAUNCHER, SUPERVISOR]).map(drop)
}

fn start() -> anyhow::Result<()> {
    systemctl(&["start", TARGET])?;
    for unit in [TARGET, LAUNCHER, SUPERVISOR] {
        let state = property(unit, "ActiveState")?;
        ensure!(state == "active", "{unit} is {state}");
    }
    let pids = serving()?;
    say(format!("plugins {pids:?}"))
}

/// Waits until the supervisor has loaded everything, and returns the plugins' processes.
fn serving() -> anyhow::Result<BTreeMap<String, u32>> {
    let mut command = Command::new("plugvisor");
    command.args(["events", "--follow", "-o", "jsonl"]);
    let mut events = EventStream::of(command)?;
    let (_, ready) =
        events.wait_for("supervisor.ready", PATIENCE, |event| event["type"] == "io.plugvisor.supervisor.ready.v1")?;
    let status = ask(&["status"])?;
    let plugins = status["plugins"].as_array().context("a status without plugins")?;
    let mut pids = BTreeMap::new();
    for plugin in plugins {
        let name = plugin["name"].as_str().context("a plugin without a name")?;
        let asked = manifest(name)?;
        let as_wanted = plugin["state"] == "PLUGIN_STATE_LOADED"
            && plugin["tier"] == "verified"
            && plugin["isolation_level"] == asked["security"]["sandbox"]["isolationLevel"];
        ensure!(as_wanted, "{plugin}; the supervisor said {ready}");
        let pid = plugin["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).context("a plugin without a pid")?;
        pids.insert(name.to_owned(), pid);
    }
    ensure!(pids.keys().eq(PLUGINS.iter()), "other plugins than were installed: {pids:?}");
    Ok(pids)
}

/// What an installed bundle asks for.
fn manifest(name: &str) -> anyhow::Result<Value> {
    let path = format!("/usr/local/lib/plugvisor/plugins/{name}/plugin.json");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    serde_json::from_str(&text).with_context(|| format!("{path} is not JSON"))
}

/// Runs a command of an operator and returns its JSON.
fn ask(arguments: &[&str]) -> anyhow::Result<Value> {
    let text = output(Command::new("plugvisor").args(arguments).args(["-o", "json"]))?;
    serde_json::from_str(&text).with_context(|| format!("`plugvisor {}` printed no JSON", arguments.join(" ")))
}

/// The cgroup of a process, as a directory.
fn group(pid: u32) -> anyhow::Result<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).with_context(|| format!("process {pid}"))?;
    let path = text.trim().strip_prefix("0::/").with_context(|| format!("{text:?} is not of cgroup v2 alone"))?;
    Ok(Path::new("/sys/fs/cgroup").join(path))
}

fn unit_group(unit: &str) -> PathBuf {
    Path::new("/sys/fs/cgroup/system.slice").join(unit)
}

fn main_pid(unit: &str) -> anyhow::Result<u32> {
    let pid = property(unit, "MainPID")?;
    pid.parse().ok().filter(|pid| *pid > 0).with_context(|| format!("{unit} has no main process: {pid:?}"))
}

fn number(path: &Path) -> anyhow::Result<i64> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    text.trim().parse().with_context(|| format!("{} is {text:?}", path.display()))
}

/// What the supervisor shows as enforced is what the kernel's files say.
fn walls() -> anyhow::Result<()> {
    let pids = serving()?;
    let launcher = main_pid(LAUNCHER)?;
    ensure!(group(launcher)? == unit_group(LAUNCHER).join("plugvisor-supervisor"), "{:?}", group(launcher)?);
    let score = |pid: u32| number(&Path::new("/proc").join(pid.to_string()).join("oom_score_adj"));
    ensure!(score(launcher)? == -500, "the launcher is not protected: {}", score(launcher)?);
    let mut users = BTreeSet::new();
    for (name, pid) in &pids {
        let group = group(*pid)?;
        let ours = group.parent() == Some(&unit_group(LAUNCHER).join("plugvisor"));
        ensure!(ours, "{name} is in {}", group.display());
        ensure!(score(*pid)? == 0, "{name} is as protected as the launcher: {}", score(*pid)?);
        let asked = manifest(name)?;
        let limits = &asked["security"]["sandbox"]["resourceLimits"];
        let memory = limits["maxMemory"].as_i64().context("an example without a memory limit")?;
        ensure!(number(&group.join("memory.max"))? == memory, "{name}: memory.max");
        let high = fs::read_to_string(group.join("memory.high"))?;
        ensure!(high.trim() == "max", "{name}: memory.high is {high}");
        ensure!(number(&group.join("memory.swap.max"))? == 0, "{name}: memory.swap.max");
        ensure!(number(&group.join("memory.oom.group"))? == 1, "{name}: memory.oom.group");
        ensure!(number(&group.join("pids.max"))? == PIDS + 1, "{name}: pids.max");
        let cpu = limits["maxCPU"].as_i64().context("an example without a CPU limit")?;
        let quota = fs::read_to_string(group.join("cpu.max"))?;
        ensure!(quota.trim() == format!("{} 100000", cpu * 1000), "{name}: cpu.max is {quota}");
        let described = ask(&["describe", name])?;
        let controls = described["controls"].as_array().context("no controls")?;
        let enforced = |control: &str| {
            let found = controls.iter().find(|found| found["name"] == control);
            found.and_then(|found| found["enforced"].as_str()).unwrap_or_default().to_owned()
        };
        ensure!(enforced("memory-limit").starts_with(&memory.to_string()), "{name}: {controls:?}");
        for control in controls {
            let control = control["name"].as_str().unwrap_or_default();
            ensure!(!enforced(control).is_empty(), "{name} lacks {control}: {controls:?}");
        }
        let status = process::status(*pid)?;
        for (field, wanted) in [("CapEff", "0000000000000000"), ("CapBnd", "0000000000000000"), ("NoNewPrivs", "1")] {
            ensure!(
                status.get(field).is_some_and(|value| value == wanted),
                "{name}: {field} is {:?}",
                status.get(field)
            );
        }
        let uid = status.get("Uid").and_then(|uids| uids.split_whitespace().next()).context("no uid")?.to_owned();
        ensure!(uid != "0" && users.insert(uid.clone()), "{name} shares the uid {uid}");
    }
    Ok(())
}

/// What `plugvisor doctor` says of this machine is so: every control works, limits by cgroup v2 in the launcher's unit,
/// and every level but the one that is not built.
fn doctor() -> anyhow::Result<()> {
    let report = ask(&["doctor"])?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("the kernel's release")?;
    let kernel = report["kernel"].as_str().unwrap_or_default();
    ensure!(kernel.contains(release.trim()), "it takes the kernel for {kernel}, which is {release}");
    let groups = format!("cgroup v2 at {}", unit_group(LAUNCHER).join("plugvisor").display());
    let controls = report["controls"].as_array().context("no controls")?;
    for control in controls {
        let name = control["name"].as_str().unwrap_or_default();
        let works = control["works"].as_str().unwrap_or_default();
        ensure!(!works.is_empty(), "{control}");
        let is_limit = ["memory-limit", "cpu-limit", "pids-limit"].contains(&name);
        ensure!(!is_limit || works == groups, "{name} works by {works}, not by {groups}");
    }
    for level in report["levels"].as_array().context("no levels")? {
        let gaps = level["gaps"].as_array().map_or(0, Vec::len);
        ensure!((level["name"] == "vm") == (gaps > 0), "{level}");
    }
    say(format!("{kernel}: {} controls work, limits by {groups}", controls.len()))
}

/// The same processes, after something that must not have touched them.
fn same(before: &BTreeMap<String, u32>) -> anyhow::Result<()> {
    let now = serving()?;
    ensure!(now == *before, "other processes than before: {now:?}, not {before:?}");
    Ok(())
}

fn restart() -> anyhow::Result<()> {
    let before = serving()?;
    let supervisor = main_pid(SUPERVISOR)?;
    restart_of_the_supervisor(&before)?;
    ensure!(main_pid(SUPERVISOR)? != supervisor, "it was not restarted");
    Ok(())
}

fn kill_supervisor() -> anyhow::Result<()> {
    let before = serving()?;
    // The control, on both sides of what is measured: what an ordinary start takes while this machine is as slow as it is.
    let first = restart_of_the_supervisor(&before)?;
    let supervisor = Process::open(main_pid(SUPERVISOR)?)?;
    let mark = Mark::now()?;
    let journal = mark.follow(SUPERVISOR)?;
    let began = Instant::now();
    supervisor.kill()?;
    journal.started(PATIENCE)?;
    let took = began.elapsed();
    same(&before)?;
    let restart = first.max(restart_of_the_supervisor(&before)?);
    let [back, usual] = [took, restart].map(|time| time.as_secs_f64());
    say(format!("the supervisor was back {back:.2} s after kill -9; a restart took {usual:.2} s"))?;
    ensure!(took < BACK.max(restart * 2), "it was back only after {took:?}, and a restart took {restart:?}");
    Ok(())
}

/// What one takes that keeps these plugins.
fn restart_of_the_supervisor(plugins: &BTreeMap<String, u32>) -> anyhow::Result<Duration> {
    let began = Instant::now();
    systemctl(&["restart", SUPERVISOR])?;
    let took = began.elapsed();
    same(plugins)?;
    Ok(took)
}

fn kill_launcher() -> anyhow::Result<()> {
    let before = serving()?;
    let plugins = before.values().map(|pid| Process::open(*pid)).collect::<anyhow::Result<Vec<_>>>()?;
    let launcher = Process::open(main_pid(LAUNCHER)?)?;
    let mark = Mark::now()?;
    let journals = [mark.follow(LAUNCHER)?, mark.follow(SUPERVISOR)?];
    let began = Instant::now();
    launcher.kill()?;
    for plugin in &plugins {
        ensure!(plugin.ended_within(PATIENCE)?, "process {} outlives the launcher", plugin.pid);
    }
    for journal in &journals {
        journal.started(PATIENCE)?;
    }
    let after = serving()?;
    say(format!("everything was back {:.2} s after kill -9 of the launcher", began.elapsed().as_secs_f64()))?;
    ensure!(before.values().all(|pid| !after.values().any(|other| other == pid)), "{before:?} {after:?}");
    walls()
}

fn stop() -> anyhow::Result<()> {
    let before = serving()?;
    let plugins = before.values().map(|pid| Process::open(*pid)).collect::<anyhow::Result<Vec<_>>>()?;
    stop_target()?;
    for plugin in &plugins {
        ensure!(plugin.ended_within(Duration::ZERO)?, "process {} outlives the stop", plugin.pid);
    }
    nothing_is_left()
}

/// systemctl waits for the target's own stop, and that comes before the services': the journal tells of those.
fn stop_target() -> anyhow::Result<()> {
    let mark = Mark::now()?;
    let journals = [mark.follow(LAUNCHER)?, mark.follow(SUPERVISOR)?];
    systemctl(&["stop", TARGET])?;
    journals.iter().try_for_each(|journal| journal.stopped(PATIENCE))
}

/// The supervisor is restarted along, and systemctl does not wait for that.
fn restart_with_the_supervisor(unit: &str) -> anyhow::Result<()> {
    let journal = Mark::now()?.follow(SUPERVISOR)?;
    systemctl(&["restart", unit])?;
    journal.started(PATIENCE)
}

fn nothing_is_left() -> anyhow::Result<()> {
    for unit in [TARGET, LAUNCHER, SUPERVISOR] {
        let state = property(unit, "ActiveState")?;
        ensure!(state == "inactive", "{unit} is {state}");
        ensure!(!unit_group(unit).exists(), "{} is left", unit_group(unit).display());
    }
    for path in ["/run/plugvisor", "/run/plugvisor-launcher"] {
        ensure!(!Path::new(path).exists(), "{path} is left");
    }
    for entry in fs::read_dir("/proc").context("/proc")? {
        let name = entry.context("/proc")?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let program = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        ensure!(!program.starts_with("plugvisor"), "process {pid} ({}) is left", program.trim());
    }
    Ok(())
}

/// Each order in which an administrator may do it, and what is then to be there.
fn orders() -> anyhow::Result<()> {
    // The supervisor needs the launcher: it brings it along.
    systemctl(&["start", SUPERVISOR])?;
    let first = serving()?;
    // The launcher goes, and the supervisor with it.
    systemctl(&["stop", LAUNCHER])?;
    nothing_is_left()?;
    // The launcher alone, then the supervisor.
    systemctl(&["start", LAUNCHER])?;
    ensure!(property(SUPERVISOR, "ActiveState")? == "inactive", "the launcher started the supervisor");
    systemctl(&["start", SUPERVISOR])?;
    let second = serving()?;
    ensure!(first != second, "processes outlived the launcher");
    // The supervisor alone goes: plugins run on, and the next one takes them over.
    systemctl(&["stop", SUPERVISOR])?;
    ensure!(property(LAUNCHER, "ActiveState")? == "active", "the launcher stopped with the supervisor");
    for pid in second.values() {
        ensure!(!Process::open(*pid)?.ended_within(Duration::ZERO)?, "process {pid} stopped with the supervisor");
    }
    systemctl(&["start", SUPERVISOR])?;
    same(&second)?;
    // Both at once, in either order of words.
    for words in [["stop", LAUNCHER, SUPERVISOR], ["stop", SUPERVISOR, LAUNCHER]] {
        systemctl(&words)?;
        nothing_is_left()?;
        systemctl(&["start", words[1], words[2]])?;
        serving()?;
    }
    count_starts_anew()?;
    // A restart of the launcher is one of everything.
    let third = serving()?;
    restart_with_the_supervisor(LAUNCHER)?;
    let fourth = serving()?;
    ensure!(third.values().all(|pid| !fourth.values().any(|other| other == pid)), "{third:?} {fourth:?}");
    // And again by the target.
    restart_with_the_supervisor(TARGET)?;
    serving()?;
    // Killed and stopped: systemd has nothing to tell it to, and the groups go all the same.
    Process::open(main_pid(LAUNCHER)?)?.kill()?;
    systemctl(&["stop", TARGET, LAUNCHER, SUPERVISOR])?;
    systemctl(&["reset-failed"])?;
    nothing_is_left()?;
    systemctl(&["start", TARGET])?;
    serving()?;
    stop_target()?;
    nothing_is_left()
}

/// Measured and held: who loosens a unit must say so here.
fn exposure() -> anyhow::Result<()> {
    for (unit, most) in EXPOSURE {
        let text = output(Command::new("systemd-analyze").args(["security", "--no-pager", "--json=short", unit]))?;
        let overall = output(Command::new("systemd-analyze").args(["security", "--no-pager", unit]))?;
        let line = overall.lines().rev().find(|line| line.contains("exposure level")).context("no overall exposure")?;
        let score = line.split_whitespace().find_map(|word| word.parse::<f64>().ok()).context("no score")?;
        say(format!("{unit}: {score} ({} settings looked at)", text.matches("\"set\"").count()))?;
        if score * 10.0 > f64::from(most) + 0.01 {
            bail!("{unit} is exposed by {score}, more than {}", f64::from(most) / 10.0);
        }
    }
    Ok(())
}
