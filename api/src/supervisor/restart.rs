//! What a restarted supervisor does: each sandbox ends in a state of the table, or is reported lost with the reason.
//!
//! [`plan`] decides from three facts: the journaled state, whether its VMM lives, and whether a head PUT may have been sent. Which VMMs live
//! is read from their run directories, where each is written down before it runs, so that one that was started just before the kill is
//! found too.

use super::Core;
use super::delete::delete_locked;
use super::settle::{self, ReadyToCommit};
use crate::error::{Error, chain};
use crate::fail_points::{Point, reach};
use crate::journal::{Interrupted, OperationId, OperationKind};
use crate::registry::{OperationGuard, Sandbox};
use crate::states::{Event, State};
use crate::timing::Timing;
use crate::vmm_process::{Vmm, find_under};
use stasis_snapshot::commit::Attempt;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// What to do with one sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Nothing: it has no VM and needs none.
    Rest,
    /// Its VM runs on under us.
    Adopt,
    /// The pause sent nothing: its VM runs again.
    RunAgain,
    /// The pause may have committed: find out, then end its VM or let it run again.
    Settle,
    /// Its VM is gone: back to the last commit, or lost.
    Lose,
    /// It never became ready: end what there is of it.
    FailCreate,
    /// It did not become ready again: end its VM, it is stopped as before.
    FailStart,
    /// It was not handed over yet: end its VM, it is paused as before.
    FailResume,
    /// Go on deleting.
    Delete,
}

fn plan(state: State, stopped_before: bool, vmm_lives: bool, attempted: bool) -> Step {
    match (state, vmm_lives, attempted) {
        (State::Paused | State::Stopped | State::Deleted, ..) => Step::Rest,
        (State::Starting, ..) if stopped_before => Step::FailStart,
        (State::Starting, ..) => Step::FailCreate,
        (State::Unpausing, ..) => Step::FailResume,
        (State::Deleting, ..) => Step::Delete,
        (State::Snapshotting | State::Stopping, _, true) => Step::Settle,
        (State::Snapshotting | State::Stopping, true, false) => Step::RunAgain,
        (State::Running, true, _) => Step::Adopt,
        (State::Running | State::Snapshotting | State::Stopping, false, _) => Step::Lose,
    }
}

/// Adopts or settles everything that the journal knows, ends VMMs that belong to nobody, and fills an empty journal from the bucket.
pub(super) async fn run(core: &Arc<Core>) -> Result<(), Error> {
    let root = core.run_root();
    let local = |action: &str| {
        let action = action.to_owned();
        move |source| Error::Local { action, source }
    };
    std::fs::create_dir_all(&root).map_err(local("make the run directory"))?;
    let mut alive = HashMap::new();
    for (identity, dir) in find_under(&root).map_err(local("look for VMMs"))? {
        if let (Some(vm), Some(id)) = (Vmm::adopt(&identity, &dir, &core.launcher), dir.file_name()) {
            alive.insert(id.to_string_lossy().into_owned(), Arc::new(vm));
        }
    }
    let mut interrupted: HashMap<_, Vec<Interrupted>> = HashMap::new();
    for operation in core.journal.interrupted()? {
        interrupted.entry(operation.sandbox.clone()).or_default().push(operation);
    }
    core.renew_data_keys()?;
    let sandboxes = core.registry.all();
    if sandboxes.is_empty() {
        super::catalogue::recover_at_start(core).await;
    }
    for sandbox in sandboxes {
        let vm = alive.remove(sandbox.id.as_str());
        let operations = interrupted.remove(&sandbox.id).unwrap_or_default();
        let commits = |o: &&Interrupted| matches!(o.kind, OperationKind::Pause | OperationKind::Stop);
        let attempts = operations.iter().rev().find(commits).and_then(attempts_of);
        let stopped_before = sandbox.record().disks_only;
        let step = plan(sandbox.state(), stopped_before, vm.is_some(), attempts.is_some());
        if step != Step::Rest {
            tracing::info!(id = %sandbox.id, state = %sandbox.state(), vmm = vm.is_some(), ?step, "found again");
        }
        if let Some(vm) = vm {
            if step == Step::Rest {
                vm.end().await;
            } else {
                core.attach(&sandbox, &vm);
            }
        }
        execute(core, &sandbox, step, attempts, operations).await?;
    }
    for (id, vm) in alive {
        tracing::warn!(id, pid = vm.identity().pid, "a VMM that belongs to no sandbox is ended");
        vm.end().await;
    }
    sweep(core, &root);
    reach(Point::Swept);
    Ok(())
}

fn attempts_of(operation: &Interrupted) -> Option<ReadyToCommit> {
    let attempts: Vec<Attempt> = match serde_json::from_str(operation.proposal.as_deref()?) {
        Ok(attempts) => attempts,
        Err(error) => {
            tracing::error!(id = %operation.sandbox, %error, "the journaled attempts of a pause cannot be read");
            return None;
        }
    };
    let [attempt, cancel] = <[Attempt; 2]>::try_from(attempts).ok()?;
    Some(ReadyToCommit::again(attempt, cancel))
}

