//! `[deadlines]`: how long the supervisor waits for what.

use std::time::Duration;

use serde::Deserialize;

use super::ConfigError;

/// How long to wait for what, in milliseconds.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Deadlines {
    /// From the start of a VMM to a guest that is ready.
    pub boot_ms: u64,
    /// One request to a VMM that is not a capture or a restore.
    pub control_ms: u64,
    /// The upload of a capture.
    pub capture_ms: u64,
    /// A restore.
    pub restore_ms: u64,
    /// One request to the store that is not conditional.
    pub store_ms: u64,
    /// One conditional PUT.
    pub commit_ms: u64,
    /// Settling one commit; when it is over, the answer is "outcome unknown" and settling goes on without the client.
    pub settle_ms: u64,
    /// The agent's answer to a wake.
    pub wake_ms: u64,
    /// A request to an app waits this long for its sandbox to run.
    pub hold_ms: u64,
    /// And then for the app to take a connection.
    pub connect_ms: u64,
    /// A connection to an app on which nothing moves is ended after this time.
    pub idle_ms: u64,
    /// From an auto-pause that failed to the next try.
    pub pause_retry_ms: u64,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            boot_ms: 180_000,
            control_ms: 20_000,
            capture_ms: 240_000,
            restore_ms: 240_000,
            store_ms: 30_000,
            commit_ms: 10_000,
            settle_ms: 40_000,
            wake_ms: 60_000,
            hold_ms: 300_000,
            connect_ms: 10_000,
            idle_ms: 300_000,
            pause_retry_ms: 15_000,
        }
    }
}

macro_rules! deadlines {
    ($($name:ident = $field:ident),*) => {
        impl Deadlines {
            $(
                #[doc = concat!("[`Deadlines::", stringify!($field), "`] as a duration.")]
                pub fn $name(&self) -> Duration {
                    Duration::from_millis(self.$field)
                }
            )*

            fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($field), self.$field)),*]
            }
        }
    };
}

deadlines!(
    boot = boot_ms,
    control = control_ms,
    capture = capture_ms,
    restore = restore_ms,
    store = store_ms,
    commit = commit_ms,
    settle = settle_ms,
    wake = wake_ms,
    hold = hold_ms,
    connect = connect_ms,
    idle = idle_ms,
    pause_retry = pause_retry_ms
);

impl Deadlines {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        for (field, value) in self.all() {
            if !(10..=3_600_000).contains(&value) {
                let error = format!("must be between 10 and 3600000 ms, not {value}");
                return Err(ConfigError::Value { field: format!("deadlines.{field}"), error });
            }
        }
        Ok(())
    }
}
