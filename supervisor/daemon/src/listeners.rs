//! The listening sockets that applications and operators know: held by the launcher where it can outlive the supervisor,
//! so that who connects while none is there waits instead of being refused.

use std::{
    io,
    net::TcpListener,
    os::{fd::OwnedFd, unix::net::UnixListener},
    time::Duration,
};

use rustix::net::{AddressFamily, SocketType, sockopt};

use crate::{
    config::SupervisorConfig,
    launcher::Launcher,
    observe::{self, BindError},
    runtime_directory::{RuntimeDirectory, RuntimeDirectoryError},
};

/// The pause after an accept that failed for want of descriptors or memory: nothing tells when there are some again.
pub(crate) const REST: Duration = Duration::from_millis(100);

/// The three of them.
#[derive(Debug)]
pub struct Listeners {
    /// `admin.sock`.
    pub admin: UnixListener,
    /// `calls.sock`.
    pub calls: UnixListener,
    /// The metrics page.
    pub metrics: TcpListener,
}

/// Whether the launcher is to hold them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holding {
    /// It outlives the supervisor.
    Held,
    /// It ends with the supervisor.
    NotHeld,
}

/// Why they cannot be had.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub enum ListenError {
    /// A socket in the runtime directory.
    Runtime(#[from] RuntimeDirectoryError),
    /// The metrics address.
    Bind(#[from] BindError),
}

/// What each is held as.
const NAMES: [&str; 3] = ["admin", "calls", "metrics"];

/// Takes over what is held and still fits, binds the rest, and has it held. Must be called while the process has one
/// thread.
pub async fn listeners(
    launcher: &Launcher,
    directory: &mut RuntimeDirectory,
    config: &SupervisorConfig,
    holding: Holding,
) -> Result<Listeners, ListenError> {
    let [held_admin, held_calls, held_metrics] = [
        held(launcher, NAMES[0], holding).await,
        held(launcher, NAMES[1], holding).await,
        held(launcher, NAMES[2], holding).await,
    ];
    let admin = match held_admin.and_then(unix).and_then(|listener| directory.adopt("admin.sock", listener)) {
        Some(listener) => listener,
        None => directory.bind("admin.sock", None)?,
    };
    let calls = match held_calls.and_then(unix).and_then(|listener| directory.adopt("calls.sock", listener)) {
        Some(listener) => listener,
        None => directory.bind("calls.sock", None)?,
    };
    let fits = |listener: &TcpListener| {
        let wanted = config.metrics_address;
        listener.local_addr().is_ok_and(|has| has.ip() == wanted.ip() && [0, has.port()].contains(&wanted.port()))
    };
    let metrics = match held_metrics.and_then(tcp).filter(fits) {
        Some(listener) => listener,
        None => {
            if holding == Holding::Held {
                // It may be this very address, with other options.
                let_go(launcher, NAMES[2]).await;
            }
            observe::bind(config.metrics_address)?.0
        }
    };
    let listeners = Listeners { admin, calls, metrics };
    if holding == Holding::Held {
        let Listeners { admin, calls, metrics } = &listeners;
        let copies = [
            admin.try_clone().map(OwnedFd::from),
            calls.try_clone().map(OwnedFd::from),
            metrics.try_clone().map(OwnedFd::from),
        ];
        for (name, copy) in NAMES.into_iter().zip(copies) {
            hold(launcher, name, copy).await;
        }
    }
    Ok(listeners)
}

pub(crate) async fn held(launcher: &Launcher, name: &str, holding: Holding) -> Option<OwnedFd> {
    if holding == Holding::NotHeld {
        return None;
    }
    launcher.held(name).await.unwrap_or_else(|error| {
        tracing::warn!(name, %error, "a held socket was not handed over; a new one is made");
        None
    })
}

pub(crate) async fn hold(launcher: &Launcher, name: &str, copy: io::Result<OwnedFd>) {
    let held = match copy {
        Ok(copy) => launcher.hold(name, copy).await.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    if let Err(error) = held {
        // Service does not depend on it; only who connects during a gap is refused.
        tracing::warn!(name, %error, "the launcher does not hold a socket: nobody can wait there for a new supervisor");
    }
}

pub(crate) async fn let_go(launcher: &Launcher, name: &str) {
    if let Err(error) = launcher.let_go(name).await {
        tracing::debug!(name, %error, "a held socket was not let go");
    }
}

fn unix(socket: OwnedFd) -> Option<UnixListener> {
    is_listener(&socket, AddressFamily::UNIX).then(|| UnixListener::from(socket))
}

pub(crate) fn tcp(socket: OwnedFd) -> Option<TcpListener> {
    let inet = is_listener(&socket, AddressFamily::INET) || is_listener(&socket, AddressFamily::INET6);
    let listener = inet.then(|| TcpListener::from(socket))?;
    listener.set_nonblocking(true).ok().map(|()| listener)
}

fn is_listener(socket: &OwnedFd, family: AddressFamily) -> bool {
    sockopt::socket_domain(socket) == Ok(family)
        && sockopt::socket_type(socket) == Ok(SocketType::STREAM)
        && sockopt::socket_acceptconn(socket) == Ok(true)
}
