//! Leases: how a writer says that it holds objects that no head names yet.
//!
//! The object `v1/{tenant}/lease/{name}` is written once (`If-None-Match: *`), renewed by compare-and-swap, and removed when its holder is done.
//! Its name is never used again. It holds no time: the collector watches whether it changes ([`super`], "Clocks").
//!
//! A holder renews at least every third of the lifetime. It sends a commit only while [`Lease::is_valid`] by its own clock; when a renewal says
//! [`LeaseError::Lost`], the objects it covered may be gone, and what was captured must be captured again from what the head names.
//!
//! Who commits a manifest that names another owner's objects (a fork, a named snapshot) acquires a lease that names that manifest, *then*
//! checks that a head still names it, commits, and does not release the lease but lets it run out.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    layout,
    manifest::ManifestRef,
    store::{ETag, ErrorKind, ObjectStore, Operation, Precondition, StoreError},
};

const FORMAT: u16 = 1;
/// A lease lives at least so long. A pass of the collector whose reading takes longer deletes nothing.
pub const SHORTEST: Duration = Duration::from_mins(15);

/// What a lease keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claims {
    /// [`layout::Owner::prefix`] of sandboxes and named snapshots below which everything is kept.
    pub owners: Vec<String>,
    /// Manifests that are kept with all their packs.
    pub manifests: Vec<ManifestRef>,
}

/// The body of a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Body {
    format: u16,
    /// Who holds it, for people.
    pub holder: String,
    /// How long it lives without a renewal, ms.
    pub lifetime_ms: u64,
    /// Counts renewals, so that every body is new.
    pub renewals: u64,
    /// The collector has given it up.
    #[serde(default)]
    pub broken: bool,
    /// What it keeps.
    pub claims: Claims,
}

impl Body {
    /// Reads one.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let body: Self = serde_json::from_slice(bytes).map_err(|e| format!("the lease is malformed: {e}"))?;
        if body.format == FORMAT { Ok(body) } else { Err(format!("the lease is format version {}", body.format)) }
    }

    fn encode(&self) -> Result<Bytes, LeaseError> {
        serde_json::to_vec(self).map(Bytes::from).map_err(LeaseError::Body)
    }

    /// The same, given up.
    pub(super) fn broken(&self) -> Result<Bytes, LeaseError> {
        Self { broken: true, ..self.clone() }.encode()
    }
}

