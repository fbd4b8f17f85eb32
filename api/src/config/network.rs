//! Networks of sandboxes.

use super::ConfigError;
use serde::Deserialize;
use stasis_vmm::control::types::{NetworkLimits, RateLimit};
use stasis_warden::network::policy::{Limits, Operator};
use stasis_warden::network::range::Range;
use stasis_warden::network::serve::MAX_READY;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

/// Whether sandboxes have a network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Enabled {
    /// With the host's own warden (`isolation.warden`), where that can make them.
    #[default]
    Auto,
    /// A supervisor that cannot make them does not start.
    On,
    /// No.
    Off,
}

/// What the operator says of all networks of this host. Lists are in the file alone: they are no matter of one environment variable.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Network {
    /// Whether sandboxes have a network.
    pub enabled: Enabled,
    /// Addresses between the host and its sandboxes, two for each; nothing else of the site may use them.
    pub addresses: Range,
    /// Name servers that are asked for sandboxes; those of /etc/resolv.conf when empty.
    pub dns: Vec<SocketAddr>,
    /// Ranges that every sandbox may reach whose policy is not deny-all, private ones and this host's own addresses included.
    pub allow: Vec<Range>,
    /// Ranges that no sandbox may reach, whatever its policy says.
    pub deny: Vec<Range>,
    /// Files of certificates (PEM) that servers may have theirs from, beside the public authorities, where a transform ends TLS.
    pub authorities: Vec<PathBuf>,
    /// Networks kept ready for wakes.
    pub ready: u16,
    /// Connections of one sandbox at once.
    pub connections: u32,
    /// New connections of one sandbox a second.
    pub new_per_second: u32,
    /// New connections that may come at once after a quiet time.
    pub burst: u32,
    /// Bytes a second that a sandbox receives at most. 0, here and below, is no limit: what is a fair share of a host's line, only its operator
    /// knows, and a guess would slow down guests for whom there is room.
    pub in_bytes_per_second: u64,
    /// Packets a second that it receives at most.
    pub in_packets_per_second: u64,
    /// Bytes that it may receive at once after a quiet time; 0 is what the limit lets pass in a tenth of a second, and 128 KiB at least.
    pub in_burst_bytes: u64,
    /// Packets that it may; 0 is what the limit lets pass in a tenth of a second, and 64 at least.
    pub in_burst_packets: u64,
    /// The same of what it sends.
    pub out_bytes_per_second: u64,
    /// As above.
    pub out_packets_per_second: u64,
    /// As above.
    pub out_burst_bytes: u64,
    /// As above.
    pub out_burst_packets: u64,
}

/// Most of any rate and burst: a terabyte.
const MOST: u64 = 1_000_000_000_000;

impl Default for Network {
    fn default() -> Self {
        let limits = Limits::default();
        Self {
            enabled: Enabled::Auto,
            addresses: Range::new(Ipv4Addr::new(100, 96, 0, 0), 11),
            dns: Vec::new(),
            allow: Vec::new(),
            deny: Vec::new(),
            authorities: Vec::new(),
            ready: 4,
            connections: limits.connections,
            new_per_second: limits.new_per_second,
            burst: limits.burst,
            in_bytes_per_second: 0,
            in_packets_per_second: 0,
            in_burst_bytes: 0,
            in_burst_packets: 0,
            out_bytes_per_second: 0,
            out_packets_per_second: 0,
            out_burst_bytes: 0,
            out_burst_packets: 0,
        }
    }
}

impl Network {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let wrong = |field: &str, error: String| Err(ConfigError::Value { field: format!("network.{field}"), error });
        if self.addresses.prefix() > 30 {
            return wrong("addresses", format!("must be 30 bits or fewer, not {}", self.addresses));
        }
        if self.ready > MAX_READY {
            return wrong("ready", format!("must be at most {MAX_READY}, not {}", self.ready));
        }
        for (field, value) in
            [("connections", self.connections), ("new_per_second", self.new_per_second), ("burst", self.burst)]
        {
            if !(1..=1_000_000).contains(&value) {
                return wrong(field, format!("must be between 1 and 1000000, not {value}"));
            }
        }
        for (rate, per_second, field, burst) in [
            ("in_bytes_per_second", self.in_bytes_per_second, "in_burst_bytes", self.in_burst_bytes),
            ("in_packets_per_second", self.in_packets_per_second, "in_burst_packets", self.in_burst_packets),
            ("out_bytes_per_second", self.out_bytes_per_second, "out_burst_bytes", self.out_burst_bytes),
            ("out_packets_per_second", self.out_packets_per_second, "out_burst_packets", self.out_burst_packets),
        ] {
            for (field, value) in [(rate, per_second), (field, burst)] {
                if value > MOST {
                    return wrong(field, format!("must be at most {MOST}, not {value}"));
                }
            }
            if burst > 0 && per_second == 0 {
                return wrong(field, format!("means nothing without network.{rate}"));
            }
        }
        Ok(())
    }

    /// As a VMM is told.
    pub fn limits(&self) -> NetworkLimits {
        let some = |value: u64| (value > 0).then_some(value);
        NetworkLimits {
            to_guest: RateLimit {
                bytes_per_second: some(self.in_bytes_per_second),
                packets_per_second: some(self.in_packets_per_second),
                burst_bytes: some(self.in_burst_bytes),
                burst_packets: some(self.in_burst_packets),
            },
            from_guest: RateLimit {
                bytes_per_second: some(self.out_bytes_per_second),
                packets_per_second: some(self.out_packets_per_second),
                burst_bytes: some(self.out_burst_bytes),
                burst_packets: some(self.out_burst_packets),
            },
        }
    }

    /// As the warden is told.
    pub fn operator(&self) -> Operator {
        let limits = Limits { connections: self.connections, new_per_second: self.new_per_second, burst: self.burst };
        Operator { allow: self.allow.clone(), deny: self.deny.clone(), limits }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_told_to_vmms_and_nonsense_is_refused_by_name() {
        assert_eq!(Network::default().limits(), NetworkLimits::default());
        let set =
            Network { in_bytes_per_second: 5, out_packets_per_second: 6, out_burst_packets: 7, ..Network::default() };
        set.check().unwrap();
        let limits = set.limits();
        assert_eq!(limits.to_guest, RateLimit { bytes_per_second: Some(5), ..RateLimit::default() });
        let from_guest = RateLimit { packets_per_second: Some(6), burst_packets: Some(7), ..RateLimit::default() };
        assert_eq!(limits.from_guest, from_guest);
        for (bad, field) in [
            (Network { out_burst_bytes: 1, ..Network::default() }, "network.out_burst_bytes"),
            (Network { in_bytes_per_second: u64::MAX, ..Network::default() }, "network.in_bytes_per_second"),
        ] {
            assert!(bad.check().unwrap_err().to_string().contains(field));
        }
    }
}
