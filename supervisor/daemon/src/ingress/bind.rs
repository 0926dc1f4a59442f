//! The outer addresses: taken over where the launcher holds them, bound otherwise, and held by it while they are configured, so
//! that who connects while no supervisor is there waits instead of being refused.

use std::{
    collections::BTreeMap,
    io,
    net::{SocketAddr, TcpListener as StdListener},
    sync::{Arc, Mutex},
};

use plugvisor_package::{Digest, PluginName};

use super::{Door, Front, Ingress};
use crate::{
    config::{ListenConfig, PluginConfig},
    events::Events,
    launcher::Launcher,
    listeners::{self, Holding},
};

/// What the names begin with that outer addresses are held under.
const PREFIX: &str = "tcp-";

/// Why an address cannot be had.
#[derive(Debug, thiserror::Error)]
#[error(
    "plugin {plugin} cannot be reached at {address}: {source}; {}, then start plugvisord again",
    fix(source, address)
)]
pub struct IngressError {
    plugin: PluginName,
    address: SocketAddr,
    source: io::Error,
}

fn fix(error: &io::Error, address: &SocketAddr) -> String {
    let key = "the address in its network.listen";
    match error.kind() {
        io::ErrorKind::AddrInUse => format!("end what listens there, or change {key}"),
        io::ErrorKind::AddrNotAvailable => format!("{} is none of this host's: change {key}", address.ip()),
        io::ErrorKind::PermissionDenied if address.port() < 1024 => {
            format!("ports below 1024 are for programs with privileges, which plugvisord has none of: change {key}")
        }
        _ => format!("change {key}"),
    }
}

/// Whether an address could be had now, by a program without privileges: why not, and what to do.
pub(crate) fn try_address(address: SocketAddr) -> Result<(), (String, String)> {
    let tried = if (1..1024).contains(&address.port()) && rustix::process::geteuid().is_root() {
        Err(io::ErrorKind::PermissionDenied.into())
    } else {
        StdListener::bind(address).map(drop)
    };
    tried.map_err(|error: io::Error| (error.to_string(), fix(&error, &address)))
}

impl Ingress {
    /// Every configured address. `held` are the names of all sockets that the launcher holds.
    ///
    /// # Errors
    ///
    /// The first address that cannot be had.
    pub async fn bind(
        launcher: &Launcher,
        plugins: &BTreeMap<PluginName, PluginConfig>,
        held: &[String],
        holding: Holding,
        events: &Arc<Events>,
    ) -> Result<Self, IngressError> {
        let wanted: Vec<String> = plugins
            .iter()
            .flat_map(|(plugin, config)| config.network.listen.iter().map(|listen| name(plugin, listen)))
            .collect();
        // One that nobody wants may be in the way of one that is wanted.
        for gone in held.iter().filter(|held| held.starts_with(PREFIX) && !wanted.contains(held)) {
            if let Some(listener) = listeners::held(launcher, gone, holding).await {
                // The launcher closes its copy later; the address must be free now.
                let _ = rustix::net::shutdown(&listener, rustix::net::Shutdown::Both);
            }
            listeners::let_go(launcher, gone).await;
        }
        let mut fronts = BTreeMap::new();
        for (plugin, config) in plugins {
            let mut doors = Vec::new();
            for listen in &config.network.listen {
                let door = door(launcher, plugin, *listen, holding).await;
                let failed = |source| IngressError { plugin: plugin.clone(), address: listen.address, source };
                doors.push(door.map_err(failed)?);
            }
            if !doors.is_empty() {
                let front = Front::new(plugin.clone(), doors, Arc::clone(events));
                fronts.insert(plugin.clone(), Arc::new(front));
            }
        }
        Ok(Self { fronts })
    }
}

async fn door(launcher: &Launcher, plugin: &PluginName, listen: ListenConfig, holding: Holding) -> io::Result<Door> {
    let name = name(plugin, &listen);
    let fits = |listener: &StdListener| {
        let wanted = listen.address;
        listener.local_addr().is_ok_and(|has| has.ip() == wanted.ip() && [0, has.port()].contains(&wanted.port()))
    };
    let taken = listeners::held(launcher, &name, holding).await.and_then(listeners::tcp).filter(fits);
    let listener = match taken {
        Some(listener) => listener,
        None => {
            let listener = StdListener::bind(listen.address)?;
            listener.set_nonblocking(true)?;
            listener
        }
    };
    if holding == Holding::Held {
        listeners::hold(launcher, &name, listener.try_clone().map(Into::into)).await;
    }
    let address = listener.local_addr()?;
    Ok(Door { listen, address, listener: Mutex::new(Some(listener)) })
}

/// What an address is held as. Texts of addresses have characters that names may not have.
fn name(plugin: &PluginName, listen: &ListenConfig) -> String {
    let whole = Digest::of(format!("{plugin} {} {}", listen.address, listen.port).as_bytes());
    let digest: String = whole.to_string().chars().filter(char::is_ascii_hexdigit).take(32).collect();
    format!("{PREFIX}{digest}")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use plugvisor_sandbox::protocol::MAX_HELD_NAME;

    use super::*;

    #[test]
    fn names_are_of_plugin_address_and_port_and_may_be_held() {
        let of = |plugin: &str, address: &str, port| {
            let listen = ListenConfig {
                address: address.parse().expect("an address"),
                port,
                max_connections: 1,
                connect_timeout: Duration::ZERO,
                idle_timeout: Duration::ZERO,
            };
            name(&plugin.parse().expect("a name"), &listen)
        };
        let names = [
            of("a", "0.0.0.0:80", 8080),
            of("b", "0.0.0.0:80", 8080),
            of("a", "[::]:80", 8080),
            of("a", "0.0.0.0:80", 8081),
        ];
        for (index, name) in names.iter().enumerate() {
            let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
            assert!(name.len() <= MAX_HELD_NAME && name.bytes().all(plain), "{name}");
            assert!(!names[..index].contains(name), "{name}");
        }
    }
}
