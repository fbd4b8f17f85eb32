//! The control API's wire types: JSON over HTTP/1.1 on the VMM's `control.sock`. The only thing that supervisor and VMM share.
//!
//! | request | body | answer | when |
//! | --- | --- | --- | --- |
//! | `GET /v1/vm` | – | [`VmStatus`] | always |
//! | `PUT /v1/vm/prepare` | [`PrepareRequest`] | 204 | state `empty`: makes ahead what any machine of this size needs |
//! | `PUT /v1/vm/boot` | [`BootRequest`] | [`VmStatus`] | state `empty` |
//! | `PUT /v1/vm/restore` | [`RestoreRequest`] | [`RestoreReport`] | state `empty`; leaves the VM `paused`. Pages arrive later, on demand |
//! | `PUT /v1/vm/pause` | – | [`PauseReport`] | state `running` (idempotent when `paused`) |
//! | `PUT /v1/vm/resume` | – | [`VmStatus`] | state `paused`; the first vCPU instruction runs after this |
//! | `GET /v1/vm/dirty` | – | [`DirtyReport`] | state `running` or `paused`: what a capture now would look at; changes nothing |
//! | `POST /v1/vm/capture` | [`CaptureRequest`] | a [manifest](stasis_snapshot) draft as octets (none for a round), [`CaptureReport`] in the `stasis-report` header | see [`CaptureMode`] |
//! | `PUT /v1/vm/capture/connections` | [`Connections`] | 204 | changes the share of the capture that runs, if one does |
//! | `DELETE /v1/vm/capture` | – | 204 | cancels a running capture; the capture call answers 409 |
//! | `PUT /v1/vm/keep` | [`KeepRequest`] | 204 | state `paused`: writes down what a restore on this host needs, besides the memory file, to find memory in place |
//! | `PUT /v1/vm/console` | octets | 204 | state `running`: input for the guest's serial port, as many bytes as fit |
//! | `PUT /v1/vm/shutdown` | – | 204, then the process exits 0 | always |
//! | `GET /v1/metrics` | – | [`Metrics`] | always |
//!
//! Errors are [`ErrorBody`] with a 4xx or 5xx status. Files never travel as paths: the sender opens them and passes the descriptors over
//! `fds.sock` under a token of its choice ([`FdToken`]), before the request that names the token. A token is used once.

mod network;

use serde::{Deserialize, Serialize};
use stasis_snapshot::grant::GrantedObject;
use stasis_snapshot::seal::DataKey;

pub use network::{BadMacAddress, MacAddress, NetworkConfig, NetworkLimits, NetworkMetrics, RateLimit, Traffic};

/// Names a descriptor that was sent over `fds.sock` beforehand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FdToken(pub u64);

/// The shape of a machine. Fixed for its life, saved in its snapshots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Virtual CPUs, 1 to 8.
    pub vcpus: u8,
    /// Guest memory, MiB, 16 to 8192.
    pub memory_mib: u32,
    /// The context id the guest sees on its vsock device; no device when absent.
    pub vsock_cid: Option<u32>,
    /// Attach the exit-counting port device that tests use.
    #[serde(default)]
    pub exit_counter: bool,
    /// The network device; none when absent.
    #[serde(default)]
    pub network: Option<NetworkConfig>,
}

/// One virtio block device: private writes over a shared read-only base.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The read-only base (a template's root file system). An empty disk when absent.
    pub base: Option<FdToken>,
    /// Digest that names the base in snapshots (the template's), lower-case hex of 32 bytes. Required with `base`.
    pub base_digest: Option<String>,
    /// An index of the base's blocks by content (`stasis_snapshot::capture::BlockIndex`, encoded): memory that equals a block is then not sent.
    #[serde(default)]
    pub base_index: Option<FdToken>,
    /// An empty, unlinked, sparse file that takes the writes. Required unless `read_only`.
    pub overlay: Option<FdToken>,
    /// Size that the guest sees, MiB; at least the base's size.
    pub size_mib: u64,
    /// Refuse writes.
    #[serde(default)]
    pub read_only: bool,
}

/// Body of `PUT /v1/vm/prepare`: the machine that will probably be asked for. Another one may be asked for all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrepareRequest {
    /// Virtual CPUs, 1 to 8.
    pub vcpus: u8,
    /// Guest memory, MiB, 16 to 8192.
    pub memory_mib: u32,
}

/// Body of `PUT /v1/vm/keep`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeepRequest {
    /// An empty file for the notes.
    pub notes: FdToken,
}

/// Body of `PUT /v1/vm/boot`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootRequest {
    /// The machine.
    pub machine: MachineConfig,
    /// ELF vmlinux or bzImage.
    pub kernel: FdToken,
    /// Initial RAM file system.
    pub initramfs: Option<FdToken>,
    /// Kernel command line, at most 2047 bytes; the VMM adds nothing to it.
    pub cmdline: String,
    /// Block devices in the order vda, vdb, …
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// The memory file: an empty memfd that the sender may keep beyond the life of this VMM. The VMM makes its own when absent.
    #[serde(default)]
    pub memory: Option<FdToken>,
    /// What the network device is connected to: a tap that is attached to its interface, with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`. The
    /// guest's link is down without it. Only for a machine with a network device.
    #[serde(default)]
    pub tap: Option<FdToken>,
    /// What the disks hold, where that is not what their bases hold.
    #[serde(default)]
    pub disks_from: Option<DisksFrom>,
    /// The sandbox, for a VMM that was started ahead without one.
    #[serde(default)]
    pub id: Option<String>,
}

