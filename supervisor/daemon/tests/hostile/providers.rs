//! Providers that attack: what they answer instead of gRPC, and what becomes of the calls that were made to them.

use std::time::Duration;

use tokio::net::UnixListener;

use super::{
    grpc::{Answer, answer, client, message, within},
    wire::{
        ACK, CONTINUATION, DATA, END_STREAM, GOAWAY, HEADERS, PADDED, PING, PRIORITY, PUSH_PROMISE, Peer, RST_STREAM,
        SETTINGS, WINDOW_UPDATE, block, frame, frame_announced, headers, indexed_literal, long_headers, settings,
    },
    world::{GROWTH, Setup, World, asked_within, prefix, service},
};

/// Serves every connection with the same bytes: `first` as soon as it is there, `then` (made for the stream) after each
/// request. Reads everything else and answers nothing.
fn attack(listener: UnixListener, first: Vec<u8>, then: impl Fn(u32) -> Vec<u8> + Send + Sync + Clone + 'static) {
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (first, then) = (first.clone(), then.clone());
            tokio::spawn(async move {
                let mut peer = Peer::accepted(stream).await;
                peer.flood(&first, 1).await;
                while let Some(frame) = peer.next().await {
                    if frame.kind == HEADERS && !peer_wrote(&mut peer, &then(frame.stream)).await {
                        return;
                    }
                }
            });
        }
    });
}

async fn peer_wrote(peer: &mut Peer, bytes: &[u8]) -> bool {
    peer.flood(bytes, 1).await == bytes.len()
}

async fn call_once(world: &World, provider: &str, time: &str) -> Answer {
    let mut sender = client(&world.caller("asker")).await;
    let request = asked_within(&format!("/{}/M", service(provider)), time);
    let (response, mut stream) = sender.send_request(request, false).unwrap();
    // A call that is refused at once may be over before its body is sent.
    let _ = stream.send_data(message(b"ask"), true);
    within(async { answer(response.await.unwrap()).await }).await
}

fn ok_head() -> Vec<u8> {
    block(&[(":status", "200"), ("content-type", "application/grpc")])
}

type Then = Box<dyn Fn(u32) -> Vec<u8> + Send + Sync>;

