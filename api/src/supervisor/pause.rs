//! Pause: stop, capture, manifest, head, and only then the answer (design §5).
//!
//! Before the head PUT is sent, every failure lets the guest run again. After it was sent, the guest stays stopped until it is known whether
//! the commit or its cancellation has won: the operation goes on without its client until it knows, holding the operation lock, while the
//! client is told that the outcome is unknown. The VM is ended only when the commit has won, or when somebody else owns the sandbox.
//!
//! What the VMM hands over is untrusted: see `draft`.

use super::machine::vmm_error;
use super::{Core, detached, draft};
use crate::error::{Error, StoreContext as _, chain};
use crate::journal::{OperationId, OperationKind};
use crate::record::Record;
use crate::registry::{OperationGuard, Sandbox};
use crate::states::{Event, State};
use crate::store::place;
use crate::timing::Timing;
use crate::vmm_process::Vmm;
use bytes::Bytes;
use stasis_snapshot::capture::{Options, packs_needed};
use stasis_snapshot::commit::{Attempt, Backoff, Cancelled, Change, Current, HeadState, PauseEnd, Sent};
use stasis_snapshot::ids::Digest;
use stasis_snapshot::manifest::{Lineage, ManifestRef};
use stasis_snapshot::store::{ErrorKind, Operation, Precondition, StoreError};
use stasis_vmm::control::types::{CaptureMode, CaptureReport, CaptureRequest, PauseReport};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// Grants live as long as the capture that uses them, and this much more for clocks that differ.
const GRANT_SLACK: Duration = Duration::from_mins(5);
/// Between two rounds of settling an unknown outcome.
const ROUND: Duration = Duration::from_secs(2);
/// Attempts at the manifest PUT, whose name no other commit shares: it may be sent again blindly.
const MANIFEST_TRIES: u32 = 3;

type Answer = Result<(Record, Timing), Error>;

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
        tokio::spawn(run(core, sandbox, guard, tell));
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
    let mut timing = Timing::default();
    let ready = prepare(&core, &sandbox, &vm, operation, &mut timing).await;
    let result = match ready {
        Ok(ready) => finish(&core, &sandbox, &ready, Some(tell), &mut timing, &guard).await,
        Err(error) => {
            // The head PUT was never sent: nothing can have been committed.
            run_again(&core, &sandbox, &error.chain(), &guard).await;
            Some((tell, Err(error)))
        }
    };
    sandbox.set_phase(None);
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

