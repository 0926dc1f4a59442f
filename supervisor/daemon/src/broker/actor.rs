//! The broker's thread: it carries out commands, and everything else runs beside it on the same thread.

use std::{collections::HashMap, rc::Rc, sync::Arc, time::Duration};

use plugvisor_core::route::RouteTable;
use plugvisor_package::PluginName;
use tokio::{
    sync::{mpsc, oneshot},
    task::{AbortHandle, JoinSet, spawn_local},
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use super::{
    accept::{self, Door},
    handle::{AddError, CallerSpec, Drained, LocalSpec, ProviderSpec},
    identity::PluginIdentity,
    provider::Provider,
    shared::Shared,
    snapshot::{ProviderSnapshot, Snapshot},
};

/// Breakers that nobody calls change by time alone; this often is looked.
const TICK: Duration = Duration::from_millis(500);

pub(super) enum Command {
    PublishRoutes(Arc<RouteTable>, oneshot::Sender<()>),
    AddCaller(CallerSpec, oneshot::Sender<Result<(), AddError>>),
    RemoveCaller(PluginIdentity, oneshot::Sender<()>),
    AddLocal(LocalSpec, oneshot::Sender<Result<(), AddError>>),
    AddProvider(ProviderSpec, oneshot::Sender<()>),
    RemoveProvider(PluginIdentity, oneshot::Sender<()>),
    Drain(PluginIdentity, Duration, oneshot::Sender<Drained>),
    SetReady(PluginIdentity, bool, oneshot::Sender<()>),
    HealthProbeOk(PluginIdentity, oneshot::Sender<()>),
    ResetBreakers(Option<PluginName>, oneshot::Sender<Vec<ProviderSnapshot>>),
    Snapshot(oneshot::Sender<Snapshot>),
    Stop(Duration, oneshot::Sender<usize>),
}

struct Actor {
    shared: Rc<Shared>,
    /// Accepting tasks; each owns its connections.
    listeners: JoinSet<()>,
    callers: HashMap<PluginIdentity, AbortHandle>,
}

/// Runs until it is told to stop, or until every handle is gone.
pub(super) async fn run(shared: Rc<Shared>, mut commands: mpsc::Receiver<Command>) {
    let mut actor = Actor { shared, listeners: JoinSet::new(), callers: HashMap::new() };
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let told = loop {
        // All branches are cancel-safe.
        tokio::select! {
            biased;
            command = commands.recv() => match command {
                None => break None,
                Some(Command::Stop(patience, reply)) => break Some((patience, reply)),
                Some(command) => actor.carry_out(command),
            },
            now = ticks.tick() => actor.tick(now),
            Some(_) = actor.listeners.join_next() => {}
        }
    };
    actor.shared.stop();
    let left = match &told {
        None => actor.shared.in_flight(),
        Some((patience, _)) => actor.finish(*patience).await,
    };
    for provider in actor.shared.providers() {
        provider.remove();
    }
    actor.listeners.shutdown().await;
    if let Some((_, reply)) = told {
        // Whoever asked may have gone; the broker stops all the same.
        let _ = reply.send(left);
    }
}

impl Actor {
    fn carry_out(&mut self, command: Command) {
        // A reply that nobody waits for any more is no error.
        match command {
            Command::PublishRoutes(routes, reply) => {
                self.shared.publish(routes);
                let _ = reply.send(());
            }
            Command::AddCaller(spec, reply) => drop(reply.send(self.add_caller(spec))),
            Command::RemoveCaller(identity, reply) => {
                if let Some(accepting) = self.callers.remove(&identity) {
                    accepting.abort();
                }
                let _ = reply.send(());
            }
            Command::AddLocal(spec, reply) => drop(reply.send(self.add_local(spec))),
            Command::AddProvider(spec, reply) => {
                let provider = Rc::new(Provider::new(spec, &self.shared));
                if let Some(before) = self.shared.add_provider(provider) {
                    before.remove();
                }
                let _ = reply.send(());
            }
            Command::RemoveProvider(identity, reply) => {
                if let Some(provider) = self.shared.remove_provider(&identity) {
                    provider.remove();
                }
                let _ = reply.send(());
            }
            Command::Drain(identity, patience, reply) => match self.shared.provider(&identity) {
                None => drop(reply.send(Drained { in_flight: 0 })),
                Some(provider) => {
                    // Ends by itself after `patience`.
                    spawn_local(async move {
                        let in_flight = provider.drain(patience).await;
                        let _ = reply.send(Drained { in_flight });
                    });
                }
            },
            Command::SetReady(identity, ready, reply) => {
                if let Some(provider) = self.shared.provider(&identity) {
                    provider.set_ready(&self.shared, ready);
                }
                let _ = reply.send(());
            }
            Command::HealthProbeOk(identity, reply) => {
                if let Some(provider) = self.shared.provider(&identity) {
                    provider.probe_ok(&self.shared);
                }
                let _ = reply.send(());
            }
            Command::ResetBreakers(only, reply) => drop(reply.send(self.reset_breakers(only.as_ref()))),
            Command::Snapshot(reply) => drop(reply.send(self.snapshot())),
            // Taken out by `run`.
            Command::Stop(_, reply) => drop(reply.send(0)),
        }
    }

    fn add_caller(&mut self, spec: CallerSpec) -> Result<(), AddError> {
        let CallerSpec { caller, listener, uid } = spec;
        let identity = PluginIdentity { name: caller.name.clone(), generation: caller.generation };
        let listener = accept::listener(listener).map_err(AddError::Listener)?;
        let limits = self.shared.config.plugin_connections.clone();
        let door = Door::Plugin { plugin: caller, uid };
        let accepting = self.listeners.spawn_local(accept::accept(Rc::clone(&self.shared), listener, door, limits));
        if let Some(before) = self.callers.insert(identity, accepting) {
            before.abort();
        }
        Ok(())
    }

    fn add_local(&mut self, spec: LocalSpec) -> Result<(), AddError> {
        let LocalSpec { listener, allowed_uids } = spec;
        let listener = accept::listener(listener).map_err(AddError::Listener)?;
        let limits = self.shared.config.local_connections.clone();
        let door = Door::Local { uids: allowed_uids };
        self.listeners.spawn_local(accept::accept(Rc::clone(&self.shared), listener, door, limits));
        Ok(())
    }

    fn tick(&self, now: Instant) {
        for provider in self.shared.providers() {
            provider.tick(&self.shared, now);
        }
    }

    /// Closes breakers; returns the providers as they were before.
    fn reset_breakers(&self, only: Option<&PluginName>) -> Vec<ProviderSnapshot> {
        let before = self.providers(only);
        for provider in self.shared.providers() {
            if only.is_none_or(|only| provider.identity.name == *only) {
                provider.reset_breaker(&self.shared);
            }
        }
        before
    }

    fn providers(&self, only: Option<&PluginName>) -> Vec<ProviderSnapshot> {
        let providers = self.shared.providers();
        let wanted = providers.iter().filter(|provider| only.is_none_or(|only| provider.identity.name == *only));
        let mut providers: Vec<_> = wanted.map(|provider| provider.snapshot(&self.shared)).collect();
        providers.sort_by(|one, other| one.identity.cmp(&other.identity));
        providers
    }

    fn snapshot(&self) -> Snapshot {
        let providers = self.providers(None);
        Snapshot {
            calls: self.shared.metrics.calls(),
            rejected: self.shared.metrics.rejections(),
            providers,
            caller_connections: self.shared.connections.get(),
            events_dropped: self.shared.events_dropped(),
        }
    }

    /// Waits for the calls in flight; returns how many were left.
    async fn finish(&self, patience: Duration) -> usize {
        let emptied = async {
            loop {
                let changed = self.shared.idle.notified();
                if self.shared.in_flight() == 0 {
                    return;
                }
                changed.await;
            }
        };
        // Losing the race to the clock is an answer too.
        let _ = timeout(patience, emptied).await;
        self.shared.in_flight()
    }
}
