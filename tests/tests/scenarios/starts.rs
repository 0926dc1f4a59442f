//! Plugins whose process starts and never becomes a plugin.

use anyhow::{Context, ensure};
use plugvisor_proto::admin::v1::PluginState;
use plugvisor_tests::{BundleBuilder, Daemon, Lane, events, scenarios};

use crate::{says, told, world};

/// Behaviours that last until their budget has passed get a short one. The others fail by themselves, and get one that no
/// slow machine can use up before they do.
const UNTIL_THE_BUDGET: [&str; 3] = ["never-listens", "never-binds", "hangs-in-health"];
const SHORT: &str = "health = { startup_timeout_ms = 3000 }";
/// It must be up and answer in its budget, and is then waited for until it has passed.
const NOT_SERVING: &str = "health = { startup_timeout_ms = 10000 }";
const LONG: &str = "health = { startup_timeout_ms = 100000 }";

fn budget(name: &str) -> &'static str {
    match name {
        "not-serving" => NOT_SERVING,
        _ if UNTIL_THE_BUDGET.contains(&name) => SHORT,
        _ => LONG,
    }
}

/// A name, the behaviour, the error codes that are right for it, and words of the message.
type Bad = (&'static str, &'static [&'static str], &'static [&'static str], &'static [&'static str]);

/// Behaviours that never load.
const BAD: [Bad; 7] = [
    ("never-listens", &["never-listens"], &["communication.never_listened", "timeout.startup"], &["never-listens"]),
    ("never-binds", &["never-listens"], &["communication.never_listened", "timeout.startup"], &["never-binds"]),
    ("garbage", &["garbage"], &["communication.protocol_broken"], &["garbage"]),
    (
        "closes",
        &["closes"],
        // Which of them is a race: the connection may end before or after its first bytes are sent.
        &["communication.never_listened", "communication.connection_lost", "communication.protocol_broken"],
        &["closes"],
    ),
    ("exits-at-once", &["exits-at-once", "3"], &["plugin.exited"], &["3"]),
    (
        "hangs-in-health",
        &["hangs-in-health"],
        // From outside the same as a socket that nobody accepts on, and the message says so.
        &["timeout.startup", "communication.never_listened"],
        &["hangs-in-health"],
    ),
    ("not-serving", &["not-serving"], &["timeout.startup"], &["not-serving"]),
];

/// Loads one and checks what everybody is told.
async fn fails(daemon: &Daemon, name: &str, codes: &[&str], words: &[&str]) -> anyhow::Result<()> {
    let load = daemon.cli(&["load", name, "--timeout", "120s"]).await?;
    ensure!(load.code == Some(1), "`load {name}` ended with {load:?}\n{}", daemon.account());
    says(&format!("`load {name}`"), &load.stderr, words)?;
    says(&format!("`load {name}`"), &load.stderr, &["next: "])?;
    let event = daemon
        .events()
        .wait(&format!("the failure of {name}"), |event| {
            events::subject_is(event, name) && codes.contains(&event.reason.as_str()) && !event.hint.is_empty()
        })
        .await
        .with_context(|| daemon.printed())?;
    ensure!(!events::data_text(&event).is_empty(), "{event:?}");
    let status = daemon.in_state(name, PluginState::Failed).await?;
    ensure!(status.pid == 0, "{name} still runs: {status:?}");
    says(&format!("the error of {name}"), &status.last_error, words)?;
    ensure!(!status.hint.is_empty(), "{name} has no hint: {status:?}");
    Ok(())
}

/// Each fails within its budget, says why, and the good citizen does not notice.
async fn bad_starts_are_explained(lane: Lane) -> anyhow::Result<()> {
    let mut world = world(lane)?;
    for (name, args, ..) in BAD {
        let mut bundle = BundleBuilder::hostile(name, args);
        if name == "never-binds" {
            bundle = bundle.set("/runtime/socket", "bind");
        }
        world = world
            .plugin(&bundle)?
            .toml(&format!("[plugin.{name}]\nload = \"manual\"\n{}\nrestart = {{ enabled = false }}", budget(name)));
    }
    let daemon = world.start().await?;
    daemon.loaded("echo").await?;
    let neighbour = daemon.neighbour();
    for (name, _, codes, words) in BAD {
        fails(&daemon, name, codes, words).await?;
    }
    let described = daemon.describe("exits-at-once").await?;
    says("the stderr tail", &described.stderr_tail.join("\n"), &["flux capacitor"])?;
    let exit = described.last_exit.context("no last exit")?;
    ensure!(exit.code == Some(3), "{exit:?}");
    let event = daemon.events().wait("its exit", |event| events::is(event, "plugin.exited", "exits-at-once")).await?;
    says("the event", &events::data_text(&event), &["flux capacitor", "code=3"])?;
    neighbour.finish().await?;
    daemon.stop().await
}

/// Late is not never: inside the budget it loads, whichever side binds.
async fn late_is_not_never(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?
        .plugin(&BundleBuilder::hostile("late-inherits", &["listens-late", "700"]))?
        .plugin(&BundleBuilder::hostile("late-binds", &["listens-late", "700"]).set("/runtime/socket", "bind"))?
        .start()
        .await?;
    for name in ["late-inherits", "late-binds"] {
        let status = daemon.loaded(name).await?;
        ensure!(status.restarts == 0, "{name} was restarted on the way: {status:?}");
    }
    daemon.stop().await
}

/// Exit 78 says that a restart is of no use: there is none, and the operator is told.
async fn a_misconfigured_plugin_is_not_restarted(lane: Lane) -> anyhow::Result<()> {
    let daemon =
        world(lane)?.plugin(&BundleBuilder::hostile("misconfigured", &["exits-at-once", "78"]))?.start().await?;
    let exited = told(&daemon, "plugin.exited", "misconfigured").await?;
    says("the event", &events::data_text(&exited), &["code=78", "flux capacitor"])?;
    let gave_up = told(&daemon, "plugin.gave_up", "misconfigured").await?;
    ensure!(gave_up.reason == "plugin.misconfigured", "{gave_up:?}");
    let status = daemon.in_state("misconfigured", PluginState::Failed).await?;
    ensure!(status.restart_in.is_none(), "a restart is scheduled: {status:?}");
    let restarts =
        daemon.events().all().iter().any(|event| events::is(event, "plugin.restart_scheduled", "misconfigured"));
    ensure!(!restarts, "{}", daemon.account());
    daemon.stop().await
}

/// One that exits at every start is tried again with growing delays, then is in a crash loop; the daemon lives.
async fn a_crash_loop_is_seen(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?
        .plugin(&BundleBuilder::hostile("crashes", &["exits-at-once", "1"]))?
        .toml("[plugin.crashes.restart]\ninitial_delay_ms = 40\nmax_delay_ms = 400\ncrash_loop_exits = 4\ncrash_loop_window_ms = 3600000")
        .start()
        .await?;
    let crashloop = told(&daemon, "plugin.crashloop", "crashes").await?;
    says("the event", &events::data_text(&crashloop), &["count=4"])?;
    let delays: Vec<f64> = daemon
        .events()
        .all()
        .iter()
        .filter(|event| events::is(event, "plugin.restart_scheduled", "crashes"))
        .filter_map(|event| events::number(event, "delay_ms"))
        .collect();
    // Uniform in the upper half of 40, 80 and 160 ms; one more at the cap may have been scheduled since.
    for (delay, full) in delays.iter().zip([40.0, 80.0, 160.0]) {
        ensure!(*delay >= full / 2.0 - 1.0 && *delay <= full + 1.0, "delays {delays:?}");
    }
    ensure!(delays.len() >= 3, "delays {delays:?}");
    daemon.loaded("echo").await?;
    daemon.stop().await
}

scenarios!(bad_starts_are_explained, late_is_not_never, a_misconfigured_plugin_is_not_restarted, a_crash_loop_is_seen,);
