//! Callers that break a rule of HTTP/2: each rule, one by one, and what the broker must do (RFC 9113 and RFC 7541).

use super::{
    grpc::{call, client, message},
    wire::{
        ACK, COMPRESSION_ERROR, CONTINUATION, DATA, END_STREAM, FLOW_CONTROL_ERROR, FRAME_SIZE_ERROR, GOAWAY, HEADERS,
        PADDED, PING, PREFACE, PRIORITY, PROTOCOL_ERROR, PUSH_PROMISE, Peer, RST_STREAM, SETTINGS, STREAM_CLOSED, Seen,
        WINDOW_UPDATE, block, frame, frame_announced, headers, indexed_literal, request, settings,
    },
    world::{GROWTH, Setup, World, asked, service},
};

/// What a breach must lead to.
enum Must {
    /// The connection ends with one of these codes, or with the one that is less specific (PROTOCOL_ERROR), and an event
    /// names its peer.
    EndWith(&'static [u32]),
    /// The stream is refused, by a reset or an answer; ending the connection is stricter and allowed.
    RefuseStream(u32),
    /// Nothing: the next question is answered.
    Pass,
}

/// A rule, how it is broken, and what must follow.
fn breaches() -> Vec<(&'static str, Vec<u8>, Must)> {
    use Must::{EndWith, Pass, RefuseStream};
    let open = |stream| headers(stream, &request("/t.target/Hang"), 0);
    let whole = |stream| headers(stream, &request("/t.target/Ok"), END_STREAM);
    let then = |first: Vec<u8>, second: Vec<u8>| [first, second].concat();
    let with = |fields: &[(&str, &str)]| headers(1, &[request("/t.target/Ok"), block(fields)].concat(), END_STREAM);
    let pair = |id: u16, value: u32| settings(&[(id, value)]);
    let update = |stream: u32, by: u32| frame(WINDOW_UPDATE, 0, stream, &by.to_be_bytes());
    let most = (1 << 31) - 1;
    vec![
        ("a frame over the announced size", frame_announced(1 << 20, DATA, 0, 1, &[]), EndWith(&[FRAME_SIZE_ERROR])),
        ("headers on stream 0", headers(0, &request("/t.target/Ok"), END_STREAM), EndWith(&[PROTOCOL_ERROR])),
        ("headers on an even stream", whole(2), EndWith(&[PROTOCOL_ERROR])),
        ("headers on an older stream", then(whole(5), whole(3)), EndWith(&[PROTOCOL_ERROR, STREAM_CLOSED])),
        ("data on stream 0", frame(DATA, 0, 0, b"x"), EndWith(&[PROTOCOL_ERROR])),
        ("data on an idle stream", frame(DATA, 0, 1, b"x"), EndWith(&[PROTOCOL_ERROR])),
        ("a reset of an idle stream", frame(RST_STREAM, 0, 1, &[0, 0, 0, 8]), EndWith(&[PROTOCOL_ERROR])),
        ("a reset of 3 bytes", then(open(1), frame(RST_STREAM, 0, 1, &[0; 3])), EndWith(&[FRAME_SIZE_ERROR])),
        ("a window for an idle stream", update(1, 1), EndWith(&[PROTOCOL_ERROR])),
        ("a window update of 0", update(0, 0), EndWith(&[PROTOCOL_ERROR])),
        ("a window update of 3 bytes", frame(WINDOW_UPDATE, 0, 0, &[0; 3]), EndWith(&[FRAME_SIZE_ERROR])),
        ("a connection window over 2^31-1", then(update(0, most), update(0, most)), EndWith(&[FLOW_CONTROL_ERROR])),
        ("a stream window over 2^31-1", then(open(1), update(1, most)), RefuseStream(1)),
        ("settings on a stream", frame(SETTINGS, 0, 1, &[]), EndWith(&[PROTOCOL_ERROR])),
        ("settings of 5 bytes", frame(SETTINGS, 0, 0, &[0; 5]), EndWith(&[FRAME_SIZE_ERROR])),
        ("an acknowledgement that says more", frame(SETTINGS, ACK, 0, &[0; 6]), EndWith(&[FRAME_SIZE_ERROR])),
        ("a first window over 2^31-1", pair(4, 1 << 31), EndWith(&[FLOW_CONTROL_ERROR])),
        ("frames below 16384", pair(5, 100), EndWith(&[PROTOCOL_ERROR])),
        ("a push setting of 2", pair(2, 2), EndWith(&[PROTOCOL_ERROR])),
        ("a ping of 7 bytes", frame(PING, 0, 0, &[0; 7]), EndWith(&[FRAME_SIZE_ERROR])),
        ("a ping on a stream", frame(PING, 0, 1, &[0; 8]), EndWith(&[PROTOCOL_ERROR])),
        ("a goaway on a stream", frame(GOAWAY, 0, 1, &[0; 8]), EndWith(&[PROTOCOL_ERROR])),
        (
            "a promise from a client",
            then(open(1), frame(PUSH_PROMISE, 4, 1, &[0, 0, 0, 2])),
            EndWith(&[PROTOCOL_ERROR]),
        ),
        ("a continuation of nothing", frame(CONTINUATION, 4, 1, &[]), EndWith(&[PROTOCOL_ERROR])),
        (
            "fields cut short by another frame",
            then(frame(HEADERS, 0, 1, &request("/t.target/Ok")), frame(PING, 0, 0, &[0; 8])),
            EndWith(&[PROTOCOL_ERROR]),
        ),
        (
            "fields that go on on another stream",
            then(frame(HEADERS, 0, 1, &request("/t.target/Ok")), frame(CONTINUATION, 4, 3, &[])),
            EndWith(&[PROTOCOL_ERROR]),
        ),
        ("more padding than frame, data", then(open(1), frame(DATA, PADDED, 1, &[9, 1])), EndWith(&[PROTOCOL_ERROR])),
        ("more padding than frame, fields", headers(1, &[200, 1, 2, 3], PADDED), EndWith(&[PROTOCOL_ERROR])),
        ("a field with index 0", headers(1, &[0x80], END_STREAM), EndWith(&[COMPRESSION_ERROR])),
        ("a field with an index out of the table", headers(1, &[0xff, 0x80, 0x01], 1), EndWith(&[COMPRESSION_ERROR])),
        ("an index without end", headers(1, &[0xff; 32], END_STREAM), EndWith(&[COMPRESSION_ERROR])),
        ("a table over the allowed size", headers(1, &[0x3f, 0xff, 0xff, 0x7f], 1), EndWith(&[COMPRESSION_ERROR])),
        ("a field that ends in the middle", headers(1, &[0, 5, b'a'], END_STREAM), EndWith(&[COMPRESSION_ERROR])),
        ("a name in Huffman's code with a wrong end", headers(1, &[0, 0x81, 0, 0], 1), EndWith(&[COMPRESSION_ERROR])),
        ("a name in capitals", with(&[("Forged", "x")]), RefuseStream(1)),
        ("a field of the connection", with(&[("connection", "close")]), RefuseStream(1)),
        ("an unknown pseudo-field", with(&[(":forged", "x")]), RefuseStream(1)),
        ("a pseudo-field after others", with(&[(":path", "/a.B/C")]), RefuseStream(1)),
        ("a response's field", headers(1, &block(&[(":status", "200")]), END_STREAM), RefuseStream(1)),
        ("no path", headers(1, &block(&[(":method", "POST"), (":scheme", "http")]), END_STREAM), RefuseStream(1)),
        ("a length that is not kept", with(&[("content-length", "7")]), RefuseStream(1)),
        ("data after the end", then(whole(1), frame(DATA, 0, 1, b"x")), RefuseStream(1)),
        (
            "trailers twice",
            [open(1), headers(1, &block(&[("a", "b")]), END_STREAM), headers(1, &block(&[("a", "b")]), END_STREAM)]
                .concat(),
            RefuseStream(1),
        ),
        ("trailers that do not end", then(open(1), headers(1, &block(&[("a", "b")]), 0)), RefuseStream(1)),
        (
            "a pseudo-field in trailers",
            then(open(1), headers(1, &block(&[(":path", "/x")]), END_STREAM)),
            RefuseStream(1),
        ),
        ("more data than the window", then(open(1), frame(DATA, 0, 1, &[0; 16_000]).repeat(20)), RefuseStream(1)),
        ("an unknown kind of frame", frame(0xfa, 0xff, 77, b"what"), Pass),
        ("an unknown setting", pair(0xfafa, 7), Pass),
        ("a ping with an unknown flag", frame(PING, 0xf0, 0, &[1; 8]), Pass),
        ("a priority on an idle stream", frame(PRIORITY, 0, 9, &[0, 0, 0, 0, 1]), Pass),
        ("a field for the table", headers(1, &[request("/t.target/Ok"), indexed_literal("x", "y")].concat(), 1), Pass),
        ("an answer to no ping", frame(PING, ACK, 0, &[1; 8]), Pass),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_breach_of_http2_ends_what_it_must() {
    let breaches = breaches();
    let callers = (0..breaches.len()).map(|number| format!("breach-{number}")).collect();
    let world = World::start(Setup { callers, ..Setup::default() }).await;
    let mut wrong = Vec::new();
    for (number, (what, bytes, must)) in breaches.iter().enumerate() {
        let mut peer = Peer::caller(&world.caller(&format!("breach-{number}"))).await;
        peer.send(bytes).await;
        let seen =
            peer.outcome(|seen| if let Must::RefuseStream(stream) = must { seen.refused(*stream) } else { true });
        let seen: Seen = seen.await;
        let right = match must {
            Must::EndWith(codes) => {
                seen.closed && seen.goaway.is_some_and(|code| codes.contains(&code) || code == PROTOCOL_ERROR)
            }
            Must::RefuseStream(stream) => seen.refused(*stream) && seen.goaway != Some(0),
            Must::Pass => !seen.closed && seen.goaway.is_none(),
        };
        if !right {
            wrong.push(format!("{what}: {seen:?}"));
        }
        if right && matches!(must, Must::EndWith(_)) {
            world.told(&["CallerRejected", &format!("breach-{number}#1"), "HTTP/2"]).await;
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    world.unharmed(GROWTH).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_http2_is_closed() {
    let garbage: Vec<u8> =
        (0..64 * 1024_u32).map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let begun = |rest: &[u8]| [PREFACE, &settings(&[]), rest].concat();
    let openings = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        b"POST /t.target/Ok HTTP/1.1\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n".to_vec(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".repeat(40),
        garbage.clone(),
        begun(&garbage),
        [PREFACE, &garbage].concat(),
    ];
    let callers = (0..openings.len()).map(|number| format!("garbage-{number}")).collect();
    let world = World::start(Setup { callers, ..Setup::default() }).await;
    for (number, opening) in openings.iter().enumerate() {
        let mut peer = Peer::silent(&world.caller(&format!("garbage-{number}"))).await;
        peer.send(opening).await;
        peer.rest().await;
        world.told(&["CallerRejected", &format!("garbage-{number}#1"), "HTTP/2"]).await;
    }
    world.unharmed(GROWTH).await;
}

/// The identity is the connection's, whatever the metadata say, and a path that comes back or goes on too long ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forged_identity_is_overwritten() {
    let callers = vec!["attacker".into(), "b".into()];
    let mut world = World::start(Setup { callers, providers: vec!["b".into()], ..Setup::default() }).await;
    super::grpc::serve(world.provider("b"), |_asked, respond| async move { super::world::answer_ok(respond, b"") });
    let sender = client(&world.caller("attacker")).await;
    let mut forged = asked("/t.target/Echo");
    for (name, value) in [
        ("plugvisor-caller", "victim"),
        ("plugvisor-caller", "local/0"),
        ("plugvisor-reason", "breaker_open"),
        ("plugvisor-anything", "x"),
        ("plugvisor-hops", "somebody,else"),
    ] {
        forged.headers_mut().append(name, value.parse().unwrap());
    }
    let echoed = call(&sender, forged, message(b"")).await;
    assert_eq!(echoed.status(), 0, "{echoed:?}");
    let echoed = String::from_utf8(echoed.body[5..].to_vec()).unwrap();
    let ours: Vec<&str> = echoed.lines().filter(|line| line.starts_with("plugvisor-")).collect();
    assert!(ours.contains(&"plugvisor-caller: attacker"), "{echoed}");
    assert!(ours.contains(&"plugvisor-hops: somebody,else,attacker"), "{echoed}");
    assert_eq!(ours.len(), 2, "what the caller wrote travelled on: {echoed}");

    let path = format!("/{}/M", service("b"));
    let with_hops = |hops: &str| {
        let mut request = asked(&path);
        request.headers_mut().insert("plugvisor-hops", hops.parse().unwrap());
        request
    };
    // b has called the attacker, who calls b.
    let back = call(&sender, with_hops("b"), message(b"")).await;
    assert_eq!((back.status(), back.reason()), (9, Some("loop")), "{back:?}");
    world.told(&["CallDenied", "attacker", "b -> attacker -> b"]).await;
    // One's own name is on no path that one is at the end of, and nobody calls itself.
    let itself = call(&client(&world.caller("b")).await, asked(&path), message(b"")).await;
    assert_eq!((itself.status(), itself.reason()), (9, Some("loop")), "{itself:?}");
    let far = call(&sender, with_hops("c,d,e,f,g,h,i"), message(b"")).await;
    assert_eq!(far.status(), 0, "seven before the attacker make eight: {far:?}");
    let farther = call(&sender, with_hops("c,d,e,f,g,h,i,j"), message(b"")).await;
    assert_eq!((farther.status(), farther.reason()), (9, Some("loop")), "{farther:?}");
    for nonsense in ["", ",", "b,,", "B", "a b", &"x,".repeat(4000), "\u{e4}"] {
        let answer = call(&sender, with_hops(nonsense), message(b"")).await;
        let (status, reason) = (answer.status(), answer.reason());
        let refused = reason.is_some() && matches!(status, 3 | 9);
        assert!(refused || nonsense.is_empty(), "{nonsense:?} led to {status} {reason:?}");
    }
    world.unharmed(GROWTH).await;
}
