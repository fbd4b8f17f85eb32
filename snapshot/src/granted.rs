//! Packs read and written over grants: what a VMM uses instead of a store.
//!
//! Pack PUTs are idempotent (the name belongs to one commit, the body is fixed), so they are retried on time-outs, lost connections and
//! 5xx; refusals (401, 403, 404, 507) are not. One that takes much longer than its siblings is sent a second time (`pace`): the first
//! success counts, the other is cut off. All URLs share one client, so that connections are reused; who opens those is the caller's to say
//! ([`Dial`]). Nothing here looks at a payload: the URLs are signed beforehand, for any body.

use std::{
    collections::HashMap,
    fs::File,
    ops::Range,
    os::unix::fs::FileExt,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header::RANGE};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Incoming};

use crate::{
    grant::{Access, GrantedObject},
    store::{
        ErrorKind, Operation, StoreError,
        directory::io_kind,
        http::{Phase, refused, unanswered, wrong_length},
    },
};

mod connection;
mod pace;

pub use connection::{Dial, Direct, StoreClient};
use pace::{Pace, jittered};

/// Bytes of an error document that are read for its code.
const ERROR_BODY: usize = 4096;
const MAX_BACKOFF: Duration = Duration::from_secs(2);

/// Where finished packs go.
#[async_trait]
pub trait PackSink: Send + Sync {
    /// Stores pack `n` of this capture, counted from 0, and returns its key once it is durable. Called once for each `n`, concurrently for several.
    async fn put(&self, n: u32, bytes: Bytes) -> Result<String, StoreError>;

    /// The key that [`put`](Self::put) will answer for pack `n`, where it is known: what is encrypted is bound to it.
    fn key(&self, n: u32) -> Option<String> {
        let _ = n;
        None
    }

    /// Whether [`keep_copy`](Self::keep_copy) does anything.
    fn keeps_copies(&self) -> bool {
        false
    }

    /// Keeps a copy of pack `n` on this host, if there is a place for one. Called after the pack became durable, beside other PUTs; the
    /// capture waits for it a while. Whether it succeeds is nobody's concern.
    async fn keep_copy(&self, n: u32, bytes: Bytes) {
        let _ = (n, bytes);
    }
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
        Self { attempt: Duration::from_secs(30), attempts: 4, backoff: Duration::from_millis(100) }
    }
}

/// A set of granted packs: a [`PackSink`] over writable grants (in the order given), a [`PackSource`] over readable ones.
#[derive(Debug)]
pub struct GrantedPacks {
    client: StoreClient,
    patience: Patience,
    /// In the order given.
    objects: Vec<(String, Way)>,
    by_key: HashMap<String, usize>,
    /// Local files for the same bytes.
    caches: HashMap<String, Arc<File>>,
    puts: Mutex<Pace>,
    gets: Mutex<Pace>,
}

#[derive(Clone)]
enum Way {
    Url(String),
    File(Arc<File>),
}

// A presigned URL is a credential.
impl std::fmt::Debug for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Url(_) => f.write_str("Url"),
            Self::File(file) => file.fmt(f),
        }
    }
}

impl GrantedPacks {
    /// `files` holds the descriptors that the grants name by token; each is taken. A grant without its descriptor is an error.
    pub fn new(
        client: StoreClient,
        objects: Vec<GrantedObject>,
        files: &mut HashMap<u64, File>,
        patience: Patience,
    ) -> Result<Self, StoreError> {
        let mut ways = Vec::with_capacity(objects.len());
        let mut by_key = HashMap::with_capacity(objects.len());
        let mut caches = HashMap::new();
        for GrantedObject { key, access, cache } in objects {
            // Only a hint, and so is its absence.
            if let Some(file) = cache.and_then(|token| files.remove(&token)) {
                caches.insert(key.clone(), Arc::new(file));
            }
            let way = match access {
                Access::Url(url) => Way::Url(url),
                Access::Fd(token) => Way::File(Arc::new(files.remove(&token).ok_or_else(|| {
                    StoreError::new(ErrorKind::Other, Operation::Grant, &key)
                        .because(format!("no descriptor was sent under token {token}"))
                })?)),
            };
            by_key.insert(key.clone(), ways.len());
            ways.push((key, way));
        }
        Ok(Self { client, patience, objects: ways, by_key, caches, puts: Mutex::default(), gets: Mutex::default() })
    }

