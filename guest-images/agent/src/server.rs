//! HTTP/1.1 for the protocol, over whatever accepts connections. `files` and `terminals` have the routes of those.
//!
//! Each connection is a task of its own. A listener lives through everything: a virtio-vsock transport reset after a restore ends the
//! connected sockets and those not accepted yet, never the listening one, so an error of `accept` concerns one connection.

mod files;
mod terminals;

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde::de::DeserializeOwned;
use stasis_agent::protocol::git::GitRequest;
use stasis_agent::protocol::trust::TrustReply;
use stasis_agent::protocol::{
    AgentError, ClockRequest, ExecReply, ExecRequest, Health, ImageReply, ImageRequest, PROTOCOL, System, WakeReply,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_vsock::{VsockListener, VsockStream};

use crate::chain;
use crate::exec::{self, ExecError};
use crate::git;
use crate::image;
use crate::reaper::Reaper;
use crate::small_writes::SmallWrites;
use crate::terminals::Registry;
use crate::trust::{self, TrustError};
use crate::wake::{self, WakeError};

/// Connections served at once; the next one waits in the listener's queue.
const CONNECTIONS: usize = 128;
/// For the head of a request to come, counted from the connection or from the end of the request before.
const HEAD_DEADLINE: Duration = Duration::from_mins(1);
/// Bytes of a JSON request; the supervisor's own limit is lower.
const JSON_LIMIT: usize = 64 << 20;
/// After a failed `accept`: if it fails for want of descriptors, the next one does too.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// A listening socket.
pub(crate) trait Listen {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;
    /// The next connection; an error says nothing about the one after.
    fn accept(&self) -> impl Future<Output = io::Result<Self::Stream>>;
}

impl Listen for VsockListener {
    type Stream = SmallWrites<VsockStream>;
    async fn accept(&self) -> io::Result<Self::Stream> {
        Ok(SmallWrites(VsockListener::accept(self).await?.0))
    }
}

impl Listen for UnixListener {
    type Stream = UnixStream;
    async fn accept(&self) -> io::Result<UnixStream> {
        Ok(UnixListener::accept(self).await?.0)
    }
}

/// The next connection, however often `accept` fails before.
pub(crate) async fn next<L: Listen>(listener: &L) -> L::Stream {
    loop {
        match listener.accept().await {
            Ok(stream) => return stream,
            Err(error) => {
                eprintln!("stasis-agent: cannot accept a connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Serves connections for ever.
pub(crate) async fn serve(listener: impl Listen, router: Router) {
    let free = Arc::new(Semaphore::new(CONNECTIONS));
    // The semaphore is never closed, so this ends only with the task.
    while let Ok(permit) = Arc::clone(&free).acquire_owned().await {
        let stream = next(&listener).await;
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(HEAD_DEADLINE);
            // A peer that goes away or speaks no HTTP is its own business; a command it started goes on.
            let _ = http.serve_connection(TokioIo::new(stream), service).with_upgrades().await;
            drop(permit);
        });
    }
}

/// The routes of the protocol.
pub(crate) fn router(reaper: Arc<Reaper>) -> Router {
    Router::new()
        .route("/v1/health", get(health))
        .route("/v1/exec", post(run_command))
        .route("/v1/wake", post(wake_up))
        .route("/v1/clock", post(set_clock))
        .route("/v1/git", post(run_git))
        .route("/v1/image", post(tell_image))
        .route("/v1/system", get(system))
        .route("/v1/trust", post(install_trust))
        .merge(files::routes())
        .merge(terminals::routes(Registry::new(Arc::clone(&reaper))))
        .layer(DefaultBodyLimit::max(JSON_LIMIT))
        .fallback(async |uri: Uri| Refusal::new(StatusCode::NOT_FOUND, format!("no such path: {}", uri.path())))
        .with_state(reaper)
}

async fn health() -> Result<Json<Health>, Refusal> {
    const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
    let boot_id = std::fs::read_to_string(BOOT_ID)
        .map_err(|error| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, format!("cannot read {BOOT_ID}: {error}")))?;
    Ok(Json(Health {
        protocol: PROTOCOL,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        boot_id: boot_id.trim().to_owned(),
    }))
}

async fn run_command(State(reaper): State<Arc<Reaper>>, body: Bytes) -> Result<Json<ExecReply>, Refusal> {
    let request: ExecRequest = parse(&body)?;
    to_its_end(async move { exec::run(&reaper, request).await }).await
}

async fn run_git(State(reaper): State<Arc<Reaper>>, body: Bytes) -> Result<Json<ExecReply>, Refusal> {
    let request: GitRequest = parse(&body)?;
    to_its_end(async move { git::run(&reaper, request).await }).await
}

/// In a task of its own: dropping this future, as a lost connection does, must not take the command's output pipes away.
async fn to_its_end(
    command: impl Future<Output = Result<ExecReply, ExecError>> + Send + 'static,
) -> Result<Json<ExecReply>, Refusal> {
    match tokio::spawn(command).await {
        Ok(Ok(reply)) => Ok(Json(reply)),
        Ok(Err(error)) => Err(error.into()),
        Err(error) => {
            Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, format!("the command's task failed: {error}")))
        }
    }
}

async fn system() -> Result<Json<System>, Refusal> {
    Ok(Json(System { home: exec::user(None)?.home, workdir: exec::directory().to_owned() }))
}

/// In one go: nothing may start a command between the telling and the answer.
async fn tell_image(State(reaper): State<Arc<Reaper>>, body: Bytes) -> Result<Json<ImageReply>, Refusal> {
    let request: ImageRequest = parse(&body)?;
    if !request.workdir.starts_with('/') {
        return Err(Refusal::new(StatusCode::BAD_REQUEST, format!("workdir {:?} is not absolute", request.workdir)));
    }
    Ok(Json(image::tell(&reaper, request)))
}

async fn install_trust(body: Bytes) -> Result<Json<TrustReply>, Refusal> {
    Ok(Json(trust::install(&parse(&body)?)?))
}

async fn wake_up(body: Bytes) -> Result<Json<WakeReply>, Refusal> {
    let received = Instant::now();
    Ok(Json(wake::apply(&parse(&body)?, received)?))
}

async fn set_clock(body: Bytes) -> Result<Json<WakeReply>, Refusal> {
    let received = Instant::now();
    let request: ClockRequest = parse(&body)?;
    Ok(Json(wake::set_clock(request.unix_time_ns, received)?))
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body)
        .map_err(|error| Refusal::new(StatusCode::BAD_REQUEST, format!("cannot read the request: {error}")))
}

