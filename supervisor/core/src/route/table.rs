//! The snapshot that routing decides over.

use std::collections::HashMap;

use plugvisor_package::PluginName;

use crate::{CapabilitySet, Generation};

/// A plugin that takes part, as the daemon describes it. Plugins that are known and not loaded belong here too, so that
/// a call to them is refused as "not ready" and not as "unknown".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plugin {
    /// Its name.
    pub name: PluginName,
    /// The generation that serves; the last one when none does.
    pub generation: Generation,
    /// Whether calls may go there now.
    pub availability: Availability,
    /// What it serves (`module.providers`).
    pub services: Vec<Service>,
}

/// Whether a plugin takes calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Availability {
    /// It does.
    Serving,
    /// It does not.
    Unavailable {
        /// The state in words, such as "it restarts in 0.4 s" or "it is draining".
        why: String,
    },
}

/// One service of a plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Fully qualified, such as "acme.v1.Thumbnailer".
    pub name: String,
    /// What callers may name to choose this provider.
    pub token: Option<String>,
    /// Who may call it.
    pub export: Export,
}

/// Who may call a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Export {
    /// Nobody from outside the plugin.
    Private,
    /// Other plugins and local applications.
    Shared {
        /// Any plugin; otherwise only those that list this one in `dependencies`.
        global: bool,
        /// What a calling plugin must hold, beyond `api:internal-calls`.
        capabilities: CapabilitySet,
    },
}

/// A plugin as the broker addresses it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Provider {
    name: PluginName,
    generation: Generation,
    availability: Availability,
    slot: usize,
}

impl Provider {
    /// Its name.
    #[must_use]
    pub const fn name(&self) -> &PluginName {
        &self.name
    }

    /// The generation that calls go to.
    #[must_use]
    pub const fn generation(&self) -> Generation {
        self.generation
    }

    /// Whether calls may go there now.
    #[must_use]
    pub const fn availability(&self) -> &Availability {
        &self.availability
    }

    /// Its place in [`RouteTable::providers`], for tables that are kept beside this one.
    #[must_use]
    pub const fn slot(&self) -> usize {
        self.slot
    }
}

/// One provider's offer of one service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Offer {
    slot: usize,
    token: Option<Box<str>>,
    export: Export,
}

impl Offer {
    pub(super) fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    pub(super) const fn export(&self) -> &Export {
        &self.export
    }
}

/// The immutable snapshot. Built anew when a plugin comes, goes or changes, and shared by reference.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteTable {
    providers: Vec<Provider>,
    offers: HashMap<Box<str>, Vec<Offer>>,
}

impl RouteTable {
    /// The table of these plugins. Names must be distinct; of two equal ones the later is left out.
    #[must_use]
    pub fn new(plugins: impl IntoIterator<Item = Plugin>) -> Self {
        let mut table = Self::default();
        for plugin in plugins {
            let Plugin { name, generation, availability, services } = plugin;
            if table.find(&name).is_some() {
                continue;
            }
            let slot = table.providers.len();
            table.providers.push(Provider { name, generation, availability, slot });
            for Service { name, token, export } in services {
                let offer = Offer { slot, token: token.map(String::into_boxed_str), export };
                table.offers.entry(name.into_boxed_str()).or_default().push(offer);
            }
        }
        table
    }

    /// All plugins, in the order given, so that `providers()[p.slot()]` is `p`.
    #[must_use]
    pub fn providers(&self) -> &[Provider] {
        &self.providers
    }

    /// The plugin of this name.
    #[must_use]
    pub fn find(&self, name: &PluginName) -> Option<&Provider> {
        self.providers.iter().find(|provider| provider.name == *name)
    }

    /// Every service name that some plugin provides, in no order.
    pub fn services(&self) -> impl Iterator<Item = &str> {
        self.offers.keys().map(AsRef::as_ref)
    }

    pub(super) fn offers(&self, service: &str) -> &[Offer] {
        self.offers.get(service).map_or(&[], Vec::as_slice)
    }

    pub(super) fn provider(&self, offer: &Offer) -> &Provider {
        &self.providers[offer.slot]
    }
}
