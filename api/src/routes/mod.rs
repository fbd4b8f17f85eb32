//! The REST API: requests in, answers out. Handlers parse, check the key, call the supervisor and convert; they decide nothing.
//!
//! Every path is served with and without a trailing slash, since the contract's clients follow no redirects. Extensions of ours, which the
//! contract does not have: `GET /v1/template` and `/v1/template/{id}`, `POST …/resume`, `POST …/undelete`, `GET …/inspect`, `POST /v1/recover`, `GET /v1/host/metrics`, `/healthz`,
//! `/readyz`, and the headers `server-timing` and
//! `stasis-error`.

mod answers;
mod auth;
mod files;
mod git;
mod guest;
mod health;
mod host;
mod inspect;
mod left_out;
mod lifecycle;
mod presigned;
mod sandboxes;
mod snapshots;
mod templates;
mod terminals;

use crate::error::Error;
use crate::metrics::REQUESTS;
use crate::supervisor::Core;
use auth::Tenant;
pub(crate) use auth::tenant_of;
use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use axum::routing::{MethodRouter, delete, get, patch, post};
use http_body_util::BodyExt as _;
use serde_json::{Map, Value};
use std::sync::Arc;
use std::time::Instant;

/// The whole API over `core`.
pub fn router(core: Arc<Core>) -> Router {
    let mut app = Router::new();
    let routes: [(&str, MethodRouter<Arc<Core>>); 26] = [
        ("/v1/sandbox", post(sandboxes::create)),
        ("/v1/sandboxes", get(sandboxes::list)),
        ("/v1/sandbox/{id}", get(sandboxes::get).merge(delete(sandboxes::delete))),
        ("/v1/sandbox/{id}/pause", post(sandboxes::pause)),
        ("/v1/sandbox/{id}/resume", post(sandboxes::resume)),
        ("/v1/sandbox/{id}/stop", post(lifecycle::stop)),
        ("/v1/sandbox/{id}/start", post(lifecycle::start)),
        ("/v1/sandbox/{id}/undelete", post(sandboxes::undelete)),
        ("/v1/sandbox/{id}/process/execute", post(sandboxes::execute)),
        ("/v1/sandbox/{id}/inspect", get(inspect::inspect)),
        ("/v1/sandbox/{id}/snapshot/create", post(snapshots::create)),
        ("/v1/sandbox/{id}/presigned-url", post(presigned::create)),
        ("/v1/sandbox/{id}/presigned-url/{url}", delete(presigned::delete)),
        ("/v1/sandbox/{id}/snapshot/pause", post(snapshots::pause)),
        ("/v1/snapshots", get(snapshots::list)),
        ("/v1/snapshot/restore", post(snapshots::restore)),
        ("/v1/snapshot/resume", post(snapshots::restore)),
        ("/v1/snapshot/{id}", delete(snapshots::delete)),
        ("/v1/template", post(templates::upload).merge(get(templates::list))),
        ("/v1/templates", get(templates::list)),
        ("/v1/template/{id}", get(templates::get).merge(patch(templates::rename)).merge(delete(templates::delete))),
        ("/v1/recover", post(sandboxes::recover)),
        ("/v1/host/metrics", get(host::metrics)),
        ("/metrics", get(host::prometheus)),
        ("/healthz", get(health::health)),
        ("/readyz", get(health::ready)),
    ];
    let routes = routes.into_iter().map(|(path, methods)| (path.to_owned(), methods));
    for (path, methods) in routes.chain(guest::routes()) {
        app = app.route(&path, methods.clone());
        if !path.ends_with("{*rest}") {
            app = app.route(&format!("{path}/"), methods);
        }
    }
    app.fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(core.clone(), log))
        .with_state(core)
}

async fn unknown_route(request: Request) -> Response {
    answers::plain(
        StatusCode::NOT_FOUND,
        &format!("there is no {} {}", request.method(), request.uri().path()),
        "no-route",
    )
}

async fn wrong_method(request: Request) -> Response {
    let message = format!("{} does not take {}", request.uri().path(), request.method());
    answers::plain(StatusCode::METHOD_NOT_ALLOWED, &message, "wrong-method")
}

async fn log(State(core): Shared, request: Request, next: Next) -> Response {
    let (method, path, begun) = (request.method().clone(), request.uri().path().to_owned(), Instant::now());
    let response = next.run(request).await;
    let ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    core.metrics.answered(REQUESTS, response.status().as_u16());
    tracing::info!(%method, path, status = response.status().as_u16(), ms, "request");
    response
}

/// The body as a JSON object; an empty one counts as `{}`. Content types are not looked at: the contract's clients often send none.
async fn json_body(core: &Core, body: Body) -> Result<Map<String, Value>, Error> {
    let bytes = read(body, core.config.limits.body_bytes).await?;
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(Map::new());
    }
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(_) => Err(Error::BadJson("it is another JSON value".to_owned())),
        Err(e) => Err(Error::BadJson(e.to_string())),
    }
}

/// The body whole, at most `limit` bytes. What a client sends beyond that is read and dropped for a while: one that is still sending when the
/// connection closes would see a broken connection instead of the answer.
async fn read(mut body: Body, limit: usize) -> Result<Vec<u8>, Error> {
    let (mut bytes, mut seen) = (Vec::new(), 0_usize);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| Error::BadJson(format!("it cannot be read: {e}")))?;
        let Some(data) = frame.data_ref() else { continue };
        seen = seen.saturating_add(data.len());
        if seen <= limit {
            bytes.extend_from_slice(data);
        } else {
            bytes = Vec::new();
        }
        if seen > limit.saturating_mul(4) {
            break;
        }
    }
    if seen > limit { Err(Error::TooLarge { limit }) } else { Ok(bytes) }
}

/// The shared state, as handlers take it.
type Shared = State<Arc<Core>>;

impl axum::response::IntoResponse for Error {
    fn into_response(self) -> Response {
        answers::error(&self)
    }
}
