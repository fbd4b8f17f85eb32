//! The embedded S3 server: s3s (HTTP, SigV4, presigned URLs) over files of a directory ([`super::objects`]).
//!
//! Bodies are streamed between the socket and the file, in pieces of a MiB at most; nothing is hashed but what a client signs. Conditional
//! writes are atomic among the requests to this process, which must be the only one on its directory. File operations run on tokio's
//! blocking threads, everything else in one task for each connection.
//!
//! For development, tests and measurements: objects are renamed into place but not synced. No multipart uploads, no versions, no attributes.

use super::objects::{Condition, Facts, ObjectError, Objects, Upload};
use bytes::Bytes;
use futures::StreamExt as _;
use http::{Method, Request, Response, header};
use hyper::body::{Body, Incoming};
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use s3s::auth::SimpleAuth;
use s3s::dto::{self, ETag, ETagCondition, StreamingBlob};
use s3s::service::S3ServiceBuilder;
use s3s::{S3, S3Error, S3ErrorCode, S3Request, S3Response, S3Result, s3_error};
use std::fs::File;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Bytes of one object at most, as of one PUT to S3.
const MAX_OBJECT: u64 = 5 << 30;
/// Bytes of a body that are written at once.
const WRITE_PIECE: usize = 1 << 20;
/// Bytes of a body that are read at once; a shorter one is read whole.
const READ_PIECE: u64 = 1 << 20;
/// Pieces of one body that are read ahead of the socket.
const READ_AHEAD: usize = 2;
/// Keys of one answer to a listing at most.
const MAX_KEYS: usize = 1000;

/// Why the embedded server does not start.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// Its directory cannot be used.
    #[error("cannot use {path} for the embedded S3 server")]
    Directory {
        /// The directory.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its port cannot be had.
    #[error("the embedded S3 server cannot listen on {addr}")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// One request that was answered, as a bill would count it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// Method.
    pub method: Method,
    /// Path, without the query: `/bucket/key`.
    pub path: String,
    /// Status.
    pub status: u16,
    /// Bytes of the request's body, as it announced them.
    pub sent: u64,
    /// Bytes of the answer's body.
    pub answered: u64,
    /// When the answer's head was ready.
    pub at: Instant,
}

/// Nothing is kept until the first reader comes.
type Exchanges = Arc<Mutex<Option<Vec<Exchange>>>>;

/// A running server. It stops when the handle is dropped.
#[derive(Debug)]
pub struct EmbeddedS3 {
    addr: SocketAddr,
    exchanges: Exchanges,
    _stop: DropGuard,
}

impl EmbeddedS3 {
    /// Serves `root` on `addr` with one pair of keys; makes `bucket`.
    pub async fn start(
        root: &Path,
        addr: SocketAddr,
        bucket: &str,
        access_key: &str,
        secret_key: &str,
    ) -> Result<Self, EmbeddedError> {
        let directory = |source| EmbeddedError::Directory { path: root.display().to_string(), source };
        let objects = Objects::open(root).map_err(directory)?;
        objects.make_bucket(bucket).map_err(|error| directory(io::Error::other(error)))?;
        let mut builder = S3ServiceBuilder::new(Files(Arc::new(objects)));
        builder.set_auth(SimpleAuth::from_single(access_key, secret_key));
        let inner = builder.build();
        let exchanges = Exchanges::default();
        let log = exchanges.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            let log = log.clone();
            let (method, path) = (request.method().clone(), request.uri().path().to_owned());
            let sent = content_length(request.headers()).unwrap_or(0);
            let answer = Service::call(&inner, request);
            async move {
                let answer = answer.await?;
                let body = answer.body().size_hint().exact().or_else(|| content_length(answer.headers()));
                let answered = if method == Method::HEAD { 0 } else { body.unwrap_or(0) };
                if let Some(log) = log.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
                    let status = answer.status().as_u16();
                    log.push(Exchange { method, path, status, sent, answered, at: Instant::now() });
                }
                Ok::<_, s3s::HttpError>(answer)
            }
        });
        let listener = TcpListener::bind(addr).await.map_err(|source| EmbeddedError::Listen { addr, source })?;
        let addr = listener.local_addr().map_err(|source| EmbeddedError::Listen { addr, source })?;
        let stop = CancellationToken::new();
        tokio::spawn(serve(listener, move || service.clone(), stop.clone()));
        Ok(Self { addr, exchanges, _stop: stop.drop_guard() })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// `http://…` of it.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Every request since the last call, in the order of the answers. The first call begins the record and answers nothing.
    pub fn take_exchanges(&self) -> Vec<Exchange> {
        let mut log = self.exchanges.lock().unwrap_or_else(PoisonError::into_inner);
        log.replace(Vec::new()).unwrap_or_default()
    }
}

