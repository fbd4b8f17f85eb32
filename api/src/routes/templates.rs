//! Templates from container images: upload, list, get, rename, delete. The contract has neither list nor get.

use super::sandboxes::pairs;
use super::{Shared, Tenant, json_body};
use crate::error::Error;
use crate::image::Process;
use crate::sources::rfc3339;
use crate::supervisor::operations;
use crate::supervisor::templates::{Job, Listed};
use crate::template::Template;
use crate::template_request;
use axum::Json;
use axum::body::Body;
use axum::extract::{Path, RawQuery, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};

/// 201 with the template, once sandboxes can be made from it.
pub(super) async fn upload(State(core): Shared, Tenant(tenant): Tenant, body: Body) -> Result<Response, Error> {
    let body = json_body(&core, body).await?;
    let asked = template_request::upload(&body).map_err(Error::Invalid)?;
    let template = operations::upload_template(&core, &tenant, asked).await?;
    Ok((StatusCode::CREATED, Json(ready(&template))).into_response())
}

/// 200 with one page of the templates that the tenant may use, is making, or could not make.
pub(super) async fn list(
    State(core): Shared,
    Tenant(tenant): Tenant,
    RawQuery(query): RawQuery,
) -> Result<Response, Error> {
    let list = template_request::list(&pairs(query.as_deref().unwrap_or_default())).map_err(Error::Invalid)?;
    let (items, total) = operations::list_templates(&core, &tenant, &list).await?;
    Ok(Json(json!({ "items": items.iter().map(listed).collect::<Vec<_>>(), "total_items": total })).into_response())
}

/// 200 with the template: while it is made, with phase and bytes; when it could not be, with the reason.
pub(super) async fn get(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
) -> Result<Response, Error> {
    Ok(Json(listed(&operations::get_template(&core, &tenant, &id).await?)).into_response())
}

/// 204.
pub(super) async fn rename(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    body: Body,
) -> Result<Response, Error> {
    let body = json_body(&core, body).await?;
    let name = template_request::rename(&body).map_err(Error::Invalid)?;
    operations::rename_template(&core, &tenant, &id, name).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// 204.
pub(super) async fn delete(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
) -> Result<Response, Error> {
    operations::delete_template(&core, &tenant, &id).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

fn listed(one: &Listed) -> Value {
    match one {
        Listed::Ready(template) => ready(template),
        Listed::Job(job) => unready(job),
    }
}

fn ready(template: &Template) -> Value {
    let disk = template.disk_mib;
    let upload = template.upload.as_ref();
    json!({
        "id": template.id(),
        "name": template.name,
        "state": "ready",
        "uri": upload.map(|upload| &upload.uri),
        // The operator's have no image; what names their content instead says how.
        "digest": upload.map_or_else(|| format!("blake3:{}", template.digest), |upload| upload.image_digest.clone()),
        "image_config": image_config(upload.map(|upload| &upload.process)),
        "is_system": upload.is_none(),
        "port": template.port,
        "disk": disk,
        "disk_mib": disk,
        "created_at": rfc3339(upload.map_or(0, |upload| upload.created_at)),
    })
}

fn unready(job: &Job) -> Value {
    let (stand, failed) = (job.stand(), job.failed());
    json!({
        "id": job.id,
        "name": job.name,
        "state": if failed.is_some() { "failed" } else { "building" },
        "reason": failed,
        "phase": stand.phase,
        "bytes": stand.bytes,
        "total_bytes": stand.total_bytes,
        "uri": job.uri,
        "digest": "",
        "image_config": image_config(None),
        "is_system": false,
        "created_at": rfc3339(job.created_at),
    })
}

fn image_config(process: Option<&Process>) -> Value {
    let Some(process) = process else { return json!({ "entrypoint": null, "cmd": null }) };
    let mut config = json!({ "entrypoint": process.entrypoint, "cmd": process.cmd, "env": process.env });
    // The contract's clients take a missing text, and no null.
    for (field, text) in [("working_dir", &process.working_dir), ("user", &process.user)] {
        if let Some(text) = text {
            config[field] = json!(text);
        }
    }
    config
}