/// What a provider answers to a request on a stream, for each rule that it can break.
fn breaches() -> Vec<(&'static str, Then)> {
    fn of(make: impl Fn(u32) -> Vec<u8> + Send + Sync + 'static) -> Then {
        Box::new(make)
    }
    let begin = |stream: u32| headers(stream, &ok_head(), 0);
    let end = |stream: u32| headers(stream, &block(&[("grpc-status", "0")]), END_STREAM);
    vec![
        ("HTTP/1 in the middle", of(|_| b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n".to_vec())),
        ("garbage", of(|_| vec![0xa5; 4096])),
        ("a frame over the size", of(|stream| frame_announced(1 << 22, DATA, 0, stream, &[0; 100]))),
        ("a head on stream 0", of(|_| headers(0, &ok_head(), 0))),
        ("a head on a stream of its own", of(|_| headers(2, &ok_head(), 0))),
        ("a head on a stream that nobody opened", of(|stream| headers(stream + 1000, &ok_head(), 0))),
        ("a promise", of(|stream| frame(PUSH_PROMISE, 4, stream, &[&[0, 0, 0, 2][..], &ok_head()].concat()))),
        ("data before the head", of(|stream| frame(DATA, 0, stream, &message(b"x")))),
        ("a window update of 0", of(|_| frame(WINDOW_UPDATE, 0, 0, &[0; 4]))),
        ("a window over 2^31-1", of(|_| frame(WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff]).repeat(2))),
        ("settings of 5 bytes", of(|_| frame(SETTINGS, 0, 0, &[0; 5]))),
        ("settings on a stream", of(|stream| frame(SETTINGS, 0, stream, &[]))),
        ("a ping of 7 bytes", of(|_| frame(PING, 0, 0, &[0; 7]))),
        ("more padding than frame", of(move |stream| [begin(stream), frame(DATA, PADDED, stream, &[9, 1])].concat())),
        ("a continuation of nothing", of(|stream| frame(CONTINUATION, 4, stream, &[]))),
        (
            "fields cut short by another frame",
            of(|stream| [frame(HEADERS, 0, stream, &ok_head()), frame(PING, 0, 0, &[0; 8])].concat()),
        ),
        ("a field with index 0", of(|stream| headers(stream, &[0x80], 0))),
        ("a field with an index out of the table", of(|stream| headers(stream, &[0xff, 0x80, 0x01], 0))),
        ("an unknown pseudo-field", of(|stream| headers(stream, &block(&[(":status", "200"), (":x", "y")]), 0))),
        ("a request's field", of(|stream| headers(stream, &block(&[(":path", "/x")]), 0))),
        ("no status", of(|stream| headers(stream, &block(&[("content-type", "application/grpc")]), 0))),
        ("a status that is no number", of(|stream| headers(stream, &block(&[(":status", "fine")]), END_STREAM))),
        ("an HTTP error", of(|stream| headers(stream, &block(&[(":status", "500")]), END_STREAM))),
        (
            "another content",
            of(|stream| headers(stream, &block(&[(":status", "200"), ("content-type", "text/html")]), 0)),
        ),
        ("no grpc-status at all", of(|stream| headers(stream, &ok_head(), END_STREAM))),
        (
            "a grpc-status that is no number",
            of(move |stream| [begin(stream), headers(stream, &block(&[("grpc-status", "yes")]), END_STREAM)].concat()),
        ),
        ("an end without trailers", of(move |stream| [begin(stream), frame(DATA, END_STREAM, stream, &[])].concat())),
        (
            "trailers that do not end",
            of(move |stream| [begin(stream), headers(stream, &block(&[("grpc-status", "0")]), 0)].concat()),
        ),
        (
            "an end within a message",
            of(move |stream| [begin(stream), frame(DATA, 0, stream, &prefix(100)), end(stream)].concat()),
        ),
        (
            "a message with an unknown flag",
            of(move |stream| [begin(stream), frame(DATA, 0, stream, b"HTTP/1.1 200 OK")].concat()),
        ),
        ("a reset", of(|stream| frame(RST_STREAM, 0, stream, &[0, 0, 0, 2]))),
        ("a refusal by HTTP/2", of(|stream| frame(RST_STREAM, 0, stream, &[0, 0, 0, 7]))),
        ("a reset after the head", of(move |stream| [begin(stream), frame(RST_STREAM, 0, stream, &[0; 4])].concat())),
        ("a farewell to all", of(|_| frame(GOAWAY, 0, 0, &[0, 0, 0, 0, 0, 0, 0, 11]))),
        (
            "a length that is not kept",
            of(|stream| {
                let head = [ok_head(), block(&[("content-length", "100")])].concat();
                let body = frame(DATA, 0, stream, &message(b"x"));
                [headers(stream, &head, 0), body, headers(stream, &block(&[("grpc-status", "0")]), END_STREAM)].concat()
            }),
        ),
    ]
}

/// The call ends at once with a refusal that names the provider, and so does an event.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_breach_ends_the_call_and_is_told() {
    let names: Vec<String> = (0..breaches().len()).map(|number| format!("bad-{number}")).collect();
    // So patient that no breach is noticed by time alone: the call would end by its deadline first.
    let patience = Some(Duration::from_secs(120));
    let setup = Setup { callers: vec!["asker".into()], providers: names.clone(), patience };
    let mut world = World::start(setup).await;
    let mut wrong = Vec::new();
    for (name, (what, then)) in names.iter().zip(breaches()) {
        let then = std::sync::Arc::new(then);
        attack(world.provider(name), settings(&[]), move |stream| then(stream));
        let answer = call_once(&world, name, "55S").await;
        let reason = answer.reason().unwrap_or_default();
        let named = answer.end("grpc-message").unwrap_or_default().contains(name.as_str());
        if answer.status() == 0 || !matches!(reason, "protocol_error" | "provider_lost") || !named {
            wrong.push(format!("{what}: {answer:?}"));
            continue;
        }
        if !matches!(what, "a refusal by HTTP/2" | "a farewell to all") {
            world.told(&["Provider", &format!("\"{name}\"")]).await;
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    world.unharmed(GROWTH).await;
}

/// Not even HTTP/2 from the start, or only half of it: calls fail as soon as that is known.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_http2_fails_calls() {
    let openings: [(&str, Vec<u8>); 5] = [
        ("http1", b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()),
        ("garbage", vec![0xff; 64 * 1024]),
        ("silence", vec![]),
        ("half", settings(&[(3, 100)])[..10].to_vec()),
        ("headless", frame(PING, 0, 0, &[0; 8])),
    ];
    let setup = Setup {
        callers: vec!["asker".into()],
        providers: openings.iter().map(|(name, _)| (*name).to_owned()).collect(),
        // Held by the pair too, on a machine that may stand still for a while.
        patience: Some(Duration::from_secs(3)),
    };
    let mut world = World::start(setup).await;
    for (name, opening) in openings {
        let listener = world.provider(name);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let opening = opening.clone();
                tokio::spawn(async move {
                    let mut peer = Peer::accepted(stream).await;
                    peer.flood(&opening, 1).await;
                    peer.rest().await;
                });
            }
        });
        let answer = call_once(&world, name, "55S").await;
        assert!(matches!(answer.status(), 13 | 14), "{name}: {answer:?}");
        assert!(matches!(answer.reason(), Some("provider_lost" | "protocol_error")), "{name}: {answer:?}");
        world.told(&["Provider", &format!("\"{name}\"")]).await;
    }
    world.unharmed(GROWTH).await;
}

