//! Collection by the clock: what `stasis gc` does by hand. One task. Supervisors that share a bucket may all collect: each pass is safe by itself,
//! and what one found unreachable another may delete after the grace.

use super::Core;
use crate::error::chain;
use crate::metrics::{COLLECTED, COLLECTED_BYTES, COLLECTIONS};
use stasis_snapshot::gc::{self, Options, Report};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Runs until `stop`.
pub(super) async fn run(core: Arc<Core>, stop: CancellationToken) {
    let Some(every) = core.config.gc.every() else { return };
    // Not at once: a supervisor that restarts often would do nothing else, and those of one bucket rarely start in the same moment.
    let mut wait = every / 8;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
        wait = every;
        let options =
            Options { grace: core.config.gc.grace(), conditional: core.store.is_shared(), ..Options::default() };
        let objects = core.store.shared_objects();
        let outcome =
            gc::run(&objects, core.store.seals(), &options, &|| core.sources.now_ms(), &|| core.commit_id()).await;
        core.metrics.count(COLLECTIONS, &[("outcome", if outcome.is_ok() { "ok" } else { "error" })], 1);
        match outcome {
            Ok(report) => tell(&core, &report),
            Err(error) => {
                tracing::warn!(error = chain(&error), "a pass of the collector ended early; the next one goes on");
            }
        }
    }
}

fn tell(core: &Core, report: &Report) {
    for tenant in &report.tenants {
        for why in &tenant.blocked {
            tracing::warn!(tenant = tenant.tenant, why, "nothing of this tenant is collected");
        }
    }
    let sum = |of: fn(&gc::TenantReport) -> u64| report.tenants.iter().map(of).sum::<u64>();
    let (deleted, bytes) = (sum(|t| t.deleted.len() as u64), sum(|t| t.deleted_bytes));
    core.metrics.count(COLLECTED, &[], deleted);
    core.metrics.count(COLLECTED_BYTES, &[], bytes);
    tracing::info!(objects = sum(|t| t.objects), waiting = sum(|t| t.candidates), deleted, bytes, "collected");
}
