//! Who is loaded and unloaded before whom, and whose failure is everybody's.

use anyhow::{Context, ensure};
use plugvisor_proto::{admin::v1::PluginState, event::v1::Event};
use plugvisor_tests::{BundleBuilder, Daemon, Lane, events, scenarios};
use serde_json::json;

use crate::{says, told, world};

fn needs(name: &str, dependencies: &[&str]) -> BundleBuilder {
    BundleBuilder::hostile(name, &["echo"]).set("/dependencies", json!(dependencies))
}

/// Where in the daemon's log the first event of this type about each of these plugins is. Events come by a stream of their
/// own, so an answer to a command may be here before the events that it told of: each is awaited.
async fn places(daemon: &Daemon, kind: &str, plugins: &[&str]) -> anyhow::Result<Vec<u64>> {
    let mut places = Vec::with_capacity(plugins.len());
    for plugin in plugins {
        let what = format!("{kind} of {plugin}");
        let found = daemon.events().wait(&what, |event: &Event| events::is(event, kind, plugin)).await?;
        places.push(found.sequence);
    }
    Ok(places)
}

/// Dependencies first, then loadOrder; unloading goes the other way round.
async fn order_is_kept(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?
        .plugin(&needs("web", &["api"]))?
        .plugin(&needs("api", &["db"]))?
        .plugin(&needs("db", &[]).set("/loadOrder", 5))?
        .plugin(&needs("first", &[]).set("/loadOrder", -5))?
        .supervisor("parallel_starts = 1")
        .start()
        .await?;
    for name in ["web", "api", "db", "first", "echo"] {
        daemon.loaded(name).await?;
    }
    let starts = places(&daemon, "plugin.starting", &["first", "echo", "db", "api", "web"]).await?;
    ensure!(starts.is_sorted(), "{starts:?}\n{}", daemon.account());
    // One place: nobody starts before the one before is loaded.
    let ready = places(&daemon, "plugin.ready", &["first"]).await?;
    ensure!(ready[0] < starts[1], "{}", daemon.account());
    told_waiting(&daemon, "web").await?;

    let refused = daemon.cli(&["unload", "db"]).await?;
    ensure!(refused.code == Some(1), "{refused:?}");
    says("unload db", &refused.stderr, &["dependency.required", "web, api", "--cascade"])?;
    daemon.loaded("db").await?;
    let cascade = daemon.cli(&["unload", "db", "--cascade"]).await?;
    ensure!(cascade.code == Some(0), "{cascade:?}\n{}", daemon.account());
    says("unload db", &cascade.stdout, &["unloaded web, which", "unloaded api, which", "unloaded db "])?;
    let ends = places(&daemon, "plugin.unloaded", &["web", "api", "db"]).await?;
    ensure!(ends.is_sorted(), "{ends:?}\n{}", daemon.account());
    daemon.loaded("first").await?;
    daemon.stop().await
}

async fn told_waiting(daemon: &Daemon, plugin: &str) -> anyhow::Result<()> {
    daemon.events().wait("that it waits", |event| events::is(event, "dependency.waiting", plugin)).await?;
    daemon.events().wait("that it need not wait", |event| events::is(event, "dependency.satisfied", plugin)).await?;
    Ok(())
}

/// A circle is refused with its path; a plugin that is not there is named; the others are loaded.
async fn circles_and_gaps_are_named(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?
        .plugin(&needs("a", &["b"]))?
        .plugin(&needs("b", &["c"]))?
        .plugin(&needs("c", &["a"]))?
        .plugin(&needs("lonely", &["nobody"]))?
        .start()
        .await?;
    daemon.loaded("echo").await?;
    let rejected = told(&daemon, "dependency.cycle_rejected", "b").await?;
    says("the event", &events::data_text(&rejected), &["b", "c", "a"])?;
    let failed = daemon.in_state("a", PluginState::Failed).await?;
    says("the error", &failed.last_error, &["a → b → c → a"])?;
    let failed = daemon.in_state("lonely", PluginState::Failed).await?;
    says("the error", &failed.last_error, &["nobody"])?;
    daemon.stop().await
}

/// Dependents hear that what they depend on is gone and that it is back, and run on.
async fn dependents_are_told(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?
        .plugin(&needs("db", &[]))?
        .plugin(&needs("api", &["db"]))?
        .toml("[plugin.db.restart]\ninitial_delay_ms = 10")
        .start()
        .await?;
    let before = daemon.loaded("api").await?;
    let db = daemon.loaded("db").await?;
    let mark = daemon.now().await?;
    plugvisor_tests::Process::open(db.pid).context("db does not run")?.signal(rustix::process::Signal::KILL)?;
    let lost =
        daemon.events().wait_after(mark, "the loss", |event| events::is(event, "dependency.lost", "api")).await?;
    says("the event", &events::data_text(&lost), &["db"])?;
    daemon.events().wait_after(mark, "the return", |event| events::is(event, "dependency.satisfied", "api")).await?;
    let after = daemon.loaded("api").await?;
    ensure!(after.pid == before.pid, "{before:?} {after:?}");
    daemon.stop().await
}

/// A critical plugin that does not serve makes the host not ready, with the reason; one that is not critical does not.
async fn a_critical_failure_is_the_hosts(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?
        .plugin(&BundleBuilder::hostile("vital", &["echo"]).set("/critical", true))?
        .plugin(&BundleBuilder::hostile("broken", &["exits-at-once", "78"]))?
        .toml("[plugin.vital.restart]\nenabled = false")
        .start()
        .await?;
    let vital = daemon.loaded("vital").await?;
    daemon.in_state("broken", PluginState::Failed).await?;
    daemon.events().wait("readiness", |event| events::short_type(event) == "supervisor.ready").await?;
    let (code, body) = daemon.http("/readyz").await?;
    ensure!(code == 200, "{code}: {body}");
    let describe = daemon.cli(&["describe", "vital"]).await?;
    says("describe", &describe.stdout, &["Critical"])?;
    ensure!(!describe.stdout.contains("Inactive"), "{describe:?}");

    plugvisor_tests::Process::open(vital.pid).context("vital does not run")?.signal(rustix::process::Signal::KILL)?;
    daemon.in_state("vital", PluginState::Failed).await?;
    let (code, body) = daemon.http("/readyz").await?;
    ensure!(code == 503, "{code}: {body}");
    says("/readyz", &body, &["critical plugin vital is FAILED", "SIGKILL"])?;
    let status = daemon.cli(&["status"]).await?;
    ensure!(status.code == Some(3), "{status:?}");
    says("status", &status.stdout, &["not ready: critical plugin vital is FAILED"])?;
    // What an operator does not want does not make the host not ready.
    let unload = daemon.cli(&["unload", "vital"]).await?;
    ensure!(unload.code == Some(0), "{unload:?}");
    let (code, body) = daemon.http("/readyz").await?;
    ensure!(code == 200, "{code}: {body}");
    daemon.stop().await
}

scenarios!(order_is_kept, circles_and_gaps_are_named, dependents_are_told, a_critical_failure_is_the_hosts);
