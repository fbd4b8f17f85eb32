//! The embedded S3 server: s3s (HTTP, SigV4, presigned URLs) over s3s-fs (files), made strict.
//!
//! s3s-fs checks the precondition of a PUT and writes the object in separate steps, and writes the body and its ETag in separate steps. Here
//! every PUT and DELETE of a key excludes every other request for that key, so conditional writes are atomic and an ETag always belongs to
//! the body it is answered with. It also makes buckets out of thin air and answers 412 where S3 answers 404; both are corrected.
//!
//! For development and tests: objects are renamed into place but not synced.

use base64::Engine as _;
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use http::{Request, Response};
use hyper::body::{Body, Incoming};
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use s3s::auth::SimpleAuth;
use s3s::dto::{self, StreamingBlob};
use s3s::service::S3ServiceBuilder;
use s3s::{S3, S3Request, S3Response, S3Result, s3_error};
use s3s_fs::FileSystem;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::RwLock;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Bytes of one object at most: packs have 8 MiB.
const MAX_OBJECT: usize = 256 << 20;
/// Keys that share a lock wait for each other; more stripes wait less.
const STRIPES: usize = 256;

/// Why the embedded server does not start.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// Its directory cannot be used.
    #[error("cannot use {path} for the embedded S3 server: {error}")]
    Directory {
        /// The directory.
        path: String,
        /// Why.
        error: String,
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

/// A running server. It stops when the handle is dropped.
#[derive(Debug)]
pub struct EmbeddedS3 {
    addr: SocketAddr,
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
        let directory = |error: String| EmbeddedError::Directory { path: root.display().to_string(), error };
        std::fs::create_dir_all(root.join(bucket)).map_err(|e| directory(e.to_string()))?;
        sweep(root).map_err(|e| directory(e.to_string()))?;
        let files = FileSystem::new(root).map_err(|e| directory(format!("{e:?}")))?;
        let mut builder = S3ServiceBuilder::new(Strict::new(files, root.to_owned()));
        builder.set_auth(SimpleAuth::from_single(access_key, secret_key));
        let listener = TcpListener::bind(addr).await.map_err(|source| EmbeddedError::Listen { addr, source })?;
        let addr = listener.local_addr().map_err(|source| EmbeddedError::Listen { addr, source })?;
        let stop = CancellationToken::new();
        tokio::spawn(serve(listener, builder.build(), stop.clone()));
        Ok(Self { addr, _stop: stop.drop_guard() })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// `http://…` of it.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.addr)
    }
}

/// Accepts connections until `stop`, one task each; open connections end with it.
pub(super) async fn serve<S, B>(listener: TcpListener, service: S, stop: CancellationToken)
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
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
        let (service, stop) = (service.clone(), stop.clone());
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

/// s3s-fs behind one lock for each group of keys.
#[derive(Clone)]
struct Strict(Arc<Inner>);

struct Inner {
    files: FileSystem,
    root: PathBuf,
    locks: Vec<RwLock<()>>,
}

impl Strict {
    fn new(files: FileSystem, root: PathBuf) -> Self {
        Self(Arc::new(Inner { files, root, locks: (0..STRIPES).map(|_| RwLock::new(())).collect() }))
    }
}

impl Inner {
    /// A PUT whose body is whole.
    async fn put(&self, req: S3Request<dto::PutObjectInput>) -> S3Result<S3Response<dto::PutObjectOutput>> {
        let (bucket, key) = (req.input.bucket.clone(), req.input.key.clone());
        let _alone = self.lock(&bucket, &key).write().await;
        let head = dto::HeadBucketInput { bucket: bucket.clone(), ..Default::default() };
        self.files.head_bucket(beside(&req, head)).await?;
        if req.input.if_match.is_some() {
            let head = dto::HeadObjectInput { bucket, key, ..Default::default() };
            // 404 when there is nothing to match, as S3 answers.
            self.files.head_object(beside(&req, head)).await?;
        }
        self.files.put_object(req).await
    }

    /// s3s-fs leaves what it noted beside an object (ETag, attributes) when the object is deleted.
    fn drop_sidecars(&self, bucket: &str, key: &str) {
        let encode = |text: &str| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(text);
        for kind in ["metadata", "internal"] {
            let path = self.root.join(format!(".bucket-{}.object-{}.{kind}.json", encode(bucket), encode(key)));
            if let Err(error) = std::fs::remove_file(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::debug!(%error, path = %path.display(), "a note beside a deleted object stays");
            }
        }
    }

