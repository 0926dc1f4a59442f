//! From a name to addresses that may be connected to: the host's own resolver, once, on a thread of its own, in bounded
//! time and number.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};

use plugvisor_package::Host;
use tokio::time::timeout;

use super::{Proxy, refusal::Refusal};

impl Proxy {
    /// The addresses of a host that its rules let through, in the resolver's order. The host must be listed: names of others
    /// are not even looked up, because a question to a resolver carries the name out.
    pub(super) async fn addresses(&self, host: &Host) -> Result<Vec<IpAddr>, Refusal> {
        let found = match host {
            Host::Address(address) => vec![*address],
            Host::Name(_) => self.look_up(host).await?,
        };
        let own =
            self.host.own.now().map_err(|error| Refusal::lookup(host, &format!("the host's addresses: {error}")))?;
        let mut refused = None;
        let mut allowed = Vec::new();
        for address in found {
            match self.rules.addresses.judge(address, &own) {
                Ok(()) if allowed.contains(&address) => {}
                Ok(()) => allowed.push(address),
                Err(kind) => refused = refused.or(Some(Refusal::address(host, address, kind, self.plugin()))),
            }
        }
        if allowed.is_empty() {
            return Err(refused.unwrap_or_else(|| Refusal::lookup(host, "it has no address")));
        }
        Ok(allowed)
    }

    async fn look_up(&self, host: &Host) -> Result<Vec<IpAddr>, Refusal> {
        let limits = &self.host.limits;
        let late = || Refusal::lookup_late(host, limits.lookup_time);
        let name = host.to_string();
        let looked_up = self.lookups.run(move || (name.as_str(), 0).to_socket_addrs());
        let found = timeout(limits.lookup_time, looked_up).await.map_err(|_| late())?;
        let found = found.flatten().map_err(|error| Refusal::lookup(host, &error.to_string()))?;
        Ok(found.map(|address: SocketAddr| address.ip()).collect())
    }
}
