//! The `plugvisor.worker.v1.Worker` service: what the supervisor asks of a plugin.
//!
//! Protobuf ends here: the author's code sees typed configuration, [`Host`], [`Hook`] and [`StopReason`].

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use plugvisor_client::Client;
use plugvisor_proto::worker::v1::{
    DrainRequest, DrainResponse, HookRequest, HookResponse, InitRequest, InitResponse, LifecycleHook,
    ReconfigureRequest, ReconfigureResponse, StopReason as WireStopReason, StopRequest, StopResponse,
    worker_server::Worker,
};
use serde_json::Value;
use tokio::{
    sync::{Mutex, OnceCell},
    time::timeout,
};
use tonic::{Request, Response, Status};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    Hook, Host, Plugin, ReconfigureError, StartError, StopReason, config, gate::OwnServices, inflight::Inflight,
    services::Services,
};

/// The versions of the contract that this SDK speaks, the best first.
const PROTOCOL_VERSIONS: [u32; 1] = [1];
/// When Drain names no deadline.
const DEFAULT_DRAIN: Duration = Duration::from_secs(5);

/// What Init says, in the plugin's own terms.
#[derive(Debug)]
pub(crate) struct Init {
    pub(crate) plugin: String,
    pub(crate) generation: u64,
    pub(crate) capabilities: Vec<String>,
    pub(crate) config: Value,
    pub(crate) limit: Option<Duration>,
}

/// The life of one plugin from Init to its end.
pub(crate) struct Control<P> {
    own: OwnServices,
    health: HealthReporter,
    inflight: Inflight,
    client: Client,
    initialising: Mutex<()>,
    plugin: OnceCell<Arc<P>>,
    misconfigured: AtomicBool,
    draining: AtomicBool,
    stopped: AtomicBool,
}

impl<P: Plugin> Control<P> {
    pub(crate) fn new(own: OwnServices, health: HealthReporter, inflight: Inflight, client: Client) -> Self {
        Self {
            own,
            health,
            inflight,
            client,
            initialising: Mutex::new(()),
            plugin: OnceCell::new(),
            misconfigured: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
        }
    }

    /// Starts the author's plugin and opens the gate. Dropped before its end, it leaves nothing begun.
    pub(crate) async fn initialise(&self, init: Init) -> Result<(), Status> {
        let _alone = self.initialising.lock().await;
        if self.plugin.initialized() {
            return Err(Status::failed_precondition("the plugin is already initialised"));
        }
        let Init { plugin: name, generation, capabilities, config, limit } = init;
        let config = config::parse(config).map_err(|problem| self.refuse(&StartError::Configuration(problem)))?;
        let host = Host::new(name, generation, capabilities, self.client.clone());
        let started = match limit {
            Some(limit) => timeout(limit, P::start(config, host)).await.map_err(|_| {
                Status::deadline_exceeded(format!("the plugin did not start within {} ms", limit.as_millis()))
            })?,
            None => P::start(config, host).await,
        };
        let plugin = Arc::new(started.map_err(|error| self.refuse(&error))?);
        let mut services = Services::default();
        Arc::clone(&plugin).services(&mut services);
        // The lock is held and both are empty, so neither can be found full.
        let _ = (self.plugin.set(plugin), self.own.set(services));
        self.report(ServingStatus::Serving).await;
        Ok(())
    }

    fn refuse(&self, error: &StartError) -> Status {
        tracing::error!(%error, "the plugin did not start");
        match error {
            StartError::Configuration(_) => {
                self.misconfigured.store(true, Ordering::Release);
                Status::invalid_argument(error.to_string())
            }
            StartError::Failed(_) => Status::internal(format!("the plugin did not start: {error}")),
        }
    }

    /// The health of the whole and of each service.
    async fn report(&self, status: ServingStatus) {
        self.health.set_service_status("", status).await;
        for name in self.names() {
            self.health.set_service_status(name, status).await;
        }
    }

    fn names(&self) -> impl Iterator<Item = &'static str> {
        self.own.get().into_iter().flat_map(Services::names)
    }

    /// Waits until nothing is in flight and the author's code is done, or for `limit`. Returns the calls left.
    pub(crate) async fn drain_within(&self, limit: Duration) -> u32 {
        // Only the first time: a status that is set again is sent again to those who watch.
        if !self.draining.swap(true, Ordering::AcqRel) {
            self.report(ServingStatus::NotServing).await;
        }
        let author = async {
            if let Some(plugin) = self.plugin.get() {
                plugin.drain().await;
            }
        };
        let done = timeout(limit, async { tokio::join!(author, self.inflight.idle()) }).await;
        let left = self.inflight.count();
        if done.is_err() {
            tracing::warn!(inflight = left, limit_ms = limit.as_millis(), "draining did not finish in time");
        }
        left
    }

    /// Tells the author's code, once, that the process ends.
    pub(crate) async fn stop_within(&self, reason: StopReason, limit: Duration) {
        let Some(plugin) = self.plugin.get() else { return };
        if self.stopped.swap(true, Ordering::AcqRel) {
            return;
        }
        if timeout(limit, plugin.stop(reason)).await.is_err() {
            tracing::warn!(limit_ms = limit.as_millis(), "the plugin did not stop in time");
        }
    }

    /// Ends the health streams, which would otherwise keep their connections open for ever.
    pub(crate) async fn end_health(&self) {
        let mut health = self.health.clone();
        for name in std::iter::once("").chain(self.names()) {
            health.clear_service_status(name).await;
        }
    }

    /// Whether Init was refused for a configuration that can never work.
    pub(crate) fn is_misconfigured(&self) -> bool {
        self.misconfigured.load(Ordering::Acquire) && !self.plugin.initialized()
    }

    fn running(&self) -> Result<&Arc<P>, Status> {
        self.plugin.get().ok_or_else(|| Status::failed_precondition("the plugin has not been initialised"))
    }
}

