//! Gives kept memory back when the host runs short of memory. One task.

use super::Core;
use crate::memory_pressure::{Advice, Sample};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Between two looks at the host.
const INTERVAL: Duration = Duration::from_secs(1);

/// Runs until `stop`.
pub(super) async fn run(core: Arc<Core>, stop: CancellationToken) {
    while core.kept.is_on() {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(INTERVAL) => {}
        }
        let kept = core.kept.usage().bytes;
        if kept == 0 {
            continue;
        }
        let sample = Sample::take();
        let left = match sample.advise() {
            Advice::Keep => continue,
            Advice::Halve => kept / 2,
            Advice::Drop => 0,
        };
        tracing::info!(?sample, kept, left, "the host is short of memory: kept memory is given back");
        core.kept.shrink_to(left);
    }
}
