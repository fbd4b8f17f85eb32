//! Delete: the tombstone first, then everything it made unreachable. A delete that fails stays `deleting` and is asked for again, by a
//! client or by the timers.

use super::{Core, detached};
use crate::error::Error;
use crate::journal::OperationKind;
use crate::registry::{OperationGuard, Sandbox};
use crate::states::{Event, State};
use crate::store::place;
use std::sync::Arc;

/// Deletes a sandbox and waits until nothing of it is left.
pub async fn delete(core: &Arc<Core>, sandbox: &Arc<Sandbox>) -> Result<(), Error> {
    let state = sandbox.state();
    if state == State::Deleted {
        return Err(Error::NotFound(sandbox.id.to_string()));
    }
    // Somebody holds the lock: whatever it is in is a transition, which delete does not wait for.
    let guard = sandbox.try_lock().ok_or_else(|| Error::State { id: sandbox.id.clone(), state, verb: "delete" })?;
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
        Ok(()) => {
            let place = place(&sandbox.tenant, &sandbox.id)?;
            let head = place.head();
            core.store.delete_below(place.prefix(), |key| key != head).await?;
            None
        }
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
