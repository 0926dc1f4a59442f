//! Where a plugin may connect to: a host, or the names under one, and a port. What authors list in `runtime.network.egress`
//! and what a request of a plugin names are read by the same grammar, so that neither can mean something else to the other.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

/// A host name in lower case, without a final dot: labels of letters, digits, `-` and `_`, at most 253 bytes. Never a number:
/// what resolvers read as an IPv4 address in an old way of writing (`127.1`, `0x7f000001`) is no name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostName(String);

/// A host of a request.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Host {
    /// By its name.
    Name(HostName),
    /// By its address; IPv6 in brackets.
    Address(IpAddr),
}

/// Which hosts a destination means.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HostPattern {
    /// This one.
    One(Host),
    /// `*.example.com`: every name that ends in `.example.com`, with any number of labels before; not `example.com` itself.
    Under(HostName),
}

/// Where a plugin may connect to, `host:port`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Destination {
    /// The hosts.
    pub host: HostPattern,
    /// The port; not 0.
    pub port: u16,
}

/// Why a text is no host or no destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DestinationError {
    /// There is no port.
    #[error("has no port; a destination is written host:port")]
    NoPort,
    /// It does not fit the grammar.
    #[error("is not a destination: a host name or address, a colon and a port from 1 to 65535")]
    Malformed,
    /// A wildcard that stands for more than it may.
    #[error("has a wildcard that means too much; it stands before a name of at least two labels, as in *.example.com")]
    Wildcard,
}

impl HostName {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for HostName {
    type Err = DestinationError;

    fn from_str(text: &str) -> Result<Self, DestinationError> {
        let text = text.strip_suffix('.').unwrap_or(text);
        let label = |label: &str| {
            let letters = label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
            (1..=63).contains(&label.len()) && letters && !label.starts_with('-') && !label.ends_with('-')
        };
        if text.len() > 253 || !text.split('.').all(label) || ends_in_a_number(text) {
            return Err(DestinationError::Malformed);
        }
        Ok(Self(text.to_ascii_lowercase()))
    }
}

/// Whether resolvers would read the text as an address: its last label is a decimal, octal or hexadecimal number.
fn ends_in_a_number(text: &str) -> bool {
    let last = text.rsplit('.').next().unwrap_or_default();
    let hexadecimal = last.strip_prefix("0x").or_else(|| last.strip_prefix("0X"));
    match hexadecimal {
        Some(digits) => digits.bytes().all(|byte| byte.is_ascii_hexdigit()),
        None => last.bytes().all(|byte| byte.is_ascii_digit()),
    }
}

impl FromStr for Host {
    type Err = DestinationError;

    fn from_str(text: &str) -> Result<Self, DestinationError> {
        if let Some(address) = text.strip_prefix('[') {
            // No zone: `fe80::1%eth0` is not read by this.
            let address = address.strip_suffix(']').and_then(|address| address.parse::<Ipv6Addr>().ok());
            return address.map(|address| Self::Address(address.into())).ok_or(DestinationError::Malformed);
        }
        if let Ok(address) = text.parse::<Ipv4Addr>() {
            return Ok(Self::Address(address.into()));
        }
        text.parse().map(Self::Name)
    }
}

/// Splits `host:port` of a request.
///
/// # Errors
///
/// When the text is not exactly that.
pub fn host_and_port(text: &str) -> Result<(Host, u16), DestinationError> {
    let (host, port) = text.rsplit_once(':').ok_or(DestinationError::NoPort)?;
    Ok((host.parse()?, port_number(port)?))
}

fn port_number(text: &str) -> Result<u16, DestinationError> {
    let digits = (1..=5).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    match text.parse() {
        Ok(port @ 1..) if digits => Ok(port),
        _ => Err(DestinationError::Malformed),
    }
}

impl FromStr for Destination {
    type Err = DestinationError;

