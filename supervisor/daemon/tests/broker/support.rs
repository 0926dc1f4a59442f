//! A broker with plugins around it: callers' and providers' sockets in a directory of the test's own.

use std::{
    convert::Infallible,
    future::Future,
    os::unix::net::UnixListener as StdListener,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{BufMut as _, Bytes, BytesMut};
use h2::{RecvStream, client::SendRequest, server::SendResponse};
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
use tokio::{
    net::{UnixListener, UnixStream},
    sync::mpsc,
    time::timeout,
};

/// Nothing in these tests takes this long unless it hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

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

/// Fails the test instead of hanging it.
pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("nothing happened in time")
}

/// One gRPC message with its prefix.
pub(crate) fn message(payload: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(payload.len() + 5);
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(payload.len()).unwrap());
    bytes.put_slice(payload);
    bytes.freeze()
}

/// A bare HTTP/2 client.
pub(crate) async fn client(path: &Path) -> SendRequest<Bytes> {
    let stream = UnixStream::connect(path).await.unwrap();
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    // Ends with its connection, which the test's end closes.
    tokio::spawn(async move { drop(connection.await) });
    sender
}

pub(crate) fn request(path: &str) -> http::request::Builder {
    Request::post(format!("http://caller.example{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
}

/// The whole answer to a call.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: HeaderMap,
}

impl Answer {
    /// A field of the trailers, or of the head when there is nothing else.
    pub(crate) fn end(&self, name: &str) -> Option<&str> {
        let value = self.trailers.get(name).or_else(|| self.headers.get(name));
        value.map(|value| value.to_str().unwrap())
    }

    pub(crate) fn status(&self) -> i32 {
        self.end("grpc-status").expect("a status").parse().unwrap()
    }

    pub(crate) fn reason(&self) -> Option<&str> {
        self.end("plugvisor-reason")
    }
}

/// Sends a whole call and waits for its whole answer.
pub(crate) async fn call(sender: &SendRequest<Bytes>, request: Request<()>, body: Bytes) -> Answer {
    within(async {
        let mut sender = sender.clone().ready().await.unwrap();
        let (response, mut stream) = sender.send_request(request, false).unwrap();
        // A call that is refused at once may be over before its body is sent.
        let _ = stream.send_data(body, true);
        answer(response.await.unwrap()).await
    })
    .await
}

pub(crate) async fn answer(response: http::Response<RecvStream>) -> Answer {
    let (head, mut from) = response.into_parts();
    let mut body = Vec::new();
    while let Some(chunk) = from.data().await {
        let chunk = chunk.unwrap();
        from.flow_control().release_capacity(chunk.len()).unwrap();
        body.extend_from_slice(&chunk);
    }
    let trailers = from.trailers().await.unwrap().unwrap_or_default();
    Answer { headers: head.headers, body, trailers }
}

/// Serves bare HTTP/2: `handle` gets every request on every connection.
pub(crate) fn serve<F>(
    listener: UnixListener,
    handle: impl Fn(Request<RecvStream>, SendResponse<Bytes>) -> F + Clone + Send + 'static,
) where
    F: Future<Output = ()> + Send + 'static,
{
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let handle = handle.clone();
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(stream).await.unwrap();
                while let Some(Ok((request, respond))) = connection.accept().await {
                    tokio::spawn(handle(request, respond));
                }
            });
        }
    });
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
