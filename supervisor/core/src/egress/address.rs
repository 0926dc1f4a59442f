//! Whether a resolved address may be connected to.
//!
//! Everything that is not an ordinary public address is refused unless the operator lists it: what a name resolves to is in
//! the hands of whoever owns the name, who may point it at the host's own services or at those of its network (DNS
//! rebinding). The lists are those of the IANA special-purpose registries (RFC 6890 and its updates).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Network;

/// The operator's exceptions and the host's own addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressRules {
    /// What the operator lists.
    pub listed: Vec<Network>,
}

/// What an address is, when it is not simply somebody's on the internet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressKind {
    /// `0.0.0.0/8`, `::`: this host.
    Unspecified,
    /// `127.0.0.0/8`, `::1`.
    Loopback,
    /// One that the host itself has.
    Own,
    /// RFC 1918, `fc00::/7`, `fec0::/10`.
    Private,
    /// `169.254.0.0/16`, `fe80::/10`: neighbours, and the metadata services of clouds.
    LinkLocal,
    /// `100.64.0.0/10`: behind a carrier's address translation.
    CarrierNat,
    /// `224.0.0.0/4`, `ff00::/8`.
    Multicast,
    /// `255.255.255.255`.
    Broadcast,
    /// IPv4 in IPv6: mapped, compatible, translated.
    Embedded,
    /// `64:ff9b::/96`, `64:ff9b:1::/48`.
    Nat64,
    /// 6to4 and Teredo.
    Tunnel,
    /// For examples, measurements, protocols, or not handed out.
    Reserved,
}

impl AddressKind {
    /// In words, for a refusal.
    #[must_use]
    pub const fn describe(self) -> &'static str {
        match self {
            Self::Unspecified => "an unspecified address",
            Self::Loopback => "a loopback address",
            Self::Own => "an address of this host",
            Self::Private => "a private address",
            Self::LinkLocal => "a link-local address",
            Self::CarrierNat => "an address of a carrier's network (100.64.0.0/10)",
            Self::Multicast => "a multicast address",
            Self::Broadcast => "the broadcast address",
            Self::Embedded => "an IPv4 address inside an IPv6 one",
            Self::Nat64 => "a NAT64 address",
            Self::Tunnel => "an address of a 6to4 or Teredo tunnel",
            Self::Reserved => "a reserved address",
        }
    }
}

impl AddressRules {
    /// Whether an address may be connected to; `own` are the addresses of the host.
    ///
    /// # Errors
    ///
    /// What it is, when it is not public and not listed.
    pub fn judge(&self, address: IpAddr, own: &[IpAddr]) -> Result<(), AddressKind> {
        if self.lists(address) {
            return Ok(());
        }
        let kind = match address {
            IpAddr::V4(address) => v4(address),
            IpAddr::V6(address) => v6(address),
        };
        match kind {
            Some(kind) => Err(kind),
            None if own.contains(&address) => Err(AddressKind::Own),
            None => Ok(()),
        }
    }

    /// Whether the operator lists it.
    #[must_use]
    pub fn lists(&self, address: IpAddr) -> bool {
        self.listed.iter().any(|network| network.contains(address))
    }
}

const fn v4(address: Ipv4Addr) -> Option<AddressKind> {
    Some(match address.octets() {
        [0, ..] => AddressKind::Unspecified,
        [127, ..] => AddressKind::Loopback,
        [10, ..] | [172, 16..=31, ..] | [192, 168, ..] => AddressKind::Private,
        // The second is what Azure answers every virtual machine at (WireServer), in place of a link-local address.
        [169, 254, ..] | [168, 63, 129, 16] => AddressKind::LinkLocal,
        [100, 64..=127, ..] => AddressKind::CarrierNat,
        [224..=239, ..] => AddressKind::Multicast,
        [255, 255, 255, 255] => AddressKind::Broadcast,
        // The anycast address of 6to4 relays.
        [192, 88, 99, _] => AddressKind::Tunnel,
        // Protocol assignments, examples (three networks), measurements, and what is not handed out.
        [192, 0, 0 | 2, _] | [198, 51, 100, _] | [203, 0, 113, _] | [198, 18 | 19, ..] | [240..=255, ..] => {
            AddressKind::Reserved
        }
        _ => return None,
    })
}

