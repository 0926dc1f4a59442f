//! Calls through the broker: the good ones as they should be, the bad ones with their reason.

use std::time::Duration;

use anyhow::{Context, ensure};
use plugvisor_client::{Reason, Refusal};
use plugvisor_tests::{
    BundleBuilder, Daemon, Lane,
    contract::{
        ActRequest, ChatRequest, CollectRequest, Nothing, RepeatRequest, SayRequest, WhisperRequest, act_request::Deed,
        recluse_service_client::RecluseServiceClient,
    },
    events, scenarios,
};
use tokio_stream::StreamExt as _;
use tonic::{Code, Request, Status};

use crate::{says, told, world};

/// The broker's limit for one message.
const MESSAGE_LIMIT: u64 = 4 * 1024 * 1024;

/// Asserts that the broker refused for this reason and said what to do.
fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, reason: &Reason) -> anyhow::Result<Refusal> {
    let status = match answer {
        Ok(answer) => anyhow::bail!("expected {reason:?}, got the answer {answer:?}"),
        Err(status) => status,
    };
    let refusal = Refusal::from_status(&status).with_context(|| format!("not a refusal of the broker: {status:?}"))?;
    ensure!(refusal.reason == *reason, "{refusal:?}");
    ensure!(refusal.code == code, "{refusal:?}");
    ensure!(!refusal.hint.is_empty(), "no hint: {refusal:?}");
    ensure!(!refusal.message.is_empty(), "no message: {refusal:?}");
    Ok(refusal)
}

/// Unary and every streaming kind, metadata both ways, the caller's identity, the deadline.
async fn every_kind_of_call_passes(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?.start().await?;
    daemon.loaded("echo").await?;
    let mut echo = daemon.echo();

    let mut request = Request::new(SayRequest { text: "hello".to_owned() });
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    request.metadata_mut().insert("traceparent", trace.parse()?);
    request.metadata_mut().insert("x-echo", "through".parse()?);
    request.metadata_mut().insert("plugvisor-caller", "somebody-else".parse()?);
    let answer = echo.say(request).await?;
    ensure!(answer.metadata().get("x-echo").is_some_and(|value| value == "through"), "{:?}", answer.metadata());
    let answer = answer.into_inner();
    ensure!(answer.text == "hello", "{answer:?}");
    ensure!(!answer.caller.is_empty() && answer.caller != "somebody-else", "the identity was forged: {answer:?}");
    ensure!(answer.traceparent.contains("0af7651916cd43dd8448eb211c80319c"), "the trace broke: {answer:?}");
    ensure!(!answer.timeout.is_empty(), "no deadline reached the provider: {answer:?}");

    let parts = tokio_stream::iter((0..100).map(|number| CollectRequest { text: number.to_string() }));
    let collected = echo.collect(parts).await?.into_inner();
    ensure!(collected.count == 100 && collected.joined.ends_with("9899"), "{collected:?}");

    // More than any window, so that flow control must work to the end.
    let text = "x".repeat(64 * 1024);
    let mut repeated = echo.repeat(RepeatRequest { text: text.clone(), count: 40 }).await?.into_inner();
    let mut next = 0;
    while let Some(answer) = repeated.message().await? {
        ensure!(answer.index == next && answer.text == text, "answer {} after {next}", answer.index);
        next += 1;
    }
    ensure!(next == 40, "the stream ended after {next}");

    let (send, receive) = tokio::sync::mpsc::channel(1);
    let mut answers = echo.chat(tokio_stream::wrappers::ReceiverStream::new(receive)).await?.into_inner();
    for number in 0..10 {
        // The next is said only after the last was answered: both directions are open at once.
        send.send(ChatRequest { text: format!("line {number}") }).await?;
        let answer = answers.message().await?.context("the chat ended")?;
        ensure!(answer.text == format!("line {number}"), "{answer:?}");
    }
    drop(send);
    ensure!(answers.next().await.is_none(), "the chat goes on");

    let over_cli =
        daemon.cli(&["call", "plugvisor.test.v1.EchoService/Say", "--json", "{\"text\":\"from JSON\"}"]).await?;
    ensure!(over_cli.code == Some(0), "{over_cli:?}");
    ensure!(over_cli.json()?["text"] == "from JSON", "{over_cli:?}");
    daemon.stop().await
}

