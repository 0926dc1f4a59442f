//! What passes: all kinds of calls, metadata, trailers, cancellation, deadlines.

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use http::{HeaderMap, Request, uri::PathAndQuery};
use hyper_util::rt::TokioIo;
use plugvisor_core::route::HostModule;
use plugvisor_daemon::broker::{BrokerConfig, CallerIdentity, HostService};
use plugvisor_package::Capability;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::mpsc,
    time::Duration,
};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{
    Code, Status, Streaming,
    body::Body,
    transport::{Channel, Endpoint, Server},
};
use tonic_prost::ProstCodec;
use tower::service_fn;

use super::{
    grpc::{call, client, message, serve, within},
    support::{Handler, World, answer_ok, answer_status, identity, read, request},
};

type Codec = ProstCodec<Bytes, Bytes>;
type Replies = stream::BoxStream<'static, Result<Bytes, Status>>;

#[derive(Clone)]
struct Echo;

impl tonic::server::NamedService for Echo {
    const NAME: &'static str = "test.v1.Echo";
}

/// A tonic server of four methods, one of each kind; messages are `google.protobuf.BytesValue`.
async fn echo(request: Request<Body>) -> http::Response<Body> {
    let mut grpc = tonic::server::Grpc::new(Codec::default());
    match request.uri().path() {
        "/test.v1.Echo/Unary" => {
            let reply = |request: tonic::Request<Bytes>| async move {
                match request.metadata().get("x-fail") {
                    Some(_) => Err(Status::new(Code::Aborted, "as asked: ä")),
                    None => Ok(tonic::Response::new(request.into_inner())),
                }
            };
            grpc.unary(service_fn(reply), request).await
        }
        "/test.v1.Echo/Repeat" => {
            let reply = |request: tonic::Request<Bytes>| async move {
                let message = request.into_inner();
                Ok(tonic::Response::new(stream::repeat(message).take(100).map(Ok).boxed() as Replies))
            };
            grpc.server_streaming(service_fn(reply), request).await
        }
        "/test.v1.Echo/Join" => {
            let reply = |request: tonic::Request<Streaming<Bytes>>| async move {
                let parts: Vec<Bytes> = request.into_inner().try_collect().await?;
                Ok(tonic::Response::new(Bytes::from(parts.concat())))
            };
            grpc.client_streaming(service_fn(reply), request).await
        }
        _ => {
            let reply = |request: tonic::Request<Streaming<Bytes>>| async move {
                Ok(tonic::Response::new(request.into_inner().boxed() as Replies))
            };
            grpc.streaming(service_fn(reply), request).await
        }
    }
}

impl tower::Service<Request<Body>> for Echo {
    type Response = http::Response<Body>;
    type Error = std::convert::Infallible;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(async move { Ok(echo(request).await) })
    }
}

fn serve_echo(listener: UnixListener) {
    let serving = Server::builder().add_service(Echo).serve_with_incoming(UnixListenerStream::new(listener));
    tokio::spawn(async move { serving.await.unwrap() });
}

async fn channel(path: std::path::PathBuf) -> tonic::client::Grpc<Channel> {
    let connector = service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://caller.example").connect_with_connector(connector).await.unwrap();
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.unwrap();
    grpc
}

const fn method(path: &'static str) -> PathAndQuery {
    PathAndQuery::from_static(path)
}

