//! What stands now: asked when somebody wants to know.

use super::{
    AHEAD_BYTES, AHEAD_ROUNDS, CACHE_BYTES, CACHE_FILES, FAULT_SECONDS, FAULTS, KEPT, KEPT_WAKES, OVERHEAD, PAGED,
    POOL, SANDBOXES, Sample, VISITS, VMM_NETWORK_BYTES, VMM_NETWORK_DROPPED, VMM_STORE_REQUESTS, Value,
};
use crate::states::State;
use crate::supervisor::Core;
use futures::future::join_all;
use stasis_vmm::control::types::Metrics as VmmMetrics;
use std::time::Duration;

/// A VMM that does not answer in this time is left out.
const VMM_ANSWER: Duration = Duration::from_secs(1);

#[expect(clippy::cast_precision_loss, reason = "the format's numbers are doubles")]
fn number(family: &'static str, labels: &[(&'static str, &str)], value: u64) -> Sample {
    let labels = labels.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
    Sample { family, labels, value: Value::Number(value as f64) }
}

/// Gauges of this supervisor, and of the VMMs that run now.
pub async fn samples(core: &Core) -> Vec<Sample> {
    let sandboxes = core.registry.all();
    let mut out: Vec<Sample> = State::ALL
        .into_iter()
        .map(|state| {
            let count = sandboxes.iter().filter(|sandbox| sandbox.state() == state).count();
            number(SANDBOXES, &[("state", state.as_str())], count as u64)
        })
        .collect();
    let visits: usize = sandboxes.iter().map(|sandbox| sandbox.visits()).sum();
    let kept = core.kept.usage();
    out.extend([
        number(VISITS, &[], visits as u64),
        number(KEPT, &[], kept.bytes),
        number(KEPT_WAKES, &[("found", "yes")], kept.hits),
        number(KEPT_WAKES, &[("found", "no")], kept.misses),
        number(POOL, &[], core.pool.waiting() as u64),
    ]);
    if let Some(usage) = core.pack_cache.as_ref().and_then(|cache| cache.usage().ok()) {
        out.extend([number(CACHE_BYTES, &[], usage.bytes), number(CACHE_FILES, &[], usage.files)]);
    }
    let spent: Vec<_> = sandboxes.iter().map(|sandbox| sandbox.ahead(|spent| *spent)).collect();
    out.extend([
        number(AHEAD_ROUNDS, &[("outcome", "sent")], spent.iter().map(|s| s.rounds).sum()),
        number(AHEAD_ROUNDS, &[("outcome", "skipped")], spent.iter().map(|s| s.skipped).sum()),
        number(AHEAD_ROUNDS, &[("outcome", "cut_off")], spent.iter().map(|s| s.cut_off).sum()),
        number(AHEAD_BYTES, &[], spent.iter().map(|s| s.bytes).sum()),
    ]);
    let running =
        sandboxes.iter().filter(|sandbox| sandbox.state() == State::Running).filter_map(|sandbox| sandbox.vm());
    let asked = running.map(|vm| async move { tokio::time::timeout(VMM_ANSWER, vm.client.metrics()).await });
    let told: Vec<_> = join_all(asked).await.into_iter().filter_map(|answer| answer.ok()?.ok()).collect();
    out.extend(of_vmms(&told));
    out
}

fn of_vmms(told: &[VmmMetrics]) -> Vec<Sample> {
    let paging = || told.iter().filter_map(|metrics| metrics.paging.as_ref());
    let (to_guest, from_guest) = told
        .iter()
        .filter_map(|metrics| metrics.network.as_ref())
        .map(|network| (&network.to_guest, &network.from_guest))
        .fold(((0, 0), (0, 0)), |((in_bytes, in_lost), (out_bytes, out_lost)), (into, out)| {
            ((in_bytes + into.bytes, in_lost + into.dropped), (out_bytes + out.bytes, out_lost + out.dropped))
        });
    let waited = Duration::from_micros(paging().map(|p| p.fault_us).sum());
    vec![
        number(FAULTS, &[], paging().map(|p| p.faults).sum()),
        Sample { family: FAULT_SECONDS, labels: Vec::new(), value: Value::Number(waited.as_secs_f64()) },
        number(PAGED, &[("source", "cache")], paging().map(|p| p.cache_bytes).sum()),
        number(PAGED, &[("source", "store")], paging().map(|p| p.store_bytes).sum()),
        number(VMM_STORE_REQUESTS, &[], paging().map(|p| p.store_requests).sum()),
        number(VMM_NETWORK_BYTES, &[("direction", "in")], to_guest.0),
        number(VMM_NETWORK_BYTES, &[("direction", "out")], from_guest.0),
        number(VMM_NETWORK_DROPPED, &[("direction", "in")], to_guest.1),
        number(VMM_NETWORK_DROPPED, &[("direction", "out")], from_guest.1),
        number(OVERHEAD, &[], told.iter().map(|metrics| metrics.overhead_kib << 10).sum()),
    ]
}