fn content_length(headers: &http::HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Accepts connections until `stop`, one task and one service of `each` for each; open connections end with it.
pub(super) async fn serve<S, B>(listener: TcpListener, each: impl Fn() -> S + Send, stop: CancellationToken)
where
    S: Service<Request<Incoming>, Response = Response<B>> + Send + 'static,
    S::Future: Send,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, most likely: they come back.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
            () = stop.cancelled() => return,
        };
        let (service, stop) = (each(), stop.clone());
        // Small answers must not wait for the acknowledgement of the ones before.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "cannot set TCP_NODELAY");
        }
        tokio::spawn(async move {
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                ended = connection => if let Err(error) = ended {
                    tracing::debug!(%error, "a connection ended early");
                },
                () = stop.cancelled() => {}
            }
        });
    }
}

/// The S3 operations that Stasis, its tests and a person with a command-line client need.
#[derive(Clone, Debug)]
struct Files(Arc<Objects>);

impl Files {
    /// Runs `work` where it may block.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Objects) -> Result<T, ObjectError> + Send + 'static,
    ) -> S3Result<T> {
        let objects = self.0.clone();
        let done = tokio::task::spawn_blocking(move || work(&objects)).await;
        done.map_err(|_| s3_error!(InternalError))?.map_err(refusal)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn refusal(error: ObjectError) -> S3Error {
    let code = match &error {
        ObjectError::NoBucket => S3ErrorCode::NoSuchBucket,
        ObjectError::NoObject => S3ErrorCode::NoSuchKey,
        ObjectError::BadKey(_) => S3ErrorCode::InvalidArgument,
        ObjectError::Precondition => S3ErrorCode::PreconditionFailed,
        ObjectError::Io(source) => {
            tracing::warn!(error = %source, "the embedded S3 server's directory refuses");
            S3ErrorCode::InternalError
        }
    };
    let mut refusal = S3Error::new(code);
    refusal.set_message(error.to_string());
    refusal
}

fn condition(input: &dto::PutObjectInput) -> S3Result<Condition> {
    match (&input.if_match, &input.if_none_match) {
        (None, None) => Ok(Condition::Always),
        (None, Some(ETagCondition::Any)) => Ok(Condition::Absent),
        (Some(ETagCondition::Any), None) => Ok(Condition::Present),
        (Some(ETagCondition::ETag(tag)), None) => Ok(Condition::Tag(tag.value().to_owned())),
        // As S3: nothing but `*` may be absent.
        _ => Err(s3_error!(NotImplemented)),
    }
}

/// Takes a body into a file. Its pieces are written as they came, without being joined.
async fn receive(mut upload: Upload, body: Option<StreamingBlob>, announced: Option<i64>) -> S3Result<Upload> {
    let Some(mut body) = body else { return Ok(upload) };
    let (mut total, mut waiting, mut pieces) = (0_u64, 0, Vec::new());
    loop {
        let piece = body.next().await.transpose().map_err(|_| s3_error!(IncompleteBody))?;
        let ended = piece.is_none();
        if let Some(piece) = piece {
            total += piece.len() as u64;
            waiting += piece.len();
            pieces.push(piece);
        }
        if total > MAX_OBJECT {
            return Err(s3_error!(EntityTooLarge));
        }
        if waiting >= WRITE_PIECE || (ended && waiting > 0) {
            let batch: Vec<Bytes> = std::mem::take(&mut pieces);
            waiting = 0;
            let written = tokio::task::spawn_blocking(move || {
                for piece in &batch {
                    upload.file.write_all(piece)?;
                }
                Ok::<_, io::Error>(upload)
            });
            upload = written.await.map_err(|_| s3_error!(InternalError))?.map_err(|e| refusal(e.into()))?;
        }
        if ended {
            break;
        }
    }
    if announced.is_some_and(|length| u64::try_from(length) != Ok(total)) {
        return Err(s3_error!(IncompleteBody));
    }
    Ok(upload)
}

fn read_range(file: &File, range: Range<u64>) -> io::Result<Bytes> {
    let len = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, range.start)?;
    Ok(bytes.into())
}

/// The bytes of a range, read a little ahead of who takes them.
fn send(file: File, range: Range<u64>) -> StreamingBlob {
    let file = Arc::new(file);
    let starts = (range.start..range.end).step_by(READ_PIECE as usize);
    let pieces = futures::stream::iter(starts).map(move |start| {
        let (file, end) = (file.clone(), (start + READ_PIECE).min(range.end));
        let read = tokio::task::spawn_blocking(move || read_range(&file, start..end));
        async move { read.await.map_err(io::Error::other)? }
    });
    StreamingBlob::wrap(pieces.buffered(READ_AHEAD))
}

