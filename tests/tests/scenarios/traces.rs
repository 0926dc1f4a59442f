//! One trace from the caller over the broker to the provider, and on to whom the provider calls.

use anyhow::{Context, ensure};
use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind};
use plugvisor_tests::{
    BundleBuilder, Lane, Nobody, Receiver, attribute,
    contract::{ActRequest, Nothing, act_request::Deed},
    scenarios,
};
use tonic::Request;

use crate::world;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLERS_SPAN: &str = "b7ad6b7169203331";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The span of this kind for calls to this provider, in the caller's trace.
async fn found(receiver: &Receiver, callee: &str, kind: SpanKind) -> anyhow::Result<Span> {
    let wanted = |span: &Span| {
        hex(&span.trace_id) == TRACE && span.kind == kind as i32 && attribute(span, "plugvisor.callee") == callee
    };
    receiver.span(&format!("{kind:?} to {callee}"), wanted).await
}

async fn one_trace_shows_the_whole_way(lane: Lane) -> anyhow::Result<()> {
    let receiver = Receiver::start().await?;
    let daemon = world(lane)?
        .plugin(&BundleBuilder::hostile("middle", &["echo"]).capabilities(&["api:internal-calls"]))?
        .grants(&["api:internal-calls"])
        .toml(&format!("[traces]\nendpoint = {:?}", receiver.endpoint()))
        .start()
        .await?;
    daemon.loaded("echo").await?;
    daemon.loaded("middle").await?;

    // The application is a caller that traces: its own span is the root.
    let deed = Some(Deed::Call("/plugvisor.test.v1.EchoService/Say".to_owned()));
    let mut request = Request::new(ActRequest { deed, ..ActRequest::default() });
    request.metadata_mut().insert("traceparent", format!("00-{TRACE}-{CALLERS_SPAN}-01").parse()?);
    let said = daemon.hostile("middle").act(request).await?.into_inner().text;
    ensure!(said.starts_with("ok caller=middle"), "{said}");

    let to_middle = found(&receiver, "middle", SpanKind::Server).await?;
    ensure!(hex(&to_middle.parent_span_id) == CALLERS_SPAN, "{to_middle:?}");
    ensure!(to_middle.name == "plugvisor.test.v1.HostileService/Act", "{to_middle:?}");
    ensure!(attribute(&to_middle, "rpc.system.name") == "grpc", "{to_middle:?}");
    ensure!(attribute(&to_middle, "rpc.response.status_code") == "OK", "{to_middle:?}");
    let at_middle = found(&receiver, "middle", SpanKind::Client).await?;
    ensure!(at_middle.parent_span_id == to_middle.span_id, "{at_middle:?}");
    let to_echo = found(&receiver, "echo", SpanKind::Server).await?;
    ensure!(to_echo.parent_span_id == at_middle.span_id, "the trace broke in the provider: {to_echo:?}");
    ensure!(attribute(&to_echo, "plugvisor.caller") == "middle", "{to_echo:?}");
    let at_echo = found(&receiver, "echo", SpanKind::Client).await?;
    ensure!(at_echo.parent_span_id == to_echo.span_id, "{at_echo:?}");
    // The provider saw the broker's span as its parent.
    let traceparent = said.split("traceparent=").nth(1).context("the answer names no traceparent")?;
    ensure!(traceparent == format!("00-{TRACE}-{}-01", hex(&at_echo.span_id)), "{said}");
    for (outer, inner) in [(&to_middle, &at_middle), (&at_middle, &to_echo), (&to_echo, &at_echo)] {
        let inside = outer.start_time_unix_nano <= inner.start_time_unix_nano
            && inner.start_time_unix_nano <= inner.end_time_unix_nano;
        ensure!(inside, "{inner:?} does not begin inside {outer:?}");
    }

    // A refusal is a span too, with its reason; it was passed to nobody.
    let mut request = Request::new(ActRequest { deed: Some(Deed::Nothing(Nothing {})), ..ActRequest::default() });
    request.metadata_mut().insert("traceparent", format!("00-{TRACE}-{CALLERS_SPAN}-01").parse()?);
    let refused = daemon.hostile("nobody").act(request).await;
    ensure!(refused.is_err(), "{refused:?}");
    let refusal = receiver.span("the refusal", |span| attribute(span, "error.type") == "unknown_token").await?;
    ensure!(hex(&refusal.trace_id) == TRACE && refusal.kind == SpanKind::Server as i32, "{refusal:?}");

    let scrape = daemon.scrape().await?;
    ensure!(scrape.value("plugvisor_otlp_dropped_total") == Some(0.0), "spans were lost");
    daemon.stop().await
}

/// Nobody receives: calls go on, what cannot be sent is counted.
async fn a_receiver_that_is_away_costs_only_the_spans(lane: Lane) -> anyhow::Result<()> {
    let nobody = Nobody::at_a_port()?;
    let endpoint = nobody.endpoint()?;
    let daemon = world(lane)?.toml(&format!("[traces]\nendpoint = {endpoint:?}")).start().await?;
    daemon.loaded("echo").await?;
    for _ in 0..50 {
        daemon.echo().say(plugvisor_tests::contract::SayRequest { text: "x".to_owned() }).await?;
    }
    let lost = |scrape: &plugvisor_tests::Scrape| {
        scrape.value("plugvisor_otlp_dropped_total").is_some_and(|count| count >= 50.0)
    };
    daemon.scraped("the lost spans", lost).await?;
    daemon.stop().await
}

scenarios!(one_trace_shows_the_whole_way, a_receiver_that_is_away_costs_only_the_spans);
