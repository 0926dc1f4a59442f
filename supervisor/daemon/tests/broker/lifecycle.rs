//! Draining, removing and stopping.

use std::time::Duration;

use bytes::Bytes;
use plugvisor_daemon::broker::{Drained, Stopped};
use tokio::{net::UnixStream, sync::mpsc};

use super::{
    grpc::{PATIENCE, answer, call, client, message, serve, within},
    support::{World, answer_ok, identity, request},
};

type Held = h2::server::SendResponse<Bytes>;

/// A provider whose calls wait until the test answers them.
async fn holding(world: &mut World) -> mpsc::Receiver<Held> {
    let (arrived, arrivals) = mpsc::channel(4);
    serve(world.provider("p", "t.S").await, move |_asked, respond| {
        let arrived = arrived.clone();
        async move { arrived.send(respond).await.unwrap() }
    });
    arrivals
}

#[tokio::test]
async fn draining_waits_for_calls_and_lets_no_new_one_in() {
    let mut world = World::new();
    let mut arrivals = holding(&mut world).await;
    let mut sender = client(&world.caller("asker").await).await;
    let (response, _stream) = sender.send_request(request("/t.S/M").body(()).unwrap(), true).unwrap();
    let held = within(arrivals.recv()).await.unwrap();

    let early = world.broker.drain(&identity("p"), Duration::from_millis(10)).await.unwrap();
    assert_eq!(early, Drained { in_flight: 1 });
    let refused = call(&sender, request("/t.S/M").body(()).unwrap(), message(b"")).await;
    assert_eq!((refused.status(), refused.reason()), (14, Some("provider_not_ready")));
    assert!(refused.end("grpc-message").unwrap().contains("draining"));

    let broker = world.broker.clone();
    let draining = tokio::spawn(async move { broker.drain(&identity("p"), PATIENCE).await });
    answer_ok(held, b"late");
    assert_eq!(within(draining).await.unwrap(), Ok(Drained { in_flight: 0 }));
    assert_eq!(within(async { answer(response.await.unwrap()).await }).await.body, message(b"late"));
}

#[tokio::test]
async fn removing_a_provider_ends_its_calls() {
    let mut world = World::new();
    let mut arrivals = holding(&mut world).await;
    let mut sender = client(&world.caller("asker").await).await;
    let (response, _stream) = sender.send_request(request("/t.S/M").body(()).unwrap(), true).unwrap();
    let _held = within(arrivals.recv()).await.unwrap();
    world.broker.remove_provider(&identity("p")).await.unwrap();
    let ended = within(async { answer(response.await.unwrap()).await }).await;
    assert_eq!((ended.status(), ended.reason()), (14, Some("provider_lost")));
    let refused = call(&sender, request("/t.S/M").body(()).unwrap(), message(b"")).await;
    assert_eq!((refused.status(), refused.reason()), (14, Some("provider_not_ready")));
}

#[tokio::test]
async fn stopping_lets_calls_finish_and_tells_callers_to_go() {
    let mut world = World::new();
    let mut arrivals = holding(&mut world).await;
    let path = world.caller("asker").await;
    let stream = UnixStream::connect(&path).await.unwrap();
    let (mut sender, connection) = h2::client::handshake::<_>(stream).await.unwrap();
    let connection = tokio::spawn(connection);
    let (response, _stream) = sender.send_request(request("/t.S/M").body(()).unwrap(), true).unwrap();
    let held = within(arrivals.recv()).await.unwrap();
    let broker = world.broker.clone();
    let stopping = tokio::spawn(async move { broker.stop(PATIENCE).await });
    // GOAWAY: the connection takes no further call, and the one in flight goes on.
    within(async {
        while std::future::poll_fn(|cx| sender.poll_ready(cx)).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    answer_ok(held, b"last");
    assert_eq!(within(async { answer(response.await.unwrap()).await }).await.body, message(b"last"));
    assert_eq!(within(stopping).await.unwrap(), Ok(0));
    drop(within(connection).await);
    assert_eq!(world.broker.set_ready(&identity("p"), true).await, Err(Stopped));
    assert!(within(UnixStream::connect(&path)).await.is_err(), "nobody listens any more");
}

#[tokio::test]
async fn stopping_cuts_what_does_not_end() {
    let mut world = World::new();
    let mut arrivals = holding(&mut world).await;
    let mut sender = client(&world.caller("asker").await).await;
    let (response, _stream) = sender.send_request(request("/t.S/M").body(()).unwrap(), true).unwrap();
    let _held = within(arrivals.recv()).await.unwrap();
    assert_eq!(world.broker.stop(Duration::from_millis(20)).await, Ok(1));
    // Whether the refusal or the end of the connection comes first, the call is over.
    drop(within(response).await);
}
