//! A caller as its connection makes it known.

use plugvisor_core::route::{self, PluginCaller};
use plugvisor_package::PluginName;

use super::{
    identity::{CallerIdentity, PluginIdentity},
    metrics::CallerKey,
    shared::Shared,
};

/// Who is on one connection, with what every one of its calls needs.
#[derive(Debug)]
pub(super) struct Caller {
    pub(super) identity: CallerIdentity,
    pub(super) key: CallerKey,
    /// `plugvisor-caller`.
    pub(super) label: String,
    peer: Peer,
}

#[derive(Debug)]
enum Peer {
    Plugin(PluginCaller),
    Local { uid: u32 },
}

impl Caller {
    pub(super) fn plugin(plugin: PluginCaller, shared: &Shared) -> Self {
        let identity =
            CallerIdentity::Plugin(PluginIdentity { name: plugin.name.clone(), generation: plugin.generation });
        Self::new(identity, Peer::Plugin(plugin), shared)
    }

    pub(super) fn local(uid: u32, pid: u32, shared: &Shared) -> Self {
        Self::new(CallerIdentity::Local { uid, pid }, Peer::Local { uid }, shared)
    }

    fn new(identity: CallerIdentity, peer: Peer, shared: &Shared) -> Self {
        let name = match &identity {
            CallerIdentity::Plugin(plugin) => plugin.name.as_str(),
            // One series for all of them: process and user numbers are without bound.
            CallerIdentity::Local { .. } => "local",
        };
        let key = shared.metrics.caller(name);
        let label = identity.label();
        Self { identity, key, label, peer }
    }

    /// The plugin's name, for `plugvisor-hops`; local applications begin a path and are not on it.
    pub(super) fn plugin_name(&self) -> Option<&PluginName> {
        match &self.peer {
            Peer::Plugin(plugin) => Some(&plugin.name),
            Peer::Local { .. } => None,
        }
    }

    /// The caller as the rules of reach know it.
    pub(super) fn rules(&self) -> route::Caller<'_> {
        match &self.peer {
            Peer::Plugin(plugin) => route::Caller::Plugin(plugin),
            Peer::Local { uid } => route::Caller::Local { uid: *uid },
        }
    }
}
