//! One pass over the bucket: reads what [`super::plan`] needs, tenant by tenant, and does what it says.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use serde::Serialize;

use super::{
    lease::{Body, LeaseError, SHORTEST},
    memory::{Memory, MemoryError, Ms},
    plan::{self, HeadSeen, LeaseSeen, Seen},
};
use crate::{
    commit::{Attempt, Current, Head, HeadError, HeadStorage, ObjectHead, Outcome, Pacer, Register, Sent},
    ids::CommitId,
    layout::{self, Part, Place},
    manifest::{Manifest, ManifestRef},
    seal::Seals,
    store::{ErrorKind, Listed, Object, ObjectStore, Precondition, StoreError},
};

/// How to collect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Between the pass that finds something unreachable and the one that deletes it; and from a tombstone to its purge.
    pub grace: Duration,
    /// Only this tenant.
    pub tenant: Option<String>,
    /// Change nothing, remember nothing: say what a pass would delete now, and what would become a candidate.
    pub dry_run: bool,
    /// The store has conditional writes.
    pub conditional: bool,
    /// Requests in flight at most.
    pub connections: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { grace: Duration::from_hours(72), tenant: None, dry_run: false, conditional: true, connections: 16 }
    }
}

/// What a pass did in one tenant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TenantReport {
    /// Which.
    pub tenant: String,
    /// Objects of sandboxes and named snapshots.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Heads.
    pub heads: u64,
    /// Objects that something still needs.
    pub kept: u64,
    /// Unreachable objects that wait for a later pass.
    pub candidates: u64,
    /// Deleted, or with a dry run to be deleted now.
    pub deleted: Vec<String>,
    /// Their bytes.
    pub deleted_bytes: u64,
    /// Keys of the heads of sandboxes that can no longer be put back.
    pub purged: Vec<String>,
    /// Leases that were given up.
    pub broken_leases: Vec<String>,
    /// Why nothing was deleted; empty when nothing stood in the way.
    pub blocked: Vec<String>,
    /// What is odd, and was kept.
    pub odd: Vec<String>,
}

/// What a pass did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Tenant by tenant.
    pub tenants: Vec<TenantReport>,
}

