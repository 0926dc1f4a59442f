//! Where others reach plugins that serve TCP: each entry by itself, all of a plugin's together, and every address against
//! every other one that this supervisor listens at.

use std::{net::SocketAddr, ops::Range, time::Duration};

use plugvisor_package::Runtime;
use plugvisor_sandbox::{
    protocol::{MAX_HELD, MAX_INWARD},
    tables::{Problems, Section, join, section},
};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{ListenConfig, defaults, raw, validate::millis};

/// The most addresses of all plugins together: the launcher holds each across restarts, and the supervisor's own sockets.
const MOST: usize = MAX_HELD - 16;

/// An address that was written, and where.
#[derive(Debug)]
pub(super) struct Outer {
    address: SocketAddr,
    key: String,
    span: Range<usize>,
}

/// Takes `listen` out of a plugin's network table, whose entries are tables of their own, and reads it.
pub(super) fn taken_from(
    plugin: &mut DeTable<'_>,
    path: &str,
    outer: &mut Vec<Outer>,
    problems: &mut Problems<'_>,
) -> Vec<ListenConfig> {
    let path = join(path, "network");
    let Some(DeValue::Table(network)) = plugin.get_mut("network").map(Spanned::get_mut) else { return Vec::new() };
    let Some(value) = network.remove("listen") else { return Vec::new() };
    let (key, span) = (join(&path, "listen"), value.span());
    let DeValue::Array(entries) = value.into_inner() else {
        problems.add(&span, key.clone(), format!("must be written as [[{key}]], once for each address"));
        return Vec::new();
    };
    let entries = entries.into_iter().enumerate();
    let read = entries.filter_map(|(index, value)| entry(&format!("{key}[{index}]"), value, outer, problems));
    let found: Vec<ListenConfig> = read.collect();
    let all: u32 = found.iter().map(|listen| u32::from(listen.max_connections)).sum();
    if all > u32::from(MAX_INWARD) {
        let message =
            format!("max_connections of all its addresses are {all} together; at most {MAX_INWARD} can be had");
        problems.add(&span, key, message);
    }
    found
}

fn entry(
    path: &str,
    value: Spanned<DeValue<'_>>,
    outer: &mut Vec<Outer>,
    problems: &mut Problems<'_>,
) -> Option<ListenConfig> {
    let table: Section<raw::Listen> = section(path, value, problems);
    let raw::Listen { address, port, max_connections, connect_timeout_ms, idle_timeout_ms } = &table.value;
    let address = address_of(&table, address.as_deref(), problems);
    if let Some(address) = address {
        outer.push(Outer { address, key: table.key("address"), span: table.at("address").clone() });
    }
    let port = port_of(&table, *port, problems);
    let max_connections = max_connections.unwrap_or(defaults::INGRESS_CONNECTIONS);
    if !(1..=MAX_INWARD).contains(&max_connections) {
        let message = format!("{max_connections} is not between 1 and {MAX_INWARD}");
        problems.add(table.at("max_connections"), table.key("max_connections"), message);
    }
    let mut time = |key, value, default: Duration| millis(&table, key, value, problems).unwrap_or(default);
    let connect_timeout = time("connect_timeout_ms", *connect_timeout_ms, defaults::INGRESS_CONNECT_TIME);
    let idle_timeout = time("idle_timeout_ms", *idle_timeout_ms, defaults::INGRESS_IDLE);
    Some(ListenConfig { address: address?, port: port?, max_connections, connect_timeout, idle_timeout })
}

fn address_of(table: &Section<raw::Listen>, text: Option<&str>, problems: &mut Problems<'_>) -> Option<SocketAddr> {
    let why = match text.map(str::parse::<SocketAddr>) {
        Some(Ok(address)) if address.ip().is_multicast() => {
            format!("{address} is a multicast address; nobody listens there")
        }
        Some(Ok(address)) => return Some(address),
        Some(Err(_)) => {
            let text = text.unwrap_or_default();
            format!("{text:?} is not an address; write IP:PORT, such as \"0.0.0.0:8443\" or \"[::]:8443\"")
        }
        None if table.lacks("address") => "is required: where others connect, as IP:PORT".to_owned(),
        None => return None,
    };
    problems.add(table.at("address"), table.key("address"), why);
    None
}

fn port_of(table: &Section<raw::Listen>, port: Option<u16>, problems: &mut Problems<'_>) -> Option<u16> {
    let why = match port {
        Some(Runtime::PROXY_PORT) => {
            format!("{} is the egress proxy's in every plugin's network namespace", Runtime::PROXY_PORT)
        }
        Some(port @ 1024..) => return Some(port),
        Some(port) => format!("{port} is below 1024, where a plugin cannot listen"),
        None if !table.lacks("port") => return None,
        None => {
            "is required: the port at which the plugin listens, one of its manifest's runtime.network.listen".to_owned()
        }
    };
    problems.add(table.at("port"), table.key("port"), why);
    None
}

/// Tells of every address that another one takes. `own` is the supervisor's, with its key.
pub(super) fn conflicts(outer: &[Outer], own: (SocketAddr, &str), problems: &mut Problems<'_>) {
    if let Some(Outer { key, span, .. }) = outer.get(MOST) {
        let message =
            format!("there are {} addresses, and the launcher holds {MOST} at most; take some out", outer.len());
        problems.add(span, key.as_str(), message);
    }
    for (index, Outer { address, key, span }) in outer.iter().enumerate() {
        let others = outer[..index].iter().map(|other| (other.address, other.key.as_str()));
        if let Some((other, by)) = std::iter::once(own).chain(others).find(|(other, _)| collide(*address, *other)) {
            let message = format!("{address} cannot be had beside {other}, which {by} listens at; choose another port");
            problems.add(span, key.as_str(), message);
        }
    }
}

/// Whether one of two addresses takes the other: the same port, and the same address or one that means every address. An
/// address of IPv6 that means every address means those of IPv4 too.
fn collide(one: SocketAddr, other: SocketAddr) -> bool {
    let all =
        |address: SocketAddr, of: SocketAddr| address.ip().is_unspecified() && (address.is_ipv6() || of.is_ipv4());
    // Port 0 takes a free one.
    let ports = one.port() == other.port() && one.port() != 0;
    ports && (one.ip() == other.ip() || all(one, other) || all(other, one))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_means_every_address_takes_the_others_of_its_port() {
        let at = |text: &str| text.parse::<SocketAddr>().expect("an address");
        for (one, other, expected) in [
            ("127.0.0.1:80", "127.0.0.1:80", true),
            ("127.0.0.1:80", "127.0.0.1:81", false),
            ("127.0.0.1:80", "127.0.0.2:80", false),
            ("127.0.0.1:0", "127.0.0.1:0", false),
            ("0.0.0.0:80", "127.0.0.1:80", true),
            ("0.0.0.0:80", "[::1]:80", false),
            ("[::]:80", "127.0.0.1:80", true),
            ("[::]:80", "0.0.0.0:80", true),
            ("[::1]:80", "127.0.0.1:80", false),
        ] {
            assert_eq!(collide(at(one), at(other)), expected, "{one} {other}");
            assert_eq!(collide(at(other), at(one)), expected, "{other} {one}");
        }
    }
}
