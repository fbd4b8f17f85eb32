//! A store in an S3 bucket, through rust-s3.
//!
//! Nothing is retried here, nor below: rust-s3's own retries are switched off, and conditional PUTs go through a client of their own with
//! a short deadline, so that the caller knows what was sent. A retry that nobody sees turns the first attempt's success into a 412.

use std::{collections::HashMap, fmt, ops::Range, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use s3::{Bucket, Region, creds::Credentials, error::S3Error, request::ResponseData};

use super::{
    ETag, ListPage, Listed, Object, ObjectStore, Precondition, RawGrant, StoreError,
    error::{ErrorKind, Operation},
    http,
};

/// A presigned URL is valid for a week at most.
const MAX_TTL: Duration = Duration::from_hours(7 * 24);
const LIST_PAGE: usize = 1000;

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
pub struct S3Store {
    settings: S3Settings,
    bucket: Box<Bucket>,
    /// Conditional PUTs only: its own connections and deadline.
    commits: Box<Bucket>,
}

impl fmt::Debug for S3Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("S3Store").field(&self.settings).finish()
    }
}

impl S3Store {
    /// A store with these settings. Sends nothing yet.
    pub fn new(settings: S3Settings) -> Result<Self, StoreError> {
        // Process-wide; nothing else here uses rust-s3.
        s3::set_retries(0);
        let open = |timeout| -> Result<Box<Bucket>, S3Error> {
            let region = Region::Custom { region: settings.region.clone(), endpoint: settings.endpoint.clone() };
            let credentials =
                Credentials::new(Some(&settings.access_key), Some(&settings.secret_key), None, None, None)?;
            let mut bucket = Bucket::new(&settings.bucket, region, credentials)?;
            if settings.path_style {
                bucket.set_path_style();
            }
            bucket.set_request_timeout(Some(timeout));
            Ok(bucket)
        };
        let failed = |error| failure(Operation::Get, &settings.bucket, error);
        let bucket = open(settings.request_timeout).map_err(failed)?;
        let commits = open(settings.commit_timeout).map_err(failed)?;
        Ok(Self { settings, bucket, commits })
    }

    /// How it reaches its bucket.
    pub fn settings(&self) -> &S3Settings {
        &self.settings
    }
}

/// The error for a request that failed within rust-s3.
fn failure(operation: Operation, key: &str, error: S3Error) -> StoreError {
    match error {
        S3Error::HttpFailWithBody(status, body) => http::refused(operation, key, status, body.as_bytes()),
        S3Error::Reqwest(error) => http::unanswered_by_bucket(operation, key, error),
        other => StoreError::new(ErrorKind::Other, operation, key).because(other),
    }
}

/// The answer, if it is a success.
fn success(operation: Operation, key: &str, answer: Result<ResponseData, S3Error>) -> Result<ResponseData, StoreError> {
    let answer = answer.map_err(|error| failure(operation, key, error))?;
    if (200..300).contains(&answer.status_code()) {
        Ok(answer)
    } else {
        Err(http::refused(operation, key, answer.status_code(), answer.as_slice()))
    }
}

fn etag(operation: Operation, key: &str, headers: &HashMap<String, String>) -> Result<ETag, StoreError> {
    match headers.get("etag") {
        Some(tag) if !tag.is_empty() => Ok(ETag(tag.clone())),
        _ => Err(StoreError::new(ErrorKind::Other, operation, key)
            .applied(operation == Operation::Put)
            .because("the store's answer has no ETag")),
    }
}

fn ttl_seconds(ttl: Duration) -> u32 {
    u32::try_from(ttl.min(MAX_TTL).as_secs().max(1)).unwrap_or(1)
}

#[async_trait]
impl ObjectStore for S3Store {
    async fn get(&self, key: &str) -> Result<Object, StoreError> {
        let answer = success(Operation::Get, key, self.bucket.get_object(key).await)?;
        Ok(Object { etag: etag(Operation::Get, key, &answer.headers())?, bytes: answer.into_bytes() })
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let answer = self.bucket.get_object_range(key, range.start, Some(range.end - 1)).await;
        let answer = success(Operation::Get, key, answer)?;
        let expected = range.end - range.start;
        let got = answer.bytes().len() as u64;
        if answer.status_code() == 206 && got == expected {
            Ok(answer.into_bytes())
        } else {
            Err(http::wrong_length(key, got, expected))
        }
    }

    async fn put(&self, key: &str, bytes: Bytes, precondition: &Precondition) -> Result<ETag, StoreError> {
        let (bucket, header) = match precondition {
            Precondition::None => (&self.bucket, None),
            Precondition::IfAbsent => (&self.commits, Some(("if-none-match", "*"))),
            Precondition::IfMatch(tag) => (&self.commits, Some(("if-match", tag.0.as_str()))),
        };
        let mut request = bucket.put_object_builder(key, &bytes);
        if let Some((name, value)) = header {
            request = request.with_header(name, value).map_err(|error| failure(Operation::Put, key, error))?;
        }
        let answer = success(Operation::Put, key, request.execute().await)?;
        etag(Operation::Put, key, &answer.headers())
    }

    async fn list(&self, prefix: &str, next: Option<&str>) -> Result<ListPage, StoreError> {
        let (listed, _) = self
            .bucket
            .list_page(prefix.to_owned(), None, next.map(str::to_owned), None, Some(LIST_PAGE))
            .await
            .map_err(|error| failure(Operation::List, prefix, error))?;
        let next = listed.next_continuation_token;
        if listed.is_truncated && next.is_none() {
            return Err(StoreError::new(ErrorKind::Other, Operation::List, prefix)
                .because("the listing is cut off and names no continuation"));
        }
        Ok(ListPage {
            next: next.filter(|_| listed.is_truncated),
            objects: listed.contents.into_iter().map(|object| Listed { key: object.key, size: object.size }).collect(),
        })
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        match success(Operation::Delete, key, self.bucket.delete_object(key).await) {
            Err(error) if error.kind != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    async fn grant_put(&self, key: &str, ttl: Duration) -> Result<RawGrant, StoreError> {
        self.bucket
            .presign_put(key, ttl_seconds(ttl), None, None)
            .await
            .map(RawGrant::Url)
            .map_err(|error| failure(Operation::Grant, key, error))
    }

    async fn grant_get(&self, key: &str, ttl: Duration) -> Result<RawGrant, StoreError> {
        self.bucket
            .presign_get(key, ttl_seconds(ttl), None)
            .await
            .map(RawGrant::Url)
            .map_err(|error| failure(Operation::Grant, key, error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_hides_the_keys() {
        let settings = S3Settings {
            endpoint: "http://localhost:9".into(),
            region: "r".into(),
            bucket: "b".into(),
            access_key: "the-access-key".into(),
            secret_key: "the-secret-key".into(),
            path_style: true,
            request_timeout: Duration::from_secs(1),
            commit_timeout: Duration::from_secs(1),
        };
        let store = S3Store::new(settings.clone()).unwrap();
        for text in [format!("{settings:?}"), format!("{store:?}")] {
            assert!(!text.contains("the-"), "{text}");
        }
    }
}
