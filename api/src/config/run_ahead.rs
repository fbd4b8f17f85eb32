//! Bounds of the work done ahead of a pause (design §5): what an idle sandbox may cost.

use super::ConfigError;
use serde::Deserialize;
use std::time::Duration;

/// When pages are sent ahead, and how much of it.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunAhead {
    /// Whether at all.
    pub enabled: bool,
    /// Between two looks at the sandboxes, ms.
    pub interval_ms: u64,
    /// Without a request for this long a sandbox is idle, ms.
    pub idle_ms: u64,
    /// Its auto-pause is near when it is this close, ms.
    pub near_ms: u64,
    /// A round with less to look at than this is not worth it, KiB.
    pub least_kib: u64,
    /// Bytes sent ahead in a minute, of one sandbox, MiB.
    pub mib_per_minute: u64,
    /// Share of one core that rounds of one sandbox may take, percent: a round of a second is followed by a rest.
    pub core_percent: u64,
    /// PUTs in flight of a round at most: rounds are in nobody's way.
    pub connections: u16,
}

impl Default for RunAhead {
    fn default() -> Self {
        Self {
            enabled: true,
            interval_ms: 2_000,
            idle_ms: 10_000,
            near_ms: 30_000,
            least_kib: 4 << 10,
            mib_per_minute: 1024,
            core_percent: 25,
            connections: 4,
        }
    }
}

impl RunAhead {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        for (field, value, low, high) in [
            ("interval_ms", self.interval_ms, 50, 3_600_000),
            ("idle_ms", self.idle_ms, 0, 86_400_000),
            ("near_ms", self.near_ms, 0, 3_600_000),
            ("mib_per_minute", self.mib_per_minute, 1, 1 << 20),
            ("core_percent", self.core_percent, 1, 100),
            ("connections", u64::from(self.connections), 1, 256),
        ] {
            if !(low..=high).contains(&value) {
                let error = format!("must be between {low} and {high}, not {value}");
                return Err(ConfigError::Value { field: format!("run_ahead.{field}"), error });
            }
        }
        Ok(())
    }

    /// [`RunAhead::interval_ms`] as a duration.
    pub fn interval(&self) -> Duration {
        Duration::from_millis(self.interval_ms)
    }
}
