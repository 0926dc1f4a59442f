//! Connecting to addresses that were judged: one after the other, each beside those before when they are slow (RFC 8305).

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use plugvisor_core::egress::AddressKind;
use plugvisor_package::Host;
use tokio::{
    net::TcpStream,
    time::{sleep, timeout},
};

use super::{Proxy, own::interfaces, refusal::Refusal};

impl Proxy {
    /// Connects to a destination that is listed.
    pub(super) async fn dial(&self, host: &Host, port: u16) -> Result<TcpStream, Refusal> {
        let addresses = self.addresses(host).await?;
        let limits = &self.host.limits;
        let addresses = interleaved(&addresses).into_iter().take(limits.attempts);
        let connected = timeout(limits.connect_time, self.race(addresses, port)).await;
        let stream = match connected {
            Err(_late) => return Err(Refusal::connect_late(host, port, limits.connect_time)),
            Ok(Err(error)) => return Err(Refusal::connect(host, port, &error.to_string())),
            Ok(Ok(stream)) => stream,
        };
        self.not_own(host, &stream)?;
        let _ = stream.set_nodelay(true);
        Ok(stream)
    }

    /// Refuses a connection to the host itself, whatever the list of its addresses said a moment ago: one to an address
    /// that is routed to it (`ip route add local`) has one address at both ends, and one to a second address of an interface
    /// may have the first as its near end.
    fn not_own(&self, host: &Host, stream: &TcpStream) -> Result<(), Refusal> {
        let ends = stream.local_addr().and_then(|near| Ok((near.ip(), stream.peer_addr()?.ip())));
        let (near, far) = ends.map_err(|error| Refusal::lookup(host, &format!("the connection's ends: {error}")))?;
        if self.rules.addresses.lists(far) {
            return Ok(());
        }
        let own = interfaces().map_err(|error| Refusal::lookup(host, &format!("the host's addresses: {error}")))?;
        if near == far || own.contains(&far) {
            return Err(Refusal::address(host, far, AddressKind::Own, self.plugin()));
        }
        Ok(())
    }

    async fn race(&self, addresses: impl Iterator<Item = IpAddr>, port: u16) -> io::Result<TcpStream> {
        let mut addresses = addresses.map(|address| TcpStream::connect(SocketAddr::new(address, port)));
        let mut attempts = FuturesUnordered::new();
        attempts.extend(addresses.next());
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        let mut left = true;
        loop {
            // Both are cancel-safe: an attempt that is not ready stays where it is.
            tokio::select! {
                attempted = attempts.next() => match attempted {
                    Some(Ok(stream)) => return Ok(stream),
                    Some(Err(error)) => {
                        last = error;
                        attempts.extend(addresses.next());
                    }
                    None => return Err(last),
                },
                () = sleep(self.host.limits.stagger), if left => match addresses.next() {
                    Some(next) => attempts.push(next),
                    None => left = false,
                },
            }
        }
    }
}

/// The families in turn, beginning with the resolver's first, so that one that leads nowhere costs one attempt.
fn interleaved(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let Some(first) = addresses.first() else { return Vec::new() };
    let (one, other): (Vec<IpAddr>, Vec<IpAddr>) =
        addresses.iter().partition(|address| address.is_ipv4() == first.is_ipv4());
    let longest = one.len().max(other.len());
    let at = |index: usize| one.get(index).into_iter().chain(other.get(index)).copied();
    (0..longest).flat_map(at).collect()
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::interleaved;

    #[test]
    fn families_take_turns() {
        let addresses =
            |texts: &[&str]| texts.iter().map(|text| text.parse().expect("an address")).collect::<Vec<IpAddr>>();
        let found = interleaved(&addresses(&["::1", "::2", "::3", "1.1.1.1", "2.2.2.2"]));
        assert_eq!(found, addresses(&["::1", "1.1.1.1", "::2", "2.2.2.2", "::3"]));
        assert_eq!(interleaved(&[]), addresses(&[]));
    }
}
