//! Providers that fail, lie or vanish; the breaker that notices.

use std::time::Duration;

use bytes::Bytes;
use plugvisor_core::breaker::{OpenCause, Position, Settings, Transition};
use plugvisor_daemon::broker::{BrokerEvent, CallLimits, Sender};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::mpsc,
};

use super::{
    grpc::{answer, call, client, message, serve, within},
    support::{World, answer_ok, answer_status, identity, read, request},
};

const LIMIT: u32 = 64 * 1024;

fn limits() -> CallLimits {
    CallLimits { max_message: LIMIT, ..CallLimits::default() }
}

#[tokio::test]
async fn a_message_over_the_limit_is_refused_in_both_directions() {
    let mut world = World::new();
    let (seen, mut resets) = mpsc::channel(1);
    let listener = world.provider_with("p", "t.S", Settings::default(), limits()).await;
    serve(listener, move |asked, mut respond| {
        let seen = seen.clone();
        async move {
            if asked.uri().path() == "/t.S/Up" {
                seen.send(std::future::poll_fn(|cx| respond.poll_reset(cx)).await.unwrap()).await.unwrap();
            } else {
                let head = http::Response::builder().header("content-type", "application/grpc").body(()).unwrap();
                let mut to = respond.send_response(head, false).unwrap();
                let mut both = message(b"small").to_vec();
                both.extend(message(&vec![7; LIMIT as usize + 1]));
                to.send_data(Bytes::from(both), false).unwrap();
                drop(std::future::poll_fn(|cx| to.poll_reset(cx)).await);
            }
        }
    });
    let sender = client(&world.caller("asker").await).await;
    let big = message(&vec![7; LIMIT as usize + 1]);
    let refused = call(&sender, request("/t.S/Up").body(()).unwrap(), big).await;
    assert_eq!((refused.status(), refused.reason()), (8, Some("message_too_large")));
    assert!(refused.end("grpc-message").unwrap().contains("65537"), "{refused:?}");
    assert_eq!(within(resets.recv()).await.unwrap(), h2::Reason::CANCEL);

    let refused = call(&sender, request("/t.S/Down").body(()).unwrap(), message(b"")).await;
    assert_eq!((refused.status(), refused.reason()), (8, Some("message_too_large")));
    assert_eq!(refused.body, message(b"small"), "what came before the message at fault passes");
    let told = world.event(|event| match event {
        BrokerEvent::MessageTooLarge { sender, size, limit, .. } => Some((*sender, *size, *limit)),
        _ => None,
    });
    assert_eq!(told.await, (Sender::Caller, LIMIT + 1, LIMIT));
    let breaker = world.broker.snapshot().await.unwrap().providers[0].breaker;
    assert_eq!(breaker.consecutive_failures, 0, "too large a message is not the provider's failure");
}

#[tokio::test]
async fn a_provider_that_dies_in_the_middle_of_a_call() {
    let mut world = World::new();
    let listener = world.provider("p", "t.S").await;
    // One connection that answers half and closes, then one that works.
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut connection = h2::server::handshake(stream).await.unwrap();
        let (_asked, mut respond) = connection.accept().await.unwrap().unwrap();
        let head = http::Response::builder().header("content-type", "application/grpc").body(()).unwrap();
        let mut to = respond.send_response(head, false).unwrap();
        to.send_data(message(b"half"), false).unwrap();
        let (second, mut silent) = connection.accept().await.unwrap().unwrap();
        assert_eq!(second.uri().path(), "/t.S/Second");
        drop(connection);
        drop(std::future::poll_fn(|cx| silent.poll_reset(cx)).await);
        serve(listener, |_asked, respond| async move { answer_ok(respond, b"again") });
    });
    let mut sender = client(&world.caller("asker").await).await;
    within(async {
        let (response, _stream) = sender.send_request(request("/t.S/First").body(()).unwrap(), true).unwrap();
        let begun = response.await.unwrap();
        let (second, _stream) = sender.send_request(request("/t.S/Second").body(()).unwrap(), true).unwrap();
        let first = answer(begun).await;
        assert_eq!(first.body, message(b"half"));
        assert_eq!((first.trailers["grpc-status"].as_bytes(), first.reason()), (&b"14"[..], Some("provider_lost")));
        let second = answer(second.await.unwrap()).await;
        assert_eq!((second.status(), second.reason()), (14, Some("provider_lost")));
        assert!(second.end("grpc-message").unwrap().contains("plugin p"));
    })
    .await;
    let lost = world
        .event(|event| match event {
            BrokerEvent::ProviderLost { provider, .. } => Some(provider.clone()),
            _ => None,
        })
        .await;
    assert_eq!(lost, identity("p"));
    let answer = call(&sender, request("/t.S/Third").body(()).unwrap(), message(b"")).await;
    assert_eq!((answer.status(), answer.body), (0, message(b"again").to_vec()), "the next call connects anew");
}

