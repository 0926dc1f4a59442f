//! The contract between a plugin and its host, over real sockets.
//!
//! The plugin under test serves `plugvisor.host.v1.Events`, a service that is at hand, and calls the same service of its
//! host: what it does depends on the event's type.
#![allow(clippy::unwrap_used, reason = "a failed test is a panic")]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use plugvisor_proto::{
    host::v1::{
        PublishRequest, PublishResponse,
        events_client::EventsClient,
        events_server::{Events, EventsServer},
    },
    worker::v1::{
        DrainRequest, HookRequest, InitRequest, LifecycleHook, ReconfigureRequest, StopReason as WireReason,
        StopRequest,
    },
};
use plugvisor_worker::{
    CallContext, Client, Hook, Host, Plugin, ReconfigureError, Services, StartError, StopReason, testing::TestPlugin,
};
use serde::Deserialize;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::{Notify, mpsc},
    time::timeout,
};
use tonic::{Code, Request, Response, Status};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};

const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
/// Far longer than anything here takes, so that a hang is a failure with a name.
const LONG: Duration = Duration::from_secs(60);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    /// Zero is a configuration error found by the plugin itself.
    size: u32,
}

struct Relay {
    host: Host,
    /// Lets calls of type `wait` go.
    release: Arc<Notify>,
}

impl Plugin for Relay {
    type Config = Config;

    async fn start(config: Config, host: Host) -> Result<Self, StartError> {
        if config.size == 0 {
            return Err(StartError::configuration("size", "must be at least 1"));
        }
        if config.size == 13 {
            Err(std::io::Error::other("the disk is away"))?;
        }
        assert_eq!((host.plugin(), host.generation()), ("test", 1));
        Ok(Self { host, release: Arc::default() })
    }

    fn services(self: Arc<Self>, services: &mut Services) {
        services.add(EventsServer::from_arc(self));
    }

    async fn reconfigure(&self, config: Config) -> Result<(), ReconfigureError> {
        if config.size == 0 { Err(ReconfigureError::Invalid("size: must be at least 1".into())) } else { Ok(()) }
    }

    async fn stop(&self, reason: StopReason) {
        let _ = self.host.publish("stopped", json!({"reason": format!("{reason:?}")})).await;
    }

    async fn hook(&self, hook: Hook) {
        let _ = self.host.publish("hook", json!({"hook": format!("{hook:?}")})).await;
    }
}

#[tonic::async_trait]
impl Events for Relay {
    async fn publish(&self, request: Request<PublishRequest>) -> Result<Response<PublishResponse>, Status> {
        let context = request.extensions().get::<CallContext>().cloned();
        match request.get_ref().r#type.as_str() {
            "relay" => return EventsClient::new(self.host.client()).publish(request.into_inner()).await,
            "relay-spawned" => {
                let (client, context) = (self.host.client(), CallContext::current().unwrap());
                let work = async move { EventsClient::new(client).publish(request.into_inner()).await };
                return tokio::spawn(context.scope(work)).await.unwrap();
            }
            "caller" => {
                let caller = context.as_ref().and_then(CallContext::caller).unwrap_or("nobody");
                return Err(Status::not_found(caller));
            }
            "wait" => self.release.notified().await,
            "release" => self.release.notify_one(),
            "panic" => panic!("as the test asked"),
            _ => {}
        }
        Ok(Response::new(PublishResponse { sequence: 7 }))
    }
}

/// The host's side of what the plugin calls.
struct Downstream {
    seen: mpsc::UnboundedSender<http::HeaderMap>,
    ended: mpsc::UnboundedSender<()>,
    hang: bool,
}

#[tonic::async_trait]
impl Events for Downstream {
    async fn publish(&self, request: Request<PublishRequest>) -> Result<Response<PublishResponse>, Status> {
        self.seen.send(request.metadata().clone().into_headers()).unwrap();
        struct OnDrop(mpsc::UnboundedSender<()>);
        impl Drop for OnDrop {
            fn drop(&mut self) {
                let _ = self.0.send(());
            }
        }
        let _ended = OnDrop(self.ended.clone());
        if self.hang {
            std::future::pending::<()>().await;
        }
        Ok(Response::new(PublishResponse { sequence: 9 }))
    }
}

