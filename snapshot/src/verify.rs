//! Verify: every digest of a snapshot against a store, without restoring it.

use crate::{
    manifest::{Manifest, ManifestRef},
    store::{ObjectStore, StoreError},
};

/// One thing that is wrong with one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Store key.
    pub key: String,
    /// What is wrong with it.
    pub what: String,
}

/// What was checked and what was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Packs looked at.
    pub packs: u32,
    /// Frames whose digest matched and that decoded.
    pub frames: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Everything wrong; empty when the snapshot is sound.
    pub problems: Vec<Problem>,
}

/// Checks the manifest and all its packs. An error means the store could not be asked; damage and missing objects are in the report.
pub async fn verify(store: &dyn ObjectStore, manifest: &ManifestRef) -> Result<Report, StoreError> {
    let _ = (store, manifest);
    todo!()
}

/// Checks all packs of a manifest.
pub async fn verify_packs(store: &dyn ObjectStore, manifest: &Manifest) -> Result<Report, StoreError> {
    let _ = (store, manifest);
    todo!()
}