/// Why a pass ended early. What it did until then stands.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum GcError {
    #[error("cannot {action}")]
    Store { action: &'static str, source: StoreError },
    #[error("the collector's memory {key:?} cannot be used")]
    Memory { key: String, source: MemoryError },
    #[error("the tombstone {key:?} cannot be purged")]
    Head { key: String, source: HeadError },
    #[error("the lease {key:?} cannot be broken")]
    Lease { key: String, source: LeaseError },
    #[error("the bucket holds a tenant that cannot be named")]
    Name(#[from] layout::BadName),
}

trait Doing<T> {
    fn doing(self, action: &'static str) -> Result<T, GcError>;
}

impl<T> Doing<T> for Result<T, StoreError> {
    fn doing(self, action: &'static str) -> Result<T, GcError> {
        self.map_err(|source| GcError::Store { action, source })
    }
}

/// One pass. `clock` is wall time in milliseconds; `ids` draws commit ids for purges. Passes may run at the same time: each is safe by itself.
/// `seals` is only used to write the heads that are purged: what is to be deleted is told from digests.
pub async fn run(
    store: &Arc<dyn ObjectStore>,
    seals: &Arc<Seals>,
    options: &Options,
    clock: &(dyn Fn() -> Ms + Send + Sync),
    ids: &(dyn Fn() -> CommitId + Send + Sync),
) -> Result<Report, GcError> {
    let prefix = layout::tenant(options.tenant.as_deref())?;
    let mut report = Report::default();
    let mut next: Option<String> = None;
    let mut objects: Vec<Listed> = Vec::new();
    let mut begun = clock();
    // Listings are in key order, so that a tenant's objects come together.
    loop {
        let page = store.list(&prefix, next.as_deref()).await.doing("list the bucket")?;
        for object in page.objects {
            let Some(place) = Place::of(&object.key) else { continue };
            if tenant_of(&objects).is_some_and(|tenant| tenant != place.tenant) {
                let pass = Pass { store, seals, options, clock, ids, begun };
                report.tenants.push(pass.tenant(std::mem::take(&mut objects)).await?);
                begun = clock();
            }
            objects.push(object);
        }
        match page.next {
            Some(more) => next = Some(more),
            None => break,
        }
    }
    if !objects.is_empty() {
        report.tenants.push(Pass { store, seals, options, clock, ids, begun }.tenant(objects).await?);
    }
    Ok(report)
}

fn tenant_of(objects: &[Listed]) -> Option<&str> {
    Place::of(&objects.first()?.key).map(|place| place.tenant)
}

/// One attempt: whoever was faster wins, and the next pass looks again.
struct Once;

#[async_trait]
impl Pacer for Once {
    async fn wait(&mut self) -> bool {
        false
    }
}

struct Pass<'a> {
    store: &'a Arc<dyn ObjectStore>,
    seals: &'a Arc<Seals>,
    options: &'a Options,
    clock: &'a (dyn Fn() -> Ms + Send + Sync),
    ids: &'a (dyn Fn() -> CommitId + Send + Sync),
    /// When the listing began.
    begun: Ms,
}

impl Pass<'_> {
    async fn tenant(&self, objects: Vec<Listed>) -> Result<TenantReport, GcError> {
        let tenant = tenant_of(&objects).unwrap_or_default().to_owned();
        let mut report = TenantReport {
            objects: objects.len() as u64,
            bytes: objects.iter().map(|object| object.size).sum(),
            ..TenantReport::default()
        };
        let memory_key = layout::candidates(&tenant)?;
        let (memory, memory_tag) = match self.store.get(&memory_key).await {
            Ok(found) => {
                let memory = Memory::decode(&found.bytes)
                    .map_err(|source| GcError::Memory { key: memory_key.clone(), source })?;
                (memory, Some(found.etag))
            }
            Err(error) if error.kind == ErrorKind::NotFound => (Memory::default(), None),
            Err(error) => return Err(error).doing("read the collector's memory"),
        };
        let mut seen = Seen { objects, ..Seen::default() };
        self.read_heads(&mut seen).await?;
        self.read_leases(&tenant, &mut seen).await?;
        self.read_packs(&mut seen).await?;
        report.heads = seen.heads.len() as u64;

        let now = (self.clock)();
        let settlement = plan::settle(&seen, &memory, now, self.options.grace);
        let (purged, broken) = if self.options.dry_run {
            (settlement.purge, settlement.break_leases)
        } else {
            let settled = self.settle(&mut seen, &settlement).await?;
            for key in &settlement.forget_leases {
                self.store.delete(key).await.doing("remove a broken lease")?;
            }
            // What lost its race is a root as it is now.
            self.read_packs(&mut seen).await?;
            settled
        };
        let mut sweep = plan::sweep(&seen, (&purged, &broken), &memory, now, self.options.grace);
        let took = now.saturating_sub(self.begun);
        if took > Ms::try_from(SHORTEST.as_millis()).unwrap_or(Ms::MAX) && !sweep.delete.is_empty() {
            sweep.blocked.push(format!("reading the tenant took {took} ms, longer than a lease lives"));
            sweep.delete.clear();
        }
        report.tenant = tenant;
        report.kept = sweep.kept;
        report.candidates = (sweep.memory.candidates.len() - sweep.delete.len()) as u64;
        report.deleted_bytes = sweep.delete.iter().map(|object| object.size).sum();
        report.deleted = sweep.delete.iter().map(|object| object.key.clone()).collect();
        report.purged = purged.into_iter().collect();
        report.broken_leases = broken.into_iter().collect();
        (report.blocked, report.odd) = (sweep.blocked, sweep.odd);
        if self.options.dry_run {
            return Ok(report);
        }
        if sweep.memory != memory && !(memory_tag.is_none() && sweep.memory.is_empty()) {
            let precondition = match (self.options.conditional, memory_tag) {
                (false, _) => Precondition::None,
                (true, None) => Precondition::IfAbsent,
                (true, Some(tag)) => Precondition::IfMatch(tag),
            };
            let bytes = sweep.memory.encode().map_err(|source| GcError::Memory { key: memory_key.clone(), source })?;
            self.store.put(&memory_key, bytes.into(), &precondition).await.doing("write the collector's memory")?;
        }
        // In order, manifests first: all of one kind before the next.
        for batch in sweep.delete.chunk_by(|a, b| is_manifest(a) == is_manifest(b)) {
            // Made before the stream: a closure over borrowed items would keep this future from being sent to another thread.
            let deletions: Vec<_> = batch.iter().map(|object| self.store.delete(&object.key)).collect();
            stream::iter(deletions)
                .buffer_unordered(self.options.connections.max(1))
                .try_collect::<()>()
                .await
                .doing("delete an object")?;
        }
        Ok(report)
    }

    async fn read_head(&self, key: &str) -> Result<Option<HeadSeen>, GcError> {
        let object = match self.store.get(key).await {
            Err(error) if error.kind == ErrorKind::NotFound => return Ok(None),
            other => other.doing("read a head")?,
        };
        let head = Head::decode(&object.bytes)
            .map(|head| Current { head, etag: object.etag })
            .map_err(|error| error.to_string());
        Ok(Some(HeadSeen { key: key.to_owned(), head }))
    }

    async fn read_heads(&self, seen: &mut Seen) -> Result<(), GcError> {
        let keys: Vec<String> = seen
            .objects
            .iter()
            .filter(|object| Place::of(&object.key).is_some_and(|place| place.part == Part::Head))
            .map(|object| object.key.clone())
            .collect();
        let mut heads =
            stream::iter(keys).map(async |key| self.read_head(&key).await).buffered(self.options.connections.max(1));
        while let Some(head) = heads.try_next().await? {
            seen.heads.extend(head);
        }
        Ok(())
    }

    async fn read_leases(&self, tenant: &str, seen: &mut Seen) -> Result<(), GcError> {
        let prefix = layout::leases(tenant)?;
        let mut next: Option<String> = None;
        loop {
            let page = self.store.list(&prefix, next.as_deref()).await.doing("list the leases")?;
            for listed in page.objects {
                match self.store.get(&listed.key).await {
                    Err(error) if error.kind == ErrorKind::NotFound => {}
                    Err(error) => return Err(error).doing("read a lease"),
                    Ok(object) => seen.leases.push(lease_seen(listed.key, object)),
                }
            }
            match page.next {
                Some(more) => next = Some(more),
                None => return Ok(()),
            }
        }
    }

    /// Reads every manifest that is named and was not read yet.
    async fn read_packs(&self, seen: &mut Seen) -> Result<(), GcError> {
        let of_heads = seen.heads.iter().filter_map(|seen| seen.head.as_ref().ok()?.head.manifest.clone());
        let of_leases =
            seen.leases.iter().filter_map(|seen| seen.body.as_ref().ok()).flat_map(|b| b.claims.manifests.clone());
        let mut named: Vec<ManifestRef> =
            of_heads.chain(of_leases).filter(|named| !seen.packs.contains_key(&named.key)).collect();
        named.sort_by(|a, b| a.key.cmp(&b.key));
        named.dedup();
        let mut read = stream::iter(named)
            .map(|named| async move {
                let packs = match self.store.get(&named.key).await {
                    Err(error) if matches!(error.kind, ErrorKind::NotFound | ErrorKind::Corrupt) => {
                        Err(error.kind.to_string())
                    }
                    Err(error) => return Err(error).doing("read a manifest"),
                    Ok(object) => Manifest::decode_checked(&object.bytes, named.digest)
                        .map(|manifest| manifest.packs.into_iter().map(|pack| pack.key).collect())
                        .map_err(|error| error.to_string()),
                };
                Ok((named.key, packs))
            })
            .buffered(self.options.connections.max(1));
        while let Some((key, packs)) = read.try_next().await? {
            seen.packs.insert(key, packs);
        }
        Ok(())
    }

    /// Purges tombstones and breaks leases; `seen` gets what was found in the place of those that could not be.
    async fn settle(
        &self,
        seen: &mut Seen,
        settlement: &plan::Settlement,
    ) -> Result<(BTreeSet<String>, BTreeSet<String>), GcError> {
        let (mut purged, mut broken) = (BTreeSet::new(), BTreeSet::new());
        for at in 0..seen.heads.len() {
            let HeadSeen { key, head } = &seen.heads[at];
            let (true, Ok(current)) = (settlement.purge.contains(key), head) else { continue };
            let attempt =
                Attempt::purge(current, (self.ids)()).map_err(|source| GcError::Head { key: key.clone(), source })?;
            let objects = Arc::clone(self.store);
            let head = if self.options.conditional {
                ObjectHead::new(objects, key)
            } else {
                ObjectHead::unconditional(objects, key)
            };
            // Reads it, which fails for one that cannot be trusted, or could only be written unsealed: it stays.
            let head = head.sealed(self.seals);
            if let Err(error) = head.read().await {
                tracing::warn!(key, error = &error as &dyn std::error::Error, "a tombstone is not purged");
                continue;
            }
            let register = Register::new(head);
            if matches!(register.commit(&attempt, Sent::Never, &mut Once).await, Outcome::Committed { .. }) {
                purged.insert(key.clone());
            } else if let Some(now) = self.read_head(key).await? {
                seen.heads[at] = now;
            }
        }
        for at in 0..seen.leases.len() {
            let LeaseSeen { key, etag, body } = &seen.leases[at];
            let (true, Ok(body)) = (settlement.break_leases.contains(key), body) else { continue };
            let bytes: Bytes = body.broken().map_err(|source| GcError::Lease { key: key.clone(), source })?;
            let precondition =
                if self.options.conditional { Precondition::IfMatch(etag.clone()) } else { Precondition::None };
            if self.store.put(key, bytes, &precondition).await.is_ok() {
                broken.insert(key.clone());
                continue;
            }
            // Its holder has renewed it, or a reply was lost: it stays open as far as this pass is concerned, and may keep something else now.
            match self.store.get(key).await {
                Err(error) if error.kind == ErrorKind::NotFound => {}
                Err(error) => return Err(error).doing("read a lease"),
                Ok(object) => {
                    let now = lease_seen(key.clone(), object);
                    seen.leases[at] = now;
                }
            }
        }
        Ok((purged, broken))
    }
}

fn lease_seen(key: String, object: Object) -> LeaseSeen {
    LeaseSeen { key, body: Body::decode(&object.bytes), etag: object.etag }
}

fn is_manifest(object: &Listed) -> bool {
    matches!(Place::of(&object.key).map(|place| place.part), Some(Part::Generation { manifest: true, .. }))
}
