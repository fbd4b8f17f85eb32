//! Object stores behind one trait: [`DirectoryStore`](directory::DirectoryStore) and [`S3Store`](s3::S3Store).
//!
//! Only the supervisor holds an [`ObjectStore`]; a VMM gets [grants](crate::grant). A successful `put` is durable. A failed one may
//! have been applied all the same: [`StoreError::maybe_applied`] says so.

pub mod directory;
pub mod error;
pub(crate) mod http;
pub mod probe;
pub mod s3;

use std::{fmt, fs::File, ops::Range, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use error::{ErrorKind, Operation, StoreError};

/// Names one body of one object: changes with every body that differs. Opaque; compared only by the store.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ETag(pub String);

/// What must hold for a PUT to be applied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precondition {
    /// Nothing.
    None,
    /// The object does not exist.
    IfAbsent,
    /// The object exists and has this tag.
    IfMatch(ETag),
}

/// An object that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Its body.
    pub bytes: Bytes,
    /// The tag of that body.
    pub etag: ETag,
}

/// One line of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Store key.
    pub key: String,
    /// Bytes.
    pub size: u64,
}

/// A part of a listing, in key order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListPage {
    /// The objects.
    pub objects: Vec<Listed>,
    /// Give this to the next call; `None` at the end.
    pub next: Option<String>,
}

/// The way to one object, to be handed to a VMM: the supervisor makes a [`GrantedObject`](crate::grant::GrantedObject) of it.
#[derive(Debug)]
pub enum RawGrant {
    /// A presigned URL.
    Url(String),
    /// An opened file: new, empty and writable for a PUT; read-only for a GET.
    File(File),
}

/// A store of immutable or compare-and-swapped objects. Methods may be called concurrently; each ends within the store's own deadline.
#[async_trait]
pub trait ObjectStore: Send + Sync + fmt::Debug {
    /// The whole object and its tag, read together.
    async fn get(&self, key: &str) -> Result<Object, StoreError>;

    /// Exactly the bytes of `range`; [`ErrorKind::Corrupt`] when the object is shorter.
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError>;

    /// Writes the object whole, if `precondition` holds, and returns the tag of the new body. Durable when it returns. Sent at most
    /// once: a retry is the caller's decision.
    async fn put(&self, key: &str, bytes: Bytes, precondition: &Precondition) -> Result<ETag, StoreError>;

    /// Objects whose key begins with `prefix`, in key order; `next` is from the page before. At most 1000 a page.
    async fn list(&self, prefix: &str, next: Option<&str>) -> Result<ListPage, StoreError>;

    /// Deletes the object. One that does not exist is a success.
    async fn delete(&self, key: &str) -> Result<(), StoreError>;

    /// Lets the bearer write this one object, once created, within `ttl`.
    async fn grant_put(&self, key: &str, ttl: Duration) -> Result<RawGrant, StoreError>;

    /// Lets the bearer read this one object within `ttl`.
    async fn grant_get(&self, key: &str, ttl: Duration) -> Result<RawGrant, StoreError>;
}
