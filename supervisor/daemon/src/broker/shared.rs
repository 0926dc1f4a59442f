//! What every task on the broker's thread sees. One thread: cells, no locks.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use plugvisor_core::{
    Time,
    route::{HostModule, RouteTable},
};
use tokio::sync::mpsc;

use super::{config::BrokerConfig, event::BrokerEvent, identity::PluginIdentity, metrics::Metrics, provider::Provider};

/// Events of one kind about one subject are told at most once in this time: a peer cannot flood their readers.
const REPEAT: Duration = Duration::from_secs(1);
/// Subjects remembered for that; more than there are plugins.
const REMEMBERED: usize = 1024;

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) config: BrokerConfig,
    pub(super) metrics: Metrics,
    pub(super) routes: RefCell<Arc<RouteTable>>,
    providers: RefCell<HashMap<PluginIdentity, Rc<Provider>>>,
    /// Beside the table's providers, by slot.
    targets: RefCell<Vec<Option<Rc<Provider>>>>,
    modules: HashSet<HostModule>,
    started: Instant,
    /// True once the broker is stopping.
    stopping: Cell<bool>,
    in_flight: Cell<usize>,
    /// Some provider's last call has ended since somebody looked.
    emptied: Cell<bool>,
    pub(super) connections: Cell<usize>,
    events: mpsc::Sender<BrokerEvent>,
    events_dropped: Cell<u64>,
    told: RefCell<HashMap<(std::mem::Discriminant<BrokerEvent>, String), Instant>>,
}

impl Shared {
    pub(super) fn new(config: BrokerConfig, modules: HashSet<HostModule>, events: mpsc::Sender<BrokerEvent>) -> Self {
        Self {
            metrics: Metrics::new(config.max_method_series),
            config,
            routes: RefCell::default(),
            providers: RefCell::default(),
            targets: RefCell::default(),
            modules,
            started: Instant::now(),
            stopping: Cell::new(false),
            in_flight: Cell::new(0),
            emptied: Cell::new(false),
            connections: Cell::new(0),
            events,
            events_dropped: Cell::new(0),
            told: RefCell::default(),
        }
    }

    /// The moment as the rules of `plugvisor-core` count it.
    pub(super) fn time(&self, now: Instant) -> Time {
        Time::after_start(now.duration_since(self.started))
    }

    pub(super) fn publish(&self, routes: Arc<RouteTable>) {
        *self.routes.borrow_mut() = routes;
        self.aim();
    }

    pub(super) fn add_provider(&self, provider: Rc<Provider>) -> Option<Rc<Provider>> {
        let before = self.providers.borrow_mut().insert(provider.identity.clone(), provider);
        self.aim();
        before
    }

    pub(super) fn remove_provider(&self, identity: &PluginIdentity) -> Option<Rc<Provider>> {
        let removed = self.providers.borrow_mut().remove(identity);
        self.aim();
        removed
    }

    pub(super) fn provider(&self, identity: &PluginIdentity) -> Option<Rc<Provider>> {
        self.providers.borrow().get(identity).cloned()
    }

    pub(super) fn providers(&self) -> Vec<Rc<Provider>> {
        self.providers.borrow().values().cloned().collect()
    }

    /// The provider in a slot of the published table, if its generation is here.
    pub(super) fn target(&self, slot: usize) -> Option<Rc<Provider>> {
        self.targets.borrow().get(slot).cloned().flatten()
    }

    pub(super) fn offers(&self, module: HostModule) -> bool {
        self.modules.contains(&module)
    }

    fn aim(&self) {
        let routes = self.routes.borrow();
        let providers = self.providers.borrow();
        let found = routes.providers().iter().map(|listed| {
            let identity = PluginIdentity { name: listed.name().clone(), generation: listed.generation() };
            providers.get(&identity).cloned()
        });
        *self.targets.borrow_mut() = found.collect();
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.get()
    }

    pub(super) fn stop(&self) {
        self.stopping.set(true);
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.get()
    }

    pub(super) fn call_began(&self) {
        self.in_flight.set(self.in_flight.get() + 1);
    }

    pub(super) fn call_ended(&self, last: bool) {
        self.in_flight.set(self.in_flight.get().saturating_sub(1));
        if last {
            self.emptied.set(true);
        }
    }

    /// Whether a provider's last call has ended since this was last asked.
    pub(super) fn was_emptied(&self) -> bool {
        self.emptied.take()
    }

    /// Tells the supervisor, never waiting for it.
    pub(super) fn tell(&self, event: BrokerEvent) {
        if self.events.try_send(event).is_err() {
            self.events_dropped.set(self.events_dropped.get() + 1);
        }
    }

    /// Tells the supervisor unless the same was told about the same subject just now.
    pub(super) fn tell_once(&self, subject: &str, event: BrokerEvent) {
        let now = Instant::now();
        let mut told = self.told.borrow_mut();
        if told.len() >= REMEMBERED {
            told.retain(|_, when| now.duration_since(*when) < REPEAT);
        }
        let key = (std::mem::discriminant(&event), subject.to_owned());
        if told.get(&key).is_some_and(|when| now.duration_since(*when) < REPEAT) || told.len() >= REMEMBERED {
            self.events_dropped.set(self.events_dropped.get() + 1);
            return;
        }
        told.insert(key, now);
        drop(told);
        self.tell(event);
    }

    pub(super) fn events_dropped(&self) -> u64 {
        self.events_dropped.get()
    }
}
