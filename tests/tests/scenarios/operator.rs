//! What an operator does and sees: commands with their exit codes, events, logs, metrics, health.

use std::{fs, os::unix::fs::PermissionsExt as _};

use anyhow::{Context, ensure};
use plugvisor_proto::admin::v1::{PluginState, WatchEventsRequest};
use plugvisor_tests::{BundleBuilder, Lane, contract::SayRequest, events, scenarios};

use crate::{says, world};

/// load, unload, restart: each does what it says, once.
async fn commands_change_what_runs(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?
        .plugin(&BundleBuilder::hostile("by-hand", &["echo"]))?
        .toml("[plugin.by-hand]\nload = \"manual\"")
        .start()
        .await?;
    let first = daemon.loaded("echo").await?;
    daemon.in_state("by-hand", PluginState::Discovered).await?;
    let load = daemon.cli(&["load", "by-hand"]).await?;
    ensure!(load.code == Some(0), "{load:?}\n{}", daemon.account());
    says("load", &load.stdout, &["by-hand", "1.0.0"])?;
    let loaded = daemon.loaded("by-hand").await?;
    ensure!(loaded.pid != 0 && loaded.generation >= 1, "{loaded:?}");

    let restart = daemon.cli(&["restart", "echo"]).await?;
    ensure!(restart.code == Some(0), "{restart:?}\n{}", daemon.account());
    let second = daemon.loaded("echo").await?;
    ensure!(second.pid != first.pid && second.generation > first.generation, "{first:?} {second:?}");

    let unload = daemon.cli(&["unload", "echo"]).await?;
    ensure!(unload.code == Some(0), "{unload:?}\n{}", daemon.account());
    let gone = daemon.in_state("echo", PluginState::Unloaded).await?;
    ensure!(gone.pid == 0, "{gone:?}");
    // Events come by a stream of their own: what the answer told of may not be here yet.
    daemon.now().await?;
    let order: Vec<String> = daemon
        .events()
        .all()
        .iter()
        .filter(|event| events::subject_is(event, "echo"))
        .map(|event| events::short_type(event).to_owned())
        .filter(|kind| {
            ["plugin.stopping", "plugin.drained", "plugin.exited", "plugin.unloaded"].contains(&kind.as_str())
        })
        .collect();
    // Of the unload; the restart before it ends with its own exit.
    let unload_order = ["plugin.stopping", "plugin.drained", "plugin.exited", "plugin.unloaded"];
    ensure!(order.ends_with(&unload_order.map(str::to_owned)), "{order:?}");
    let refused = daemon.echo().say(SayRequest::default()).await.expect_err("nobody serves it");
    ensure!(refused.code() == tonic::Code::Unavailable, "{refused:?}");

    let again = daemon.cli(&["load", "echo"]).await?;
    ensure!(again.code == Some(0), "{again:?}");
    daemon.echo().say(SayRequest::default()).await?;

    let nobody = daemon.cli(&["load", "nobody"]).await?;
    ensure!(nobody.code == Some(4), "{nobody:?}");
    says("load nobody", &nobody.stderr, &["nobody", "plugin.not_found"])?;
    let twice = daemon.cli(&["load", "echo"]).await?;
    ensure!(twice.code == Some(1), "{twice:?}");
    says("load echo", &twice.stderr, &["echo", "plugin.already_loaded", "next: "])?;
    daemon.stop().await
}

