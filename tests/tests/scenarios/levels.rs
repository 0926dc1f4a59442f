//! The isolation levels through the whole product: asked for by a manifest, or chosen by a tier; shown, and serving.

use std::path::Path;

use anyhow::ensure;
use plugvisor_proto::admin::v1::{DescribePluginResponse, PluginState};
use plugvisor_tests::{
    BundleBuilder, Lane, World,
    contract::{RelayRequest, SayRequest, act_request::Deed, polyglot_service_client::PolyglotServiceClient},
    scenarios,
};

use crate::{says, world};

/// What an ordinary user also lacks at NONE, where no PID namespace ends a plugin as a whole.
const LACKING_AT_NONE: [&str; 3] = ["pids-limit", "whole-kill", "dies-with-launcher"];

/// A control that a level has and the one below has not.
const MARKS: [(&str, Option<&str>); 4] = [
    ("none", None),
    ("process", Some("seccomp")),
    ("container", Some("uts-namespace")),
    ("sandbox", Some("single-exec")),
];

/// The controls are those of the level, and each that is not enforced says why.
fn has_the_walls_of(level: &str, plugin: &DescribePluginResponse) -> anyhow::Result<()> {
    let status = plugin.status.clone().unwrap_or_default();
    ensure!(status.isolation_level == level, "{} instead of {level}: {status:?}", status.isolation_level);
    let reached = MARKS.iter().position(|(name, _)| *name == level).unwrap_or_default();
    for (at, (name, mark)) in MARKS.iter().enumerate() {
        let Some(mark) = mark else { continue };
        let control = plugin.controls.iter().find(|control| control.name == *mark);
        ensure!(control.is_some() == (at <= reached), "{mark} of {name} at {level}: {:?}", plugin.controls);
        ensure!(control.is_none_or(|control| !control.enforced.is_empty()), "not enforced: {control:?}");
    }
    for control in &plugin.controls {
        ensure!(control.enforced.is_empty() != control.unavailable.is_empty(), "{control:?}");
    }
    Ok(())
}

/// A manifest that says nothing gets the weakest walls of its tier, and never less than PROCESS.
async fn tiers_choose_the_level(lane: Lane) -> anyhow::Result<()> {
    let tiers =
        [("internal", "process"), ("verified", "process"), ("community", "container"), ("untrusted", "sandbox")];
    for (tier, level) in tiers {
        let daemon = world(lane)?.tier(tier).start().await?;
        daemon.loaded("echo").await?;
        has_the_walls_of(level, &daemon.describe("echo").await?)?;
        let said = daemon.echo().say(SayRequest { text: tier.to_owned() }).await?.into_inner();
        ensure!(said.text == tier, "{said:?}");
        daemon.stop().await?;
    }
    Ok(())
}

/// Plugins of every level beside each other, calling each other; a new supervisor takes over those whose level is still
/// the one that they have.
async fn manifests_ask_for_a_level(lane: Lane) -> anyhow::Result<()> {
    let mut world = World::new(lane)?.tier("internal").grants(&["api:internal-calls"]).also_allow(&LACKING_AT_NONE);
    for (level, _) in MARKS {
        let bundle = BundleBuilder::hostile(level, &["echo"]).capabilities(&["api:internal-calls"]);
        world = world.plugin(&bundle.set("/security/sandbox/isolationLevel", level))?;
    }
    let daemon = world.plugin(&BundleBuilder::echo("echo"))?.start().await?;
    daemon.loaded("echo").await?;
    for (level, _) in MARKS {
        daemon.loaded(level).await?;
        has_the_walls_of(level, &daemon.describe(level).await?)?;
        let said = daemon.act(level, Deed::Call("/plugvisor.test.v1.EchoService/Say".to_owned())).await?.text;
        ensure!(said == format!("ok caller={level}"), "{level}: {said}");
        let shown = daemon.cli(&["describe", level]).await?;
        says(&format!("describe {level}"), &shown.stdout, &["Isolation", level, "own-uid", "whole-kill"])?;
    }
    let wide = daemon.cli(&["status", "-o", "wide"]).await?;
    says("status", &wide.stdout, &["none", "process", "container", "sandbox"])?;
    daemon.stop().await
}

/// The tier's level is not weakened by a manifest that asks for less.
async fn a_manifest_cannot_weaken_its_tier(lane: Lane) -> anyhow::Result<()> {
    let asks = BundleBuilder::hostile("asks", &["echo"]).set("/security/sandbox/isolationLevel", "none");
    let off = BundleBuilder::hostile("off", &["echo"]).set("/security/sandbox/enabled", false);
    let daemon = world(lane)?.tier("untrusted").plugin(&asks)?.plugin(&off)?.start().await?;
    for name in ["asks", "off"] {
        daemon.loaded(name).await?;
        has_the_walls_of("sandbox", &daemon.describe(name).await?)?;
    }
    daemon.stop().await
}

/// Without a cgroup, nothing runs at NONE unless the operator says so; the error names what and the way out.
async fn none_without_a_cgroup_is_refused(lane: Lane) -> anyhow::Result<()> {
    let bundle = BundleBuilder::hostile("bare", &["echo"]).set("/security/sandbox/isolationLevel", "none");
    let daemon = world(lane)?.tier("internal").plugin(&bundle)?.start().await?;
    let doctor = daemon.cli(&["doctor"]).await?;
    says("doctor", &doctor.stdout, &["Levels", "none", "process", "container", "sandbox", "vm"])?;
    if doctor.stdout.contains("whole-kill at none") {
        let status = daemon.in_state("bare", PluginState::Failed).await?;
        says("the refusal", &status.last_error, &["whole-kill", "level none", "cgroup"])?;
        ensure!(!status.hint.is_empty() && status.pid == 0, "{status:?}");
    } else {
        daemon.loaded("bare").await?;
    }
    daemon.stop().await
}

/// A plugin in Python behind the allow-list.
async fn an_interpreter_serves_at_sandbox(lane: Lane) -> anyhow::Result<()> {
    if !Path::new(crate::polyglot::GRPCIO).exists() {
        println!("SKIP polyglot: there is no {}; install the package python3-grpcio", crate::polyglot::GRPCIO);
        return Ok(());
    }
    let python = BundleBuilder::polyglot("polyglot").set("/security/sandbox/isolationLevel", "sandbox");
    let daemon = world(lane)?.plugin(&python)?.grants(&["api:internal-calls"]).start().await?;
    daemon.loaded("polyglot").await?;
    has_the_walls_of("sandbox", &daemon.describe("polyglot").await?)?;
    let mut polyglot = PolyglotServiceClient::new(daemon.calls());
    let answer = polyglot.relay(RelayRequest { text: "grüße".to_owned() }).await?.into_inner();
    ensure!(answer.text == "grüße" && answer.seen_as == "polyglot", "{answer:?}");
    daemon.stop().await
}

scenarios!(
    tiers_choose_the_level,
    manifests_ask_for_a_level,
    a_manifest_cannot_weaken_its_tier,
    none_without_a_cgroup_is_refused,
    an_interpreter_serves_at_sandbox
);
