//! The network device of a machine as requests and answers say it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The network device of a machine. What it is connected to is the tap that a boot or restore request names; without one its link is down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkConfig {
    /// The guest's hardware address.
    pub mac: MacAddress,
    /// Largest packet, bytes, 68 to 65535.
    pub mtu: u16,
    /// Limits of what the guest receives.
    #[serde(default)]
    pub to_guest: RateLimit,
    /// Limits of what the guest sends.
    #[serde(default)]
    pub from_guest: RateLimit,
}

/// Limits of a network device that is restored: they replace those that its snapshot was made under.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkLimits {
    /// Of what the guest receives.
    #[serde(default)]
    pub to_guest: RateLimit,
    /// Of what it sends.
    #[serde(default)]
    pub from_guest: RateLimit,
}

/// Limits of one direction; what is absent is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Bytes of Ethernet frames a second, at least 1.
    #[serde(default)]
    pub bytes_per_second: Option<u64>,
    /// Packets a second, at least 1; a frame that the host segments counts as its segments.
    #[serde(default)]
    pub packets_per_second: Option<u64>,
    /// Bytes that may pass at once after a quiet time. When absent: what the limit lets pass in a tenth of a second, and 128 KiB at least.
    #[serde(default)]
    pub burst_bytes: Option<u64>,
    /// The same of packets; 64 at least.
    #[serde(default)]
    pub burst_packets: Option<u64>,
}

/// A hardware address of one interface: `02:53:54:41:53:02`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MacAddress([u8; 6]);

/// Bit of the first byte: the address of a group.
const GROUP: u8 = 1;

/// Not the hardware address of one interface.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no hardware address: six bytes of two hexadecimal digits with colons between, the first one even, not all zero"
)]
pub struct BadMacAddress(String);

impl MacAddress {
    /// The address of these bytes; none if it is a group's or nobody's.
    pub const fn new(bytes: [u8; 6]) -> Option<Self> {
        if bytes[0] & GROUP != 0 || matches!(bytes, [0, 0, 0, 0, 0, 0]) { None } else { Some(Self(bytes)) }
    }

    /// Its bytes.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.map(|byte| format!("{byte:02x}")).join(":"))
    }
}

impl FromStr for MacAddress {
    type Err = BadMacAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let byte = |part: &str| {
            (part.len() == 2 && part.bytes().all(|c| c.is_ascii_hexdigit()))
                .then(|| u8::from_str_radix(part, 16).ok())
                .flatten()
        };
        let bytes: Option<Vec<u8>> = text.split(':').take(7).map(byte).collect();
        bytes
            .and_then(|bytes| <[u8; 6]>::try_from(bytes).ok())
            .and_then(Self::new)
            .ok_or_else(|| BadMacAddress(text.chars().take(32).collect()))
    }
}

impl Serialize for MacAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// What the network device of a machine did since this process has had it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkMetrics {
    /// What the guest received.
    pub to_guest: Traffic,
    /// What the guest sent.
    pub from_guest: Traffic,
}

/// One direction of a network device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Frames that passed. One that is segmented counts once.
    pub packets: u64,
    /// Their bytes, from the Ethernet header on.
    pub bytes: u64,
    /// Frames that did not pass: refused, without room for them, or without a link.
    pub dropped: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_addresses_are_text_of_one_form() {
        let address = MacAddress::new([2, 0x53, 0x54, 0x41, 0x53, 2]).unwrap();
        assert_eq!(address.to_string(), "02:53:54:41:53:02");
        assert_eq!("02:53:54:41:53:02".parse(), Ok(address));
        let json = serde_json::to_string(&address).unwrap();
        assert_eq!(serde_json::from_str::<MacAddress>(&json).unwrap(), address);
        for bad in [
            "",
            "02:53:54:41:53",
            "02:53:54:41:53:02:00",
            "2:53:54:41:53:02",
            "02-53-54-41-53-02",
            "+2:53:54:41:53:02",
            "01:00:5e:00:00:01",
            "00:00:00:00:00:00",
            "ff:ff:ff:ff:ff:ff",
        ] {
            assert!(bad.parse::<MacAddress>().is_err(), "{bad}");
        }
    }
}
