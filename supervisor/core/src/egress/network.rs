//! A network of addresses, as an operator writes it.

use std::{fmt, net::IpAddr, str::FromStr};

/// An address, or all addresses that begin with the same bits: `10.1.0.0/16`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

/// Why a text is no network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkError {
    /// It is not an address, or an address, a slash and a number of bits.
    Malformed,
    /// The address has bits behind the prefix; the network that was meant may be this one.
    BitsBehind(Network),
}

impl fmt::Display for NetworkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed => f.write_str("is neither an address nor a network such as 10.1.0.0/16"),
            Self::BitsBehind(meant) => write!(f, "has bits behind its prefix; the network is {meant}"),
        }
    }
}

impl std::error::Error for NetworkError {}

impl Network {
    /// Whether the address is in it. IPv4 and IPv6 are apart: `::ffff:10.0.0.1` is in no network of IPv4.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(own), IpAddr::V4(other)) => {
                masked(own.to_bits().into(), self.prefix, 32) == masked(other.to_bits().into(), self.prefix, 32)
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => {
                masked(own.to_bits(), self.prefix, 128) == masked(other.to_bits(), self.prefix, 128)
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }
}

/// The first bits of an address of this width.
const fn masked(bits: u128, prefix: u8, width: u8) -> u128 {
    let behind = width.saturating_sub(prefix);
    match bits.checked_shr(behind as u32) {
        Some(front) => front << behind,
        None => 0,
    }
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| NetworkError::Malformed)?;
        let width = if address.is_ipv4() { 32 } else { 128 };
        let prefix = match prefix {
            None => width,
            Some(text) => match text.parse() {
                Ok(prefix) if prefix <= width && text.bytes().all(|byte| byte.is_ascii_digit()) => prefix,
                _ => return Err(NetworkError::Malformed),
            },
        };
        let front = match address {
            IpAddr::V4(address) => {
                let front = masked(address.to_bits().into(), prefix, 32);
                IpAddr::V4(u32::try_from(front).unwrap_or_default().into())
            }
            IpAddr::V6(address) => IpAddr::V6(masked(address.to_bits(), prefix, 128).into()),
        };
        if front != address {
            return Err(NetworkError::BitsBehind(Self { address: front, prefix }));
        }
        Ok(Self { address, prefix })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = if self.address.is_ipv4() { 32 } else { 128 };
        if self.prefix == width { self.address.fmt(f) } else { write!(f, "{}/{}", self.address, self.prefix) }
    }
}

#[cfg(test)]
mod tests {
    use super::{Network, NetworkError};

    #[test]
    fn networks_hold_what_begins_like_them() {
        let network = |text: &str| text.parse::<Network>().unwrap_or_else(|error| panic!("{text} {error}"));
        let table = [
            ("10.1.0.0/16", "10.1.255.255", true),
            ("10.1.0.0/16", "10.2.0.0", false),
            ("10.1.0.0/16", "::ffff:10.1.0.1", false),
            ("127.0.0.1", "127.0.0.1", true),
            ("127.0.0.1", "127.0.0.2", false),
            ("0.0.0.0/0", "203.0.113.1", true),
            ("::/0", "fe80::1", true),
            ("fd00::/8", "fdff::1", true),
            ("fd00::/8", "fc00::1", false),
        ];
        for (text, address, inside) in table {
            assert_eq!(network(text).contains(address.parse().expect("an address")), inside, "{text} {address}");
            assert_eq!(network(text).to_string(), text);
        }
        for text in ["", "10.0.0", "10.0.0.0/33", "10.0.0.0/+8", "localhost", "::/129", "10.0.0.0/"] {
            assert_eq!(text.parse::<Network>(), Err(NetworkError::Malformed), "{text}");
        }
        assert_eq!("10.1.2.3/16".parse::<Network>(), Err(NetworkError::BitsBehind(network("10.1.0.0/16"))));
    }
}