#[tokio::test]
async fn a_provider_that_speaks_garbage() {
    let mut world = World::new();
    let listener = world.provider("p", "t.S").await;
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                // The broker closes as soon as it has read the first of it.
                let _ = stream.write_all(&[b'x'; 1 << 16]).await;
                let mut sink = Vec::new();
                let _ = stream.read_to_end(&mut sink).await;
            });
        }
    });
    serve(world.provider("good", "t.Good").await, |_asked, respond| async move { answer_ok(respond, b"") });
    let sender = client(&world.caller("asker").await).await;
    let refused = call(&sender, request("/t.S/M").body(()).unwrap(), message(b"")).await;
    assert!(matches!(refused.status(), 13 | 14), "{refused:?}");
    assert!(matches!(refused.reason(), Some("protocol_error" | "provider_lost")), "{refused:?}");
    let provider = world
        .event(|event| match event {
            BrokerEvent::ProviderProtocolError { provider, .. } => Some(provider.clone()),
            _ => None,
        })
        .await;
    assert_eq!(provider, identity("p"));
    assert_eq!(call(&sender, request("/t.Good/M").body(()).unwrap(), message(b"")).await.status(), 0);
}

#[tokio::test]
async fn a_provider_whose_responses_are_not_grpc() {
    let mut world = World::new();
    serve(world.provider("p", "t.S").await, |asked, mut respond| async move {
        let grpc = http::Response::builder().header("content-type", "application/grpc");
        match asked.uri().path() {
            "/t.S/Html" => {
                let head = http::Response::builder().header("content-type", "text/html").body(()).unwrap();
                respond.send_response(head, true).unwrap();
            }
            "/t.S/NotFound" => drop(respond.send_response(grpc.status(404).body(()).unwrap(), true).unwrap()),
            "/t.S/NoStatus" => drop(respond.send_response(grpc.body(()).unwrap(), true).unwrap()),
            "/t.S/NoTrailers" => {
                let mut to = respond.send_response(grpc.body(()).unwrap(), false).unwrap();
                to.send_data(message(b"x"), true).unwrap();
            }
            _ => respond.send_reset(h2::Reason::INTERNAL_ERROR),
        }
    });
    let sender = client(&world.caller("asker").await).await;
    // Fewer than would open the breaker, then a success between.
    for path in ["/t.S/Html", "/t.S/NotFound", "/t.S/NoStatus", "/t.S/NoTrailers"] {
        let refused = call(&sender, request(path).body(()).unwrap(), message(b"")).await;
        assert_eq!((refused.status(), refused.reason()), (13, Some("protocol_error")), "{path}");
    }
    let failures = world.broker.snapshot().await.unwrap().providers[0].breaker.consecutive_failures;
    assert_eq!(failures, 4);

    let mut world = World::new();
    serve(world.provider("p", "t.S").await, |asked, mut respond| async move {
        let grpc = http::Response::builder().header("content-type", "application/grpc");
        match asked.uri().path() {
            "/t.S/Flag" => {
                let mut to = respond.send_response(grpc.body(()).unwrap(), false).unwrap();
                to.send_data(Bytes::from_static(b"\x07junk"), false).unwrap();
                drop(std::future::poll_fn(|cx| to.poll_reset(cx)).await);
            }
            "/t.S/HalfMessage" => {
                let mut to = respond.send_response(grpc.body(()).unwrap(), false).unwrap();
                to.send_data(message(b"whole").slice(..7), false).unwrap();
                let mut trailers = http::HeaderMap::new();
                trailers.insert("grpc-status", "0".parse().unwrap());
                to.send_trailers(trailers).unwrap();
            }
            _ => respond.send_reset(h2::Reason::INTERNAL_ERROR),
        }
    });
    let sender = client(&world.caller("asker").await).await;
    for path in ["/t.S/Flag", "/t.S/HalfMessage", "/t.S/Reset"] {
        let refused = call(&sender, request(path).body(()).unwrap(), message(b"")).await;
        assert_eq!((refused.status(), refused.reason()), (13, Some("protocol_error")), "{path}");
    }
}