/// Why a lease was not acquired or renewed.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// The collector has given it up, or it is gone: what it covered may be gone too.
    #[error("the lease {key:?} was lost: what it covered may have been collected")]
    Lost {
        /// Its key.
        key: String,
    },
    /// The store failed. It can be tried again while the lease is valid.
    #[error("the lease cannot be written")]
    Store(#[from] StoreError),
    /// A name that may not be part of a key.
    #[error("the lease cannot be named")]
    Name(#[from] layout::BadName),
    /// A body that is no JSON.
    #[error("the lease cannot be encoded")]
    Body(#[source] serde_json::Error),
}

/// A lease that is held. Times are milliseconds of any clock of the holder's that does not stand still.
#[derive(Debug)]
pub struct Lease {
    store: Arc<dyn ObjectStore>,
    conditional: bool,
    key: String,
    body: Body,
    etag: ETag,
    /// When the last request that succeeded was sent.
    confirmed: i64,
}

impl Lease {
    /// Writes the lease `name` of `tenant`; `name` must be new. A `lifetime` below [`SHORTEST`] is raised to it. `conditional`: the store has
    /// conditional writes.
    pub async fn acquire(
        store: Arc<dyn ObjectStore>,
        conditional: bool,
        (tenant, name): (&str, &str),
        holder: &str,
        claims: Claims,
        lifetime: Duration,
        now: i64,
    ) -> Result<Self, LeaseError> {
        let lifetime_ms = u64::try_from(lifetime.max(SHORTEST).as_millis()).unwrap_or(u64::MAX);
        let body = Body { format: FORMAT, holder: holder.to_owned(), lifetime_ms, renewals: 0, broken: false, claims };
        let key = layout::lease(tenant, name)?;
        let precondition = if conditional { Precondition::IfAbsent } else { Precondition::None };
        let etag = store.put(&key, body.encode()?, &precondition).await?;
        Ok(Self { store, conditional, key, body, etag, confirmed: now })
    }

    /// Writes it again, with what it keeps changed to `claims` where given.
    pub async fn renew(&mut self, claims: Option<Claims>, now: i64) -> Result<(), LeaseError> {
        let mut next = Body { renewals: self.body.renewals + 1, ..self.body.clone() };
        if let Some(claims) = claims {
            next.claims = claims;
        }
        let bytes = next.encode()?;
        let precondition = if self.conditional { Precondition::IfMatch(self.etag.clone()) } else { Precondition::None };
        let error = match self.store.put(&self.key, bytes.clone(), &precondition).await {
            Ok(etag) => {
                (self.body, self.etag, self.confirmed) = (next, etag, now);
                return Ok(());
            }
            Err(error) => error,
        };
        // An earlier request of ours may have been applied and its reply lost: only the body tells.
        match self.store.get(&self.key).await {
            Ok(found) if found.bytes == bytes => {
                (self.body, self.etag, self.confirmed) = (next, found.etag, now);
                Ok(())
            }
            Ok(found) if found.etag == self.etag => Err(error.into()),
            // One of ours all the same, from a renewal that failed: the next one builds on it.
            Ok(found) => match Body::decode(&found.bytes) {
                Ok(body) if !body.broken => {
                    (self.body, self.etag) = (body, found.etag);
                    Err(StoreError::new(ErrorKind::Conflict, Operation::Put, &self.key).because(error).into())
                }
                _ => Err(LeaseError::Lost { key: self.key.clone() }),
            },
            Err(gone) if gone.kind == ErrorKind::NotFound => Err(LeaseError::Lost { key: self.key.clone() }),
            Err(_) => Err(error.into()),
        }
    }

    /// Whether what it covers may be committed now. The collector waits twice as long, for what is under way.
    pub fn is_valid(&self, now: i64) -> bool {
        let age = u64::try_from(now.saturating_sub(self.confirmed)).unwrap_or(u64::MAX);
        age < self.body.lifetime_ms
    }

    /// Its key.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Removes it: everything it covered is committed or given up. Not for forks, see the module.
    pub async fn release(self) -> Result<(), StoreError> {
        self.store.delete(&self.key).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::directory::DirectoryStore;

    async fn held(store: &Arc<dyn ObjectStore>) -> Lease {
        let claims = Claims { owners: vec!["v1/t/sandbox/s/".into()], manifests: Vec::new() };
        Lease::acquire(store.clone(), true, ("t", "one"), "host-a", claims, Duration::ZERO, 1000).await.unwrap()
    }

    #[tokio::test]
    async fn a_lease_is_renewed_until_it_is_broken() {
        let dir = tempfile::tempdir().unwrap();
        let store: Arc<dyn ObjectStore> = Arc::new(DirectoryStore::open(dir.path()).unwrap());
        let mut lease = held(&store).await;
        let lifetime = i64::try_from(SHORTEST.as_millis()).unwrap();
        assert!(lease.is_valid(1000 + lifetime - 1) && !lease.is_valid(1000 + lifetime), "raised to the shortest");
        lease.renew(None, 2000).await.unwrap();
        assert!(lease.is_valid(1000 + lifetime));
        // A reply was lost: what is stored is ours, one renewal on.
        let stored = store.get(lease.key()).await.unwrap();
        let ahead = Body { renewals: 2, ..Body::decode(&stored.bytes).unwrap() };
        store.put(lease.key(), ahead.encode().unwrap(), &Precondition::None).await.unwrap();
        lease.renew(None, 3000).await.unwrap();
        assert!(lease.is_valid(2999 + lifetime));

        let stored = store.get(lease.key()).await.unwrap();
        let broken = Body::decode(&stored.bytes).unwrap().broken().unwrap();
        store.put(lease.key(), broken, &Precondition::IfMatch(stored.etag)).await.unwrap();
        assert!(matches!(lease.renew(None, 4000).await, Err(LeaseError::Lost { .. })));
        store.delete(lease.key()).await.unwrap();
        assert!(matches!(lease.renew(None, 4000).await, Err(LeaseError::Lost { .. })));
    }

    #[tokio::test]
    async fn a_lease_is_acquired_once_and_released() {
        let dir = tempfile::tempdir().unwrap();
        let store: Arc<dyn ObjectStore> = Arc::new(DirectoryStore::open(dir.path()).unwrap());
        let lease = held(&store).await;
        let again = Lease::acquire(store.clone(), true, ("t", "one"), "b", Claims::default(), SHORTEST, 0).await;
        assert!(matches!(again, Err(LeaseError::Store(error)) if error.kind == ErrorKind::PreconditionFailed));
        let key = lease.key().to_owned();
        lease.release().await.unwrap();
        assert_eq!(store.get(&key).await.unwrap_err().kind, ErrorKind::NotFound);
    }
}
