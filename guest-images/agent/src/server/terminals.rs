//! The routes of `protocol::terminals`.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Query, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use hyper_util::rt::TokioIo;
use stasis_agent::protocol::AgentError;
use stasis_agent::protocol::terminals::{ATTACH, Create, Resize, Terminal, TerminalId, Terminals};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::{Refusal, parse};
use crate::chain;
use crate::terminals::{Attached, Registry, TerminalError};

/// For the other side to take what it is sent, and to finish the upgrade.
const STALL: Duration = Duration::from_secs(30);
const READ_SIZE: usize = 16 << 10;

pub(super) fn routes<S: Clone + Send + Sync + 'static>(registry: Arc<Registry>) -> Router<S> {
    Router::new()
        .route("/v1/terminals/create", post(create))
        .route("/v1/terminals/list", post(list))
        .route("/v1/terminals/get", post(one))
        .route("/v1/terminals/delete", post(delete))
        .route("/v1/terminals/resize", post(resize))
        .route("/v1/terminals/attach", get(attach))
        .with_state(registry)
}

async fn create(State(registry): State<Arc<Registry>>, body: Bytes) -> Result<Json<Terminal>, Refusal> {
    let request: Create = parse(&body)?;
    Ok(Json(registry.create(request)?))
}

async fn list(State(registry): State<Arc<Registry>>) -> Json<Terminals> {
    Json(registry.list())
}

async fn one(State(registry): State<Arc<Registry>>, body: Bytes) -> Result<Json<Terminal>, Refusal> {
    let TerminalId { id } = parse(&body)?;
    Ok(Json(registry.get(&id)?))
}

async fn delete(State(registry): State<Arc<Registry>>, body: Bytes) -> Result<StatusCode, Refusal> {
    let TerminalId { id } = parse(&body)?;
    registry.delete(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn resize(State(registry): State<Arc<Registry>>, body: Bytes) -> Result<Json<Terminal>, Refusal> {
    let Resize { id, cols, rows } = parse(&body)?;
    Ok(Json(registry.resize(&id, cols, rows)?))
}

async fn attach(
    State(registry): State<Arc<Registry>>,
    Query(TerminalId { id }): Query<TerminalId>,
    headers: HeaderMap,
    mut request: Request,
) -> Result<Response, Refusal> {
    if headers.get(header::UPGRADE).is_none_or(|protocol| protocol != ATTACH) {
        return Err(Refusal::new(StatusCode::BAD_REQUEST, format!("the request must upgrade to {ATTACH}")));
    }
    let attached = registry.attach(&id)?;
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        // A peer that goes away is its own business.
        if let Ok(Ok(upgraded)) = timeout(STALL, upgrade).await {
            connect(TokioIo::new(upgraded), attached).await;
        }
    });
    let mut response = (StatusCode::SWITCHING_PROTOCOLS, Body::empty()).into_response();
    response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static(ATTACH));
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    Ok(response)
}

/// Carries bytes until either side has ended.
async fn connect(stream: TokioIo<hyper::upgrade::Upgraded>, mut attached: Attached) {
    let (mut from, mut to) = tokio::io::split(stream);
    let input = async {
        let mut buffer = vec![0; READ_SIZE];
        loop {
            match from.read(&mut buffer).await {
                // A shell that has ended takes no keys, but what it showed last may still be on its way.
                Ok(len) if len > 0 => drop(attached.input.write(&buffer[..len]).await),
                _ => return,
            }
        }
    };
    let output = async {
        let mut chunk = Some(std::mem::take(&mut attached.before));
        while let Some(bytes) = chunk {
            if !matches!(timeout(STALL, to.write_all(&bytes)).await, Ok(Ok(()))) {
                return;
            }
            chunk = attached.output.recv().await;
        }
        let _ = timeout(STALL, to.shutdown()).await;
    };
    tokio::select! {
        () = input => {}
        () = output => {}
    }
}

impl From<TerminalError> for Refusal {
    fn from(error: TerminalError) -> Self {
        let status = match error {
            TerminalError::Exec(error) => return error.into(),
            TerminalError::NotFound(_) => StatusCode::NOT_FOUND,
            TerminalError::Exists(_) | TerminalError::TooMany | TerminalError::TooManyReaders => StatusCode::CONFLICT,
            TerminalError::Kernel { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self(status, AgentError { message: chain(&error), field: None })
    }
}
