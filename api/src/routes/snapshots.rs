//! Named snapshots: create, list, restore, delete. `snapshot/create` and `snapshot/restore` are the contract's present words;
//! `snapshot/pause` (create, and end the sandbox) and `snapshot/resume` (restore) are its older ones.

use super::sandboxes::pairs;
use super::table::Route;
use super::{Path, Shared, Tenant, answers, json_body};
use crate::error::Error;
use crate::network_policy::NetworkPolicy;
use crate::openapi::{Operation, Tag};
use crate::snapshot_request::{self, List, SortBy};
use crate::sources::rfc3339;
use crate::supervisor::operations;
use crate::supervisor::snapshots::{self, Snapshot};
use crate::wire::sandboxes::Sandbox;
use crate::wire::snapshots::{
    self as wire, CreateSnapshot, ListSnapshots, PausedSnapshot, RestoreSnapshot, SnapshotList,
};
use axum::Json;
use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};

pub(super) fn routes() -> Vec<Route> {
    let op = |id: &str, summary| Operation::new(id, Tag::Snapshot, summary);
    let restores = |id: &str, summary| {
        op(id, summary)
            .says(
                "vCPUs, memory, disk and template are the snapshot's, and so are the processes and terminals in it, its environment and its \
                 network policy, unless the request says others. `timeout` and `auto_pause` are not, and presigned URLs stay with the source.",
            )
            .body::<RestoreSnapshot>()
            .fails(404, "There is no such snapshot.")
            .answers::<Sandbox>(201, "A new sandbox runs.")
            .changes("The snapshot is being deleted.")
            .timed()
    };
    vec![
        Route::post(
            "/v1/sandbox/{id}/snapshot/create",
            create,
            op("createSnapshot", "Make a named snapshot of a sandbox that runs")
                .says("The sandbox goes on, or is deleted once the snapshot is durable.")
                .of_sandbox()
                .body::<CreateSnapshot>()
                .answers::<wire::Snapshot>(201, "It is durable.")
                .changes("There is a snapshot of that name, or one is being made, or the sandbox does not run.")
                .timed(),
        ),
        Route::post(
            "/v1/sandbox/{id}/snapshot/pause",
            pause,
            op("pauseSnapshot", "Make a named snapshot of a sandbox, and delete the sandbox")
                .says("An older word for `snapshot/create` with `kill_sandbox_after`.")
                .of_sandbox()
                .body::<CreateSnapshot>()
                .answers::<PausedSnapshot>(201, "It is durable.")
                .changes("There is a snapshot of that name, or one is being made, or the sandbox does not run.")
                .timed(),
        ),
        Route::post("/v1/snapshot/restore", restore, restores("restoreSnapshot", "Make a sandbox from a snapshot")),
        Route::post(
            "/v1/snapshot/resume",
            restore,
            restores("resumeSnapshot", "Make a sandbox from a snapshot, by an older word"),
        ),
        Route::get(
            "/v1/snapshots",
            list,
            op("listSnapshots", "List snapshots")
                .query::<ListSnapshots>()
                .answers::<SnapshotList>(200, "One page.")
                .stores(),
        ),
        Route::delete(
            "/v1/snapshot/{snapshot}",
            delete,
            op("deleteSnapshot", "Delete a snapshot")
                .fails(404, "There is no such snapshot.")
                .done(204, "It is deleted.")
                .changes("A sandbox that was made from it runs."),
        ),
    ]
}

/// 201 with the snapshot, once it is durable; the sandbox runs.
async fn create(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    body: Body,
) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let body = json_body(&core, body).await?;
    let asked = snapshot_request::create(&body).map_err(Error::Invalid)?;
    let (snapshot, timing) = operations::create_snapshot(&core, &sandbox, asked).await?;
    Ok(answers::timed(StatusCode::CREATED, answer(&snapshot), &timing))
}

/// The same, and the sandbox is deleted once the snapshot is durable. Clients of this dialect read `state` from the answer.
async fn pause(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    body: Body,
) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let body = json_body(&core, body).await?;
    let mut asked = snapshot_request::create(&body).map_err(Error::Invalid)?;
    asked.kill_sandbox_after = true;
    let (snapshot, timing) = operations::create_snapshot(&core, &sandbox, asked).await?;
    let body = PausedSnapshot { snapshot: answer(&snapshot), state: "paused" };
    Ok(answers::timed(StatusCode::CREATED, body, &timing))
}

/// 201 with the new sandbox, once it runs.
async fn restore(State(core): Shared, Tenant(tenant): Tenant, body: Body) -> Result<Response, Error> {
    let body = json_body(&core, body).await?;
    let asked = snapshot_request::restore(&body).map_err(Error::Invalid)?;
    let (record, timing) = operations::restore_snapshot(&core, &tenant, asked).await?;
    Ok(answers::timed(StatusCode::CREATED, answers::sandbox(&record), &timing))
}

/// 204.
async fn delete(State(core): Shared, Tenant(tenant): Tenant, Path(id): Path<String>) -> Result<Response, Error> {
    operations::delete_snapshot(&core, &tenant, &id).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// 200 with one page of the tenant's snapshots.
async fn list(State(core): Shared, Tenant(tenant): Tenant, RawQuery(query): RawQuery) -> Result<Response, Error> {
    let list = snapshot_request::list(&pairs(query.as_deref().unwrap_or_default())).map_err(Error::Invalid)?;
    let (items, total) = page(snapshots::list(&core, &tenant).await?, &list);
    Ok(Json(SnapshotList { items: items.iter().map(answer).collect(), total_items: total }).into_response())
}

fn answer(snapshot: &Snapshot) -> wire::Snapshot {
    let spec = &snapshot.spec;
    let disk = spec.disk_mib.max(1);
    wire::Snapshot {
        id: snapshot.id.clone(),
        name: snapshot.name.clone(),
        template_id: spec.template_id.clone(),
        vcpu: spec.vcpu,
        memory: spec.memory_mib,
        memory_mib: spec.memory_mib,
        disk,
        disk_mib: disk,
        network_policy: spec.network_policy.as_ref().map(NetworkPolicy::redacted),
        created_at: rfc3339(snapshot.created_at),
    }
}

fn page(mut snapshots: Vec<Snapshot>, list: &List) -> (Vec<Snapshot>, usize) {
    snapshots.retain(|snapshot| snapshot.name.contains(&list.query));
    snapshots.sort_by(|a, b| {
        let by_time = (a.created_at, &a.id).cmp(&(b.created_at, &b.id));
        match list.sort {
            SortBy::CreatedAt => by_time,
            SortBy::TemplateId => a.spec.template_id.cmp(&b.spec.template_id).then(by_time),
        }
    });
    if !list.ascending {
        snapshots.reverse();
    }
    let total = snapshots.len();
    (snapshots.into_iter().skip((list.page - 1) * list.page_size).take(list.page_size).collect(), total)
}
