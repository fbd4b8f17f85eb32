//! A store in an S3 bucket, through rust-s3.

use std::{fmt, ops::Range, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;

use super::{ETag, ListPage, Object, ObjectStore, Precondition, RawGrant, StoreError};

/// How to reach a bucket. `Debug` hides the keys.
#[derive(Clone, PartialEq, Eq)]
pub struct S3Settings {
    /// `http://…` or `https://…`, without the bucket.
    pub endpoint: String,
    /// Region name; any word for stores that have none.
    pub region: String,
    /// Bucket, which must exist.
    pub bucket: String,
    /// Access key.
    pub access_key: String,
    /// Secret key.
    pub secret_key: String,
    /// Put the bucket in the path rather than in the host name.
    pub path_style: bool,
    /// Deadline of one request.
    pub request_timeout: Duration,
    /// Deadline of one conditional PUT (head, manifest): one attempt.
    pub commit_timeout: Duration,
}

impl fmt::Debug for S3Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Settings")
            .field("endpoint", &self.endpoint)
            .field("region", &self.region)
            .field("bucket", &self.bucket)
            .field("path_style", &self.path_style)
            .field("request_timeout", &self.request_timeout)
            .field("commit_timeout", &self.commit_timeout)
            .finish_non_exhaustive()
    }
}

/// A store in an S3 bucket.
#[derive(Debug)]
pub struct S3Store {
    settings: S3Settings,
}

impl S3Store {
    /// A store with these settings. Sends nothing yet.
    pub fn new(settings: S3Settings) -> Result<Self, StoreError> {
        Ok(Self { settings })
    }

    /// How it reaches its bucket.
    pub fn settings(&self) -> &S3Settings {
        &self.settings
    }
}

#[async_trait]
impl ObjectStore for S3Store {
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
