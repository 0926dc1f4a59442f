//! The guest's side: does what the plan says and tells the host.

use std::fs;
use std::io::BufReader;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, bail, ensure};

use super::package;
use super::plan::{Part, Plan, Tests, User, Work};
use super::report::{Message, tell};
use super::units;
use crate::skips;

/// The ordinary user, of `tests/vm/lane.conf`.
const ORDINARY: &str = "lane";

/// How many times slower than a usual machine the guest is taken to be: what tests wait for, they wait for so much
/// longer. Measured are 10 to 20 times, for what only computes.
const SLOWNESS: &str = "10";

/// How long one test program may take.
const LONGEST: &str = "RuntimeMaxSec=1500";

/// Runs the plan. The exit code says nothing: the host judges by the messages.
///
/// # Errors
/// When the host cannot be told, or the plan cannot be read.
pub(crate) fn run(plan: &Path) -> anyhow::Result<()> {
    let text = fs::read_to_string(plan).with_context(|| format!("cannot read {}", plan.display()))?;
    let plan: Plan = serde_json::from_str(&text).with_context(|| format!("cannot read {}", plan.display()))?;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").context("the kernel's release")?;
    let systemd = units::output(Command::new("systemctl").arg("--version"))?;
    let systemd = systemd.lines().next().unwrap_or_default();
    tell(&Message::Booted { release: format!("Linux {} with {systemd}", kernel.trim()) })?;
    for Part { name, work } in &plan.parts {
        tell(&Message::Began { part: name.clone() })?;
        let began = Instant::now();
        let done = match work {
            Work::World => world(),
            Work::Tests(tests) => run_tests(tests),
            Work::Package => package::check(),
        };
        let failure = done.err().map(|error| format!("{error:#}"));
        let seconds = began.elapsed().as_secs_f64();
        tell(&Message::Ended { part: name.clone(), seconds, failure })?;
    }
    tell(&Message::Verdict { parts: plan.parts.len() })
}

/// Tells a line for people.
pub(super) fn say(text: impl Into<String>) -> anyhow::Result<()> {
    tell(&Message::Line { text: text.into() })
}

/// What makes this another world than the host: if it were not, everything below would prove nothing.
fn world() -> anyhow::Result<()> {
    let first = fs::read_to_string("/proc/1/comm").context("PID 1")?;
    ensure!(first.trim() == "systemd", "PID 1 is {first:?}");
    let mounts = fs::read_to_string("/proc/mounts").context("the mounts")?;
    let kinds: Vec<&str> = mounts.lines().filter_map(|line| line.split(' ').nth(2)).collect();
    ensure!(kinds.contains(&"cgroup2") && !kinds.contains(&"cgroup"), "cgroup v2 is not the only one: {kinds:?}");
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").context("the controllers")?;
    for wanted in ["cpu", "memory", "pids"] {
        ensure!(controllers.split_whitespace().any(|has| has == wanted), "no controller {wanted}: {controllers}");
    }
    let failed = units::output(Command::new("systemctl").args(["list-units", "--failed", "--plain", "--no-legend"]))?;
    ensure!(failed.trim().is_empty(), "units have failed: {failed}");
    Ok(())
}

/// Runs a test program as a service with a delegated cgroup, which is how systemd gives one to anybody.
fn run_tests(Tests { program, user, only, without, variables }: &Tests) -> anyhow::Result<()> {
    let mut command = Command::new("systemd-run");
    command.args(["--quiet", "--wait", "--pipe", "--collect"]);
    for property in ["Delegate=yes", "TasksMax=infinity", LONGEST] {
        command.args(["--property", property]);
    }
    if *user == User::Ordinary {
        command.args(["--uid", ORDINARY, "--property", "StateDirectory=lane", "--setenv", "HOME=/var/lib/lane"]);
    }
    command.args(["--setenv", &format!("PLUGVISOR_TEST_PATIENCE={SLOWNESS}")]);
    for (name, value) in variables {
        command.args(["--setenv", &format!("{name}={value}")]);
    }
    command.args(["--", program, "--show-output", "--test-threads", "2"]).args(only);
    for name in without {
        command.args(["--skip", name]);
    }
    let mut running =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("systemd-run")?;
    let errors = running.stderr.take().context("systemd-run has no standard error")?;
    // What a failed test printed is in its output; this is what else was said.
    let errors = std::thread::spawn(move || std::io::read_to_string(BufReader::new(errors)).unwrap_or_default());
    let output = running.stdout.take().context("systemd-run has no standard output")?;
    let mut lines = Vec::new();
    let skipped = skips::collect(BufReader::new(output), |line| lines.push(line.to_owned()))?;
    let status = running.wait().context("systemd-run")?;
    for (name, why) in skipped {
        tell(&Message::Skipped { name, why })?;
    }
    let result = lines.iter().find(|line| line.starts_with("test result:")).cloned();
    if status.success() {
        let result = result.context("the test program gave no result")?;
        ensure!(!result.contains(" 0 passed"), "no test was run: {result}");
        lines.iter().filter(|line| line.starts_with(skips::MEASURED)).try_for_each(say)?;
        return say(result);
    }
    for line in lines.iter().filter(|line| !line.is_empty() && !line.ends_with("... ok")) {
        say(line.clone())?;
    }
    for line in errors.join().unwrap_or_default().lines().rev().take(40).collect::<Vec<_>>().into_iter().rev() {
        say(line)?;
    }
    bail!("{} ended with {status}", Path::new(program).display())
}
