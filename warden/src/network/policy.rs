//! What a sandbox may reach, as the warden is told it. Names are not its business: connections to names go to the egress proxy.

use super::range::Range;
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;

/// The egress policy of one sandbox, as far as addresses decide.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// What becomes of what no list names.
    pub mode: Mode,
    /// Ranges that it may reach, whatever else is said of them: up to [`MAX_RANGES`].
    #[serde(default)]
    pub allow: Vec<Range>,
    /// TCP ports 80 and 443 go to the proxy's socket, which decides by name.
    #[serde(default)]
    pub proxy: bool,
}

/// Entries of [`Policy::allow`] at most.
pub const MAX_RANGES: usize = 10;

/// What becomes of what no list names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// It passes, but for [`RESERVED`] addresses.
    AllowAll,
    /// It does not pass; names are not resolved either.
    DenyAll,
    /// It does not pass.
    Custom,
}

impl Policy {
    /// Nothing passes: what a network begins with.
    pub const DENY: Self = Self { mode: Mode::DenyAll, allow: Vec::new(), proxy: false };
}

/// What the operator says for all sandboxes of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Operator {
    /// Ranges that every sandbox may reach unless its policy is deny-all: a mirror, a proxy of the site. May name addresses of the host itself.
    #[serde(default)]
    pub allow: Vec<Range>,
    /// Ranges that no sandbox may reach, whatever its policy allows.
    #[serde(default)]
    pub deny: Vec<Range>,
    /// Bounds of one sandbox.
    #[serde(default)]
    pub limits: Limits,
}

/// Bounds of one sandbox's network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Connections at once, of all protocols.
    pub connections: u32,
    /// New connections a second.
    pub new_per_second: u32,
    /// New connections that may come at once after a quiet time.
    pub burst: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 1024, new_per_second: 200, burst: 400 }
    }
}

/// Addresses that are refused unless a list names them: not of the Internet, or of none in particular (RFC 6890 and 5771).
pub const RESERVED: &[Range] = &[
    Range::new(Ipv4Addr::UNSPECIFIED, 8),
    Range::new(Ipv4Addr::new(10, 0, 0, 0), 8),
    Range::new(Ipv4Addr::new(100, 64, 0, 0), 10),
    Range::new(Ipv4Addr::new(127, 0, 0, 0), 8),
    Range::new(Ipv4Addr::new(169, 254, 0, 0), 16),
    Range::new(Ipv4Addr::new(172, 16, 0, 0), 12),
    Range::new(Ipv4Addr::new(192, 0, 0, 0), 24),
    Range::new(Ipv4Addr::new(192, 0, 2, 0), 24),
    Range::new(Ipv4Addr::new(192, 88, 99, 0), 24),
    Range::new(Ipv4Addr::new(192, 168, 0, 0), 16),
    Range::new(Ipv4Addr::new(198, 18, 0, 0), 15),
    Range::new(Ipv4Addr::new(198, 51, 100, 0), 24),
    Range::new(Ipv4Addr::new(203, 0, 113, 0), 24),
    Range::new(Ipv4Addr::new(224, 0, 0, 0), 3),
];
