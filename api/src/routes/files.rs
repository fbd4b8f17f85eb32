//! `filesystem/*`. Contents of files are streamed in both directions; only the guest's disk bounds them.

use super::answers::with_timing;
use super::guest::{STALL, acting, asking};
use super::sandboxes::pairs;
use super::{Shared, Tenant, json_body};
use crate::error::Error;
use crate::guest_requests::files as requests;
use crate::registry::Sandbox;
use crate::supervisor::Core;
use crate::supervisor::operations::reach;
use crate::validate::FieldError;
use axum::body::Body;
use axum::extract::{Path, RawQuery, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{MethodRouter, post};
use serde::Serialize;
use stasis_agent::protocol::files::{EditResults, Edited, Exists, FileInfo, Listing, Matches, Paths, TreeItems};
use std::sync::Arc;

const VERB: &str = "use files of";
const OCTETS: HeaderValue = HeaderValue::from_static("application/octet-stream");
const JSON: HeaderValue = HeaderValue::from_static("application/json");

pub(super) fn routes() -> impl Iterator<Item = (String, MethodRouter<Arc<Core>>)> {
    let routes = [
        ("ls", asking::<_, Listing>(requests::ls, "/v1/files/ls", VERB)),
        ("stat", asking::<_, FileInfo>(requests::path, "/v1/files/stat", VERB)),
        ("mkdir", acting(requests::mkdir, "/v1/files/mkdir", VERB)),
        ("write-file", post(write)),
        ("write-files", post(write_many)),
        ("read-file", post(read)),
        ("read-files", post(read_many)),
        ("delete", acting(requests::delete, "/v1/files/delete", VERB)),
        ("set-permissions", acting(requests::set_permissions, "/v1/files/set-permissions", VERB)),
        ("glob", asking::<_, Paths>(requests::glob, "/v1/files/glob", VERB)),
        ("grep", asking::<_, Matches>(requests::grep, "/v1/files/grep", VERB)),
        ("edit-file", asking::<_, Edited>(requests::edit, "/v1/files/edit", VERB)),
        ("edit-files", asking::<_, EditResults>(requests::edit_many, "/v1/files/edit-many", VERB)),
        ("move", acting(requests::transfer, "/v1/files/move", VERB)),
        ("copy", acting(requests::transfer, "/v1/files/copy", VERB)),
        ("exists", asking::<_, Exists>(requests::path, "/v1/files/exists", VERB)),
        ("tree", asking::<_, TreeItems>(requests::tree, "/v1/files/tree", VERB)),
    ];
    routes.into_iter().map(|(name, handler)| (format!("/v1/sandbox/{{id}}/filesystem/{name}"), handler))
}

/// The file is the body, whatever its content type.
async fn write(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
    body: Body,
) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let request = requests::write(&pairs(query.as_deref().unwrap_or_default())).map_err(Error::Invalid)?;
    let named = [("path", Some(request.path)), ("permissions", request.permissions)];
    let named = named.into_iter().filter_map(|(name, value)| Some((name, value?)));
    let path = with_query("/v1/files/write", named)?;
    let answer = pass_on(&core, &sandbox, &path, &OCTETS, body).await?;
    drop(answer.0);
    Ok(with_timing(StatusCode::NO_CONTENT.into_response(), &answer.1.timing))
}

/// A path of the agent with a query.
pub(super) fn with_query(path: &str, pairs: impl IntoIterator<Item = (&'static str, String)>) -> Result<String, Error> {
    let url = reqwest::Url::parse_with_params(&format!("http://agent{path}"), pairs)
        .map_err(|_| Error::Bug("a request to the agent has no URL"))?;
    Ok(format!("{}?{}", url.path(), url.query().unwrap_or_default()))
}

/// The form is read in the guest.
async fn write_many(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let kind = headers.get(CONTENT_TYPE).filter(|kind| is_form(kind)).ok_or_else(|| {
        let error = "must be multipart/form-data with a boundary: a part for each file, its name the path".to_owned();
        Error::Invalid(vec![FieldError { field: "content-type".to_owned(), error }])
    })?;
    let answer = pass_on(&core, &sandbox, "/v1/files/write-many", kind, body).await?;
    drop(answer.0);
    Ok(with_timing(StatusCode::NO_CONTENT.into_response(), &answer.1.timing))
}

fn is_form(kind: &HeaderValue) -> bool {
    let kind = kind.to_str().unwrap_or_default().to_ascii_lowercase();
    kind.split(';').next().is_some_and(|kind| kind.trim() == "multipart/form-data") && kind.contains("boundary=")
}

async fn read(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    body: Body,
) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let request = requests::read(&json_body(&core, body).await?).map_err(Error::Invalid)?;
    let (contents, guest) = ask(&core, &sandbox, "/v1/files/read", &request).await?;
    let answer = ([(CONTENT_TYPE, OCTETS)], contents.into_body()).into_response();
    Ok(with_timing(answer, &guest.timing))
}

async fn read_many(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    body: Body,
) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let request = requests::read_many(&json_body(&core, body).await?).map_err(Error::Invalid)?;
    let (contents, guest) = ask(&core, &sandbox, "/v1/files/read-many", &request).await?;
    let kind = contents.headers().get(CONTENT_TYPE).filter(|kind| is_form(kind)).cloned().ok_or_else(|| {
        Error::Agent { id: sandbox.id.clone(), action: "send files", what: "its answer is no form".to_owned() }
    })?;
    Ok(with_timing(([(CONTENT_TYPE, kind)], contents.into_body()).into_response(), &guest.timing))
}

type Answer = (Response<Body>, crate::supervisor::operations::Guest);

async fn ask(core: &Arc<Core>, sandbox: &Arc<Sandbox>, path: &str, request: &impl Serialize) -> Result<Answer, Error> {
    let body = serde_json::to_vec(request).map_err(|_| Error::Bug("a request to the agent is no JSON"))?;
    pass_on(core, sandbox, path, &JSON, body.into()).await
}

async fn pass_on(
    core: &Arc<Core>,
    sandbox: &Arc<Sandbox>,
    path: &str,
    kind: &HeaderValue,
    body: Body,
) -> Result<Answer, Error> {
    let mut guest = reach(core, sandbox, VERB).await?;
    let agent = guest.agent();
    let answer = guest.call("guest", "move files", agent.stream(path, kind, body, STALL)).await?;
    Ok((answer, guest))
}