/// A provider that fails in the middle of a call, at every layer.
async fn a_failing_provider_is_told_from_a_refusal(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?
        .plugin(&BundleBuilder::hostile("hostile", &["echo"]))?
        .toml("[plugin.hostile]\nlimits = { call_timeout_ms = 700 }\nbreaker = { enabled = false }")
        .start()
        .await?;
    daemon.loaded("echo").await?;
    let before = daemon.loaded("hostile").await?;
    let neighbour = daemon.neighbour();

    let own =
        daemon.act("hostile", Deed::Fail(Code::FailedPrecondition as i32)).await.expect_err("it was told to fail");
    ensure!(own.code() == Code::FailedPrecondition && own.message() == "as you asked", "{own:?}");
    ensure!(Refusal::from_status(&own).is_none(), "the provider's own answer looks like a refusal: {own:?}");

    let refusal =
        refused(daemon.act("hostile", Deed::Close(Nothing {})).await, Code::Unavailable, &Reason::ProviderLost)?;
    says("the refusal", &refusal.message, &["hostile"])?;
    // The process lives, so the next call finds a new connection.
    daemon.act("hostile", Deed::Nothing(Nothing {})).await.context("after the connection was closed")?;
    let after = daemon.plugin("hostile").await?;
    ensure!(after.pid == before.pid, "it was restarted: {after:?}");

    let begun = std::time::Instant::now();
    let late = daemon.act("hostile", Deed::Hang(Nothing {})).await;
    let took = begun.elapsed();
    // The caller itself gave it a minute: only the limit can have ended it.
    ensure!(took >= Duration::from_millis(600) && took < events::patience(), "the limit of 700 ms held {took:?}");
    // tonic's own server keeps the same deadline, which travelled to it, and may say CANCELLED first: it is the same end.
    let refusal = refused(late, Code::DeadlineExceeded, &Reason::Deadline)?;
    says("the refusal", &refusal.message, &["hostile"])?;

    let mark = daemon.now().await?;
    refused(daemon.act("hostile", Deed::Exit(9)).await, Code::Unavailable, &Reason::ProviderLost)?;
    let exited = told(&daemon, "plugin.exited", "hostile").await?;
    says("the event", &events::data_text(&exited), &["code=9"])?;
    let ready = |event: &_| events::is(event, "plugin.ready", "hostile");
    daemon.events().wait_after(mark, "the restart", ready).await?;
    let again = daemon.loaded("hostile").await?;
    ensure!(again.generation > before.generation && again.pid != before.pid && again.restarts == 1, "{again:?}");
    daemon.act("hostile", Deed::Nothing(Nothing {})).await.context("after the restart")?;
    neighbour.finish().await?;
    daemon.stop().await
}

/// Over the limit in both directions: the call fails, the connection and the plugin do not.
async fn messages_over_the_limit_are_refused(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?.plugin(&BundleBuilder::hostile("hostile", &["echo"]))?.start().await?;
    daemon.loaded("echo").await?;
    let before = daemon.loaded("hostile").await?;
    let neighbour = daemon.neighbour();
    let resident = daemon.process().resident_bytes().context("no RSS")?;

    let large = daemon.act("hostile", Deed::AnswerBytes(MESSAGE_LIMIT - 1024)).await.context("just below the limit")?;
    ensure!(large.ballast.len() as u64 == MESSAGE_LIMIT - 1024, "{} bytes", large.ballast.len());

    let refusal = refused(
        daemon.act("hostile", Deed::AnswerBytes(64 * 1024 * 1024)).await,
        Code::ResourceExhausted,
        &Reason::MessageTooLarge,
    )?;
    says("the refusal", &format!("{} {}", refusal.message, refusal.hint), &["4194304"])?;
    let event = told(&daemon, "broker.payload_rejected", "hostile").await?;
    says("the event", &events::data_text(&event), &["limit_bytes=4194304"])?;

    let ballast = vec![0; 32 * 1024 * 1024];
    let request = ActRequest { ballast, deed: Some(Deed::Nothing(Nothing {})) };
    refused(daemon.hostile("hostile").act(request).await, Code::ResourceExhausted, &Reason::MessageTooLarge)?;

    daemon.act("hostile", Deed::Nothing(Nothing {})).await.context("after messages over the limit")?;
    let grown = daemon.process().resident_bytes().context("no RSS")?.saturating_sub(resident);
    ensure!(grown < 48 * 1024 * 1024, "refusing 96 MiB cost {grown} bytes");
    let after = daemon.plugin("hostile").await?;
    ensure!(after.pid == before.pid, "it was restarted: {after:?}");
    neighbour.finish().await?;
    daemon.stop().await
}