    fn from_str(text: &str) -> Result<Self, DestinationError> {
        let (host, port) = text.rsplit_once(':').ok_or(DestinationError::NoPort)?;
        let host = match host.strip_prefix("*.") {
            Some(name) => {
                let name: HostName = name.parse().map_err(|_| DestinationError::Wildcard)?;
                if !name.as_str().contains('.') {
                    return Err(DestinationError::Wildcard);
                }
                HostPattern::Under(name)
            }
            None if host.contains('*') => return Err(DestinationError::Wildcard),
            None => HostPattern::One(host.parse()?),
        };
        Ok(Self { host, port: port_number(port)? })
    }
}

impl HostPattern {
    /// Whether it means this host.
    #[must_use]
    pub fn means(&self, host: &Host) -> bool {
        match (self, host) {
            (Self::One(one), host) => one == host,
            (Self::Under(parent), Host::Name(name)) => {
                name.as_str().strip_suffix(parent.as_str()).is_some_and(|rest| rest.ends_with('.') && rest.len() > 1)
            }
            (Self::Under(_), Host::Address(_)) => false,
        }
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => name.fmt(f),
            Self::Address(IpAddr::V4(address)) => address.fmt(f),
            Self::Address(IpAddr::V6(address)) => write!(f, "[{address}]"),
        }
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(host) => host.fmt(f),
            Self::Under(name) => write!(f, "*.{name}"),
        }
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn destination(text: &str) -> Destination {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn names_are_read_alike_and_numbers_are_no_names() {
        for (text, shown) in [
            ("Example.COM:443", "example.com:443"),
            ("example.com.:443", "example.com:443"),
            ("a_b.example:1", "a_b.example:1"),
            ("xn--bcher-kva.example:80", "xn--bcher-kva.example:80"),
            ("10.0.0.1:80", "10.0.0.1:80"),
            ("[2001:DB8::1]:8443", "[2001:db8::1]:8443"),
            ("*.Example.com:443", "*.example.com:443"),
            ("localhost:8080", "localhost:8080"),
            ("1.example:80", "1.example:80"),
        ] {
            assert_eq!(destination(text).to_string(), shown);
        }
        for text in [
            "127.1:80",
            "2130706433:80",
            "0x7f000001:80",
            "0x7f.1:80",
            "0177.0.0.1:80",
            "1.2.3.4.5:80",
            "10.0.0.256:80",
            "a..b:1",
            ".a:1",
            "a.:0",
            "a:+1",
            "a:01234567",
            "a:",
            "[::1%lo]:80",
            "[127.0.0.1]:80",
            "::1:80",
            "a b:1",
            "user@host:1",
            "ex\u{e4}mple:1",
            "a..:1",
        ] {
            assert_eq!(text.parse::<Destination>(), Err(DestinationError::Malformed), "{text}");
        }
        for text in
            ["*:443", "*.com:443", "*.1.2.3.4:80", "a.*.com:1", "**.example.com:1", "*example.com:1", "*.*.com:1"]
        {
            assert_eq!(text.parse::<Destination>(), Err(DestinationError::Wildcard), "{text}");
        }
        assert_eq!("example.com".parse::<Destination>(), Err(DestinationError::NoPort));
    }

    #[test]
    fn a_wildcard_means_the_names_under_it_and_not_itself() {
        let pattern = destination("*.example.com:443").host;
        let means = |text: &str| pattern.means(&text.parse().expect("a host"));
        assert!(means("a.example.com") && means("A.B.example.com.") && means("_x.example.com"));
        assert!(
            !means("example.com") && !means("anexample.com") && !means("example.com.evil.test") && !means("10.0.0.1")
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_is_read_is_shown_so_that_it_is_read_alike(text in "[*a-zA-Z0-9._:\\[\\]-]{0,40}") {
            if let Ok(read) = text.parse::<Destination>() {
                prop_assert_eq!(read.to_string().parse::<Destination>(), Ok(read));
            }
        }

        #[test]
        fn no_name_is_an_address_to_a_resolver(text in "[0-9a-fxX.]{1,20}") {
            if let Ok(Host::Name(name)) = text.parse() {
                prop_assert!(!ends_in_a_number(name.as_str()));
            }
        }
    }
}
