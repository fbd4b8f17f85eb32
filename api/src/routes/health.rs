//! Health: no key needed, nothing secret said.

use super::Shared;
use axum::Json;
use axum::extract::State;
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

/// Ready for requests: it serves only after everything was adopted, so being asked is being ready.
pub(super) async fn ready() -> Json<Value> {
    Json(json!({ "status": "ready" }))
}