#[tokio::test]
async fn all_four_kinds_pass_between_tonic_peers() {
    let mut world = World::new();
    serve_echo(world.provider("echo", "test.v1.Echo").await);
    let mut grpc = channel(world.caller("asker").await).await;
    let word = Bytes::from_static(b"word");

    within(async {
        let unary = grpc.unary(tonic::Request::new(word.clone()), method("/test.v1.Echo/Unary"), Codec::default());
        assert_eq!(unary.await.unwrap().into_inner(), word);

        grpc.ready().await.unwrap();
        let repeat = tonic::Request::new(word.clone());
        let replies = grpc.server_streaming(repeat, method("/test.v1.Echo/Repeat"), Codec::default()).await.unwrap();
        let replies: Vec<Bytes> = replies.into_inner().try_collect().await.unwrap();
        assert_eq!(replies, vec![word.clone(); 100]);

        grpc.ready().await.unwrap();
        let parts = tonic::Request::new(stream::iter((0..100_u8).map(|n| Bytes::from(vec![n]))));
        let joined = grpc.client_streaming(parts, method("/test.v1.Echo/Join"), Codec::default()).await.unwrap();
        assert_eq!(joined.into_inner(), Bytes::from((0..100).collect::<Vec<u8>>()));

        // Each message is sent only after the reply to the one before, so both directions must flow at once.
        grpc.ready().await.unwrap();
        let (tx, rx) = mpsc::channel(1);
        let sending = tonic::Request::new(tokio_stream::wrappers::ReceiverStream::new(rx));
        tx.send(Bytes::from_static(b"0")).await.unwrap();
        let mut replies: Streaming<Bytes> =
            grpc.streaming(sending, method("/test.v1.Echo/Both"), Codec::default()).await.unwrap().into_inner();
        for n in 1..50_u8 {
            assert!(replies.message().await.unwrap().is_some());
            tx.send(Bytes::from(vec![n])).await.unwrap();
        }
        assert_eq!(replies.message().await.unwrap(), Some(Bytes::from(vec![49])));
        drop(tx);
        assert_eq!(replies.message().await.unwrap(), None);
    })
    .await;

    let snapshot = world.broker.snapshot().await.unwrap();
    let mut seen: Vec<_> = snapshot.calls.iter().map(|series| (series.method.as_str(), series.by_code[0])).collect();
    seen.sort_unstable();
    let expected = ["Both", "Join", "Repeat", "Unary"].map(|name| format!("test.v1.Echo/{name}"));
    assert_eq!(seen, expected.iter().map(|name| (name.as_str(), 1)).collect::<Vec<_>>());
    assert_eq!(snapshot.providers[0].in_flight, 0);
    assert!(snapshot.rejected.is_empty());
}

#[tokio::test]
async fn a_providers_status_passes_as_it_is() {
    let mut world = World::new();
    serve_echo(world.provider("echo", "test.v1.Echo").await);
    let mut grpc = channel(world.caller("asker").await).await;
    let mut asking = tonic::Request::new(Bytes::new());
    asking.metadata_mut().insert("x-fail", "1".parse().unwrap());
    let status =
        within(grpc.unary::<_, Bytes, _>(asking, method("/test.v1.Echo/Unary"), Codec::default())).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Aborted, "as asked: ä"));
    assert!(status.metadata().get("plugvisor-reason").is_none());
}

