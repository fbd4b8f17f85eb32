//! Sandboxes.

use super::text::{Environment, Label, Moment, NoEntries};
use crate::journal::Transition;
use crate::network_policy::{MAX_CIDRS, MAX_DOMAINS, MAX_TRANSFORMS, Mode, NetworkPolicy};
use crate::run_ahead::Spent;
use crate::states::State;
use crate::supervisor::catalogue::Found;
use crate::validate::LISTED;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// A sandbox.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Sandbox {
    /// Its id, never used again.
    #[schemars(example = "sbx-4f0k2m9qz1x7c3v5b8n6")]
    pub id: String,
    /// Id of its template.
    pub template_id: String,
    /// The template as it was asked for.
    pub template_name: String,
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
    /// Life after each boot and each wake, seconds.
    #[schemars(range(min = 1, max = 28_800))]
    pub timeout: u32,
    /// `timeout` in minutes, rounded up.
    #[schemars(range(min = 1, max = 480))]
    pub timeout_min: u32,
    /// What it is doing.
    pub state: State,
    /// At the end of its life it is paused, not deleted.
    pub auto_pause: bool,
    /// What it may reach; everything when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_policy: Option<NetworkPolicy>,
    /// When it was made.
    #[schemars(with = "Moment")]
    pub created_at: String,
    /// When it entered its state.
    #[schemars(with = "Moment")]
    pub updated_at: String,
    /// Why it was lost or deleted, or why its last operation failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The step that its operation is at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<&'static str>,
}

/// A sandbox in a list.
#[derive(Debug, Serialize, JsonSchema)]
pub struct SandboxItem {
    /// Its id.
    pub id: String,
    /// Id of its template.
    pub template_id: String,
    /// Always empty: there are no pods.
    pub pod_id: &'static str,
    /// What it is doing.
    #[schemars(with = "ListedState")]
    pub state: State,
    /// When it was made.
    #[schemars(with = "Moment")]
    pub created_at: String,
    /// When it entered its state.
    #[schemars(with = "Moment")]
    pub state_change_time: String,
    /// When its present life began.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Moment>")]
    pub launch_time: Option<String>,
    /// When its present life ends, seconds since the epoch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_at: Option<i64>,
}

/// One page of sandboxes.
#[derive(Debug, Serialize, JsonSchema)]
pub struct SandboxList {
    /// The page.
    pub items: Vec<SandboxItem>,
    /// How many there are on all pages.
    pub total_items: usize,
}

/// A sandbox to be made.
#[derive(JsonSchema)]
pub struct CreateSandbox {
    /// The template; `system/debian:bookworm` when absent.
    pub template_name: Option<Label>,
    /// vCPUs; 1 when absent.
    #[schemars(range(min = 1, max = 8))]
    pub vcpu: Option<i64>,
    /// Memory, MiB, even; 1024 when absent. A template may be content with less than 512.
    #[schemars(range(min = 512, max = 8192), extend("multipleOf" = 2))]
    pub memory: Option<i64>,
    /// `memory` by its other name. If both are given they must be the same.
    #[schemars(range(min = 512, max = 8192), extend("multipleOf" = 2))]
    pub memory_mib: Option<i64>,
    /// Disk, MiB: must be what the template has, since it cannot be chosen.
    #[schemars(range(min = 1))]
    pub disk: Option<i64>,
    /// `disk` by its other name.
    #[schemars(range(min = 1))]
    pub disk_mib: Option<i64>,
    /// Life after each boot and each wake, seconds; 300 when absent.
    #[schemars(range(min = 1, max = 28_800))]
    pub timeout: Option<i64>,
    /// `timeout` in minutes. If both are given they must mean the same.
    #[schemars(range(min = 1, max = 480))]
    pub timeout_min: Option<i64>,
    /// Pause at the end of a life instead of deleting.
    pub auto_pause: Option<bool>,
    /// Environment of every process.
    pub env_vars: Option<Environment>,
    /// What it may reach; everything when absent.
    pub network_policy: Option<EgressPolicy>,
    /// Not served: must be empty.
    pub mounts: Option<NoEntries>,
}

/// What a sandbox may reach.
#[derive(JsonSchema)]
#[schemars(extend("allOf" = [
    {
        "if": { "properties": { "mode": { "const": "custom" } } },
        "else": { "properties": { "allow_domains": { "maxItems": 0 }, "allow_cidrs": { "maxItems": 0 } } }
    },
    {
        "if": { "properties": { "mode": { "const": "deny-all" } } },
        "then": { "properties": { "transforms": { "maxItems": 0 } } }
    }
]))]
pub struct EgressPolicy {
    /// What holds by default.
    pub mode: Mode,
    /// Hosts that may be reached (`custom` only): exact, or `*.suffix`.
    #[schemars(default, length(max = MAX_DOMAINS))]
    pub allow_domains: Vec<HostPattern>,
    /// IPv4 ranges that may be reached (`custom` only).
    #[schemars(default, length(max = MAX_CIDRS))]
    pub allow_cidrs: Vec<Range>,
    /// Changes to requests on their way out (not with `deny-all`).
    #[schemars(default, length(max = MAX_TRANSFORMS))]
    pub transforms: Vec<HeaderChanges>,
}

