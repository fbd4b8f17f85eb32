//! `git/*`. A git that fails is an answer too: 200 with its exit status.

use super::answers::with_timing;
use super::{Shared, Tenant, json_body};
use crate::error::Error;
use crate::guest_requests::git::OPERATIONS;
use crate::supervisor::{Core, operations};
use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::response::IntoResponse as _;
use axum::routing::{MethodRouter, post};
use serde_json::json;
use std::sync::Arc;

pub(super) fn routes() -> impl Iterator<Item = (String, MethodRouter<Arc<Core>>)> {
    OPERATIONS.into_iter().map(|(name, plan)| {
        let handler = move |State(core): Shared, Tenant(tenant): Tenant, Path(id): Path<String>, body: Body| async move {
            let sandbox = core.registry.find(&tenant, &id)?;
            let plan = plan(&json_body(&core, body).await?).map_err(Error::Invalid)?;
            let tells_commit = plan.tells_commit;
            let done = operations::git(&core, &sandbox, plan).await?;
            let result = json!({ "output": done.output, "exit_code": done.exit_code });
            let body = if tells_commit {
                json!({ "sha": done.commit.unwrap_or_default(), "result": result })
            } else {
                result
            };
            Ok::<_, Error>(with_timing(Json(body).into_response(), &done.timing))
        };
        (format!("/v1/sandbox/{{id}}/git/{name}"), post(handler))
    })
}