/// While the launcher's policy file cannot be used nothing would be launched: what runs is left running, doctor beside the
/// supervisor says why, and both see the file as soon as it is mended.
async fn a_policy_file_that_breaks_stops_no_plugin(lane: Lane) -> anyhow::Result<()> {
    let good = "version = 1\n";
    let daemon = world(lane)?.launcher_policy(good)?.start().await?;
    let before = daemon.loaded("echo").await?;
    let file = daemon.world().path().join("launcher.toml");
    let read = format!("launcher policy {}: read and valid", file.display());
    says("doctor", &daemon.cli(&["doctor"]).await?.stdout, &[&read])?;

    let left_running = async |words: &[&str]| {
        let restart = daemon.cli(&["restart", "echo"]).await?;
        ensure!(restart.code == Some(1), "{restart:?}\n{}", daemon.account());
        let all = ["plugin echo was not restarted and runs on", "isolation.launch_refused", "`plugvisor unload echo`"];
        says("restart", &restart.stderr, &[&all, words].concat())?;
        let doctor = daemon.cli(&["doctor"]).await?;
        ensure!(doctor.code == Some(3), "{doctor:?}");
        says("doctor", &doctor.stdout, &[words, &["fix: correct that and look again"]].concat())?;
        let after = daemon.plugin("echo").await?;
        ensure!((after.pid, after.generation) == (before.pid, before.generation), "{before:?} became {after:?}");
        daemon.echo().say(SayRequest::default()).await?;
        anyhow::Ok(())
    };
    fs::write(&file, "version = 1\n[[directory]]\ntier = \"trusted\"\n")?;
    left_running(&["launcher.toml has 2 problems", "line 2: directory[0].path: is required"]).await?;
    fs::write(&file, good)?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o664))?;
    left_running(&["launcher.toml: others may write it (mode 664); chown it"]).await?;

    fs::set_permissions(&file, fs::Permissions::from_mode(0o644))?;
    says("doctor", &daemon.cli(&["doctor"]).await?.stdout, &[&read])?;
    let restart = daemon.cli(&["restart", "echo"]).await?;
    ensure!(restart.code == Some(0), "{restart:?}\n{}", daemon.account());
    ensure!(daemon.loaded("echo").await?.pid != before.pid, "it was not restarted");
    daemon.stop().await
}

/// status, describe, events and logs, for people and for programs.
async fn commands_show_what_is(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?.start().await?;
    let plugin = daemon.loaded("echo").await?;
    daemon.events().wait("that it is ready", |event| events::is(event, "plugin.ready", "echo")).await?;
    let status = daemon.cli(&["status"]).await?;
    ensure!(status.code == Some(0), "{status:?}");
    says("status", &status.stdout, &["echo", "LOADED", &plugin.pid.to_string()])?;
    let status = daemon.cli(&["status", "-o", "json"]).await?.json()?;
    ensure!(status["plugins"][0]["name"] == "echo", "{status}");
    let again = daemon.cli(&["ps"]).await?;
    says("ps", &again.stdout, &["echo", "LOADED", &plugin.pid.to_string()])?;
    // What `run` says names what was typed, though it is plugvisord that says it.
    for (argument, words) in [("--help", "--launcher-policy"), ("--no-such-flag", "unexpected argument")] {
        let output = daemon.world().administer(&["run", argument])?;
        let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        says("run", &said, &["Usage: plugvisor run", words])?;
    }
    let describe = daemon.cli(&["describe", "echo"]).await?;
    ensure!(describe.code == Some(0), "{describe:?}");
    says("describe", &describe.stdout, &["seccomp", "landlock", "plugvisor.test.v1.EchoService"])?;
    let unknown = daemon.cli(&["describe", "nobody"]).await?;
    ensure!(unknown.code == Some(4), "{unknown:?}");
    let shown = daemon.cli(&["events", "--plugin", "echo", "-o", "jsonl"]).await?;
    ensure!(shown.code == Some(0), "{shown:?}");
    says("events", &shown.stdout, &["io.plugvisor.plugin.ready.v1"])?;
    for line in shown.stdout.lines() {
        serde_json::from_str::<serde_json::Value>(line).with_context(|| format!("not JSON: {line}"))?;
    }
    daemon.stop().await
}

