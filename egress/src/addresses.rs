//! Which addresses the proxy connects to, after a name was resolved or when the guest's destination is passed on. It stands in the host's
//! network namespace, so what it may reach is what the host can: the host itself and its neighbours are refused here, not by a rule of the network.
//!
//! Only IPv4 exists: the proxy asks for A records alone, so that no form of IPv4 inside IPv6 (mapped, NAT64, 6to4) comes up.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};

use crate::control::types::parse_cidr;

/// A range of addresses.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Range {
    first: u32,
    bits: u8,
}

impl Range {
    const fn new([a, b, c, d]: [u8; 4], bits: u8) -> Self {
        Self { first: u32::from_be_bytes([a, b, c, d]), bits }
    }

    /// Reads `address/bits`; bits of the address beyond the prefix are ignored.
    pub fn parse(text: &str) -> Option<Self> {
        let (address, bits) = parse_cidr(text)?;
        Some(Self { first: u32::from(address) & mask(bits), bits })
    }

    /// The address is in it.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address) & mask(self.bits) == self.first
    }

    /// All of `other` is in it.
    fn covers(self, other: Self) -> bool {
        self.bits <= other.bits && other.first & mask(self.bits) == self.first
    }
}

const fn mask(bits: u8) -> u32 {
    if bits == 0 { 0 } else { u32::MAX << (32 - bits) }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from(self.first), self.bits)
    }
}

impl fmt::Debug for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Who may open a range that is not public.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Opening {
    /// An `allow_cidrs` entry that lies in it, since that says so; `0.0.0.0/0` does not.
    Policy,
    /// The operator alone.
    Operator,
}

/// What is not public (IANA's registry of special-purpose addresses, and one of a cloud's host agents that looks public).
const SPECIAL: &[(Range, &str, Opening)] = &[
    (Range::new([0, 0, 0, 0], 8), "of \"this network\"", Opening::Operator),
    (Range::new([10, 0, 0, 0], 8), "private", Opening::Policy),
    (Range::new([100, 64, 0, 0], 10), "of a carrier's shared space", Opening::Policy),
    (Range::new([127, 0, 0, 0], 8), "loopback", Opening::Operator),
    (Range::new([168, 63, 129, 16], 32), "of a cloud's host agent", Opening::Policy),
    (Range::new([169, 254, 0, 0], 16), "link-local (cloud metadata)", Opening::Policy),
    (Range::new([172, 16, 0, 0], 12), "private", Opening::Policy),
    (Range::new([192, 0, 0, 0], 24), "of IETF protocols", Opening::Policy),
    (Range::new([192, 0, 2, 0], 24), "for documentation", Opening::Policy),
    (Range::new([192, 88, 99, 0], 24), "of a 6to4 relay", Opening::Policy),
    (Range::new([192, 168, 0, 0], 16), "private", Opening::Policy),
    (Range::new([198, 18, 0, 0], 15), "for benchmarks", Opening::Policy),
    (Range::new([198, 51, 100, 0], 24), "for documentation", Opening::Policy),
    (Range::new([203, 0, 113, 0], 24), "for documentation", Opening::Policy),
    (Range::new([224, 0, 0, 0], 4), "multicast", Opening::Operator),
    (Range::new([240, 0, 0, 0], 4), "reserved", Opening::Operator),
];

/// Why an address is refused: the end of a sentence that begins with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressRefusal {
    /// See [`SPECIAL`].
    #[error("is {0}")]
    Special(&'static str),
    /// An address of this machine.
    #[error("is an address of the host")]
    Host,
    /// The operator's list.
    #[error("is refused by the operator")]
    Operator,
}

/// What the operator says.
#[derive(Clone, Debug, Default)]
pub struct OperatorRanges {
    /// Reached whatever they are.
    pub permitted: Vec<Range>,
    /// Never reached; wins over everything.
    pub refused: Vec<Range>,
}

impl OperatorRanges {
    /// Whether the proxy may connect to `address` for a policy with these `allow_cidrs`. `is_host` says which addresses are the host's own.
    pub fn admit(
        &self,
        address: Ipv4Addr,
        allow_cidrs: &[Range],
        is_host: impl FnOnce(Ipv4Addr) -> bool,
    ) -> Result<(), AddressRefusal> {
        let within = |ranges: &[Range]| ranges.iter().any(|r| r.contains(address));
        if within(&self.refused) {
            return Err(AddressRefusal::Operator);
        }
        if within(&self.permitted) {
            return Ok(());
        }
        if let Some((special, what, opening)) = SPECIAL.iter().find(|(range, ..)| range.contains(address)) {
            let opened = allow_cidrs.iter().any(|range| special.covers(*range) && range.contains(address));
            if *opening == Opening::Operator || !opened {
                return Err(AddressRefusal::Special(what));
            }
        }
        if is_host(address) { Err(AddressRefusal::Host) } else { Ok(()) }
    }
}

