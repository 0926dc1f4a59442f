//! The egress proxy: the only way out of a plugin's network namespace.
//!
//! ```text
//!   plugin ──TCP──▶ 127.0.0.1:3128 in its namespace ──▶ Proxy ──▶ listed? resolve, judge, connect ──▶ the internet
//!                   (socket from the launcher)          one per generation
//! ```
//!
//! Who asks is known by the socket: each plugin generation has its own. What it may reach is `plugvisor_core::egress`; this
//! module owns the sockets, the resolver, the time and the HTTP. It does not look into tunnels (CONNECT): what is said in one
//! is between the plugin and the destination.
//!
//! A destination is judged for every request, its name resolved once, and the address that was judged is the one that is
//! connected to, so that no second answer of a resolver can move it.

mod client;
mod connection;
mod dial;
mod figures;
mod forward;
mod limits;
mod lookups;
mod names;
mod own;
mod refusal;
mod resolver;
mod tunnel;

use std::{io, net::TcpListener as StdListener, os::fd::OwnedFd, sync::Arc};

use plugvisor_core::{
    Rights,
    egress::{AddressRules, AllowList},
    event::BrokerEvent,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::sleep,
};

pub use self::{
    connection::{Understood, understand},
    figures::Figures,
    limits::EgressLimits,
};
use self::{
    lookups::{Lookups, OwnLookups},
    own::OwnAddresses,
    refusal::Refusal,
};
use crate::{
    events::{Events, Subject},
    listeners,
    meter::Meter,
    told::Told,
};

/// What one plugin may do.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Where it may connect to.
    pub allow: AllowList,
    /// Which addresses are refused.
    pub addresses: AddressRules,
    /// What it may do: plain HTTP, WebSocket, names.
    pub rights: Rights,
    /// What its connections share with others of the plugin.
    pub bandwidth: Option<Arc<Meter>>,
}

/// What all plugins' proxies share.
#[derive(Debug)]
pub struct EgressHost {
    limits: EgressLimits,
    connections: Arc<Semaphore>,
    lookups: Lookups,
    own: OwnAddresses,
}

impl EgressHost {
    /// With these limits.
    #[must_use]
    pub fn new(limits: EgressLimits) -> Self {
        Self {
            connections: Arc::new(Semaphore::new(limits.connections_of_all)),
            lookups: Lookups::new(limits.lookups_of_all, limits.lookups),
            own: OwnAddresses::default(),
            limits,
        }
    }
}

/// The proxy of one plugin generation.
#[derive(Debug)]
pub struct Proxy {
    subject: Subject,
    rules: Rules,
    host: Arc<EgressHost>,
    figures: Arc<Figures>,
    events: Arc<Events>,
    lookups: OwnLookups,
    told: Told,
}

impl Proxy {
    /// A proxy for the plugin `subject`, which counts in `figures`.
    #[must_use]
    pub fn new(
        subject: Subject,
        rules: Rules,
        host: Arc<EgressHost>,
        figures: Arc<Figures>,
        events: Arc<Events>,
    ) -> Self {
        let lookups = host.lookups.of(subject.plugin().unwrap_or_default());
        Self { subject, rules, host, figures, events, lookups, told: Told::new() }
    }

    /// Accepts on a listening TCP socket, such as the launcher's, until it is dropped; every connection ends with it.
    ///
    /// # Errors
    ///
    /// When the socket cannot be used.
    pub async fn serve(self, listener: OwnedFd) -> io::Result<()> {
        let listener = StdListener::from(listener);
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let proxy = Arc::new(self);
        let mut connections = JoinSet::new();
        loop {
            // Both are cancel-safe by their documentation.
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => proxy.accepted(stream, &mut connections),
                    Err(error) => {
                        tracing::warn!(subject = proxy.subject.text(), %error, "the egress proxy cannot accept");
                        sleep(listeners::REST).await;
                    }
                },
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
            }
        }
    }

    fn accepted(self: &Arc<Self>, stream: TcpStream, connections: &mut JoinSet<()>) {
        let place = Arc::clone(&self.host.connections).try_acquire_owned();
        let most = self.host.limits.connections;
        match place {
            Ok(place) if connections.len() < most => {
                let proxy = Arc::clone(self);
                connections.spawn(async move {
                    connection::serve(&proxy, stream).await;
                    drop(place);
                });
            }
            Ok(_) | Err(_) => {
                let refusal = Refusal::too_many_connections(most);
                self.deny("", &refusal);
                // Nothing was sent on it yet, so that this does not wait; who cannot take it finds it closed.
                let _ = stream.try_write(&refusal.to_bytes(false));
            }
        }
    }

    /// Counts a refusal and tells of it, within the rate.
    fn deny(&self, host: &str, refusal: &Refusal) {
        self.figures.denied();
        let Some(more) = self.told.tell() else { return };
        let Refusal { status: _, reason, message, hint, hint_for_plugin: _ } = refusal.clone();
        let event =
            BrokerEvent::EgressDenied { host: host.chars().take(300).collect(), denial: reason, message, more, hint };
        self.events.publish(self.subject.clone(), event);
    }
}
