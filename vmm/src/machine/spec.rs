//! What a snapshot says about the machine besides its pages: its shape, and the named, versioned states of its parts.
//!
//! Everything here is persisted: the types are ours, positional (postcard) and versioned, and an encoding is refused as a whole when bytes
//! are left over.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use stasis_snapshot::manifest::{StateBlob, Versioned};

use stasis_devices::virtio::net;

use super::MachineError;
use super::bare::{Bare, Size};
use crate::control::types::{MacAddress, MachineConfig, NetworkConfig, NetworkLimits, RateLimit};
use crate::inherited::HostFiles;
use crate::layout::LAYOUT_VERSION;

/// Version of [`MachineSpec`].
const SPEC_VERSION: u16 = 2;
/// Version of [`WithoutNetwork`].
const WITHOUT_NETWORK: u16 = 1;
/// Bounds that a spec from a snapshot must keep, as a boot request must.
const MAX_VCPUS: u8 = 8;
const MIN_MEMORY_MIB: u32 = 16;
const MAX_MEMORY_MIB: u32 = 8192;
/// More disks than this have no window.
const MAX_DISKS: usize = 8;
/// What every host takes (RFC 791).
const MIN_MTU: u16 = 68;

/// A machine or a part of it in a snapshot is not one that this VMM can make.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum SpecError {
    #[error("vcpus must be 1 to {MAX_VCPUS}, not {0}")]
    Vcpus(u8),
    #[error("memory must be {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB} MiB, not {0}")]
    Memory(u32),
    #[error("a machine has at most {MAX_DISKS} disks, not {0}")]
    Disks(usize),
    #[error("network.mac: the address of a group or of nobody")]
    Mac,
    #[error("network.mtu must be at least {MIN_MTU}, not {0}")]
    Mtu(u16),
    #[error("network: a limit must be at least 1 a second")]
    RateLimit,
    #[error("a tap was given for a machine without a network device")]
    TapWithoutNetwork,
    #[error("{what} is version {version}; this VMM reads {reads}")]
    Version { what: String, version: u16, reads: u16 },
    #[error("{0} is missing from the snapshot")]
    Missing(String),
    #[error("{what} cannot be decoded")]
    Decode {
        what: String,
        #[source]
        source: postcard::Error,
    },
    #[error("{what} cannot be encoded")]
    Encode {
        what: String,
        #[source]
        source: postcard::Error,
    },
    #[error("{0} is followed by bytes that do not belong to it")]
    Trailing(String),
}

/// One block device of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DiskSpec {
    /// Size the guest sees, 4 KiB blocks.
    pub(crate) blocks: u64,
    pub(crate) read_only: bool,
}

/// Limits of one direction. A restore brings limits of its own, so that bursts, which came later, are in no snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RateLimitSpec {
    bytes_per_second: Option<u64>,
    packets_per_second: Option<u64>,
    #[serde(skip)]
    burst_bytes: Option<u64>,
    #[serde(skip)]
    burst_packets: Option<u64>,
}

impl RateLimitSpec {
    fn new(limit: RateLimit) -> Self {
        let RateLimit { bytes_per_second, packets_per_second, burst_bytes, burst_packets } = limit;
        Self { bytes_per_second, packets_per_second, burst_bytes, burst_packets }
    }

    fn config(self) -> RateLimit {
        let Self { bytes_per_second, packets_per_second, burst_bytes, burst_packets } = self;
        RateLimit { bytes_per_second, packets_per_second, burst_bytes, burst_packets }
    }

    fn device(self) -> net::RateLimit {
        let Self { bytes_per_second, packets_per_second, burst_bytes, burst_packets } = self;
        net::RateLimit { bytes_per_second, packets_per_second, burst_bytes, burst_packets }
    }

    fn is_possible(self) -> bool {
        self.bytes_per_second != Some(0) && self.packets_per_second != Some(0)
    }
}