fn answer(tell: oneshot::Sender<Answer>, outcome: Answer) {
    if tell.send(outcome).is_err() {
        tracing::debug!("the client of a pause has hung up");
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

/// Everything that the head PUT needs, made and durable.
pub(super) struct ReadyToCommit {
    attempt: Attempt,
    cancel: Attempt,
    sent: Sent,
    /// Packs that were granted and not used, by the files they left.
    leftovers: Vec<String>,
}

impl ReadyToCommit {
    /// The journaled attempts of an interrupted pause.
    pub(super) fn again(attempt: Attempt, cancel: Attempt) -> Self {
        Self { attempt, cancel, sent: Sent::Maybe, leftovers: Vec::new() }
    }
}

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
    let report = tokio::time::timeout(control, vm.client.pause())
        .await
        .map_err(|_| Error::Deadline { id: sandbox.id.clone(), what: "stopping the guest", ms: control.as_millis() })?
        .map_err(vmm_error(sandbox, vm, "stop the guest"))?;
    timing.since("stop", begun);

    let begun = Instant::now();
    let current = core.current_head(sandbox).await?.ok_or_else(|| Error::Damaged {
        object: format!("the head of {}", sandbox.id),
        source: "it is not in the store".into(),
    })?;
    let place = place(&sandbox.tenant, &sandbox.id)?;
    let commit = core.commit_id();
    let generation = place.generation(current.head.seq + 1, current.head.epoch, commit);
    let keys = (0..packs_to_grant(&report, core.config.limits.connections)).map(|n| generation.pack(n)).collect();
    let grants = core.store.grant_puts(keys, core.config.deadlines.capture() + GRANT_SLACK).await?;
    timing.since("grant", begun);

    sandbox.set_phase(Some("upload"));
    let (draft, captured) = capture(core, sandbox, vm, grants, timing).await?;

    sandbox.set_phase(Some("commit"));
    let begun = Instant::now();
    let lineage = Lineage {
        sandbox: sandbox.id.to_string(),
        seq: current.head.seq + 1,
        epoch: current.head.epoch,
        commit,
        parent: current.head.manifest.clone(),
    };
    let (manifest, bytes) = draft::complete(&sandbox.record(), &draft, lineage)?;
    let leftovers = draft::check_packs(&core.store, &sandbox.id, &manifest, place.prefix(), &generation).await?;
    timing.since("verify", begun);
    let begun = Instant::now();
    let manifest = ManifestRef { key: generation.manifest(), digest: Digest::of(&bytes) };
    timing.bytes("sent", captured.sent_bytes + bytes.len() as u64);
    put_manifest(core, &manifest.key, bytes).await?;
    timing.since("manifest", begun);

    let change = Change {
        state: HeadState::Paused,
        manifest: Some(manifest),
        record: Core::head_record(sandbox, State::Paused)?,
    };
    let attempt = Attempt::next(&current, change, commit).map_err(Core::head_error(sandbox))?;
    let cancel = attempt.cancel(Some(&current), core.commit_id()).map_err(Core::head_error(sandbox))?;
    core.propose(operation, &[&attempt, &cancel])?;
    Ok(ReadyToCommit { attempt, cancel, sent: Sent::Never, leftovers })
}

/// How many packs the capture may write. More connections make smaller and more packs, and the VMM's own figure knows nothing of ours.
fn packs_to_grant(report: &PauseReport, connections: u16) -> u32 {
    let options = Options { connections, ..Options::default() };
    report.packs_needed.max(packs_needed(report.dirty_memory_pages + report.dirty_disk_blocks, &options))
}

async fn capture(
    core: &Core,
    sandbox: &Sandbox,
    vm: &Vmm,
    grants: crate::store::Grants,
    timing: &mut Timing,
) -> Result<(Bytes, CaptureReport), Error> {
    let begun = Instant::now();
    if !grants.files.is_empty() {
        vm.client.send_files(grants.files).await.map_err(vmm_error(sandbox, vm, "hand it the packs to write"))?;
    }
    let limit = core.config.deadlines.capture();
    let request = CaptureRequest {
        packs: grants.objects,
        connections: core.config.limits.connections,
        deadline_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
        mode: CaptureMode::Stopped,
        memory_bytes: None,
    };
    // The VMM keeps the deadline; ours is for a VMM that does not.
    let capture = tokio::time::timeout(limit + core.config.deadlines.control(), vm.client.capture(&request));
    let Ok(outcome) = capture.await else {
        if let Err(error) = vm.client.cancel_capture().await {
            tracing::warn!(id = %sandbox.id, error = chain(&error), "cannot cancel a capture");
        }
        return Err(Error::Deadline { id: sandbox.id.clone(), what: "the upload", ms: limit.as_millis() });
    };
    let captured = outcome.map_err(vmm_error(sandbox, vm, "capture and upload its state"))?;
    let took = begun.elapsed();
    let report = &captured.1;
    timing.phase("state", Duration::from_micros(report.state_us));
    timing.phase("upload", took.saturating_sub(Duration::from_micros(report.state_us)));
    Ok(captured)
}

async fn put_manifest(core: &Core, key: &str, bytes: Bytes) -> Result<(), Error> {
    let precondition = if core.store.is_shared() { Precondition::IfAbsent } else { Precondition::None };
    let mut tries = 0;
    loop {
        tries += 1;
        match core.store.objects().put(key, bytes.clone(), &precondition).await {
            Ok(_) => return Ok(()),
            // Only we write this name: it exists because an earlier try of ours was applied and its reply lost.
            Err(e) if e.kind == ErrorKind::PreconditionFailed && tries > 1 => return Ok(()),
            Err(e) if e.is_retryable() && tries < MANIFEST_TRIES => {
                tracing::warn!(key, error = chain(&e), "the manifest is sent again");
                tokio::time::sleep(Duration::from_millis(100) * tries).await;
            }
            Err(e) => return Err(e).doing("store the manifest"),
        }
    }
}

/// From the first head PUT to the end. The client is told once, at the latest when the outcome is unknown for the first time; then the sender
/// is spent and `None` comes back.
pub(super) async fn finish(
    core: &Core,
    sandbox: &Sandbox,
    ready: &ReadyToCommit,
    mut tell: Option<oneshot::Sender<Answer>>,
    timing: &mut Timing,
    guard: &OperationGuard,
) -> Option<(oneshot::Sender<Answer>, Result<Record, Error>)> {
    let begun = Instant::now();
    let mut settled = settle(core, sandbox, ready).await;
    loop {
        let outcome = match settled {
            Settled::Paused(now) => {
                timing.since("commit", begun);
                let begun = Instant::now();
                core.end_vm(sandbox).await;
                timing.since("free", begun);
                drop_leftovers(core, &ready.leftovers).await;
                committed(core, sandbox, &now)
            }
            Settled::RunAgain(error) => {
                run_again(core, sandbox, &error.chain(), guard).await;
                Err(error)
            }
            Settled::Fenced(error) => {
                core.end_vm(sandbox).await;
                let note = error.chain();
                let event = if sandbox.record().commit.is_some() { Event::LostCommitted } else { Event::Lost };
                core.registry
                    .record(sandbox, event, Some(&note), |record| record.reason = Some(note.clone()))
                    .and(Err(error))
            }
            Settled::Unknown(error) => {
                tracing::error!(id = %sandbox.id, error = error.chain(), "the guest stays stopped");
                if let Some(tell) = tell.take() {
                    answer(tell, Err(error));
                }
                tokio::time::sleep(ROUND).await;
                settled = give_up(core, sandbox, ready).await;
                continue;
            }
        };
        return tell.map(|tell| (tell, outcome));
    }
}

enum Settled {
    Paused(Current),
    RunAgain(Error),
    Fenced(Error),
    Unknown(Error),
}

/// Commits, and cancels when that cannot be settled in time.
async fn settle(core: &Core, sandbox: &Sandbox, ready: &ReadyToCommit) -> Settled {
    let register = match core.register(sandbox) {
        Ok(register) => register,
        Err(error) => return Settled::RunAgain(error),
    };
    let total = core.config.deadlines.settle();
    let (mut commit, mut cancel) = (Backoff::within(total), Backoff::within(total));
    match register.end_pause(&ready.attempt, &ready.cancel, ready.sent, &mut commit, &mut cancel).await {
        PauseEnd::Paused { now } => Settled::Paused(now),
        PauseEnd::RunAgain { now, cause } => run_again_from(sandbox, now, cause),
        PauseEnd::Fenced { by } => fenced(sandbox, &by),
        PauseEnd::Unknown { cause } => unknown(sandbox, cause),
    }
}

/// The client was told that the pause did not succeed as far as is known, so from then on only the cancel commit is sent: unless the commit
/// has landed, the guest goes on.
async fn give_up(core: &Core, sandbox: &Sandbox, ready: &ReadyToCommit) -> Settled {
    let register = match core.register(sandbox) {
        Ok(register) => register,
        Err(error) => return Settled::Unknown(error),
    };
    let mut pacer = Backoff::within(core.config.deadlines.settle());
    match register.cancel(&ready.attempt, &ready.cancel, &mut pacer).await {
        Cancelled::Won { now } => run_again_from(sandbox, Some(now), cancelled(ready)),
        Cancelled::Gone { cause } => run_again_from(sandbox, None, cause),
        Cancelled::Landed { now } => Settled::Paused(now),
        Cancelled::Superseded { by } if by.head.owner == core.owner && by.head.state == HeadState::Live => {
            run_again_from(sandbox, Some(by), cancelled(ready))
        }
        Cancelled::Superseded { by } | Cancelled::Fenced { by } => fenced(sandbox, &by),
        Cancelled::Unknown { cause } => unknown(sandbox, cause),
    }
}

fn cancelled(ready: &ReadyToCommit) -> StoreError {
    StoreError::new(ErrorKind::Unavailable, Operation::Put, format!("the head of {}", ready.attempt.head().sandbox))
        .because("the commit was not confirmed in time and has been cancelled")
}

fn run_again_from(sandbox: &Sandbox, now: Option<Current>, cause: StoreError) -> Settled {
    sandbox.set_head(now);
    Settled::RunAgain(Error::Store { action: "commit the head", source: cause })
}

fn fenced(sandbox: &Sandbox, by: &Current) -> Settled {
    sandbox.set_head(None);
    Settled::Fenced(Error::Fenced { id: sandbox.id.clone(), owner: by.head.owner.clone(), epoch: by.head.epoch })
}

fn unknown(sandbox: &Sandbox, cause: StoreError) -> Settled {
    sandbox.set_head(None);
    Settled::Unknown(Error::Unknown { id: sandbox.id.clone(), action: "pause", source: cause })
}

/// The commit has won: `paused`, whatever the journal says.
pub(super) fn committed(core: &Core, sandbox: &Sandbox, now: &Current) -> Result<Record, Error> {
    sandbox.set_head(Some(now.clone()));
    core.registry.record(sandbox, Event::Committed, None, |record| {
        record.commit.clone_from(&now.head.manifest);
        (record.epoch, record.seq) = (now.head.epoch, now.head.seq);
        record.reason = None;
    })
}

/// It is proven that nothing was committed: the guest goes on, or is lost if its VMM cannot.
pub(super) async fn run_again(core: &Core, sandbox: &Sandbox, why: &str, guard: &OperationGuard) {
    let unparked = match sandbox.vm() {
        Some(vm) => core.unpark(sandbox, &vm).await,
        None => Err(Error::VmmEnded { id: sandbox.id.clone(), reason: "it was gone".to_owned() }),
    };
    if let Err(error) = unparked {
        tracing::error!(id = %sandbox.id, error = error.chain(), "the guest cannot go on after a failed pause");
        core.lose(sandbox, guard).await;
        return;
    }
    let note = format!("the pause failed, the guest goes on: {why}");
    let moved = core.registry.record(sandbox, Event::Failed, Some(&note), |record| {
        record.reason = Some(note.clone());
        if let Some(head) = sandbox.head() {
            (record.epoch, record.seq) = (head.head.epoch, head.head.seq);
        }
    });
    if let Err(error) = moved {
        tracing::error!(id = %sandbox.id, error = error.chain(), "after a failed pause");
    }
}

async fn drop_leftovers(core: &Core, keys: &[String]) {
    for key in keys.iter().filter(|key| !key.ends_with("/manifest")) {
        if let Err(error) = core.store.objects().delete(key).await {
            tracing::warn!(key, error = chain(&error), "an unused pack stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enough_packs_are_granted_for_any_number_of_connections() {
        let report = PauseReport { dirty_memory_pages: 8448, dirty_disk_blocks: 100, packs_needed: 10, stop_us: 0 };
        for connections in [1, 8, 16, 256] {
            let granted = packs_to_grant(&report, connections);
            let bytes: u64 = (8448 + 100) * 4096;
            let pack = (bytes / u64::from(connections)).clamp(1 << 20, 8 << 20);
            assert!(u64::from(granted) > bytes / pack && granted >= 10, "{connections}: {granted}");
        }
    }
}