const fn v6(address: Ipv6Addr) -> Option<AddressKind> {
    Some(match address.segments() {
        [0, 0, 0, 0, 0, 0, 0, 0] => AddressKind::Unspecified,
        [0, 0, 0, 0, 0, 0, 0, 1] => AddressKind::Loopback,
        // Compatible, mapped, translated (RFC 2765).
        [0, 0, 0, 0, 0, 0 | 0xffff, ..] | [0, 0, 0, 0, 0xffff, 0, ..] => AddressKind::Embedded,
        [0x64, 0xff9b, ..] => AddressKind::Nat64,
        [0xfe80..=0xfebf, ..] => AddressKind::LinkLocal,
        [0xfc00..=0xfdff | 0xfec0..=0xfeff, ..] => AddressKind::Private,
        [0xff00..=0xffff, ..] => AddressKind::Multicast,
        [0x2002, ..] | [0x2001, 0, ..] => AddressKind::Tunnel,
        // Protocol assignments (2001::/23), examples (two networks).
        [0x2001, 0..=0x1ff | 0xdb8, ..] | [0x3fff, 0..=0xfff, ..] => AddressKind::Reserved,
        // Everything else that is handed out to anybody.
        [0x2000..=0x3fff, ..] => return None,
        _ => AddressKind::Reserved,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn only_public_addresses_pass() {
        use AddressKind as K;
        let rules = AddressRules::default();
        let own = [address("198.200.1.2"), address("2a01::5")];
        let refused = [
            (K::Unspecified, &["0.0.0.0", "0.1.2.3", "::"][..]),
            (K::Loopback, &["127.0.0.1", "127.255.0.1", "::1"]),
            (K::Own, &["198.200.1.2", "2a01::5"]),
            (K::Private, &["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "fc00::1", "fdff::1", "fec0::1"]),
            (K::LinkLocal, &["169.254.169.254", "169.254.0.0", "168.63.129.16", "fe80::1", "febf::1"]),
            (K::CarrierNat, &["100.64.0.1", "100.127.255.255"]),
            (K::Multicast, &["224.0.0.1", "239.255.255.255", "ff02::1"]),
            (K::Broadcast, &["255.255.255.255"]),
            (K::Embedded, &["::ffff:8.8.8.8", "::ffff:127.0.0.1", "::8.8.8.8", "::7f00:1", "::ffff:0:127.0.0.1"]),
            (K::Nat64, &["64:ff9b::a00:1", "64:ff9b:1::1"]),
            (K::Tunnel, &["2002:7f00:1::", "2001:0:1::1", "192.88.99.1"]),
            (
                K::Reserved,
                &[
                    "192.0.2.1",
                    "198.51.100.1",
                    "203.0.113.9",
                    "198.18.0.1",
                    "198.19.255.255",
                    "192.0.0.1",
                    "240.0.0.1",
                    "255.255.255.254",
                    "2001:db8::1",
                    "2001:10::1",
                    "3fff::1",
                    "100::1",
                    "4000::1",
                    "5f00::1",
                ],
            ),
        ];
        for (kind, texts) in refused {
            for text in texts {
                assert_eq!(rules.judge(address(text), &own), Err(kind), "{text}");
                let listed = AddressRules { listed: vec![text.parse().expect("a network")] };
                assert_eq!(listed.judge(address(text), &own), Ok(()), "{text} is listed");
            }
        }
        for text in
            ["8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "198.20.0.1", "2606:4700::1", "2001:4860::8", "2a00::1"]
        {
            assert_eq!(rules.judge(address(text), &own), Ok(()), "{text}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever the standard library calls by such a name is refused, and so is every form of IPv6 that carries it.
        #[test]
        fn nothing_special_passes_in_any_form(bits: u32, high: u128) {
            let rules = AddressRules::default();
            let v4 = Ipv4Addr::from_bits(bits);
            let special = v4.is_loopback() || v4.is_private() || v4.is_link_local() || v4.is_multicast()
                || v4.is_broadcast() || v4.is_unspecified() || v4.is_documentation();
            prop_assert!(!special || rules.judge(v4.into(), &[]).is_err(), "{}", v4);
            prop_assert!(rules.judge(v4.to_ipv6_mapped().into(), &[]).is_err());
            prop_assert!(rules.judge(v4.to_ipv6_compatible().into(), &[]).is_err());
            let v6 = Ipv6Addr::from_bits(high);
            let outside = v6.segments()[0] & 0xe000 != 0x2000;
            prop_assert!(!outside || rules.judge(v6.into(), &[]).is_err(), "{}", v6);
            prop_assert!(rules.judge(v6.into(), &[v6.into()]).is_err(), "the host's own");
        }
    }
}
