//! `plugvisor plugin trace` of a real bundle: what it proposes is what the bundle then runs with.

use std::{path::Path, process::Command};

use anyhow::{Context, ensure};
use plugvisor_tests::{Binaries, BundleBuilder, Lane, World, scenarios};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tonic::{client::Grpc, transport::Endpoint};

const RENDER: &str = "plugvisor.examples.markdown.v1.MarkdownService/Render";

/// The example as it is shipped, but for what is set here.
fn markdown(security: &[(&str, Value)]) -> anyhow::Result<BundleBuilder> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../worker-sdk/examples/bundles/markdown/plugin.json");
    let manifest = serde_json::from_slice(&std::fs::read(source)?)?;
    let printed = Command::new(Binaries::find()?.path("markdown")?).arg("--descriptor-set").output()?;
    let bundle = BundleBuilder::from_binary("markdown", "markdown", manifest, Some(printed.stdout));
    Ok(security.iter().fold(bundle, |bundle, (path, value)| bundle.set(path, value.clone())))
}

#[derive(Clone, PartialEq, prost::Message)]
struct RenderRequest {
    #[prost(string, tag = "1")]
    markdown: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RenderResponse {
    #[prost(string, tag = "1")]
    html: String,
}

/// Calls the plugin itself, without a supervisor.
async fn render(worker: &str) -> anyhow::Result<String> {
    let channel = Endpoint::from_shared(format!("unix:{worker}"))?.connect().await?;
    let mut client = Grpc::new(channel);
    client.ready().await?;
    let codec = tonic_prost::ProstCodec::<RenderRequest, RenderResponse>::default();
    let path = http::uri::PathAndQuery::from_maybe_shared(format!("/{RENDER}"))?;
    let request = tonic::Request::new(RenderRequest { markdown: "*driven*".to_owned() });
    Ok(client.unary(request, path, codec).await?.into_inner().html)
}

/// Traces the example while it is called, and gives what was said.
async fn traced(world: &World, bundle: &Path) -> anyhow::Result<Value> {
    // Its driver says where the plugin is, and ends with standard input.
    let driver = ["--", "sh", "-c", "echo worker $PLUGVISOR_WORKER; read nothing"];
    let mut trace = world.trace(bundle, &driver)?.spawn().context("the tool starts")?;
    let mut said = BufReader::new(trace.stderr.take().context("no stderr")?).lines();
    let mut all = Vec::new();
    let worker = loop {
        let line = said.next_line().await?.with_context(|| format!("it ended: {all:?}"))?;
        if let Some(worker) = line.strip_prefix("worker ") {
            break worker.to_owned();
        }
        all.push(line);
    };
    ensure!(all.first().is_some_and(|line| line.contains("WEAKER WALLS")), "{all:?}");
    ensure!(all.iter().any(|line| line == "markdown serves"), "{all:?}");
    ensure!(render(&worker).await?.contains("<em>driven</em>"), "it was called");
    let mut input = trace.stdin.take().context("no stdin")?;
    input.write_all(b"\n").await?;
    drop(input);
    let output = trace.wait_with_output().await?;
    ensure!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).with_context(|| format!("{output:?}"))
}

