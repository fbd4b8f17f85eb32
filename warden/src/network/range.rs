//! Ranges of IPv4 addresses: as people write them, and merged into what a set of the kernel wants.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// A range such as `10.0.0.0/8`. Host bits are taken away: the range is what counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Range {
    network: Ipv4Addr,
    prefix: u8,
}

/// The text is no range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an IPv4 range such as 10.0.0.0/8")]
pub struct NoRange(String);

impl Range {
    /// The `prefix` first bits of `address`; more than 32 are 32.
    pub const fn new(address: Ipv4Addr, prefix: u8) -> Self {
        let prefix = if prefix > 32 { 32 } else { prefix };
        Self { network: Ipv4Addr::from_bits(address.to_bits() & mask(prefix)), prefix }
    }

    /// One address.
    pub const fn one(address: Ipv4Addr) -> Self {
        Self::new(address, 32)
    }

    /// Its first address.
    pub const fn first(self) -> Ipv4Addr {
        self.network
    }

    /// Its last address.
    pub const fn last(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network.to_bits() | !mask(self.prefix))
    }

    /// Bits that all of its addresses share.
    pub const fn prefix(self) -> u8 {
        self.prefix
    }

    /// Whether it holds `address`.
    pub const fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & mask(self.prefix) == self.network.to_bits()
    }
}

const fn mask(prefix: u8) -> u32 {
    match u32::MAX.checked_shl(32 - prefix as u32) {
        Some(mask) => mask,
        None => 0,
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

impl FromStr for Range {
    type Err = NoRange;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let no = || NoRange(text.to_owned());
        let (address, prefix) = text.split_once('/').unwrap_or((text, "32"));
        if prefix.is_empty() || !prefix.bytes().all(|b| b.is_ascii_digit()) {
            return Err(no());
        }
        let prefix = prefix.parse().ok().filter(|prefix| *prefix <= 32).ok_or_else(no)?;
        Ok(Self::new(address.parse().map_err(|_| no())?, prefix))
    }
}

impl TryFrom<String> for Range {
    type Error = NoRange;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Range> for String {
    fn from(range: Range) -> Self {
        range.to_string()
    }
}

/// First and last address of each part of what `ranges` cover together: in order, none touching the next, as the kernel wants them.
pub(super) fn merged(ranges: impl IntoIterator<Item = Range>) -> Vec<(Ipv4Addr, Ipv4Addr)> {
    let mut sorted: Vec<_> = ranges.into_iter().map(|range| (range.first(), range.last())).collect();
    sorted.sort_unstable();
    let mut merged: Vec<(Ipv4Addr, Ipv4Addr)> = Vec::with_capacity(sorted.len());
    for (first, last) in sorted {
        match merged.last_mut() {
            Some(before) if u64::from(first.to_bits()) <= u64::from(before.1.to_bits()) + 1 => {
                before.1 = before.1.max(last);
            }
            _ => merged.push((first, last)),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(texts: &[&str]) -> Vec<Range> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn what_people_write_is_read_and_what_is_none_is_refused() {
        for (text, reads) in [
            ("10.1.2.3/8", "10.0.0.0/8"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("192.0.2.1/32", "192.0.2.1/32"),
            ("192.0.2.1", "192.0.2.1/32"),
        ] {
            assert_eq!(text.parse::<Range>().unwrap().to_string(), reads);
        }
        for text in ["", "/8", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/+8", "10.0.0/8", "::/0", "10.0.0.0/8/8"] {
            assert!(text.parse::<Range>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_ends_are_in_the_range_and_their_neighbours_are_not() {
        let range: Range = "172.16.0.0/12".parse().unwrap();
        assert_eq!((range.first(), range.last()), (Ipv4Addr::new(172, 16, 0, 0), Ipv4Addr::new(172, 31, 255, 255)));
        assert!(range.contains(range.first()) && range.contains(range.last()));
        assert!(!range.contains(Ipv4Addr::new(172, 15, 255, 255)) && !range.contains(Ipv4Addr::new(172, 32, 0, 0)));
        assert!(Range::new(Ipv4Addr::UNSPECIFIED, 0).contains(Ipv4Addr::BROADCAST));
    }

    #[test]
    fn merged_ranges_cover_the_same_and_do_not_touch() {
        let all = ranges(&["10.0.0.0/8", "10.2.0.0/16", "11.0.0.0/8", "192.0.2.1/32", "255.0.0.0/8", "0.0.0.0/8"]);
        let merged = merged(all.clone());
        assert!(merged.windows(2).all(|pair| u32::from(pair[0].1) + 1 < u32::from(pair[1].0)), "{merged:?}");
        for address in [
            "0.1.2.3",
            "1.0.0.0",
            "10.2.3.4",
            "11.255.255.255",
            "12.0.0.0",
            "192.0.2.1",
            "192.0.2.2",
            "255.255.255.255",
        ] {
            let address: Ipv4Addr = address.parse().unwrap();
            let covered = merged.iter().any(|(first, last)| (*first..=*last).contains(&address));
            assert_eq!(covered, all.iter().any(|range| range.contains(address)), "{address}");
        }
    }
}
