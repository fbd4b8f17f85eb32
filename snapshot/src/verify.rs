//! Verify: every digest of a snapshot against a store, without restoring it.

use futures::{StreamExt, stream};
use tokio::task::spawn_blocking;

use crate::{
    ids::Digest,
    manifest::{Manifest, ManifestRef},
    pack::{self, PackEntry, PackError},
    store::{ErrorKind, ObjectStore, Operation, StoreError},
};

/// Packs read at a time: each is in memory whole.
const IN_FLIGHT: usize = 4;

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
    let mut report = Report::default();
    let object = match store.get(&manifest.key).await {
        Ok(object) => object,
        Err(error) => {
            report.missing_or(error)?;
            return Ok(report);
        }
    };
    report.bytes += object.bytes.len() as u64;
    match Manifest::decode_checked(&object.bytes, manifest.digest) {
        Ok(decoded) => {
            let packs = verify_packs(store, &decoded).await?;
            report.add(packs);
        }
        Err(error) => report.problem(&manifest.key, error.to_string()),
    }
    Ok(report)
}

/// Checks all packs of a manifest.
pub async fn verify_packs(store: &dyn ObjectStore, manifest: &Manifest) -> Result<Report, StoreError> {
    let mut checks = stream::iter(&manifest.packs).map(|entry| verify_pack(store, entry)).buffered(IN_FLIGHT);
    let mut report = Report::default();
    while let Some(checked) = checks.next().await {
        report.add(checked?);
    }
    Ok(report)
}

async fn verify_pack(store: &dyn ObjectStore, entry: &PackEntry) -> Result<Report, StoreError> {
    let mut report = Report { packs: 1, ..Report::default() };
    let object = match store.get(&entry.key).await {
        Ok(object) => object,
        Err(error) => {
            report.missing_or(error)?;
            return Ok(report);
        }
    };
    report.bytes += object.bytes.len() as u64;
    let expected = entry.clone();
    let checked = spawn_blocking(move || {
        check_pack(&expected, &object.bytes, &mut report);
        report
    });
    checked.await.map_err(|error| StoreError::new(ErrorKind::Other, Operation::Get, &entry.key).because(error))
}

fn check_pack(entry: &PackEntry, bytes: &[u8], report: &mut Report) {
    if bytes.len() as u64 != u64::from(entry.size) {
        let what = PackError::Length { got: bytes.len() as u64, expected: u64::from(entry.size) };
        report.problem(&entry.key, what.to_string());
    } else if Digest::of(bytes) != entry.digest {
        report.problem(&entry.key, PackError::Digest.to_string());
    }
    if let Err(what) = pack::check_header(bytes) {
        report.problem(&entry.key, what.to_string());
    }
    for (number, frame) in entry.frames.iter().enumerate() {
        let start = (frame.offset as usize).min(bytes.len());
        let end = (start + frame.stored_len as usize).min(bytes.len());
        match pack::decode_frame(frame, &bytes[start..end]) {
            Ok(_) => report.frames += 1,
            Err(what) => report.problem(&entry.key, format!("frame {number}: {what}")),
        }
    }
}

impl Report {
    fn problem(&mut self, key: &str, what: String) {
        self.problems.push(Problem { key: key.to_owned(), what });
    }

    /// Notes what is wrong with the object itself; hands back what is wrong with the store.
    fn missing_or(&mut self, error: StoreError) -> Result<(), StoreError> {
        match error.kind {
            ErrorKind::NotFound | ErrorKind::Corrupt => {
                self.problem(&error.key, error.kind.to_string());
                Ok(())
            }
            _ => Err(error),
        }
    }

    fn add(&mut self, other: Self) {
        self.packs += other.packs;
        self.frames += other.frames;
        self.bytes += other.bytes;
        self.problems.extend(other.problems);
    }
}