/// Cheap frames without end, with a call open all the while that is never answered: it ends with its deadline or with
/// the connection, and the broker's memory does not follow the flood.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_are_survived() {
    const MUCH: usize = 12 * 1024 * 1024;
    type Flood = (&'static str, fn(u32) -> Vec<u8>, fn(u32) -> Vec<u8>);
    let floods: [Flood; 10] = [
        ("settings", |_| vec![], |_| settings(&[(4, 65_535)])),
        ("pings", |_| vec![], |_| frame(PING, 0, 0, &[7; 8])),
        ("answers-to-no-ping", |_| vec![], |_| frame(PING, ACK, 0, &[7; 8])),
        ("priorities", |_| vec![], |stream| frame(PRIORITY, 0, stream, &[0, 0, 0, 0, 1])),
        ("windows", |_| vec![], |stream| frame(WINDOW_UPDATE, 0, stream, &[0, 0, 0, 1])),
        ("early-heads", |_| vec![], |stream| headers(stream, &block(&[(":status", "103")]), 0)),
        ("empty-data", |stream| headers(stream, &ok_head(), 0), |stream| frame(DATA, 0, stream, &[])),
        ("continuations", |stream| frame(HEADERS, 0, stream, &ok_head()), |stream| frame(CONTINUATION, 0, stream, &[])),
        (
            "late-data",
            |stream| {
                headers(
                    stream,
                    &block(&[(":status", "200"), ("grpc-status", "5"), ("content-type", "application/grpc")]),
                    END_STREAM,
                )
            },
            |stream| frame(DATA, 0, stream, &[7; 100]),
        ),
        (
            "resets",
            |stream| frame(RST_STREAM, 0, stream, &[0, 0, 0, 2]),
            |stream| frame(RST_STREAM, 0, stream, &[0, 0, 0, 2]),
        ),
    ];
    let setup = Setup {
        callers: vec!["asker".into()],
        providers: floods.iter().map(|(name, ..)| (*name).to_owned()).collect(),
        ..Setup::default()
    };
    let mut world = World::start(setup).await;
    for (name, begin, one) in floods {
        attack(world.provider(name), settings(&[]), move |stream| {
            let one = one(stream);
            [begin(stream), one.repeat(MUCH / one.len())].concat()
        });
        let answer = call_once(&world, name, "3S").await;
        assert_ne!(answer.status(), 0, "{name}: {answer:?}");
    }
    world.unharmed(GROWTH).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bombs_are_refused() {
    let large = "x".repeat(4000);
    let referenced = move |fields: &[u8]| [fields, &indexed_literal("bomb", &large), &[0xbe; 16_000]].concat();
    let one = "y".repeat(1 << 20);
    let all = "z".repeat(16 << 20);
    let status = block(&[("grpc-status", "0")]);
    let head = |stream| headers(stream, &ok_head(), 0);
    let bombs: Vec<(&str, Then)> = vec![
        (
            "index",
            Box::new({
                let referenced = referenced.clone();
                move |stream| long_headers(stream, &referenced(&ok_head()), 0)
            }),
        ),
        (
            "mebibyte",
            Box::new({
                let one = one.clone();
                move |stream| long_headers(stream, &[ok_head(), block(&[("one", &one)])].concat(), 0)
            }),
        ),
        ("much", Box::new(move |stream| long_headers(stream, &[ok_head(), block(&[("all", &all)])].concat(), 0))),
        (
            "index-trailers",
            Box::new({
                let status = status.clone();
                move |stream| [head(stream), long_headers(stream, &referenced(&status), END_STREAM)].concat()
            }),
        ),
        (
            "large-trailers",
            Box::new(move |stream| {
                [head(stream), long_headers(stream, &[&status[..], &block(&[("one", &one)])].concat(), END_STREAM)]
                    .concat()
            }),
        ),
        ("gibibyte", Box::new(move |stream| [head(stream), frame(DATA, 0, stream, &prefix(1 << 30))].concat())),
    ];
    let setup = Setup {
        callers: vec!["asker".into()],
        providers: bombs.iter().map(|(name, _)| (*name).to_owned()).collect(),
        ..Setup::default()
    };
    let mut world = World::start(setup).await;
    for (name, then) in bombs {
        let then = std::sync::Arc::new(then);
        attack(world.provider(name), settings(&[]), move |stream| then(stream));
        let answer = call_once(&world, name, "55S").await;
        if name == "gibibyte" {
            assert_eq!((answer.status(), answer.reason()), (8, Some("message_too_large")), "{answer:?}");
            world.told(&["MessageTooLarge", "\"gibibyte\"", "1073741824"]).await;
        } else {
            assert!(matches!(answer.reason(), Some("protocol_error" | "provider_lost")), "{name}: {answer:?}");
            world.told(&["Provider", &format!("\"{name}\"")]).await;
        }
    }
    world.unharmed(GROWTH).await;
}

/// A provider that gives no window, allows no stream, or drips its answer: calls end with their deadlines.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_slow_has_until_the_deadline() {
    type Slow = (&'static str, Vec<u8>, fn(u32) -> Vec<u8>);
    let slow: [Slow; 4] = [
        ("no-window", settings(&[(4, 0)]), |_| vec![]),
        ("no-stream", settings(&[(3, 0)]), |_| vec![]),
        ("half-head", settings(&[]), |stream| frame(HEADERS, 0, stream, &ok_head())),
        ("half-message", settings(&[]), |stream| {
            [headers(stream, &ok_head(), 0), frame(DATA, 0, stream, &prefix(1000))].concat()
        }),
    ];
    let setup = Setup {
        callers: vec!["asker".into()],
        providers: slow.iter().map(|(name, ..)| (*name).to_owned()).collect(),
        ..Setup::default()
    };
    let mut world = World::start(setup).await;
    for (name, first, then) in slow {
        attack(world.provider(name), first, then);
        let answer = call_once(&world, name, "700m").await;
        assert_eq!((answer.status(), answer.reason()), (4, Some("deadline")), "{name}: {answer:?}");
    }
    world.unharmed(GROWTH).await;
}

/// Metadata under the broker's own prefix do not come from providers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forged_refusals_do_not_pass() {
    let setup = Setup { callers: vec!["asker".into()], providers: vec!["liar".into()], ..Setup::default() };
    let mut world = World::start(setup).await;
    let forged = [("plugvisor-reason", "breaker_open"), ("plugvisor-hint", "send money"), ("plugvisor-caller", "root")];
    attack(world.provider("liar"), settings(&[]), move |stream| {
        let head = [ok_head(), block(&forged)].concat();
        let trailers = [block(&[("grpc-status", "14"), ("x-own", "kept")]), block(&forged)].concat();
        [headers(stream, &head, 0), headers(stream, &trailers, END_STREAM)].concat()
    });
    let answer = call_once(&world, "liar", "55S").await;
    assert_eq!(answer.status(), 14);
    assert_eq!(answer.end("x-own"), Some("kept"));
    let ours = |name: &http::HeaderName| name.as_str().starts_with("plugvisor-");
    assert!(!answer.headers.keys().chain(answer.trailers.keys()).any(ours), "{answer:?}");
    world.unharmed(GROWTH).await;
}
