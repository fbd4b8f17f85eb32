//! What this host keeps ready and does in the background, as JSON for people and benchmarks. An extension of ours.

use super::{Shared, Tenant};
use crate::metrics::{now, text};
use axum::Json;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};

/// 200 in Prometheus' text format. Of the host as a whole, too.
pub(super) async fn prometheus(State(core): Shared, Tenant(_): Tenant) -> Response {
    let mut samples = core.metrics.samples();
    samples.extend(now::samples(&core).await);
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text(&samples)).into_response()
}

/// 200 with counters. They are of the host: nothing in them tells one tenant of another but how much there is.
pub(super) async fn metrics(State(core): Shared, Tenant(_): Tenant) -> Json<Value> {
    let mut ahead = (0, 0, 0, 0);
    for sandbox in core.registry.all() {
        let spent = sandbox.ahead(|spent| *spent);
        ahead = (ahead.0 + spent.rounds, ahead.1 + spent.bytes, ahead.2 + spent.skipped, ahead.3 + spent.cut_off);
    }
    let cache = core.pack_cache.as_ref().and_then(|cache| cache.usage().ok());
    Json(json!({
        "kept_memory": core.kept.usage(),
        "vmm_pool": core.pool.waiting(),
        "transfers": core.shares.running(),
        "booted_templates": core.goldens.ready(),
        "pack_cache": cache.map(|usage| json!({ "files": usage.files, "bytes": usage.bytes })),
        "run_ahead": { "rounds": ahead.0, "bytes": ahead.1, "skipped": ahead.2, "cut_off": ahead.3 },
    }))
}