#[tokio::test]
async fn the_breaker_opens_refuses_and_recovers() {
    let mut world = World::new();
    // One that stays open for as long as it is looked at, and one whose open time is over at once.
    let breaker = |recovery| Settings {
        failure_threshold: 3,
        recovery,
        recovery_spread: 0.0,
        half_open_calls: 1,
        ..Settings::default()
    };
    let (seen, mut arrivals) = mpsc::channel(16);
    for (name, service, recovery) in [("p", "t.S", 3_600_000), ("q", "t.Q", 50)] {
        let breaker = breaker(Duration::from_millis(recovery));
        let listener = world.provider_with(name, service, breaker, CallLimits::default()).await;
        let seen = seen.clone();
        serve(listener, move |asked, respond| {
            let seen = seen.clone();
            async move {
                seen.send(()).await.unwrap();
                match asked.uri().path() {
                    "/t.S/Bad" | "/t.Q/Bad" => answer_status(respond, 13),
                    "/t.S/Mistake" => answer_status(respond, 3),
                    _ => answer_ok(respond, b""),
                }
            }
        });
    }
    let sender = client(&world.caller("asker").await).await;
    let ask = |path: &'static str| call(&sender, request(path).body(()).unwrap(), message(b""));
    // A caller's own mistakes count for nothing, however many.
    for _ in 0..6 {
        assert_eq!(ask("/t.S/Mistake").await.status(), 3);
    }
    for _ in 0..3 {
        assert_eq!(ask("/t.S/Bad").await.status(), 13);
    }
    let opened = world.event(transition).await;
    assert!(matches!(opened, Transition::Opened { cause: OpenCause::ConsecutiveFailures, .. }), "{opened:?}");
    while arrivals.try_recv().is_ok() {}
    let refused = ask("/t.S/Good").await;
    assert_eq!((refused.status(), refused.reason()), (14, Some("breaker_open")));
    assert!(arrivals.try_recv().is_err(), "the provider never saw the refused call");
    assert_eq!(world.broker.snapshot().await.unwrap().providers[0].breaker.position, Position::Open);

    for _ in 0..3 {
        assert_eq!(ask("/t.Q/Bad").await.status(), 13);
    }
    assert!(matches!(world.event(transition).await, Transition::Opened { .. }));
    assert_eq!(world.event(transition).await, Transition::HalfOpened);
    while arrivals.try_recv().is_ok() {}
    assert_eq!(ask("/t.Q/Good").await.status(), 0);
    assert!(matches!(world.event(transition).await, Transition::Closed { .. }));
    assert_eq!(ask("/t.Q/Good").await.status(), 0);
}

#[tokio::test]
async fn a_health_probe_closes_an_idle_breaker() {
    let mut world = World::new();
    let breaker = Settings {
        failure_threshold: 1,
        recovery: Duration::from_millis(50),
        recovery_spread: 0.0,
        half_open_calls: 1,
        ..Settings::default()
    };
    let listener = world.provider_with("p", "t.S", breaker, CallLimits::default()).await;
    serve(listener, |_asked, respond| async move { answer_status(respond, 14) });
    let sender = client(&world.caller("asker").await).await;
    assert_eq!(call(&sender, request("/t.S/M").body(()).unwrap(), message(b"")).await.status(), 14);
    assert!(matches!(world.event(transition).await, Transition::Opened { .. }));
    assert_eq!(world.event(transition).await, Transition::HalfOpened);
    world.broker.health_probe_ok(&identity("p")).await.unwrap();
    assert!(matches!(world.event(transition).await, Transition::Closed { .. }));
}

#[tokio::test]
async fn deadlines_that_nobody_can_meet_do_not_open_a_breaker() {
    let mut world = World::new();
    let breaker = Settings { failure_threshold: 1, ..Settings::default() };
    let listener = world.provider_with("p", "t.S", breaker, CallLimits::default()).await;
    serve(listener, |_asked, mut respond| async move {
        drop(std::future::poll_fn(|cx| respond.poll_reset(cx)).await);
    });
    let sender = client(&world.caller("asker").await).await;
    for timeout in ["1n", "1m", "0S"] {
        let asked = request("/t.S/M").header("grpc-timeout", timeout).body(()).unwrap();
        assert_eq!(call(&sender, asked, message(b"")).await.reason(), Some("deadline"));
    }
    let asked = request("/t.S/M").header("grpc-timeout", "400m").body(()).unwrap();
    assert_eq!(call(&sender, asked, message(b"")).await.reason(), Some("deadline"));
    assert!(matches!(world.event(transition).await, Transition::Opened { .. }));
}

