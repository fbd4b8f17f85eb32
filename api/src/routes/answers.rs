//! Answers: a sandbox in the contract's words (both spellings of each field), and errors as `{message}` or `{message, errors}`.

use crate::error::Error;
use crate::network_policy::NetworkPolicy;
use crate::record::Record;
use crate::registry;
use crate::sources::rfc3339;
use crate::timing::Timing;
use crate::wire::errors::{Failure, ValidationError};
use crate::wire::sandboxes::{Sandbox, SandboxItem};
use axum::Json;
use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse as _, Response};
use serde::Serialize;

const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");
/// Names the header that carries [`Error::code`]; the contract's error body has no room for it.
const STASIS_ERROR: HeaderName = HeaderName::from_static("stasis-error");

/// A sandbox.
pub(super) fn sandbox(record: &Record) -> Sandbox {
    let spec = &record.spec;
    // The contract knows no sandbox without a disk; test templates have none.
    let disk = spec.disk_mib.max(1);
    Sandbox {
        id: record.id.to_string(),
        template_id: spec.template_id.clone(),
        template_name: spec.template_name.clone(),
        vcpu: spec.vcpu,
        memory: spec.memory_mib,
        memory_mib: spec.memory_mib,
        disk,
        disk_mib: disk,
        timeout: spec.timeout_s,
        timeout_min: spec.timeout_s.div_ceil(60),
        state: record.state,
        auto_pause: spec.auto_pause,
        network_policy: spec.network_policy.as_ref().map(NetworkPolicy::redacted),
        created_at: rfc3339(spec.created_at),
        updated_at: rfc3339(record.state_changed_at),
        reason: record.reason.clone(),
        phase: None,
    }
}

/// The same with what its operation is doing now.
pub(super) fn live_sandbox(of: &registry::Sandbox) -> Sandbox {
    Sandbox { phase: of.phase(), ..sandbox(&of.record()) }
}

/// A line of a list.
pub(super) fn item(record: &Record) -> SandboxItem {
    SandboxItem {
        id: record.id.to_string(),
        template_id: record.spec.template_id.clone(),
        pod_id: "",
        state: record.state,
        created_at: rfc3339(record.spec.created_at),
        state_change_time: rfc3339(record.state_changed_at),
        launch_time: record.launched_at.map(rfc3339),
        timeout_at: record.deadline.map(|at| at / 1000),
    }
}

/// A JSON answer with what it cost.
pub(super) fn timed(status: StatusCode, body: impl Serialize, timing: &Timing) -> Response {
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
    let mut response = (status, Json(Failure { message: message.to_owned() })).into_response();
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
    let mut response = if status == StatusCode::BAD_REQUEST {
        (status, Json(ValidationError { message, errors: error.fields() })).into_response()
    } else {
        (status, Json(Failure { message })).into_response()
    };
    response.headers_mut().insert(STASIS_ERROR, HeaderValue::from_static(error.code()));
    if let Some(seconds) = error.retry_after_s() {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::tests_support::sample;
    use crate::network_policy::Mode;
    use serde_json::{json, to_value};

    #[test]
    fn a_sandbox_has_both_spellings_and_no_nulls() {
        let mut record = sample("sbx-a");
        let plain = to_value(sandbox(&record)).unwrap();
        for (a, b) in [("memory", "memory_mib"), ("disk", "disk_mib")] {
            assert_eq!(plain[a], plain[b]);
            assert!(plain[a].as_u64().unwrap() >= 1);
        }
        assert!(plain.as_object().unwrap().values().all(|v| !v.is_null()));
        assert!(plain.get("network_policy").is_none());
        record.spec.network_policy =
            Some(NetworkPolicy { mode: Mode::DenyAll, allow_domains: vec![], allow_cidrs: vec![], transforms: vec![] });
        assert_eq!(to_value(sandbox(&record)).unwrap()["network_policy"], json!({"mode": "deny-all"}));
    }
}
