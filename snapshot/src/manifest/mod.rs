//! The manifest: one object that describes one snapshot whole, whatever generations wrote its pages.
//!
//! `Manifest` is the value; [`Manifest::encode`] and [`Manifest::decode`] are the only way to and from bytes. See `format.rs` for
//! the bytes: a fixed header, a section table, sections whose digests are checked before they are decoded. Decoding accepts
//! untrusted input: it allocates no more than [`Manifest::decode_bound`] and refuses what it does not know by name.

mod format;
mod sections;
mod wire;

use std::{
    collections::{BTreeSet, HashSet},
    fmt,
};

use serde::{Deserialize, Serialize};

use crate::{
    ids::{CommitId, Digest},
    image::{ImageMap, MapError, PageRef},
    pack::{self, Codec, PackEntry},
    page,
    seal::{self, DataKey, DataKeyId, DataKeys, SealError, SealedState, Seals, TAG, WrappedKey},
};

/// The format version this build writes and reads.
pub const FORMAT_VERSION: u16 = 1;
/// Bytes of the fixed header.
pub const HEADER_LEN: usize = 64;
/// Bytes of a manifest at most.
pub const MAX_LEN: u64 = 256 << 20;
/// Bytes of a pack's key at most, as in S3.
const MAX_KEY: usize = 1024;

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
    /// VM, vCPU and device state. Empty while it is sealed.
    pub state: Vec<StateBlob>,
    /// The same, encrypted.
    pub sealed_state: Option<SealedState>,
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
    /// Sections in the table; bytes of the seal, of a sealed manifest.
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
    SectionVersion { section: &'static str, version: u16, reads: u16 },
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
    #[error(transparent)]
    Seal(#[from] SealError),
}

impl fmt::Display for ImageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => f.write_str("memory"),
            Self::Disk(n) => write!(f, "disk {n}"),
        }
    }
}

impl Header {
    /// Reads the header from the first 64 bytes or more.
    pub fn read(bytes: &[u8]) -> Result<Self, ManifestError> {
        format::read_header(bytes)
    }
}

impl Manifest {
    /// The manifest as bytes. Packs that no page needs are left out and the rest renumbered; refuses what [`Manifest::decode`] would refuse.
    pub fn encode(&self) -> Result<Vec<u8>, ManifestError> {
        self.check()?;
        let used = self.used_packs();
        if used.contains(&false) {
            let mut pruned = self.clone();
            pruned.prune();
            return pruned.encode();
        }
        let mut sections = vec![
            (&format::PLATFORM, sections::put_small("platform", &self.platform)?),
            (&format::SPEC, sections::put_small("spec", &self.spec)?),
            (&format::RECORD, sections::put_small("record", &self.record)?),
        ];
        if let Some(lineage) = &self.lineage {
            sections.push((&format::LINEAGE, sections::put_small("lineage", lineage)?));
        }
        sections.extend([
            (&format::PACKS, sections::put_packs(&self.packs)),
            (&format::IMAGES, sections::put_images(&self.images)),
            (&format::STATE, sections::put_small("state", &self.state)?),
            (&format::BOOT, sections::put_small("boot", &self.boot)?),
        ]);
        if self.packs.iter().any(|pack| pack.sealed.is_some()) {
            sections.push((&format::KEYS, sections::put_keys(&self.packs)));
        }
        if let Some(state) = &self.sealed_state {
            sections.push((&format::SEALED_STATE, sections::put_small("sealed state", state)?));
        }
        format::write(self.arch, &sections)
    }

    /// Bytes that [`Manifest::decode`] allocates at most at one time for an input of `len` bytes. An input byte buys most as a run of an
    /// image (two runs of 40 bytes for three bytes, in a list that grows by doubling); lists of the small sections grow from up to 1 MiB.
    pub const fn decode_bound(len: usize) -> usize {
        (4 << 20) + 96 * len
    }