/// The disks of a snapshot of the same machine. They are filled before the first instruction; nothing else of the snapshot is used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DisksFrom {
    /// A descriptor that holds the encoded manifest (a memfd).
    pub manifest: FdToken,
    /// BLAKE3 of the manifest, lower-case hex: checked before it is decoded.
    pub manifest_digest: String,
    /// A readable grant for every pack that the manifest names.
    pub packs: Vec<GrantedObject>,
    /// GETs in flight at most.
    pub connections: u16,
    /// The data keys of packs that are encrypted.
    #[serde(default)]
    pub keys: Vec<DataKey>,
}

/// Body of `PUT /v1/vm/restore`. The machine's shape comes from the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreRequest {
    /// A descriptor that holds the encoded manifest (a memfd).
    pub manifest: FdToken,
    /// BLAKE3 of the manifest, lower-case hex: checked before it is decoded.
    pub manifest_digest: String,
    /// A readable grant for every pack that the manifest names.
    pub packs: Vec<GrantedObject>,
    /// Bases and overlays, in the manifest's disk order.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// The new VM generation id, lower-case hex of 16 random bytes: never the same for two restores.
    pub generation_id: String,
    /// The memory file: an empty memfd, or the one of the VMM that made this very snapshot on this host (then with `kept`).
    #[serde(default)]
    pub memory: Option<FdToken>,
    /// The notes that `PUT /v1/vm/keep` wrote for `memory`. Without them `memory` must be empty.
    #[serde(default)]
    pub kept: Option<FdToken>,
    /// The data keys of packs, and of a state, that are encrypted.
    #[serde(default)]
    pub keys: Vec<DataKey>,
    /// As in [`BootRequest`]. The guest is told to announce itself on it.
    #[serde(default)]
    pub tap: Option<FdToken>,
    /// Limits of the network device from now on, whatever the snapshot says.
    #[serde(default)]
    pub network_limits: NetworkLimits,
    /// How pages arrive.
    #[serde(default)]
    pub paging: Paging,
    /// The sandbox, for a VMM that was started ahead without one.
    #[serde(default)]
    pub id: Option<String>,
}

/// How the pages of a restored machine arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Paging {
    /// All pages before the restore answers, as a host without userfaultfd does anyway.
    pub eager: bool,
    /// GETs in flight at most.
    pub connections: u16,
    /// Pages that nobody asked for are fetched at this rate at most, MiB a second; 0 leaves them where they are.
    pub sweep_mib_per_second: u32,
}

impl Default for Paging {
    fn default() -> Self {
        Self { eager: false, connections: 16, sweep_mib_per_second: 256 }
    }
}

/// What a capture does with the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CaptureMode {
    /// State `paused`: it stays stopped.
    #[default]
    Stopped,
    /// State `paused`: it stays stopped, and its disks alone are captured. The draft has no state, and memory that is zero.
    Disks,
    /// State `running`: it runs on; pages are sent ahead, and what is written meanwhile is left to the next capture. No draft. A pause cancels it.
    Round,
    /// State `running`: it is stopped while state is saved and the residue copied to staging memory, then runs while that is sent.
    Staged,
}

/// Body of `PUT /v1/vm/capture/connections`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Connections {
    /// PUTs in flight at most, from now on.
    pub connections: u16,
}

/// Answer of `GET /v1/vm/dirty`. An upper bound: pages that were rewritten with what they held are found out by the capture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirtyReport {
    /// Memory pages (4 KiB) that a capture now would look at.
    pub memory_pages: u64,
    /// Disk blocks (4 KiB) that a capture now would look at.
    pub disk_blocks: u64,
    /// How many packs a capture now may need at most.
    pub packs_needed: u32,
}

/// Body of `POST /v1/vm/capture`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptureRequest {
    /// Writable grants, used in order; at least [`PauseReport::packs_needed`] of them.
    pub packs: Vec<GrantedObject>,
    /// PUTs in flight at most.
    pub connections: u16,
    /// Give up after this long, ms.
    pub deadline_ms: u64,
    /// What happens to the guest meanwhile.
    #[serde(default)]
    pub mode: CaptureMode,
    /// Bytes of pages and packs in this process's memory at most; the VMM's default when absent.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// Packs and state are encrypted under this data key; as they are when absent.
    #[serde(default)]
    pub seal: Option<DataKey>,
}

/// What the VM is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Nothing is loaded yet.
    Empty,
    /// vCPUs run.
    Running,
    /// vCPUs and devices are parked; memory does not change.
    Paused,
    /// Paused, and a capture is under way.
    Capturing,
}

