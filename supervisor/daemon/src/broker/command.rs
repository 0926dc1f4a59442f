//! What the broker's handles ask of it, and how it is carried out.

use std::{rc::Rc, sync::Arc, time::Duration};

use plugvisor_core::route::RouteTable;
use plugvisor_package::PluginName;
use tokio::sync::{
    mpsc::{self, error::TryRecvError},
    oneshot,
};

use super::{
    exchange::{Drain, Exchange, Stop},
    handle::{AddError, CallerSpec, Drained, LocalSpec, ProviderSpec},
    identity::PluginIdentity,
    link::{Link, Server},
    peer::Side,
    provider::Provider,
    snapshot::{ProviderSnapshot, Snapshot},
    timer::Alarm,
};

#[derive(Debug)]
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

/// The commands that wait.
#[derive(Debug)]
pub(super) struct Commands {
    received: mpsc::Receiver<Command>,
    over: bool,
}

impl Commands {
    pub(super) const fn new(received: mpsc::Receiver<Command>) -> Self {
        Self { received, over: false }
    }

    fn next(&mut self) -> Option<Command> {
        match self.received.try_recv() {
            Ok(command) => Some(command),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => {
                self.over = true;
                None
            }
        }
    }

    /// Whether nobody can command any more.
    pub(super) const fn are_over(&self) -> bool {
        self.over
    }
}

impl Exchange {
    pub(super) fn carry_out_all(&mut self) {
        while let Some(command) = self.commands.next() {
            self.carry_out(command);
        }
    }

    fn carry_out(&mut self, command: Command) {
        // A reply that nobody waits for any more is no error.
        match command {
            Command::PublishRoutes(routes, reply) => {
                self.shared.publish(routes);
                let _ = reply.send(());
            }
            Command::AddCaller(spec, reply) => drop(reply.send(self.add_caller(spec))),
            Command::RemoveCaller(identity, reply) => {
                self.remove_caller(&identity);
                let _ = reply.send(());
            }
            Command::AddLocal(spec, reply) => drop(reply.send(self.add_local(spec))),
            Command::AddProvider(spec, reply) => {
                self.add_provider(spec);
                let _ = reply.send(());
            }
            Command::RemoveProvider(identity, reply) => {
                if let Some(provider) = self.shared.remove_provider(&identity) {
                    self.remove_provider(&provider);
                }
                let _ = reply.send(());
            }
            Command::Drain(identity, patience, reply) => match self.shared.provider(&identity) {
                None => drop(reply.send(Drained { in_flight: 0 })),
                Some(provider) => {
                    provider.drain();
                    if provider.in_flight() == 0 {
                        let _ = reply.send(Drained { in_flight: 0 });
                        return;
                    }
                    let until = self.now + patience;
                    self.timers.at(until, Alarm::Patience);
                    self.drains.push(Drain { provider, until, reply });
                }
            },
            Command::SetReady(identity, ready, reply) => {
                if let Some(provider) = self.shared.provider(&identity)
                    && provider.set_ready(ready)
                {
                    self.connect(provider.link);
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
            Command::Stop(patience, reply) => self.begin_stop(patience, reply),
        }
    }

    fn add_provider(&mut self, spec: ProviderSpec) {
        let entry = self.links.vacant_entry();
        let provider = Rc::new(Provider::new(spec, entry.key(), &self.shared));
        entry.insert(Link::new(Server::Plugin(Rc::clone(&provider))));
        if let Some(before) = self.shared.add_provider(provider) {
            self.remove_provider(&before);
        }
    }

    fn remove_provider(&mut self, provider: &Provider) {
        provider.remove();
        self.remove_link(provider.link);
    }

    fn begin_stop(&mut self, patience: Duration, reply: oneshot::Sender<usize>) {
        if self.stop.is_some() {
            // Somebody else stops it already; that this one is not answered says so.
            return;
        }
        self.shared.stop();
        let until = self.now + patience;
        self.timers.at(until, Alarm::Patience);
        self.stop = Some(Stop { until, reply });
        let callers: Vec<usize> = self
            .peers
            .iter()
            .filter(|(_, peer)| matches!(peer.side, Side::Caller { .. }))
            .map(|(place, _)| place)
            .collect();
        for place in callers {
            self.announce_farewell(place);
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
}