async fn execute(
    core: &Arc<Core>,
    sandbox: &Arc<Sandbox>,
    step: Step,
    attempts: Option<ReadyToCommit>,
    operations: Vec<Interrupted>,
) -> Result<(), Error> {
    // Nobody else runs yet but the watchers of VMMs, which wait for this lock.
    let guard = sandbox.lock().await;
    let reason = "the supervisor was restarted in the middle of it";
    match step {
        Step::Rest => {}
        Step::Adopt => {
            let_run(core, sandbox, &guard).await;
            tokio::spawn(core.clone().check_owner(sandbox.clone()));
        }
        Step::RunAgain => {
            settle::run_again(core, sandbox, reason, &guard).await;
            tokio::spawn(core.clone().check_owner(sandbox.clone()));
        }
        Step::Settle => {
            if let Some(mut ready) = attempts {
                // It may take as long as the store is away; the sandbox is `snapshotting` until then, and everything else is served.
                let (core, sandbox) = (core.clone(), sandbox.clone());
                tokio::spawn(async move {
                    let ids: Vec<OperationId> = operations.iter().map(|operation| operation.id).collect();
                    let timing = &mut Timing::default();
                    settle::finish(&core, &sandbox, &mut ready, &ids, None, timing, &guard).await;
                    end_operations(&core, &operations);
                });
                return Ok(());
            }
        }
        Step::Lose => core.lose(sandbox, &guard).await,
        Step::FailCreate => {
            core.end_vm(sandbox).await;
            core.registry
                .record(sandbox, Event::Failed, Some(reason), |record| record.reason = Some(reason.to_owned()))?;
            if let Err(error) = core.bury(sandbox).await {
                tracing::warn!(id = %sandbox.id, error = error.chain(), "a failed create may have left a head");
            }
        }
        Step::FailResume | Step::FailStart => {
            core.end_vm(sandbox).await;
            let event = if step == Step::FailStart { Event::StartFailed } else { Event::Failed };
            core.registry.record(sandbox, event, Some(reason), |record| record.reason = Some(reason.to_owned()))?;
            core.lay_to_rest(sandbox).await;
        }
        Step::Delete => {
            let (core, sandbox) = (core.clone(), sandbox.clone());
            tokio::spawn(async move {
                if let Err(error) = delete_locked(&core, &sandbox, guard).await {
                    tracing::warn!(id = %sandbox.id, error = error.chain(), "a delete failed and is tried again");
                }
            });
        }
    }
    end_operations(core, &operations);
    Ok(())
}

fn end_operations(core: &Core, operations: &[Interrupted]) {
    for operation in operations {
        if let Err(error) =
            core.journal.end(operation.id, "interrupted; settled after a restart", core.sources.now_ms())
        {
            tracing::error!(error = chain(&error), "cannot note the end of an operation");
        }
    }
}

/// An adopted VM runs, whatever an interrupted request left it in.
async fn let_run(core: &Core, sandbox: &Sandbox, guard: &OperationGuard) {
    let Some(vm) = sandbox.vm() else { return };
    let identity = vm.identity().clone();
    let noted = core.registry.amend(sandbox, |record| record.vmm = Some(identity));
    if let Err(error) = noted {
        tracing::error!(id = %sandbox.id, error = error.chain(), "cannot note an adopted VMM");
    }
    if let Err(error) = core.unpark(sandbox, &vm).await {
        tracing::error!(id = %sandbox.id, error = error.chain(), "an adopted VM does not answer");
        core.lose(sandbox, guard).await;
    }
}

/// Removes run directories without a VMM.
fn sweep(core: &Core, root: &Path) {
    let Ok(entries) = std::fs::read_dir(root) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let used = core.registry.all().iter().any(|s| s.id.as_str() == name && s.vm().is_some());
        if !used && let Err(error) = std::fs::remove_dir_all(entry.path()) {
            tracing::warn!(%error, name, "cannot remove a stray run directory");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_has_a_step_and_none_is_stuck() {
        for state in State::ALL {
            for (lives, attempted) in [(false, false), (false, true), (true, false), (true, true)] {
                let step = plan(state, false, lives, attempted);
                assert_eq!(step == Step::Rest, !state.in_transition() && state != State::Running, "{state}");
            }
        }
    }

    #[test]
    fn a_guest_runs_again_only_when_nothing_can_have_been_sent() {
        for state in [State::Snapshotting, State::Stopping] {
            assert_eq!(plan(state, false, true, false), Step::RunAgain);
            assert_eq!(plan(state, false, true, true), Step::Settle);
            assert_eq!(plan(state, false, false, true), Step::Settle);
            assert_eq!(plan(state, false, false, false), Step::Lose);
        }
    }

    #[test]
    fn running_ones_are_adopted_or_lost() {
        assert_eq!(plan(State::Running, false, true, false), Step::Adopt);
        assert_eq!(plan(State::Running, false, false, false), Step::Lose);
        // A pause that was settled as failed may have left its attempts open; the state says that the guest runs.
        assert_eq!(plan(State::Running, false, true, true), Step::Adopt);
    }

    #[test]
    fn a_start_that_was_interrupted_leaves_what_was_stopped() {
        for lives in [false, true] {
            assert_eq!(plan(State::Starting, true, lives, false), Step::FailStart);
            assert_eq!(plan(State::Starting, false, lives, false), Step::FailCreate);
        }
    }
}
