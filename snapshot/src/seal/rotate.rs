//! Rotation: moves what a bucket holds from old operator's keys to the current one.
//!
//! Manifests are written once, so one that is sealed under an old key is written again in a new envelope, under the name of a new commit, and
//! that commit makes the head name it. A sidecar with wrapped keys would leave manifests alone, but heads have to be sealed anew anyhow: one
//! commit does both at once, through the register like every other, and there is no second object to authenticate, to collect and to lose. Packs
//! stay: their data keys are wrapped anew, not changed. What was replaced is left to the collector.
//!
//! Each head is a step of its own, so that a pass may be bounded, and one that was cut off is done again from the start at no cost: what is moved
//! is skipped. Left alone is what is not ours to change: a live sandbox (its owner's next commit seals under the current key) and a
//! tombstone (it is final, until the collector purges it or it is put back).

use std::{collections::BTreeMap, sync::Arc};

use async_trait::async_trait;
use serde::Serialize;

use super::{KeyId, SealError, Seals, head_sealed_under, manifest_sealed_under};
use crate::{
    commit::{Attempt, Change, Current, Head, HeadState, ObjectHead, Outcome, Pacer, Register, Sent},
    ids::{CommitId, Digest},
    layout::{self, Owner, Part, Place},
    manifest::{Manifest, ManifestRef},
    store::{ErrorKind, ObjectStore, Operation, Precondition, StoreError},
};

/// What to move.
#[derive(Clone, Debug)]
pub struct Options {
    /// Only this tenant.
    pub tenant: Option<String>,
    /// Say what would be moved, and change nothing.
    pub dry_run: bool,
    /// Heads moved at most.
    pub limit: usize,
    /// The store has conditional writes.
    pub conditional: bool,
}

/// A head that was not moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Left {
    /// Its key.
    pub head: String,
    /// Why.
    pub why: String,
}

/// What a pass found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Heads looked at.
    pub heads: u64,
    /// Of them sealed under the current key, manifest and data keys included.
    pub current: u64,
    /// Heads that were moved, or with a dry run would be.
    pub moved: Vec<String>,
    /// Heads that were not.
    pub left: Vec<Left>,
    /// How many heads still need each key after the pass, by key; `none` counts those that are not sealed. A key that is not named is needed by
    /// nothing.
    pub needed: BTreeMap<String, u64>,
}

/// Where random bits come from: commit ids, and nonces for data keys that are wrapped anew.
pub trait Random: Sync {
    /// A fresh commit id.
    fn commit(&self) -> CommitId;
    /// A fresh nonce.
    fn nonce(&self) -> [u8; 12];
}

/// One attempt: whoever was faster wins, and the next pass looks again.
struct Once;

#[async_trait]
impl Pacer for Once {
    async fn wait(&mut self) -> bool {
        false
    }
}

/// One pass. An error means that the store failed; what cannot be moved is in the report.
pub async fn rotate(
    store: &Arc<dyn ObjectStore>,
    seals: &Arc<Seals>,
    options: &Options,
    random: &dyn Random,
) -> Result<Report, StoreError> {
    let prefix = layout::tenant(options.tenant.as_deref())
        .map_err(|error| StoreError::new(ErrorKind::Other, Operation::List, "v1/").because(error))?;
    let mut heads = Vec::new();
    let mut next: Option<String> = None;
    loop {
        let page = store.list(&prefix, next.as_deref()).await?;
        let keys = page.objects.into_iter().map(|object| object.key);
        heads.extend(keys.filter(|key| Place::of(key).is_some_and(|place| place.part == Part::Head)));
        match page.next {
            Some(more) => next = Some(more),
            None => break,
        }
    }
    let mut report = Report::default();
    for key in heads {
        report.heads += 1;
        let pass = Pass { store, seals, options, random, key: &key };
        let step = pass.one(report.moved.len() < options.limit).await?;
        let needs = match step {
            Step::Current => {
                report.current += 1;
                seals.current().into_iter().map(Some).collect()
            }
            Step::Moved(before) => {
                report.moved.push(key.clone());
                if options.dry_run { before } else { seals.current().into_iter().map(Some).collect() }
            }
            Step::Left(needs, why) => {
                report.left.push(Left { head: key.clone(), why });
                needs
            }
        };
        for key in needs {
            *report.needed.entry(key.map_or_else(|| "none".to_owned(), |key| key.to_string())).or_default() += 1;
        }
    }
    Ok(report)
}

/// Keys that a head needs, `None` for what is not sealed.
type Needs = std::collections::BTreeSet<Option<KeyId>>;

enum Step {
    Current,
    Moved(Needs),
    Left(Needs, String),
}

struct Pass<'a> {
    store: &'a Arc<dyn ObjectStore>,
    seals: &'a Arc<Seals>,
    options: &'a Options,
    random: &'a dyn Random,
    key: &'a str,
}

