//! Stop and start: the disk stays, memory does not.

use super::table::Route;
use super::{Path, Shared, Tenant, answers};
use crate::error::Error;
use crate::openapi::{Operation, Tag};
use crate::supervisor::operations;
use crate::wire::sandboxes::Sandbox;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;

pub(super) fn routes() -> Vec<Route> {
    let op = |id: &str, summary| Operation::new(id, Tag::Sandbox, summary);
    vec![
        Route::post(
            "/v1/sandbox/{id}/stop",
            stop,
            op("stopSandbox", "Stop a sandbox")
                .says("Its disk stays, its memory does not. Only `start` brings it back.")
                .of_sandbox()
                .answers::<Sandbox>(200, "It is stopped, and its disk durable.")
                .changes("It does not run.")
                .timed(),
        ),
        Route::post(
            "/v1/sandbox/{id}/start",
            start,
            op("startSandbox", "Start a stopped sandbox")
                .says("Boots its template over the disk that it had.")
                .of_sandbox()
                .answers::<Sandbox>(200, "It runs.")
                .changes("It is not stopped.")
                .timed(),
        ),
    ]
}

/// 200 with the sandbox, once its disks are durable and its VM is gone.
async fn stop(State(core): Shared, Tenant(tenant): Tenant, Path(id): Path<String>) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let (record, timing) = operations::stop(&core, &sandbox).await?;
    Ok(answers::timed(StatusCode::OK, answers::sandbox(&record), &timing))
}

/// 200 with the sandbox, once it runs.
async fn start(State(core): Shared, Tenant(tenant): Tenant, Path(id): Path<String>) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let (record, timing) = operations::start(&core, &sandbox).await?;
    Ok(answers::timed(StatusCode::OK, answers::sandbox(&record), &timing))
}