/// The network device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NetworkSpec {
    mac: [u8; 6],
    mtu: u16,
    to_guest: RateLimitSpec,
    from_guest: RateLimitSpec,
}

impl NetworkSpec {
    fn new(config: &NetworkConfig) -> Self {
        Self {
            mac: config.mac.bytes(),
            mtu: config.mtu,
            to_guest: RateLimitSpec::new(config.to_guest),
            from_guest: RateLimitSpec::new(config.from_guest),
        }
    }

    fn check(&self) -> Result<(), SpecError> {
        if MacAddress::new(self.mac).is_none() {
            return Err(SpecError::Mac);
        }
        if self.mtu < MIN_MTU {
            return Err(SpecError::Mtu(self.mtu));
        }
        if !self.to_guest.is_possible() || !self.from_guest.is_possible() {
            return Err(SpecError::RateLimit);
        }
        Ok(())
    }

    fn config(&self) -> Option<NetworkConfig> {
        let (to_guest, from_guest) = (self.to_guest.config(), self.from_guest.config());
        Some(NetworkConfig { mac: MacAddress::new(self.mac)?, mtu: self.mtu, to_guest, from_guest })
    }

    /// What the device model is made with.
    pub(super) fn device(&self) -> net::NetConfig {
        net::NetConfig {
            mac: self.mac,
            mtu: self.mtu,
            to_guest: self.to_guest.device(),
            from_guest: self.from_guest.device(),
        }
    }
}

/// The machine's shape.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MachineSpec {
    layout: u16,
    pub(crate) vcpus: u8,
    pub(crate) memory_mib: u32,
    pub(crate) vsock_cid: Option<u32>,
    pub(crate) exit_counter: bool,
    pub(crate) disks: Vec<DiskSpec>,
    pub(crate) network: Option<NetworkSpec>,
}

/// The machine's shape in snapshots that were made before there was a network device.
#[derive(Serialize, Deserialize)]
struct WithoutNetwork {
    layout: u16,
    vcpus: u8,
    memory_mib: u32,
    vsock_cid: Option<u32>,
    exit_counter: bool,
    disks: Vec<DiskSpec>,
}

impl From<WithoutNetwork> for MachineSpec {
    fn from(old: WithoutNetwork) -> Self {
        let WithoutNetwork { layout, vcpus, memory_mib, vsock_cid, exit_counter, disks } = old;
        Self { layout, vcpus, memory_mib, vsock_cid, exit_counter, disks, network: None }
    }
}

impl MachineSpec {
    pub(crate) fn new(config: &MachineConfig, disks: Vec<DiskSpec>) -> Result<Self, SpecError> {
        let spec = Self {
            layout: LAYOUT_VERSION,
            vcpus: config.vcpus,
            memory_mib: config.memory_mib,
            vsock_cid: config.vsock_cid,
            exit_counter: config.exit_counter,
            disks,
            network: config.network.as_ref().map(NetworkSpec::new),
        };
        spec.check()?;
        Ok(spec)
    }

