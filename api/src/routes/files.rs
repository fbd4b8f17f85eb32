//! `filesystem/*`. Contents of files are streamed in both directions; only the guest's disk bounds them.

use super::answers::with_timing;
use super::guest::{STALL, acting, asking};
use super::sandboxes::pairs;
use super::table::Route;
use super::{Path, Shared, Tenant, json_body};
use crate::error::Error;
use crate::guest_requests::files as requests;
use crate::openapi::{Operation, Tag};
use crate::registry::Sandbox;
use crate::supervisor::Core;
use crate::supervisor::operations::reach;
use crate::validate::FieldError;
use crate::wire::files::{
    DeletePath, EditFile, EditFiles, FindFiles, FindLines, ListDirectory, MakeDirectory, MoveOrCopy, OnePath, ReadFile,
    ReadFiles, SetPermissions, ShowTree, WriteFile,
};
use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse as _, Response};
use serde::Serialize;
use stasis_agent::protocol::files::{EditResults, Edited, Exists, FileInfo, Listing, Matches, Paths, TreeItems};
use std::sync::Arc;

const VERB: &str = "use files of";
const OCTETS: HeaderValue = HeaderValue::from_static("application/octet-stream");
const JSON: HeaderValue = HeaderValue::from_static("application/json");

pub(super) fn routes() -> Vec<Route> {
    let at = |name: &str| format!("/v1/sandbox/{{id}}/filesystem/{name}");
    let op = |id: &str, summary| Operation::new(format!("filesystem{id}"), Tag::Filesystem, summary);
    vec![
        asking::<_, Listing>(
            at("ls"),
            op("LS", "List a directory").body::<ListDirectory>(),
            requests::ls,
            "/v1/files/ls",
            VERB,
        ),
        asking::<_, FileInfo>(
            at("stat"),
            op("Stat", "Show a file or directory").body::<OnePath>(),
            requests::path,
            "/v1/files/stat",
            VERB,
        ),
        acting(
            at("mkdir"),
            op("Mkdir", "Make a directory").body::<MakeDirectory>(),
            requests::mkdir,
            "/v1/files/mkdir",
            VERB,
        ),
        Route::post(
            at("write-file"),
            write,
            op("WriteFile", "Write a file")
                .says("The body is the file, of any size. It takes the place of what is there when it is complete.")
                .query::<WriteFile>()
                .octets()
                .done(204, "It is written.")
                .asks_guest(),
        ),
        Route::post(
            at("write-files"),
            write_many,
            op("WriteFiles", "Write files")
                .says("A form with a part for each file, whose name is the path.")
                .form()
                .done(204, "They are written.")
                .asks_guest(),
        ),
        Route::post(
            at("read-file"),
            read,
            op("ReadFile", "Read a file")
                .says("Whole, or a part of it: bytes, or its first or last lines.")
                .body::<ReadFile>()
                .answers_octets("The bytes.")
                .asks_guest(),
        ),
        Route::post(
            at("read-files"),
            read_many,
            op("ReadFiles", "Read files")
                .says("One that cannot be read refuses the request.")
                .body::<ReadFiles>()
                .answers_form("A part for each file, whose name is the path.")
                .asks_guest(),
        ),
        acting(
            at("delete"),
            op("Delete", "Delete a file or directory").body::<DeletePath>(),
            requests::delete,
            "/v1/files/delete",
            VERB,
        ),
        acting(
            at("set-permissions"),
            op("SetPermissions", "Change mode, owner or group").body::<SetPermissions>(),
            requests::set_permissions,
            "/v1/files/set-permissions",
            VERB,
        ),
        asking::<_, Paths>(
            at("glob"),
            op("Glob", "Find files by name").body::<FindFiles>(),
            requests::glob,
            "/v1/files/glob",
            VERB,
        ),
        asking::<_, Matches>(
            at("grep"),
            op("Grep", "Find lines that contain a text").says("Binary files are passed over.").body::<FindLines>(),
            requests::grep,
            "/v1/files/grep",
            VERB,
        ),
        asking::<_, Edited>(
            at("edit-file"),
            op("EditFile", "Replace texts in a file").body::<EditFile>(),
            requests::edit,
            "/v1/files/edit",
            VERB,
        ),
        asking::<_, EditResults>(
            at("edit-files"),
            op("EditFiles", "Replace a text in files").body::<EditFiles>(),
            requests::edit_many,
            "/v1/files/edit-many",
            VERB,
        ),
        acting(
            at("move"),
            op("Move", "Move a file or directory").body::<MoveOrCopy>(),
            requests::transfer,
            "/v1/files/move",
            VERB,
        ),
        acting(
            at("copy"),
            op("Copy", "Copy a file or directory").body::<MoveOrCopy>(),
            requests::transfer,
            "/v1/files/copy",
            VERB,
        ),
        asking::<_, Exists>(
            at("exists"),
            op("Exists", "Ask whether a path is there").body::<OnePath>(),
            requests::path,
            "/v1/files/exists",
            VERB,
        ),
        asking::<_, TreeItems>(
            at("tree"),
            op("Tree", "Show a directory as a tree").body::<ShowTree>(),
            requests::tree,
            "/v1/files/tree",
            VERB,
        ),
    ]
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
