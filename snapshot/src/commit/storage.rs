//! Where a head is kept: the storage trait and its implementation over an [`ObjectStore`].

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::plan::Expected;
use crate::{
    seal::Seals,
    store::{ETag, ErrorKind, Object, ObjectStore, Operation, Precondition, StoreError},
};

/// A head's bytes and tag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredHead {
    /// The body.
    pub bytes: Bytes,
    /// Its tag.
    pub etag: ETag,
}

/// What came of one write request.
#[derive(Debug)]
pub enum WriteReply {
    /// It was applied.
    Applied(ETag),
    /// This request was not applied and never will be.
    NotApplied(StoreError),
    /// It may have been applied, or may yet be.
    Unclear(StoreError),
}

/// One head. Each call sends one request at most, within a deadline.
#[async_trait]
pub trait HeadStorage: Send + Sync {
    /// The head's key, for messages.
    fn key(&self) -> &str;

    /// The head as it is now; `None` when there is none.
    async fn read(&self) -> Result<Option<StoredHead>, StoreError>;

    /// Writes the head if it is as expected.
    async fn write(&self, body: Bytes, expected: &Expected) -> WriteReply;
}

/// A head in an object store, in its envelope where an operator has keys. A retry under another key than the first attempt's is the same commit:
/// it is settled by its id, and only one of the two can be applied.
#[derive(Clone, Debug)]
pub struct ObjectHead {
    store: Arc<dyn ObjectStore>,
    key: String,
    conditional: bool,
    seals: Arc<Seals>,
}

impl ObjectHead {
    /// The head under `key` of a store with conditional writes.
    pub fn new(store: Arc<dyn ObjectStore>, key: impl Into<String>) -> Self {
        Self { store, key: key.into(), conditional: true, seals: Arc::new(Seals::none()) }
    }

    /// The same head, sealed and opened with these keys.
    #[must_use]
    pub fn sealed(self, seals: &Arc<Seals>) -> Self {
        Self { seals: Arc::clone(seals), ..self }
    }

    async fn stored(&self) -> Result<Option<StoredHead>, StoreError> {
        match self.store.get(&self.key).await {
            Ok(Object { bytes, etag }) => Ok(Some(StoredHead { bytes, etag })),
            Err(error) if error.kind == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The head under `key` of a store without them: compares, then writes. Right only while nobody else writes the head.
    pub fn unconditional(store: Arc<dyn ObjectStore>, key: impl Into<String>) -> Self {
        Self { conditional: false, ..Self::new(store, key) }
    }
}

#[async_trait]
impl HeadStorage for ObjectHead {
    fn key(&self) -> &str {
        &self.key
    }

    async fn read(&self) -> Result<Option<StoredHead>, StoreError> {
        let Some(StoredHead { bytes, etag }) = self.stored().await? else { return Ok(None) };
        let body = self
            .seals
            .open_head(&self.key, &bytes)
            .map_err(|error| StoreError::new(ErrorKind::Corrupt, Operation::Get, &self.key).because(error))?;
        Ok(Some(StoredHead { bytes: bytes.slice_ref(body), etag }))
    }

    async fn write(&self, body: Bytes, expected: &Expected) -> WriteReply {
        let precondition = if self.conditional {
            match expected {
                Expected::Absent => Precondition::IfAbsent,
                Expected::Match(etag) => Precondition::IfMatch(etag.clone()),
            }
        } else {
            let now = match self.stored().await {
                Ok(now) => now,
                Err(error) => return WriteReply::NotApplied(error),
            };
            let as_expected = match expected {
                Expected::Absent => now.is_none(),
                Expected::Match(etag) => now.is_some_and(|now| now.etag == *etag),
            };
            if !as_expected {
                let failed = ErrorKind::PreconditionFailed;
                let error = StoreError::new(failed, Operation::Put, &self.key);
                return WriteReply::NotApplied(error);
            }
            Precondition::None
        };
        let object = Bytes::from(self.seals.seal_head(&self.key, &body));
        match self.store.put(&self.key, object, &precondition).await {
            Ok(etag) => WriteReply::Applied(etag),
            Err(error) if error.maybe_applied => WriteReply::Unclear(error),
            Err(error) => WriteReply::NotApplied(error),
        }
    }
}
