//! Between drivers and the broker: which plugin serves what, and whether it may be called now.
//!
//! Drivers say what changed for their own plugin; one task joins it into the table that the broker routes over. What a
//! call contains and how it is forwarded is the broker's business.

use std::{collections::BTreeMap, sync::Arc};

use arc_swap::ArcSwap;
use plugvisor_core::{
    CapabilitySet,
    route::{Export, Plugin, RouteTable, Service},
};
use plugvisor_package::{PluginName, Services};
use tokio::sync::{mpsc, oneshot};

use crate::broker::{BrokerHandle, Stopped};

/// The broker with its table. Clones speak to the same one.
#[derive(Clone, Debug)]
pub struct Calls {
    broker: BrokerHandle,
    changes: mpsc::Sender<Change>,
    table: Arc<ArcSwap<RouteTable>>,
}

#[derive(Debug)]
enum Change {
    Set(Box<Plugin>, oneshot::Sender<()>),
    Remove(PluginName, oneshot::Sender<()>),
}

impl Calls {
    /// Starts the task that keeps the table. It ends when every clone is dropped or the broker has stopped.
    #[must_use]
    pub fn start(broker: BrokerHandle) -> Self {
        let (changes, received) = mpsc::channel(64);
        let table = Arc::default();
        tokio::spawn(keep_table(broker.clone(), received, Arc::clone(&table)));
        Self { broker, changes, table }
    }

    /// The broker itself.
    #[must_use]
    pub fn broker(&self) -> &BrokerHandle {
        &self.broker
    }

    /// The table that calls are routed over now.
    #[must_use]
    pub fn table(&self) -> Arc<RouteTable> {
        self.table.load_full()
    }

    /// Replaces what is known of a plugin; returns when later calls are routed by it.
    pub async fn set(&self, plugin: Plugin) -> Result<(), Stopped> {
        let (done, wait) = oneshot::channel();
        self.changes.send(Change::Set(Box::new(plugin), done)).await.map_err(|_| Stopped)?;
        wait.await.map_err(|_| Stopped)
    }

    /// Forgets a plugin.
    pub async fn remove(&self, name: PluginName) -> Result<(), Stopped> {
        let (done, wait) = oneshot::channel();
        self.changes.send(Change::Remove(name, done)).await.map_err(|_| Stopped)?;
        wait.await.map_err(|_| Stopped)
    }
}

async fn keep_table(broker: BrokerHandle, mut changes: mpsc::Receiver<Change>, shown: Arc<ArcSwap<RouteTable>>) {
    let mut plugins: BTreeMap<PluginName, Plugin> = BTreeMap::new();
    while let Some(change) = changes.recv().await {
        let done = match change {
            Change::Set(plugin, done) => {
                plugins.insert(plugin.name.clone(), *plugin);
                done
            }
            Change::Remove(name, done) => {
                plugins.remove(&name);
                done
            }
        };
        let table = Arc::new(RouteTable::new(plugins.values().cloned()));
        if broker.publish_routes(Arc::clone(&table)).await.is_err() {
            return;
        }
        shown.store(table);
        let _ = done.send(());
    }
}

/// What a bundle serves, with who may reach it.
#[must_use]
pub fn offers(services: &Services) -> Vec<Service> {
    let Services { provided, exported, controllers: _, cross_plugin } = services;
    let mut offers = Vec::new();
    for name in provided {
        let before = offers.len();
        if exported.contains(name) {
            let export = Export::Shared { global: true, capabilities: CapabilitySet::EMPTY };
            offers.push(Service { name: name.clone(), token: None, export });
        }
        for shared in cross_plugin.iter().filter(|shared| shared.service_name == *name) {
            let capabilities = shared.capabilities.iter().copied().collect();
            let export = Export::Shared { global: shared.global, capabilities };
            offers.push(Service { name: name.clone(), token: shared.token.clone(), export });
        }
        if offers.len() == before {
            offers.push(Service { name: name.clone(), token: None, export: Export::Private });
        }
    }
    offers
}

#[cfg(test)]
mod tests {
    use plugvisor_package::{Capability, CrossPluginService};

    use super::*;

    #[test]
    fn what_is_neither_exported_nor_shared_is_private() {
        let shared = CrossPluginService {
            service_name: "a.C".into(),
            token: Some("c".into()),
            global: false,
            description: None,
            capabilities: vec![Capability::WriteTemp],
        };
        let services = Services {
            provided: vec!["a.A".into(), "a.B".into(), "a.C".into()],
            exported: vec!["a.B".into()],
            controllers: Vec::new(),
            cross_plugin: vec![shared],
        };
        let all = Export::Shared { global: true, capabilities: CapabilitySet::EMPTY };
        let some = Export::Shared { global: false, capabilities: CapabilitySet::of(&[Capability::WriteTemp]) };
        let service = |name: &str, token: Option<&str>, export| Service {
            name: name.into(),
            token: token.map(Into::into),
            export,
        };
        let expected =
            [service("a.A", None, Export::Private), service("a.B", None, all), service("a.C", Some("c"), some)];
        assert_eq!(offers(&services), expected);
    }
}