#[tokio::test]
async fn callers_that_keep_their_own_calls_waiting_do_not_open_a_breaker() {
    let mut world = World::new();
    const SLOW: Duration = Duration::from_millis(300);
    let breaker = Settings { failure_threshold: 1, slow_after: Some(SLOW), ..Settings::default() };
    let listener = world.provider_with("p", "t.S", breaker, CallLimits::default()).await;
    serve(listener, |asked, mut respond| async move {
        if asked.uri().path() == "/t.S/OwnClock" {
            answer_status(respond, 4);
        } else if asked.uri().path() == "/t.S/Echo" {
            drop(read(asked).await);
            answer_ok(respond, b"");
        } else if asked.uri().path() == "/t.S/Endless" {
            let head = http::Response::builder().header("content-type", "application/grpc").body(()).unwrap();
            let mut to = respond.send_response(head, false).unwrap();
            to.send_data(message(&vec![7; 1 << 20]), false).unwrap();
            drop(std::future::poll_fn(|cx| to.poll_reset(cx)).await);
        } else {
            drop(std::future::poll_fn(|cx| respond.poll_reset(cx)).await);
        }
    });
    let mut sender = client(&world.caller("asker").await).await;
    let asked = |path: &str| request(path).header("grpc-timeout", "400m").body(()).unwrap();
    within(async {
        // A request without an end: the provider owes no answer yet.
        let (response, mut open) = sender.send_request(asked("/t.S/Open"), false).unwrap();
        open.send_data(message(b"more follows"), false).unwrap();
        assert_eq!(answer(response.await.unwrap()).await.reason(), Some("deadline"));
        // One that ends when its time is over but for moments.
        let (response, mut late) = sender.send_request(asked("/t.S/Late"), false).unwrap();
        tokio::time::sleep(Duration::from_millis(350)).await;
        // Its time may be over by now.
        let _ = late.send_data(message(b""), true);
        assert_eq!(answer(response.await.unwrap()).await.reason(), Some("deadline"));
        // One that the provider itself ends when its time is over.
        let (response, mut open) = sender.send_request(asked("/t.S/OwnClock"), false).unwrap();
        open.send_data(message(b"more follows"), false).unwrap();
        assert_eq!(answer(response.await.unwrap()).await.status(), 4);
        // One that takes long to ask, and is answered at once: it is not slow. Unless this machine was: then once more.
        loop {
            let slow = async || world.broker.snapshot().await.unwrap().providers[0].breaker.window.slow;
            let before = slow().await;
            let (response, mut late) = sender.send_request(request("/t.S/Echo").body(()).unwrap(), false).unwrap();
            tokio::time::sleep(SLOW + Duration::from_millis(50)).await;
            let asked = std::time::Instant::now();
            late.send_data(message(b""), true).unwrap();
            assert_eq!(answer(response.await.unwrap()).await.status(), 0);
            if asked.elapsed() < SLOW {
                assert_eq!((before, slow().await), (0, 0));
                break;
            }
            world.broker.reset_breakers(Some(identity("p").name)).await.unwrap();
        }
        // A response that its caller does not read. It has begun long before its time is over.
        let endless = request("/t.S/Endless").header("grpc-timeout", "4S").body(()).unwrap();
        let (response, _stream) = sender.send_request(endless, true).unwrap();
        let mut unread = response.await.unwrap().into_body();
        assert!(unread.data().await.unwrap().is_ok());
    })
    .await;
    // The last call ends here too: it gives its place back when its time is over.
    within(async {
        while world.broker.snapshot().await.unwrap().providers[0].in_flight > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let breaker = world.broker.snapshot().await.unwrap().providers[0].breaker;
    assert_eq!((breaker.position, breaker.consecutive_failures), (Position::Closed, 0));
    // The same provider, asked in full and silent.
    assert_eq!(call(&sender, asked("/t.S/Silent"), message(b"")).await.reason(), Some("deadline"));
    assert!(matches!(world.event(transition).await, Transition::Opened { .. }));
}

fn transition(event: &BrokerEvent) -> Option<Transition> {
    match event {
        BrokerEvent::BreakerChanged { transition, .. } => Some(*transition),
        _ => None,
    }
}
