//! What the routes that the guest serves share.

use super::answers::with_timing;
use super::table::Route;
use super::{Path, Shared, Tenant, json_body};
use crate::error::Error;
use crate::openapi::Operation;
use crate::supervisor::operations::reach;
use crate::validate::FieldError;
use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::IntoResponse as _;
use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::time::Duration;

/// For the agent to answer. Its clients give up after 300 s.
pub(super) const WITHIN: Duration = Duration::from_mins(4);
/// For the next piece of a streamed request or answer.
pub(super) const STALL: Duration = Duration::from_mins(1);

/// A check of a request's body.
pub(super) type Check<Q> = fn(&Map<String, Value>) -> Result<Q, Vec<FieldError>>;

/// A route whose handler passes a checked request on to `path` of the agent, and the agent's answer back. What the guest says is read as an `A`
/// before it is passed on: its shape holds whatever runs in there.
pub(super) fn asking<Q, A>(
    at: String,
    operation: Operation,
    check: Check<Q>,
    path: &'static str,
    verb: &'static str,
) -> Route
where
    Q: Serialize + Send + Sync + 'static,
    A: Serialize + DeserializeOwned + JsonSchema + Send + 'static,
{
    let handler = move |State(core): Shared, Tenant(tenant): Tenant, Path(id): Path<String>, body: Body| async move {
        let sandbox = core.registry.find(&tenant, &id)?;
        let request = check(&json_body(&core, body).await?).map_err(Error::Invalid)?;
        let mut guest = reach(&core, &sandbox, verb).await?;
        let agent = guest.agent();
        let answer: A = guest.call("guest", "answer", agent.ask(path, &request, WITHIN)).await?;
        Ok::<_, Error>(with_timing(Json(answer).into_response(), &guest.timing))
    };
    Route::post(at, handler, operation.answers::<A>(200, "What the guest found.").asks_guest())
}

/// The same for what answers 204.
pub(super) fn acting<Q>(
    at: String,
    operation: Operation,
    check: Check<Q>,
    path: &'static str,
    verb: &'static str,
) -> Route
where
    Q: Serialize + Send + Sync + 'static,
{
    let handler = move |State(core): Shared, Tenant(tenant): Tenant, Path(id): Path<String>, body: Body| async move {
        let sandbox = core.registry.find(&tenant, &id)?;
        let request = check(&json_body(&core, body).await?).map_err(Error::Invalid)?;
        let mut guest = reach(&core, &sandbox, verb).await?;
        let agent = guest.agent();
        guest.call("guest", "answer", agent.act(path, &request, WITHIN)).await?;
        Ok::<_, Error>(with_timing(StatusCode::NO_CONTENT.into_response(), &guest.timing))
    };
    Route::post(at, handler, operation.done(204, "It is done.").asks_guest())
}
