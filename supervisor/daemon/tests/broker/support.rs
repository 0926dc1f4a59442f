//! A broker with plugins around it: callers' and providers' sockets in a directory of the test's own.

use std::{
    convert::Infallible,
    future::Future,
    os::unix::net::UnixListener as StdListener,
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use h2::{RecvStream, server::SendResponse};
use http::{HeaderMap, Request};
use plugvisor_core::{
    CapabilitySet, Generation, Rights, breaker,
    route::{Availability, Export, Plugin, PluginCaller, RouteTable, Service},
};
use plugvisor_daemon::broker::{
    Broker, BrokerConfig, BrokerEvent, BrokerHandle, CallLimits, CallerSpec, HostService, LocalSpec, PluginIdentity,
    ProviderSpec,
};
use plugvisor_package::Capability;
use rustix::fs::{Mode, OFlags};
use tokio::{net::UnixListener, sync::mpsc};

use super::grpc::{PATIENCE, message, within};

pub(crate) struct World {
    pub(crate) broker: BrokerHandle,
    pub(crate) events: mpsc::Receiver<BrokerEvent>,
    directory: tempfile::TempDir,
    plugins: Vec<Plugin>,
}

pub(crate) fn identity(name: &str) -> PluginIdentity {
    PluginIdentity { name: name.parse().unwrap(), generation: Generation(1) }
}

impl World {
    /// Calls have as long as the tests wait for anything: a machine that stands still for some seconds is no deadline.
    pub(crate) fn new() -> Self {
        Self::with(BrokerConfig { default_deadline: PATIENCE, ..BrokerConfig::default() }, Vec::new())
    }

    pub(crate) fn with(config: BrokerConfig, modules: Vec<HostService>) -> Self {
        let (broker, events) = Broker::start(config, modules).unwrap();
        Self { broker, events, directory: tempfile::tempdir().unwrap(), plugins: Vec::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A plugin that may call everything shared.
    pub(crate) async fn caller(&self, name: &str) -> PathBuf {
        self.caller_with(name, &[Capability::InternalCalls], None).await
    }

    pub(crate) async fn caller_with(&self, name: &str, granted: &[Capability], uid: Option<u32>) -> PathBuf {
        let path = self.path(&format!("{name}.broker"));
        let listener = StdListener::bind(&path).unwrap();
        let caller = PluginCaller {
            name: name.parse().unwrap(),
            generation: Generation(1),
            rights: Rights::of(granted.iter().copied().collect::<CapabilitySet>()),
            dependencies: Vec::new(),
        };
        self.broker.add_caller(CallerSpec { caller, listener: listener.into(), uid }).await.unwrap();
        path
    }

    pub(crate) async fn local(&self, allowed_uids: Vec<u32>) -> PathBuf {
        let path = self.path("calls.sock");
        let listener = StdListener::bind(&path).unwrap();
        self.broker.add_local(LocalSpec { listener: listener.into(), allowed_uids }).await.unwrap();
        path
    }

    /// Adds a ready provider of `service` and returns the socket that it must serve.
    pub(crate) async fn provider(&mut self, name: &str, service: &str) -> UnixListener {
        self.provider_with(name, service, breaker::Settings::default(), CallLimits::default()).await
    }

    pub(crate) async fn provider_with(
        &mut self,
        name: &str,
        service: &str,
        breaker: breaker::Settings,
        limits: CallLimits,
    ) -> UnixListener {
        let path = self.path(&format!("{name}.worker"));
        let listener = UnixListener::bind(&path).unwrap();
        let socket = rustix::fs::open(&path, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty()).unwrap();
        self.broker
            .add_provider(ProviderSpec { identity: identity(name), socket, breaker, breaker_memory: None, limits })
            .await
            .unwrap();
        self.offer(name, service, Export::Shared { global: true, capabilities: CapabilitySet::default() }).await;
        self.broker.set_ready(&identity(name), true).await.unwrap();
        listener
    }

    /// Lists a plugin in the route table, whether it runs or not.
    pub(crate) async fn offer(&mut self, name: &str, service: &str, export: Export) {
        self.plugins.push(Plugin {
            name: name.parse().unwrap(),
            generation: Generation(1),
            availability: Availability::Serving,
            services: vec![Service { name: service.to_owned(), token: None, export }],
        });
        let table = RouteTable::new(self.plugins.iter().cloned());
        self.broker.publish_routes(Arc::new(table)).await.unwrap();
    }

    /// The next event that `pick` wants.
    pub(crate) async fn event<T>(&mut self, mut pick: impl FnMut(&BrokerEvent) -> Option<T>) -> T {
        within(async {
            loop {
                let event = self.events.recv().await.expect("the broker stopped");
                if let Some(found) = pick(&event) {
                    return found;
                }
            }
        })
        .await
    }
}

pub(crate) fn request(path: &str) -> http::request::Builder {
    Request::post(format!("http://caller.example{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
}

/// Answers with one message and status 0.
pub(crate) fn answer_ok(mut respond: SendResponse<Bytes>, payload: &[u8]) {
    let head = http::Response::builder().header("content-type", "application/grpc").body(()).unwrap();
    let mut to = respond.send_response(head, false).unwrap();
    to.send_data(message(payload), false).unwrap();
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", "0".parse().unwrap());
    to.send_trailers(trailers).unwrap();
}

/// Answers with a status alone.
pub(crate) fn answer_status(mut respond: SendResponse<Bytes>, status: i32) {
    let head = http::Response::builder().header("content-type", "application/grpc").header("grpc-status", status);
    respond.send_response(head.body(()).unwrap(), true).unwrap();
}

/// Reads a request's body to its end.
pub(crate) async fn read(request: Request<RecvStream>) -> (http::request::Parts, Vec<u8>) {
    let (head, mut from) = request.into_parts();
    let mut body = Vec::new();
    while let Some(Ok(chunk)) = from.data().await {
        let _ = from.flow_control().release_capacity(chunk.len());
        body.extend_from_slice(&chunk);
    }
    (head, body)
}

/// A tower service from a function over HTTP requests, as tonic's servers are.
#[derive(Clone)]
pub(crate) struct Handler<F>(pub(crate) F);

impl<F, R> tower::Service<Request<tonic::body::Body>> for Handler<F>
where
    F: FnMut(Request<tonic::body::Body>) -> R,
    R: Future<Output = http::Response<tonic::body::Body>> + Send + 'static,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        let answering = (self.0)(request);
        Box::pin(async move { Ok(answering.await) })
    }
}
