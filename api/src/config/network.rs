//! Networks of sandboxes.

use super::ConfigError;
use serde::Deserialize;
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
}

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
        Ok(())
    }

    /// As the warden is told.
    pub fn operator(&self) -> Operator {
        let limits = Limits { connections: self.connections, new_per_second: self.new_per_second, burst: self.burst };
        Operator { allow: self.allow.clone(), deny: self.deny.clone(), limits }
    }
}
