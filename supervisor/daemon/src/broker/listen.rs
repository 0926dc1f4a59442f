//! Callers' listeners: who may connect, and how many.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    rc::Rc,
    time::Duration,
};

use plugvisor_core::route::PluginCaller;
use rustix::{
    io::Errno,
    net::{SocketFlags, UCred, accept_with, sockopt},
};

use super::{
    caller::Caller,
    config::ConnectionLimits,
    event::BrokerEvent,
    exchange::Exchange,
    handle::{AddError, CallerSpec, LocalSpec},
    identity::PluginIdentity,
    peer::{Gone, Side},
    poll::Token,
    shared::Shared,
    timer::Alarm,
};

/// The pause after an accept that failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Connections that are accepted before anything else has its turn.
const AT_ONCE: usize = 16;

/// Who may connect to a listener, and who they are then.
#[derive(Debug)]
enum Door {
    /// One plugin generation.
    Plugin { plugin: PluginCaller, uid: Option<u32> },
    /// Local applications of these users.
    Local { uids: Vec<u32> },
}

#[derive(Debug)]
pub(super) struct Listener {
    socket: OwnedFd,
    door: Door,
    limits: Rc<ConnectionLimits>,
    connections: usize,
}

impl Door {
    fn caller(&self, peer: UCred, shared: &Shared) -> Result<Caller, String> {
        let user = peer.uid.as_raw();
        match self {
            Self::Plugin { plugin, uid } => match uid {
                Some(uid) if *uid != user => Err(format!("its user is {user}, and not {uid}")),
                Some(_) | None => Ok(Caller::plugin(plugin.clone(), shared)),
            },
            Self::Local { uids } => {
                if user != 0 && !uids.contains(&user) {
                    return Err(format!("its user {user} may not call; root and {uids:?} may"));
                }
                let pid = u32::try_from(peer.pid.as_raw_nonzero().get()).unwrap_or_default();
                Ok(Caller::local(user, pid, shared))
            }
        }
    }

    fn name(&self) -> String {
        match self {
            Self::Plugin { plugin, .. } => format!("plugin {}", plugin.name),
            Self::Local { .. } => "a local application".into(),
        }
    }

    fn is_of(&self, identity: &PluginIdentity) -> bool {
        match self {
            Self::Plugin { plugin, .. } => plugin.name == identity.name && plugin.generation == identity.generation,
            Self::Local { .. } => false,
        }
    }
}

impl Exchange {
    pub(super) fn add_caller(&mut self, spec: CallerSpec) -> Result<(), AddError> {
        let CallerSpec { caller, listener, uid } = spec;
        self.remove_caller(&PluginIdentity { name: caller.name.clone(), generation: caller.generation });
        let limits = self.shared.config.plugin_connections.clone();
        self.add_listener(listener, Door::Plugin { plugin: caller, uid }, limits).map_err(AddError::Listener)
    }

    pub(super) fn add_local(&mut self, spec: LocalSpec) -> Result<(), AddError> {
        let LocalSpec { listener, allowed_uids } = spec;
        let limits = self.shared.config.local_connections.clone();
        self.add_listener(listener, Door::Local { uids: allowed_uids }, limits).map_err(AddError::Listener)
    }

    fn add_listener(&mut self, socket: OwnedFd, door: Door, limits: ConnectionLimits) -> io::Result<()> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        if !sockopt::socket_acceptconn(&socket)? {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the socket does not listen"));
        }
        let entry = self.listeners.vacant_entry();
        self.poll.add(socket.as_fd(), Token::Listener(entry.key()))?;
        entry.insert(Listener { socket, door, limits: Rc::new(limits), connections: 0 });
        Ok(())
    }

    /// Closes a plugin generation's listener and connections.
    pub(super) fn remove_caller(&mut self, identity: &PluginIdentity) {
        let found = self.listeners.iter().find(|(_, listener)| listener.door.is_of(identity)).map(|(place, _)| place);
        let Some(place) = found else { return };
        let peers: Vec<usize> = self
            .peers
            .iter()
            .filter(|(_, peer)| matches!(peer.side, Side::Caller { listener, .. } if listener == place))
            .map(|(place, _)| place)
            .collect();
        for peer in peers {
            self.peer_gone(peer, &Gone::Closed);
        }
        self.listeners.remove(place);
    }

    /// Notes that a connection of a listener has ended.
    pub(super) fn left_listener(&mut self, place: usize) {
        if let Some(listener) = self.listeners.get_mut(place) {
            listener.connections -= 1;
        }
    }

    pub(super) fn accept(&mut self, place: usize) {
        for _ in 0..AT_ONCE {
            let Some(listener) = self.listeners.get_mut(place) else { return };
            let socket = match accept_with(&listener.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => socket,
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection from {}", listener.door.name());
                    let looked = self.poll.change(listener.socket.as_fd(), Token::Listener(place), false, false);
                    if looked.is_ok() {
                        self.timers.at(self.now + ACCEPT_PAUSE, Alarm::Accept(place));
                    }
                    return;
                }
            };
            let name = listener.door.name();
            let admitted = sockopt::socket_peercred(&socket)
                .map_err(|error| format!("its credentials cannot be read: {error}"))
                .and_then(|peer| listener.door.caller(peer, &self.shared));
            match admitted {
                Err(detail) => self.reject(name, detail),
                Ok(_) if listener.connections >= listener.limits.max_connections => {
                    let detail = format!("it has {} connections, its limit", listener.limits.max_connections);
                    self.reject(name, detail);
                }
                Ok(caller) => {
                    listener.connections += 1;
                    let limits = Rc::clone(&listener.limits);
                    let http = Self::caller_http(&limits, self.now);
                    let check = self.now + limits.handshake_timeout;
                    let side = Side::Caller { caller: Rc::new(caller), listener: place, limits };
                    match self.add_peer(socket, http, side, check) {
                        Ok(peer) => {
                            self.mark(peer);
                            if self.shared.is_stopping() {
                                self.announce_farewell(peer);
                            }
                        }
                        Err(error) => tracing::warn!(%error, "cannot look at a connection from {name}"),
                    }
                }
            }
        }
    }

    pub(super) fn accept_again(&mut self, place: usize) {
        let Some(listener) = self.listeners.get(place) else { return };
        if let Err(error) = self.poll.change(listener.socket.as_fd(), Token::Listener(place), true, false) {
            tracing::error!(%error, "cannot look at a listener again");
        }
    }

    /// Tells of a caller that was turned away.
    pub(super) fn reject(&self, caller: String, detail: String) {
        self.shared.tell_once(&caller.clone(), BrokerEvent::CallerRejected { caller, detail });
    }
}
