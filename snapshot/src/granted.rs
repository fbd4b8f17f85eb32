//! Packs read and written over grants: what a VMM uses instead of a store.
//!
//! Pack PUTs are idempotent (the name belongs to one commit, the body is fixed), so they are retried on time-outs, lost connections and
//! 5xx; refusals (401, 403, 404, 507) are not.

use std::{collections::HashMap, fs::File, ops::Range, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;

use crate::{grant::GrantedObject, store::StoreError};

/// Where finished packs go.
#[async_trait]
pub trait PackSink: Send + Sync {
    /// Stores pack `n` of this capture, counted from 0, and returns its key once it is durable. Called once for each `n`, concurrently for several.
    async fn put(&self, n: u32, bytes: Bytes) -> Result<String, StoreError>;
}

/// Where pack bytes come from.
#[async_trait]
pub trait PackSource: Send + Sync {
    /// Exactly the bytes of `range` of the pack with this key. Called concurrently.
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError>;
}

/// How patient to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Deadline of one attempt.
    pub attempt: Duration,
    /// Attempts at most, the first included.
    pub attempts: u32,
    /// Wait before the second attempt; doubles each time, at most 2 s.
    pub backoff: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            attempt: Duration::from_secs(30),
            attempts: 4,
            backoff: Duration::from_millis(100),
        }
    }
}

/// A set of granted packs: a [`PackSink`] over writable grants (in the order given), a [`PackSource`] over readable ones.
#[derive(Debug)]
pub struct GrantedPacks {}

impl GrantedPacks {
    /// `files` holds the descriptors that the grants name by token; each is taken. A grant without its descriptor is an error.
    pub fn new(
        objects: Vec<GrantedObject>,
        files: &mut HashMap<u64, File>,
        patience: Patience,
    ) -> Result<Self, StoreError> {
        let _ = (objects, files, patience);
        todo!()
    }
}

#[async_trait]
impl PackSink for GrantedPacks {
    async fn put(&self, _n: u32, _bytes: Bytes) -> Result<String, StoreError> {
        todo!()
    }
}

#[async_trait]
impl PackSource for GrantedPacks {
    async fn get_range(&self, _key: &str, _range: Range<u64>) -> Result<Bytes, StoreError> {
        todo!()
    }
}
