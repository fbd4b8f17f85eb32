//! Walls around VMMs.

use serde::Deserialize;
use std::path::PathBuf;

/// How VMMs are isolated from this host and from each other.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct IsolationConfig {
    /// What happens where a wall cannot be had.
    pub mode: Isolation,
    /// Socket of a stasis-warden, the helper with the privileges that it takes. When absent, a supervisor that is root starts its own.
    pub warden: Option<PathBuf>,
}

/// What happens where a wall cannot be had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Isolation {
    /// The supervisor does not start.
    Required,
    /// It warns, and its health says so.
    #[default]
    Available,
    /// There are none, and it warns, too.
    Off,
}
