//! Scenarios against the real daemon, launcher, command line and plugins, in both lanes.
//!
//! Each test starts a daemon of its own, awaits what it says, and stops it with nothing left behind.

mod alone;
mod answers;
mod bundles;
mod calls;
mod egress;
mod faults;
mod floods;
mod grants;
mod ingress;
mod levels;
mod life;
mod looks;
mod machines;
mod operator;
mod order;
mod outlives;
mod places;
mod polyglot;
mod restart;
mod rings;
mod starts;
mod takeover;
mod traced;
mod traces;

use anyhow::{Context, ensure};
use plugvisor_proto::event::v1::Event;
use plugvisor_tests::{BundleBuilder, Daemon, Lane, World, events};

/// A world with the good citizen in it.
fn world(lane: Lane) -> anyhow::Result<World> {
    World::new(lane)?.plugin(&BundleBuilder::echo("echo"))
}

/// Waits for an event of this type about this plugin that says something to do.
async fn told(daemon: &Daemon, kind: &str, plugin: &str) -> anyhow::Result<Event> {
    let event = daemon
        .events()
        .wait(&format!("{kind} of {plugin}"), |event| events::is(event, kind, plugin))
        .await
        .with_context(|| daemon.printed())?;
    ensure!(!event.reason.is_empty(), "an event without a reason: {event:?}");
    ensure!(!event.hint.is_empty(), "{kind} of {plugin} does not say what to do: {event:?}");
    Ok(event)
}

/// Waits until the state file answers a query with this number: what is noted is written a moment after it has happened,
/// and a supervisor that is killed before remembers the state of before.
async fn written(world: &World, query: &str, wanted: u32) -> anyhow::Result<()> {
    let state = rusqlite::Connection::open(world.state().join("state.db"))?;
    state.busy_timeout(events::patience())?;
    let deadline = tokio::time::Instant::now() + events::patience();
    loop {
        let found: u32 = state.query_row(query, [], |row| row.get(0))?;
        if found == wanted {
            return Ok(());
        }
        ensure!(tokio::time::Instant::now() < deadline, "{query} gives {found}, not {wanted}");
        // Another process' commit is no event.
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// Asserts that a text has all of these words in it.
fn says(what: &str, text: &str, words: &[&str]) -> anyhow::Result<()> {
    for word in words {
        ensure!(text.contains(word), "{what} does not say {word:?}: {text}");
    }
    Ok(())
}