impl Pass<'_> {
    async fn one(&self, may_move: bool) -> Result<Step, StoreError> {
        let object = match self.store.get(self.key).await {
            Ok(object) => object,
            Err(error) if error.kind == ErrorKind::NotFound => return Ok(Step::Left(Needs::new(), error.to_string())),
            Err(error) => return Err(error),
        };
        let mut needs = Needs::from([head_sealed_under(&object.bytes)]);
        let head = match self.seals.open_head(self.key, &object.bytes).map_err(|error| error.to_string()) {
            Ok(body) => Head::decode(body).map_err(|error| error.to_string()),
            Err(error) => Err(error),
        };
        let head = match head {
            Ok(head) => head,
            Err(why) => return Ok(Step::Left(needs, why)),
        };
        let current = Current { head, etag: object.etag };
        let named = current.head.manifest.clone();
        let manifest = match &named {
            None => None,
            Some(named) => match self.store.get(&named.key).await {
                Ok(object) => Some((named, object.bytes)),
                Err(error) if matches!(error.kind, ErrorKind::NotFound | ErrorKind::Corrupt) => {
                    return Ok(Step::Left(needs, format!("its manifest: {}", error.kind)));
                }
                Err(error) => return Err(error),
            },
        };
        if let Some((_, bytes)) = &manifest {
            match manifest_sealed_under(bytes) {
                None => drop(needs.insert(None)),
                Some((under, keys)) => needs.extend(std::iter::once(under).chain(keys).map(Some)),
            }
        }
        if needs.iter().all(|key| *key == self.seals.current()) {
            return Ok(Step::Current);
        }
        let left = |why: &str| Ok(Step::Left(needs.clone(), why.to_owned()));
        match current.head.state {
            HeadState::Paused | HeadState::Stopped => {}
            HeadState::Live => return left("a supervisor runs it: its next pause, or other commit, moves it"),
            HeadState::Deleted => return left("it is deleted: it needs its key until it is purged or put back"),
        }
        if !may_move {
            return left("the pass has moved as many as it may");
        }
        if self.options.dry_run {
            return Ok(Step::Moved(needs));
        }
        match self.move_on(&current, manifest.as_ref().map(|(named, bytes)| (*named, &bytes[..]))).await? {
            Ok(()) => Ok(Step::Moved(needs)),
            Err(why) => Ok(Step::Left(needs, why)),
        }
    }

    /// Writes the manifest in a new envelope and has the head name it. The inner error says why that is not possible.
    async fn move_on(
        &self,
        current: &Current,
        manifest: Option<(&ManifestRef, &[u8])>,
    ) -> Result<Result<(), String>, StoreError> {
        let commit = self.random.commit();
        let renewed = match manifest {
            None => None,
            Some((named, bytes)) => match self.renewed(current, named, bytes, commit) {
                Ok(renewed) => Some(renewed),
                Err(why) => return Ok(Err(why)),
            },
        };
        let named = match renewed {
            None => None,
            Some((key, object)) => {
                let named = ManifestRef { digest: Digest::of(&object), key };
                let precondition = if self.options.conditional { Precondition::IfAbsent } else { Precondition::None };
                self.store.put(&named.key, object.into(), &precondition).await?;
                Some(named)
            }
        };
        let Current { head, .. } = current;
        let change = Change { state: head.state, manifest: named, record: head.record.clone() };
        let attempt = match Attempt::next(current, change, commit) {
            Ok(attempt) => attempt,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let objects = Arc::clone(self.store);
        let register = if self.options.conditional {
            ObjectHead::new(objects, self.key)
        } else {
            ObjectHead::unconditional(objects, self.key)
        };
        let outcome = Register::new(register.sealed(self.seals)).commit(&attempt, Sent::Never, &mut Once).await;
        Ok(match outcome {
            Outcome::Committed { .. } => Ok(()),
            Outcome::Superseded { .. } | Outcome::Fenced { .. } => Err("somebody has just changed it".to_owned()),
            Outcome::Refused { cause } => return Err(cause),
            Outcome::Unknown { cause } => Err(format!("whether it was moved is not known: {cause}")),
        })
    }

    /// Key and bytes of the manifest as commit `commit` writes it.
    fn renewed(
        &self,
        current: &Current,
        named: &ManifestRef,
        bytes: &[u8],
        commit: CommitId,
    ) -> Result<(String, Vec<u8>), String> {
        let text = |error: &dyn std::fmt::Display| format!("its manifest: {error}");
        let (mut manifest, keys) = Manifest::open(named, bytes, self.seals).map_err(|e| text(&e))?;
        let rewrapped: Result<Vec<_>, SealError> = keys
            .iter()
            .map(|wrapped| match self.seals.current() {
                Some(current) if wrapped.under != current => {
                    let key = self.seals.unwrap(wrapped)?;
                    Ok(self.seals.wrap(&key, self.random.nonce()).unwrap_or_else(|| wrapped.clone()))
                }
                _ => Ok(wrapped.clone()),
            })
            .collect();
        let head = &current.head;
        let (seq, epoch) = (head.seq + 1, head.epoch);
        if let Some(lineage) = &mut manifest.lineage {
            (lineage.seq, lineage.epoch, lineage.commit) = (seq, epoch, commit);
            lineage.parent = Some(named.clone());
        }
        let place = Place::of(self.key).ok_or("its head has a name that nobody gives")?;
        let owner = if place.of_sandbox {
            Owner::sandbox(place.tenant, place.id)
        } else {
            Owner::snapshot(place.tenant, place.id)
        };
        let key = owner.map_err(|e| e.to_string())?.generation(seq, epoch, commit).manifest();
        let plain = manifest.encode().map_err(|e| text(&e))?;
        let sealed = self.seals.seal_manifest(&key, plain, &rewrapped.map_err(|e| text(&e))?).map_err(|e| text(&e))?;
        Ok((key, sealed))
    }
}
