//! Plugins that print without end.

use anyhow::{Context, ensure};
use plugvisor_tests::{
    BundleBuilder, Lane,
    contract::{ActRequest, Nothing, SayRequest, act_request::Deed},
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

/// What the daemon may grow by when one of its plugins does its worst to the broker.
const ASSAULT: u64 = 32 * 1024 * 1024;

/// A plugin attacks the broker through its own socket, below HTTP/2, from inside its walls: the others' calls go on, the
/// daemon's memory stays, an event names the plugin, and even its own next call is answered.
async fn an_assault_on_the_broker_is_told_and_harms_nobody(lane: Lane) -> anyhow::Result<()> {
    let attacker = BundleBuilder::hostile("attacker", &["echo"]).capabilities(&["api:internal-calls"]);
    let daemon = world(lane)?
        .plugin(&attacker)?
        .toml("[plugin.attacker]\ngrants = [\"api:internal-calls\"]\nlimits = { call_timeout_ms = 60000 }")
        .start()
        .await?;
    daemon.loaded("echo").await?;
    let before = daemon.loaded("attacker").await?;
    let neighbour = daemon.neighbour();
    let resident = daemon.process().resident_bytes().context("no RSS")?;
    let request = ActRequest { ballast: Vec::new(), deed: Some(Deed::Assault(Nothing {})) };
    let mut request = tonic::Request::new(request);
    request.set_timeout(std::time::Duration::from_secs(60));
    let over = daemon.hostile("attacker").act(request).await.context("the assault")?.into_inner();
    ensure!(over.text == "7", "{over:?}");
    let told = daemon.events().wait("who attacked", |event| {
        events::short_type(event) == "broker.protocol_error" && format!("{event:?}").contains("attacker")
    });
    told.await?;
    let grown = daemon.process().resident_bytes().context("no RSS")?.saturating_sub(resident);
    ensure!(grown < ASSAULT, "the daemon has grown by {grown} bytes");
    let answer = daemon.act("attacker", Deed::Call("/plugvisor.test.v1.EchoService/Say".to_owned())).await?.text;
    ensure!(answer.starts_with("ok"), "{answer}");
    let after = daemon.plugin("attacker").await?;
    ensure!(after.pid == before.pid, "it was restarted: {after:?}");
    neighbour.finish().await?;
    daemon.stop().await
}

scenarios!(a_flood_of_output_drowns_nobody, an_assault_on_the_broker_is_told_and_harms_nobody);
