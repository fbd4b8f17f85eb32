//! Repair: heads whose snapshot is not whole, and the newest one of the same sandbox that is.
//!
//! [`survey`] changes nothing. [`propose`] makes the commit that would set a head right; sending it is the caller's decision, and goes
//! through the register like every other commit, so that an owner that is alive after all wins or is seen.
//!
//! The newest snapshot is found from names and manifests alone: the generation with the highest epoch, then seq, whose manifest decodes, says of
//! itself what its name says, and whose packs are all there with their right sizes (with `deep`: with their right digests too).

use std::{cmp::Reverse, collections::HashMap};

use serde::Serialize;

use crate::{
    commit::{Attempt, Change, Current, Head, HeadError, HeadState},
    ids::{CommitId, Digest},
    layout::{self, Part, Place},
    manifest::{Manifest, ManifestRef, Versioned},
    seal::{self, Seals},
    store::{ErrorKind, Listed, ObjectStore, Operation, StoreError},
    verify::{Problem, verify_packs},
};

/// How a sandbox or named snapshot stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// Its head names a whole snapshot.
    Whole,
    /// A supervisor runs it; what its head names is whole, or there is nothing yet.
    Live,
    /// A supervisor runs it and what its head names is not whole. Its next pause sets that right.
    LiveDamaged,
    /// It was deleted.
    Deleted,
    /// What its head names is not whole, and an older snapshot is.
    Repairable,
    /// Its head is gone, and a snapshot is whole.
    HeadLost,
    /// Its head is damaged or of a newer version, and a snapshot is whole. Only a person can tell which of the two it is.
    HeadUnreadable,
    /// Nothing is whole.
    Lost,
}

/// A whole snapshot that a head could name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Candidate {
    /// Its manifest.
    pub manifest: ManifestRef,
    /// Of which commit.
    pub seq: u64,
    /// Of which owner.
    pub epoch: u64,
    /// The supervisor's record in it.
    #[serde(skip)]
    pub record: Versioned,
    /// It is of a stop: it holds disks alone.
    pub disks_only: bool,
    /// It is sealed.
    pub sealed: bool,
}

impl Candidate {
    /// The record as a head carries it.
    fn record(&self) -> Result<serde_json::Value, NoProposal> {
        let body: serde_json::Value = serde_json::from_slice(&self.record.bytes).map_err(NoProposal::Record)?;
        Ok(serde_json::json!({ "version": self.record.version, "body": body }))
    }
}

/// What was found of one sandbox or named snapshot.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// Whose.
    pub tenant: String,
    /// Of a sandbox; of a named snapshot otherwise.
    pub of_sandbox: bool,
    /// Which.
    pub id: String,
    /// How it stands.
    pub standing: Standing,
    /// What is wrong.
    pub problems: Vec<Problem>,
    /// What its head could name instead.
    pub candidate: Option<Candidate>,
    /// Its head, or what it could name, is sealed: without the key nothing can be written that would be accepted.
    pub sealed: bool,
    /// The head, where it can be read.
    #[serde(skip)]
    pub head: Option<Current>,
}

/// Looks at everything below the tenant's (or everybody's) sandboxes and named snapshots. With `deep` every pack is read. With the operator's keys
/// only what is authentic is whole; without any, seals are not looked at, and [`Finding::sealed`] says where there are some.
pub async fn survey(
    store: &dyn ObjectStore,
    tenant: Option<&str>,
    deep: bool,
    seals: &Seals,
) -> Result<Vec<Finding>, StoreError> {
    let prefix = layout::tenant(tenant)
        .map_err(|error| StoreError::new(ErrorKind::Other, Operation::List, "v1/").because(error))?;
    let mut sizes: HashMap<String, u64> = HashMap::new();
    let mut owners: Vec<Vec<Listed>> = Vec::new();
    let mut next: Option<String> = None;
    loop {
        let page = store.list(&prefix, next.as_deref()).await?;
        for object in page.objects {
            let Some(place) = Place::of(&object.key) else { continue };
            sizes.insert(object.key.clone(), object.size);
            let same = |objects: &Vec<Listed>| {
                objects.first().and_then(|first| Place::of(&first.key)).is_some_and(|first| first.owner == place.owner)
            };
            match owners.last_mut().filter(|last| same(last)) {
                Some(last) => last.push(object),
                None => owners.push(vec![object]),
            }
        }
        match page.next {
            Some(more) => next = Some(more),
            None => break,
        }
    }
    let survey = Survey { store, sizes, deep, seals };
    let mut findings = Vec::new();
    for objects in owners {
        if let Some(place) = objects.first().and_then(|first| Place::of(&first.key)) {
            findings.push(survey.owner(&place, &objects).await?);
        }
    }
    Ok(findings)
}