fn length(len: u64) -> Option<i64> {
    i64::try_from(len).ok()
}

/// Of sorted objects those that one answer lists: objects and, with a delimiter, the common prefixes; the last name of an answer that is cut
/// off is where the next one goes on.
struct Page {
    objects: Vec<(String, Facts)>,
    prefixes: Vec<String>,
    next: Option<String>,
}

fn page(all: Vec<(String, Facts)>, prefix: &str, delimiter: Option<&str>, after: &str, max_keys: usize) -> Page {
    let mut page = Page { objects: Vec::new(), prefixes: Vec::new(), next: None };
    let mut last = String::new();
    for (key, facts) in all {
        let group = delimiter.and_then(|delimiter| {
            let at = key.get(prefix.len()..)?.find(delimiter)?;
            Some(key[..prefix.len() + at + delimiter.len()].to_owned())
        });
        // A group that was answered already, here or on the page before.
        if group.as_ref().is_some_and(|group| page.prefixes.last() == Some(group) || group.as_str() <= after) {
            continue;
        }
        if page.objects.len() + page.prefixes.len() == max_keys {
            page.next = Some(last).filter(|last| !last.is_empty());
            break;
        }
        last.clone_from(group.as_ref().unwrap_or(&key));
        match group {
            Some(group) => page.prefixes.push(group),
            None => page.objects.push((key, facts)),
        }
    }
    page
}

#[async_trait::async_trait]
impl S3 for Files {
    async fn put_object(&self, mut req: S3Request<dto::PutObjectInput>) -> S3Result<S3Response<dto::PutObjectOutput>> {
        let condition = condition(&req.input)?;
        // Whole before the condition is looked at: a slow or broken sender must not hold up the key, nor leave half a body.
        let upload = self.blocking(|objects| Ok(objects.begin()?)).await?;
        let upload = receive(upload, req.input.body.take(), req.input.content_length).await?;
        let (bucket, key) = (req.input.bucket, req.input.key);
        let etag = self.blocking(move |objects| objects.commit(upload, &bucket, &key, &condition)).await?;
        Ok(S3Response::new(dto::PutObjectOutput { e_tag: Some(ETag::Strong(etag)), ..Default::default() }))
    }

