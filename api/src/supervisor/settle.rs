//! The end of a pause: the head PUT, its outcome settled, and what may then be done with the guest (design §5, invariants 2 and 3).

use super::Core;
use super::machine::close_memory;
use crate::error::{Error, chain};
use crate::fail_points::{Point, reach};
use crate::journal::OperationId;
use crate::kept_memory::Kept;
use crate::known_packs::KnownPacks;
use crate::record::Record;
use crate::registry::{OperationGuard, Sandbox};
use crate::states::{Event, State};
use crate::timing::Timing;
use stasis_snapshot::commit::{Attempt, Backoff, Cancelled, Current, HeadState, PauseEnd, Sent};
use stasis_snapshot::store::{ErrorKind, Operation, StoreError};
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// Between two rounds of settling an unknown outcome.
const ROUND: Duration = Duration::from_secs(2);

/// What the client of a pause is told.
pub(super) type Answer = Result<(Record, Timing), Error>;

pub(super) fn answer(tell: oneshot::Sender<Answer>, outcome: Answer) {
    if tell.send(outcome).is_err() {
        tracing::debug!("the client of a pause has hung up");
    }
}

/// Everything that the head PUT needs, made and durable.
pub(super) struct ReadyToCommit {
    pub(super) attempt: Attempt,
    pub(super) cancel: Attempt,
    pub(super) sent: Sent,
    /// Objects of the generation that the manifest does not name.
    pub(super) leftovers: Vec<String>,
    /// Packs that were granted and not written.
    pub(super) unwritten: Vec<String>,
    /// What the manifest names.
    pub(super) known: Option<Arc<KnownPacks>>,
    /// The VMM's notes on its memory file, and the manifest they belong to.
    pub(super) notes: Option<(File, File)>,
}

impl ReadyToCommit {
    /// The journaled attempts of an interrupted pause.
    pub(super) fn again(attempt: Attempt, cancel: Attempt) -> Self {
        Self {
            attempt,
            cancel,
            sent: Sent::Maybe,
            leftovers: Vec::new(),
            unwritten: Vec::new(),
            known: None,
            notes: None,
        }
    }
}

/// From the first head PUT to the end. The client is told once, at the latest when the outcome is unknown for the first time; then the sender
/// is spent and `None` comes back. `operations` are those whose proposals it settles.
pub(super) async fn finish(
    core: &Arc<Core>,
    sandbox: &Sandbox,
    ready: &mut ReadyToCommit,
    operations: &[OperationId],
    mut tell: Option<oneshot::Sender<Answer>>,
    timing: &mut Timing,
    guard: &OperationGuard,
) -> Option<(oneshot::Sender<Answer>, Result<Record, Error>)> {
    let begun = Instant::now();
    let mut settled = settle(core, sandbox, ready).await;
    loop {
        let outcome = match settled {
            Settled::Paused(now) => {
                timing.since("head", begun);
                let begun = Instant::now();
                free(core, sandbox, ready);
                timing.since("free", begun);
                committed(core, sandbox, &now)
            }
            Settled::RunAgain(error) => {
                // First: a restart would send what it finds again, and by then the guest has gone on.
                for operation in operations {
                    if let Err(error) = core.journal.withdraw(*operation) {
                        tracing::error!(id = %sandbox.id, error = chain(&error), "cannot withdraw the proposals of a pause");
                    }
                }
                run_again(core, sandbox, &error.chain(), guard).await;
                Err(error)
            }
            Settled::Fenced(error) => core.give_way(sandbox, &error, guard).await.and(Err(error)),
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

/// Ends the VM of a commit that has won, and keeps its memory where that is wanted.
fn free(core: &Arc<Core>, sandbox: &Sandbox, ready: &mut ReadyToCommit) {
    let memory = sandbox.vm().and_then(|vm| vm.take_memory());
    // It stands still, and its state is in the store.
    if let Some(vm) = sandbox.vm() {
        vm.let_go();
        reach(Point::VmmLetGo);
        core.disconnect(sandbox, &vm);
        sandbox.set_vm(None);
    }
    if let Some(known) = &ready.known {
        core.sign_ahead(known);
    }
    sandbox.set_known_packs(ready.known.clone());
    let digest = ready.attempt.head().manifest.as_ref().map(|manifest| manifest.digest);
    match (memory, ready.notes.take(), ready.known.clone(), digest) {
        (Some(memory), Some((notes, manifest)), Some(known), Some(digest)) => {
            core.kept.put(&sandbox.id, digest, Kept { memory, notes, manifest, known });
        }
        (memory, ..) => close_memory(memory),
    }
    core.clean_up(ready.leftovers.clone(), ready.unwritten.clone());
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
    reach(Point::HeadSends);
    let end = register.end_pause(&ready.attempt, &ready.cancel, ready.sent, &mut commit, &mut cancel).await;
    reach(Point::HeadSettled);
    match end {
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
    let cancelled_now = register.cancel(&ready.attempt, &ready.cancel, &mut pacer).await;
    reach(Point::HeadSettled);
    match cancelled_now {
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

/// The commit has won: `paused` or `stopped`, whatever the journal says.
pub(super) fn committed(core: &Core, sandbox: &Sandbox, now: &Current) -> Result<Record, Error> {
    sandbox.set_head(Some(now.clone()));
    let disks_only = now.head.state == HeadState::Stopped;
    let event = if disks_only { Event::Stored } else { Event::Committed };
    core.registry.record(sandbox, event, None, |record| {
        record.commit.clone_from(&now.head.manifest);
        record.disks_only = disks_only;
        (record.epoch, record.seq) = (now.head.epoch, now.head.seq);
        (record.reason, record.vmm) = (None, None);
    })
}

/// A pause that sent no head has failed: the guest goes on, unless the sandbox is somebody else's by now.
pub(super) async fn abandon(core: &Core, sandbox: &Sandbox, error: &Error, guard: &OperationGuard) {
    if !matches!(error, Error::Fenced { .. }) {
        return run_again(core, sandbox, &error.chain(), guard).await;
    }
    if let Err(error) = core.give_way(sandbox, error, guard).await {
        tracing::error!(id = %sandbox.id, error = error.chain(), "after a take-over");
    }
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
    let what = if sandbox.state() == State::Stopping { "stop" } else { "pause" };
    let note = format!("the {what} failed, the guest goes on: {why}");
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
