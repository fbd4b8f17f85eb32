//! When the supervisor collects what no head of the bucket needs.

use super::ConfigError;
use serde::Deserialize;
use std::time::Duration;

/// Seconds.
const YEAR_S: u64 = 366 * 24 * 3600;

/// How often, and after how long something unreachable is deleted.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Gc {
    /// Between two passes, seconds; 0: only by hand (`stasis gc`).
    pub every_s: u64,
    /// Between the pass that finds something unreachable and the one that deletes it, and from a delete to the end of `stasis undelete`, seconds.
    pub grace_s: u64,
}

impl Default for Gc {
    fn default() -> Self {
        Self { every_s: 24 * 3600, grace_s: 72 * 3600 }
    }
}

impl Gc {
    pub(super) fn check(self) -> Result<(), ConfigError> {
        for (field, value) in [("every_s", self.every_s), ("grace_s", self.grace_s)] {
            if value > YEAR_S {
                let error = format!("must be at most {YEAR_S}, not {value}");
                return Err(ConfigError::Value { field: format!("gc.{field}"), error });
            }
        }
        Ok(())
    }

    /// Between two passes; `None` when there are none.
    pub fn every(self) -> Option<Duration> {
        (self.every_s > 0).then(|| Duration::from_secs(self.every_s))
    }

    /// [`Gc::grace_s`] as a duration.
    pub fn grace(self) -> Duration {
        Duration::from_secs(self.grace_s)
    }
}