    /// Reads a manifest, out of its envelope if it has one, whose MAC is not looked at: see [`Manifest::open`]. Every digest is checked before
    /// what it covers is decoded.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        match seal::split_manifest(bytes)? {
            Some(split) => Self::decode_plain(split.manifest),
            None => Self::decode_plain(bytes),
        }
    }

    fn decode_plain(bytes: &[u8]) -> Result<Self, ManifestError> {
        let found = format::Sections::read(bytes)?;
        let mut manifest = Self {
            arch: found.arch,
            platform: sections::small("platform", found.need(&format::PLATFORM)?)?,
            spec: sections::small("spec", found.need(&format::SPEC)?)?,
            record: found
                .get(&format::RECORD)
                .map(|body| sections::small("record", body))
                .transpose()?
                .unwrap_or_default(),
            lineage: found.get(&format::LINEAGE).map(|body| sections::small("lineage", body)).transpose()?,
            packs: sections::packs(found.need(&format::PACKS)?)
                .map_err(|error| ManifestError::Malformed { section: "packs", what: error.to_string() })?,
            images: sections::images(found.need(&format::IMAGES)?)?,
            state: sections::small("state", found.need(&format::STATE)?)?,
            sealed_state: found
                .get(&format::SEALED_STATE)
                .map(|body| sections::small("sealed state", body))
                .transpose()?,
            boot: found.get(&format::BOOT).map(|body| sections::small("boot", body)).transpose()?.unwrap_or_default(),
        };
        if let Some(body) = found.get(&format::KEYS) {
            sections::keys(body, &mut manifest.packs)
                .map_err(|error| ManifestError::Malformed { section: "keys", what: error.to_string() })?;
        }
        manifest.check()?;
        Ok(manifest)
    }

    /// Reads the manifest that a head names, once its digest is right and it is known to be what was sealed for its place; and the data keys
    /// that came with it.
    pub fn open(named: &ManifestRef, bytes: &[u8], seals: &Seals) -> Result<(Self, Vec<WrappedKey>), ManifestError> {
        let opened = seals.open_manifest(&named.key, bytes)?;
        let got = Digest::of(bytes);
        if got != named.digest {
            return Err(ManifestError::WholeDigest { expected: named.digest, got });
        }
        let manifest = Self::decode_plain(opened.manifest)?;
        if let Some(missing) =
            manifest.keys_needed().into_iter().find(|id| opened.keys.iter().all(|wrapped| wrapped.id != *id))
        {
            return Err(SealError::NoDataKey(missing).into());
        }
        Ok((manifest, opened.keys))
    }

    /// The data keys that its packs and its state need.
    pub fn keys_needed(&self) -> BTreeSet<DataKeyId> {
        let state = self.sealed_state.iter().map(|state| state.key);
        self.packs.iter().filter_map(|pack| pack.sealed).chain(state).collect()
    }

    /// Whether there is no state to go on from: it is of a stop.
    pub fn is_disks_only(&self) -> bool {
        self.state.is_empty() && self.sealed_state.is_none()
    }

    /// Encrypts the state. `salt` is random.
    pub fn seal_state(&mut self, key: &DataKey, salt: [u8; 32]) -> Result<(), ManifestError> {
        if !self.state.is_empty() {
            self.sealed_state = Some(key.seal_state(salt, sections::put_small("state", &self.state)?));
            self.state.clear();
        }
        Ok(())
    }

    /// Decrypts the state, where it is encrypted.
    pub fn open_state(&mut self, keys: &DataKeys) -> Result<(), ManifestError> {
        let Some(sealed) = &self.sealed_state else { return Ok(()) };
        let key = keys.get(sealed.key).ok_or(SealError::NoDataKey(sealed.key))?;
        self.state = sections::small("state", &key.open_state(sealed)?)?;
        self.sealed_state = None;
        self.check()
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
        let used = self.used_packs();
        let mut next = 0;
        let renumbered: Vec<Option<u32>> = used
            .iter()
            .map(|&used| {
                used.then(|| {
                    next += 1;
                    next - 1
                })
            })
            .collect();
        let new_number = |old: u32| renumbered.get(old as usize).copied().flatten();
        for image in &mut self.images {
            // A number without a pack stays one: `check` names it.
            image.map = image.map.renumbered(|old| new_number(old).unwrap_or(old));
        }
        self.boot.pack = self.boot.pack.and_then(new_number);
        let mut used = used.into_iter();
        self.packs.retain(|_| used.next().unwrap_or(true));
    }

    /// For each pack, whether any page needs it.
    fn used_packs(&self) -> Vec<bool> {
        let mut used = vec![false; self.packs.len()];
        for run in self.images.iter().flat_map(|image| image.map.runs()) {
            if let PageRef::Pack { pack, .. } = run.at
                && let Some(used) = used.get_mut(pack as usize)
            {
                *used = true;
            }
        }
        used
    }

    /// Checks everything that [`Manifest::encode`] promises and [`Manifest::decode`] demands.
    pub fn check(&self) -> Result<(), ManifestError> {
        let mut keys = HashSet::new();
        for entry in &self.packs {
            let wrong = |what| ManifestError::Pack { key: entry.key.clone(), what };
            check_pack(entry).map_err(wrong)?;
            if !keys.insert(entry.key.as_str()) {
                return Err(wrong("listed twice"));
            }
        }
        let mut disks = 0;
        for (position, image) in self.images.iter().enumerate() {
            match image.kind {
                ImageKind::Memory if position == 0 => {}
                ImageKind::Disk(n) if n == disks => disks += 1,
                _ => {
                    return Err(ManifestError::Images("images must be memory first, then disks in order from 0"));
                }
            }
            let blocks = image.base.map_or(0, |base| base.blocks);
            image
                .map
                .check(&self.packs, blocks)
                .map_err(|source| ManifestError::Map { image: image.kind.to_string(), source })?;
        }
        if self.sealed_state.is_some() && !self.state.is_empty() {
            let what = "there is one that is not".to_owned();
            return Err(ManifestError::Malformed { section: "sealed state", what });
        }
        let mut kinds = HashSet::new();
        for blob in &self.state {
            if !kinds.insert(blob.kind.as_str()) {
                return Err(ManifestError::Malformed {
                    section: "state",
                    what: format!("{:?} appears twice", blob.kind),
                });
            }
        }
        let boot = |what: &str| ManifestError::Malformed { section: "boot", what: what.to_owned() };
        if self.boot.pack.is_some_and(|pack| pack as usize >= self.packs.len()) {
            return Err(boot("the boot pack is not in the pack list"));
        }
        for touch in &self.boot.first_touch {
            let pages = self.images.get(touch.image as usize).map_or(0, |image| image.map.pages());
            if touch.start > pages || touch.pages > pages - touch.start {
                return Err(boot("a first touch is beyond its image"));
            }
        }
        Ok(())
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

/// The header of a sealed manifest, with the bytes of its seal, of the whole, and the seal's digest.
pub(crate) fn sealed_header(seal: u32, len: u64, digest: Digest) -> Vec<u8> {
    format::header(seal::SEALED_VERSION, 1, seal, len, digest)
}

fn check_pack(entry: &PackEntry) -> Result<(), &'static str> {
    if entry.key.is_empty() || entry.key.len() > MAX_KEY {
        return Err("its key is empty or longer than 1024 bytes");
    }
    let tag = if entry.sealed.is_some() { TAG as u64 } else { 0 };
    let mut offset = pack::HEADER_LEN;
    for frame in &entry.frames {
        if frame.pages == 0 || frame.pages > pack::FRAME_PAGES {
            return Err("a frame has no pages, or more than 64");
        }
        let raw = page::bytes(frame.pages.into());
        let stored = u64::from(frame.stored_len);
        let fits = match frame.codec {
            Codec::Raw => stored == raw + tag,
            Codec::Lz4 | Codec::Zstd => tag < stored && stored < raw + tag,
        };
        if !fits {
            return Err("a frame's stored length does not fit its pages and codec");
        }
        if u64::from(frame.offset) != offset {
            return Err("its frames overlap or leave a gap");
        }
        offset += stored;
    }
    if offset != u64::from(entry.size) {
        return Err("its size is not that of its frames");
    }
    if offset > pack::MAX_BOOT_PACK + page::bytes(pack::FRAME_PAGES.into()) {
        return Err("it is larger than a pack may be");
    }
    Ok(())
}

#[cfg(test)]
mod tests;