    fn check(&self) -> Result<(), SpecError> {
        if self.layout != LAYOUT_VERSION {
            let what = "the machine's layout".to_owned();
            return Err(SpecError::Version { what, version: self.layout, reads: LAYOUT_VERSION });
        }
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return Err(SpecError::Vcpus(self.vcpus));
        }
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&self.memory_mib) {
            return Err(SpecError::Memory(self.memory_mib));
        }
        if self.disks.len() > MAX_DISKS {
            return Err(SpecError::Disks(self.disks.len()));
        }
        self.network.as_ref().map_or(Ok(()), NetworkSpec::check)
    }

    /// The same machine with these limits of its network device, should it have one.
    pub(super) fn limited(mut self, limits: NetworkLimits) -> Result<Self, SpecError> {
        if let Some(network) = &mut self.network {
            (network.to_guest, network.from_guest) =
                (RateLimitSpec::new(limits.to_guest), RateLimitSpec::new(limits.from_guest));
        }
        self.check()?;
        Ok(self)
    }

    pub(crate) fn config(&self) -> MachineConfig {
        MachineConfig {
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
            vsock_cid: self.vsock_cid,
            exit_counter: self.exit_counter,
            network: self.network.as_ref().and_then(NetworkSpec::config),
        }
    }

    /// The bare machine that this one is made of: `ready`, if that is of its size.
    pub(super) fn bare(&self, ready: Option<Bare>, files: &HostFiles) -> Result<Bare, MachineError> {
        let size = Size { vcpus: self.vcpus, memory_bytes: self.memory_bytes() };
        match ready {
            Some(ready) if ready.size() == size => Ok(ready),
            other => {
                // Its end takes the kernel some milliseconds that nobody has to wait for.
                drop(std::thread::Builder::new().name("discard".to_owned()).spawn(move || drop(other)));
                Bare::new(size, files)
            }
        }
    }

    /// The size of a machine that is not known further.
    pub(super) fn size(vcpus: u8, memory_mib: u32) -> Result<Size, SpecError> {
        let config = MachineConfig { vcpus, memory_mib, vsock_cid: None, exit_counter: false, network: None };
        let spec = Self::new(&config, Vec::new())?;
        Ok(Size { vcpus: spec.vcpus, memory_bytes: spec.memory_bytes() })
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        u64::from(self.memory_mib) << 20
    }

    pub(crate) fn encode(&self) -> Result<Versioned, SpecError> {
        Ok(Versioned { version: SPEC_VERSION, bytes: encode("the machine's shape", self)? })
    }

    pub(crate) fn decode(spec: &Versioned) -> Result<Self, SpecError> {
        let what = "the machine's shape";
        let decoded: Self = if spec.version == WITHOUT_NETWORK {
            decode::<WithoutNetwork>(what, spec.version, WITHOUT_NETWORK, &spec.bytes)?.into()
        } else {
            decode(what, spec.version, SPEC_VERSION, &spec.bytes)?
        };
        decoded.check()?;
        Ok(decoded)
    }
}

/// Encodes the state of one part.
pub(crate) fn blob(kind: &str, version: u16, state: &impl Serialize) -> Result<StateBlob, SpecError> {
    Ok(StateBlob { kind: kind.to_owned(), version, bytes: encode(kind, state)? })
}

/// Decodes the state of one part of a snapshot.
pub(crate) fn unblob<T: DeserializeOwned>(blobs: &[StateBlob], kind: &str, version: u16) -> Result<T, SpecError> {
    let blob = blobs.iter().find(|b| b.kind == kind).ok_or_else(|| SpecError::Missing(format!("state {kind:?}")))?;
    decode(kind, blob.version, version, &blob.bytes)
}

fn encode(what: &str, value: &impl Serialize) -> Result<Vec<u8>, SpecError> {
    postcard::to_stdvec(value).map_err(|source| SpecError::Encode { what: what.to_owned(), source })
}

