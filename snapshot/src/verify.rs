//! Verify: every digest of a snapshot, or of a whole bucket, without restoring anything; with the operator's keys every seal as well. What cannot
//! be checked for want of a key is counted.

use std::collections::{BTreeMap, BTreeSet};

use futures::{StreamExt, stream};
use serde::Serialize;
use tokio::task::spawn_blocking;

use crate::{
    commit::{Head, HeadState},
    ids::Digest,
    layout::{self, Part, Place},
    manifest::{Manifest, ManifestRef},
    pack::{self, PackEntry, PackError},
    seal::{self, DataKey, DataKeys, PackCipher, Seals},
    store::{ErrorKind, Listed, ObjectStore, Operation, StoreError},
};

/// Packs read at a time: each is in memory whole.
const IN_FLIGHT: usize = 4;

/// One thing that is wrong with one object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Store key.
    pub key: String,
    /// What is wrong with it.
    pub what: String,
}

/// What was checked and what was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Packs looked at.
    pub packs: u32,
    /// Frames whose digest matched and that decoded.
    pub frames: u64,
    /// Frames whose digest matched and that are encrypted under a key that was not there.
    pub frames_not_opened: u64,
    /// Heads and manifests whose seal could not be checked, there being no key.
    pub seals_not_checked: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Everything wrong; empty when the snapshot is sound.
    pub problems: Vec<Problem>,
}

/// What was found in a bucket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BucketReport {
    /// Heads read.
    pub heads: u64,
    /// Manifests read.
    pub manifests: u64,
    /// Packs and frames; everything wrong with any object.
    #[serde(flatten)]
    pub checked: Report,
    /// Objects that no head names. A capture under way puts such there too; the collector knows which may go.
    pub unreachable: Vec<String>,
    /// Their bytes.
    pub unreachable_bytes: u64,
}

/// Checks every head of `tenant` (or of all), every manifest that one names, and every pack that one of these names, each once.
pub async fn verify_bucket(
    store: &dyn ObjectStore,
    tenant: Option<&str>,
    seals: &Seals,
) -> Result<BucketReport, StoreError> {
    let prefix = layout::tenant(tenant)
        .map_err(|error| StoreError::new(ErrorKind::Other, Operation::List, "v1/").because(error))?;
    let mut objects: Vec<Listed> = Vec::new();
    let mut next: Option<String> = None;
    loop {
        let page = store.list(&prefix, next.as_deref()).await?;
        objects.extend(page.objects.into_iter().filter(|object| Place::of(&object.key).is_some()));
        match page.next {
            Some(more) => next = Some(more),
            None => break,
        }
    }
    let mut report = BucketReport::default();
    let mut named: BTreeMap<String, Digest> = BTreeMap::new();
    for object in objects.iter().filter(|o| Place::of(&o.key).is_some_and(|place| place.part == Part::Head)) {
        report.heads += 1;
        match store.get(&object.key).await.map(|found| report.checked.head(&object.key, &found.bytes, seals)) {
            Ok(Ok(head)) => {
                if let Some(manifest) = head.manifest {
                    named.insert(manifest.key, manifest.digest);
                } else if head.state == HeadState::Stopped {
                    report.checked.problem(&object.key, "it is stopped and names no manifest".to_owned());
                }
            }
            Ok(Err(what)) => report.checked.problem(&object.key, what),
            Err(error) => report.checked.missing_or(error)?,
        }
    }
    let mut reachable: BTreeSet<String> = named.keys().cloned().collect();
    // By key and digest: two manifests that disagree about a pack are both heard.
    let mut packs: BTreeMap<(String, Digest), PackEntry> = BTreeMap::new();
    let mut keys = DataKeys::default();
    for (key, digest) in named {
        let object = match store.get(&key).await {
            Ok(object) => object,
            Err(error) => {
                report.checked.missing_or(error)?;
                continue;
            }
        };
        report.manifests += 1;
        report.checked.bytes += object.bytes.len() as u64;
        let named = ManifestRef { key, digest };
        match report.checked.manifest(&named, &object.bytes, seals) {
            Ok((manifest, found)) => {
                found.iter().cloned().for_each(|key| keys.insert(key));
                packs.extend(manifest.packs.into_iter().map(|pack| ((pack.key.clone(), pack.digest), pack)));
            }
            Err(what) => report.checked.problem(&named.key, what),
        }
    }
    reachable.extend(packs.keys().map(|(key, _)| key.clone()));
    let mut checks = stream::iter(packs.values()).map(|entry| verify_pack(store, entry, &keys)).buffered(IN_FLIGHT);
    while let Some(checked) = checks.next().await {
        report.checked.add(checked?);
    }
    drop(checks);
    for object in objects {
        let generation = matches!(Place::of(&object.key).map(|place| place.part), Some(Part::Generation { .. }));
        if generation && !reachable.contains(&object.key) {
            report.unreachable_bytes += object.size;
            report.unreachable.push(object.key);
        }
    }
    Ok(report)
}

