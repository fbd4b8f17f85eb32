//! Named snapshots: create, list, restore, delete. `snapshot/create` and `snapshot/restore` are the contract's present words;
//! `snapshot/pause` (create, and end the sandbox) and `snapshot/resume` (restore) are its older ones.

use super::sandboxes::pairs;
use super::{Shared, Tenant, answers, json_body};
use crate::error::Error;
use crate::snapshot_request::{self, List, SortBy};
use crate::sources::rfc3339;
use crate::supervisor::operations;
use crate::supervisor::snapshots::{self, Snapshot};
use axum::Json;
use axum::body::Body;
use axum::extract::{Path, RawQuery, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};

/// 201 with the snapshot, once it is durable; the sandbox runs.
pub(super) async fn create(
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
pub(super) async fn pause(
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
    let mut body = answer(&snapshot);
    if let Some(fields) = body.as_object_mut() {
        fields.insert("state".to_owned(), json!("paused"));
    }
    Ok(answers::timed(StatusCode::CREATED, body, &timing))
}

/// 201 with the new sandbox, once it runs.
pub(super) async fn restore(State(core): Shared, Tenant(tenant): Tenant, body: Body) -> Result<Response, Error> {
    let body = json_body(&core, body).await?;
    let asked = snapshot_request::restore(&body).map_err(Error::Invalid)?;
    let (record, timing) = operations::restore_snapshot(&core, &tenant, asked).await?;
    Ok(answers::timed(StatusCode::CREATED, answers::sandbox(&record), &timing))
}

/// 204.
pub(super) async fn delete(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
) -> Result<Response, Error> {
    operations::delete_snapshot(&core, &tenant, &id).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// 200 with one page of the tenant's snapshots.
pub(super) async fn list(
    State(core): Shared,
    Tenant(tenant): Tenant,
    RawQuery(query): RawQuery,
) -> Result<Response, Error> {
    let list = snapshot_request::list(&pairs(query.as_deref().unwrap_or_default())).map_err(Error::Invalid)?;
    let (items, total) = page(snapshots::list(&core, &tenant).await?, &list);
    Ok(Json(json!({ "items": items.iter().map(answer).collect::<Vec<_>>(), "total_items": total })).into_response())
}

fn answer(snapshot: &Snapshot) -> Value {
    let spec = &snapshot.spec;
    let disk = spec.disk_mib.max(1);
    let mut out = json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "template_id": spec.template_id,
        "vcpu": spec.vcpu,
        "memory": spec.memory_mib,
        "memory_mib": spec.memory_mib,
        "disk": disk,
        "disk_mib": disk,
        "created_at": rfc3339(snapshot.created_at),
    });
    if let (Some(policy), Some(fields)) = (&spec.network_policy, out.as_object_mut()) {
        fields.insert("network_policy".to_owned(), json!(policy));
    }
    out
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
