//! What one daemon leaves to the next in the state directory, and what it does when that directory fails.

use std::{fs, os::unix::fs::PermissionsExt as _};

use anyhow::{Context, ensure};
use plugvisor_proto::admin::v1::PluginState;
use plugvisor_tests::{BundleBuilder, Lane, contract::SayRequest, events, scenarios};

use crate::{says, told, world, written};

/// What an operator loaded and unloaded by hand stays so, after a stop and after a kill; generations go on counting.
async fn an_operators_word_holds(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?
        .plugin(&BundleBuilder::hostile("unwanted", &["echo"]))?
        .plugin(&BundleBuilder::hostile("by-hand", &["echo"]))?
        .toml("[plugin.by-hand]\nload = \"manual\"")
        .start()
        .await?;
    daemon.loaded("echo").await?;
    daemon.loaded("unwanted").await?;
    for words in [["unload", "unwanted"], ["load", "by-hand"]] {
        let done = daemon.cli(&words).await?;
        ensure!(done.code == Some(0), "{done:?}\n{}", daemon.account());
    }
    let before = daemon.loaded("by-hand").await?;
    let daemon = daemon.stop_for_another().await?.start().await?;
    let after = daemon.loaded("by-hand").await?;
    ensure!(after.generation > before.generation, "{before:?} {after:?}");
    daemon.loaded("echo").await?;
    daemon.in_state("unwanted", PluginState::Discovered).await?;
    let told = daemon.describe("by-hand").await?;
    ensure!(told.transitions.iter().filter(|transition| transition.to == "LOADED").count() >= 2, "{told:?}");

    let loaded = daemon.cli(&["load", "unwanted"]).await?;
    ensure!(loaded.code == Some(0), "{loaded:?}\n{}", daemon.account());
    let daemon = daemon.kill_for_another().await?.start().await?;
    daemon.loaded("unwanted").await?;
    daemon.loaded("by-hand").await?;
    daemon.stop().await
}

/// A crash loop is no fresh start for the next daemon: the first failure there is tried again at the cap.
async fn a_crash_loop_goes_on(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?
        .plugin(&BundleBuilder::hostile("crashes", &["exits-at-once", "1"]))?
        // The window is long: the machine may be slow.
        .toml(
            "[plugin.crashes.restart]\ninitial_delay_ms = 40\nmax_delay_ms = 600000\ncrash_loop_exits = 3\n\
             crash_loop_window_ms = 3600000",
        )
        .start()
        .await?;
    told(&daemon, "plugin.crashloop", "crashes").await?;
    let looping = |plugin: &plugvisor_proto::admin::v1::PluginStatus| plugin.crash_loop;
    let before = daemon.until("crashes", "in a crash loop", looping).await?;
    let status = daemon.cli(&["status"]).await?;
    says("status", &status.stdout, &["FAILED (crash loop)"])?;
    written(daemon.world(), "SELECT count(*) FROM plugin WHERE name = 'crashes' AND crash_loop = 1", 1).await?;
    let daemon = daemon.kill_for_another().await?.start().await?;
    let after = daemon.until("crashes", "in a crash loop", looping).await?;
    // The start of another daemon is no restart after a failure, and what was only scheduled was not made.
    ensure!(after.restarts == before.restarts, "{before:?} {after:?}");
    let scheduled = told_at_the_cap(&daemon).await?;
    ensure!(scheduled >= 300_000.0, "tried again after {scheduled} ms: its failures were forgotten");
    ensure!(!daemon.events().all().iter().any(|event| events::is(event, "plugin.crashloop", "crashes")), "told twice");
    daemon.stop().await
}

async fn told_at_the_cap(daemon: &plugvisor_tests::Daemon) -> anyhow::Result<f64> {
    let event =
        daemon.events().wait("the restart", |event| events::is(event, "plugin.restart_scheduled", "crashes")).await?;
    events::number(&event, "delay_ms").context("no delay")
}