fn decode<T: DeserializeOwned>(what: &str, version: u16, reads: u16, bytes: &[u8]) -> Result<T, SpecError> {
    if version != reads {
        return Err(SpecError::Version { what: what.to_owned(), version, reads });
    }
    let (value, rest) =
        postcard::take_from_bytes(bytes).map_err(|source| SpecError::Decode { what: what.to_owned(), source })?;
    if rest.is_empty() { Ok(value) } else { Err(SpecError::Trailing(what.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> MachineConfig {
        MachineConfig { vcpus: 2, memory_mib: 512, vsock_cid: Some(3), exit_counter: false, network: None }
    }

    #[test]
    fn a_shape_survives_and_an_impossible_one_is_refused_by_name() {
        let spec = MachineSpec::new(&config(), vec![DiskSpec { blocks: 9, read_only: true }]).unwrap();
        assert_eq!(MachineSpec::decode(&spec.encode().unwrap()).unwrap(), spec);
        for (vcpus, memory_mib, part) in [(0, 512, "vcpus"), (9, 512, "vcpus"), (1, 8, "memory"), (1, 9000, "memory")] {
            let bad = MachineConfig { vcpus, memory_mib, ..config() };
            assert!(MachineSpec::new(&bad, vec![]).unwrap_err().to_string().contains(part));
        }
    }

    fn network() -> NetworkConfig {
        NetworkConfig {
            mac: MacAddress::new([2, 0, 0, 0, 0, 1]).unwrap(),
            mtu: 1500,
            to_guest: RateLimit { bytes_per_second: Some(1 << 20), ..RateLimit::default() },
            from_guest: RateLimit::default(),
        }
    }

    #[test]
    fn a_network_device_survives_and_an_impossible_one_is_refused_by_name() {
        let with = |network| MachineConfig { network: Some(network), ..config() };
        let spec = MachineSpec::new(&with(network()), vec![]).unwrap();
        let decoded = MachineSpec::decode(&spec.encode().unwrap()).unwrap();
        assert_eq!(decoded.config(), with(network()));
        let nothing = RateLimit { packets_per_second: Some(0), ..RateLimit::default() };
        let bad = [
            (NetworkConfig { mtu: 67, ..network() }, "mtu"),
            (NetworkConfig { from_guest: nothing, ..network() }, "limit"),
        ];
        for (bad, part) in bad {
            assert!(MachineSpec::new(&with(bad), vec![]).unwrap_err().to_string().contains(part));
        }
        // A restore's limits replace those of the snapshot, and are checked.
        let limits = NetworkLimits {
            to_guest: RateLimit { burst_packets: Some(7), packets_per_second: Some(70), ..RateLimit::default() },
            from_guest: RateLimit::default(),
        };
        let limited = decoded.clone().limited(limits).unwrap();
        assert_eq!(limited.config(), with(NetworkConfig { to_guest: limits.to_guest, ..network() }));
        assert!(decoded.limited(NetworkLimits { from_guest: nothing, ..limits }).is_err());
        // What no request can say, a snapshot can.
        let mut spec = spec;
        spec.network.as_mut().unwrap().mac = [0xff; 6];
        assert!(matches!(MachineSpec::decode(&spec.encode().unwrap()), Err(SpecError::Mac)));
    }

    #[test]
    fn a_shape_of_before_the_network_device_is_read() {
        let disks = vec![DiskSpec { blocks: 9, read_only: false }];
        let old = WithoutNetwork {
            layout: LAYOUT_VERSION,
            vcpus: 2,
            memory_mib: 512,
            vsock_cid: Some(3),
            exit_counter: false,
            disks: disks.clone(),
        };
        let bytes = postcard::to_stdvec(&old).unwrap();
        let decoded = MachineSpec::decode(&Versioned { version: 1, bytes }).unwrap();
        assert_eq!(decoded, MachineSpec::new(&config(), disks).unwrap());
    }

    #[test]
    fn other_versions_missing_states_and_trailing_bytes_are_errors() {
        let mut spec = MachineSpec::new(&config(), vec![]).unwrap().encode().unwrap();
        spec.bytes.push(0);
        assert!(matches!(MachineSpec::decode(&spec), Err(SpecError::Trailing(_))));
        spec.version = 7;
        assert!(matches!(MachineSpec::decode(&spec), Err(SpecError::Version { version: 7, .. })));
        let blobs = [blob("a", 1, &5_u32).unwrap()];
        assert_eq!(unblob::<u32>(&blobs, "a", 1).unwrap(), 5);
        assert!(matches!(unblob::<u32>(&blobs, "b", 1), Err(SpecError::Missing(_))));
        assert!(matches!(unblob::<u32>(&blobs, "a", 2), Err(SpecError::Version { .. })));
    }
}
