//! Routes that the guest serves: their table, and what they share. `files`, `git` and `terminals` have the handlers.

use super::answers::with_timing;
use super::{Shared, Tenant, files, git, json_body, left_out, terminals};
use crate::error::Error;
use crate::supervisor::Core;
use crate::supervisor::operations::reach;
use crate::validate::FieldError;
use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{MethodRouter, get, post};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use stasis_agent::protocol::System;
use std::sync::Arc;
use std::time::Duration;

/// For the agent to answer. Its clients give up after 300 s.
pub(super) const WITHIN: Duration = Duration::from_mins(4);
/// For the next piece of a streamed request or answer.
pub(super) const STALL: Duration = Duration::from_mins(1);

/// A check of a request's body.
pub(super) type Check<Q> = fn(&Map<String, Value>) -> Result<Q, Vec<FieldError>>;

/// All of them.
pub(super) fn routes() -> Vec<(String, MethodRouter<Arc<Core>>)> {
    let system = [("user-home-dir", get(home)), ("workdir", get(workdir))];
    let system = system.map(|(name, handler)| (format!("/v1/sandbox/{{id}}/system/{name}"), handler));
    system
        .into_iter()
        .chain(files::routes())
        .chain(git::routes())
        .chain(terminals::routes())
        .chain(left_out::routes())
        .collect()
}

/// A handler that passes a checked request on to `path` of the agent, and the agent's answer back. What the guest says is read as an `A`
/// before it is passed on: its shape holds whatever runs in there.
pub(super) fn asking<Q, A>(check: Check<Q>, path: &'static str, verb: &'static str) -> MethodRouter<Arc<Core>>
where
    Q: Serialize + Send + Sync + 'static,
    A: Serialize + DeserializeOwned + Send + 'static,
{
    post(move |State(core): Shared, Tenant(tenant): Tenant, Path(id): Path<String>, body: Body| async move {
        let sandbox = core.registry.find(&tenant, &id)?;
        let request = check(&json_body(&core, body).await?).map_err(Error::Invalid)?;
        let mut guest = reach(&core, &sandbox, verb).await?;
        let agent = guest.agent();
        let answer: A = guest.call("guest", "answer", agent.ask(path, &request, WITHIN)).await?;
        Ok::<_, Error>(with_timing(Json(answer).into_response(), &guest.timing))
    })
}

/// The same for what answers 204.
pub(super) fn acting<Q>(check: Check<Q>, path: &'static str, verb: &'static str) -> MethodRouter<Arc<Core>>
where
    Q: Serialize + Send + Sync + 'static,
{
    post(move |State(core): Shared, Tenant(tenant): Tenant, Path(id): Path<String>, body: Body| async move {
        let sandbox = core.registry.find(&tenant, &id)?;
        let request = check(&json_body(&core, body).await?).map_err(Error::Invalid)?;
        let mut guest = reach(&core, &sandbox, verb).await?;
        let agent = guest.agent();
        guest.call("guest", "answer", agent.act(path, &request, WITHIN)).await?;
        Ok::<_, Error>(with_timing(StatusCode::NO_CONTENT.into_response(), &guest.timing))
    })
}

async fn home(core: Shared, tenant: Tenant, id: Path<String>) -> Result<Response, Error> {
    system(core, tenant, id, |system| json!({ "user_home_dir": system.home })).await
}

async fn workdir(core: Shared, tenant: Tenant, id: Path<String>) -> Result<Response, Error> {
    system(core, tenant, id, |system| json!({ "workdir": system.workdir })).await
}

async fn system(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    answer: fn(System) -> Value,
) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let mut guest = reach(&core, &sandbox, "look into").await?;
    let agent = guest.agent();
    let system = guest.call("guest", "answer", agent.get("/v1/system", WITHIN)).await?;
    Ok(with_timing(Json(answer(system)).into_response(), &guest.timing))
}
