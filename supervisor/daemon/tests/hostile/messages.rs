//! Messages that are too large, and callers that do not read what they asked for.

use super::{
    grpc::{answer, call, client, message, within},
    wire::{DATA, END_STREAM, PREFACE, Peer, block, frame, headers, request, settings},
    world::{GROWTH, World, asked, prefix},
};

const LIMIT: usize = 4 * 1024 * 1024;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gibibyte_is_refused_by_its_announcement_or_at_the_limit() {
    let world = World::with_attacker().await;
    let sender = client(&world.caller("attacker")).await;
    // Announced, and then nothing: refused at once, long before any deadline.
    let (response, mut stream) = sender.clone().send_request(asked("/t.target/Read"), false).unwrap();
    stream.send_data(prefix(1 << 30).into(), false).unwrap();
    let refused = within(async { answer(response.await.unwrap()).await }).await;
    assert_eq!((refused.status(), refused.reason()), (8, Some("message_too_large")), "{refused:?}");
    assert!(refused.end("grpc-message").unwrap().contains("1073741824"), "{refused:?}");
    world.told(&["MessageTooLarge", "target", "attacker", "1073741824"]).await;
    // To the limit, which passes, and one byte over it, which does not.
    let passed = call(&sender, asked("/t.target/Read"), message(&vec![7; LIMIT])).await;
    assert_eq!(passed.status(), 0, "{passed:?}");
    let refused = call(&sender, asked("/t.target/Read"), message(&vec![7; LIMIT + 1])).await;
    assert_eq!((refused.status(), refused.reason()), (8, Some("message_too_large")), "{refused:?}");
    // Messages without end, each of them allowed: 64 MiB pass through and stay nowhere.
    let (response, mut stream) = sender.clone().send_request(asked("/t.target/Read"), false).unwrap();
    let piece = message(&vec![7; 1024 * 1024 - 5]);
    for _ in 0..64 {
        within(async {
            stream.reserve_capacity(piece.len());
            while stream.capacity() < piece.len() {
                std::future::poll_fn(|cx| stream.poll_capacity(cx)).await.unwrap().unwrap();
                if stream.capacity() > 0 {
                    break;
                }
            }
            stream.send_data(piece.clone(), false).unwrap();
        })
        .await;
    }
    stream.send_data(Default::default(), true).unwrap();
    let passed = within(async { answer(response.await.unwrap()).await }).await;
    assert_eq!(passed.status(), 0, "{passed:?}");
    world.unharmed(GROWTH).await;
}

/// One who goes on sending a message that was refused gets no further than the windows, and hurts nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_goes_on_after_the_refusal_sends_to_nobody() {
    let world = World::with_attacker().await;
    let mut peer = Peer::caller(&world.caller("attacker")).await;
    for stream in (1..).step_by(2).take(20) {
        peer.send(&headers(stream, &request("/t.target/Read"), 0)).await;
        peer.send(&frame(DATA, 0, stream, &prefix(1 << 30))).await;
    }
    let refused = peer.outcome(|seen| (1..).step_by(2).take(20).all(|stream| seen.refused(stream))).await;
    assert!(!refused.closed, "{refused:?}");
    // A megabyte on each; what was refused may be answered by a reset, or by an end of the connection.
    for stream in (1..).step_by(2).take(20) {
        for _ in 0..64 {
            if !peer.send(&frame(DATA, 0, stream, &[7; 16_000])).await {
                break;
            }
        }
    }
    peer.outcome(|_| true).await;
    world.unharmed(GROWTH).await;
}

/// A window of zero for every answer: the provider is stopped, what waits in the broker is bounded by its windows, and
/// each call ends with its deadline.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_never_reads_has_one_window_for_each_call() {
    const CALLS: u32 = 64;
    /// What waits in the broker for each call at most; its configuration says 256 KiB.
    const WINDOW: u64 = 256 * 1024;
    let world = World::with_attacker().await;
    let mut peer = Peer::silent(&world.caller("attacker")).await;
    peer.send(&[PREFACE, &settings(&[(4, 0)])].concat()).await;
    let fields = [request("/t.target/Flood"), block(&[("grpc-timeout", "1500m")])].concat();
    for number in 0..CALLS {
        peer.send(&headers(2 * number + 1, &fields, END_STREAM)).await;
    }
    let seen = peer.outcome(|seen| (0..CALLS).all(|number| seen.refused(2 * number + 1))).await;
    assert!(!seen.closed, "calls end, not the connection: {seen:?}");
    // Its provider serves again: no place at it was lost.
    let sender = client(&world.caller("attacker")).await;
    let answer = call(&sender, asked("/t.target/Ok"), message(b"")).await;
    assert_eq!(answer.status(), 0, "{answer:?}");
    world.unharmed(GROWTH + u64::from(CALLS) * WINDOW).await;
}

/// One byte of message in each frame, up to the window, to a provider that does not read: what a byte costs while it
/// waits is bounded too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_frames_cost_what_they_carry() {
    let world = World::with_attacker().await;
    let mut peer = Peer::caller(&world.caller("attacker")).await;
    let fields = [request("/t.target/Hang"), block(&[("grpc-timeout", "55S")])].concat();
    for stream in [1, 3, 5, 7] {
        peer.send(&headers(stream, &fields, 0)).await;
        peer.send(&frame(DATA, 0, stream, &prefix(4_000_000))).await;
        // The provider's window lets some through; the rest waits.
        peer.flood(&frame(DATA, 0, stream, b"x").repeat(1000), 200).await;
    }
    // Once this is answered, all of it has been read.
    peer.outcome(|_| true).await;
    drop(peer);
    let sender = client(&world.caller("attacker")).await;
    let answer = call(&sender, asked("/t.target/Ok"), message(b"")).await;
    assert_eq!(answer.status(), 0, "{answer:?}");
    world.unharmed(GROWTH).await;
}