fn of_type(event_type: &str) -> PublishRequest {
    PublishRequest { r#type: event_type.to_owned(), data: None }
}

async fn relay() -> TestPlugin {
    TestPlugin::start::<Relay>(json!({"size": 1})).await.unwrap()
}

async fn relay_to(hang: bool) -> (TestPlugin, mpsc::UnboundedReceiver<http::HeaderMap>, mpsc::UnboundedReceiver<()>) {
    let ((seen, seen_by), (ended, ended_by)) = (mpsc::unbounded_channel(), mpsc::unbounded_channel());
    let downstream = EventsServer::new(Downstream { seen, ended, hang });
    let builder = TestPlugin::builder().config(json!({"size": 1}));
    let plugin = builder.broker(|services| _ = services.add(downstream)).start::<Relay>().await.unwrap();
    (plugin, seen_by, ended_by)
}

fn calls(plugin: &TestPlugin) -> EventsClient<Client> {
    EventsClient::new(plugin.client())
}

async fn health_of(plugin: &TestPlugin, service: &str) -> Result<ServingStatus, Code> {
    let request = HealthCheckRequest { service: service.to_owned() };
    let answer = plugin.health().check(request).await.map_err(|status| status.code())?;
    Ok(answer.into_inner().status())
}

fn init(size: i32) -> InitRequest {
    let config =
        prost_types::Struct { fields: [("size".to_owned(), prost_types::Value::from(f64::from(size)))].into() };
    InitRequest {
        plugin: "test".into(),
        generation: 1,
        protocol_versions: vec![1, 2],
        config: Some(config),
        ..InitRequest::default()
    }
}

#[tokio::test]
async fn init_opens_the_plugin_and_only_once() {
    let plugin = TestPlugin::builder().without_init().start::<Relay>().await.unwrap();
    assert_eq!(health_of(&plugin, "").await, Ok(ServingStatus::NotServing));
    let early = calls(&plugin).publish(of_type("x")).await.unwrap_err();
    assert_eq!(early.code(), Code::Unavailable, "{early}");

    let answer = plugin.worker().init(init(1)).await.unwrap().into_inner();
    assert_eq!(answer.protocol_version, 1);
    assert_eq!(answer.sdk_name, "plugvisor-worker");
    assert_eq!(answer.services, ["plugvisor.host.v1.Events"]);
    assert_eq!(health_of(&plugin, "").await, Ok(ServingStatus::Serving));
    assert_eq!(health_of(&plugin, "plugvisor.host.v1.Events").await, Ok(ServingStatus::Serving));
    assert_eq!(health_of(&plugin, "acme.v1.Nothing").await, Err(Code::NotFound));
    assert_eq!(calls(&plugin).publish(of_type("x")).await.unwrap().into_inner().sequence, 7);

    let again = plugin.worker().init(init(1)).await.unwrap_err();
    assert_eq!(again.code(), Code::FailedPrecondition, "{again}");
}

#[tokio::test]
async fn a_refused_init_names_the_key_and_another_one_may_succeed() {
    let plugin = TestPlugin::builder().without_init().start::<Relay>().await.unwrap();
    for (size, says) in [(-1, "size: "), (0, "size: must be at least 1")] {
        let refused = plugin.worker().init(init(size)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains(says), "{refused}");
    }
    let failed = plugin.worker().init(init(13)).await.unwrap_err();
    assert_eq!(failed.code(), Code::Internal);
    assert!(failed.message().contains("the disk is away"), "{failed}");
    let mut foreign = init(1);
    foreign.protocol_versions = vec![7];
    let refused = plugin.worker().init(foreign).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("[7]"), "{refused}");
    assert_eq!(health_of(&plugin, "").await, Ok(ServingStatus::NotServing));
    plugin.worker().init(init(1)).await.unwrap();
    assert_eq!(health_of(&plugin, "").await, Ok(ServingStatus::Serving));
}

#[tokio::test]
async fn health_can_be_watched_from_start_to_end() {
    let plugin = TestPlugin::builder().without_init().start::<Relay>().await.unwrap();
    let mut watched = plugin.health().watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    let mut next = async || watched.message().await.unwrap().map(|answer| answer.status());
    assert_eq!(next().await, Some(ServingStatus::NotServing));
    plugin.worker().init(init(1)).await.unwrap();
    assert_eq!(next().await, Some(ServingStatus::Serving));
    plugin.worker().drain(DrainRequest::default()).await.unwrap();
    assert_eq!(next().await, Some(ServingStatus::NotServing));
    // An open watch neither holds up the end nor is cut without one.
    timeout(LONG, plugin.stop()).await.unwrap();
    assert_eq!(next().await, None);
}

