//! The broker as others see it: how it is started, and the commands it takes.

use std::{convert::Infallible, io, os::fd::OwnedFd, sync::Arc, time::Duration};

use tokio::sync::mpsc;
use tonic::body::Body;
use tower::{Service, util::BoxCloneSyncService};

use super::{BrokerConfig, BrokerEvent, CallLimits, PluginIdentity, Snapshot};

/// The table over which calls are routed. Stands here until `plugvisor-core` brings its own.
#[derive(Debug, Default)]
pub struct RouteTable;

/// A breaker's figures. Stands here until `plugvisor-core` brings its own.
#[derive(Clone, Debug)]
pub struct BreakerConfig;

/// Starts the broker.
#[derive(Debug)]
pub struct Broker;

impl Broker {
    /// Starts the broker's thread. Until routes are published and callers added, it serves nobody.
    ///
    /// # Errors
    /// When the system gives no thread or no event queue.
    pub fn start(
        config: BrokerConfig,
        modules: Vec<HostModule>,
    ) -> Result<(BrokerHandle, mpsc::Receiver<BrokerEvent>), StartError> {
        let _ = (config, modules);
        Err(StartError::Thread(io::Error::other("not landed")))
    }
}

/// Commands to the broker. Clones command the same broker; it ends by [`BrokerHandle::stop`].
///
/// Every command waits until the broker's thread has carried it out, and fails only when the broker has stopped.
#[derive(Clone, Debug)]
pub struct BrokerHandle {
    commands: mpsc::Sender<()>,
}

/// A plugin generation that may call.
#[derive(Debug)]
pub struct CallerSpec {
    /// Who every connection to the listener is.
    pub identity: PluginIdentity,
    /// A listening Unix stream socket that this generation alone can reach.
    pub listener: OwnedFd,
    /// The user that `SO_PEERCRED` must name. `None`: not checked.
    pub uid: Option<u32>,
}

/// A listener for local applications.
#[derive(Debug)]
pub struct LocalSpec {
    /// A listening Unix stream socket.
    pub listener: OwnedFd,
    /// Users that may connect beside root, as `SO_PEERCRED` names them.
    pub allowed_uids: Vec<u32>,
}

/// A plugin generation that serves calls. It begins as not ready.
#[derive(Debug)]
pub struct ProviderSpec {
    /// Who serves.
    pub identity: PluginIdentity,
    /// An `O_PATH` descriptor of the worker socket; the broker connects through `/proc/self/fd`.
    pub socket: OwnedFd,
    /// Its breaker's figures.
    pub breaker: BreakerConfig,
    /// The bounds of its calls.
    pub limits: CallLimits,
}

/// What [`BrokerHandle::drain`] left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Calls still in flight when the time was up; removing the provider ends them as `provider_lost`.
    pub in_flight: usize,
}

/// A service that the supervisor itself offers on every plugin's broker socket.
///
/// It runs on the broker's thread and must not block it. The request carries a [`super::CallerIdentity`] among its
/// extensions. Whether the caller may reach it is the route table's business.
#[derive(Clone, Debug)]
pub struct HostModule {
    pub(super) service: &'static str,
    pub(super) handler: BoxCloneSyncService<http::Request<Body>, http::Response<Body>, Infallible>,
}

impl HostModule {
    /// Registers `handler` (a generated tonic server) for every method of `service`, such as
    /// `plugvisor.host.v1.Events`.
    pub fn new<S>(service: &'static str, handler: S) -> Self
    where
        S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send + 'static,
    {
        Self { service, handler: BoxCloneSyncService::new(handler) }
    }
}

/// Why the broker did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The system refused a thread or an event queue.
    #[error("cannot start the broker's thread; check the limits on threads and open files of plugvisord")]
    Thread(#[source] io::Error),
}

/// The broker has stopped and takes no commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the broker has stopped")]
pub struct Stopped;

impl BrokerHandle {
    /// Routes every later call over this table; calls in flight go on.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn publish_routes(&self, routes: Arc<RouteTable>) -> Result<(), Stopped> {
        let _ = routes;
        self.commands.send(()).await.map_err(|_| Stopped)
    }

    /// Accepts calls from a plugin generation.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn add_caller(&self, caller: CallerSpec) -> Result<(), Stopped> {
        let _ = caller;
        self.commands.send(()).await.map_err(|_| Stopped)
    }

    /// Closes a plugin generation's listener and connections; its calls in flight are cancelled.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn remove_caller(&self, caller: &PluginIdentity) -> Result<(), Stopped> {
        let _ = caller;
        self.commands.send(()).await.map_err(|_| Stopped)
    }

    /// Accepts calls from local applications.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn add_local(&self, local: LocalSpec) -> Result<(), Stopped> {
        let _ = local;
        self.commands.send(()).await.map_err(|_| Stopped)
    }

    /// Adds a provider. Routes name it by its identity; it gets calls after [`BrokerHandle::set_ready`].
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn add_provider(&self, provider: ProviderSpec) -> Result<(), Stopped> {
        let _ = provider;
        self.commands.send(()).await.map_err(|_| Stopped)
    }

    /// Removes a provider and closes its connection; its calls in flight end as `provider_lost`.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn remove_provider(&self, provider: &PluginIdentity) -> Result<(), Stopped> {
        let _ = provider;
        self.commands.send(()).await.map_err(|_| Stopped)
    }

    /// Refuses new calls to a provider and waits until those in flight have ended, at most `patience`.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn drain(&self, provider: &PluginIdentity, patience: Duration) -> Result<Drained, Stopped> {
        let _ = (provider, patience);
        Err(Stopped)
    }

    /// Lets calls through to a provider, or refuses them as `provider_not_ready`.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn set_ready(&self, provider: &PluginIdentity, ready: bool) -> Result<(), Stopped> {
        let _ = (provider, ready);
        self.commands.send(()).await.map_err(|_| Stopped)
    }

    /// Tells a provider's breaker that a health probe succeeded, so that an idle breaker recovers too.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn health_probe_ok(&self, provider: &PluginIdentity) -> Result<(), Stopped> {
        let _ = provider;
        self.commands.send(()).await.map_err(|_| Stopped)
    }

    /// The figures now.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn snapshot(&self) -> Result<Snapshot, Stopped> {
        Err(Stopped)
    }

    /// Refuses new calls as `stopping`, tells callers by GOAWAY, waits for the calls in flight at most `patience`, then
    /// closes everything and ends the thread. Returns the number of calls that were cut.
    ///
    /// # Errors
    /// [`Stopped`] when it had stopped before.
    pub async fn stop(&self, patience: Duration) -> Result<usize, Stopped> {
        let _ = patience;
        Err(Stopped)
    }
}