/// Answer of `GET /v1/vm`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStatus {
    /// The id the process was started for.
    pub id: String,
    /// Process id of the VMM.
    pub pid: u32,
    /// Version of the VMM.
    pub vmm_version: String,
    /// State.
    pub state: VmState,
    /// The machine, once there is one.
    pub machine: Option<MachineConfig>,
}

/// Answer of `PUT /v1/vm/pause`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PauseReport {
    /// Memory pages (4 KiB) that a capture now would look at.
    pub dirty_memory_pages: u64,
    /// Disk blocks (4 KiB) that a capture now would look at.
    pub dirty_disk_blocks: u64,
    /// How many packs a capture now may need at most.
    pub packs_needed: u32,
    /// Time until all vCPUs and devices stood still, µs.
    pub stop_us: u64,
}

/// Header `stasis-report` of a capture.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptureReport {
    /// Saving devices, vCPUs and VM, µs.
    pub state_us: u64,
    /// From the first page read to the last pack stored, µs.
    pub upload_us: u64,
    /// Pages looked at.
    pub scanned_pages: u64,
    /// Of them zero.
    pub zero_pages: u64,
    /// Of them equal to a template block.
    pub base_pages: u64,
    /// Of them as the parent has them, though they were written to.
    #[serde(default)]
    pub unchanged_pages: u64,
    /// How long the guest stood still for it, µs: only in mode `staged`.
    #[serde(default)]
    pub stop_us: u64,
    /// Pages written into packs.
    pub sent_pages: u64,
    /// Bytes of all packs stored by this capture.
    pub sent_bytes: u64,
    /// Packs stored by this capture.
    pub packs: u32,
    /// Processor time of the threads that scanned and compressed, µs.
    #[serde(default)]
    pub cpu_us: u64,
}

/// Answer of `PUT /v1/vm/restore`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreReport {
    /// Reading and checking the manifest, µs.
    pub manifest_us: u64,
    /// Fetching, checking and placing pages, µs.
    pub pages_us: u64,
    /// Setting VM, vCPU and device state, µs.
    pub state_us: u64,
    /// Bytes fetched before the answer.
    pub fetched_bytes: u64,
    /// Memory pages that are not in place yet.
    #[serde(default)]
    pub absent_pages: u64,
    /// Memory was found in place.
    #[serde(default)]
    pub kept: bool,
}

/// How the pages of a restored machine arrived so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagingMetrics {
    /// Faults of vCPUs and devices on memory that was not there.
    pub faults: u64,
    /// Time they waited in all, µs.
    pub fault_us: u64,
    /// The longest wait, µs.
    pub fault_max_us: u64,
    /// Bytes from local packs.
    pub cache_bytes: u64,
    /// Bytes from the store.
    pub store_bytes: u64,
    /// Requests to the store.
    pub store_requests: u64,
    /// Memory pages that are not in place yet.
    pub absent_pages: u64,
    /// From the restore until everything was in place, µs; absent until then.
    pub resident_us: Option<u64>,
}

/// Answer of `GET /v1/metrics`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metrics {
    /// vCPU exits by reason.
    pub exits: std::collections::BTreeMap<String, u64>,
    /// Bytes the guest wrote to its console.
    pub console_bytes: u64,
    /// Of them lost, because they came faster than the host takes them.
    #[serde(default)]
    pub console_lost: u64,
    /// Block requests served.
    pub block_requests: u64,
    /// Resident memory of the VMM beyond guest memory, KiB.
    pub overhead_kib: u64,
    /// What the exit counter saw, where there is one.
    pub exit_counter: Option<ExitCounts>,
    /// Of a restored machine.
    #[serde(default)]
    pub paging: Option<PagingMetrics>,
    /// Guest memory mapped by huge pages, KiB.
    #[serde(default)]
    pub huge_kib: u64,
    /// The network device's, where there is one.
    #[serde(default)]
    pub network: Option<NetworkMetrics>,
}

/// What the exit-counting device saw (`devices::exit_counter`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitCounts {
    /// OUTs seen.
    pub outs: u64,
    /// INs answered.
    pub ins: u64,
    /// OUTs whose value did not follow the one before.
    pub out_gaps: u64,
}

/// Why a request was refused or failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// Stable word: see the variants of `control::refusal::Refusal`.
    pub code: String,
    /// The chain of causes, outermost first.
    pub message: String,
    /// The kind of the store error among the causes, where there is one.
    #[serde(default)]
    pub store: Option<stasis_snapshot::store::ErrorKind>,
}

/// [`ExitNote::status`] of a VMM one of whose threads made a system call that its role does not have.
pub const EXIT_SECCOMP: i32 = 5;

/// Written to `exit.json` in the run directory before the process ends for any reason it knows of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitNote {
    /// Exit status: 0 shutdown asked for, 1 start-up failed, 2 the guest ended its machine, 3 the VM failed, 4 a page of the snapshot
    /// could not be had, [`EXIT_SECCOMP`] a thread asked the kernel for what it may not.
    pub status: i32,
    /// Why, in one sentence.
    pub reason: String,
}
