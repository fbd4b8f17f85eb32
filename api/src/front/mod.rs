//! The listener: takes connections, in clear or over TLS, HTTP/1.1 or HTTP/2, and gives each request to the API or to a sandbox by its host.
//!
//! | module | what |
//! | --- | --- |
//! | `tls` | certificate and key |
//! | `authority` | the certificates of `stasis dev` |
//!
//! Each connection is a task. HTTP/2 is agreed on by ALPN, or in clear by a client that begins with its preface. TLS is told from HTTP by its
//! first octet, so one port serves both where both are wanted.

pub mod authority;
pub mod tls;

use crate::error::Error;
use crate::ids::SandboxId;
use crate::invoke::{self, Account, Client, Destination, Domain};
use crate::metrics::{INVOKE_SECONDS, INVOKES};
use crate::routes;
use crate::supervisor::Core;
use crate::telemetry;
use axum::Router;
use axum::body::Body;
use axum::response::Response;
use http::{HeaderName, HeaderValue, Request};
use hyper::body::Incoming;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use opentelemetry::Context;
use opentelemetry::context::FutureExt as _;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

/// Connections at once; the next one waits in the listener's queue.
const CONNECTIONS: usize = 4096;
/// For the first octet, for the TLS handshake, and for the head of a request.
const PATIENCE: Duration = Duration::from_secs(30);
/// An HTTP/2 client is asked this often whether it is still there.
const PING: Duration = Duration::from_secs(30);
/// Requests of one HTTP/2 connection at once.
const STREAMS: u32 = 250;
/// After a failed `accept`: if it fails for want of descriptors, the next one does too.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// First octet of a TLS connection: a handshake record (RFC 8446 §5.1).
const TLS_HANDSHAKE: u8 = 0x16;
/// To a client that speaks HTTP where only TLS is served.
const SPEAK_TLS: &[u8] = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: 55\r\nconnection: close\r\n\r\n{\"message\":\"this port serves https only, use https://\"}";
/// Bytes of such a client's request that are read.
const SPEAK_TLS_READ: u64 = 64 << 10;
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const REQUEST_ID_CHARS: usize = 16;

/// What answers requests.
pub struct Front {
    core: Arc<Core>,
    api: TowerToHyperService<Router>,
    domain: Domain,
    tls: Option<TlsAcceptor>,
}

impl Front {
    /// The API and the sandboxes of `core`.
    pub fn new(core: Arc<Core>, tls: Option<TlsAcceptor>) -> Result<Self, Error> {
        let domain = core.config.invoke.domain().map_err(|e| Error::Host(e.to_string()))?;
        Ok(Self { api: TowerToHyperService::new(routes::router(core.clone())), core, domain, tls })
    }

    async fn answer(&self, request: Request<Incoming>, client: Client) -> Response {
        let id = self.core.sources.word(REQUEST_ID_CHARS);
        // Every line that is logged for a request has its id, and its sandbox once that is known.
        let span = tracing::info_span!("request", request = id, sandbox = tracing::field::Empty);
        let trace = self.core.telemetry.request(request.method(), request.headers(), &id);
        let answer = self.route(request.map(Body::new), client).instrument(span);
        let mut response = answer.with_context(trace.clone()).await;
        telemetry::answered(&trace, response.status());
        if let Ok(id) = HeaderValue::from_str(&id) {
            response.headers_mut().entry(REQUEST_ID).or_insert(id);
        }
        response
    }

    async fn route(&self, mut request: Request<Body>, client: Client) -> Response {
        let destination = self.domain.destination(request.version(), request.uri(), request.headers());
        let sandbox = match &destination {
            Destination::Api => of_path(request.uri().path()),
            Destination::Sandbox(id, _) => Some(id.clone()),
            Destination::Presigned(_) | Destination::Nobody | Destination::Unclear => None,
        };
        if let Some(id) = sandbox {
            telemetry::sandbox(&Context::current(), &id);
            tracing::Span::current().record("sandbox", tracing::field::display(id));
        }
        if destination == Destination::Api {
            request.extensions_mut().insert(client);
            return match self.api.call(request).await {
                Ok(response) => response,
                Err(never) => match never {},
            };
        }
        // Neither host nor path: the one may be a token, the other is the app's own affair.
        telemetry::route(request.method(), "invoke");
        let (begun, method, mut account) = (Instant::now(), request.method().clone(), Account::default());
        let response = invoke::serve(&self.core, destination, request, client, &mut account).await;
        let (took, status) = (begun.elapsed(), response.status().as_u16());
        self.core.metrics.answered(INVOKES, status);
        self.core.metrics.observe(INVOKE_SECONDS, &[], took);
        let ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        let id = account.sandbox.map(|id| id.to_string());
        tracing::info!(%method, id, port = account.port, url = account.url, status, ms, "invoke");
        response
    }
}

/// The sandbox that a path of the API is about.
fn of_path(path: &str) -> Option<SandboxId> {
    SandboxId::parse(path.strip_prefix("/v1/sandbox/")?.split('/').next()?)
}

/// Serves until `stop`; then requests under way are finished.
pub async fn serve(listener: TcpListener, front: Front, stop: CancellationToken) {
    let front = Arc::new(front);
    let free = Arc::new(Semaphore::new(CONNECTIONS));
    let ending = GracefulShutdown::new();
    // The semaphore is never closed.
    while let Ok(permit) = free.clone().acquire_owned().await {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                let (front, watcher, stop) = (front.clone(), ending.watcher(), stop.clone());
                tokio::spawn(async move {
                    let opened = tokio::select! {
                        () = stop.cancelled() => return,
                        opened = tokio::time::timeout(PATIENCE, open(&front, stream)) => opened,
                    };
                    // A client that goes away, or speaks something else, is its own business.
                    match opened {
                        Ok(Ok(Some(Opened::Plain(stream)))) => connection(front, stream, peer, false, watcher).await,
                        Ok(Ok(Some(Opened::Tls(stream)))) => connection(front, *stream, peer, true, watcher).await,
                        Ok(Ok(None)) | Err(_) => {}
                        Ok(Err(error)) => tracing::debug!(%peer, %error, "a connection was not opened"),
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    ending.shutdown().await;
}

enum Opened {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// A connection that is ready for HTTP; none for one that was sent away.
async fn open(front: &Front, mut stream: TcpStream) -> io::Result<Option<Opened>> {
    // Small answers must not wait for an acknowledgement of those before.
    stream.set_nodelay(true)?;
    let Some(tls) = &front.tls else { return Ok(Some(Opened::Plain(stream))) };
    let mut first = [0];
    if stream.peek(&mut first).await? == 0 {
        return Ok(None);
    }
    if first[0] == TLS_HANDSHAKE {
        return Ok(Some(Opened::Tls(Box::new(tls.accept(stream).await?))));
    }
    if front.core.config.tls.plain {
        return Ok(Some(Opened::Plain(stream)));
    }
    stream.write_all(SPEAK_TLS).await?;
    stream.shutdown().await?;
    // What the client has sent is read: closing over it would take the answer away.
    tokio::io::copy(&mut stream.take(SPEAK_TLS_READ), &mut tokio::io::sink()).await?;
    Ok(None)
}

async fn connection(
    front: Arc<Front>,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    peer: SocketAddr,
    secure: bool,
    watcher: Watcher,
) {
    let client = Client { peer: peer.ip(), secure };
    let service = service_fn(move |request| {
        let front = front.clone();
        async move { Ok::<_, Infallible>(front.answer(request, client).await) }
    });
    let mut http = auto::Builder::new(TokioExecutor::new());
    http.http1().timer(TokioTimer::new()).header_read_timeout(PATIENCE);
    http.http2().timer(TokioTimer::new()).keep_alive_interval(PING).max_concurrent_streams(STREAMS);
    let serving = http.serve_connection_with_upgrades(TokioIo::new(stream), service).into_owned();
    if let Err(error) = watcher.watch(serving).await {
        tracing::debug!(%peer, error, "a connection ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sandbox_of_a_request_is_in_its_path() {
        let id = "sbx-aaaaaaaaaaaaaaaaaaaa";
        for path in [format!("/v1/sandbox/{id}"), format!("/v1/sandbox/{id}/pause"), format!("/v1/sandbox/{id}/")] {
            assert_eq!(of_path(&path), SandboxId::parse(id), "{path}");
        }
        for path in ["/v1/sandboxes", "/v1/sandbox/", "/v1/sandbox/x y/pause", "/"] {
            assert_eq!(of_path(path), None, "{path}");
        }
    }

    #[test]
    fn the_answer_in_clear_says_its_own_length() {
        let text = std::str::from_utf8(SPEAK_TLS).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{}", body.len());
        assert!(serde_json::from_str::<serde_json::Value>(body).unwrap()["message"].is_string());
    }
}
