//! Callers that send what costs them little, without end. Each ends with its connection closed or with the broker
//! still answering on it; the broker's memory does not follow the flood either way.

use std::time::Duration;

use super::{
    grpc::{call, client, message},
    wire::{
        CONTINUATION, DATA, END_STREAM, ENHANCE_YOUR_CALM, HEADERS, PING, PRIORITY, Peer, RST_STREAM, WINDOW_UPDATE,
        block, frame, headers, request, settings,
    },
    world::{GROWTH, Setup, Victim, World, asked},
};

/// What is sent of each flood, in bytes: far more than all buffers on the way together, and than `GROWTH` if each byte
/// were kept.
const MUCH: usize = 12 * 1024 * 1024;

/// After the flood the attacker's own next connection is served, and nobody else noticed anything.
async fn serves_on(world: World) {
    let sender = client(&world.caller("attacker")).await;
    let answer = call(&sender, asked("/t.target/Ok"), message(b"")).await;
    assert_eq!(answer.status(), 0, "{answer:?}");
    world.unharmed(GROWTH).await;
}

async fn flood_of(before: &[u8], one: &[u8]) -> World {
    // One that floods and does not read is silent, as far as pings go.
    let patience = Some(Duration::from_secs(3));
    let world = World::start(Setup { callers: vec!["attacker".into()], patience, ..Setup::default() }).await;
    let mut peer = Peer::caller(&world.caller("attacker")).await;
    peer.send(before).await;
    let batch = one.repeat(16 * 1024 / one.len());
    peer.flood(&batch, MUCH / batch.len()).await;
    // Closed, or alive: what was unread so far is read, and then the question is answered.
    peer.outcome(|_| true).await;
    world
}

macro_rules! floods {
    ($($name:ident: $before:expr, $one:expr;)+) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            serves_on(flood_of(&$before, &$one).await).await;
        })+
    };
}

floods! {
    of_settings: [], settings(&[(4, 65_535)]);
    of_pings: [], frame(PING, 0, 0, &[7; 8]);
    of_priorities: [], frame(PRIORITY, 0, 1, &[0, 0, 0, 0, 1]);
    of_windows: headers(1, &request("/t.target/Hang"), 0), frame(WINDOW_UPDATE, 0, 1, &[0, 0, 0, 1]);
    of_unknown_frames: [], frame(0xbe, 0, 1, &[7; 100]);
    of_empty_data: headers(1, &request("/t.target/Read"), 0), frame(DATA, 0, 1, &[]);
    of_empty_data_that_nobody_reads: headers(1, &request("/t.target/Hang"), 0), frame(DATA, 0, 1, &[]);
    of_padding: headers(1, &request("/t.target/Read"), 0), frame(DATA, 8, 1, &[[255].as_slice(), &[0; 255]].concat());
}

/// A head that never ends, by frames that say nothing or next to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_continuations_ends_the_connection() {
    let world = World::with_attacker().await;
    for piece in [&[][..], &block(&[("a", "b")])] {
        let mut peer = Peer::caller(&world.caller("attacker")).await;
        peer.send(&frame(HEADERS, END_STREAM, 1, &request("/t.target/Ok"))).await;
        let batch = frame(CONTINUATION, 0, 1, piece).repeat(500);
        peer.flood(&batch, MUCH / batch.len()).await;
        let seen = peer.until_closed().await;
        assert!(seen.goaway.is_none_or(|code| code != 0), "{seen:?}");
    }
    world.told(&["CallerRejected", "attacker#1", "HTTP/2"]).await;
    serves_on(world).await;
}

/// Calls that are taken back as soon as they are made (CVE-2023-44487): the same provider serves others all the while.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_calls_taken_back_reaches_nobody_else() {
    let callers = vec!["attacker".into(), "neighbour".into()];
    let world = World::start(Setup { callers, ..Setup::default() }).await;
    let neighbour = Victim::start(world.caller("neighbour"), "target").await;
    let fields = request("/t.target/Ok");
    let mut stream = 1;
    let mut calm = 0;
    for _ in 0..4 {
        let mut peer = Peer::caller(&world.caller("attacker")).await;
        for _ in 0..50 {
            let mut batch = Vec::new();
            for _ in 0..100 {
                batch.extend(headers(stream, &fields, 0));
                batch.extend(frame(RST_STREAM, 0, stream, &[0, 0, 0, 8]));
                stream += 2;
            }
            if peer.flood(&batch, 1).await == 0 {
                break;
            }
        }
        let seen = peer.outcome(|_| true).await;
        if seen.closed {
            assert_eq!(seen.goaway.unwrap_or(ENHANCE_YOUR_CALM), ENHANCE_YOUR_CALM, "{seen:?}");
            calm += 1;
        }
        stream = 1;
    }
    neighbour.finish().await;
    if calm > 0 {
        world.told(&["CallerRejected", "attacker#1"]).await;
    }
    serves_on(world).await;
}

/// As many calls as the connection allows, never ended, on as many connections as a plugin may have: the next is
/// refused, and the places are free again when the connections have gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_open_calls_is_bounded() {
    let world = World::with_attacker().await;
    let mut peers = Vec::new();
    for _ in 0..4 {
        let mut peer = Peer::caller(&world.caller("attacker")).await;
        for number in 0..400 {
            peer.send(&headers(2 * number + 1, &request("/t.target/Hang"), 0)).await;
        }
        peers.push(peer);
    }
    for peer in &mut peers {
        // Over the limit of streams, or of places at the provider: the last one is refused in either case.
        let seen = peer.outcome(|seen| seen.refused(2 * 399 + 1)).await;
        assert!(seen.refused(2 * 399 + 1), "{seen:?}");
    }
    drop(peers);
    let sender = client(&world.caller("attacker")).await;
    loop {
        // The broker learns of the ends in its own time.
        let answer = call(&sender, asked("/t.target/Ok"), message(b"")).await;
        if answer.status() == 0 {
            break;
        }
        assert_eq!(answer.reason(), Some("overloaded"), "{answer:?}");
    }
    serves_on(world).await;
}