async fn a_real_bundle_runs_with_what_its_trace_proposes(lane: Lane) -> anyhow::Result<()> {
    let world = World::new(lane)?;
    let directory = world.path().join("traced");
    let asked = [("/security/capabilities", json!(["filesystem:write-temp", "process:spawn-child"]))];
    let bundle = markdown(&asked)?.write(&directory, world.binaries())?;
    let said = traced(&world, &bundle).await?;
    let proposal = json!({ "security": { "capabilities": [], "sandbox": { "isolationLevel": "sandbox" } } });
    ensure!(said["proposal"] == proposal, "{said:#}");
    ensure!(said["unused"] == json!(["filesystem:write-temp", "process:spawn-child"]), "{said:#}");
    ensure!(said["outside"] == json!([]) && said["ended"] == "its driver ended", "{said:#}");
    ensure!(said["requested"]["level"] == "process" && said["calls"].as_u64() > Some(50), "{said:#}");
    let security = &said["proposal"]["security"];
    let applied = [
        ("/security/capabilities", security["capabilities"].clone()),
        ("/security/sandbox/isolationLevel", security["sandbox"]["isolationLevel"].clone()),
    ];
    let daemon = World::new(lane)?.plugin(&markdown(&applied)?)?.start().await?;
    let loaded = daemon.loaded("markdown").await?;
    let described = daemon.describe("markdown").await?;
    ensure!(described.controls.iter().any(|control| control.name == "single-exec"), "{:?}", described.controls);
    let called = daemon.cli(&["call", RENDER, "--json", r#"{"markdown": "*driven*"}"#]).await?;
    ensure!(called.code == Some(0) && called.stdout.contains("<em>driven</em>"), "{called:?}");
    ensure!(loaded.restarts == 0, "{loaded:?}");
    daemon.stop().await
}

/// What a plugin only tried, and served without to the end, is no need of it. When it did not come to an end that others
/// made, nobody knows.
async fn what_was_survived_is_proposed_as_optional(lane: Lane) -> anyhow::Result<()> {
    let world = World::new(lane)?;
    let bundle = BundleBuilder::hostile("probes", &["probes"]).write(&world.path().join("traced"), world.binaries())?;
    let tried = json!(["network:tcp-server", "filesystem:read-config"]);
    for (driver, survived) in [("true", true), ("false", false)] {
        let output = world.trace(&bundle, &["--", driver])?.output().await?;
        let said: Value = serde_json::from_slice(&output.stdout).with_context(|| format!("{output:?}"))?;
        let (needed, optional) = if survived { (json!([]), tried.clone()) } else { (tried.clone(), json!([])) };
        ensure!(said["proposal"]["security"]["capabilities"] == needed, "{said:#}");
        ensure!(said["survivedWithout"] == optional, "{said:#}");
        ensure!(said["proposal"]["runtime"].is_null() == survived, "a port is for who asks for it: {said:#}");
    }
    Ok(())
}

/// A plugin that ends by itself ends its trace, and the time that was given does.
async fn a_trace_ends(lane: Lane) -> anyhow::Result<()> {
    let world = World::new(lane)?;
    let directory = world.path().join("traced");
    let bundle = markdown(&[])?.write(&directory, world.binaries())?;
    let timed = world.trace(&bundle, &["--for", "100ms"])?.output().await?;
    let said: Value = serde_json::from_slice(&timed.stdout).with_context(|| format!("{timed:?}"))?;
    ensure!(timed.status.success() && said["ended"] == "its time was over", "{timed:?}");

    let exits = BundleBuilder::echo("exits")
        .entry_bytes(&b"#!/bin/sh\nexit 3\n"[..], 0o755)
        .write(&directory, world.binaries())?;
    let ended = world.trace(&exits, &[])?.output().await?;
    let said: Value = serde_json::from_slice(&ended.stdout).with_context(|| format!("{ended:?}"))?;
    ensure!(ended.status.code() == Some(1) && said["ended"] == "it exited with 3", "{ended:?}");
    ensure!(String::from_utf8_lossy(&ended.stderr).contains("ended before it served"), "{ended:?}");

    let failed = world.trace(&bundle, &["--", "false"])?.output().await?;
    let told = String::from_utf8_lossy(&failed.stderr);
    ensure!(failed.status.code() == Some(1) && told.contains("its driver, which ended with"), "{failed:?}");
    let nobody = world.trace(&bundle, &["--", "/nowhere/driver"])?.output().await?;
    let told = String::from_utf8_lossy(&nobody.stderr);
    ensure!(nobody.status.code() == Some(1) && told.contains("the driver /nowhere/driver cannot be started"), "{told}");
    Ok(())
}

scenarios!(a_real_bundle_runs_with_what_its_trace_proposes, what_was_survived_is_proposed_as_optional, a_trace_ends);
