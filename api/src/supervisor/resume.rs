//! Resume: the head is claimed while manifest and VM are made ready; the guest runs only after the claim is confirmed (design §6).
//!
//! Any failure ends the VM, says in the head that the sandbox rests, and leaves it `paused`: it can be resumed again later.

use super::machine::vmm_error;
use super::materialise::{Held, materialise};
use super::{Core, detached};
use crate::admission::Purpose;
use crate::error::Error;
use crate::fail_points::{Point, reach};
use crate::journal::{OperationId, OperationKind};
use crate::record::Record;
use crate::registry::{OperationGuard, Sandbox};
use crate::states::{Event, State};
use crate::timing::Timing;
use crate::vmm_process::Vmm;
use stasis_snapshot::commit::{Attempt, Current, HeadState};
use std::sync::Arc;
use std::time::Instant;

/// A head from memory may be older than the one in the store; a fresh one is tried once.
const CLAIM_TRIES: u32 = 2;
/// Resumes a paused sandbox. One that is on its way to `running` by somebody else's resume is waited for.
pub async fn resume(core: &Arc<Core>, sandbox: &Arc<Sandbox>) -> Result<(Record, Timing), Error> {
    match sandbox.state() {
        State::Paused | State::Unpausing => ensure_running(core, sandbox, "resume").await,
        state => Err(Error::State { id: sandbox.id.clone(), state, verb: "resume" }),
    }
}

/// Returns when the sandbox runs; wakes it when it is paused. However many ask at once, there is one wake, and its failure is everybody's.
pub async fn ensure_running(
    core: &Arc<Core>,
    sandbox: &Arc<Sandbox>,
    verb: &'static str,
) -> Result<(Record, Timing), Error> {
    let seen = sandbox.wakes().ended;
    let state = sandbox.state();
    if state == State::Running {
        return Ok((sandbox.record(), Timing::default()));
    }
    if state != State::Paused && !state.leads_to_running() {
        return Err(Error::State { id: sandbox.id.clone(), state, verb });
    }
    let guard = sandbox.lock().await;
    let wakes = sandbox.wakes();
    match sandbox.state() {
        State::Running => Ok((sandbox.record(), Timing::default())),
        State::Paused => match wakes.failure {
            Some(failure) if wakes.ended != seen => Err(Error::Shared(failure)),
            _ => {
                let (core, sandbox) = (core.clone(), sandbox.clone());
                detached(async move { wake(&core, &sandbox, guard).await }).await
            }
        },
        state => Err(Error::State { id: sandbox.id.clone(), state, verb }),
    }
}

async fn wake(core: &Arc<Core>, sandbox: &Arc<Sandbox>, guard: OperationGuard) -> Result<(Record, Timing), Error> {
    let operation = core.journal.begin(&sandbox.id, OperationKind::Resume, core.sources.now_ms())?;
    let begin = || core.registry.begin(sandbox, Event::Resume, "resume");
    if let Err(error) = core.admitted(&sandbox.tenant, Purpose::Wake, begin) {
        core.journal.end(operation, &error.chain(), core.sources.now_ms())?;
        return Err(error);
    }
    let (mut timing, since) = (Timing::default(), Instant::now());
    let outcome = match restore(core, sandbox, operation, &mut timing).await {
        Ok(()) => {
            let head = sandbox.head();
            core.registry.record(sandbox, Event::Ready, None, |record| {
                if let Some(head) = head {
                    (record.epoch, record.seq) = (head.head.epoch, head.head.seq);
                    record.commit = head.head.manifest;
                    record.disks_only = false;
                }
                record.reason = None;
            })
        }
        Err(error) => {
            let reason = format!("the resume failed: {}", error.chain());
            core.end_vm(sandbox).await;
            core.registry
                .record(sandbox, Event::Failed, Some(&reason), |record| record.reason = Some(reason.clone()))?;
            core.lay_to_rest(sandbox).await;
            core.follow_head(sandbox);
            Err(error)
        }
    };
    sandbox.set_phase(None);
    core.account(sandbox, "resume", since, outcome.as_ref().err(), &timing);
    let note = outcome.as_ref().err().map_or_else(|| "ok".to_owned(), Error::chain);
    core.journal.end(operation, &note, core.sources.now_ms())?;
    let outcome = match outcome {
        Ok(record) => {
            sandbox.wake_ended(None);
            Ok((record, timing))
        }
        Err(error) => {
            let error = Arc::new(error);
            sandbox.wake_ended(Some(error.clone()));
            Err(Error::Shared(error))
        }
    };
    drop(guard);
    outcome
}

