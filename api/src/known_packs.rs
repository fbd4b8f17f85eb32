//! The packs of a committed manifest: they are in the store for certain, with the size and digest that it says, so that the next commit may
//! name them again without asking the store.

use stasis_snapshot::ids::Digest;
use stasis_snapshot::manifest::Manifest;
use stasis_snapshot::pack::PackEntry;
use std::collections::HashMap;

/// The packs of one manifest, and the disks of templates that it builds on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KnownPacks {
    /// Size and digest of each pack, by key.
    packs: HashMap<String, (u32, Digest)>,
    bases: Vec<Digest>,
}

impl KnownPacks {
    /// Those that `manifest`, which was committed, names.
    pub fn of(manifest: &Manifest) -> Self {
        Self {
            packs: manifest.packs.iter().map(|pack| (pack.key.clone(), (pack.size, pack.digest))).collect(),
            bases: manifest.images.iter().filter_map(|image| image.base).map(|base| base.digest).collect(),
        }
    }

    /// Whether there is one with this key.
    pub fn names(&self, key: &str) -> bool {
        self.packs.contains_key(key)
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
