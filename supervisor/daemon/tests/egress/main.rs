//! The egress proxy over real sockets: what passes, what is refused and how, and what it costs whom.
#![allow(missing_docs, reason = "tests")]

mod support;

use std::time::{Duration, Instant};

use plugvisor_core::CapabilitySet;
use plugvisor_daemon::egress::EgressLimits;
use plugvisor_package::Capability;
use support::{PATIENCE, Server, Setting, read_all, read_until};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Kept: yes\r\nConnection: x-own\r\nX-Own: no\r\n\r\nhello";

fn reason(answer: &str) -> &str {
    let line = answer.lines().find_map(|line| line.strip_prefix("plugvisor-reason: "));
    line.unwrap_or_else(|| panic!("no reason in {answer:?}"))
}

fn status(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or_else(|| panic!("no status in {answer:?}"))
}

#[tokio::test]
async fn a_tunnel_carries_what_it_is_given_and_each_side_ends_by_itself() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let destination = listener.local_addr().expect("its address").to_string();
    let world = Setting::reaching(std::slice::from_ref(&destination)).start().await;
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a connection");
        let heard = read_all(&mut stream).await;
        // It speaks only when it has heard everything.
        stream.write_all(format!("heard {}", heard.len()).as_bytes()).await.expect("answers");
        heard
    });
    let mut stream = world.connect().await;
    // Some of it behind the head, before the answer is there.
    let head = format!("CONNECT {destination} HTTP/1.1\r\nHost: {destination}\r\n\r\nearly");
    stream.write_all(head.as_bytes()).await.expect("asks");
    let answer = read_until(&mut stream, "\r\n\r\n").await;
    assert_eq!(answer, "HTTP/1.1 200 Connection established\r\n\r\n");
    let much = "x".repeat(1 << 20);
    stream.write_all(much.as_bytes()).await.expect("writes");
    stream.shutdown().await.expect("has said everything");
    assert_eq!(read_all(&mut stream).await, format!("heard {}", much.len() + 5));
    let heard = server.await.expect("the server");
    assert!(heard.starts_with("earlyx"));
    assert_eq!(world.figures.bytes_out(), 5 + (1 << 20));
    assert_eq!(world.figures.bytes_in(), "heard 1048581".len() as u64);
}

#[tokio::test]
async fn what_is_not_listed_or_not_public_is_refused_with_its_fix() {
    let server = Server::answering(OK).await;
    let port = server.address.port();
    let list = [
        "listed.example:443".to_owned(),
        format!("localhost:{port}"),
        "169.254.169.254:80".to_owned(),
        format!("127.0.0.1:{port}"),
        "[::ffff:127.0.0.1]:80".to_owned(),
        "10.1.2.3:80".to_owned(),
    ];
    let mut setting = Setting::reaching(&list);
    setting.addresses.clear();
    let world = setting.start().await;
    let table = [
        ("CONNECT other.example:443 HTTP/1.1\r\nHost: x\r\n\r\n".into(), "not_listed", "runtime.network.egress"),
        ("CONNECT listed.example:80 HTTP/1.1\r\nHost: x\r\n\r\n".into(), "not_listed", "\"listed.example:80\""),
        ("GET http://other.example/ HTTP/1.1\r\nHost: listed.example\r\n\r\n".into(), "not_listed", "other.example:80"),
        // Listed by its author alone: an operator has to say it too.
        (format!("CONNECT localhost:{port} HTTP/1.1\r\nHost: x\r\n\r\n"), "address_refused", "a loopback address"),
        (
            format!("GET http://localhost:{port}/ HTTP/1.1\r\nHost: x\r\n\r\n"),
            "address_refused",
            "[plugin.sample.network]",
        ),
        (format!("GET {}/ HTTP/1.1\r\nHost: x\r\n\r\n", server.url()), "address_refused", "\"127.0.0.1\""),
        ("GET http://169.254.169.254/ HTTP/1.1\r\nHost: x\r\n\r\n".into(), "address_refused", "link-local"),
        ("CONNECT [::ffff:127.0.0.1]:80 HTTP/1.1\r\nHost: x\r\n\r\n".into(), "address_refused", "inside an IPv6"),
        ("CONNECT 10.1.2.3:80 HTTP/1.1\r\nHost: x\r\n\r\n".into(), "address_refused", "private"),
    ];
    for (request, wanted, said) in &table {
        let answer = world.say(request).await;
        assert_eq!((status(&answer), reason(&answer)), ("403", *wanted), "{request}: {answer}");
        assert!(answer.contains(said), "{said}: {answer}");
    }
    assert_eq!(world.denials(), table.iter().map(|(_, reason, _)| *reason).collect::<Vec<_>>());
    assert_eq!(world.figures.denials(), table.len() as u64);
    assert_eq!(world.figures.bytes_out(), 0, "nothing went out");
}

