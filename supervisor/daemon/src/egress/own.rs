//! The addresses of this host.

use std::{
    io,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// For how long they are taken to be the same. An address that came meanwhile is caught when a connection is made: the
/// addresses are read once more then, see [`super::Proxy::dial`].
const FRESH: Duration = Duration::from_secs(5);

/// The addresses, read again from time to time.
#[derive(Debug, Default)]
pub(super) struct OwnAddresses {
    read: Mutex<Option<(Instant, Arc<[IpAddr]>)>>,
}

impl OwnAddresses {
    /// What the interfaces have. A question to the kernel, which waits for nothing.
    pub(super) fn now(&self) -> io::Result<Arc<[IpAddr]>> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        match &*read {
            Some((at, addresses)) if now.saturating_duration_since(*at) < FRESH => Ok(Arc::clone(addresses)),
            Some(_) | None => {
                let addresses: Arc<[IpAddr]> = interfaces()?.into();
                *read = Some((now, Arc::clone(&addresses)));
                Ok(addresses)
            }
        }
    }
}

/// What the interfaces have at this moment.
pub(super) fn interfaces() -> io::Result<Vec<IpAddr>> {
    let all = nix::ifaddrs::getifaddrs()?;
    let address = |storage: nix::sys::socket::SockaddrStorage| {
        let v4 = storage.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| storage.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    };
    Ok(all.filter_map(|interface| address(interface.address?)).collect())
}

#[cfg(test)]
mod tests {
    use super::OwnAddresses;

    #[tokio::test]
    async fn loopback_is_among_them() {
        let own = OwnAddresses::default().now().expect("the interfaces");
        assert!(own.iter().any(std::net::IpAddr::is_loopback), "{own:?}");
    }
}
