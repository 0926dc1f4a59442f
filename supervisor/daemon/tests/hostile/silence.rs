//! Callers that begin something and do not go on, or go on slowly, or go away.

use std::time::Duration;

use super::{
    grpc::{answer, client, message, within},
    wire::{DATA, END_STREAM, HEADERS, PREFACE, Peer, frame, frame_announced, headers, request, settings},
    world::{GROWTH, Setup, World, asked_within, prefix},
};

/// Short, so that the test is; what the broker takes by itself is 10 s. The pair of plugins that must not notice anything
/// is held to it too, on a machine that may stand still for a while.
const PATIENCE: Duration = Duration::from_secs(3);

/// Every place where a caller can stop.
fn beginnings() -> Vec<Vec<u8>> {
    let begun = |rest: &[u8]| [PREFACE, &settings(&[]), rest].concat();
    let open = headers(1, &request("/t.target/Hang"), 0);
    vec![
        vec![],
        PREFACE[..10].to_vec(),
        PREFACE.to_vec(),
        [PREFACE, &settings(&[(3, 1)])[..12]].concat(),
        begun(&[]),
        begun(&[0, 0]),
        begun(&headers(1, &request("/t.target/Ok"), END_STREAM)[..30]),
        begun(&frame(HEADERS, END_STREAM, 1, &request("/t.target/Ok"))),
        begun(&[&open[..], &frame_announced(1000, DATA, 0, 1, &prefix(1000))].concat()),
        begun(&[&open[..], &frame(DATA, 0, 1, &prefix(1000))].concat()),
    ]
}

/// Which of the beginnings have a call open, that ends with its deadline and not with its connection's silence.
const CALLING: usize = 2;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_of_anything_and_then_silence_is_closed() {
    let beginnings = beginnings();
    let callers = (0..beginnings.len()).map(|number| format!("half-{number}")).collect();
    let world = World::start(Setup { callers, patience: Some(PATIENCE), ..Setup::default() }).await;
    let mut silent = Vec::new();
    for (number, beginning) in beginnings.iter().enumerate() {
        let mut peer = Peer::silent(&world.caller(&format!("half-{number}"))).await;
        peer.send(beginning).await;
        silent.push(peer);
    }
    let idle = silent.len() - CALLING;
    for (number, peer) in silent.iter_mut().enumerate().take(idle) {
        peer.rest().await;
        world.told(&["CallerRejected", &format!("half-{number}#1"), "HTTP/2"]).await;
    }
    world.unharmed(GROWTH).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_of_anything_and_then_an_end_leaves_nothing() {
    let beginnings = beginnings();
    let callers = (0..beginnings.len()).map(|number| format!("half-{number}")).collect();
    let world = World::start(Setup { callers, ..Setup::default() }).await;
    for (number, beginning) in beginnings.iter().enumerate() {
        // More often than a plugin may have connections: those that went away do not count.
        for _ in 0..20 {
            let mut peer = Peer::silent(&world.caller(&format!("half-{number}"))).await;
            peer.send(beginning).await;
            drop(peer);
        }
        // The broker learns of the ends in its own time; until then there may be no place for one more.
        within(async {
            while !is_served(&world.caller(&format!("half-{number}"))).await {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }
    world.unharmed(GROWTH).await;
}

async fn is_served(socket: &std::path::Path) -> bool {
    let mut peer = Peer::caller(socket).await;
    peer.send(&headers(1, &request("/t.target/Ok"), END_STREAM)).await;
    !peer.outcome(|_| true).await.closed
}

/// A byte at a time, for ever: no byte of it keeps the connection open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_drips_a_head_is_closed() {
    let world =
        World::start(Setup { callers: vec!["loris".into()], patience: Some(PATIENCE), ..Setup::default() }).await;
    let mut peer = Peer::caller(&world.caller("loris")).await;
    let begun = std::time::Instant::now();
    let drip = frame_announced(16_000, HEADERS, 0, 1, &request("/t.target/Ok"));
    for byte in drip.iter().chain(std::iter::repeat(&b'x')) {
        if !peer.send(&[*byte]).await {
            break;
        }
        assert!(begun.elapsed() < super::grpc::PATIENCE, "it drips on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    world.told(&["CallerRejected", "loris#1"]).await;
    world.unharmed(GROWTH).await;
}

/// A message a byte at a time: the call's deadline ends it, and its place at the provider is free again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_drips_a_message_has_until_the_deadline() {
    let world = World::with_attacker().await;
    let mut sender = client(&world.caller("attacker")).await;
    let (response, mut stream) = sender.send_request(asked_within("/t.target/Read", "600m"), false).unwrap();
    let dripping = tokio::spawn(async move {
        for byte in message(&[1; 4000]) {
            if stream.send_data(vec![byte].into(), false).is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    let answer = within(async { answer(response.await.unwrap()).await }).await;
    assert_eq!((answer.status(), answer.reason()), (4, Some("deadline")), "{answer:?}");
    within(dripping).await.unwrap();
    world.unharmed(GROWTH).await;
}
