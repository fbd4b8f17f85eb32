//! The manifest: one object that describes one snapshot whole, whatever generations wrote its pages.
//!
//! `Manifest` is the value; [`Manifest::encode`] and [`Manifest::decode`] are the only way to and from bytes. See `format` for
//! the bytes: a fixed header, a section table, sections whose digests are checked before they are decoded. Decoding accepts
//! untrusted input: it allocates no more than a small multiple of the input and refuses what it does not know by name.

use serde::{Deserialize, Serialize};

use crate::{
    ids::{CommitId, Digest},
    image::{ImageMap, MapError},
    pack::PackEntry,
};

/// The format version this build writes and reads.
pub const FORMAT_VERSION: u16 = 1;
/// Bytes of the fixed header.
pub const HEADER_LEN: usize = 64;
/// Bytes of a manifest at most.
pub const MAX_LEN: u64 = 256 << 20;

/// Processor architecture of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    /// x86-64.
    X86_64,
}

/// Where and by what the snapshot was made: what a resume must be able to refuse by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// Version of the VMM.
    pub vmm_version: String,
    /// CPUID vendor string.
    pub cpu_vendor: String,
    /// CPU features the guest was given. Opaque here: the VMM writes and compares them.
    pub cpu_features: Vec<String>,
    /// `uname -r` of the host.
    pub host_kernel: String,
}

/// Bytes of somebody else's type, with that type's version.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versioned {
    /// Version of the type.
    pub version: u16,
    /// Its encoding.
    pub bytes: Vec<u8>,
}

/// Names a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestRef {
    /// Store key.
    pub key: String,
    /// BLAKE3 of the whole object.
    pub digest: Digest,
}

/// Which commit wrote the manifest, and what it was built on. For garbage collection: reading a snapshot never follows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage {
    /// Sandbox id.
    pub sandbox: String,
    /// Sequence number of the commit.
    pub seq: u64,
    /// Epoch of the owner.
    pub epoch: u64,
    /// Commit id.
    pub commit: CommitId,
    /// The manifest that this one was built on.
    pub parent: Option<ManifestRef>,
}

/// What an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImageKind {
    /// Guest memory, in guest physical order without the MMIO gap.
    Memory,
    /// The block device with this number, from 0.
    Disk(u32),
}

/// The template disk that an image's `Base` pages refer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// The template's digest.
    pub digest: Digest,
    /// Its length in 4 KiB blocks.
    pub blocks: u64,
}

/// One image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// What it is.
    pub kind: ImageKind,
    /// Where its pages are; its length is the image's.
    pub map: ImageMap,
    /// The template disk, where pages refer to one.
    pub base: Option<Base>,
}

/// State of a device, a vCPU or the VM. Opaque here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateBlob {
    /// What it is the state of, such as `vcpu/0` or `blk/1`.
    pub kind: String,
    /// Version of its encoding.
    pub version: u16,
    /// Its encoding.
    pub bytes: Vec<u8>,
}

/// Pages in the order in which the guest is expected to touch them first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Touch {
    /// Position in the image list.
    pub image: u32,
    /// First page.
    pub start: u64,
    /// How many.
    pub pages: u64,
}

/// What to fetch first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// Position of the boot pack in the pack list, where there is one.
    pub pack: Option<u32>,
    /// First-touch order.
    pub first_touch: Vec<Touch>,
}

/// One snapshot, whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Architecture.
    pub arch: Arch,
    /// Where it was made.
    pub platform: Platform,
    /// The machine's shape: the VMM's type.
    pub spec: Versioned,
    /// The sandbox's record: the supervisor's type. Empty in a draft.
    pub record: Versioned,
    /// Which commit wrote it. `None` in a draft.
    pub lineage: Option<Lineage>,
    /// Every pack that any page needs.
    pub packs: Vec<PackEntry>,
    /// Memory, then disks in order.
    pub images: Vec<Image>,
    /// VM, vCPU and device state.
    pub state: Vec<StateBlob>,
    /// What to fetch first.
    pub boot: Boot,
}

