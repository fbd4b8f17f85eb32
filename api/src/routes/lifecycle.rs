//! Stop and start: the disk stays, memory does not.

use super::{Shared, Tenant, answers};
use crate::error::Error;
use crate::supervisor::operations;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;

/// 200 with the sandbox, once its disks are durable and its VM is gone.
pub(super) async fn stop(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let (record, timing) = operations::stop(&core, &sandbox).await?;
    Ok(answers::timed(StatusCode::OK, answers::sandbox(&record), &timing))
}

/// 200 with the sandbox, once it runs.
pub(super) async fn start(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let (record, timing) = operations::start(&core, &sandbox).await?;
    Ok(answers::timed(StatusCode::OK, answers::sandbox(&record), &timing))
}