#[tokio::test]
async fn metadata_and_trailers_pass_and_identity_is_overwritten() {
    let mut world = World::new();
    let (seen, mut heads) = mpsc::channel(1);
    serve(world.provider("p", "t.S").await, move |asked, mut respond| {
        let seen = seen.clone();
        async move {
            let (head, body) = read(asked).await;
            assert_eq!(body, message(b"ping"));
            seen.send(head).await.unwrap();
            let head = http::Response::builder()
                .header("content-type", "application/grpc+proto")
                .header("x-head", "1")
                .header("plugvisor-reason", "forged");
            let mut to = respond.send_response(head.body(()).unwrap(), false).unwrap();
            to.send_data(message(b"pong"), false).unwrap();
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", "0".parse().unwrap());
            trailers.insert("x-sum-bin", "AAEC/w".parse().unwrap());
            trailers.append("x-twice", "a".parse().unwrap());
            trailers.append("x-twice", "b".parse().unwrap());
            trailers.insert("plugvisor-hint", "forged".parse().unwrap());
            to.send_trailers(trailers).unwrap();
        }
    });
    let sender = client(&world.caller("asker").await).await;
    let asked = request("/t.S/M")
        .header("x-key-bin", "AAEC/w")
        .header("x-twice", "a")
        .header("x-twice", "b")
        .header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
        .header("plugvisor-caller", "somebody-else")
        .header("plugvisor-new", "1")
        .header("grpc-timeout", "60S");
    let answer = call(&sender, asked.body(()).unwrap(), message(b"ping")).await;

    let head = within(heads.recv()).await.unwrap();
    let all = |name: &str| head.headers.get_all(name).iter().map(|v| v.to_str().unwrap()).collect::<Vec<_>>();
    assert_eq!(head.uri.path(), "/t.S/M");
    assert_eq!(all("x-key-bin"), ["AAEC/w"]);
    assert_eq!(all("x-twice"), ["a", "b"]);
    assert_eq!(all("traceparent"), ["00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"]);
    assert_eq!(all("te"), ["trailers"]);
    assert_eq!(all("plugvisor-caller"), ["asker"]);
    assert_eq!(all("plugvisor-hops"), ["asker"]);
    assert!(all("plugvisor-new").is_empty());
    let left: u32 = all("grpc-timeout")[0].strip_suffix('u').expect("microseconds").parse().unwrap();
    assert!((1_000_000..60_000_000).contains(&left), "{left} µs left of 60 s");

    assert_eq!(answer.body, message(b"pong"));
    assert_eq!(answer.headers["x-head"], "1");
    assert_eq!(answer.headers["content-type"], "application/grpc+proto");
    assert_eq!(answer.trailers["x-sum-bin"], "AAEC/w");
    assert_eq!(answer.trailers.get_all("x-twice").iter().count(), 2);
    assert_eq!(answer.status(), 0);
    assert_eq!((answer.reason(), answer.end("plugvisor-hint")), (None, None), "a provider cannot speak for the broker");
}

#[tokio::test]
async fn the_path_of_a_call_grows() {
    let mut world = World::new();
    let (seen, mut hops) = mpsc::channel(1);
    serve(world.provider("p", "t.S").await, move |asked, respond| {
        let seen = seen.clone();
        async move {
            seen.send(asked.headers()["plugvisor-hops"].clone()).await.unwrap();
            answer_ok(respond, b"");
        }
    });
    let sender = client(&world.caller("second").await).await;
    let asked = request("/t.S/M").header("plugvisor-hops", "first");
    assert_eq!(call(&sender, asked.body(()).unwrap(), message(b"")).await.status(), 0);
    assert_eq!(within(hops.recv()).await.unwrap(), "first,second");
}

#[tokio::test]
async fn a_cancelled_call_is_cancelled_at_the_provider() {
    let mut world = World::new();
    let (seen, mut resets) = mpsc::channel(2);
    serve(world.provider("p", "t.S").await, move |asked, mut respond| {
        let seen = seen.clone();
        async move {
            if asked.uri().path() == "/t.S/Early" {
                seen.send(None).await.unwrap();
                let reset = std::future::poll_fn(|cx| respond.poll_reset(cx)).await.unwrap();
                seen.send(Some(reset)).await.unwrap();
            } else {
                let head = http::Response::builder().header("content-type", "application/grpc").body(()).unwrap();
                let mut to = respond.send_response(head, false).unwrap();
                to.send_data(message(b"first"), false).unwrap();
                let reset = std::future::poll_fn(|cx| to.poll_reset(cx)).await.unwrap();
                seen.send(Some(reset)).await.unwrap();
            }
        }
    });
    let mut sender = client(&world.caller("asker").await).await;
    within(async {
        // Before the response.
        let (response, mut stream) = sender.send_request(request("/t.S/Early").body(()).unwrap(), false).unwrap();
        stream.send_data(message(b""), true).unwrap();
        assert_eq!(resets.recv().await.unwrap(), None);
        stream.send_reset(h2::Reason::CANCEL);
        drop(response);
        assert_eq!(resets.recv().await.unwrap(), Some(h2::Reason::CANCEL));
        // In the middle of the response, with the request still open.
        let (response, mut stream) = sender.send_request(request("/t.S/Late").body(()).unwrap(), false).unwrap();
        let mut from = response.await.unwrap().into_body();
        assert_eq!(from.data().await.unwrap().unwrap(), message(b"first"));
        stream.send_reset(h2::Reason::CANCEL);
        assert_eq!(resets.recv().await.unwrap(), Some(h2::Reason::CANCEL));
        // A caller that goes away altogether.
        let (response, stream) = sender.send_request(request("/t.S/Late").body(()).unwrap(), true).unwrap();
        let from = response.await.unwrap().into_body();
        world.broker.remove_caller(&identity("asker")).await.unwrap();
        assert_eq!(resets.recv().await.unwrap(), Some(h2::Reason::CANCEL));
        drop((from, stream));
    })
    .await;
    let snapshot = world.broker.snapshot().await.unwrap();
    assert_eq!(snapshot.providers[0].in_flight, 0);
    let cancelled: u64 = snapshot.calls.iter().map(|series| series.by_code[1]).sum();
    assert_eq!(cancelled, 3);
}

