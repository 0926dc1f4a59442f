//! Slow readers: what waits in the broker stays bounded, and others are not held up.

use bytes::Bytes;
use futures_util::future::{join_all, poll_fn};
use tokio::{net::UnixStream, sync::mpsc};

use super::{
    grpc::{answer, call, client, message, serve, within},
    support::{World, answer_ok, request},
};

/// Far more than all windows and socket buffers on the way together.
const MUCH: usize = 64 * 1024 * 1024;
const PIECE: usize = 32 * 1024;

/// Sends pieces as there is room, until `MUCH` is sent or nothing moved for a while; returns what was sent.
async fn push(to: &mut h2::SendStream<Bytes>) -> usize {
    let mut sent = 0;
    while sent < MUCH {
        to.reserve_capacity(PIECE + 5);
        while to.capacity() < PIECE + 5 {
            let room = poll_fn(|cx| to.poll_capacity(cx));
            match tokio::time::timeout(std::time::Duration::from_millis(300), room).await {
                Ok(Some(Ok(_))) => {}
                Ok(_) | Err(_) => return sent,
            }
        }
        to.send_data(message(&[7; PIECE]), false).unwrap();
        sent += PIECE + 5;
    }
    sent
}

#[tokio::test]
async fn a_provider_that_does_not_read_stops_its_caller() {
    let mut world = World::new();
    let (seen, mut requests) = mpsc::channel(1);
    serve(world.provider("p", "t.S").await, move |asked, respond| {
        let seen = seen.clone();
        async move { seen.send((asked, respond)).await.unwrap() }
    });
    serve(world.provider("other", "t.Other").await, |_asked, respond| async move { answer_ok(respond, b"") });
    let mut sender = client(&world.caller("asker").await).await;
    let (response, mut to) = sender.send_request(request("/t.S/Up").body(()).unwrap(), false).unwrap();
    let (mut asked, respond) = within(requests.recv()).await.unwrap();
    let sent = within(push(&mut to)).await;
    assert!(sent < MUCH / 8, "the broker took {sent} bytes that nobody reads");
    // The same connection, another provider: not held up.
    let other = call(&sender, request("/t.Other/M").body(()).unwrap(), message(b"")).await;
    assert_eq!(other.status(), 0);
    // Once the provider reads, all of it comes.
    to.reserve_capacity(0);
    to.send_data(Bytes::new(), true).unwrap();
    let mut read = 0;
    while let Some(chunk) = within(asked.body_mut().data()).await {
        let size = chunk.unwrap().len();
        asked.body_mut().flow_control().release_capacity(size).unwrap();
        read += size;
    }
    assert_eq!(read, sent);
    answer_ok(respond, b"thanks");
    assert_eq!(within(async { answer(response.await.unwrap()).await }).await.body, message(b"thanks"));
}

#[tokio::test]
async fn callers_that_do_not_read_stop_the_provider_and_nobody_else() {
    let mut world = World::new();
    let (stopped, mut sizes) = mpsc::channel(64);
    serve(world.provider("p", "t.S").await, move |asked, mut respond| {
        let stopped = stopped.clone();
        async move {
            if asked.uri().path() == "/t.S/Small" {
                return answer_ok(respond, b"");
            }
            let head = http::Response::builder().header("content-type", "application/grpc").body(()).unwrap();
            let mut to = respond.send_response(head, false).unwrap();
            let sent = push(&mut to).await;
            stopped.send(sent).await.unwrap();
            drop(poll_fn(|cx| to.poll_reset(cx)).await);
        }
    });
    // Enough of them to fill a connection's window if it were as small as usual.
    let mut lazy = client(&world.caller("lazy").await).await;
    let mut held = Vec::new();
    for _ in 0..32 {
        held.push(lazy.send_request(request("/t.S/Down").body(()).unwrap(), true).unwrap());
    }
    for _ in 0..32 {
        let sent = within(sizes.recv()).await.unwrap();
        assert!(sent < 2 * 1024 * 1024, "the broker took {sent} bytes that nobody reads");
    }
    let other = client(&world.caller("other").await).await;
    assert_eq!(call(&other, request("/t.S/Small").body(()).unwrap(), message(b"")).await.status(), 0);
}

#[tokio::test]
async fn many_small_messages_to_slow_readers_break_nothing() {
    const MESSAGES: usize = 60_000;
    const CALLS: usize = 4;
    let mut world = World::new();
    let (sent, mut waiting) = mpsc::channel(CALLS);
    serve(world.provider("p", "t.S").await, move |_asked, mut respond| {
        let sent = sent.clone();
        async move {
            let head = http::Response::builder().header("content-type", "application/grpc").body(()).unwrap();
            let mut to = respond.send_response(head, false).unwrap();
            // Small frames, each with one byte of payload, more than all windows hold.
            for n in 0..MESSAGES {
                to.reserve_capacity(6);
                while to.capacity() < 6 {
                    poll_fn(|cx| to.poll_capacity(cx)).await.unwrap().unwrap();
                }
                to.send_data(message(b"x"), false).unwrap();
                if n == 40_000 {
                    sent.send(()).await.unwrap();
                }
            }
            let mut trailers = http::HeaderMap::new();
            trailers.insert("grpc-status", "0".parse().unwrap());
            to.send_trailers(trailers).unwrap();
        }
    });
    let stream = UnixStream::connect(world.caller("asker").await).await.unwrap();
    // The test's own end keeps unread frames one by one, and must be allowed to.
    let (mut sender, connection) =
        h2::client::Builder::new().data_frame_budget(1 << 30).handshake::<_, Bytes>(stream).await.unwrap();
    tokio::spawn(async move { drop(connection.await) });
    within(async {
        let mut responses = Vec::new();
        for _ in 0..CALLS {
            let (response, _stream) =
                sender.send_request(request("/t.S/M").header("grpc-timeout", "1M").body(()).unwrap(), true).unwrap();
            responses.push(response.await.unwrap());
        }
        // Only when the broker holds far more frames than h2 would keep for it is anything read.
        for _ in 0..CALLS {
            waiting.recv().await.unwrap();
        }
        // All at once: unread ones would otherwise hold the connection's window.
        for answer in join_all(responses.into_iter().map(answer)).await {
            assert_eq!(answer.status(), 0, "{:?}", answer.reason());
            assert_eq!(answer.body.len(), MESSAGES * 6);
        }
    })
    .await;
}