/// Header changes for one domain.
#[derive(JsonSchema)]
#[expect(clippy::zero_sized_map_values, reason = "only its schema is used")]
pub struct HeaderChanges {
    /// The domain.
    pub domain: HostPattern,
    /// Headers to set.
    #[schemars(default, extend("propertyNames" = { "pattern": TOKEN }))]
    pub inject_headers: BTreeMap<String, HeaderText>,
    /// Headers to remove.
    #[schemars(default)]
    pub strip_headers: Vec<HeaderName>,
}

/// Name of a header (RFC 9110 §5.1).
const TOKEN: &str = "^[!#$%&'*+.^_`|~0-9A-Za-z-]+$";

inline_schemas! {
    /// A host name, or `*.` and one.
    HostPattern = {
        "type": "string",
        "maxLength": 253,
        "pattern": r"^(\*\.)?([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$",
        "examples": ["*.example.com"],
    };
    /// An IPv4 range.
    Range = {
        "type": "string",
        "pattern": r"^((25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\.){3}(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])/(3[0-2]|[12]?[0-9])$",
        "examples": ["10.0.0.0/8"],
    };
    /// Value of a header.
    HeaderText = { "type": "string", "pattern": r"^[\t -~]*$" };
    /// Name of a header.
    HeaderName = { "type": "string", "pattern": TOKEN };
    /// A state that can be listed.
    ListedState = { "type": "string", "enum": LISTED.map(State::as_str) };
}

/// Which sandboxes are listed, and how.
#[derive(JsonSchema)]
pub struct ListSandboxes {
    /// Only those in this state; all but deleted ones when absent.
    pub state: Option<ListedState>,
    /// Sorted by; `created_at` when absent.
    pub sort: Option<SandboxSort>,
    /// Smallest first or last; `desc` when absent.
    #[schemars(rename = "order-by")]
    pub order_by: Option<Direction>,
    /// Which page; 1 when absent.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub page: Option<u32>,
    /// Sandboxes on a page; 20 when absent.
    #[schemars(rename = "page-size", range(min = 1, max = 100))]
    pub page_size: Option<u32>,
}

/// What sandboxes are sorted by.
#[derive(JsonSchema)]
#[schemars(rename_all = "snake_case", inline)]
#[expect(missing_docs, reason = "the names say it; a description of each would be no enum in the document")]
pub enum SandboxSort {
    CreatedAt,
    State,
}

/// Smallest first or last.
#[derive(JsonSchema)]
#[schemars(rename_all = "snake_case", inline)]
#[expect(missing_docs, reason = "the names say it; a description of each would be no enum in the document")]
pub enum Direction {
    Asc,
    Desc,
}

/// What a recovery may take.
#[derive(JsonSchema)]
pub struct Recover {
    /// Takes what another supervisor holds, too. Only for one that is gone for good.
    pub take_over: Option<bool>,
}

/// What was found in the bucket.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Recovered {
    /// Each head that was looked at.
    pub items: Vec<Found>,
}

/// What is known of a sandbox, here and in the bucket.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Inspection {
    /// The sandbox.
    pub sandbox: Sandbox,
    /// Its VM; null when it has none.
    pub vmm: Option<VmmPlace>,
    /// What was sent ahead of a pause.
    pub run_ahead: Spent,
    /// Its head; null when it has none yet.
    pub head: Option<HeadObject>,
    /// The manifest that the head names, or what is wrong with it; null when it names none.
    pub manifest: Option<Value>,
    /// Every object below its prefix.
    pub objects: Vec<StoredObject>,
    /// Bytes of all of them.
    pub objects_bytes: u64,
    /// Its past on this host, oldest first.
    pub transitions: Vec<Transition>,
}

/// Where a VM runs.
#[derive(Debug, Serialize, JsonSchema)]
pub struct VmmPlace {
    /// Process id of its VMM.
    pub pid: i32,
    /// The VMM's directory.
    pub run_dir: String,
}

/// A head as it is stored.
#[derive(Debug, Serialize, JsonSchema)]
pub struct HeadObject {
    /// Its tag.
    pub etag: String,
    /// Its content.
    pub body: Value,
}

/// An object in the bucket.
#[derive(Debug, Serialize, JsonSchema)]
pub struct StoredObject {
    /// Its key.
    pub key: String,
    /// Its size.
    pub bytes: u64,
}
