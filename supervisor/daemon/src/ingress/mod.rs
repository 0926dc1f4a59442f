//! The way in: whoever connects to an outer address of a plugin's is connected to the plugin, in its network namespace.
//!
//! ```text
//!   client ──▶ 0.0.0.0:8443, the supervisor's ──▶ Front ──▶ 127.0.0.1:8080 in the namespace ──▶ plugin
//!              (operator's configuration)         one per plugin   (sockets from the launcher, made inside)
//! ```
//!
//! The plugin listens inside its own namespace and has no descriptor of anything outside: what connects to it was made inside
//! before it was walled in, one socket for each connection that it may have, used again and again. The outer sockets belong to
//! the plugin's name and stay while generations of it come and go; who connects meanwhile waits, for a bounded time.
//!
//! No byte is looked at. What is counted, held to the bandwidth and told is as in the egress proxy.

mod bind;
mod connection;
mod figures;
mod inner;
mod pool;
mod takeover;

use std::{
    collections::BTreeMap,
    io,
    net::{SocketAddr, TcpListener as StdListener, TcpStream as StdStream},
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
};

use plugvisor_core::{Generation, event::BrokerEvent};
use plugvisor_package::PluginName;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
    time::sleep,
};
use tokio_util::sync::CancellationToken;

pub(crate) use self::bind::try_address;
pub use self::{
    bind::IngressError,
    figures::{Figures, Outcome},
    pool::Sockets,
};
use self::{
    connection::Failure,
    pool::{Lease, Pool},
    takeover::{Taken, take_all},
};
use crate::{
    config::{ListenConfig, defaults},
    events::{Events, Subject},
    listeners,
    meter::Meter,
    told::Told,
};

/// The fronts of all plugins that have one.
#[derive(Debug, Default)]
pub struct Ingress {
    fronts: BTreeMap<PluginName, Arc<Front>>,
}

impl Ingress {
    /// That of one plugin.
    #[must_use]
    pub fn front(&self, plugin: &PluginName) -> Option<Arc<Front>> {
        self.fronts.get(plugin).cloned()
    }

    /// Accepts at every address until it is dropped; every connection ends with it.
    pub async fn serve(self: Arc<Self>) {
        let mut doors = JoinSet::new();
        for front in self.fronts.values() {
            for door in &front.doors {
                let listener = door.listener.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some(listener) = listener {
                    doors.spawn(Arc::clone(front).accept(door.listen, listener));
                }
            }
        }
        while doors.join_next().await.is_some() {}
    }
}

/// What others see of one plugin: its outer addresses, whichever generation is behind them.
#[derive(Debug)]
pub struct Front {
    plugin: PluginName,
    doors: Vec<Door>,
    behind: watch::Sender<Behind>,
    figures: Arc<Figures>,
    events: Arc<Events>,
    /// Of connections that were not carried.
    failures: Told,
    /// Of sockets that cannot be used again.
    losses: Told,
}

/// One outer address.
#[derive(Debug)]
struct Door {
    listen: ListenConfig,
    /// With its real port.
    address: SocketAddr,
    /// Until it is served.
    listener: Mutex<Option<StdListener>>,
}

/// Who is behind a front.
#[derive(Debug)]
struct Behind {
    current: Option<Arc<Current>>,
    ready: bool,
}

/// A generation that runs.
#[derive(Debug)]
struct Current {
    generation: Generation,
    pool: Arc<Pool<StdStream>>,
    meter: Option<Arc<Meter>>,
    over: CancellationToken,
}

impl Front {
    fn new(plugin: PluginName, doors: Vec<Door>, events: Arc<Events>) -> Self {
        let (behind, _) = watch::channel(Behind { current: None, ready: false });
        let (failures, losses) = (Told::new(), Told::new());
        Self { plugin, doors, behind, figures: Arc::default(), events, failures, losses }
    }

    /// The sockets into the generation that runs, when one does.
    #[must_use]
    pub fn sockets_of_current(&self) -> Option<Sockets> {
        self.behind.borrow().current.as_ref().map(|current| current.pool.sockets())
    }

    /// How many sockets into the plugin it needs.
    #[must_use]
    pub fn sockets(&self) -> u16 {
        // Their sum is bounded by the configuration.
        self.doors.iter().fold(0, |all, door| all.saturating_add(door.listen.max_connections))
    }

    /// Its addresses, with their real ports, and what is configured of each.
    pub fn addresses(&self) -> impl Iterator<Item = (SocketAddr, ListenConfig)> {
        self.doors.iter().map(|door| (door.address, door.listen))
    }

    /// What passed.
    #[must_use]
    pub fn figures(&self) -> Arc<Figures> {
        Arc::clone(&self.figures)
    }