    fn lock(&self, bucket: &str, key: &str) -> &RwLock<()> {
        let mut hasher = DefaultHasher::new();
        (bucket, key).hash(&mut hasher);
        // The remainder is below STRIPES, the length of `locks`.
        &self.locks[(hasher.finish() % STRIPES as u64) as usize]
    }
}

/// Removes the temporary files of PUTs that a kill interrupted.
fn sweep(root: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(root)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(".tmp.") {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

async fn collect(body: Option<StreamingBlob>) -> S3Result<Bytes> {
    let mut bytes = BytesMut::new();
    let Some(mut body) = body else { return Ok(Bytes::new()) };
    while let Some(chunk) = body.next().await {
        let chunk = chunk.map_err(|_| s3_error!(IncompleteBody))?;
        if bytes.len() + chunk.len() > MAX_OBJECT {
            return Err(s3_error!(EntityTooLarge));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes.freeze())
}

#[async_trait::async_trait]
impl S3 for Strict {
    async fn put_object(&self, mut req: S3Request<dto::PutObjectInput>) -> S3Result<S3Response<dto::PutObjectOutput>> {
        // Whole before the lock: a slow or broken sender must not hold up the key, nor leave half a body.
        let bytes = collect(req.input.body.take()).await?;
        if req.input.content_length.is_some_and(|len| u64::try_from(len) != Ok(bytes.len() as u64)) {
            return Err(s3_error!(IncompleteBody));
        }
        req.input.body = Some(StreamingBlob::wrap(futures::stream::iter([Ok::<_, io::Error>(bytes)])));
        // In a task of its own: a client that hangs up now leaves an object, not half of one.
        let strict = self.clone();
        tokio::spawn(async move { strict.0.put(req).await }).await.map_err(|_| s3_error!(InternalError))?
    }

    async fn get_object(&self, req: S3Request<dto::GetObjectInput>) -> S3Result<S3Response<dto::GetObjectOutput>> {
        let _shared = self.0.lock(&req.input.bucket, &req.input.key).read().await;
        self.0.files.get_object(req).await
    }

    async fn head_object(&self, req: S3Request<dto::HeadObjectInput>) -> S3Result<S3Response<dto::HeadObjectOutput>> {
        let _shared = self.0.lock(&req.input.bucket, &req.input.key).read().await;
        self.0.files.head_object(req).await
    }

    async fn delete_object(
        &self,
        req: S3Request<dto::DeleteObjectInput>,
    ) -> S3Result<S3Response<dto::DeleteObjectOutput>> {
        let (bucket, key) = (req.input.bucket.clone(), req.input.key.clone());
        let _alone = self.0.lock(&bucket, &key).write().await;
        let deleted = self.0.files.delete_object(req).await?;
        self.0.drop_sidecars(&bucket, &key);
        Ok(deleted)
    }

    async fn create_bucket(
        &self,
        req: S3Request<dto::CreateBucketInput>,
    ) -> S3Result<S3Response<dto::CreateBucketOutput>> {
        self.0.files.create_bucket(req).await
    }

    async fn head_bucket(&self, req: S3Request<dto::HeadBucketInput>) -> S3Result<S3Response<dto::HeadBucketOutput>> {
        self.0.files.head_bucket(req).await
    }

    async fn list_buckets(
        &self,
        req: S3Request<dto::ListBucketsInput>,
    ) -> S3Result<S3Response<dto::ListBucketsOutput>> {
        self.0.files.list_buckets(req).await
    }

    async fn list_objects(
        &self,
        req: S3Request<dto::ListObjectsInput>,
    ) -> S3Result<S3Response<dto::ListObjectsOutput>> {
        self.0.files.list_objects(req).await
    }

    async fn list_objects_v2(
        &self,
        req: S3Request<dto::ListObjectsV2Input>,
    ) -> S3Result<S3Response<dto::ListObjectsV2Output>> {
        self.0.files.list_objects_v2(req).await
    }
}

/// The same request around another input.
fn beside<T, U>(req: &S3Request<T>, input: U) -> S3Request<U> {
    S3Request {
        input,
        method: req.method.clone(),
        uri: req.uri.clone(),
        headers: req.headers.clone(),
        extensions: http::Extensions::new(),
        credentials: req.credentials.clone(),
        region: req.region.clone(),
        service: req.service.clone(),
        trailing_headers: None,
    }
}
