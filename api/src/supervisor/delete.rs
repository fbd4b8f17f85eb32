//! Delete: the VM is ended and a tombstone is written. What the tombstone names stays in the bucket until the collector purges it
//! (`stasis_snapshot::gc`), and as long as it does the sandbox can be put back. A delete that fails stays `deleting` and is asked for again,
//! by a client or by the timers.

use super::{Core, catalogue, detached};
use crate::error::{Error, StoreContext as _};
use crate::fail_points::{Point, reach};
use crate::ids::SandboxId;
use crate::journal::OperationKind;
use crate::record::Record;
use crate::registry::{OperationGuard, Sandbox};
use crate::states::{Event, State};
use crate::store::place;
use stasis_snapshot::commit::{Attempt, Backoff, HeadState, Outcome, Sent};
use std::sync::Arc;

/// Deletes a sandbox and waits until its tombstone is durable.
pub async fn delete(core: &Arc<Core>, sandbox: &Arc<Sandbox>) -> Result<(), Error> {
    let state = sandbox.state();
    if state == State::Deleted {
        return Err(Error::NotFound(sandbox.id.to_string()));
    }
    let guard = match sandbox.try_lock() {
        Some(guard) => guard,
        // An operation is under way, which a delete does not wait for.
        None if state.in_transition() => return Err(Error::State { id: sandbox.id.clone(), state, verb: "delete" }),
        // One begins, or has only its head left to write.
        None => sandbox.lock().await,
    };
    if sandbox.state() == State::Deleted {
        return Err(Error::NotFound(sandbox.id.to_string()));
    }
    delete_locked(core, sandbox, guard).await
}

/// The same for one that holds the lock.
pub(super) async fn delete_locked(
    core: &Arc<Core>,
    sandbox: &Arc<Sandbox>,
    guard: OperationGuard,
) -> Result<(), Error> {
    let (core, sandbox) = (core.clone(), sandbox.clone());
    detached(async move {
        let operation = core.journal.begin(&sandbox.id, OperationKind::Delete, core.sources.now_ms())?;
        let outcome = match core.registry.begin(&sandbox, Event::Delete, "delete") {
            Ok(_) => run(&core, &sandbox).await,
            Err(error) => Err(error),
        };
        let note = outcome.as_ref().err().map_or_else(|| "ok".to_owned(), Error::chain);
        core.journal.end(operation, &note, core.sources.now_ms())?;
        drop(guard);
        outcome
    })
    .await
}

async fn run(core: &Core, sandbox: &Sandbox) -> Result<(), Error> {
    let buried = core.bury(sandbox).await;
    // Whatever the store says: nobody wants this guest any more.
    core.end_vm(sandbox).await;
    let note = match buried {
        Ok(()) => None,
        Err(Error::Fenced { owner, epoch, .. }) => Some(format!(
            "supervisor {owner} has owned it since epoch {epoch}; here it is forgotten, nothing was deleted"
        )),
        Err(error) => return Err(error),
    };
    core.registry.record(sandbox, Event::Gone, note.as_deref(), |record| {
        record.commit = None;
        if note.is_some() {
            record.reason.clone_from(&note);
        }
    })?;
    Ok(())
}

/// Puts a deleted sandbox back, `paused` or `stopped` as it was at its last pause or stop, while the collector has not purged it. One that is not known here is looked
/// for in the bucket.
pub async fn undelete(core: &Arc<Core>, tenant: &str, id: &str) -> Result<Record, Error> {
    let id = SandboxId::parse(id).ok_or_else(|| Error::NotFound(id.to_owned()))?;
    let (core, tenant) = (core.clone(), tenant.to_owned());
    detached(async move {
        let _one_at_a_time = core.adoption.lock().await;
        let known = core.registry.get(&id);
        let is_anothers = known.as_ref().is_some_and(|known| known.tenant != tenant);
        if let Some(known) = known.filter(|known| !is_anothers && known.state() != State::Deleted) {
            return Err(Error::State { id, state: known.state(), verb: "undelete" });
        }
        let register = core.store.head_of(&place(&tenant, &id)?);
        let gone = || Error::NotFound(id.to_string());
        let current = register.read().await.doing("read the head")?.ok_or_else(gone)?;
        // Only now: an answer without a look into the bucket would tell that the id is somebody's.
        if is_anothers {
            return Err(gone());
        }
        let now = match (current.head.state, &current.head.manifest) {
            (HeadState::Deleted, None) => return Err(gone()),
            (HeadState::Deleted, Some(_)) => {
                let rest = catalogue::rest(&id, &current.head)?;
                let record = catalogue::record_at(&id, &current.head, rest)?;
                let state = if rest == State::Stopped { HeadState::Stopped } else { HeadState::Paused };
                let attempt = Attempt::undelete(&current, state, &core.owner, record, core.commit_id())
                    .map_err(|source| Error::Head { id: id.clone(), source })?;
                let mut pacer = Backoff::within(core.config.deadlines.settle());
                reach(Point::HeadSends);
                let outcome = register.commit(&attempt, Sent::Never, &mut pacer).await;
                reach(Point::HeadSettled);
                match outcome {
                    Outcome::Committed { now } => now,
                    Outcome::Superseded { by } | Outcome::Fenced { by } => {
                        // The collector or another undelete was faster: the head says which.
                        if by.head.state == HeadState::Deleted {
                            return Err(gone());
                        }
                        return Err(Error::Fenced { id, owner: by.head.owner, epoch: by.head.epoch });
                    }
                    Outcome::Refused { cause } => return Err(Error::Store { action: "put it back", source: cause }),
                    Outcome::Unknown { cause } => {
                        return Err(Error::Unknown { id, action: "undelete", source: cause });
                    }
                }
            }
            // Put back elsewhere, or by an earlier call whose answer was lost: known here only as deleted.
            (HeadState::Paused | HeadState::Stopped, Some(_)) => current,
            _ => return Err(Error::Fenced { id, owner: current.head.owner, epoch: current.head.epoch }),
        };
        Ok(catalogue::adopt(&core, &tenant, &id, now)?.record())
    })
    .await
}
