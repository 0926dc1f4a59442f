//! A plugin under test, without a supervisor.
//!
//! [`TestPlugin`] runs a plugin in the test's own process over real Unix sockets: Init, health, calls and draining go the
//! same way as in production. What the plugin calls arrives at a stand-in for the broker, to which the test adds its own
//! services. There are no walls, and the stand-in refuses nothing.

use std::{
    fs, io,
    os::unix::{fs::DirBuilderExt as _, net::UnixListener as StdListener},
    path::{Path, PathBuf},
    process,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use plugvisor_client::Client;
use plugvisor_proto::{
    host::v1::{
        PublishRequest, PublishResponse,
        events_server::{Events, EventsServer},
    },
    worker::v1::{InitRequest, worker_client::WorkerClient},
};
use serde::Serialize;
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, transport::Server};
use tonic_health::pb::health_client::HealthClient;

use crate::{
    Host, Plugin, Services,
    config::{from_struct, to_struct},
    gate::Gate,
    inflight::Inflight,
    listen::Incoming,
    run::{Assembly, Limits},
};

/// An event that the plugin under test published.
#[derive(Debug, Clone, PartialEq)]
pub struct Published {
    /// Its type.
    pub event_type: String,
    /// Its data, a JSON object.
    pub data: Value,
}

/// What to start; see [`TestPlugin::builder`].
#[derive(Debug)]
pub struct Builder {
    config: Result<Value, serde_json::Error>,
    capabilities: Vec<String>,
    broker: Services,
    recorder: Recorder,
    drain: Duration,
    initialise: bool,
}

impl Builder {
    /// The configuration for Init, an object. The default is empty.
    #[must_use]
    pub fn config(mut self, config: impl Serialize) -> Self {
        self.config = serde_json::to_value(config);
        self
    }

    /// Adds a capability to those granted.
    #[must_use]
    pub fn grant(mut self, capability: &str) -> Self {
        self.capabilities.push(capability.to_owned());
        self
    }

    /// Adds services that the plugin can call, in place of other plugins. One named `plugvisor.host.v1.Events` takes the
    /// place of the recorder behind [`TestPlugin::published`].
    #[must_use]
    pub fn broker(mut self, add: impl FnOnce(&mut Services)) -> Self {
        add(&mut self.broker);
        self
    }

    /// How long the end waits for calls in flight. The default is 5 s.
    #[must_use]
    pub fn drain(mut self, limit: Duration) -> Self {
        self.drain = limit;
        self
    }

    /// Leaves Init to the test, which calls it through [`TestPlugin::worker`].
    #[must_use]
    pub fn without_init(mut self) -> Self {
        self.initialise = false;
        self
    }

    /// Starts the plugin and initialises it. The status is what a supervisor would have got from Init.
    pub async fn start<P: Plugin>(self) -> Result<TestPlugin, Status> {
        let Self { config, capabilities, broker, recorder, drain, initialise } = self;
        let config = config.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let directory = Directory::new()?;
        let quit = CancellationToken::new();

        let broker_path = directory.0.join("broker.sock");
        let gate = Gate::new(Services::default(), Arc::new(OnceLock::from(broker)), Inflight::default());
        let incoming = listen(&broker_path)?;
        tokio::spawn(Server::builder().serve_with_incoming_shutdown(gate, incoming, quit.clone().cancelled_owned()));

        let path = directory.0.join("worker.sock");
        let incoming = listen(&path)?;
        let assembly = Assembly::<P>::new(Client::lazy(&broker_path)).await;
        let ended = quit.clone().cancelled_owned();
        let limits = Limits { drain, streams: 1024 };
        let running = tokio::spawn(assembly.run(incoming, limits, ended, std::future::pending()));

        let plugin = TestPlugin { client: Client::lazy(&path), path, running, quit, recorder, _directory: directory };
        if initialise {
            let config = to_struct(config).map_err(|error| Status::invalid_argument(error.to_string()))?;
            let init = InitRequest {
                plugin: "test".to_owned(),
                generation: 1,
                protocol_versions: vec![1],
                config: Some(config),
                capabilities,
                deadline: None,
            };
            plugin.worker().init(init).await?;
        }
        Ok(plugin)
    }
}