struct Survey<'a> {
    store: &'a dyn ObjectStore,
    sizes: HashMap<String, u64>,
    deep: bool,
    seals: &'a Seals,
}

impl Survey<'_> {
    async fn owner(&self, place: &Place<'_>, objects: &[Listed]) -> Result<Finding, StoreError> {
        let key = format!("{}head", place.owner);
        let mut problems = Vec::new();
        let (mut unreadable, mut sealed) = (false, false);
        let head = match self.store.get(&key).await {
            Ok(object) => {
                sealed = seal::head_sealed_under(&object.bytes).is_some();
                match self.head(&key, &object.bytes) {
                    Ok(head) => Some(Current { head, etag: object.etag }),
                    Err(what) => {
                        problems.push(Problem { key, what });
                        unreadable = true;
                        None
                    }
                }
            }
            Err(error) if error.kind == ErrorKind::NotFound => {
                problems.push(Problem { key, what: "there is no head".to_owned() });
                None
            }
            Err(error) => return Err(error),
        };
        let state = head.as_ref().map(|current| current.head.state);
        let named = head.as_ref().and_then(|current| current.head.manifest.as_ref());
        if state == Some(HeadState::Deleted) {
            return Ok(finding(place, Standing::Deleted, problems, None, head, sealed));
        }
        if let Some(named) = named {
            problems.extend(self.whole(&named.key, Some(named.digest)).await?.err().unwrap_or_default());
        }
        let live = state == Some(HeadState::Live);
        if problems.is_empty() {
            let standing = if live { Standing::Live } else { Standing::Whole };
            return Ok(finding(place, standing, problems, None, head, sealed));
        }
        let candidate = self.newest_whole(place, objects).await?;
        sealed |= candidate.as_ref().is_some_and(|candidate| candidate.sealed);
        let standing = match (&candidate, live, head.is_some()) {
            (_, true, _) => Standing::LiveDamaged,
            (None, false, _) => Standing::Lost,
            (Some(_), false, true) => Standing::Repairable,
            (Some(_), false, false) if unreadable => Standing::HeadUnreadable,
            (Some(_), false, false) => Standing::HeadLost,
        };
        Ok(finding(place, standing, problems, candidate, head, sealed))
    }

    fn head(&self, key: &str, bytes: &[u8]) -> Result<Head, String> {
        if self.seals.is_on() {
            self.seals.open_head(key, bytes).map_err(|error| error.to_string())?;
        }
        Head::decode(bytes).map_err(|error| error.to_string())
    }

    async fn newest_whole(&self, place: &Place<'_>, objects: &[Listed]) -> Result<Option<Candidate>, StoreError> {
        let mut manifests: Vec<(u64, u64, &str)> = objects
            .iter()
            .filter_map(|object| match Place::of(&object.key)?.part {
                Part::Generation { seq, epoch, manifest: true, .. } => Some((epoch, seq, object.key.as_str())),
                _ => None,
            })
            .collect();
        manifests.sort_by_key(|&found| Reverse(found));
        for (epoch, seq, key) in manifests {
            let Ok(Found { manifest, digest, sealed }) = self.whole(key, None).await? else { continue };
            let own = manifest.lineage.as_ref().is_some_and(|lineage| {
                let commit = lineage.commit.to_string();
                (lineage.seq, lineage.epoch) == (seq, epoch)
                    && (lineage.sandbox == place.id || !place.of_sandbox)
                    && key.contains(&commit)
            });
            if own {
                let manifest_ref = ManifestRef { key: key.to_owned(), digest };
                let disks_only = manifest.is_disks_only();
                let record = manifest.record;
                return Ok(Some(Candidate { manifest: manifest_ref, seq, epoch, record, disks_only, sealed }));
            }
        }
        Ok(None)
    }

    /// The manifest, if it and its packs are all there; else what is wrong.
    async fn whole(&self, key: &str, expected: Option<Digest>) -> Result<Result<Found, Vec<Problem>>, StoreError> {
        let wrong = |what: String| Ok(Err(vec![Problem { key: key.to_owned(), what }]));
        let object = match self.store.get(key).await {
            Ok(object) => object,
            Err(error) if matches!(error.kind, ErrorKind::NotFound | ErrorKind::Corrupt) => {
                return wrong(error.kind.to_string());
            }
            Err(error) => return Err(error),
        };
        let digest = Digest::of(&object.bytes);
        let named = ManifestRef { key: key.to_owned(), digest: expected.unwrap_or(digest) };
        let opened = if self.seals.is_on() {
            Manifest::open(&named, &object.bytes, self.seals)
        } else {
            Manifest::decode_checked(&object.bytes, named.digest).map(|manifest| (manifest, Vec::new()))
        };
        let (manifest, keys) = match opened {
            Ok(opened) => opened,
            Err(error) => return wrong(error.to_string()),
        };
        let mut problems: Vec<Problem> = Vec::new();
        for pack in &manifest.packs {
            // Packs of templates are outside of what was listed.
            match self.sizes.get(&pack.key) {
                Some(size) if *size == u64::from(pack.size) => {}
                Some(size) => {
                    let what = format!("{size} bytes, expected {}", pack.size);
                    problems.push(Problem { key: pack.key.clone(), what });
                }
                None if Place::of(&pack.key).is_some() => {
                    problems.push(Problem { key: pack.key.clone(), what: ErrorKind::NotFound.to_string() });
                }
                None => {}
            }
        }
        if self.deep && problems.is_empty() {
            let keys = match self.seals.unwrap_all(&keys) {
                Ok(keys) => keys,
                Err(error) => return wrong(error.to_string()),
            };
            problems = verify_packs(self.store, &manifest, &keys).await?.problems;
        }
        let sealed = seal::manifest_sealed_under(&object.bytes).is_some();
        Ok(if problems.is_empty() { Ok(Found { manifest, digest, sealed }) } else { Err(problems) })
    }
}