/// What the 64 header bytes say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Format version.
    pub version: u16,
    /// Architecture, as a number: 1 is x86-64.
    pub arch: u16,
    /// Sections in the table.
    pub sections: u32,
    /// Bytes of the whole manifest.
    pub len: u64,
    pub(crate) table_digest: Digest,
}

/// Why bytes are no manifest of this build, or a manifest may not be written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum ManifestError {
    #[error("not a manifest: the first bytes are not the manifest magic")]
    Magic,
    #[error("manifest is truncated: {got} bytes, expected {expected}")]
    Truncated { got: u64, expected: u64 },
    #[error("manifest is followed by {0} bytes that do not belong to it")]
    Trailing(u64),
    #[error("manifest header is damaged: its check does not match")]
    HeaderCheck,
    #[error("manifest is format version {0}; this build reads {FORMAT_VERSION}")]
    Version(u16),
    #[error("manifest is for architecture {0}; this build reads 1 (x86-64)")]
    Arch(u16),
    #[error("manifest of {0} bytes: at most {MAX_LEN}")]
    TooLarge(u64),
    #[error("digest of the whole manifest does not match: expected {expected}, got {got}")]
    WholeDigest { expected: Digest, got: Digest },
    #[error("digest of the section table does not match")]
    TableDigest,
    #[error("section table is malformed: {0}")]
    Table(&'static str),
    #[error("digest of section {0} does not match")]
    SectionDigest(String),
    #[error("manifest needs section {0}, which this build does not know")]
    UnknownSection(u32),
    #[error("section {section} is version {version}; this build reads {reads}")]
    SectionVersion {
        section: &'static str,
        version: u16,
        reads: u16,
    },
    #[error("section {0} is missing")]
    MissingSection(&'static str),
    #[error("section {section} is malformed: {what}")]
    Malformed { section: &'static str, what: String },
    #[error("image {image}: {source}")]
    Map { image: String, source: MapError },
    #[error("pack {key:?}: {what}")]
    Pack { key: String, what: &'static str },
    #[error("{0}")]
    Images(&'static str),
}

impl Header {
    /// Reads the header from the first 64 bytes or more.
    pub fn read(bytes: &[u8]) -> Result<Self, ManifestError> {
        let _ = bytes;
        todo!()
    }
}

impl Manifest {
    /// The manifest as bytes. Packs that no page needs are left out and the rest renumbered; refuses what [`Manifest::decode`] would refuse.
    pub fn encode(&self) -> Result<Vec<u8>, ManifestError> {
        todo!()
    }

    /// Reads a manifest. Every digest is checked before what it covers is decoded.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        let _ = bytes;
        todo!()
    }

    /// Reads a manifest whose digest is known from elsewhere (the head): checks that first.
    pub fn decode_checked(bytes: &[u8], expected: Digest) -> Result<Self, ManifestError> {
        let got = Digest::of(bytes);
        if got != expected {
            return Err(ManifestError::WholeDigest { expected, got });
        }
        Self::decode(bytes)
    }

    /// Drops packs that no page needs and renumbers the rest.
    pub fn prune(&mut self) {
        todo!()
    }

    /// Checks everything that [`Manifest::encode`] promises and [`Manifest::decode`] demands.
    pub fn check(&self) -> Result<(), ManifestError> {
        todo!()
    }

    /// The memory image.
    pub fn memory(&self) -> Option<&Image> {
        self.images.iter().find(|i| i.kind == ImageKind::Memory)
    }

    /// The image of disk `n`.
    pub fn disk(&self, n: u32) -> Option<&Image> {
        self.images.iter().find(|i| i.kind == ImageKind::Disk(n))
    }

    /// The state with this kind.
    pub fn state_of(&self, kind: &str) -> Option<&StateBlob> {
        self.state.iter().find(|blob| blob.kind == kind)
    }
}