#[tokio::test]
async fn draining_waits_for_the_calls_in_flight() {
    let plugin = relay().await;
    let (mut waiting, mut worker) = (calls(&plugin), plugin.worker());
    let call = tokio::spawn(async move { waiting.publish(of_type("wait")).await });
    // Draining too soon reports what it left behind; the loop ends once the call has arrived.
    let short = DrainRequest { deadline: Some(Duration::from_millis(10).try_into().unwrap()) };
    timeout(LONG, async { while worker.drain(short).await.unwrap().into_inner().inflight_left != 1 {} }).await.unwrap();

    let drained = tokio::spawn(async move {
        let long = DrainRequest { deadline: Some(LONG.try_into().unwrap()) };
        worker.drain(long).await.unwrap().into_inner().inflight_left
    });
    calls(&plugin).publish(of_type("release")).await.unwrap();
    assert_eq!(call.await.unwrap().unwrap().into_inner().sequence, 7);
    assert_eq!(timeout(LONG, drained).await.unwrap().unwrap(), 0);
}

#[tokio::test]
async fn the_end_waits_for_calls_and_no_longer_than_its_limit() {
    let limit = Duration::from_millis(100);
    let builder = TestPlugin::builder().config(json!({"size": 1})).drain(limit);
    let plugin = builder.start::<Relay>().await.unwrap();
    let (mut waiting, mut worker) = (calls(&plugin), plugin.worker());
    let call = tokio::spawn(async move { waiting.publish(of_type("wait")).await });
    let short = DrainRequest { deadline: Some(Duration::from_millis(10).try_into().unwrap()) };
    timeout(LONG, async { while worker.drain(short).await.unwrap().into_inner().inflight_left != 1 {} }).await.unwrap();
    let begun = Instant::now();
    timeout(LONG, plugin.stop()).await.unwrap();
    assert!(begun.elapsed() >= limit, "{:?}", begun.elapsed());
    drop(call);
}

#[tokio::test]
async fn deadline_trace_and_path_travel_on() {
    for event_type in ["relay", "relay-spawned"] {
        let (plugin, mut seen, _ended) = relay_to(false).await;
        let mut request = Request::new(of_type(event_type));
        request.set_timeout(LONG);
        request.metadata_mut().insert("traceparent", TRACEPARENT.parse().unwrap());
        request.metadata_mut().insert("tracestate", "acme=1".parse().unwrap());
        request.metadata_mut().insert("plugvisor-hops", "gallery".parse().unwrap());
        request.metadata_mut().insert("plugvisor-token", "mine".parse().unwrap());
        assert_eq!(calls(&plugin).publish(request).await.unwrap().into_inner().sequence, 9);
        let seen = seen.recv().await.unwrap();
        assert_eq!(seen["traceparent"], TRACEPARENT);
        assert_eq!(seen["tracestate"], "acme=1");
        assert_eq!(seen["plugvisor-hops"], "gallery");
        assert!(!seen.contains_key("plugvisor-token"), "a token selects one provider, not the next");
        let context = CallContext::from_headers(&seen);
        let left = context.remaining().unwrap();
        assert!(left <= LONG && left > Duration::from_secs(1), "{left:?}");
    }
}

#[tokio::test]
async fn a_call_without_deadline_adds_none() {
    let (plugin, mut seen, _ended) = relay_to(false).await;
    calls(&plugin).publish(of_type("relay")).await.unwrap();
    let seen = seen.recv().await.unwrap();
    assert!(!seen.contains_key("grpc-timeout") && !seen.contains_key("traceparent"), "{seen:?}");
}

