//! `doctor` and `config validate` beside the real daemon: what they say is what the kernel and the daemon do.

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf};

use anyhow::{Context, ensure};
use plugvisor_tests::{BundleBuilder, Lane, Process, scenarios};
use serde_json::Value;

use crate::{says, world};

/// The memory limit of the plugin that is looked at.
const MEMORY: u64 = 96 << 20;

/// A field of `/proc/PID/status`.
fn status(pid: u32, field: &str) -> anyhow::Result<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    Ok(line.with_context(|| format!("no {field} of {pid}"))?.trim().to_owned())
}

/// Whether one of these files, in any of the plugin's own cgroups, begins with this.
fn limited(cgroups: &[PathBuf], files: [&str; 2], value: &str) -> bool {
    let all = cgroups.iter().flat_map(|group| files.map(|file| group.join(file)));
    all.filter_map(|file| fs::read_to_string(file).ok()).any(|text| text.trim().starts_with(value))
}

/// Every control that doctor says works is one that a plugin has, by `/proc` and its cgroups, and every other one is one
/// that it lacks; for root and for an ordinary user.
async fn doctor_tells_the_truth(lane: Lane) -> anyhow::Result<()> {
    let limited_one = BundleBuilder::hostile("looked-at", &["echo"])
        .set("/security/sandbox/resourceLimits/maxMemory", MEMORY)
        .set("/security/sandbox/resourceLimits/maxCPU", 50);
    let daemon = world(lane)?.plugin(&limited_one)?.start().await?;
    let plugin = daemon.loaded("looked-at").await?;
    let said = daemon.cli(&["doctor", "-o", "json"]).await?;
    let report = said.json()?;
    ensure!(report["running"] == true, "{report}");
    let controls = report["controls"].as_array().context("no controls")?;
    let works = |name: &str| {
        let control = controls.iter().find(|control| control["name"] == name);
        let control = control.with_context(|| format!("doctor says nothing of {name}"))?;
        anyhow::Ok(control["works"].as_str().is_some_and(|works| !works.is_empty()))
    };
    // Lacking is degraded, and so is what a place lacks; whatever is lacking has a reason and a way out.
    let lacking: Vec<&Value> = controls.iter().filter(|control| control["works"] == "").collect();
    ensure!(said.code == Some(3) || (lacking.is_empty() && said.code == Some(0)), "{said:?}");
    for control in &lacking {
        ensure!(control["why"] != "" && control["fix"] != "" && control["allowed"] == true, "{control}");
    }

    // As the daemon describes the plugin.
    for control in &daemon.describe("looked-at").await?.controls {
        ensure!(works(&control.name)? != control.enforced.is_empty(), "doctor and describe differ: {control:?}");
    }
    // As the kernel shows it.
    let cgroups: Vec<PathBuf> =
        Process::open(plugin.pid).context("it does not run")?.own_cgroups().into_iter().collect();
    let uid = status(plugin.pid, "Uid")?.split_whitespace().next().unwrap_or_default().to_owned();
    let supervisor = daemon.process().uid().context("no uid")?.to_string();
    for (name, holds) in [
        ("own-uid", uid != supervisor),
        ("no-capabilities", status(plugin.pid, "CapEff")?.chars().all(|digit| digit == '0')),
        ("no-new-privs", status(plugin.pid, "NoNewPrivs")? == "1"),
        ("seccomp", status(plugin.pid, "Seccomp")? == "2"),
        ("pid-namespace", status(plugin.pid, "NSpid")?.split_whitespace().count() > 1),
        ("memory-limit", limited(&cgroups, ["memory.max", "memory.limit_in_bytes"], &MEMORY.to_string())),
        ("cpu-limit", limited(&cgroups, ["cpu.max", "cpu.cfs_quota_us"], "50000")),
    ] {
        ensure!(works(name)? == holds, "doctor says of {name}: {}, the kernel shows {holds}", works(name)?);
    }
    daemon.stop().await
}

/// A file that is said to be valid starts a daemon, one that is said to be wrong does not, and both name the same problem.
async fn a_configuration_is_judged_as_a_start_would(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?.start().await?;
    let before = daemon.loaded("echo").await?;
    let file = daemon.world().path().join("plugvisor.toml");
    let file = file.to_str().context("the path is text")?;
    let valid = daemon.cli(&["config", "validate", file]).await?;
    ensure!(valid.code == Some(0), "{valid:?}");
    let shown = daemon.cli(&["config", "show"]).await?;
    says("config show", &shown.stdout, &["supervisor.runtime_directory", &daemon.world().runtime().to_string_lossy()])?;

    let idle = daemon.world().path().join("idle.toml");
    fs::write(&idle, fs::read_to_string(file)? + "\n[plugin.ecko]\ngrants = []\n")?;
    let warned = daemon.cli(&["config", "validate", idle.to_str().context("the path is text")?]).await?;
    ensure!(warned.code == Some(0), "{warned:?}");
    says("config validate", &warned.stdout, &["plugin.ecko", "no plugin of this name", "did you mean \"echo\""])?;

    // What is not there is told beside what is written wrongly.
    let missing = daemon.world().path().join("missing.toml");
    fs::write(&missing, "[[directory]]\npath = \"nowhere\"\ntier = \"trusted\"\n[launcher]\nlinger = 30\n")?;
    let missing = missing.to_str().context("the path is text")?;
    let judged = daemon.cli(&["config", "validate", missing]).await?;
    ensure!(judged.code == Some(8), "{judged:?}");
    let words = [
        "line 2: directory[0].path: ",
        "nowhere",
        "line 3: directory[0].tier: ",
        "line 5: launcher.linger: is the number 30",
    ];
    says("config validate", &judged.stdout, &words)?;
    let doctor = daemon.cli(&["doctor", "--config", missing]).await?;
    says("doctor", &doctor.stdout, &[missing, "no supervisor runs", "has 2 problems"])?;

    // So is what a launcher would refuse, in its own words.
    let policy = daemon.world().path().join("wrong-policy.toml");
    fs::write(&policy, "version = 1\n[[directory]]\ntier = \"trusted\"\n")?;
    fs::set_permissions(&policy, fs::Permissions::from_mode(0o644))?;
    let doctor = daemon.cli(&["doctor", "--launcher-policy", policy.to_str().context("the path is text")?]).await?;
    ensure!(doctor.code == Some(3), "{doctor:?}");
    let words = [
        "wrong-policy.toml has 2 problems",
        "line 2: directory[0].path: is required",
        "line 3: directory[0].tier: is the text \"trusted\"; it takes",
        "fix: correct that and look again",
        "No wall was tried",
    ];
    says("doctor", &doctor.stdout, &words)?;

    let wrong = world(lane)?.toml("[plugin.echo.health]\nlivenes_misses = 3\ndrain_timeout_ms = \"soon\"");
    let file = wrong.path().join("plugvisor.toml");
    let file = file.to_str().context("the path is text")?.to_owned();
    let refused = wrong.start_refused().await?;
    ensure!(refused.code == Some(78), "{refused:?}");
    let words = ["livenes_misses", "liveness_misses", "drain_timeout_ms"];
    says("the start", &refused.stderr, &words)?;
    let judged = daemon.cli(&["config", "validate", &file]).await?;
    ensure!(judged.code == Some(8), "{judged:?}");
    says("config validate", &judged.stdout, &words)?;
    ensure!(daemon.loaded("echo").await?.pid == before.pid, "who runs goes on");
    daemon.stop().await
}

scenarios!(doctor_tells_the_truth, a_configuration_is_judged_as_a_start_would);
