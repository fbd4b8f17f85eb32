//! Presigned URLs: names by which a port of a sandbox is reached without a key, for a while.

use super::table::Route;
use super::{Path, Shared, Tenant, json_body};
use crate::error::Error;
use crate::openapi::{Operation, Tag};
use crate::sources::rfc3339;
use crate::states::State as SandboxState;
use crate::validate::{FieldError, FieldErrors, integer};
use crate::wire::presigned::{CreatePresignedUrl, PresignedUrl};
use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Map, Value};
use std::num::NonZeroU16;

/// Life of a URL whose request says none, seconds.
const LIFE: i64 = 3600;
/// Longest life, seconds: a week.
const LONGEST_LIFE: i64 = 7 * 24 * 3600;

pub(super) fn routes() -> Vec<Route> {
    let op = |id: &str, summary| Operation::new(id, Tag::PresignedUrl, summary);
    vec![
        Route::post(
            "/v1/sandbox/{id}/presigned-url",
            create,
            op("createPresignedURL", "Make a presigned URL")
                .says("Opens one port to whoever has the URL. The sandbox may be asleep and stays so; a request by the URL wakes it.")
                .of_sandbox()
                .body::<CreatePresignedUrl>()
                .answers::<PresignedUrl>(201, "The URL, with its token, which is shown this once.")
                .fails(409, "The sandbox has as many as it may have.")
                .fails(503, "This host has no domain for them."),
        ),
        Route::delete(
            "/v1/sandbox/{id}/presigned-url/{url}",
            delete,
            op("deletePresignedURL", "Delete a presigned URL")
                .says("What came by it is finished; nothing else comes.")
                .fails(404, "There is no such sandbox, or it has no such URL.")
                .done(204, "It leads nowhere."),
        ),
    ]
}

/// A checked request: the port, and the life in seconds.
fn checked(body: &Map<String, Value>) -> Result<(NonZeroU16, i64), Vec<FieldError>> {
    let mut errors = FieldErrors::default();
    let port = integer(body, &["port"], 1..=i64::from(u16::MAX), &mut errors);
    let life = integer(body, &["expires_in"], 1..=LONGEST_LIFE, &mut errors).unwrap_or(LIFE);
    if port.is_none() && errors.is_empty() {
        errors.add("port", "is required");
    }
    let port = port.and_then(|port| u16::try_from(port).ok()).and_then(NonZeroU16::new);
    match port {
        Some(port) => errors.or((port, life)),
        None => Err(errors.into_list()),
    }
}

/// 201 with the URL and its token, which is shown this once. The sandbox may be asleep; it stays so.
async fn create(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    body: Body,
) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let (port, life) = checked(&json_body(&core, body).await?).map_err(Error::Invalid)?;
    if matches!(sandbox.state(), SandboxState::Deleting | SandboxState::Deleted) {
        return Err(Error::NotFound(id));
    }
    let made = core.journal.create_presigned(&sandbox.id, port, life * 1000, &core.sources)?;
    let (url, token) = made.ok_or(Error::TooManyUrls { id: sandbox.id.clone() })?;
    let invoke = &core.config.invoke;
    let domain = invoke.domain().map_err(|e| Error::Host(e.to_string()))?;
    let answer = PresignedUrl {
        id: url.id,
        token: token.reveal().to_owned(),
        url: format!("{}://{}", invoke.scheme.as_str(), domain.authority(token.reveal())),
        sandbox_id: url.sandbox,
        port: url.port,
        expires_at: rfc3339(url.expires_at),
        created_at: rfc3339(url.created_at),
    };
    Ok((StatusCode::CREATED, Json(answer)).into_response())
}

/// 204. The URL leads nowhere from now on; what came by it is finished.
async fn delete(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path((id, url)): Path<(String, String)>,
) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    if core.journal.delete_presigned(&sandbox.id, &url)? {
        Ok(StatusCode::NO_CONTENT.into_response())
    } else {
        Err(Error::NoPresignedUrl(url))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(body: &Value) -> Result<(u16, i64), Vec<String>> {
        checked(body.as_object().unwrap())
            .map(|(port, life)| (port.get(), life))
            .map_err(|errors| errors.into_iter().map(|e| e.field).collect())
    }

    #[test]
    fn the_port_is_required_and_both_fields_have_bounds() {
        assert_eq!(of(&json!({"port": 8080})), Ok((8080, 3600)));
        assert_eq!(of(&json!({"port": 65535.0, "expires_in": 1})), Ok((65535, 1)));
        assert_eq!(of(&json!({"port": 1, "expires_in": null})), Ok((1, 3600)));
        for (body, field) in [
            (json!({}), "port"),
            (json!({"port": 0}), "port"),
            (json!({"port": 65536}), "port"),
            (json!({"port": "x"}), "port"),
            (json!({"port": 80, "expires_in": 0}), "expires_in"),
            (json!({"port": 80, "expires_in": LONGEST_LIFE + 1}), "expires_in"),
            (json!({"port": 80, "expires_in": "1h"}), "expires_in"),
        ] {
            assert_eq!(of(&body), Err(vec![field.to_owned()]), "{body}");
        }
    }
}
