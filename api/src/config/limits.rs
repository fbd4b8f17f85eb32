//! `[limits]`: what clients may ask for, and what captures and wakes may use of the host.

use serde::Deserialize;

use super::ConfigError;

/// Bounds on what clients may ask for.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Bytes of a request body at most.
    pub body_bytes: usize,
    /// Sandboxes with a VM at once, of one tenant. Paused and stopped ones do not count.
    pub sandboxes: usize,
    /// The same of all tenants together.
    pub host_sandboxes: usize,
    /// Requests a minute of one tenant; 0 is no limit.
    pub requests_per_minute: u32,
    /// The same of all tenants together.
    pub host_requests_per_minute: u32,
    /// Bytes kept of each of stdout and stderr of a command.
    pub output_bytes: usize,
    /// Requests in flight of one capture or wake at most.
    pub connections: u16,
    /// Requests in flight of all captures and wakes together: shared evenly between them.
    pub host_connections: u16,
    /// Memory that a VMM uses for what is on its way in a capture at most, MiB. Less of it means fewer packs in flight.
    pub capture_memory_mib: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 10 << 20,
            sandboxes: 64,
            host_sandboxes: 256,
            requests_per_minute: 6000,
            host_requests_per_minute: 0,
            output_bytes: 4 << 20,
            connections: 32,
            host_connections: 64,
            capture_memory_mib: 64,
        }
    }
}

impl Limits {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        for (field, value, low, high) in [
            ("limits.body_bytes", self.body_bytes, 1024, 1 << 30),
            ("limits.sandboxes", self.sandboxes, 1, 100_000),
            ("limits.host_sandboxes", self.host_sandboxes, 1, 100_000),
            ("limits.output_bytes", self.output_bytes, 1024, 64 << 20),
            ("limits.connections", usize::from(self.connections), 1, 256),
            ("limits.host_connections", usize::from(self.host_connections), 2, 4096),
            ("limits.capture_memory_mib", usize::try_from(self.capture_memory_mib).unwrap_or(usize::MAX), 16, 4096),
        ] {
            if !(low..=high).contains(&value) {
                let error = format!("must be between {low} and {high}, not {value}");
                return Err(ConfigError::Value { field: field.to_owned(), error });
            }
        }
        Ok(())
    }
}
