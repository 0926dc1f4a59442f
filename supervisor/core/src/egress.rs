//! What a plugin may reach outside of its walls, and how fast: the rules of the egress proxy.
//!
//! Owns the judgement of a destination, of an address that its name resolved to, of how a request's body is framed, and the
//! bucket that holds a bandwidth. It knows no socket, no resolver and no HTTP parser: texts, addresses and times come in as
//! values. The proxy that asks it is the daemon's.
//!
//! ```text
//! request ──▶ head (line by line) ──▶ destination listed? ──▶ resolved by the daemon ──▶ each address judged ──▶ connected
//! ```

mod address;
mod bandwidth;
mod framing;
mod head;
mod network;
mod target;

use plugvisor_package::{Destination, Host};

pub use self::{
    address::{AddressKind, AddressRules},
    bandwidth::{Bandwidth, Origin},
    framing::{Framing, FramingError, chunk_size, is_hop_by_hop},
    head::{HeadError, HeadLimits, head_end},
    network::{Network, NetworkError},
    target::{Target, TargetError, absolute_form},
};

/// Which destinations a plugin may name: those of its manifest, and of the operator's list when there is one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowList {
    asked: Vec<Destination>,
    operator: Option<Vec<Destination>>,
}

/// Why a destination is not allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotListed {
    /// The manifest does not list it.
    ByManifest,
    /// The manifest lists it and the operator does not.
    ByOperator,
}

impl AllowList {
    /// What is in both lists; without an operator's one, in the manifest's.
    #[must_use]
    pub const fn new(asked: Vec<Destination>, operator: Option<Vec<Destination>>) -> Self {
        Self { asked, operator }
    }

    /// Whether a destination may be reached.
    ///
    /// # Errors
    ///
    /// When a list lacks it. The host is compared as it was named: a listed name does not list the addresses that it has.
    pub fn judge(&self, host: &Host, port: u16) -> Result<(), NotListed> {
        let lists = |list: &[Destination]| list.iter().any(|one| one.port == port && one.host.means(host));
        if !lists(&self.asked) {
            return Err(NotListed::ByManifest);
        }
        match &self.operator {
            Some(operator) if !lists(operator) => Err(NotListed::ByOperator),
            Some(_) | None => Ok(()),
        }
    }

    /// Whether it lists this host at any port: its name may be resolved.
    #[must_use]
    pub fn names(&self, host: &Host) -> bool {
        let lists = |list: &[Destination]| list.iter().any(|one| one.host.means(host));
        lists(&self.asked) && self.operator.as_ref().is_none_or(|operator| lists(operator))
    }
}

#[cfg(test)]
mod tests {
    use super::{AllowList, NotListed};

    fn list(texts: &[&str]) -> Vec<plugvisor_package::Destination> {
        texts.iter().map(|text| text.parse().expect("a destination")).collect()
    }

    #[test]
    fn both_lists_must_have_it_with_its_port() {
        let asked = list(&["api.example.com:443", "*.cdn.example:443", "10.0.0.1:80"]);
        let manifest = AllowList::new(asked.clone(), None);
        let both = AllowList::new(asked, Some(list(&["*.example.com:443", "a.cdn.example:443"])));
        let nothing = AllowList::default();
        let table = [
            ("api.example.com", 443, Ok(()), Ok(())),
            ("API.Example.Com.", 443, Ok(()), Ok(())),
            ("api.example.com", 80, Err(NotListed::ByManifest), Err(NotListed::ByManifest)),
            ("www.example.com", 443, Err(NotListed::ByManifest), Err(NotListed::ByManifest)),
            ("a.cdn.example", 443, Ok(()), Ok(())),
            ("b.cdn.example", 443, Ok(()), Err(NotListed::ByOperator)),
            ("cdn.example", 443, Err(NotListed::ByManifest), Err(NotListed::ByManifest)),
            ("10.0.0.1", 80, Ok(()), Err(NotListed::ByOperator)),
            ("[::ffff:10.0.0.1]", 80, Err(NotListed::ByManifest), Err(NotListed::ByManifest)),
        ];
        for (host, port, alone, with_operator) in table {
            let host = host.parse().expect("a host");
            assert_eq!(manifest.judge(&host, port), alone, "{host}:{port}");
            assert_eq!(both.judge(&host, port), with_operator, "{host}:{port}");
            assert_eq!(nothing.judge(&host, port), Err(NotListed::ByManifest));
        }
        assert!(manifest.names(&"api.example.com".parse().expect("a host")));
        assert!(!both.names(&"b.cdn.example".parse().expect("a host")));
    }
}