/// Whether `address` is one of this machine's: only those can be bound to. Where the kernel lets everything be bound
/// (`net.ipv4.ip_nonlocal_bind`), all are taken for the host's: the proxy refuses rather than guesses.
pub fn is_host(address: Ipv4Addr) -> bool {
    UdpSocket::bind(SocketAddrV4::new(address, 0)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ranges(texts: &[&str]) -> Vec<Range> {
        texts.iter().map(|t| Range::parse(t).unwrap()).collect()
    }

    fn admit(address: &str, cidrs: &[&str]) -> Result<(), AddressRefusal> {
        OperatorRanges::default().admit(address.parse().unwrap(), &ranges(cidrs), |_| false)
    }

    #[test]
    fn only_public_addresses_pass_by_themselves() {
        for public in
            ["1.1.1.1", "8.8.8.8", "100.63.255.255", "172.15.0.1", "172.32.0.1", "192.167.0.1", "223.255.255.255"]
        {
            assert_eq!(admit(public, &[]), Ok(()), "{public}");
        }
        for special in [
            "0.0.0.0",
            "10.0.0.1",
            "100.64.0.1",
            "100.100.100.200",
            "127.0.0.1",
            "127.255.255.254",
            "168.63.129.16",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.192",
            "192.168.1.1",
            "198.19.0.1",
            "203.0.113.9",
            "224.0.0.1",
            "239.255.255.250",
            "255.255.255.255",
            "240.0.0.1",
        ] {
            assert!(admit(special, &[]).is_err(), "{special}");
            assert!(admit(special, &["0.0.0.0/0"]).is_err(), "{special} is not opened by what does not name it");
        }
    }

    #[test]
    fn a_policy_opens_what_it_names_and_never_the_host() {
        assert_eq!(admit("10.1.2.3", &["10.1.0.0/16"]), Ok(()));
        assert_eq!(admit("10.2.2.3", &["10.1.0.0/16"]), Err(AddressRefusal::Special("private")));
        assert_eq!(admit("169.254.169.254", &["169.254.169.254/32"]), Ok(()));
        assert!(admit("127.0.0.1", &["127.0.0.0/8"]).is_err());
        assert!(admit("224.0.0.1", &["224.0.0.1/32"]).is_err());
        let own = OperatorRanges::default();
        assert_eq!(
            own.admit(Ipv4Addr::new(10, 0, 0, 1), &ranges(&["10.0.0.0/8"]), |_| true),
            Err(AddressRefusal::Host)
        );
        assert_eq!(own.admit(Ipv4Addr::new(1, 1, 1, 1), &[], |_| true), Err(AddressRefusal::Host));
    }

    #[test]
    fn the_operator_has_the_last_word() {
        let operator =
            OperatorRanges { permitted: ranges(&["10.0.0.0/8"]), refused: ranges(&["10.9.0.0/16", "9.9.9.9/32"]) };
        let admit = |address: [u8; 4], cidrs: &[&str]| operator.admit(address.into(), &ranges(cidrs), |_| true);
        assert_eq!(admit([10, 1, 1, 1], &[]), Ok(()), "even though it is the host's own");
        assert_eq!(admit([10, 9, 1, 1], &["10.9.1.1/32"]), Err(AddressRefusal::Operator));
        assert_eq!(admit([9, 9, 9, 9], &["9.9.9.9/32"]), Err(AddressRefusal::Operator));
    }

    #[test]
    fn the_hosts_own_addresses_are_known() {
        assert!(is_host(Ipv4Addr::LOCALHOST));
        assert!(!is_host(Ipv4Addr::new(192, 0, 2, 1)));
    }

    proptest! {
        #[test]
        fn ranges_hold_what_their_prefix_says(address: u32, bits in 0_u8..=32, other: u32) {
            let range = Range::parse(&format!("{}/{bits}", Ipv4Addr::from(address))).unwrap();
            let shift = 32 - u32::from(bits);
            prop_assert_eq!(range.contains(other.into()), u64::from(address) >> shift == u64::from(other) >> shift);
            prop_assert!(range.contains(address.into()) && range.covers(range));
            prop_assert_eq!(Range::parse(&range.to_string()), Some(range));
        }
    }
}
