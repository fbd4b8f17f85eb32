//! What this host keeps ready and does in the background, as JSON for people and benchmarks. An extension of ours.

use super::table::Route;
use super::{Shared, Tenant};
use crate::metrics::{now, text};
use crate::openapi::{Operation, Tag};
use crate::wire::host::{AheadTotals, CacheUsage, HostMetrics};
use axum::Json;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};

pub(super) fn routes() -> Vec<Route> {
    vec![
        Route::get(
            "/metrics",
            prometheus,
            Operation::new("getPrometheusMetrics", Tag::Host, "Show metrics for Prometheus")
                .answers_text("In Prometheus' text format, of the host as a whole.", "text/plain"),
        ),
        Route::get(
            "/v1/host/metrics",
            metrics,
            Operation::new("getHostMetrics", Tag::Host, "Show what this host keeps ready")
                .answers::<HostMetrics>(200, "Counters of the host as a whole."),
        ),
    ]
}

/// 200 in Prometheus' text format. Of the host as a whole, too.
async fn prometheus(State(core): Shared, Tenant(_): Tenant) -> Response {
    let mut samples = core.metrics.samples();
    samples.extend(now::samples(&core).await);
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text(&samples)).into_response()
}

/// 200 with counters. They are of the host: nothing in them tells one tenant of another but how much there is.
async fn metrics(State(core): Shared, Tenant(_): Tenant) -> Json<HostMetrics> {
    let mut run_ahead = AheadTotals::default();
    for sandbox in core.registry.all() {
        let spent = sandbox.ahead(|spent| *spent);
        run_ahead.rounds += spent.rounds;
        run_ahead.bytes += spent.bytes;
        run_ahead.skipped += spent.skipped;
        run_ahead.cut_off += spent.cut_off;
    }
    let cache = core.pack_cache.as_ref().and_then(|cache| cache.usage().ok());
    Json(HostMetrics {
        kept_memory: core.kept.usage(),
        vmm_pool: core.pool.waiting(),
        transfers: core.shares.running(),
        booted_templates: core.goldens.ready(),
        pack_cache: cache.map(|usage| CacheUsage { files: usage.files, bytes: usage.bytes }),
        run_ahead,
    })
}
