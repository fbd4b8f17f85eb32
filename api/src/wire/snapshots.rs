//! Named snapshots.

use super::sandboxes::{Direction, EgressPolicy};
use super::text::{Environment, Label, Moment};
use crate::network_policy::NetworkPolicy;
use schemars::JsonSchema;
use serde::Serialize;

/// A named snapshot.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Snapshot {
    /// Its id.
    #[schemars(example = "snap-8h2j4k6l0p9o7i5u3y1t")]
    pub id: String,
    /// Its name, by which it is restored.
    pub name: String,
    /// Id of the template that its sandbox was made from.
    pub template_id: String,
    /// vCPUs.
    #[schemars(range(min = 1))]
    pub vcpu: u8,
    /// Memory, MiB.
    #[schemars(range(min = 1))]
    pub memory: u32,
    /// `memory` by its other name.
    #[schemars(range(min = 1))]
    pub memory_mib: u32,
    /// Disk, MiB.
    #[schemars(range(min = 1))]
    pub disk: u64,
    /// `disk` by its other name.
    #[schemars(range(min = 1))]
    pub disk_mib: u64,
    /// What sandboxes made from it may reach unless they are told otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_policy: Option<NetworkPolicy>,
    /// When it was made.
    #[schemars(with = "Moment")]
    pub created_at: String,
}

/// A named snapshot whose sandbox has ended.
#[derive(Debug, Serialize, JsonSchema)]
pub struct PausedSnapshot {
    /// The snapshot.
    #[serde(flatten)]
    pub snapshot: Snapshot,
    /// Always `paused`.
    pub state: &'static str,
}

/// One page of snapshots.
#[derive(Debug, Serialize, JsonSchema)]
pub struct SnapshotList {
    /// The page.
    pub items: Vec<Snapshot>,
    /// How many there are on all pages.
    pub total_items: usize,
}

/// A snapshot to be made.
#[derive(JsonSchema)]
pub struct CreateSnapshot {
    /// Its name; one is made up when absent.
    pub name: Option<Label>,
    /// Delete the sandbox when the snapshot is durable.
    pub kill_sandbox_after: Option<bool>,
}

/// A sandbox to be made from a snapshot.
#[derive(JsonSchema)]
pub struct RestoreSnapshot {
    /// The snapshot's name.
    pub snapshot_name: Label,
    /// Life after each boot and each wake, seconds; 300 when absent.
    #[schemars(range(min = 1, max = 28_800))]
    pub timeout: Option<i64>,
    /// `timeout` in minutes. If both are given they must mean the same.
    #[schemars(range(min = 1, max = 480))]
    pub timeout_min: Option<i64>,
    /// Pause at the end of a life instead of deleting.
    pub auto_pause: Option<bool>,
    /// What it may reach; as the snapshot's when absent.
    pub network_policy: Option<EgressPolicy>,
    /// Environment of every process, over the snapshot's.
    pub env_vars: Option<Environment>,
}

/// Which snapshots are listed, and how.
#[derive(JsonSchema)]
pub struct ListSnapshots {
    /// Only those with this in their name.
    #[schemars(length(max = 64))]
    pub query: Option<String>,
    /// Sorted by; `created_at` when absent.
    pub sort: Option<SnapshotSort>,
    /// Smallest first or last; `desc` when absent.
    #[schemars(rename = "order-by")]
    pub order_by: Option<Direction>,
    /// Which page; 1 when absent.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub page: Option<u32>,
    /// Snapshots on a page; 20 when absent.
    #[schemars(rename = "page-size", range(min = 1, max = 100))]
    pub page_size: Option<u32>,
}

/// What snapshots are sorted by.
#[derive(JsonSchema)]
#[schemars(rename_all = "snake_case", inline)]
#[expect(missing_docs, reason = "the names say it; a description of each would be no enum in the document")]
pub enum SnapshotSort {
    CreatedAt,
    TemplateId,
}