/// A damaged file is moved aside and begun anew from the configuration, and everybody is told.
async fn a_damaged_state_is_begun_anew(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?.start().await?;
    daemon.loaded("echo").await?;
    let unload = daemon.cli(&["unload", "echo"]).await?;
    ensure!(unload.code == Some(0), "{unload:?}");
    let world = daemon.stop_for_another().await?;
    fs::write(world.state().join("state.db"), "no database")?;
    let daemon = world.start().await?;
    // As the configuration says: that it was unloaded is lost.
    daemon.loaded("echo").await?;
    let rebuilt =
        daemon.events().wait("the loss", |event| events::short_type(event) == "supervisor.state_rebuilt").await?;
    ensure!(!rebuilt.hint.is_empty(), "{rebuilt:?}");
    daemon.prints(&["damaged"]).await?;
    let status = daemon.cli(&["status"]).await?;
    says("status", &status.stdout, &["damaged", "state.db.corrupt-", "begun anew"])?;
    daemon.stop().await
}

/// While another process holds the file, what must be remembered is refused after a while; plugins serve on.
async fn a_held_state_refuses_commands_and_nothing_else(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?.start().await?;
    daemon.loaded("echo").await?;
    let holder = rusqlite::Connection::open(daemon.world().state().join("state.db"))?;
    // The daemon may be writing at this moment.
    holder.busy_timeout(events::patience())?;
    holder.execute_batch("BEGIN IMMEDIATE")?;
    let unload = daemon.cli(&["unload", "echo", "--timeout", "60s"]).await?;
    ensure!(unload.code != Some(0), "{unload:?}");
    says("unload", &unload.stderr, &["resource.state_locked", "another process"])?;
    daemon.echo().say(SayRequest::default()).await?;
    daemon.loaded("echo").await?;
    let read_only =
        daemon.events().wait("the trouble", |event| events::short_type(event) == "supervisor.state_read_only").await?;
    ensure!(read_only.reason == "locked", "{read_only:?}");
    holder.execute_batch("COMMIT")?;
    daemon.events().wait("the end of it", |event| events::short_type(event) == "supervisor.state_recovered").await?;
    let unload = daemon.cli(&["unload", "echo"]).await?;
    ensure!(unload.code == Some(0), "{unload:?}");
    drop(holder);
    daemon.stop().await
}

/// A second daemon on the same state is refused and named the first; a later version's state is refused, exit code 78.
async fn a_state_that_cannot_be_used_is_refused(lane: Lane) -> anyhow::Result<()> {
    let first = world(lane)?.start().await?;
    let loaded = first.loaded("echo").await?;
    let second = world(lane)?.state_directory(&first.world().state()).start_refused().await?;
    ensure!(second.code == Some(74), "{second:?}");
    says(
        "the refusal",
        &second.stderr,
        &["another supervisor", &first.status().await?.supervisor.context("no status")?.pid.to_string()],
    )?;
    ensure!(first.loaded("echo").await?.pid == loaded.pid, "the first one's plugin was disturbed");
    first.echo().say(SayRequest::default()).await?;

    let world = first.stop_for_another().await?;
    let file = world.state().join("state.db");
    rusqlite::Connection::open(&file)?.execute_batch("PRAGMA user_version = 9")?;
    let refused = world.start_refused().await?;
    ensure!(refused.code == Some(78), "{refused:?}");
    says("the refusal", &refused.stderr, &["state.db", "version 9", "start the Plugvisor that wrote it"])?;

    // The last line is what people read: what the launcher refuses is named there too.
    let refused = world.launcher_policy("version = 2\n")?.start_refused().await?;
    ensure!(refused.code == Some(78), "{refused:?}");
    let last = refused.stderr.lines().last().unwrap_or_default();
    says("the last line", last, &["the launcher refused how it was started", "plugvisor-launcher", "state.db"])?;
    says("the refusal", &refused.stderr, &["line 1: version: is 2"])?;

    if matches!(lane, Lane::Privileged) {
        let world = crate::world(lane)?;
        let closed = world.path().join("closed");
        fs::create_dir(&closed)?;
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o700))?;
        let refused = world.state_directory(&closed.join("state")).start_refused().await?;
        ensure!(refused.code == Some(74), "{refused:?}");
        let last = refused.stderr.lines().last().unwrap_or_default();
        says("the last line", last, &["may not enter", &closed.display().to_string(), "chmod o+x"])?;
        ensure!(!last.contains("launcher"), "{refused:?}");
    }
    Ok(())
}

scenarios!(
    an_operators_word_holds,
    a_crash_loop_goes_on,
    a_damaged_state_is_begun_anew,
    a_held_state_refuses_commands_and_nothing_else,
    a_state_that_cannot_be_used_is_refused,
);
