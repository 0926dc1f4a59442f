//! Plugins that call each other in a circle, or too far: the path is the broker's, and it ends.

use anyhow::ensure;
use plugvisor_tests::{
    BundleBuilder, Daemon, Lane,
    contract::{Chain, act_request::Deed},
    events, scenarios,
};

use crate::{says, world};

/// The most plugins that a call may have passed through when it is made.
const HOPS: usize = 8;

/// Has the first of these plugins call the second, and so on; what the first one answered.
async fn along(daemon: &Daemon, path: &[&str]) -> anyhow::Result<String> {
    let tokens = path[1..].iter().map(ToString::to_string).collect();
    Ok(daemon.act(path[0], Deed::Chain(Chain { tokens })).await?.text)
}

/// A → B → A, A → B → C → A and A → A, by the plugins themselves: each is refused with its path, an event tells it, and
/// the way to the last of them is open.
async fn calls_in_a_circle_end(lane: Lane) -> anyhow::Result<()> {
    let mut world = world(lane)?.grants(&["api:internal-calls"]);
    for name in ["a", "b", "c"] {
        world = world.plugin(&BundleBuilder::hostile(name, &["echo"]).capabilities(&["api:internal-calls"]))?;
    }
    let daemon = world.start().await?;
    for name in ["echo", "a", "b", "c"] {
        daemon.loaded(name).await?;
    }
    let neighbour = daemon.neighbour();
    // Whether it is told: of one caller's refusals there is an event a second, so that nobody floods their readers.
    for (path, shown, is_told) in [
        (&["a", "b", "a"][..], "a -> b -> a", true),
        (&["a", "b", "c", "a"], "a -> b -> c -> a", true),
        (&["a", "b", "c", "b"], "b -> c -> b", false),
        (&["c", "c"], "c -> c", false),
    ] {
        let answer = along(&daemon, path).await?;
        says(&format!("{path:?}"), &answer, &["FailedPrecondition Loop", shown])?;
        let rejected =
            |event: &_| events::short_type(event) == "broker.loop_rejected" && events::data_text(event).contains(shown);
        if is_told {
            daemon.events().wait(&format!("the loop {shown}"), rejected).await?;
        }
    }
    let answer = along(&daemon, &["a", "b", "c"]).await?;
    ensure!(answer == "reached by a,b", "{answer}");
    neighbour.finish().await?;
    daemon.stop().await
}

/// Ten plugins in a row: the eighth may still call the ninth, which may call nobody.
async fn a_call_goes_so_far_and_no_further(lane: Lane) -> anyhow::Result<()> {
    let names: Vec<String> = (1..=HOPS + 2).map(|number| format!("p{number}")).collect();
    let mut world = world(lane)?.grants(&["api:internal-calls"]);
    for name in &names {
        world = world.plugin(&BundleBuilder::hostile(name, &["echo"]).capabilities(&["api:internal-calls"]))?;
    }
    let daemon = world.start().await?;
    for name in &names {
        daemon.loaded(name).await?;
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let answer = along(&daemon, &names[..=HOPS]).await?;
    ensure!(answer == format!("reached by {}", names[..HOPS].join(",")), "{answer}");
    let answer = along(&daemon, &names).await?;
    says("the call of the ninth", &answer, &["FailedPrecondition Loop"])?;
    let ninth = along(&daemon, &names[HOPS..]).await?;
    ensure!(ninth == "reached by p9", "on a way of its own it may: {ninth}");
    daemon.stop().await
}

scenarios!(calls_in_a_circle_end, a_call_goes_so_far_and_no_further);
