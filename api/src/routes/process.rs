//! Commands in a sandbox, and what its guest says of itself.

use super::answers::{timed, with_timing};
use super::guest::WITHIN;
use super::table::Route;
use super::{Path, Shared, Tenant, json_body};
use crate::error::Error;
use crate::openapi::{Operation, Tag};
use crate::supervisor::operations::{self, reach};
use crate::validate;
use crate::wire::process::{Execute, Executed, UserHomeDir, Workdir};
use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use serde::Serialize;
use stasis_agent::protocol::System;

pub(super) fn routes() -> Vec<Route> {
    vec![
        Route::post(
            "/v1/sandbox/{id}/process/execute",
            execute,
            Operation::new("processExecute", Tag::Process, "Run a command")
                .says("Answers when the command has ended, whatever its exit status and whatever it left running.")
                .body::<Execute>()
                .answers::<Executed>(200, "What it wrote.")
                .asks_guest(),
        ),
        Route::get(
            "/v1/sandbox/{id}/system/user-home-dir",
            home,
            Operation::new("getSandboxUserHomeDir", Tag::Sandbox, "Show the user's home directory")
                .answers::<UserHomeDir>(200, "The directory.")
                .asks_guest(),
        ),
        Route::get(
            "/v1/sandbox/{id}/system/workdir",
            workdir,
            Operation::new("getSandboxWorkdir", Tag::Sandbox, "Show where commands start")
                .answers::<Workdir>(200, "The directory.")
                .asks_guest(),
        ),
    ]
}

/// 200 with what the command wrote, whatever its exit status.
async fn execute(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    body: Body,
) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let body = json_body(&core, body).await?;
    let command = validate::execute(&body).map_err(Error::Invalid)?;
    let done = operations::execute(&core, &sandbox, command).await?;
    let body = Executed {
        exit_code: done.exit_code,
        result: done.stdout.clone(),
        stdout: done.stdout,
        stderr: done.stderr,
        stdout_dropped: done.dropped.0,
        stderr_dropped: done.dropped.1,
        timed_out: done.timed_out,
    };
    Ok(timed(StatusCode::OK, body, &done.timing))
}

async fn home(core: Shared, tenant: Tenant, id: Path<String>) -> Result<Response, Error> {
    system(core, tenant, id, |system| UserHomeDir { user_home_dir: system.home }).await
}

async fn workdir(core: Shared, tenant: Tenant, id: Path<String>) -> Result<Response, Error> {
    system(core, tenant, id, |system| Workdir { workdir: system.workdir }).await
}

async fn system<A: Serialize>(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    answer: fn(System) -> A,
) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let mut guest = reach(&core, &sandbox, "look into").await?;
    let agent = guest.agent();
    let system = guest.call("guest", "answer", agent.get("/v1/system", WITHIN)).await?;
    Ok(with_timing(Json(answer(system)).into_response(), &guest.timing))
}