/// A plugin that runs in this process, on the current tokio runtime, until it is stopped or dropped.
#[derive(Debug)]
pub struct TestPlugin {
    client: Client,
    path: PathBuf,
    running: JoinHandle<Result<(), tonic::transport::Error>>,
    quit: CancellationToken,
    recorder: Recorder,
    _directory: Directory,
}

impl TestPlugin {
    /// What to start.
    pub fn builder() -> Builder {
        let (mut broker, recorder) = (Services::default(), Recorder::default());
        broker.add(EventsServer::new(recorder.clone()));
        Builder {
            config: Ok(Value::Object(serde_json::Map::new())),
            capabilities: Vec::new(),
            broker,
            recorder,
            drain: Duration::from_secs(5),
            initialise: true,
        }
    }

    /// A host without a broker and without grants, for starting a plugin by hand: its calls fail with UNAVAILABLE.
    pub fn host_alone() -> Host {
        Host::new("test".to_owned(), 1, Vec::new(), Client::unavailable("this host has no broker"))
    }

    /// Starts `P` with this configuration and nothing else.
    pub async fn start<P: Plugin>(config: impl Serialize) -> Result<Self, Status> {
        Self::builder().config(config).start::<P>().await
    }

    /// The plugin's services, called directly: hand it to a generated client.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// The contract with the supervisor, called directly.
    pub fn worker(&self) -> WorkerClient<Client> {
        WorkerClient::new(self.client())
    }

    /// The plugin's health.
    pub fn health(&self) -> HealthClient<Client> {
        HealthClient::new(self.client())
    }

    /// The socket that the plugin serves on.
    pub fn socket(&self) -> &Path {
        &self.path
    }

    /// What the plugin has published so far.
    pub fn published(&self) -> Vec<Published> {
        self.recorder.events().clone()
    }

    /// Ends the plugin as SIGTERM would, and waits for it.
    pub async fn stop(mut self) {
        self.quit.cancel();
        let Self { running, .. } = &mut self;
        let ended = running.await;
        assert!(matches!(ended, Ok(Ok(()))), "the plugin's server did not end in order: {ended:?}");
    }
}

impl Drop for TestPlugin {
    fn drop(&mut self) {
        self.quit.cancel();
    }
}

/// The stand-in for the host's Events service.
#[derive(Debug, Clone, Default)]
struct Recorder {
    events: Arc<Mutex<Vec<Published>>>,
    sequence: Arc<AtomicU64>,
}

impl Recorder {
    fn events(&self) -> std::sync::MutexGuard<'_, Vec<Published>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[tonic::async_trait]
impl Events for Recorder {
    async fn publish(&self, request: Request<PublishRequest>) -> Result<Response<PublishResponse>, Status> {
        let PublishRequest { r#type: event_type, data } = request.into_inner();
        let data = from_struct(data.unwrap_or_default());
        let data = data.map_err(|error| Status::invalid_argument(error.to_string()))?;
        self.events().push(Published { event_type, data });
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed) + 1;
        Ok(Response::new(PublishResponse { sequence }))
    }
}

fn listen(path: &Path) -> Result<Incoming, Status> {
    let bound = || {
        let listener = StdListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Incoming::new(listener)
    };
    bound().map_err(|error| unusable(path, &error))
}

fn unusable(path: &Path, error: &io::Error) -> Status {
    Status::internal(format!("cannot make {} for the test: {error}", path.display()))
}

/// A private directory, removed with everything in it when dropped.
#[derive(Debug)]
struct Directory(PathBuf);

impl Directory {
    fn new() -> Result<Self, Status> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        loop {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let path = std::env::temp_dir().join(format!("plugvisor-test-{}-{number}", process::id()));
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Self(path)),
                // An earlier process of the same number was killed and has left it: never shared.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(unusable(&path, &error)),
            }
        }
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // What cannot be removed is in the system's temporary directory anyway.
        let _ = fs::remove_dir_all(&self.0);
    }
}