/// The stream takes up after any sequence, without a gap and without a repetition.
async fn events_resume_where_they_were_left(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?.start().await?;
    daemon.loaded("echo").await?;
    daemon.events().wait("supervisor.ready", |event| events::short_type(event) == "supervisor.ready").await?;
    let seen = daemon.events().all();
    for pair in seen.windows(2) {
        ensure!(pair[1].sequence == pair[0].sequence + 1, "a gap: {} then {}", pair[0].sequence, pair[1].sequence);
    }
    let half = &seen[seen.len() / 2];
    let request = WatchEventsRequest { after_sequence: Some(half.sequence), ..WatchEventsRequest::default() };
    let mut stream = daemon.admin().watch_events(request).await?.into_inner();
    let mut resumed = Vec::new();
    while let Some(answer) = stream.message().await? {
        ensure!(answer.missed == 0, "missed {}", answer.missed);
        resumed.extend(answer.event);
    }
    let expected: Vec<u64> = seen.iter().map(|event| event.sequence).filter(|number| *number > half.sequence).collect();
    let got: Vec<u64> = resumed.iter().map(|event| event.sequence).take(expected.len()).collect();
    ensure!(got == expected, "resumed with {got:?}, not {expected:?}");

    let request = WatchEventsRequest {
        plugin: "echo".to_owned(),
        type_prefix: "io.plugvisor.plugin.".to_owned(),
        after_sequence: Some(0),
        follow: false,
    };
    let mut stream = daemon.admin().watch_events(request).await?.into_inner();
    let mut count = 0;
    while let Some(answer) = stream.message().await? {
        let event = answer.event.context("an answer without an event")?;
        ensure!(events::subject_is(&event, "echo") && event.r#type.starts_with("io.plugvisor.plugin."), "{event:?}");
        count += 1;
    }
    ensure!(count >= 3, "only {count} events of echo");
    daemon.stop().await
}

/// The page is in the text format; what is measured on a process comes with it and goes with it.
async fn metrics_come_and_go_with_the_process(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?.start().await?;
    daemon.loaded("echo").await?;
    daemon.echo().say(SayRequest::default()).await?;
    daemon.events().wait("readiness", |event| events::short_type(event) == "supervisor.ready").await?;
    let counted = |scrape: &plugvisor_tests::Scrape| {
        scrape.labelled("callee", "echo").any(|sample| sample.name == "plugvisor_rpc_calls_total" && sample.value > 0.0)
    };
    let scrape = daemon.scraped("the call", counted).await?;
    let mut names = vec!["plugvisor_plugin_info", "plugvisor_plugin_state", "plugvisor_plugin_starts_total"];
    if lane == Lane::Privileged {
        names.extend(["plugvisor_plugin_memory_bytes", "plugvisor_plugin_pids"]);
    }
    for name in names {
        let found = scrape.labelled("plugin", "echo").any(|sample| sample.name == name);
        ensure!(found, "no {name} of echo");
    }
    let calls: f64 = scrape
        .labelled("callee", "echo")
        .filter(|sample| sample.name == "plugvisor_rpc_calls_total")
        .map(|sample| sample.value)
        .sum();
    ensure!(calls >= 1.0, "{calls} calls are counted");
    let loaded = |sample: &&plugvisor_tests::Sample| {
        sample.name == "plugvisor_plugin_state"
            && sample.labels.get("state").is_some_and(|state| state.eq_ignore_ascii_case("loaded"))
    };
    let state = scrape.labelled("plugin", "echo").find(loaded).context("no state loaded")?;
    ensure!((state.value - 1.0).abs() < f64::EPSILON, "{state:?}");
    ensure!(scrape.0.iter().any(|sample| sample.name == "plugvisor_build_info"), "no build info");

    ensure!(daemon.http("/healthz").await?.0 == 200, "not healthy");
    ensure!(daemon.http("/readyz").await?.0 == 200, "not ready");
    let (missing, _) = daemon.http("/nothing").await?;
    ensure!(missing == 404, "/nothing answered {missing}");

    let unload = daemon.cli(&["unload", "echo"]).await?;
    ensure!(unload.code == Some(0), "{unload:?}");
    let scrape = daemon.scrape().await?;
    // What is measured on a process goes with it; what was counted stays as long as the plugin is known.
    for name in ["plugvisor_plugin_memory_bytes", "plugvisor_plugin_pids"] {
        let left: Vec<_> = scrape.labelled("plugin", "echo").filter(|sample| sample.name == name).collect();
        ensure!(left.is_empty(), "series of a process that is gone: {left:?}");
    }
    ensure!(!scrape.labelled("plugin", "echo").any(|sample| loaded(&sample) && sample.value > 0.0), "still loaded");
    let counted = scrape.labelled("plugin", "echo").find(|sample| sample.name == "plugvisor_plugin_starts_total");
    ensure!(counted.is_some(), "its starts are forgotten");
    daemon.stop().await
}

scenarios!(
    commands_change_what_runs,
    a_policy_file_that_breaks_stops_no_plugin,
    commands_show_what_is,
    events_resume_where_they_were_left,
    metrics_come_and_go_with_the_process,
);