/// Who may call what: unknown services and tokens, services that are not exported, plugins without the capability.
async fn callers_are_judged_by_their_connection(lane: Lane) -> anyhow::Result<()> {
    let recluse = BundleBuilder::hostile("recluse", &["echo"])
        .set("/module/providers", vec!["plugvisor.test.v1.RecluseService"])
        .set("/module/exports", Vec::<String>::new())
        .set("/module/crossPluginServices", Vec::<String>::new());
    let daemon = world(lane)?
        .plugin(&recluse)?
        .plugin(&BundleBuilder::hostile("friend", &["echo"]).capabilities(&["api:internal-calls"]))?
        .plugin(&BundleBuilder::hostile("stranger", &["echo"]).capabilities(&["api:internal-calls"]))?
        .toml("[plugin.friend]\ngrants = [\"api:internal-calls\"]")
        .start()
        .await?;
    for name in ["echo", "recluse", "friend", "stranger"] {
        daemon.loaded(name).await?;
    }
    let neighbour = daemon.neighbour();
    let call = |name: &'static str, path: &str| {
        let (daemon, deed) = (&daemon, Deed::Call(path.to_owned()));
        async move { anyhow::Ok(daemon.act(name, deed).await.context(name)?.text) }
    };

    // From a local application.
    let whisper = RecluseServiceClient::new(daemon.calls()).whisper(WhisperRequest {}).await;
    let refusal = refused(whisper, Code::PermissionDenied, &Reason::CallerNotAllowed)?;
    says("the refusal", &refusal.message, &["RecluseService"])?;
    let unknown = unknown_service(&daemon).await;
    let refusal = refused(unknown, Code::Unimplemented, &Reason::UnknownService)?;
    says("the refusal", &refusal.message, &["acme.v1.Nobody"])?;
    let nobody = daemon.act("nobody", Deed::Nothing(Nothing {})).await;
    refused(nobody, Code::NotFound, &Reason::UnknownToken)?;

    // From plugins: known by their connection, whatever they say.
    let answer = call("friend", "/plugvisor.test.v1.EchoService/Say").await?;
    ensure!(answer.starts_with("ok") && answer.contains("friend"), "{answer}");
    let answer = call("stranger", "/plugvisor.test.v1.EchoService/Say").await?;
    says("the stranger's call", &answer, &["PermissionDenied CallerNotAllowed", "api:internal-calls"])?;
    let answer = call("friend", "/plugvisor.test.v1.RecluseService/Whisper").await?;
    says("the friend's call", &answer, &["PermissionDenied CallerNotAllowed", "RecluseService"])?;
    let answer = call("friend", "/acme.v1.Nobody/Say").await?;
    says("the friend's call", &answer, &["Unimplemented UnknownService", "acme.v1.Nobody"])?;

    let denied = daemon
        .events()
        .wait("the stranger's refusal", |event| {
            events::short_type(event) == "broker.call_denied" && events::data_text(event).contains("stranger")
        })
        .await?;
    ensure!(denied.reason == "caller_not_allowed" && !denied.hint.is_empty(), "{denied:?}");
    let described = daemon.describe("stranger").await?;
    let shown = described.capabilities.iter().find(|capability| capability.name == "api:internal-calls");
    ensure!(shown.is_some_and(|shown| !shown.granted && !shown.reason.is_empty()), "{:?}", described.capabilities);
    neighbour.finish().await?;
    daemon.stop().await
}

/// Calls a service that nobody provides.
async fn unknown_service(daemon: &Daemon) -> Result<plugvisor_tests::contract::SayResponse, Status> {
    let mut grpc = tonic::client::Grpc::new(daemon.calls());
    grpc.ready().await?;
    let path = http::uri::PathAndQuery::from_static("/acme.v1.Nobody/Say");
    let codec = tonic_prost::ProstCodec::default();
    Ok(grpc.unary(Request::new(SayRequest::default()), path, codec).await?.into_inner())
}

/// Failures in a row open the breaker; it says so, refuses, and closes again by itself. Two plugins: one whose breaker
/// stays open for as long as the test looks at it, and one whose open time is over at once.
async fn the_breaker_opens_and_closes(lane: Lane) -> anyhow::Result<()> {
    let breaker = |name: &str, open: u32| {
        let settings = format!("failure_threshold = 3, recovery_timeout_ms = {open}, half_open_max_calls = 1");
        format!("[plugin.{name}]\nbreaker = {{ {settings} }}")
    };
    let daemon = world(lane)?
        .plugin(&BundleBuilder::hostile("hostile", &["echo"]))?
        .plugin(&BundleBuilder::hostile("recovers", &["echo"]))?
        .toml(&breaker("hostile", 3_600_000))
        .toml(&breaker("recovers", 400))
        .start()
        .await?;
    for name in ["echo", "hostile", "recovers"] {
        daemon.loaded(name).await?;
    }
    let neighbour = daemon.neighbour();
    for name in ["hostile", "recovers"] {
        for _ in 0..3 {
            let own = daemon.act(name, Deed::Fail(Code::Internal as i32)).await.expect_err("it was told to fail");
            ensure!(own.code() == Code::Internal, "{own:?}");
        }
    }
    let refusal =
        refused(daemon.act("hostile", Deed::Nothing(Nothing {})).await, Code::Unavailable, &Reason::BreakerOpen)?;
    says("the refusal", &refusal.message, &["hostile"])?;
    told(&daemon, "breaker.opened", "hostile").await?;
    let open = daemon.plugin("hostile").await?;
    ensure!(open.breaker == "open", "{open:?}");
    told(&daemon, "breaker.opened", "recovers").await?;
    daemon.events().wait("half open", |event| events::is(event, "breaker.half_opened", "recovers")).await?;
    // A health probe may have been the trial; then it is closed already.
    daemon.act("recovers", Deed::Nothing(Nothing {})).await.context("while half open")?;
    daemon.events().wait("closed", |event| events::is(event, "breaker.closed", "recovers")).await?;
    neighbour.finish().await?;
    daemon.stop().await
}

scenarios!(
    every_kind_of_call_passes,
    a_failing_provider_is_told_from_a_refusal,
    messages_over_the_limit_are_refused,
    callers_are_judged_by_their_connection,
    the_breaker_opens_and_closes,
);
