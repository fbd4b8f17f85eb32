//! Pause: stop, capture, manifest, head, and only then the answer (design §5).
//!
//! Before the head PUT is sent, every failure lets the guest run again. After it was sent, the guest stays stopped until it is known whether
//! the commit or its cancellation has won: the operation goes on without its client until it knows, holding the operation lock, while the
//! client is told that the outcome is unknown. The VM is ended only when the commit has won, or when somebody else owns the sandbox.
//!
//! What the VMM hands over is untrusted: see `draft`. The end of it, from the head PUT on, is in `settle`.

use super::capture::Size;
use super::files::{duplicate, in_memory};
use super::machine::vmm_error;
use super::settle::{Answer, ReadyToCommit, abandon, answer, finish};
use super::{Core, detached, spawn_within};
use crate::error::Error;
use crate::fail_points::{Point, reach};
use crate::journal::{OperationId, OperationKind};
use crate::registry::{OperationGuard, Sandbox};
use crate::states::{Event, State};
use crate::store::place;
use crate::timing::Timing;
use crate::vmm_process::Vmm;
use stasis_snapshot::commit::{Attempt, Change, HeadState, Sent};
use stasis_snapshot::manifest::Lineage;
use stasis_vmm::control::types::CaptureMode;
use std::fs::File;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::oneshot;

/// Pauses a running sandbox and waits until that is durable, or known to have failed, or unknown.
pub async fn pause(core: &Arc<Core>, sandbox: &Arc<Sandbox>) -> Answer {
    let state = sandbox.state();
    if state != State::Running && !state.leads_to_running() {
        return Err(Error::State { id: sandbox.id.clone(), state, verb: "pause" });
    }
    let guard = sandbox.lock().await;
    pause_locked(core, sandbox, guard).await
}

/// The same for one that holds the lock.
pub(super) async fn pause_locked(core: &Arc<Core>, sandbox: &Arc<Sandbox>, guard: OperationGuard) -> Answer {
    let (tell, told) = oneshot::channel();
    let (core, sandbox) = (core.clone(), sandbox.clone());
    detached(async move {
        spawn_within(run(core, sandbox, guard, tell));
        told.await.unwrap_or(Err(Error::Bug("a pause did not end")))
    })
    .await
}

async fn run(core: Arc<Core>, sandbox: Arc<Sandbox>, guard: OperationGuard, tell: oneshot::Sender<Answer>) {
    let begun = match begin(&core, &sandbox) {
        Ok(begun) => begun,
        Err(error) => return answer(tell, Err(error)),
    };
    let (operation, vm) = begun;
    let (mut timing, since) = (Timing::default(), Instant::now());
    let ready = prepare(&core, &sandbox, &vm, operation, &mut timing).await;
    let result = match ready {
        Ok(mut ready) => finish(&core, &sandbox, &mut ready, &[operation], Some(tell), &mut timing, &guard).await,
        Err(error) => {
            // The head PUT was never sent: nothing can have been committed.
            abandon(&core, &sandbox, &error, &guard).await;
            Some((tell, Err(error)))
        }
    };
    sandbox.set_phase(None);
    match &result {
        Some((_, outcome)) => core.account(&sandbox, "pause", since, outcome.as_ref().err(), &timing),
        // Its client was told that the outcome is unknown.
        None => core.metrics.operation("pause", false, &timing),
    }
    let note = match &result {
        Some((_, Err(error))) => error.chain(),
        Some((_, Ok(_))) => "ok".to_owned(),
        None => "settled after the answer".to_owned(),
    };
    if let Err(error) = core.journal.end(operation, &note, core.sources.now_ms()) {
        tracing::error!(id = %sandbox.id, error = error.to_string(), "cannot note the end of a pause");
    }
    // The lock is free before the answer, so that a client's next request finds it so.
    drop(guard);
    if let Some((tell, outcome)) = result {
        answer(tell, outcome.map(|record| (record, timing)));
    }
}

fn begin(core: &Core, sandbox: &Sandbox) -> Result<(OperationId, Arc<Vmm>), Error> {
    let state = sandbox.state();
    if state != State::Running {
        return Err(Error::State { id: sandbox.id.clone(), state, verb: "pause" });
    }
    let vm = sandbox.vm().ok_or(Error::Bug("a running sandbox without a VM"))?;
    let operation = core.journal.begin(&sandbox.id, OperationKind::Pause, core.sources.now_ms())?;
    core.registry.begin(sandbox, Event::Pause, "pause")?;
    Ok((operation, vm))
}

