//! The broker as others see it: how it is started, and the commands it takes.

use std::{io, os::fd::OwnedFd, sync::Arc, time::Duration};

use plugvisor_core::{
    breaker,
    route::{PluginCaller, RouteTable},
};
use plugvisor_package::PluginName;
use tokio::sync::{mpsc, oneshot};

use super::{
    command::Command,
    config::{BrokerConfig, CallLimits},
    event::BrokerEvent,
    exchange::Exchange,
    host::{Host, HostService},
    identity::PluginIdentity,
    poll::{Poll, Wake},
    snapshot::{ProviderSnapshot, Snapshot},
};

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
        modules: Vec<HostService>,
    ) -> Result<(BrokerHandle, mpsc::Receiver<BrokerEvent>), StartError> {
        let (commands, received) = mpsc::channel(config.command_queue.max(1));
        let (events, told) = mpsc::channel(config.event_queue.max(1));
        let poll = Poll::new().map_err(StartError)?;
        let wake = Arc::new(WakeAtEnd(poll.waker()));
        let host = Host::start(modules).map_err(StartError)?;
        let thread = move || Exchange::new(config, host, poll, received, events).run();
        std::thread::Builder::new().name("broker".into()).spawn(thread).map_err(StartError)?;
        Ok((BrokerHandle { commands, wake }, told))
    }
}

/// Wakes the broker once more when the last handle is gone, so that it sees that nobody commands it any more.
#[derive(Debug)]
struct WakeAtEnd(Arc<Wake>);

impl Drop for WakeAtEnd {
    fn drop(&mut self) {
        self.0.wake();
    }
}

/// Commands to the broker. Clones command the same broker; it ends by [`BrokerHandle::stop`].
///
/// Every command waits until the broker's thread has carried it out, and fails only when the broker has stopped.
#[derive(Clone, Debug)]
pub struct BrokerHandle {
    // Dropped before `wake`, in the order of the fields.
    commands: mpsc::Sender<Command>,
    wake: Arc<WakeAtEnd>,
}

/// A plugin generation that may call.
#[derive(Debug)]
pub struct CallerSpec {
    /// Who every connection to the listener is, and what was granted to it.
    pub caller: PluginCaller,
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
    pub breaker: breaker::Settings,
    /// Where the breaker of this same generation stood in an earlier supervisor.
    pub breaker_memory: Option<breaker::Memory>,
    /// The bounds of its calls.
    pub limits: CallLimits,
}

/// What [`BrokerHandle::drain`] left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Calls still in flight when the time was up; removing the provider ends them as `provider_lost`.
    pub in_flight: usize,
}

/// The system refused the broker a thread or an event queue.
#[derive(Debug, thiserror::Error)]
#[error("cannot start the broker's thread; check the limits on threads and open files of plugvisord")]
pub struct StartError(#[source] io::Error);

/// Why a listener was not added.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// The broker has stopped.
    #[error(transparent)]
    Stopped(#[from] Stopped),
    /// The descriptor is not a listening Unix stream socket, or the system's event queue is full.
    #[error("cannot accept calls on the socket; check the limit on open files of plugvisord")]
    Listener(#[source] io::Error),
}

/// The broker has stopped and takes no commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the broker has stopped")]
pub struct Stopped;

impl BrokerHandle {
    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Stopped> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| Stopped)?;
        self.wake.0.wake();
        answer.await.map_err(|_| Stopped)
    }

    /// Routes every later call over this table; calls in flight go on.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn publish_routes(&self, routes: Arc<RouteTable>) -> Result<(), Stopped> {
        self.ask(|reply| Command::PublishRoutes(routes, reply)).await
    }

    /// Accepts calls from a plugin generation.
    ///
    /// # Errors
    /// When the broker has stopped or cannot accept on the listener.
    pub async fn add_caller(&self, caller: CallerSpec) -> Result<(), AddError> {
        self.ask(|reply| Command::AddCaller(caller, reply)).await?
    }

    /// Closes a plugin generation's listener and connections; its calls in flight are cancelled.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn remove_caller(&self, caller: &PluginIdentity) -> Result<(), Stopped> {
        self.ask(|reply| Command::RemoveCaller(caller.clone(), reply)).await
    }

    /// Accepts calls from local applications.
    ///
    /// # Errors
    /// When the broker has stopped or cannot accept on the listener.
    pub async fn add_local(&self, local: LocalSpec) -> Result<(), AddError> {
        self.ask(|reply| Command::AddLocal(local, reply)).await?
    }

    /// Adds a provider. Routes name it by its identity; it gets calls after [`BrokerHandle::set_ready`].
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn add_provider(&self, provider: ProviderSpec) -> Result<(), Stopped> {
        self.ask(|reply| Command::AddProvider(provider, reply)).await
    }

    /// Removes a provider and closes its connection; its calls in flight end as `provider_lost`.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn remove_provider(&self, provider: &PluginIdentity) -> Result<(), Stopped> {
        self.ask(|reply| Command::RemoveProvider(provider.clone(), reply)).await
    }

    /// Refuses new calls to a provider and waits until those in flight have ended, at most `patience`. A provider that
    /// is not there has none.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn drain(&self, provider: &PluginIdentity, patience: Duration) -> Result<Drained, Stopped> {
        self.ask(|reply| Command::Drain(provider.clone(), patience, reply)).await
    }

    /// Lets calls through to a provider, or refuses them as `provider_not_ready`.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn set_ready(&self, provider: &PluginIdentity, ready: bool) -> Result<(), Stopped> {
        self.ask(|reply| Command::SetReady(provider.clone(), ready, reply)).await
    }

    /// Tells a provider's breaker that a health probe succeeded, so that an idle breaker recovers too.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn health_probe_ok(&self, provider: &PluginIdentity) -> Result<(), Stopped> {
        self.ask(|reply| Command::HealthProbeOk(provider.clone(), reply)).await
    }

    /// Closes the breakers of one plugin, or of every one, and returns the providers as they were before.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn reset_breakers(&self, only: Option<PluginName>) -> Result<Vec<ProviderSnapshot>, Stopped> {
        self.ask(|reply| Command::ResetBreakers(only, reply)).await
    }

    /// The figures now.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn snapshot(&self) -> Result<Snapshot, Stopped> {
        self.ask(Command::Snapshot).await
    }

    /// Refuses new calls as `stopping`, tells callers by GOAWAY, waits for the calls in flight at most `patience`, then
    /// closes everything and ends the thread. Returns the number of calls that were cut.
    ///
    /// # Errors
    /// [`Stopped`] when it had stopped before.
    pub async fn stop(&self, patience: Duration) -> Result<usize, Stopped> {
        self.ask(|reply| Command::Stop(patience, reply)).await
    }
}