/// An [`AgentError`] and its status.
#[derive(Debug)]
struct Refusal(StatusCode, AgentError);

impl Refusal {
    fn new(status: StatusCode, message: String) -> Self {
        Self(status, AgentError { message, field: None })
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(self.1)).into_response()
    }
}

impl From<ExecError> for Refusal {
    fn from(error: ExecError) -> Self {
        let field = match &error {
            ExecError::Directory { .. } => Some("cwd"),
            ExecError::VariableName { .. } => Some("envs"),
            ExecError::User { .. } => Some("user"),
            ExecError::Start { .. } => None,
        };
        Self(StatusCode::BAD_REQUEST, AgentError { message: chain(&error), field: field.map(str::to_owned) })
    }
}

impl From<TrustError> for Refusal {
    fn from(error: TrustError) -> Self {
        let (status, field) = match error {
            TrustError::Certificate => (StatusCode::BAD_REQUEST, Some("certificate_pem")),
            TrustError::Write { .. } => (StatusCode::INTERNAL_SERVER_ERROR, None),
        };
        Self(status, AgentError { message: chain(&error), field: field.map(str::to_owned) })
    }
}

impl From<WakeError> for Refusal {
    fn from(error: WakeError) -> Self {
        let status = match error {
            WakeError::BadEntropy | WakeError::BadTime(_) | WakeError::BadIdentity(_) => StatusCode::BAD_REQUEST,
            WakeError::Kernel { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, chain(&error))
    }
}

#[cfg(test)]
mod tests;
