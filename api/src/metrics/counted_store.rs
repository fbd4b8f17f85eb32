//! An object store whose requests are counted and timed.

use super::{Metrics, STORE_REQUESTS, STORE_SECONDS};
use async_trait::async_trait;
use bytes::Bytes;
use stasis_snapshot::store::{ETag, ErrorKind, ListPage, Object, ObjectStore, Precondition, RawGrant, StoreError};
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// See the module's documentation.
#[derive(Debug)]
pub struct CountedStore {
    objects: Arc<dyn ObjectStore>,
    metrics: Arc<Metrics>,
}

impl CountedStore {
    /// Counts the requests to `objects` in `metrics`.
    pub fn new(objects: Arc<dyn ObjectStore>, metrics: Arc<Metrics>) -> Self {
        Self { objects, metrics }
    }

    async fn count<T>(
        &self,
        request: &'static str,
        call: impl Future<Output = Result<T, StoreError>> + Send,
    ) -> Result<T, StoreError> {
        let begun = Instant::now();
        let outcome = call.await;
        self.metrics.observe(STORE_SECONDS, &[("request", request)], begun.elapsed());
        let word = match &outcome {
            Ok(_) => "ok",
            Err(error) if error.is_retryable() => "retryable",
            // These answer a question: is it there, has it changed.
            Err(error) if matches!(error.kind, ErrorKind::NotFound | ErrorKind::PreconditionFailed) => "no",
            Err(_) => "error",
        };
        self.metrics.count(STORE_REQUESTS, &[("request", request), ("outcome", word)], 1);
        outcome
    }
}

#[async_trait]
impl ObjectStore for CountedStore {
    async fn get(&self, key: &str) -> Result<Object, StoreError> {
        self.count("get", self.objects.get(key)).await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.count("get", self.objects.get_range(key, range)).await
    }

    async fn put(&self, key: &str, bytes: Bytes, precondition: &Precondition) -> Result<ETag, StoreError> {
        self.count("put", self.objects.put(key, bytes, precondition)).await
    }

    async fn list(&self, prefix: &str, next: Option<&str>) -> Result<ListPage, StoreError> {
        self.count("list", self.objects.list(prefix, next)).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.count("delete", self.objects.delete(key)).await
    }

    // Grants are made here: no request is sent.
    async fn grant_put(&self, key: &str, ttl: Duration) -> Result<RawGrant, StoreError> {
        self.objects.grant_put(key, ttl).await
    }

    async fn grant_get(&self, key: &str, ttl: Duration) -> Result<RawGrant, StoreError> {
        self.objects.grant_get(key, ttl).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stasis_snapshot::store::directory::DirectoryStore;

    #[tokio::test]
    async fn requests_are_counted_by_what_came_of_them() {
        let dir = tempfile::tempdir().unwrap();
        let metrics = Arc::new(Metrics::default());
        let store = CountedStore::new(Arc::new(DirectoryStore::open(dir.path()).unwrap()), metrics.clone());
        store.put("v1/a", Bytes::from_static(b"x"), &Precondition::None).await.unwrap();
        store.get("v1/a").await.unwrap();
        store.get("v1/b").await.unwrap_err();
        let text = super::super::text(&metrics.samples());
        for line in [
            "stasis_store_requests_total{request=\"put\",outcome=\"ok\"} 1",
            "stasis_store_requests_total{request=\"get\",outcome=\"ok\"} 1",
            "stasis_store_requests_total{request=\"get\",outcome=\"no\"} 1",
            "stasis_store_request_seconds_count{request=\"get\"} 2",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
