//! Templates from container images: upload, list, get, rename, delete. The contract has neither list nor get.

use super::sandboxes::pairs;
use super::table::Route;
use super::{Path, Shared, Tenant, json_body};
use crate::error::Error;
use crate::image::Process;
use crate::openapi::{Operation, Tag};
use crate::sources::rfc3339;
use crate::supervisor::operations;
use crate::supervisor::templates::{Job, Listed};
use crate::template::Template;
use crate::template_request;
use crate::wire::templates::{
    self as wire, ImageConfig, ListTemplates, RenameTemplate, TemplateList, TemplateState, UploadTemplate,
};
use axum::Json;
use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};

pub(super) fn routes() -> Vec<Route> {
    let op = |id: &str, summary| Operation::new(id, Tag::Template, summary);
    let lists = |id: &str, summary| op(id, summary).query::<ListTemplates>().answers::<TemplateList>(200, "One page.");
    let missing = "There is no such template.";
    vec![
        Route::post(
            "/v1/template",
            upload,
            op("uploadTemplate", "Make a template from a container image")
                .says("The work goes on when the client does not wait for it.")
                .body::<UploadTemplate>()
                .answers::<wire::Template>(201, "Sandboxes can be made from it.")
                .changes("There is a template of that name, or as many as there may be."),
        ),
        Route::get("/v1/template", list, lists("listTemplates", "List templates")),
        Route::get("/v1/templates", list, lists("listTemplatesToo", "List templates, by another path")),
        Route::get(
            "/v1/template/{template}",
            get,
            op("getTemplate", "Show a template").answers::<wire::Template>(200, "The template.").fails(404, missing),
        ),
        Route::patch(
            "/v1/template/{template}",
            rename,
            op("renameTemplate", "Give a template another name")
                .body::<RenameTemplate>()
                .done(204, "It has the name.")
                .fails(404, missing)
                .fails(409, "There is a template of that name, or it is the operator's, or it is not ready."),
        ),
        Route::delete(
            "/v1/template/{template}",
            delete,
            op("deleteTemplate", "Delete a template")
                .done(204, "It is deleted.")
                .fails(404, missing)
                .changes("A sandbox or a snapshot needs it, or it is the operator's, or it is being made."),
        ),
    ]
}

/// 201 with the template, once sandboxes can be made from it.
async fn upload(State(core): Shared, Tenant(tenant): Tenant, body: Body) -> Result<Response, Error> {
    let body = json_body(&core, body).await?;
    let asked = template_request::upload(&body).map_err(Error::Invalid)?;
    let template = operations::upload_template(&core, &tenant, asked).await?;
    Ok((StatusCode::CREATED, Json(ready(&template))).into_response())
}

/// 200 with one page of the templates that the tenant may use, is making, or could not make.
async fn list(State(core): Shared, Tenant(tenant): Tenant, RawQuery(query): RawQuery) -> Result<Response, Error> {
    let list = template_request::list(&pairs(query.as_deref().unwrap_or_default())).map_err(Error::Invalid)?;
    let (items, total) = operations::list_templates(&core, &tenant, &list).await?;
    Ok(Json(TemplateList { items: items.iter().map(listed).collect(), total_items: total }).into_response())
}

/// 200 with the template: while it is made, with phase and bytes; when it could not be, with the reason.
async fn get(State(core): Shared, Tenant(tenant): Tenant, Path(id): Path<String>) -> Result<Response, Error> {
    Ok(Json(listed(&operations::get_template(&core, &tenant, &id).await?)).into_response())
}

/// 204.
async fn rename(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    body: Body,
) -> Result<Response, Error> {
    // Before the body is looked at: what is not there is 404, whatever it was to be renamed to.
    operations::get_template(&core, &tenant, &id).await?;
    let body = json_body(&core, body).await?;
    let name = template_request::rename(&body).map_err(Error::Invalid)?;
    operations::rename_template(&core, &tenant, &id, name).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// 204.
async fn delete(State(core): Shared, Tenant(tenant): Tenant, Path(id): Path<String>) -> Result<Response, Error> {
    operations::delete_template(&core, &tenant, &id).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

fn listed(one: &Listed) -> wire::Template {
    match one {
        Listed::Ready(template) => ready(template),
        Listed::Job(job) => unready(job),
    }
}

fn ready(template: &Template) -> wire::Template {
    let upload = template.upload.as_ref();
    wire::Template {
        id: template.id(),
        name: template.name.clone(),
        state: TemplateState::Ready,
        // The operator's have no image; what names their content instead says how.
        digest: upload.map_or_else(|| format!("blake3:{}", template.digest), |upload| upload.image_digest.clone()),
        image_config: upload.map(|upload| image_config(&upload.process)).unwrap_or_default(),
        is_system: upload.is_none(),
        created_at: rfc3339(upload.map_or(0, |upload| upload.created_at)),
        uri: upload.map(|upload| upload.uri.clone()),
        port: template.port,
        disk: Some(template.disk_mib),
        disk_mib: Some(template.disk_mib),
        phase: None,
        bytes: None,
        total_bytes: None,
        reason: None,
    }
}

fn unready(job: &Job) -> wire::Template {
    let (stand, failed) = (job.stand(), job.failed());
    wire::Template {
        id: job.id.clone(),
        name: job.name.clone(),
        state: if failed.is_some() { TemplateState::Failed } else { TemplateState::Building },
        digest: String::new(),
        image_config: ImageConfig::default(),
        is_system: false,
        created_at: rfc3339(job.created_at),
        uri: Some(job.uri.clone()),
        port: None,
        disk: None,
        disk_mib: None,
        phase: Some(stand.phase),
        bytes: Some(stand.bytes),
        total_bytes: Some(stand.total_bytes),
        reason: failed,
    }
}

fn image_config(process: &Process) -> ImageConfig {
    ImageConfig {
        entrypoint: process.entrypoint.clone(),
        cmd: process.cmd.clone(),
        working_dir: process.working_dir.clone(),
        user: process.user.clone(),
        env: Some(process.env.clone()),
    }
}