/// The Worker service over a [`Control`].
pub(crate) struct WorkerService<P>(pub(crate) Arc<Control<P>>);

#[tonic::async_trait]
impl<P: Plugin> Worker for WorkerService<P> {
    async fn init(&self, request: Request<InitRequest>) -> Result<Response<InitResponse>, Status> {
        let InitRequest { plugin, generation, protocol_versions, config, capabilities, deadline } =
            request.into_inner();
        let protocol_version = choose_version(&protocol_versions)?;
        let config = json_of(config)?;
        let limit = deadline.and_then(|deadline| Duration::try_from(deadline).ok());
        self.0.initialise(Init { plugin, generation, capabilities, config, limit }).await?;
        Ok(Response::new(InitResponse {
            protocol_version,
            sdk_name: env!("CARGO_PKG_NAME").to_owned(),
            sdk_version: env!("CARGO_PKG_VERSION").to_owned(),
            services: self.0.names().map(str::to_owned).collect(),
        }))
    }

    async fn reconfigure(&self, request: Request<ReconfigureRequest>) -> Result<Response<ReconfigureResponse>, Status> {
        let plugin = self.0.running()?;
        let config = config::parse(json_of(request.into_inner().config)?);
        let config = config.map_err(|problem| Status::invalid_argument(format!("configuration: {problem}")))?;
        match plugin.reconfigure(config).await {
            Ok(()) => Ok(Response::new(ReconfigureResponse {})),
            Err(error @ ReconfigureError::Unsupported) => Err(Status::unimplemented(error.to_string())),
            Err(error @ ReconfigureError::Invalid(_)) => Err(Status::invalid_argument(error.to_string())),
        }
    }

    async fn drain(&self, request: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        let limit = duration_or(request.into_inner().deadline, DEFAULT_DRAIN);
        let inflight_left = self.0.drain_within(limit).await;
        Ok(Response::new(DrainResponse { inflight_left }))
    }

    async fn stop(&self, request: Request<StopRequest>) -> Result<Response<StopResponse>, Status> {
        let StopRequest { reason, grace } = request.into_inner();
        let reason = match WireStopReason::try_from(reason) {
            Ok(WireStopReason::Unload) => StopReason::Unload,
            Ok(WireStopReason::Restart) => StopReason::Restart,
            Ok(WireStopReason::Shutdown) => StopReason::Shutdown,
            Ok(WireStopReason::Unspecified) | Err(_) => StopReason::Unknown,
        };
        self.0.stop_within(reason, duration_or(grace, DEFAULT_DRAIN)).await;
        Ok(Response::new(StopResponse {}))
    }

    async fn hook(&self, request: Request<HookRequest>) -> Result<Response<HookResponse>, Status> {
        let plugin = self.0.running()?;
        let HookRequest { hook, code, message } = request.into_inner();
        let hook = match LifecycleHook::try_from(hook) {
            Ok(LifecycleHook::BeforeLoad) => Hook::BeforeLoad,
            Ok(LifecycleHook::AfterLoad) => Hook::AfterLoad,
            Ok(LifecycleHook::BeforeUnload) => Hook::BeforeUnload,
            Ok(LifecycleHook::OnError) => Hook::OnError { code, message },
            Ok(LifecycleHook::Unspecified) | Err(_) => {
                return Err(Status::unimplemented(format!("this SDK does not know the lifecycle hook {hook}")));
            }
        };
        plugin.hook(hook).await;
        Ok(Response::new(HookResponse {}))
    }
}

fn choose_version(offered: &[u32]) -> Result<u32, Status> {
    PROTOCOL_VERSIONS.into_iter().find(|version| offered.contains(version)).ok_or_else(|| {
        Status::failed_precondition(format!(
            "no common protocol version: the supervisor offers {offered:?}, this SDK speaks {PROTOCOL_VERSIONS:?}; \
             rebuild the plugin with an SDK of the supervisor's release"
        ))
    })
}

fn json_of(config: Option<prost_types::Struct>) -> Result<Value, Status> {
    config::from_struct(config.unwrap_or_default())
        .map_err(|problem| Status::invalid_argument(format!("configuration: {problem}")))
}

fn duration_or(wire: Option<prost_types::Duration>, default: Duration) -> Duration {
    wire.and_then(|wire| Duration::try_from(wire).ok()).unwrap_or(default)
}