#[tokio::test]
async fn a_passed_deadline_ends_the_call_below() {
    let (plugin, mut seen, mut ended) = relay_to(true).await;
    let mut request = Request::new(of_type("relay"));
    // The call below has begun long before.
    request.set_timeout(Duration::from_secs(2));
    let late = timeout(LONG, calls(&plugin).publish(request)).await.unwrap().unwrap_err();
    assert_eq!(late.code(), Code::DeadlineExceeded, "{late}");
    timeout(LONG, seen.recv()).await.unwrap().unwrap();
    timeout(LONG, ended.recv()).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_caller_that_leaves_cancels_the_call_below() {
    let (plugin, mut seen, mut ended) = relay_to(true).await;
    let mut client = calls(&plugin);
    let call = tokio::spawn(async move { client.publish(of_type("relay")).await });
    timeout(LONG, seen.recv()).await.unwrap().unwrap();
    call.abort();
    timeout(LONG, ended.recv()).await.unwrap().unwrap();
}

#[tokio::test]
async fn no_call_is_made_when_no_time_is_left() {
    let (plugin, mut seen, _ended) = relay_to(false).await;
    let spent = CallContext::default().with_timeout(Duration::ZERO);
    let refused = spent.scope(calls(&plugin).publish(of_type("relay"))).await.unwrap_err();
    assert_eq!(refused.code(), Code::DeadlineExceeded);
    assert!(refused.message().contains("/plugvisor.host.v1.Events/Publish"), "{refused}");
    assert!(seen.try_recv().is_err());
}

#[tokio::test]
async fn the_caller_is_who_the_broker_says() {
    let plugin = relay().await;
    let mut request = Request::new(of_type("caller"));
    request.metadata_mut().insert("plugvisor-caller", "gallery".parse().unwrap());
    assert_eq!(calls(&plugin).publish(request).await.unwrap_err().message(), "gallery");
}

#[tokio::test]
async fn a_panic_ends_its_own_call_only() {
    let plugin = relay().await;
    let panicked = calls(&plugin).publish(of_type("panic")).await.unwrap_err();
    assert_eq!(panicked.code(), Code::Internal, "{panicked}");
    assert_eq!(calls(&plugin).publish(of_type("x")).await.unwrap().into_inner().sequence, 7);
    // The call that panicked is not counted as in flight for ever.
    let left = plugin.worker().drain(DrainRequest::default()).await.unwrap().into_inner().inflight_left;
    assert_eq!(left, 0);
}

#[tokio::test]
async fn garbage_on_the_socket_ends_its_own_connection_only() {
    let plugin = relay().await;
    for garbage in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 4096], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff"]
    {
        let mut stream = UnixStream::connect(plugin.socket()).await.unwrap();
        // The server may have closed before all of it is written.
        let _ = stream.write_all(garbage).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        // The server closes; a reset counts as closed.
        let _ = timeout(LONG, stream.read_to_end(&mut answer)).await.expect("the server closes the connection");
    }
    assert_eq!(health_of(&plugin, "").await, Ok(ServingStatus::Serving));
}

#[tokio::test]
async fn an_unknown_service_is_named() {
    let plugin = relay().await;
    let mut client = plugvisor_proto::admin::v1::admin_client::AdminClient::new(plugin.client());
    let unknown = client.get_status(plugvisor_proto::admin::v1::GetStatusRequest::default()).await.unwrap_err();
    assert_eq!(unknown.code(), Code::Unimplemented);
    assert!(unknown.message().contains("plugvisor.host.v1.Events"), "{unknown}");
}

#[tokio::test]
async fn reconfiguring_and_hooks_and_stop_reach_the_plugin() {
    let plugin = relay().await;
    let mut worker = plugin.worker();
    worker.reconfigure(ReconfigureRequest { config: init(5).config }).await.unwrap();
    for size in [-1, 0] {
        let refused = worker.reconfigure(ReconfigureRequest { config: init(size).config }).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains("size"), "{refused}");
    }
    let hook = HookRequest { hook: LifecycleHook::OnError.into(), code: "c".into(), message: "m".into() };
    worker.hook(hook).await.unwrap();
    let unknown = worker.hook(HookRequest { hook: 99, ..HookRequest::default() }).await.unwrap_err();
    assert_eq!(unknown.code(), Code::Unimplemented);
    let stop = StopRequest { reason: WireReason::Unload.into(), grace: None };
    worker.stop(stop).await.unwrap();
    worker.stop(stop).await.unwrap();

    let published: Vec<_> = plugin.published().into_iter().map(|event| (event.event_type, event.data)).collect();
    assert_eq!(
        published,
        [
            ("hook".to_owned(), json!({"hook": r#"OnError { code: "c", message: "m" }"#})),
            ("stopped".to_owned(), json!({"reason": "Unload"})),
        ]
    );
}

#[tokio::test]
async fn a_start_that_takes_too_long_is_given_up() {
    struct Slow;
    impl Plugin for Slow {
        type Config = plugvisor_worker::NoConfig;

        async fn start(_config: Self::Config, _host: Host) -> Result<Self, StartError> {
            std::future::pending().await
        }

        fn services(self: Arc<Self>, _services: &mut Services) {}
    }
    let plugin = TestPlugin::builder().without_init().start::<Slow>().await.unwrap();
    let request = InitRequest {
        protocol_versions: vec![1],
        deadline: Some(Duration::from_millis(20).try_into().unwrap()),
        ..InitRequest::default()
    };
    let late = timeout(LONG, plugin.worker().init(request)).await.unwrap().unwrap_err();
    assert_eq!(late.code(), Code::DeadlineExceeded, "{late}");
    assert!(late.message().contains("20 ms"), "{late}");
    let reconfigured = plugin.worker().reconfigure(ReconfigureRequest::default()).await.unwrap_err();
    assert_eq!(reconfigured.code(), Code::FailedPrecondition);
}