/// A manifest that is whole.
struct Found {
    manifest: Manifest,
    digest: Digest,
    sealed: bool,
}

fn finding(
    place: &Place<'_>,
    standing: Standing,
    problems: Vec<Problem>,
    candidate: Option<Candidate>,
    head: Option<Current>,
    sealed: bool,
) -> Finding {
    Finding {
        tenant: place.tenant.to_owned(),
        of_sandbox: place.of_sandbox,
        id: place.id.to_owned(),
        standing,
        problems,
        candidate,
        sealed,
        head,
    }
}

/// Why nothing can be proposed.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum NoProposal {
    #[error("there is nothing to repair, or nothing to repair it with")]
    Nothing,
    #[error(
        "the head is there and cannot be read: move it out of the way first, if it is damaged and not of a newer version"
    )]
    Unreadable,
    #[error("the record in the manifest cannot be used")]
    Record(#[source] serde_json::Error),
    #[error("the head cannot follow")]
    Head(#[from] HeadError),
}

/// The commit that makes the head name the candidate, for [`Register::commit`](crate::commit::Register::commit). `owner` is who repairs; a
/// head that is there keeps its owner and epoch, so that nobody is fenced.
pub fn propose(finding: &Finding, owner: &str, commit: CommitId) -> Result<Attempt, NoProposal> {
    let Some(candidate) = &finding.candidate else { return Err(NoProposal::Nothing) };
    let manifest = Some(candidate.manifest.clone());
    let state = if candidate.disks_only { HeadState::Stopped } else { HeadState::Paused };
    match (finding.standing, &finding.head) {
        (Standing::Repairable, Some(current)) => {
            // A sandbox's record says what its manifest is of; a named snapshot's has its name, too, and its manifest is always whole.
            let record = if finding.of_sandbox { candidate.record()? } else { current.head.record.clone() };
            let change = Change { state, manifest, record };
            Ok(Attempt::next(current, change, commit)?)
        }
        (Standing::HeadLost, None) => {
            let change = Change { state, manifest, record: candidate.record()? };
            Ok(Attempt::first(&finding.id, owner, change, commit)?)
        }
        (Standing::HeadUnreadable, _) => Err(NoProposal::Unreadable),
        _ => Err(NoProposal::Nothing),
    }
}