/// Everything from the stop of the guest to a manifest in the store, with what is journaled before the head PUT.
async fn prepare(
    core: &Core,
    sandbox: &Sandbox,
    vm: &Vmm,
    operation: OperationId,
    timing: &mut Timing,
) -> Result<ReadyToCommit, Error> {
    let control = core.config.deadlines.control();
    sandbox.set_phase(Some("stop"));
    let begun = Instant::now();
    core.lower_network(sandbox, vm).await?;
    let report = tokio::time::timeout(control, vm.client.pause())
        .await
        .map_err(|_| Error::Deadline { id: sandbox.id.clone(), what: "stopping the guest", ms: control.as_millis() })?
        .map_err(vmm_error(sandbox, vm, "stop the guest"))?;
    reach(Point::GuestParked);
    timing.since("stop", begun);

    let begun = Instant::now();
    let current = core.held_head(sandbox).await?;
    let place = place(&sandbox.tenant, &sandbox.id)?;
    let commit = core.commit_id();
    let generation = place.generation(current.head.seq + 1, current.head.epoch, commit);
    let size = Size { packs_needed: report.packs_needed, pages: report.dirty_memory_pages + report.dirty_disk_blocks };
    // Packs are not copied to this host where the memory itself stays.
    let grants = core.grant_packs(&generation, size, !core.will_keep(vm)).await?;
    let granted: Vec<_> = grants.objects.iter().map(|object| object.key.clone()).collect();
    timing.since("grant", begun);

    let origin = sandbox.record().origin;
    sandbox.set_phase(Some("upload"));
    let (captured, known) = tokio::join!(
        core.capture(sandbox, vm, grants, CaptureMode::Stopped, timing),
        core.known_packs(sandbox, current.head.manifest.as_ref().or(origin.as_ref()))
    );
    let (draft, captured) = captured?;

    sandbox.set_phase(Some("commit"));
    let begun = Instant::now();
    let lineage = Lineage {
        sandbox: sandbox.id.to_string(),
        seq: current.head.seq + 1,
        epoch: current.head.epoch,
        commit,
        parent: current.head.manifest.clone(),
    };
    let (published, noted) = tokio::join!(
        core.publish(sandbox, &draft, lineage, (&place, &generation, generation.manifest()), &known),
        notes(core, sandbox, vm)
    );
    let published = published?;
    let notes = noted.and_then(|notes| Some((notes, in_memory("manifest", &published.bytes).ok()?)));
    timing.bytes("sent", captured.sent_bytes + published.bytes.len() as u64);
    timing.since("manifest", begun);

    let change = Change {
        state: HeadState::Paused,
        manifest: Some(published.manifest),
        record: Core::head_record(sandbox, State::Paused)?,
    };
    let attempt = Attempt::next(&current, change, commit).map_err(Core::head_error(sandbox))?;
    let cancel = attempt.cancel(Some(&current), core.commit_id()).map_err(Core::head_error(sandbox))?;
    core.propose(operation, &[&attempt, &cancel])?;
    Ok(ReadyToCommit {
        attempt,
        cancel,
        sent: Sent::Never,
        leftovers: published.leftovers,
        unwritten: granted.into_iter().filter(|key| !published.known.names(key)).collect(),
        known: Some(published.known),
        notes,
    })
}

/// What a wake on this host will want to know of the memory file. Without them it pages in from packs, so nothing depends on them.
async fn notes(core: &Core, sandbox: &Sandbox, vm: &Vmm) -> Option<File> {
    if !core.will_keep(vm) {
        return None;
    }
    let noted = async {
        let notes = in_memory("notes", &[])?;
        let token = core.store.token();
        vm.client.keep(token, duplicate(&notes)?).await.map_err(vmm_error(
            sandbox,
            vm,
            "note what its memory holds",
        ))?;
        Ok::<_, Error>(notes)
    };
    match noted.await {
        Ok(notes) => Some(notes),
        Err(error) => {
            tracing::warn!(id = %sandbox.id, error = error.chain(), "its memory is not kept on this host");
            None
        }
    }
}