/// Checks the manifest and all its packs. An error means the store could not be asked; damage and missing objects are in the report.
pub async fn verify(store: &dyn ObjectStore, manifest: &ManifestRef, seals: &Seals) -> Result<Report, StoreError> {
    let mut report = Report::default();
    let object = match store.get(&manifest.key).await {
        Ok(object) => object,
        Err(error) => {
            report.missing_or(error)?;
            return Ok(report);
        }
    };
    report.bytes += object.bytes.len() as u64;
    match report.manifest(manifest, &object.bytes, seals) {
        Ok((decoded, keys)) => {
            let packs = verify_packs(store, &decoded, &keys).await?;
            report.add(packs);
        }
        Err(what) => report.problem(&manifest.key, what),
    }
    Ok(report)
}

/// Checks all packs of a manifest; encrypted ones by their digests alone where their key is not among `keys`.
pub async fn verify_packs(store: &dyn ObjectStore, manifest: &Manifest, keys: &DataKeys) -> Result<Report, StoreError> {
    let mut checks = stream::iter(&manifest.packs).map(|entry| verify_pack(store, entry, keys)).buffered(IN_FLIGHT);
    let mut report = Report::default();
    while let Some(checked) = checks.next().await {
        report.add(checked?);
    }
    Ok(report)
}

async fn verify_pack(store: &dyn ObjectStore, entry: &PackEntry, keys: &DataKeys) -> Result<Report, StoreError> {
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
    let key = entry.sealed.and_then(|id| keys.get(id)).cloned();
    let checked = spawn_blocking(move || {
        check_pack(&expected, &object.bytes, key.as_ref(), &mut report);
        report
    });
    checked.await.map_err(|error| StoreError::new(ErrorKind::Other, Operation::Get, &entry.key).because(error))
}

fn check_pack(entry: &PackEntry, bytes: &[u8], key: Option<&DataKey>, report: &mut Report) {
    let cipher = key.map(|key| PackCipher::new(key, &entry.key));
    if bytes.len() as u64 != u64::from(entry.size) {
        let what = PackError::Length { got: bytes.len() as u64, expected: u64::from(entry.size) };
        report.problem(&entry.key, what.to_string());
    } else if Digest::of(bytes) != entry.digest {
        report.problem(&entry.key, PackError::Digest.to_string());
    }
    if let Err(what) = pack::check_header(bytes) {
        report.problem(&entry.key, what.to_string());
    }
    for (number, frame) in (0..).zip(&entry.frames) {
        let start = (frame.offset as usize).min(bytes.len());
        let end = (start + frame.stored_len as usize).min(bytes.len());
        let stored = &bytes[start..end];
        if entry.sealed.is_some() && cipher.is_none() {
            match pack::check_frame(frame, stored) {
                Ok(()) => report.frames_not_opened += 1,
                Err(what) => report.problem(&entry.key, format!("frame {number}: {what}")),
            }
            continue;
        }
        match pack::decode_frame(frame, number, stored, cipher.as_ref()) {
            Ok(_) => report.frames += 1,
            Err(what) => report.problem(&entry.key, format!("frame {number}: {what}")),
        }
    }
}

impl Report {
    /// A head, its seal checked as far as there are keys.
    fn head(&mut self, key: &str, bytes: &[u8], seals: &Seals) -> Result<Head, String> {
        if seals.is_on() {
            seals.open_head(key, bytes).map_err(|error| error.to_string())?;
        } else if seal::head_sealed_under(bytes).is_some() {
            self.seals_not_checked += 1;
        }
        Head::decode(bytes).map_err(|error| error.to_string())
    }

    /// A manifest, its seal checked as far as there are keys, and the data keys that came with it.
    fn manifest(&mut self, named: &ManifestRef, bytes: &[u8], seals: &Seals) -> Result<(Manifest, DataKeys), String> {
        if seals.is_on() {
            let (manifest, keys) = Manifest::open(named, bytes, seals).map_err(|error| error.to_string())?;
            return Ok((manifest, seals.unwrap_all(&keys).map_err(|error| error.to_string())?));
        }
        let manifest = Manifest::decode_checked(bytes, named.digest).map_err(|error| error.to_string())?;
        self.seals_not_checked += u64::from(seal::manifest_sealed_under(bytes).is_some());
        Ok((manifest, DataKeys::default()))
    }

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
        self.frames_not_opened += other.frames_not_opened;
        self.seals_not_checked += other.seals_not_checked;
        self.bytes += other.bytes;
        self.problems.extend(other.problems);
    }
}
