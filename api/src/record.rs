//! The record of a sandbox: what was asked for ([`Spec`]), where it stands ([`Record`]), and the part of it that travels in heads and
//! manifests ([`Portable`]), so that another host can find and resume it from the bucket alone.

use crate::ids::SandboxId;
use crate::network_policy::NetworkPolicy;
use crate::sources::UnixMs;
use crate::states::{Event, State};
use serde::{Deserialize, Serialize};
use stasis_snapshot::manifest::{ManifestRef, Versioned};
use stasis_snapshot::seal::WrappedKey;
use std::collections::BTreeMap;
use std::num::NonZeroU16;

/// What was asked for. Fixed for the life of the sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Template as the request named it.
    pub template_name: String,
    /// Its id in answers.
    pub template_id: String,
    /// BLAKE3 of the template, hex.
    pub template_digest: String,
    /// BLAKE3 of the template's root file system, hex: the base of the disk. `None` when it has no disk.
    pub rootfs_digest: Option<String>,
    /// The guest has an agent: it runs commands and is told of a wake.
    pub agent: bool,
    /// vCPUs.
    pub vcpu: u8,
    /// Memory, MiB.
    pub memory_mib: u32,
    /// Disk, MiB; 0 is none.
    pub disk_mib: u64,
    /// Life after each entry to `running`, seconds.
    pub timeout_s: u32,
    /// Pause instead of deleting when the life is over.
    pub auto_pause: bool,
    /// Environment of every command.
    #[serde(default)]
    pub env_vars: BTreeMap<String, String>,
    /// TCP port that its template serves on: where requests go that name none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<NonZeroU16>,
    /// Egress policy.
    #[serde(default)]
    pub network_policy: Option<NetworkPolicy>,
    /// Its machine has a network device.
    #[serde(default)]
    pub network: bool,
    /// What ends TLS for the domains of its policy's transforms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authority: Option<Authority>,
    /// Id of the named snapshot that it was restored from.
    #[serde(default)]
    pub snapshot: Option<String>,
    /// When the sandbox was created.
    pub created_at: UnixMs,
}

/// A sandbox's certificate authority without its key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authority {
    /// What it is called.
    pub name: String,
    /// What the guest trusts.
    pub certificate_pem: String,
    /// Name of its key in the journal's secrets.
    pub key: String,
}

/// What heads and manifests carry for the supervisor, as JSON under [`Portable::VERSION`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Portable {
    /// State at the commit: `running` (an owner holds it), `paused` or `stopped`. `stopped` for as long as the head names the manifest of a
    /// stop, which holds disks alone, whoever runs it since.
    pub state: State,
    /// What was asked for.
    pub spec: Spec,
}

/// Why a record from the bucket cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PortableError {
    /// Another version wrote it.
    #[error("the record has version {0}; this stasis reads {version}", version = Portable::VERSION)]
    Version(u16),
    /// It is no record.
    #[error("the record is malformed")]
    Malformed(#[from] serde_json::Error),
}

impl Portable {
    /// Raised when a field changes its meaning.
    pub const VERSION: u16 = 1;

    /// For a head or a manifest.
    pub fn encode(&self) -> Result<Versioned, serde_json::Error> {
        Ok(Versioned { version: Self::VERSION, bytes: serde_json::to_vec(self)? })
    }

    /// Reads what [`Portable::encode`] wrote.
    pub fn decode(record: &Versioned) -> Result<Self, PortableError> {
        if record.version != Self::VERSION {
            return Err(PortableError::Version(record.version));
        }
        Ok(serde_json::from_slice(&record.bytes)?)
    }
}

/// Which process runs the VM. A process id alone may be used again; with the start time it may not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmIdentity {
    /// Process id.
    pub pid: i32,
    /// Start time in clock ticks since boot (`/proc/{pid}/stat`, field 22).
    pub started_ticks: u64,
}

/// Where a sandbox stands on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its id.
    pub id: SandboxId,
    /// Whose it is.
    pub tenant: String,
    /// What was asked for.
    pub spec: Spec,
    /// State.
    pub state: State,
    /// When it entered the state.
    pub state_changed_at: UnixMs,
    /// When its present life began: the last entry to `running`.
    pub launched_at: Option<UnixMs>,
    /// When its present life is over.
    pub deadline: Option<UnixMs>,
    /// Epoch of the head as last seen.
    pub epoch: u64,
    /// Sequence number of the head as last seen.
    pub seq: u64,
    /// The manifest that the head names, if it was ever paused.
    pub commit: Option<ManifestRef>,
    /// The commit is a stop's: it holds disks alone, and is started rather than resumed.
    #[serde(default)]
    pub disks_only: bool,
    /// The booted template that it was started from.
    #[serde(default)]
    pub origin: Option<ManifestRef>,
    /// What its captures are encrypted under, itself under the operator's key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_key: Option<WrappedKey>,
    /// The process that runs it.
    pub vmm: Option<VmmIdentity>,
    /// Why it was lost or deleted, or why its last operation failed.
    pub reason: Option<String>,
}

impl Record {
    /// A sandbox that is about to be made.
    pub fn new(id: SandboxId, tenant: String, spec: Spec) -> Self {
        let state_changed_at = spec.created_at;
        Self {
            id,
            tenant,
            spec,
            state: State::Starting,
            state_changed_at,
            launched_at: None,
            deadline: None,
            epoch: 0,
            seq: 0,
            commit: None,
            disks_only: false,
            origin: None,
            data_key: None,
            vmm: None,
            reason: None,
        }
    }

    /// Where it is back when its VM is gone: `None` when there is no commit to go back to.
    pub fn rest(&self) -> Option<State> {
        self.commit.as_ref().map(|_| if self.disks_only { State::Stopped } else { State::Paused })
    }

    /// What has happened when its VM is gone.
    pub fn lost(&self) -> Event {
        match self.rest() {
            Some(State::Stopped) => Event::LostStored,
            Some(_) => Event::LostCommitted,
            None => Event::Lost,
        }
    }

    /// What goes into a head that says `state`.
    pub fn portable(&self, state: State) -> Portable {
        Portable { state, spec: self.spec.clone() }
    }
}
