//! Answers: a sandbox in the contract's words (both spellings of each field), and errors as `{message}` or `{message, errors}`.

use crate::error::Error;
use crate::record::Record;
use crate::registry::Sandbox;
use crate::sources::rfc3339;
use crate::timing::Timing;
use axum::Json;
use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};

const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");
/// Names the header that carries [`Error::code`]; the contract's error body has no room for it.
const STASIS_ERROR: HeaderName = HeaderName::from_static("stasis-error");

/// A sandbox.
pub(super) fn sandbox(record: &Record) -> Value {
    let spec = &record.spec;
    // The contract knows no sandbox without a disk; test templates have none.
    let disk = spec.disk_mib.max(1);
    let mut out = json!({
        "id": record.id,
        "template_id": spec.template_id,
        "template_name": spec.template_name,
        "vcpu": spec.vcpu,
        "memory": spec.memory_mib,
        "memory_mib": spec.memory_mib,
        "disk": disk,
        "disk_mib": disk,
        "timeout": spec.timeout_s,
        "timeout_min": spec.timeout_s.div_ceil(60),
        "state": record.state,
        "auto_pause": spec.auto_pause,
        "created_at": rfc3339(spec.created_at),
        "updated_at": rfc3339(record.state_changed_at),
    });
    // Absent rather than null: some clients refuse null.
    if let (Some(policy), Some(fields)) = (&spec.network_policy, out.as_object_mut()) {
        fields.insert("network_policy".to_owned(), json!(policy));
    }
    if let (Some(reason), Some(fields)) = (&record.reason, out.as_object_mut()) {
        fields.insert("reason".to_owned(), json!(reason));
    }
    out
}

/// The same with what its operation is doing now.
pub(super) fn live_sandbox(of: &Sandbox) -> Value {
    let mut out = sandbox(&of.record());
    if let (Some(phase), Some(fields)) = (of.phase(), out.as_object_mut()) {
        fields.insert("phase".to_owned(), json!(phase));
    }
    out
}

/// A line of a list.
pub(super) fn item(record: &Record) -> Value {
    let mut out = json!({
        "id": record.id,
        "template_id": record.spec.template_id,
        "pod_id": "",
        "state": record.state,
        "created_at": rfc3339(record.spec.created_at),
        "state_change_time": rfc3339(record.state_changed_at),
    });
    if let Some(fields) = out.as_object_mut() {
        if let Some(at) = record.launched_at {
            fields.insert("launch_time".to_owned(), json!(rfc3339(at)));
        }
        if let Some(at) = record.deadline {
            fields.insert("timeout_at".to_owned(), json!(at / 1000));
        }
    }
    out
}

/// A JSON answer with what it cost.
pub(super) fn timed(status: StatusCode, body: Value, timing: &Timing) -> Response {
    with_timing((status, Json(body)).into_response(), timing)
}

/// An answer with what it cost.
pub(super) fn with_timing(mut response: Response, timing: &Timing) -> Response {
    if let Ok(value) = HeaderValue::from_str(&timing.header())
        && !value.is_empty()
    {
        response.headers_mut().insert(SERVER_TIMING, value);
    }
    response
}

/// `{message}`.
pub(super) fn plain(status: StatusCode, message: &str, code: &'static str) -> Response {
    let mut response = (status, Json(json!({ "message": message }))).into_response();
    response.headers_mut().insert(STASIS_ERROR, HeaderValue::from_static(code));
    response
}

/// An error with its status.
pub(super) fn error(error: &Error) -> Response {
    let status = error.status();
    let message = error.chain();
    if status.is_server_error() {
        tracing::error!(status = status.as_u16(), code = error.code(), "{message}");
    }
    let mut response = match error {
        Error::Invalid(errors) => {
            let mut response = (status, Json(json!({ "message": message, "errors": errors }))).into_response();
            response.headers_mut().insert(STASIS_ERROR, HeaderValue::from_static(error.code()));
            response
        }
        _ => plain(status, &message, error.code()),
    };
    if let Some(seconds) = error.retry_after_s() {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::tests_support::sample;
    use crate::network_policy::{Mode, NetworkPolicy};

    #[test]
    fn a_sandbox_has_both_spellings_and_no_nulls() {
        let mut record = sample("sbx-a");
        let plain = sandbox(&record);
        for (a, b) in [("memory", "memory_mib"), ("disk", "disk_mib")] {
            assert_eq!(plain[a], plain[b]);
            assert!(plain[a].as_u64().unwrap() >= 1);
        }
        assert!(plain.as_object().unwrap().values().all(|v| !v.is_null()));
        assert!(plain.get("network_policy").is_none());
        record.spec.network_policy =
            Some(NetworkPolicy { mode: Mode::DenyAll, allow_domains: vec![], allow_cidrs: vec![], transforms: vec![] });
        assert_eq!(sandbox(&record)["network_policy"], json!({"mode": "deny-all"}));
    }
}