    /// How many grants there are.
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// The local files that came with the grants, by key. What a file holds, if anything, is only known by the frames' digests.
    pub fn cache_files(&self) -> HashMap<String, File> {
        let file = |(key, file): (&String, &Arc<File>)| Some((key.clone(), file.try_clone().ok()?));
        self.caches.iter().filter_map(file).collect()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// Tries until it succeeds, is refused, or patience ends.
    async fn patiently<T, F>(&self, mut attempt: impl FnMut() -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let mut wait = self.patience.backoff;
        let mut left = self.patience.attempts.max(1);
        loop {
            left -= 1;
            match attempt().await {
                Err(error) if error.is_retryable() && left > 0 => {
                    tracing::debug!(key = error.key, error = %error, "trying again");
                    tokio::time::sleep(jittered(wait)).await;
                    wait = (wait * 2).min(MAX_BACKOFF);
                }
                done => return done,
            }
        }
    }

    /// Makes an attempt, and a second one beside it when the first takes too long; what succeeds first counts.
    async fn hedged<T, F>(
        &self,
        pace: &Mutex<Pace>,
        bytes: u64,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let started = Instant::now();
        let limit = locked(pace).begin(bytes);
        let mut first = pin!(attempt());
        let early = match limit {
            Some(limit) => tokio::time::timeout(limit, &mut first).await.ok(),
            None => None,
        };
        let result = match early {
            Some(result) => result,
            None if limit.is_some() && locked(pace).hedge() => {
                let mut second = pin!(attempt());
                tokio::select! {
                    result = &mut first => if result.is_ok() { result } else { second.await },
                    result = &mut second => if result.is_ok() { result } else { first.await },
                }
            }
            None => first.await,
        };
        if result.is_ok() {
            locked(pace).succeeded(started.elapsed(), bytes);
        }
        result
    }

    async fn put_url(&self, key: &str, url: &str, bytes: Bytes) -> Result<(), StoreError> {
        let request = Request::builder().method(Method::PUT).uri(url).body(Full::new(bytes));
        let request = request.map_err(|error| unsendable(Operation::Put, key, &error))?;
        self.in_time(Operation::Put, key, async {
            let answer = self.send(Operation::Put, key, request).await?;
            if answer.status().is_success() { Ok(()) } else { Err(refusal(Operation::Put, key, answer).await) }
        })
        .await
    }

    async fn get_url(&self, key: &str, url: &str, range: &Range<u64>) -> Result<Bytes, StoreError> {
        let wanted = format!("bytes={}-{}", range.start, range.end - 1);
        let request = Request::builder().uri(url).header(RANGE, wanted).body(Full::default());
        let request = request.map_err(|error| unsendable(Operation::Get, key, &error))?;
        let expected = range.end - range.start;
        self.in_time(Operation::Get, key, async {
            let mut answer = self.send(Operation::Get, key, request).await?;
            match answer.status() {
                StatusCode::PARTIAL_CONTENT => {}
                // The whole object, because the store ignores ranges.
                StatusCode::OK => {
                    let whole = answer.body().size_hint().exact();
                    return Err(wrong_length(key, whole.unwrap_or(0), expected));
                }
                _ => return Err(refusal(Operation::Get, key, answer).await),
            }
            let mut bytes = Vec::with_capacity(expected as usize);
            while let Some(frame) = answer.frame().await {
                let frame = frame.map_err(|error| unanswered(Operation::Get, key, Phase::Sent, error))?;
                let Ok(chunk) = frame.into_data() else { continue };
                if (bytes.len() + chunk.len()) as u64 > expected {
                    return Err(wrong_length(key, (bytes.len() + chunk.len()) as u64, expected));
                }
                bytes.extend_from_slice(&chunk);
            }
            if bytes.len() as u64 == expected {
                Ok(bytes.into())
            } else {
                Err(wrong_length(key, bytes.len() as u64, expected))
            }
        })
        .await
    }

    async fn send(
        &self,
        operation: Operation,
        key: &str,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, StoreError> {
        self.client.0.request(request).await.map_err(|error| {
            let phase = if error.is_connect() { Phase::Connecting } else { Phase::Sent };
            unanswered(operation, key, phase, error)
        })
    }

    /// One attempt, from the connection to the last byte of the answer.
    async fn in_time<T>(
        &self,
        operation: Operation,
        key: &str,
        attempt: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        match tokio::time::timeout(self.patience.attempt, attempt).await {
            Ok(done) => done,
            Err(late) => Err(unanswered(operation, key, Phase::Sent, late)),
        }
    }
}

/// The error for a URL that is none. It is not repeated: a presigned URL is a credential.
fn unsendable(operation: Operation, key: &str, error: &http::Error) -> StoreError {
    StoreError::new(ErrorKind::Other, operation, key).because(error.to_string())
}

fn locked(pace: &Mutex<Pace>) -> MutexGuard<'_, Pace> {
    pace.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The error for an answer that is no success; reads the start of its body.
async fn refusal(operation: Operation, key: &str, mut answer: Response<Incoming>) -> StoreError {
    let mut body = Vec::new();
    while body.len() < ERROR_BODY
        && let Some(Ok(frame)) = answer.frame().await
    {
        body.extend_from_slice(frame.data_ref().map_or(&[], Bytes::as_ref));
    }
    refused(operation, key, answer.status().as_u16(), &body)
}

/// Runs `work` on the file on a blocking thread.
async fn with_file<T: Send + 'static>(
    operation: Operation,
    key: &str,
    file: &Arc<File>,
    work: impl FnOnce(&File) -> std::io::Result<T> + Send + 'static,
) -> Result<T, StoreError> {
    let file = Arc::clone(file);
    let result = tokio::task::spawn_blocking(move || work(&file)).await;
    result.map_err(|error| StoreError::new(ErrorKind::Other, operation, key).because(error))?.map_err(|error| {
        StoreError::new(io_kind(&error), operation, key).applied(operation == Operation::Put).because(error)
    })
}

#[async_trait]
impl PackSink for GrantedPacks {
    async fn put(&self, n: u32, bytes: Bytes) -> Result<String, StoreError> {
        let Some((key, way)) = self.objects.get(n as usize) else {
            return Err(StoreError::new(ErrorKind::Other, Operation::Put, format!("pack {n}"))
                .because(format!("only {} packs were granted", self.objects.len())));
        };
        match way {
            Way::Url(url) => {
                let put = || self.put_url(key, url, bytes.clone());
                self.patiently(|| self.hedged(&self.puts, bytes.len() as u64, put)).await?;
            }
            Way::File(file) => {
                self.patiently(|| {
                    let bytes = bytes.clone();
                    with_file(Operation::Put, key, file, move |file| {
                        file.set_len(0)?;
                        file.write_all_at(&bytes, 0)?;
                        file.sync_all()
                    })
                })
                .await?;
            }
        }
        Ok(key.clone())
    }

