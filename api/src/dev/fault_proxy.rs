//! A proxy that breaks things on the wire, for tests: it stands between clients and an S3 server and applies [`Rule`]s to requests.
//!
//! The faults are those the commit protocol must survive: refused before applying, applied with the reply lost or replaced, applied late,
//! slow, silent, and damaged content. The `Host` header passes unchanged, so signatures and presigned URLs stay valid through the proxy.
//!
//! It can imitate a [link](LinkShape) too. Then bodies are streamed at the link's rate, and only a request that a rule treats is held until
//! it has arrived whole; without a link every request is.
//!
//! Every connection is one task.

use super::link::{Bodies, BoxError, Link, LinkShape, Way, whole};
use super::s3::serve;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::service::service_fn;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_util::sync::{CancellationToken, DropGuard};

const MAX_BODY: usize = 64 << 20;

/// What is done to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Answer this status; the server never sees the request.
    Refuse(u16),
    /// Pass it on after this long.
    Delay(Duration),
    /// Pass it on once [`FaultProxy::release`] is called.
    Hold,
    /// Never answer, never pass it on; the client's deadline decides.
    Hang,
    /// Close the connection; the server never sees the request.
    Drop,
    /// Pass it on, then close the connection instead of answering.
    LoseReply,
    /// Pass it on, then answer this status instead.
    ReplaceReply(u16),
    /// Close the connection at once and pass the request on after this long.
    ApplyLate(Duration),
    /// Pass it on and flip one bit in the middle of the answer's body.
    FlipBit,
    /// Pass it on and cut the answer's body in half (with the length to match).
    Truncate,
}

/// Which requests, and what happens to them.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Only this method.
    pub method: Option<Method>,
    /// Only paths that contain this.
    pub path: String,
    /// Let this many matching requests pass first.
    pub skip: usize,
    /// Then treat this many; then the rule is spent.
    pub times: usize,
    /// How.
    pub fault: Fault,
}

impl Rule {
    /// All requests of `method` whose path contains `path`, from the first one on, for ever.
    pub fn every(method: Method, path: &str, fault: Fault) -> Self {
        Self { method: Some(method), path: path.to_owned(), skip: 0, times: usize::MAX, fault }
    }

    /// The first such request only.
    pub fn once(method: Method, path: &str, fault: Fault) -> Self {
        Self { times: 1, ..Self::every(method, path, fault) }
    }

    /// The same rule after `skip` matching requests.
    #[must_use]
    pub fn after(self, skip: usize) -> Self {
        Self { skip, ..self }
    }

    /// The fault for this request, if the rule treats it; counts it either way.
    fn treat(&mut self, method: &Method, path: &str) -> Option<Fault> {
        if self.method.as_ref().is_some_and(|m| m != method) || !path.contains(&self.path) || self.times == 0 {
            return None;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        self.times = self.times.saturating_sub(usize::from(self.times != usize::MAX));
        Some(self.fault.clone())
    }
}

/// A request that the proxy saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Method.
    pub method: Method,
    /// Path, without the query.
    pub path: String,
    /// Bytes of its body; as announced, where a link is imitated.
    pub bytes: usize,
    /// What was done to it.
    pub fault: Option<Fault>,
}

#[derive(Debug, Default)]
struct Book {
    rules: Vec<Rule>,
    seen: Vec<Seen>,
    under_way: Arc<AtomicUsize>,
    held: Arc<AtomicUsize>,
    /// Notified when what is held may go on.
    released: Arc<Notify>,
    link: Option<Arc<Link>>,
}

impl Book {
    /// Notes a request and says what is done to it.
    fn enter(&mut self, method: &Method, path: &str, bytes: usize) -> Option<Fault> {
        let fault = self.rules.iter_mut().find_map(|rule| rule.treat(method, path));
        self.seen.push(Seen { method: method.clone(), path: path.to_owned(), bytes, fault: fault.clone() });
        fault
    }
}

/// Counts a request until it is dropped.
#[derive(Debug)]
struct UnderWay(Arc<AtomicUsize>);

impl UnderWay {
    fn one_more(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count.clone())
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A running proxy. It stops when the handle is dropped.
#[derive(Debug)]
pub struct FaultProxy {
    addr: SocketAddr,
    book: Arc<Mutex<Book>>,
    _stop: DropGuard,
}

impl FaultProxy {
    /// Starts one on a free loopback port in front of `upstream`.
    pub async fn start(upstream: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let addr = listener.local_addr()?;
        let book = Arc::new(Mutex::new(Book::default()));
        let stop = CancellationToken::new();
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let client: Upstream = Client::builder(TokioExecutor::new()).build(connector);
        let shared = book.clone();
        let each = move || {
            let (client, book, fresh) = (client.clone(), shared.clone(), Arc::new(AtomicBool::new(true)));
            service_fn(move |request| pass(request, upstream, client.clone(), book.clone(), fresh.clone()))
        };
        tokio::spawn(serve(listener, each, stop.clone()));
        Ok(Self { addr, book, _stop: stop.drop_guard() })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// `http://…` of it, for the store's endpoint.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Adds a rule. The first rule that treats a request wins.
    pub fn add(&self, rule: Rule) {
        self.book().rules.push(rule);
    }

    /// Removes all rules. What hangs goes on hanging until its client gives up.
    pub fn clear(&self) {
        self.book().rules.clear();
    }

    /// Requests that are held now.
    pub fn held(&self) -> usize {
        self.book().held.load(Ordering::SeqCst)
    }

    /// Removes all rules and lets every request that is held go on.
    pub fn release(&self) {
        let mut book = self.book();
        book.rules.clear();
        book.released.notify_waiters();
    }

    /// No request is under way: none hangs, is delayed or is still to be passed on.
    pub fn is_quiet(&self) -> bool {
        self.book().under_way.load(Ordering::SeqCst) == 0
    }

    /// Imitates this link from the next request on; `None` for none.
    pub fn shape(&self, shape: Option<LinkShape>) {
        self.book().link = shape.map(|shape| Arc::new(Link::new(shape)));
    }

    /// Every request since the last call, in order of arrival.
    pub fn take_seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.book().seen)
    }