#[tokio::test]
async fn a_name_reaches_an_address_that_the_operator_lists() {
    let mut server = Server::answering(OK).await;
    let destination = format!("localhost:{}", server.address.port());
    let world = Setting::reaching(std::slice::from_ref(&destination)).start().await;
    let answer =
        world.say(&format!("GET http://{destination}/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).await;
    assert_eq!(status(&answer), "200", "{answer}");
    assert!(server.was_asked().await.contains(&format!("host: {destination}\r\n")));
}

#[tokio::test]
async fn plain_requests_are_judged_one_by_one_and_lose_what_is_for_the_proxy() {
    let mut server = Server::answering(OK).await;
    let world = Setting::reaching(&[server.destination()]).start().await;
    let mut stream = world.connect().await;
    let url = server.url();
    let request = format!(
        "GET {url}/a?b HTTP/1.1\r\nHost: lies.example\r\nX-Own: 1\r\nX-Kept: 1\r\nConnection: keep-alive, X-Own\r\n\
         Proxy-Connection: keep-alive\r\nProxy-Authorization: Basic x\r\nTE: trailers\r\nUpgrade: h2c\r\n\r\n"
    );
    for _ in 0..2 {
        stream.write_all(request.as_bytes()).await.expect("asks");
        let answer = read_until(&mut stream, "hello").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.contains("x-kept: yes\r\n"), "{answer}");
        assert!(!answer.contains("x-own") && answer.contains("content-length: 5\r\n"), "{answer}");
        assert!(!answer.contains("connection:"), "it may go on: {answer}");
        let asked = server.was_asked().await;
        assert!(asked.starts_with("GET /a?b HTTP/1.1\r\n"), "{asked}");
        assert!(asked.contains(&format!("host: {}\r\n", server.address)) && asked.contains("x-kept: 1\r\n"), "{asked}");
        assert!(asked.contains("via: 1.1 plugvisor\r\n") && asked.contains("connection: close\r\n"), "{asked}");
        for gone in ["lies", "x-own", "proxy-", "te:", "h2c", "keep-alive"] {
            assert!(!asked.contains(gone), "{gone}: {asked}");
        }
    }
    // The third is for somebody else.
    stream.write_all(b"GET http://other.example/ HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("asks");
    let answer = read_all(&mut stream).await;
    assert_eq!((status(&answer), reason(&answer)), ("403", "not_listed"));
}

#[tokio::test]
async fn bodies_pass_in_every_framing() {
    let mut server =
        Server::answering("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n").await;
    let world = Setting::reaching(&[server.destination()]).start().await;
    let url = server.url();
    let mut stream = world.connect().await;
    // A length, then chunks with an extension and a trailer, on one connection.
    let request = format!("POST {url}/ HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody");
    stream.write_all(request.as_bytes()).await.expect("asks");
    let answer = read_until(&mut stream, "0\r\n\r\n").await;
    assert!(answer.contains("transfer-encoding: chunked\r\n") && answer.contains("5\r\nhello\r\n"), "{answer}");
    let asked = server.was_asked().await;
    assert!(asked.contains("content-length: 4\r\n") && asked.ends_with("\r\n\r\nbody"), "{asked}");

    let request = format!(
        "POST {url}/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.expect("asks");
    assert_eq!(read_until(&mut stream, "\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"3;x=y\r\none\r\n").await.expect("writes");
    stream.write_all(b"3\r\ntwo\r\n0\r\nX-Trailer: dropped\r\n\r\n").await.expect("writes");
    let answer = read_all(&mut stream).await;
    assert!(answer.contains("connection: close\r\n") && answer.ends_with("5\r\nhello\r\n0\r\n\r\n"), "{answer}");
    let asked = server.was_asked().await;
    assert!(asked.contains("transfer-encoding: chunked\r\n") && !asked.to_lowercase().contains("expect"), "{asked}");
    let body = asked.split_once("\r\n\r\n").expect("a body").1;
    let said: String = body.split("\r\n").filter(|line| ["one", "two", "onetwo"].contains(line)).collect();
    assert_eq!(said, "onetwo", "{asked}");
    assert!(!asked.contains("Trailer"), "{asked}");

    // To HTTP/1.0 without chunks, to a HEAD without a body.
    let answer = world.say(&format!("GET {url}/ HTTP/1.0\r\n\r\n")).await;
    assert!(!answer.contains("chunked") && answer.ends_with("\r\n\r\nhello"), "{answer}");
    let answer = world.say(&format!("HEAD {url}/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).await;
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.ends_with("\r\n\r\n") && !answer.contains("hello"),
        "{answer}"
    );
}

#[tokio::test]
async fn what_two_readers_could_understand_differently_is_refused() {
    let mut server = Server::answering(OK).await;
    let world = Setting::reaching(&[server.destination()]).start().await;
    let url = server.url();
    let heads = [
        ("Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", "ambiguous_body"),
        ("Transfer-Encoding: chunked\r\nContent-Length: 4\r\n", "ambiguous_body"),
        ("Content-Length: 4\r\nContent-Length: 4\r\n", "ambiguous_body"),
        ("Content-Length: 4, 4\r\n", "ambiguous_body"),
        ("Content-Length: +4\r\n", "ambiguous_body"),
        ("Transfer-Encoding: gzip, chunked\r\n", "ambiguous_body"),
        ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", "ambiguous_body"),
        ("Transfer-Encoding: \x0bchunked\r\n", "malformed"),
        ("Transfer-Encoding : chunked\r\n", "malformed"),
        ("X: a\r\n b\r\n", "malformed"),
        ("X: a\nTransfer-Encoding: chunked\r\n", "malformed"),
        ("X: a\rTransfer-Encoding: chunked\r\n", "malformed"),
        ("X: \0\r\n", "malformed"),
        ("Host: other.example\r\n", "ambiguous_body"),
    ];
    for (fields, wanted) in heads {
        let answer = world.say(&format!("POST {url}/ HTTP/1.1\r\nHost: x\r\n{fields}\r\n0\r\n\r\n")).await;
        assert_eq!((status(&answer), reason(&answer)), ("400", wanted), "{fields:?}: {answer}");
    }
    for (request, wanted) in [
        (format!("GET {url}/ HTTP/1.1\n\n"), "malformed"),
        (format!("\r\nGET {url}/ HTTP/1.1\r\nHost: x\r\n\r\n"), "malformed"),
        (format!("GET {url}/ HTTP/1.1\r\n\r\n"), "ambiguous_body"),
        ("GET /path HTTP/1.1\r\nHost: x\r\n\r\n".into(), "malformed"),
        ("GET https://listed.example/ HTTP/1.1\r\nHost: x\r\n\r\n".into(), "malformed"),
        (format!("GET http://a@{}/ HTTP/1.1\r\nHost: x\r\n\r\n", server.address), "malformed"),
        ("CONNECT 127.0.0.1 HTTP/1.1\r\nHost: x\r\n\r\n".into(), "malformed"),
        ("CONNECT 127.1:80 HTTP/1.1\r\nHost: x\r\n\r\n".into(), "malformed"),
        (format!("CONNECT {} HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n", server.address), "malformed"),
        ("\x16\x03\x01\x02\x00\x01\r\n\r\n".into(), "malformed"),
    ] {
        let answer = world.say(&request).await;
        assert_eq!((status(&answer), reason(&answer)), ("400", wanted), "{request:?}: {answer}");
    }
    let answer = world.say(&format!("GET {url}/ HTTP/2.0\r\nHost: x\r\n\r\n")).await;
    assert!(["400", "505"].contains(&status(&answer)), "{answer}");
    assert!(timeout(Duration::from_millis(1), server.asked.recv()).await.is_err(), "the server saw none of it");

    // A malformed chunk ends both sides before the server could take the request for whole.
    let chunks =
        [("0x3\r\nabc\r\n", "ambiguous_body"), ("3\nabc\r\n", "ambiguous_body"), ("3\r\nabcd\r\n", "ambiguous_body")];
    for (body, wanted) in chunks {
        let request = format!("POST {url}/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{body}0\r\n\r\n");
        let answer = world.say(&request).await;
        assert_eq!((status(&answer), reason(&answer)), ("400", wanted), "{body:?}: {answer}");
        let asked = server.was_asked().await;
        assert!(!asked.ends_with("0\r\n\r\n"), "{asked}");
    }
}

#[tokio::test]
async fn heads_are_bounded_in_size_and_time() {
    let server = Server::answering(OK).await;
    let mut setting = Setting::reaching(&[server.destination()]);
    let short = Duration::from_millis(200);
    setting.limits = EgressLimits { head_time: short, rest: short, ..EgressLimits::default() };
    let world = setting.start().await;
    let url = server.url();
    let long = format!("GET {url}/ HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "a".repeat(1 << 20));
    let answer = world.say(&long).await;
    assert_eq!((status(&answer), reason(&answer)), ("431", "head_too_large"));
    let many = format!("GET {url}/ HTTP/1.1\r\nHost: x\r\n{}\r\n", "A: b\r\n".repeat(101));
    let answer = world.say(&many).await;
    assert_eq!((status(&answer), reason(&answer)), ("431", "head_too_large"));

    // A slow sender is told after the time for a head, however busy it is; a silent one too.
    let mut stream = world.connect().await;
    let (mut reader, mut writer) = stream.split();
    let began = Instant::now();
    let sending = async {
        for byte in "GET http://a/ HTTP/1.1\r\nHost: x\r\n".bytes().cycle() {
            if writer.write_all(&[byte]).await.is_err() {
                break;
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    let mut answer = String::new();
    tokio::select! {
        () = sending => {}
        read = timeout(PATIENCE, reader.read_to_string(&mut answer)) => drop(read.expect("it ends")),
    }
    assert!(began.elapsed() >= short, "{answer}");
    assert_eq!((status(&answer), reason(&answer)), ("408", "head_timeout"));
    let answer = world.say("").await;
    assert_eq!(reason(&answer), "head_timeout");
    // Between two requests it is simply closed.
    let mut stream = world.connect().await;
    stream.write_all(format!("GET {url}/ HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.expect("asks");
    let answer = read_all(&mut stream).await;
    assert!(answer.ends_with("hello"), "{answer}");
}

#[tokio::test]
async fn a_websocket_passes_when_it_is_granted() {
    const SWITCH: &str = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                          Sec-WebSocket-Accept: x\r\n\r\n";
    let mut server = Server::answering(SWITCH).await;
    let request = format!(
        "GET {}/chat HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: y\r\n\r\n",
        server.url()
    );
    for granted in [Capability::HttpClient, Capability::WebSocket] {
        let mut setting = Setting::reaching(&[server.destination()]);
        setting.granted = CapabilitySet::of(&[granted]);
        let world = setting.start().await;
        if granted == Capability::HttpClient {
            let answer = world.say(&request).await;
            assert_eq!((status(&answer), reason(&answer)), ("403", "capability_missing"));
            assert!(answer.contains("network:websocket"));
            // Where the operator's file is is for operators.
            assert!(answer.contains("in the configuration") && !answer.contains("plugvisor.toml"), "{answer}");
            let events = world.events.read(0, usize::MAX).entries;
            assert!(events.iter().any(|(_, record)| record.event.hint().contains("in plugvisor.toml")), "{events:?}");
            continue;
        }
        let mut stream = world.connect().await;
        stream.write_all(request.as_bytes()).await.expect("asks");
        let answer = read_until(&mut stream, "\r\n\r\n").await;
        assert_eq!(status(&answer), "101");
        assert!(
            answer.contains("upgrade: websocket\r\n") && answer.contains("sec-websocket-accept: x\r\n"),
            "{answer}"
        );
        let asked = server.was_asked().await.to_lowercase();
        assert!(asked.contains("connection: upgrade\r\n") && asked.contains("sec-websocket-key: y\r\n"), "{asked}");
        for word in ["ping", "pong"] {
            stream.write_all(word.as_bytes()).await.expect("writes");
            assert_eq!(read_until(&mut stream, word).await, word);
        }
        stream.shutdown().await.expect("has said everything");
        assert_eq!(read_all(&mut stream).await, "");
        // A plain request needs the other one.
        let answer = world.say(&format!("GET {}/ HTTP/1.1\r\nHost: x\r\n\r\n", server.url())).await;
        assert_eq!(reason(&answer), "capability_missing");
    }
}

#[tokio::test]
async fn a_server_that_switches_unasked_or_lies_is_not_passed_on() {
    let table = [
        ("HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n", "server_failed"),
        ("nonsense\r\n\r\n", "server_failed"),
        ("", "server_failed"),
    ];
    for (answer, wanted) in table {
        let server = Server::answering(answer).await;
        let world = Setting::reaching(&[server.destination()]).start().await;
        let got = world.say(&format!("GET {}/ HTTP/1.1\r\nHost: x\r\n\r\n", server.url())).await;
        assert_eq!((status(&got), reason(&got)), ("502", wanted), "{answer:?}: {got}");
        assert!(world.denials().is_empty(), "a server's failure is no denial");
    }
    // What it says of its body is not believed: the plugin sees one framing.
    let server = Server::answering(
        "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    )
    .await;
    let world = Setting::reaching(&[server.destination()]).start().await;
    let got = world.say(&format!("GET {}/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", server.url())).await;
    let both = got.contains("content-length") && got.contains("transfer-encoding");
    assert!(!both && (status(&got) == "502" || got.ends_with("5\r\nhello\r\n0\r\n\r\n")), "{got}");
}

#[tokio::test]
async fn a_destination_that_is_not_there_is_told_and_no_denial() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let destination = listener.local_addr().expect("its address").to_string();
    drop(listener);
    let world = Setting::reaching(&[destination.clone(), "no-such-host.invalid:80".into()]).start().await;
    let answer = world.say(&format!("CONNECT {destination} HTTP/1.1\r\nHost: x\r\n\r\n")).await;
    assert_eq!((status(&answer), reason(&answer)), ("502", "connect_failed"));
    let answer = world.say("CONNECT no-such-host.invalid:80 HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(["lookup_failed", "lookup_timeout"].contains(&reason(&answer)), "{answer}");
    assert!(world.denials().is_empty());
}

#[tokio::test]
async fn connections_are_bounded_and_end_with_the_proxy() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let destination = listener.local_addr().expect("its address").to_string();
    let mut setting = Setting::reaching(std::slice::from_ref(&destination));
    setting.limits = EgressLimits { connections: 2, ..EgressLimits::default() };
    let world = setting.start().await;
    let mut tunnels = Vec::new();
    for _ in 0..2 {
        let mut stream = world.connect().await;
        stream.write_all(format!("CONNECT {destination} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.expect("asks");
        read_until(&mut stream, "\r\n\r\n").await;
        tunnels.push((stream, listener.accept().await.expect("a connection").0));
    }
    let answer = world.say("").await;
    assert_eq!((status(&answer), reason(&answer)), ("503", "too_many_connections"));
    world.serving.abort();
    for (mut near, mut far) in tunnels {
        assert_eq!(read_all(&mut near).await, "", "the plugin's side ends");
        assert_eq!(read_all(&mut far).await, "", "and the server's");
    }
    assert!(TcpStream::connect(world.proxy).await.is_err(), "nobody listens");
}

#[tokio::test]
async fn nothing_may_rest_for_ever() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let destination = listener.local_addr().expect("its address").to_string();
    let mut setting = Setting::reaching(std::slice::from_ref(&destination));
    setting.limits = EgressLimits { idle: Duration::from_millis(200), ..EgressLimits::default() };
    let world = setting.start().await;
    let mut tunnel = world.connect().await;
    tunnel.write_all(format!("CONNECT {destination} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.expect("asks");
    read_until(&mut tunnel, "\r\n\r\n").await;
    let _far = listener.accept().await.expect("a connection");
    assert_eq!(read_all(&mut tunnel).await, "");
    let answer = world.say(&format!("GET http://{destination}/ HTTP/1.1\r\nHost: x\r\n\r\n")).await;
    assert_eq!((status(&answer), reason(&answer)), ("504", "idle"));
}

#[tokio::test]
async fn refusals_are_told_at_a_rate_and_all_counted() {
    let world = Setting::reaching(&[]).start().await;
    for _ in 0..40 {
        world.say("CONNECT a.example:1 HTTP/1.1\r\nHost: x\r\n\r\n").await;
    }
    assert_eq!(world.figures.denials(), 40);
    let told = world.denials().len();
    // Ten at once and one a second.
    assert!((10..=10 + 20).contains(&told) && told < 40, "{told}");
}

#[tokio::test]
async fn names_are_told_to_who_may_ask_for_them() {
    let mut setting = Setting::reaching(&["localhost:1".into(), "127.0.0.1:1".into()]);
    setting.granted = CapabilitySet::of(&[Capability::DnsResolve]);
    let world = setting.start().await;
    let ask = |name: &str| format!("GET http://resolver.plugvisor/?name={name} HTTP/1.1\r\nHost: x\r\n\r\n");
    let answer = world.say(&ask("localhost")).await;
    assert!(answer.ends_with("{\"addresses\":[\"127.0.0.1\"],\"name\":\"localhost\"}"), "{answer}");
    let answer = world.say(&ask("other.example")).await;
    assert_eq!((status(&answer), reason(&answer)), ("403", "not_listed"));
    // It opens no connection.
    for request in
        ["CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: x\r\n\r\n", "GET http://127.0.0.1:1/ HTTP/1.1\r\nHost: x\r\n\r\n"]
    {
        assert_eq!(reason(&world.say(request).await), "capability_missing");
    }
    let world = Setting::reaching(&["localhost:1".into()]).start().await;
    assert_eq!(reason(&world.say(&ask("localhost")).await), "capability_missing");
}

/// Exactly the limit in the long run, in both directions together. Never faster is a promise; never slower depends on the
/// machine, and `cargo xtask bench egress` has the figure.
#[tokio::test(flavor = "multi_thread")]
async fn bandwidth_holds() {
    const RATE: u64 = 400_000;
    const EACH: usize = 400_000;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let destination = listener.local_addr().expect("its address").to_string();
    let mut setting = Setting::reaching(std::slice::from_ref(&destination));
    setting.bandwidth = Some(RATE);
    let world = setting.start().await;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut reader, mut writer) = stream.split();
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
            });
        }
    });
    let mut began = None;
    let mut streams = Vec::new();
    for _ in 0..2 {
        let mut stream = world.connect().await;
        stream.write_all(format!("CONNECT {destination} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.expect("asks");
        read_until(&mut stream, "\r\n\r\n").await;
        began.get_or_insert_with(Instant::now);
        streams.push(tokio::spawn(async move {
            let (mut reader, mut writer) = stream.into_split();
            let sending = tokio::spawn(async move {
                writer.write_all(&vec![7; EACH]).await.expect("writes");
                writer
            });
            reader.read_exact(&mut vec![0; EACH]).await.expect("everything comes back");
            drop(sending.await.expect("sent"));
        }));
    }
    for stream in streams {
        stream.await.expect("carried");
    }
    let seconds = began.expect("it began").elapsed().as_secs_f64();
    let bytes = world.figures.bytes_in() + world.figures.bytes_out();
    assert_eq!(bytes, 4 * EACH as u64);
    #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
    let share = bytes as f64 / seconds / RATE as f64;
    assert!(share <= 1.05, "{share} of the limit in {seconds} s");
    assert!(share >= 0.8, "{share} of the limit in {seconds} s: this machine is very busy");
}
