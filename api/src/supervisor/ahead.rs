//! Rounds ahead of a pause: asks running sandboxes what is dirty and has them send it while their guests run. One task looks at all sandboxes;
//! each round is a task of its own.
//!
//! A round holds no operation lock: a pause, a delete or a named snapshot goes on as if it were not there. The VMM ends a round when it is asked
//! to stop or to capture, and refuses one at any other time than while its guest runs. What a round stored counts from then on in the VMM alone;
//! the next manifest names it, or the collector takes it after the pause.

use super::Core;
use super::capture::Size;
use super::timers::end_of_life;
use crate::error::Error;
use crate::registry::Sandbox;
use crate::run_ahead::{Facts, Step, decide, look};
use crate::states::State;
use crate::store::place;
use crate::timing::Timing;
use stasis_vmm::control::types::{CaptureMode, CaptureReport};
use std::sync::Arc;
use std::time::Instant;
use tokio_util::sync::CancellationToken;

/// Runs until `stop`.
pub(super) async fn run(core: Arc<Core>, stop: CancellationToken) {
    let config = core.config.run_ahead;
    if !config.enabled {
        return;
    }
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(config.interval()) => {}
        }
        for sandbox in core.registry.all() {
            // One at a time of each sandbox; the next look finds it again.
            if let Some(turn) = sandbox.try_round() {
                let Some(facts) = facts(&core, &sandbox) else { continue };
                sandbox.ahead(|spent| spent.refill(&config, facts.now));
                if look(&config, facts, &sandbox.ahead(|spent| *spent)) {
                    let core = core.clone();
                    tokio::spawn(async move {
                        round_if_worth_it(&core, &sandbox, facts).await;
                        drop(turn);
                    });
                }
            }
        }
    }
}

/// `None` for one whose guest does not run.
fn facts(core: &Core, sandbox: &Sandbox) -> Option<Facts> {
    let record = sandbox.record();
    (record.state == State::Running).then(|| Facts {
        now: core.sources.now_ms(),
        last_request: sandbox.last_request().max(record.launched_at.unwrap_or(0)),
        auto_pause: end_of_life(&record, sandbox.last_request()).filter(|_| record.spec.auto_pause),
    })
}

async fn round_if_worth_it(core: &Core, sandbox: &Arc<Sandbox>, facts: Facts) {
    let config = &core.config.run_ahead;
    let Some(vm) = sandbox.vm() else { return };
    let dirty = match vm.client.dirty().await {
        Ok(dirty) => dirty,
        Err(error) => {
            tracing::debug!(id = %sandbox.id, %error, "what is dirty is not known");
            return sandbox.ahead(|spent| spent.skip(config, core.sources.now_ms()));
        }
    };
    let pages = dirty.memory_pages + dirty.disk_blocks;
    if decide(config, facts, &sandbox.ahead(|spent| *spent), pages) == Step::Skip {
        return sandbox.ahead(|spent| spent.skip(config, core.sources.now_ms()));
    }
    let begun = Instant::now();
    let outcome = core.round(sandbox, Size { packs_needed: dirty.packs_needed, pages }).await;
    let took = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    match outcome {
        Ok(report) => {
            let (bytes, cpu) = (report.sent_bytes, report.cpu_us / 1000);
            tracing::info!(id = %sandbox.id, pages, bytes, ms = took, cpu, "sent ahead of a pause");
            // Several threads may have worked on it; one at least has sent.
            sandbox.ahead(|spent| spent.round(config, core.sources.now_ms(), pages, bytes, took.max(cpu)));
        }
        Err(error) => {
            tracing::debug!(id = %sandbox.id, error = error.chain(), "a round ahead of a pause was cut off");
            sandbox.ahead(|spent| spent.cut_off(config, core.sources.now_ms(), pages, took));
        }
    }
}

impl Core {
    /// One round of capture of a running guest, into a generation of its own.
    pub(super) async fn round(&self, sandbox: &Sandbox, size: Size) -> Result<CaptureReport, Error> {
        let vm = sandbox.vm().ok_or(Error::Bug("a running sandbox without a VM"))?;
        // From memory alone: a head that must be read first is a sign of trouble that a round must not add to.
        let Some(current) = sandbox.head() else { return Ok(CaptureReport::default()) };
        let place = place(&sandbox.tenant, &sandbox.id)?;
        let generation = place.generation(current.head.seq + 1, current.head.epoch, self.commit_id());
        let grants = self.grant_packs(&generation, size, !self.will_keep(&vm)).await?;
        let granted: Vec<_> = grants.objects.iter().map(|object| object.key.clone()).collect();
        let outcome = self.capture(sandbox, &vm, grants, CaptureMode::Round, &mut Timing::default()).await;
        let stored = outcome.as_ref().map_or(0, |(_, report)| report.packs as usize);
        // Grants are used in order.
        if let (Ok(_), Some(unwritten)) = (&outcome, granted.get(stored..)) {
            self.trim_cache(unwritten);
        }
        outcome.map(|(_, report)| report)
    }
}