    fn book(&self) -> std::sync::MutexGuard<'_, Book> {
        book_of(&self.book)
    }
}

type Upstream = Client<HttpConnector, Bodies>;

fn dropped() -> BoxError {
    "the fault proxy closes this connection".into()
}

fn book_of(book: &Mutex<Book>) -> std::sync::MutexGuard<'_, Book> {
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn pass(
    request: Request<Incoming>,
    to: SocketAddr,
    client: Upstream,
    book: Arc<Mutex<Book>>,
    fresh: Arc<AtomicBool>,
) -> Result<Response<Bodies>, BoxError> {
    let under_way = UnderWay::one_more(&book_of(&book).under_way);
    let (mut parts, body) = request.into_parts();
    let path = parts.uri.path().to_owned();
    let target = parts.uri.path_and_query().map_or("/", |p| p.as_str());
    parts.uri = format!("http://{to}{target}").parse()?;
    let link = book_of(&book).link.clone();
    let announced = body.size_hint().exact().and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(0);
    let fault = link.as_ref().map(|_| book_of(&book).enter(&parts.method, &path, announced));
    if let (Some(link), Some(None)) = (&link, &fault) {
        let answer = client.request(Request::from_parts(parts, link.shaped(body, Way::Up))).await?;
        link.travel(&fresh).await;
        return Ok(answer.map(|body| link.shaped(body, Way::Down)));
    }
    let body = Limited::new(body, MAX_BODY).collect().await?.to_bytes();
    let fault = fault.unwrap_or_else(|| book_of(&book).enter(&parts.method, &path, body.len()));
    if let Some(link) = link {
        link.carry(body.len(), Way::Up).await;
        link.travel(&fresh).await;
    }
    // The body is whole and has a length now.
    parts.headers.remove(http::header::TRANSFER_ENCODING);
    let forward = move || send(client, Request::from_parts(parts, whole(body)));
    match fault {
        None => forward().await,
        Some(Fault::Refuse(status)) => Ok(refusal(status)),
        Some(Fault::Delay(by)) => {
            tokio::time::sleep(by).await;
            forward().await
        }
        Some(Fault::Hold) => {
            // Counted and waiting from one moment on: a release between the two would be missed.
            let (counted, released) = {
                let book = book_of(&book);
                (UnderWay::one_more(&book.held), book.released.clone().notified_owned())
            };
            released.await;
            drop(counted);
            forward().await
        }
        Some(Fault::Hang) => std::future::pending().await,
        Some(Fault::Drop) => Err(dropped()),
        Some(Fault::LoseReply) => {
            forward().await?;
            Err(dropped())
        }
        Some(Fault::ReplaceReply(status)) => {
            forward().await?;
            Ok(refusal(status))
        }
        Some(Fault::ApplyLate(by)) => {
            tokio::spawn(async move {
                let _until_then = under_way;
                tokio::time::sleep(by).await;
                forward().await.map(drop)
            });
            Err(dropped())
        }
        Some(Fault::FlipBit) => edit(forward().await?, |body| {
            let middle = body.len() / 2;
            if let Some(byte) = body.get_mut(middle) {
                *byte ^= 1;
            }
        }),
        Some(Fault::Truncate) => edit(forward().await?, |body| body.truncate(body.len() / 2)),
    }
}

async fn send(client: Upstream, request: Request<Bodies>) -> Result<Response<Bodies>, BoxError> {
    let (parts, body) = client.request(request).await?.into_parts();
    Ok(Response::from_parts(parts, whole(body.collect().await?.to_bytes())))
}

fn edit(response: Response<Bodies>, change: impl FnOnce(&mut Vec<u8>)) -> Result<Response<Bodies>, BoxError> {
    let (mut parts, body) = response.into_parts();
    let Some(Ok(frame)) = futures::FutureExt::now_or_never(body.collect()) else { return Err(dropped()) };
    let mut bytes = frame.to_bytes().to_vec();
    change(&mut bytes);
    parts.headers.insert(http::header::CONTENT_LENGTH, HeaderValue::from(bytes.len()));
    Ok(Response::from_parts(parts, whole(bytes.into())))
}

fn refusal(status: u16) -> Response<Bodies> {
    let code = match status {
        401 => "InvalidAccessKeyId",
        403 => "AccessDenied",
        404 => "NoSuchBucket",
        409 => "ConditionalRequestConflict",
        503 => "SlowDown",
        507 => "InsufficientStorage",
        _ => "InternalError",
    };
    let body = format!(
        "<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>injected by the fault proxy</Message></Error>"
    );
    let mut response = Response::new(whole(Bytes::from(body)));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/xml"));
    response
}
