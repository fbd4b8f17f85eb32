//! Health: no key needed, nothing secret said.

use super::Shared;
use crate::error::chain;
use crate::host::Kvm;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};

/// Alive, and what it cannot do.
pub(super) async fn health(State(core): Shared) -> Json<Value> {
    let mut caveats = core.store.caveats().to_vec();
    if !core.store.is_shared() {
        caveats.push("the store has no conditional writes: only this supervisor may use it".to_owned());
    }
    caveats.extend(core.kvm.advice());
    Json(json!({
        "status": "ok",
        "version": env!("CARGO_PKG_VERSION"),
        "owner": core.owner,
        "store": { "conditional_writes": core.store.is_shared() },
        "caveats": caveats,
    }))
}

/// 200 when sandboxes can be made and paused now: the store answers and KVM is there. 503 with the reason otherwise.
pub(super) async fn ready(State(core): Shared) -> Response {
    let unready = |reason: &str| {
        let body = Json(json!({ "status": "not ready", "message": reason }));
        (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
    };
    if let (Kvm::Missing | Kvm::Forbidden(_), Some(advice)) = (&core.kvm, core.kvm.advice()) {
        return unready(&advice);
    }
    match core.store.objects().list("v1/probe/", None).await {
        Ok(_) => Json(json!({
            "status": "ready",
            "store": { "conditional_writes": core.store.is_shared() },
            "kvm": true,
        }))
        .into_response(),
        Err(error) => unready(&chain(&error)),
    }
}