    /// Connects to a generation by these sockets, while it is ready and until this is dropped. Connections under way have a moment to
    /// pass on what the plugin said last.
    pub async fn stand_before(
        self: Arc<Self>,
        generation: Generation,
        sockets: Vec<OwnedFd>,
        meter: Option<Arc<Meter>>,
    ) {
        let all = sockets.len();
        let Taken { fit, why } = take_all(sockets, defaults::INGRESS_TAKE_TIME, inner::take).await;
        let pool = Pool::new(fit, all, self.figures.lost());
        let current = Arc::new(Current { generation, pool, meter, over: CancellationToken::new() });
        self.behind.send_modify(|behind| behind.current = Some(Arc::clone(&current)));
        if let Some(why) = why {
            self.tell_lost(&current, &why);
        }
        let _standing = Standing { front: self, current };
        std::future::pending::<()>().await;
    }

    /// Whether the generation that runs takes new connections.
    pub fn set_ready(&self, ready: bool) {
        self.behind.send_if_modified(|behind| std::mem::replace(&mut behind.ready, ready) != ready);
    }

    /// Waits for a generation that is ready. Cancel-safe.
    async fn current(&self) -> Arc<Current> {
        let mut behind = self.behind.subscribe();
        // An error means that there is no sender, which this front is itself.
        let ready = behind.wait_for(|behind| behind.ready && behind.current.is_some()).await;
        let current = ready.ok().and_then(|behind| behind.current.clone());
        match current {
            Some(current) => current,
            None => std::future::pending().await,
        }
    }

    async fn accept(self: Arc<Self>, listen: ListenConfig, listener: StdListener) {
        let listener = match TcpListener::from_std(listener) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!(plugin = %self.plugin, address = %listen.address, %error, "an address is not served");
                return;
            }
        };
        let places = Arc::new(Semaphore::new(listen.max_connections.into()));
        let mut connections = JoinSet::new();
        loop {
            // Both are cancel-safe.
            tokio::select! {
                accepted = next(&places, &listener) => match accepted {
                    Ok((place, stream, peer)) => {
                        let front = Arc::clone(&self);
                        connections.spawn(async move {
                            connection::serve(&front, &listen, stream, peer).await;
                            drop(place);
                        });
                    }
                    Err(error) => {
                        tracing::warn!(plugin = %self.plugin, address = %listen.address, %error, "cannot accept");
                        sleep(listeners::REST).await;
                    }
                },
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
            }
        }
    }

    /// Tells of a connection that was not carried, within the rate.
    fn tell(&self, listen: &ListenConfig, peer: SocketAddr, failure: &Failure) {
        let Some(more) = self.failures.tell() else { return };
        let subject = match &self.behind.borrow().current {
            Some(current) => Subject::Generation(self.plugin.clone(), current.generation),
            None => Subject::Plugin(self.plugin.to_string()),
        };
        let event = BrokerEvent::IngressFailed {
            peer: peer.to_string(),
            address: listen.address.to_string(),
            failure: failure.outcome.as_str(),
            message: format!("a connection to plugin {} was closed: {}", self.plugin, failure.why),
            more,
            hint: failure.hint.to_owned(),
        };
        self.events.publish(subject, event);
    }

    /// Gives up a socket that cannot be used again.
    fn lose(&self, current: &Current, lease: Lease<StdStream>, why: &io::Error) {
        drop(lease);
        self.tell_lost(current, &why.to_string());
    }

    /// Tells that sockets into a generation cannot be used again, and why the last one or the first of them cannot.
    fn tell_lost(&self, current: &Current, why: &str) {
        let Some(more) = self.losses.tell() else { return };
        let Sockets { all, lost } = current.pool.sockets();
        let event = BrokerEvent::IngressSocketsLost {
            lost,
            all,
            message: format!(
                "{lost} of the {all} sockets into plugin {} cannot be used again, and it may have so many connections less: {why}",
                self.plugin
            ),
            more,
            hint: format!("`plugvisor restart {}` gives it new ones", self.plugin),
        };
        self.events.publish(Subject::Generation(self.plugin.clone(), current.generation), event);
    }
}

/// The next connection, once there is a place for it: what is too much waits in the backlog. Cancel-safe.
async fn next(
    places: &Arc<Semaphore>,
    listener: &TcpListener,
) -> io::Result<(OwnedSemaphorePermit, TcpStream, SocketAddr)> {
    let place = Arc::clone(places).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, peer) = listener.accept().await?;
    Ok((place, stream, peer))
}

/// A generation behind a front, for as long as it is held.
struct Standing {
    front: Arc<Front>,
    current: Arc<Current>,
}

impl Drop for Standing {
    fn drop(&mut self) {
        self.front.behind.send_if_modified(|behind| {
            // The next generation may be there already.
            let mine = behind.current.as_ref().is_some_and(|current| Arc::ptr_eq(current, &self.current));
            if mine {
                behind.current = None;
            }
            mine
        });
        self.current.over.cancel();
    }
}
