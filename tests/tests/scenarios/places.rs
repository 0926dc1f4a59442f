//! What the daemon itself cannot have: a port, a runtime directory, a right. It refuses, names it, and harms nobody.

use anyhow::ensure;
use plugvisor_proto::admin::v1::PluginState;
use plugvisor_tests::{Lane, World, contract::SayRequest, scenarios};
use rustix::process::Signal;

use crate::{says, told, world};

/// A second daemon whose port the first one has.
async fn a_taken_port_is_named(lane: Lane) -> anyhow::Result<()> {
    let first = world(lane)?.start().await?;
    first.loaded("echo").await?;
    let neighbour = first.neighbour();
    let address = first.metrics_address().to_owned();
    let second = world(lane)?.metrics_address(&address).start_refused().await?;
    ensure!(second.code == Some(74), "{second:?}");
    says("the refusal", &second.stderr, &[&address, "metrics_address"])?;
    neighbour.finish().await?;
    first.stop().await
}

/// A second daemon on the first one's runtime directory: nothing is stolen.
async fn a_taken_runtime_directory_is_named(lane: Lane) -> anyhow::Result<()> {
    let first = world(lane)?.start().await?;
    first.loaded("echo").await?;
    let neighbour = first.neighbour();
    let runtime = first.world().runtime();
    let second = world(lane)?.runtime_directory(&runtime).start_refused().await?;
    ensure!(second.code == Some(74), "{second:?}");
    let pid = first.process().pid.to_string();
    says("the refusal", &second.stderr, &["another supervisor", &pid, &runtime.to_string_lossy()])?;
    neighbour.finish().await?;
    // Its sockets are still the first one's: a new connection is answered.
    first.echo().say(SayRequest::default()).await?;
    first.status().await?;
    first.stop().await
}

/// A killed supervisor leaves its sockets; the next one takes the directory over.
async fn a_dead_supervisors_directory_is_taken_over(lane: Lane) -> anyhow::Result<()> {
    let mut first = world(lane)?.start().await?;
    first.loaded("echo").await?;
    let remains = first.remains();
    first.process().signal(Signal::KILL)?;
    ensure!(first.ended().await?.is_none(), "a signal ended it");
    remains.gone().await?;
    ensure!(first.world().runtime().join("admin.sock").exists(), "there is nothing stale to be tested");
    let second = world(lane)?.runtime_directory(&first.world().runtime()).start().await?;
    second.loaded("echo").await?;
    second.stop().await
}

/// Without the right to make cgroups no limit holds: refused by name, with the fix, unless the operator allows it.
async fn a_wall_that_cannot_be_built_is_named(lane: Lane) -> anyhow::Result<()> {
    let probed = World::new(lane)?.start().await?;
    let features = probed.status().await?.supervisor.unwrap_or_default().features;
    probed.stop().await?;
    let daemon = world(lane)?.allow_degraded(&[]).start().await?;
    let lacking: Vec<_> = features.iter().filter(|feature| !feature.works).collect();
    if lacking.is_empty() {
        // This host can do everything: then nothing may be refused either.
        let status = daemon.loaded("echo").await?;
        ensure!(status.last_error.is_empty(), "{status:?}");
        return daemon.stop().await;
    }
    for feature in &lacking {
        ensure!(!feature.detail.is_empty(), "no reason why {} does not work", feature.name);
    }
    let event = told(&daemon, "plugin.gave_up", "echo").await?;
    ensure!(event.reason == "isolation.control_unavailable", "{event:?}");
    let status = daemon.in_state("echo", PluginState::Failed).await?;
    let text = format!("{} {}", status.last_error, status.hint);
    ensure!(lacking.iter().any(|feature| text.contains(&feature.name)), "{text} names none of {lacking:?}");
    says("the refusal", &text, &["allow_degraded"])?;
    ensure!(status.pid == 0, "{status:?}");
    daemon.stop().await
}

/// What the operator allows to be missing is shown for as long as it is.
async fn a_degraded_wall_is_shown(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?.start().await?;
    daemon.loaded("echo").await?;
    let supervisor = daemon.status().await?.supervisor.unwrap_or_default();
    let mut lacking: Vec<_> =
        supervisor.features.iter().filter(|feature| !feature.works).map(|feature| feature.name.clone()).collect();
    let mut shown = supervisor.degraded.clone();
    lacking.sort();
    shown.sort();
    ensure!(shown == lacking, "the host lacks {lacking:?}, the status shows {shown:?}");
    if !lacking.is_empty() {
        told(&daemon, "security.sandbox_degraded", "echo").await?;
    }
    let described = daemon.describe("echo").await?;
    ensure!(!described.controls.is_empty(), "no controls");
    for control in &described.controls {
        let held = !control.enforced.is_empty();
        ensure!(held != lacking.contains(&control.name), "{control:?}, while the host lacks {lacking:?}");
        ensure!(held || !control.unavailable.is_empty(), "no reason: {control:?}");
        ensure!(!held || !control.read_from.is_empty(), "read from nowhere: {control:?}");
    }
    daemon.stop().await
}

/// A typing error in the configuration: line, key, suggestion, exit code 78.
async fn a_wrong_configuration_is_explained(lane: Lane) -> anyhow::Result<()> {
    let refused = world(lane)?.toml("[plugin.echo]\nlaod = \"manual\"").start_refused().await?;
    ensure!(refused.code == Some(78), "{refused:?}");
    says("the refusal", &refused.stderr, &["laod", "load", "plugvisor.toml"])
}

scenarios!(
    a_taken_port_is_named,
    a_taken_runtime_directory_is_named,
    a_dead_supervisors_directory_is_taken_over,
    a_wall_that_cannot_be_built_is_named,
    a_degraded_wall_is_shown,
    a_wrong_configuration_is_explained,
);
