//! The packs of a committed manifest: they are in the store for certain, with the size and digest that it says, so that the next commit may
//! name them again without asking the store.

use crate::sources::UnixMs;
use stasis_snapshot::grant::GrantedObject;
use stasis_snapshot::ids::Digest;
use stasis_snapshot::manifest::Manifest;
use stasis_snapshot::pack::PackEntry;
use stasis_snapshot::seal::WrappedKey;
use std::collections::HashMap;
use std::sync::OnceLock;

/// The packs of one manifest, and the disks of templates that it builds on.
#[derive(Debug, Default)]
pub struct KnownPacks {
    /// Size and digest of each pack, by key.
    packs: HashMap<String, (u32, Digest)>,
    bases: Vec<Digest>,
    data_keys: Vec<WrappedKey>,
    signed: OnceLock<SignedGrants>,
}

/// Leave to read packs, which a wake need not wait for: presigned URLs.
#[derive(Clone, Debug)]
pub struct SignedGrants {
    /// One for each pack.
    pub objects: Vec<GrantedObject>,
    /// When they were signed, ms since the epoch.
    pub signed_ms: UnixMs,
}

impl KnownPacks {
    /// Those that `manifest`, which was committed, names, and the data keys that came with it.
    pub fn of(manifest: &Manifest, data_keys: Vec<WrappedKey>) -> Self {
        Self {
            packs: manifest.packs.iter().map(|pack| (pack.key.clone(), (pack.size, pack.digest))).collect(),
            bases: manifest.images.iter().filter_map(|image| image.base).map(|base| base.digest).collect(),
            data_keys,
            signed: OnceLock::new(),
        }
    }

    /// Whether there is one with this key.
    pub fn names(&self, key: &str) -> bool {
        self.packs.contains_key(key)
    }

    /// Whether the other one is of the same packs, disks and keys.
    pub fn equals(&self, other: &Self) -> bool {
        (&self.packs, &self.bases, &self.data_keys) == (&other.packs, &other.bases, &other.data_keys)
    }

    /// The keys of packs and states that are encrypted.
    pub fn data_keys(&self) -> &[WrappedKey] {
        &self.data_keys
    }

    /// Leave to read them, if it was signed since `since`.
    pub fn signed(&self, since: UnixMs) -> Option<&SignedGrants> {
        self.signed.get().filter(|signed| signed.signed_ms >= since)
    }

    /// Remembers leave to read them. The first one stays.
    pub fn remember(&self, signed: SignedGrants) {
        let _ = self.signed.set(signed);
    }

    /// Their keys, in no order.
    pub fn keys(&self) -> impl Iterator<Item = &String> {
        self.packs.keys()
    }

    /// Digests of the disks of templates that the manifest refers to.
    pub fn bases(&self) -> &[Digest] {
        &self.bases
    }

    /// Whether it is this very pack.
    pub fn has(&self, pack: &PackEntry) -> bool {
        self.packs.get(&pack.key) == Some(&(pack.size, pack.digest))
    }
}
