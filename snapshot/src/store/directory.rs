//! A store in a directory, for one host.

use std::{ops::Range, path::PathBuf, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;

use super::{ETag, ListPage, Object, ObjectStore, Precondition, RawGrant, StoreError};

/// A store whose objects are files under a root directory.
#[derive(Clone, Debug)]
pub struct DirectoryStore {
    root: PathBuf,
}

impl DirectoryStore {
    /// Opens the store under `root`, which must exist.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, StoreError> {
        Ok(Self { root: root.into() })
    }

    /// The root directory.
    pub fn root(&self) -> &std::path::Path {
        &self.root
    }
}

#[async_trait]
impl ObjectStore for DirectoryStore {
    async fn get(&self, _key: &str) -> Result<Object, StoreError> {
        todo!()
    }
    async fn get_range(&self, _key: &str, _range: Range<u64>) -> Result<Bytes, StoreError> {
        todo!()
    }
    async fn put(
        &self,
        _key: &str,
        _bytes: Bytes,
        _precondition: &Precondition,
    ) -> Result<ETag, StoreError> {
        todo!()
    }
    async fn list(&self, _prefix: &str, _next: Option<&str>) -> Result<ListPage, StoreError> {
        todo!()
    }
    async fn delete(&self, _key: &str) -> Result<(), StoreError> {
        todo!()
    }
    async fn grant_put(&self, _key: &str, _ttl: Duration) -> Result<RawGrant, StoreError> {
        todo!()
    }
    async fn grant_get(&self, _key: &str, _ttl: Duration) -> Result<RawGrant, StoreError> {
        todo!()
    }
}