    fn key(&self, n: u32) -> Option<String> {
        self.objects.get(n as usize).map(|(key, _)| key.clone())
    }

    fn keeps_copies(&self) -> bool {
        !self.caches.is_empty()
    }

    async fn keep_copy(&self, n: u32, bytes: Bytes) {
        let Some((key, _)) = self.objects.get(n as usize) else { return };
        let Some(file) = self.caches.get(key) else { return };
        // Readers check the frames' digests: neither a sync nor an order is needed.
        let kept = with_file(Operation::Put, key, file, move |file| {
            file.set_len(0)?;
            file.write_all_at(&bytes, 0)
        });
        if let Err(error) = kept.await {
            tracing::debug!(key, error = %error, "no local copy of a pack");
        }
    }
}

#[async_trait]
impl PackSource for GrantedPacks {
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let way = self.by_key.get(key).and_then(|&at| self.objects.get(at)).map(|(_, way)| way);
        let Some(way) = way else {
            return Err(StoreError::new(ErrorKind::Forbidden, Operation::Get, key).because("the pack was not granted"));
        };
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        match way {
            Way::Url(url) => {
                let get = || self.get_url(key, url, &range);
                self.patiently(|| self.hedged(&self.gets, range.end - range.start, get)).await
            }
            Way::File(file) => {
                self.patiently(|| {
                    let Range { start, end } = range;
                    with_file(Operation::Get, key, file, move |file| {
                        let len = file.metadata()?.len();
                        if end > len {
                            let what = format!("{len} bytes, a range ends at {end}");
                            return Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, what));
                        }
                        let mut bytes = vec![0; (end - start) as usize];
                        file.read_exact_at(&mut bytes, start)?;
                        Ok(Bytes::from(bytes))
                    })
                })
                .await
            }
        }
    }
}
