//! Where a head is kept: the storage trait and its implementation over an [`ObjectStore`].

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::plan::Expected;
use crate::store::{ETag, ObjectStore, StoreError};

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
    /// The head as it is now; `None` when there is none.
    async fn read(&self) -> Result<Option<StoredHead>, StoreError>;

    /// Writes the head if it is as expected.
    async fn write(&self, body: Bytes, expected: &Expected) -> WriteReply;
}

/// A head in an object store.
#[derive(Clone, Debug)]
pub struct ObjectHead {
    store: Arc<dyn ObjectStore>,
    key: String,
    conditional: bool,
}

impl ObjectHead {
    /// The head under `key` of a store with conditional writes.
    pub fn new(store: Arc<dyn ObjectStore>, key: impl Into<String>) -> Self {
        Self {
            store,
            key: key.into(),
            conditional: true,
        }
    }

    /// The head under `key` of a store without them: compares, then writes. Right only while nobody else writes the head.
    pub fn unconditional(store: Arc<dyn ObjectStore>, key: impl Into<String>) -> Self {
        Self {
            conditional: false,
            ..Self::new(store, key)
        }
    }
}

#[async_trait]
impl HeadStorage for ObjectHead {
    async fn read(&self) -> Result<Option<StoredHead>, StoreError> {
        let _ = (&self.store, &self.key, self.conditional);
        todo!()
    }

    async fn write(&self, _body: Bytes, _expected: &Expected) -> WriteReply {
        todo!()
    }
}
