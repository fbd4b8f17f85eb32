//! The packs of a committed manifest: they are in the store for certain, with the size and digest that it says, so that the next commit may
//! name them again without asking the store.

use stasis_snapshot::ids::Digest;
use stasis_snapshot::manifest::Manifest;
use stasis_snapshot::pack::PackEntry;
use std::collections::HashMap;

/// Size and digest of each pack, by key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KnownPacks(HashMap<String, (u32, Digest)>);

impl KnownPacks {
    /// Those that `manifest`, which was committed, names.
    pub fn of(manifest: &Manifest) -> Self {
        Self(manifest.packs.iter().map(|pack| (pack.key.clone(), (pack.size, pack.digest))).collect())
    }

    /// Whether there is one with this key.
    pub fn names(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    /// Whether it is this very pack.
    pub fn has(&self, pack: &PackEntry) -> bool {
        self.0.get(&pack.key) == Some(&(pack.size, pack.digest))
    }
}
