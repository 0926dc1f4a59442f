//! Plugins that print without end.

use anyhow::{Context, ensure};
use plugvisor_tests::{
    BundleBuilder, Lane,
    contract::{Nothing, SayRequest, act_request::Deed},
    events, scenarios,
};

use crate::world;

/// How much the daemon may grow under two floods: its log rings, and the slack of its allocator.
const GROWTH: u64 = 24 * 1024 * 1024;

/// With and without newlines: the daemon's memory is bounded, the writers are not blocked, lines are dropped and
/// counted, and the others do not notice.
async fn a_flood_of_output_drowns_nobody(lane: Lane) -> anyhow::Result<()> {
    let names = ["floods-lines", "floods-bytes"];
    let mut world = world(lane)?;
    for name in names {
        world = world
            .plugin(&BundleBuilder::hostile(name, &[name]))?
            .toml(&format!("[plugin.{name}]\nload = \"manual\"\nlimits = {{ cpu_percent = 40 }}"));
    }
    let daemon = world.start().await?;
    daemon.loaded("echo").await?;
    let neighbour = daemon.neighbour();
    let resident = daemon.process().resident_bytes().context("no RSS")?;
    for name in names {
        let load = daemon.cli(&["load", name]).await?;
        ensure!(load.code == Some(0), "{load:?}\n{}", daemon.account());
    }
    let dropped = |event: &_| events::is(event, "resource.logs_dropped", "floods-lines");
    let event = daemon.events().wait("dropped lines", dropped).await?;
    ensure!(!event.hint.is_empty(), "{event:?}");
    let mut echo = daemon.echo();
    for round in 0..100 {
        // The flooding thread is never the one that serves: an answer says only that the process is not stuck as a
        // whole, and that the daemon reads its pipes and serves its calls side by side.
        for name in names {
            daemon.act(name, Deed::Nothing(Nothing {})).await.with_context(|| format!("{name}, round {round}"))?;
        }
        echo.say(SayRequest::default()).await?;
        let grown = daemon.process().resident_bytes().context("no RSS")?.saturating_sub(resident);
        ensure!(grown < GROWTH, "in round {round} the daemon had grown by {grown} bytes");
    }
    let logs = daemon.cli(&["logs", "floods-lines", "-n", "5"]).await?;
    ensure!(logs.code == Some(0) && logs.stdout.contains("all work and no play"), "{logs:?}");
    for name in names {
        let status = daemon.loaded(name).await?;
        ensure!(status.restarts == 0, "{status:?}");
    }
    neighbour.finish().await?;
    daemon.stop().await
}

scenarios!(a_flood_of_output_drowns_nobody);
