//! The REST API: requests in, answers out. Handlers parse, check the key, call the supervisor and convert; they decide nothing.
//!
//! Each module has the table of its routes; a route stands there with its [`openapi::Operation`], from which `GET /openapi.json` is made.
//! Every path is served with and without a trailing slash, since the contract's clients follow no redirects. Extensions of ours, which the
//! contract does not have: `GET /v1/template` and `/v1/template/{id}`, `POST …/resume`, `POST …/undelete`, `GET …/inspect`, `GET …/network`, `GET …/console`, `GET /v1/live`, `GET /v1/events`,
//! `POST /v1/recover`, `GET /v1/host/metrics`, `/healthz`, `/readyz`, `/openapi.json`, `/docs`, `/ui` ([`crate::ui`]), and the headers
//! `server-timing` and `stasis-error`.

mod answers;
mod auth;
mod console;
mod docs;
mod files;
mod git;
mod guest;
mod health;
mod host;
mod inspect;
mod left_out;
mod lifecycle;
mod live;
mod network;
mod path;
mod presigned;
mod process;
mod sandboxes;
mod snapshots;
mod table;
mod templates;
mod terminals;

use crate::error::Error;
use crate::metrics::REQUESTS;
use crate::openapi;
use crate::supervisor::Core;
use crate::telemetry;
use crate::ui;
use auth::Tenant;
pub(crate) use auth::tenant_of;
use axum::Router;
use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::StatusCode;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use axum::routing::{MethodRouter, get};
use http_body_util::BodyExt as _;
use path::Path;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;
use table::Route;

/// All routes of the API. What is neither here nor in [`undescribed`] is not served.
fn routes() -> Vec<Route> {
    [
        sandboxes::routes(),
        lifecycle::routes(),
        snapshots::routes(),
        templates::routes(),
        presigned::routes(),
        process::routes(),
        files::routes(),
        git::routes(),
        terminals::routes(),
        inspect::routes(),
        network::routes(),
        live::routes(),
        host::routes(),
        health::routes(),
        docs::routes(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// What is served and not described: the page for people, which is no part of the API, and answers without an end, since whoever asks by
/// the description waits for a whole body.
fn undescribed() -> impl Iterator<Item = (String, MethodRouter<Arc<Core>>)> {
    let streams = [("/v1/events", get(live::events)), ("/v1/sandbox/{id}/console", get(console::console))];
    streams.into_iter().map(|(path, handler)| (path.to_owned(), handler)).chain(ui::routes())
}

/// The API's description.
pub fn document() -> Value {
    let routes = routes();
    let operations =
        routes.iter().map(|route| (route.path.as_str(), route.method.as_str().to_ascii_lowercase(), &route.operation));
    openapi::document(operations, &left_out::listed())
}

/// The whole API over `core`.
pub fn router(core: Arc<Core>) -> Router {
    let mut paths: BTreeMap<String, MethodRouter<Arc<Core>>> = BTreeMap::new();
    for (path, handler) in
        routes().into_iter().map(|route| (route.path, route.handler)).chain(left_out::routes()).chain(undescribed())
    {
        let methods = paths.remove(&path).unwrap_or_default();
        paths.insert(path, methods.merge(handler));
    }
    let mut app = Router::new();
    for (path, methods) in paths {
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
    if let Some(route) = request.extensions().get::<MatchedPath>() {
        telemetry::route(&method, route.as_str());
    }
    let response = next.run(request).await;
    let ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    core.metrics.answered(REQUESTS, response.status().as_u16());
    tracing::info!(%method, path, status = response.status().as_u16(), ms, "request");
    response
}

/// The body as a JSON object; an empty one counts as `{}`. Content types are not looked at: the contract's clients often send none.
pub(crate) async fn json_body(core: &Core, body: Body) -> Result<Map<String, Value>, Error> {
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
