//! What the broker refuses, and what a refusal looks like.

use std::time::Duration;

use bytes::Bytes;
use plugvisor_core::{CapabilitySet, route::Export};
use plugvisor_daemon::broker::{BrokerConfig, BrokerEvent, CallLimits, ConnectionLimits};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::mpsc,
};

use super::{
    grpc::{call, client, message, serve, within},
    support::{World, answer_ok, identity, request},
};

async fn refused(world: &World, caller: &str, asked: http::request::Builder) -> (i32, String, String) {
    let sender = client(&world.caller(caller).await).await;
    let answer = call(&sender, asked.body(()).unwrap(), message(b"")).await;
    assert!(answer.body.is_empty() && answer.trailers.is_empty(), "a refusal is trailers-only: {answer:?}");
    assert_eq!(answer.headers["content-type"], "application/grpc");
    assert!(!answer.end("plugvisor-hint").expect("a hint").is_empty());
    let text = |name: &str| answer.end(name).unwrap().to_owned();
    (answer.status(), text("plugvisor-reason"), text("grpc-message"))
}

#[tokio::test]
async fn a_service_that_nobody_provides() {
    let world = World::new();
    let (status, reason, message) = refused(&world, "asker", request("/acme.v1.Nobody/M")).await;
    assert_eq!((status, reason.as_str()), (12, "unknown_service"));
    assert!(message.contains("acme.v1.Nobody"), "{message}");
    let rejected = world.broker.snapshot().await.unwrap().rejected;
    assert_eq!(rejected.len(), 1);
    assert_eq!((rejected[0].caller.as_str(), rejected[0].reason, rejected[0].count), ("asker", "unknown_service", 1));
}

/// For tests where the name `message` is a text.
fn request_body() -> Bytes {
    message(b"")
}

#[tokio::test]
async fn a_caller_without_the_right() {
    let mut world = World::new();
    world.offer("p", "t.S", Export::Private).await;
    let (status, reason, message) = refused(&world, "asker", request("/t.S/M")).await;
    assert_eq!((status, reason.as_str()), (7, "caller_not_allowed"));
    assert!(message.contains("plugin asker"), "{message}");

    let path = world.caller_with("powerless", &[], None).await;
    let answer = call(&client(&path).await, request("/t.S/M").body(()).unwrap(), request_body()).await;
    assert_eq!((answer.status(), answer.reason()), (7, Some("caller_not_allowed")));
    assert!(answer.end("grpc-message").unwrap().contains("api:internal-calls"), "{answer:?}");
}

#[tokio::test]
async fn a_call_that_comes_back_or_goes_too_far() {
    let mut world = World::new();
    let listener = world.provider("p", "t.S").await;
    serve(listener, |_asked, respond| async move { answer_ok(respond, b"") });
    let (status, reason, message) =
        refused(&world, "one", request("/t.S/M").header("plugvisor-hops", "p,middle")).await;
    assert_eq!((status, reason.as_str()), (9, "loop"));
    assert!(message.contains("p -> middle -> one -> p"), "{message}");
    let far = "a,b,c,d,e,f,g,h";
    let (status, reason, _) = refused(&world, "two", request("/t.S/M").header("plugvisor-hops", far)).await;
    assert_eq!((status, reason.as_str()), (9, "loop"));
    let (status, reason, _) = refused(&world, "p", request("/t.S/M")).await;
    assert_eq!((status, reason.as_str()), (9, "loop"), "a plugin that calls itself");
}

#[tokio::test]
async fn requests_that_are_not_grpc() {
    let world = World::new();
    let sender = client(&world.caller("asker").await).await;
    let post = || http::Request::post("http://x/t.S/M");
    for (what, asked) in [
        ("no content type", post()),
        ("json", post().header("content-type", "application/json")),
        ("GET", http::Request::get("http://x/t.S/M").header("content-type", "application/grpc")),
        ("no method", http::Request::post("http://x/t.S").header("content-type", "application/grpc")),
        ("a query", http::Request::post("http://x/?a/b").header("content-type", "application/grpc")),
        ("a timeout without unit", request("/t.S/M").header("grpc-timeout", "5")),
        ("a binary token", request("/t.S/M").header("plugvisor-token", b"\xff".as_slice())),
    ] {
        let answer = call(&sender, asked.body(()).unwrap(), message(b"")).await;
        assert_eq!((answer.status(), answer.reason()), (3, Some("bad_request")), "{what}");
    }
}

#[tokio::test]
async fn providers_that_are_not_ready() {
    let mut world = World::new();
    let shared = Export::Shared { global: true, capabilities: CapabilitySet::default() };
    world.offer("absent", "t.Absent", shared).await;
    let (status, reason, text) = refused(&world, "one", request("/t.Absent/M")).await;
    assert_eq!((status, reason.as_str()), (14, "provider_not_ready"));
    assert!(text.contains("absent"), "{text}");

    let _listener = world.provider("p", "t.S").await;
    world.broker.set_ready(&identity("p"), false).await.unwrap();
    let (status, reason, _) = refused(&world, "two", request("/t.S/M")).await;
    assert_eq!((status, reason.as_str()), (14, "provider_not_ready"));
}