async fn restore(
    core: &Arc<Core>,
    sandbox: &Arc<Sandbox>,
    operation: OperationId,
    timing: &mut Timing,
) -> Result<(), Error> {
    let mut tries = 0;
    loop {
        tries += 1;
        let known = sandbox.head().is_some();
        let current =
            core.current_head(sandbox).await?.ok_or_else(|| missing(sandbox, "the head", "it is not in the store"))?;
        let attempt = claim_of(core, sandbox, &current)?;
        let Some(manifest) = current.head.manifest.clone() else {
            return Err(missing(sandbox, "the head", "it names no manifest"));
        };
        core.propose(operation, &[&attempt])?;
        let begun = Instant::now();
        sandbox.set_phase(Some("restore"));
        let kept = core.kept.take(&sandbox.id, manifest.digest);
        let was_kept = kept.is_some();
        // Both to their ends: the claim must be settled whatever the restore does, and a VM that was started must be known to be ended.
        let (claimed, restored) = tokio::join!(
            async { (core.commit(sandbox, &attempt, "claim the sandbox").await, begun.elapsed()) },
            materialise(core, sandbox, &manifest, kept.map(Held::from).unwrap_or_default())
        );
        match claimed {
            (Ok(_), took) => timing.phase("claim", took),
            (Err(Error::Fenced { .. }), _) if known && tries < CLAIM_TRIES => {
                core.end_vm(sandbox).await;
                continue;
            }
            (Err(error), _) => return Err(error),
        }
        let restored = match restored {
            Err(error) if was_kept => {
                tracing::warn!(id = %sandbox.id, error = error.chain(), "its memory on this host is of no use; it is read from the store");
                core.end_vm(sandbox).await;
                materialise(core, sandbox, &manifest, Held::default()).await?
            }
            outcome => outcome?,
        };
        restored.tell(timing);
        return go(core, sandbox, &restored.vm, timing).await;
    }
}

fn missing(sandbox: &Sandbox, what: &str, why: &str) -> Error {
    Error::Damaged { object: format!("{what} of {}", sandbox.id), source: why.into() }
}

/// The claim that this head allows us.
fn claim_of(core: &Core, sandbox: &Sandbox, current: &Current) -> Result<Attempt, Error> {
    let ours = current.head.owner == core.owner;
    match current.head.state {
        HeadState::Paused => Attempt::claim(current, &core.owner, core.commit_id()),
        HeadState::Stopped => {
            return Err(Error::State { id: sandbox.id.clone(), state: State::Stopped, verb: "resume" });
        }
        // We own it and have no VM for it: an earlier life of ours that could not say that it rests.
        HeadState::Live if ours => Attempt::take_over(current, &core.owner, core.commit_id()),
        HeadState::Live => {
            return Err(Error::Fenced {
                id: sandbox.id.clone(),
                owner: current.head.owner.clone(),
                epoch: current.head.epoch,
            });
        }
        HeadState::Deleted => {
            return Err(missing(sandbox, "the head", "it is a tombstone: the sandbox was deleted elsewhere"));
        }
    }
    .map_err(Core::head_error(sandbox))
}

/// The claim is confirmed: the guest runs and is told so.
async fn go(core: &Core, sandbox: &Sandbox, vm: &Vmm, timing: &mut Timing) -> Result<(), Error> {
    sandbox.set_phase(Some("wake"));
    let begun = Instant::now();
    core.raise_network(sandbox, vm).await?;
    vm.client.resume().await.map_err(vmm_error(sandbox, vm, "let it run"))?;
    reach(Point::GuestRuns);
    timing.since("run", begun);
    let begun = Instant::now();
    core.tell_wake(sandbox, vm, None).await?;
    core.tell_trust(sandbox, vm, false).await?;
    timing.since("wake", begun);
    Ok(())
}
