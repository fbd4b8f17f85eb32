//! This host: health, and what it keeps ready.

use crate::kept_memory::Usage;
use schemars::JsonSchema;
use serde::Serialize;

/// What can be said of the store.
#[derive(Debug, Serialize, JsonSchema)]
pub struct StoreHealth {
    /// It keeps conditions on writes, so that several supervisors may share it.
    pub conditional_writes: bool,
}

/// Alive, and what it cannot do.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Health {
    /// Always `ok`.
    pub status: &'static str,
    /// Of this program.
    pub version: &'static str,
    /// This supervisor's name in the bucket.
    pub owner: String,
    /// The store.
    pub store: StoreHealth,
    /// What does not work, or not well, and what to do.
    pub caveats: Vec<String>,
}

/// Sandboxes can be made and paused now.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Ready {
    /// Always `ready`.
    pub status: &'static str,
    /// The store.
    pub store: StoreHealth,
    /// KVM is there.
    pub kvm: bool,
}

/// Sandboxes cannot be made or paused now.
#[derive(Debug, Serialize, JsonSchema)]
pub struct NotReady {
    /// Always `not ready`.
    pub status: &'static str,
    /// Why.
    pub message: String,
}

/// What this host keeps ready and does in the background.
#[derive(Debug, Serialize, JsonSchema)]
pub struct HostMetrics {
    /// Memory of paused sandboxes that stays on this host.
    pub kept_memory: Usage,
    /// VMMs that were started ahead.
    pub vmm_pool: usize,
    /// Captures and wakes under way.
    pub transfers: usize,
    /// Booted templates that creates start from.
    pub booted_templates: usize,
    /// Packs on the local disk; null without such a cache.
    pub pack_cache: Option<CacheUsage>,
    /// What was sent ahead of pauses, of all sandboxes.
    pub run_ahead: AheadTotals,
}

/// Files of a cache.
#[derive(Debug, Serialize, JsonSchema)]
pub struct CacheUsage {
    /// Files.
    pub files: u64,
    /// Bytes that they take.
    pub bytes: u64,
}

/// What was sent ahead of pauses.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub struct AheadTotals {
    /// Rounds that sent something.
    pub rounds: u64,
    /// Bytes that they stored.
    pub bytes: u64,
    /// Looks after which there was no round.
    pub skipped: u64,
    /// Rounds that failed or were cut off by a pause.
    pub cut_off: u64,
}