#[tokio::test]
async fn the_deadline_ends_a_call_at_both_ends() {
    let mut world = World::new();
    let (seen, mut resets) = mpsc::channel(1);
    serve(world.provider("p", "t.S").await, move |asked, mut respond| {
        let seen = seen.clone();
        async move {
            if asked.uri().path() == "/t.S/Connect" {
                return answer_ok(respond, b"");
            }
            seen.send(std::future::poll_fn(|cx| respond.poll_reset(cx)).await.unwrap()).await.unwrap();
        }
    });
    let sender = client(&world.caller("asker").await).await;
    // So that the call that is looked at need not wait for a connection, and arrives long before its time is over.
    assert_eq!(call(&sender, request("/t.S/Connect").body(()).unwrap(), message(b"")).await.status(), 0);
    let asked = request("/t.S/M").header("grpc-timeout", "1500m").body(()).unwrap();
    let answer = call(&sender, asked, message(b"")).await;
    assert_eq!((answer.status(), answer.reason()), (4, Some("deadline")));
    assert!(answer.end("grpc-message").unwrap().contains("plugin p"));
    assert!(!answer.end("plugvisor-hint").unwrap().is_empty());
    assert_eq!(within(resets.recv()).await.unwrap(), h2::Reason::CANCEL);
}

/// tonic's server answers CANCELLED at the deadline that travelled to it, and may be a little faster than the broker.
#[tokio::test]
async fn a_provider_that_keeps_the_deadline_itself_is_told_as_the_deadline() {
    let mut world = World::new();
    serve(world.provider("p", "t.S").await, |asked, respond| async move {
        let left = asked.headers()["grpc-timeout"].to_str().unwrap().strip_suffix('u').unwrap().parse().unwrap();
        // As early as a timer's coarseness can make it. On a machine that stood still the time may be over already.
        tokio::time::sleep(Duration::from_micros(left).saturating_sub(Duration::from_millis(3))).await;
        answer_status(respond, 1);
    });
    let sender = client(&world.caller("asker").await).await;
    let asked = request("/t.S/M").header("grpc-timeout", "150m").body(()).unwrap();
    let answer = call(&sender, asked, message(b"")).await;
    assert_eq!((answer.status(), answer.reason()), (4, Some("deadline")));
}

#[tokio::test]
async fn a_deadline_in_the_middle_of_a_response_comes_as_trailers() {
    let mut world = World::new();
    serve(world.provider("p", "t.S").await, |_asked, mut respond| async move {
        let head = http::Response::builder().header("content-type", "application/grpc").body(()).unwrap();
        let mut to = respond.send_response(head, false).unwrap();
        to.send_data(message(b"first"), false).unwrap();
        drop(std::future::poll_fn(|cx| to.poll_reset(cx)).await);
    });
    let sender = client(&world.caller("asker").await).await;
    // The response begins long before its time is over.
    let asked = request("/t.S/M").header("grpc-timeout", "2500m").body(()).unwrap();
    let answer = call(&sender, asked, message(b"")).await;
    assert_eq!(answer.body, message(b"first"));
    assert_eq!(answer.trailers["grpc-status"], "4");
    assert_eq!(answer.trailers["plugvisor-reason"], "deadline");
}