    async fn get_object(&self, req: S3Request<dto::GetObjectInput>) -> S3Result<S3Response<dto::GetObjectOutput>> {
        let dto::GetObjectInput { bucket, key, range: asked, .. } = req.input;
        // One trip to a blocking thread for what fits into one piece.
        let (file, facts, range, whole) = self
            .blocking(move |objects| {
                let (file, facts) = objects.read(&bucket, &key)?;
                let range = asked.map_or(Ok(0..facts.len), |range| range.check(facts.len));
                let whole = match &range {
                    Ok(range) if range.end - range.start <= READ_PIECE => Some(read_range(&file, range.clone())?),
                    _ => None,
                };
                Ok((file, facts, range, whole))
            })
            .await?;
        let range = range?;
        let body = match whole {
            Some(bytes) => StreamingBlob::wrap(futures::stream::iter([Ok::<_, io::Error>(bytes)])),
            None => send(file, range.clone()),
        };
        let content_range = asked.map(|_| format!("bytes {}-{}/{}", range.start, range.end - 1, facts.len));
        Ok(S3Response::new(dto::GetObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            body: Some(body),
            content_length: length(range.end - range.start),
            content_range,
            e_tag: Some(ETag::Strong(facts.etag)),
            last_modified: Some(facts.modified.into()),
            ..Default::default()
        }))
    }

    async fn head_object(&self, req: S3Request<dto::HeadObjectInput>) -> S3Result<S3Response<dto::HeadObjectOutput>> {
        let dto::HeadObjectInput { bucket, key, .. } = req.input;
        let facts = self.blocking(move |objects| objects.facts(&bucket, &key)).await?;
        Ok(S3Response::new(dto::HeadObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            content_length: length(facts.len),
            e_tag: Some(ETag::Strong(facts.etag)),
            last_modified: Some(facts.modified.into()),
            ..Default::default()
        }))
    }

    async fn delete_object(
        &self,
        req: S3Request<dto::DeleteObjectInput>,
    ) -> S3Result<S3Response<dto::DeleteObjectOutput>> {
        let dto::DeleteObjectInput { bucket, key, .. } = req.input;
        self.blocking(move |objects| objects.delete(&bucket, &key)).await?;
        Ok(S3Response::new(dto::DeleteObjectOutput::default()))
    }

    async fn create_bucket(
        &self,
        req: S3Request<dto::CreateBucketInput>,
    ) -> S3Result<S3Response<dto::CreateBucketOutput>> {
        let bucket = req.input.bucket;
        if self.blocking(move |objects| objects.make_bucket(&bucket)).await? {
            Ok(S3Response::new(dto::CreateBucketOutput::default()))
        } else {
            Err(s3_error!(BucketAlreadyOwnedByYou))
        }
    }

    async fn head_bucket(&self, req: S3Request<dto::HeadBucketInput>) -> S3Result<S3Response<dto::HeadBucketOutput>> {
        self.blocking(move |objects| objects.bucket(&req.input.bucket)).await?;
        Ok(S3Response::new(dto::HeadBucketOutput::default()))
    }

    async fn list_buckets(
        &self,
        _req: S3Request<dto::ListBucketsInput>,
    ) -> S3Result<S3Response<dto::ListBucketsOutput>> {
        let names = self.blocking(|objects| Ok(objects.buckets()?)).await?;
        let buckets = names.into_iter().map(|name| dto::Bucket { name: Some(name), ..Default::default() }).collect();
        Ok(S3Response::new(dto::ListBucketsOutput { buckets: Some(buckets), ..Default::default() }))
    }

    async fn list_objects_v2(
        &self,
        req: S3Request<dto::ListObjectsV2Input>,
    ) -> S3Result<S3Response<dto::ListObjectsV2Output>> {
        let input = req.input;
        let prefix = input.prefix.clone().unwrap_or_default();
        let after = input.continuation_token.clone().max(input.start_after.clone()).unwrap_or_default();
        let max_keys = input.max_keys.and_then(|n| usize::try_from(n).ok()).unwrap_or(MAX_KEYS).min(MAX_KEYS);
        let delimiter = input.delimiter.clone().filter(|delimiter| !delimiter.is_empty());
        let bucket = input.bucket.clone();
        let page = self
            .blocking(move |objects| {
                let all = objects.list(&bucket, &prefix, &after)?;
                Ok(page(all, &prefix, delimiter.as_deref(), &after, max_keys))
            })
            .await?;
        let object = |(key, facts): (String, Facts)| dto::Object {
            key: Some(key),
            size: length(facts.len),
            e_tag: Some(ETag::Strong(facts.etag)),
            last_modified: Some(facts.modified.into()),
            ..Default::default()
        };
        Ok(S3Response::new(dto::ListObjectsV2Output {
            key_count: i32::try_from(page.objects.len() + page.prefixes.len()).ok(),
            is_truncated: Some(page.next.is_some()),
            next_continuation_token: page.next,
            contents: Some(page.objects.into_iter().map(object).collect()),
            common_prefixes: Some(
                page.prefixes.into_iter().map(|prefix| dto::CommonPrefix { prefix: Some(prefix) }).collect(),
            ),
            continuation_token: input.continuation_token,
            delimiter: input.delimiter,
            max_keys: i32::try_from(max_keys).ok(),
            name: Some(input.bucket),
            prefix: input.prefix,
            start_after: input.start_after,
            ..Default::default()
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_a_listing_follow_on_one_another() {
        let facts = Facts { len: 1, etag: "t".to_owned(), modified: std::time::UNIX_EPOCH };
        let keys = ["p/a/1", "p/a/2", "p/b", "p/c/1", "p/c/2", "p/d"];
        let walk = |delimiter: Option<&str>, max_keys| {
            let (mut after, mut names, mut pages) = (String::new(), Vec::new(), 0);
            loop {
                let rest = keys.iter().filter(|key| **key > after.as_str());
                let all = rest.map(|key| ((*key).to_owned(), facts.clone())).collect();
                let page = page(all, "p/", delimiter, &after, max_keys);
                pages += 1;
                names.extend(page.prefixes);
                names.extend(page.objects.into_iter().map(|(key, _)| key));
                match page.next {
                    Some(next) => after = next,
                    None => break,
                }
            }
            names.sort();
            (names, pages)
        };
        assert_eq!(walk(None, 4), (keys.map(str::to_owned).to_vec(), 2));
        let grouped = ["p/a/", "p/b", "p/c/", "p/d"].map(str::to_owned).to_vec();
        for max_keys in 1..=5 {
            assert_eq!(walk(Some("/"), max_keys).0, grouped, "{max_keys}");
        }
    }
}