#[tokio::test]
async fn more_calls_at_once_than_the_provider_takes() {
    let mut world = World::new();
    let limits = CallLimits { max_concurrent: 2, ..CallLimits::default() };
    let listener = world.provider_with("p", "t.S", Default::default(), limits).await;
    let (arrived, mut arrivals) = mpsc::channel(4);
    serve(listener, move |_asked, respond| {
        let arrived = arrived.clone();
        async move { arrived.send(respond).await.unwrap() }
    });
    let mut sender = client(&world.caller("asker").await).await;
    let mut held = Vec::new();
    let mut pending = Vec::new();
    for _ in 0..2 {
        let (response, stream) = sender.send_request(request("/t.S/M").body(()).unwrap(), true).unwrap();
        held.push(within(arrivals.recv()).await.unwrap());
        pending.push((response, stream));
    }
    let answer = call(&sender, request("/t.S/M").body(()).unwrap(), message(b"")).await;
    assert_eq!((answer.status(), answer.reason()), (8, Some("overloaded")));
    answer_ok(held.pop().unwrap(), b"");
    let (response, _stream) = pending.pop().unwrap();
    let mut body = within(response).await.unwrap().into_body();
    while within(body.data()).await.is_some() {}
    assert!(within(body.trailers()).await.unwrap().is_some());
    // The place is free again.
    let (_response, _stream) = sender.send_request(request("/t.S/M").body(()).unwrap(), true).unwrap();
    assert!(within(arrivals.recv()).await.is_some());
}

#[tokio::test]
async fn callers_that_do_not_speak_http2_harm_nobody() {
    let mut world = World::new();
    serve(world.provider("p", "t.S").await, |_asked, respond| async move { answer_ok(respond, b"pong") });
    let path = world.caller("asker").await;
    let good = client(&path).await;
    for garbage in [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".as_slice(), &[0xff; 4096]] {
        let mut stream = UnixStream::connect(&path).await.unwrap();
        // The broker may close before all of it is written.
        let _ = stream.write_all(garbage).await;
        let mut rest = Vec::new();
        // A reset or an end: either way it is closed.
        let _ = within(stream.read_to_end(&mut rest)).await;
    }
    let (caller, detail) = world
        .event(|event| match event {
            BrokerEvent::CallerRejected { caller, detail } => Some((caller.clone(), detail.clone())),
            _ => None,
        })
        .await;
    assert_eq!(caller, "asker#1");
    assert!(detail.contains("HTTP/2"), "{detail}");
    let answer = call(&good, request("/t.S/M").body(()).unwrap(), message(b"")).await;
    assert_eq!((answer.status(), answer.body), (0, message(b"pong").to_vec()));
}

#[tokio::test]
async fn strangers_on_a_plugins_socket_are_turned_away() {
    let mut world = World::new();
    let somebody_else = rustix::process::getuid().as_raw() + 1;
    let path = world.caller_with("asker", &[], Some(somebody_else)).await;
    let mut stream = UnixStream::connect(&path).await.unwrap();
    let mut rest = Vec::new();
    // A reset or an end: either way it is closed, and nothing was said.
    let _ = within(stream.read_to_end(&mut rest)).await;
    assert!(rest.is_empty());
    let detail = world
        .event(|event| match event {
            BrokerEvent::CallerRejected { detail, .. } => Some(detail.clone()),
            _ => None,
        })
        .await;
    assert!(detail.contains(&somebody_else.to_string()), "{detail}");
}

#[tokio::test]
async fn callers_that_stay_silent_are_closed() {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    // Short for a test and long for a machine that stands still: the quiet one must answer a ping in half of it.
    let impatient = ConnectionLimits { handshake_timeout: Duration::from_secs(3), ..ConnectionLimits::default() };
    let config = BrokerConfig { plugin_connections: impatient, ..BrokerConfig::default() };
    let mut world = World::with(config, Vec::new());
    let path = world.caller("asker").await;
    let quiet = client(&path).await;
    let begun = [PREFACE, &[0, 0, 0, 4, 0, 0, 0, 0, 0]].concat();
    // Nothing at all; half a preface; a preface and half a frame.
    let mut silent = Vec::new();
    for said in [&b""[..], &PREFACE[..10], &begun[..begun.len() - 3]] {
        let mut stream = UnixStream::connect(&path).await.unwrap();
        stream.write_all(said).await.unwrap();
        silent.push(stream);
    }
    for mut stream in silent {
        let mut rest = Vec::new();
        // A reset or an end: either way it is closed.
        let _ = within(stream.read_to_end(&mut rest)).await;
    }
    let detail = world.event(|event| match event {
        BrokerEvent::CallerRejected { detail, .. } => Some(detail.clone()),
        _ => None,
    });
    assert!(detail.await.contains("HTTP/2"));
    // One that has nothing to say either, but answers pings, stays.
    let answer = call(&quiet, request("/t.S/M").body(()).unwrap(), message(b"")).await;
    assert_eq!(answer.reason(), Some("unknown_service"));
    assert_eq!(world.broker.snapshot().await.unwrap().caller_connections, 1);
}

#[tokio::test]
async fn one_caller_has_so_many_connections() {
    let few = ConnectionLimits { max_connections: 2, ..ConnectionLimits::default() };
    let config = BrokerConfig { plugin_connections: few, ..BrokerConfig::default() };
    let mut world = World::with(config, Vec::new());
    let path = world.caller("asker").await;
    let held = [client(&path).await, client(&path).await];
    for sender in &held {
        let answer = call(sender, request("/t.S/M").body(()).unwrap(), message(b"")).await;
        assert_eq!(answer.reason(), Some("unknown_service"));
    }
    let mut third = UnixStream::connect(&path).await.unwrap();
    let mut rest = Vec::new();
    // A reset or an end: either way it is closed, and nothing was said.
    let _ = within(third.read_to_end(&mut rest)).await;
    assert!(rest.is_empty());
    let detail = world.event(|event| match event {
        BrokerEvent::CallerRejected { detail, .. } => Some(detail.clone()),
        _ => None,
    });
    assert!(detail.await.contains("2 connections"));
}