#[tokio::test]
async fn the_default_and_the_providers_cap_bound_a_call() {
    let config = BrokerConfig { default_deadline: Duration::from_millis(100), ..BrokerConfig::default() };
    let mut world = World::with(config, Vec::new());
    let limits = plugvisor_daemon::broker::CallLimits {
        max_deadline: Some(Duration::from_millis(200)),
        ..plugvisor_daemon::broker::CallLimits::default()
    };
    serve(world.provider_with("p", "t.S", Default::default(), limits).await, |_asked, mut respond| async move {
        drop(std::future::poll_fn(|cx| respond.poll_reset(cx)).await);
    });
    let sender = client(&world.caller("asker").await).await;
    let answer = call(&sender, request("/t.S/M").body(()).unwrap(), message(b"")).await;
    assert!(answer.end("grpc-message").unwrap().contains("100ms"), "{answer:?}");
    let asked = request("/t.S/M").header("grpc-timeout", "1H").body(()).unwrap();
    let answer = call(&sender, asked, message(b"")).await;
    assert!(answer.end("grpc-message").unwrap().contains("200ms"), "{answer:?}");
}

#[tokio::test]
async fn host_modules_know_the_caller() {
    const SERVICE: &str = "/plugvisor.host.v1.Events/Publish";
    let handler = Handler(|request: Request<Body>| async move {
        let caller = request.extensions().get::<CallerIdentity>().expect("an identity").clone();
        let reply = move |_request: tonic::Request<Bytes>| {
            let label = Bytes::from(caller.label());
            async move { Ok(tonic::Response::new(label)) }
        };
        tonic::server::Grpc::new(Codec::default()).unary(service_fn(reply), request).await
    });
    let world = World::with(BrokerConfig::default(), vec![HostService::new(HostModule::Events, handler)]);
    let path = world.caller_with("asker", &[Capability::PublishEvents], None).await;
    let mut grpc = channel(path).await;
    let asking = tonic::Request::new(Bytes::new());
    let reply: tonic::Response<Bytes> = within(grpc.unary(asking, method(SERVICE), Codec::default())).await.unwrap();
    assert_eq!(reply.into_inner(), "asker");

    let mut without = channel(world.caller("another").await).await;
    let asking = tonic::Request::new(Bytes::new());
    let refused = within(without.unary::<_, Bytes, _>(asking, method(SERVICE), Codec::default())).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    let calls = world.broker.snapshot().await.unwrap().calls;
    assert_eq!(calls.len(), 1);
    assert_eq!((calls[0].provider.as_str(), calls[0].by_code[0]), ("plugvisor.host", 1));
}

#[tokio::test]
async fn local_applications_call_too() {
    let mut world = World::new();
    let (seen, mut heads) = mpsc::channel(1);
    serve(world.provider("p", "t.S").await, move |asked, respond| {
        let seen = seen.clone();
        async move {
            seen.send(asked.headers().clone()).await.unwrap();
            answer_status(respond, 5);
        }
    });
    let uid = rustix::process::getuid().as_raw();
    let sender = client(&world.local(vec![uid]).await).await;
    let asked = request("/t.S/M").header("plugvisor-hops", "forged").body(()).unwrap();
    let answer = call(&sender, asked, message(b"")).await;
    assert_eq!((answer.status(), answer.reason()), (5, None));
    let head = within(heads.recv()).await.unwrap();
    assert_eq!(head["plugvisor-caller"], format!("local:{uid}"));
    assert!(!head.contains_key("plugvisor-hops"), "an application cannot claim a path");
}
