//! A plugin in Python with grpcio and protobuf alone: what docs/protocol.md says is all that a plugin needs.

use std::path::Path;

use anyhow::{Context, ensure};
use plugvisor_proto::admin::v1::PluginState;
use plugvisor_tests::{
    BundleBuilder, Lane,
    contract::{CountRequest, RelayRequest, act_request::Deed, polyglot_service_client::PolyglotServiceClient},
    scenarios,
};
use tonic::Request;

use crate::{says, world};

/// Where Debian's python3-grpcio is: below /usr, which plugins see.
pub(crate) const GRPCIO: &str = "/usr/lib/python3/dist-packages/grpc/__init__.py";

/// It loads, serves an application, calls a plugin and is called by one, streams, logs, and stops when it is told.
async fn a_plugin_without_an_sdk_is_a_plugin(lane: Lane) -> anyhow::Result<()> {
    if !Path::new(GRPCIO).exists() {
        println!("SKIP polyglot: there is no {GRPCIO}; install the package python3-grpcio");
        return Ok(());
    }
    let daemon = world(lane)?
        .plugin(&BundleBuilder::polyglot("polyglot"))?
        .plugin(&BundleBuilder::hostile("caller", &["echo"]).capabilities(&["api:internal-calls"]))?
        .grants(&["api:internal-calls"])
        .start()
        .await?;
    for name in ["echo", "caller", "polyglot"] {
        daemon.loaded(name).await?;
    }

    let mut polyglot = PolyglotServiceClient::new(daemon.calls());
    let mut request = Request::new(RelayRequest { text: "grüße".to_owned() });
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    request.metadata_mut().insert("traceparent", trace.parse()?);
    let answer = polyglot.relay(request).await?.into_inner();
    ensure!(answer.text == "grüße", "{answer:?}");
    ensure!(answer.seen_as == "polyglot", "the echo was called by another: {answer:?}");
    ensure!(!answer.caller.is_empty() && answer.caller != "polyglot", "{answer:?}");
    ensure!(answer.traceparent.contains("0af7651916cd43dd8448eb211c80319c"), "the trace broke: {answer:?}");

    let mut counted = polyglot.count(CountRequest { up_to: 500 }).await?.into_inner();
    let mut next = 0;
    while let Some(answer) = counted.message().await? {
        ensure!(answer.index == next, "{} after {next}", answer.index);
        next += 1;
    }
    ensure!(next == 500, "the stream ended after {next}");

    // Its own types read the answer: the two contracts share numbers.
    let said = daemon.act("caller", Deed::Call("/plugvisor.test.v1.PolyglotService/Relay".to_owned())).await?.text;
    ensure!(said == "ok caller=caller", "{said}");

    daemon.logged("polyglot", &[], "relayed 'grüße'", 1).await?;
    daemon.stop().await
}

/// What stands on the page between the marker of this file and the end of its block.
fn on_the_page<'p>(page: &'p str, file: &str) -> anyhow::Result<&'p str> {
    let marked = page.split_once(&format!("<!-- least: {file} -->\n```")).with_context(|| format!("no {file}"))?.1;
    let (_language, block) = marked.split_once('\n').context("an empty block")?;
    Ok(block.split_once("```").context("a block without end")?.0)
}

/// The example of docs/protocol.md, as it stands there.
async fn the_plugin_on_the_page_is_one(lane: Lane) -> anyhow::Result<()> {
    if !Path::new(GRPCIO).exists() {
        println!("SKIP polyglot: there is no {GRPCIO}; install the package python3-grpcio");
        return Ok(());
    }
    let page = include_str!("../../../docs/protocol.md");
    let bundle = BundleBuilder::from_binary("least", "hostile-plugin", serde_json::Value::Null, None)
        .raw_manifest(on_the_page(page, "plugin.json")?)
        .entry_bytes(on_the_page(page, "bin/least")?, 0o755);
    let daemon = world(lane)?.plugin(&bundle)?.start().await?;
    daemon.loaded("least").await?;
    daemon.stop().await?;

    // Without the key, the socket is there already.
    let manifest = on_the_page(page, "plugin.json")?.replace(", \"socket\": \"bind\"", "");
    let daemon = world(lane)?.plugin(&bundle.raw_manifest(manifest))?.start().await?;
    let failed = daemon.in_state("least", PluginState::Failed).await?;
    says("the hint", &failed.hint, &["runtime.socket: \"bind\""])?;
    daemon.stop().await
}

scenarios!(a_plugin_without_an_sdk_is_a_plugin, the_plugin_on_the_page_is_one);
