//! The ends of lives: at its deadline a running sandbox is paused or deleted. Also asks again for deletes that failed. One task.

use super::Core;
use super::delete::delete_locked;
use super::pause::pause_locked;
use crate::record::Record;
use crate::registry::Sandbox;
use crate::sources::UnixMs;
use crate::states::State;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// After a delete that failed.
const RETRY_DELETE_MS: i64 = 30_000;
/// The clock may be set while we sleep.
const LONGEST_SLEEP_MS: i64 = 30_000;
/// An overdue sandbox whose lock is taken is looked at again this much later.
const BUSY_MS: i64 = 500;

/// When the present life is over. One that is paused then lives on while it is used: its time counts from the last request that reached it.
/// One that is deleted then does not.
pub(super) fn end_of_life(record: &Record, last_request: UnixMs) -> Option<UnixMs> {
    let deadline = record.deadline?;
    let used = last_request.saturating_add(i64::from(record.spec.timeout_s) * 1000);
    Some(if record.spec.auto_pause { deadline.max(used) } else { deadline })
}

/// When something is next to be done about this sandbox, if ever.
fn due(record: &Record, last_request: UnixMs) -> Option<UnixMs> {
    match record.state {
        State::Running => end_of_life(record, last_request),
        State::Deleting => Some(record.state_changed_at + RETRY_DELETE_MS),
        State::Starting
        | State::Snapshotting
        | State::Paused
        | State::Unpausing
        | State::Stopping
        | State::Stopped
        | State::Deleted => None,
    }
}

/// How long to sleep when the earliest thing is due at `next`.
fn sleep_for(next: Option<UnixMs>, now: UnixMs) -> Duration {
    let ms = next.map_or(LONGEST_SLEEP_MS, |at| (at - now).clamp(BUSY_MS, LONGEST_SLEEP_MS));
    Duration::from_millis(u64::try_from(ms).unwrap_or(0))
}

/// Runs until `stop`.
pub(super) async fn run(core: Arc<Core>, stop: CancellationToken) {
    loop {
        let now = core.sources.now_ms();
        let mut next: Option<UnixMs> = None;
        for sandbox in core.registry.all() {
            let Some(at) = due(&sandbox.record(), sandbox.last_request()) else { continue };
            if at <= now {
                tokio::spawn(expire(core.clone(), sandbox));
            }
            next = Some(next.map_or(at, |earliest| earliest.min(at)));
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = core.registry.deadline_change() => {}
            () = tokio::time::sleep(sleep_for(next, now)) => {}
        }
    }
}

async fn expire(core: Arc<Core>, sandbox: Arc<Sandbox>) {
    // Somebody works on it: the end of that changes the deadline, or it is looked at again.
    let Some(guard) = sandbox.try_lock() else { return };
    let record = sandbox.record();
    if due(&record, sandbox.last_request()).is_none_or(|at| at > core.sources.now_ms()) {
        return;
    }
    // A request is on its way or being answered: the end of it puts the end of life off.
    if record.spec.auto_pause && record.state == State::Running && sandbox.visits() > 0 {
        return;
    }
    let id = sandbox.id.clone();
    if record.state == State::Running && record.spec.auto_pause {
        tracing::info!(%id, "its time is over: auto-pause");
        if let Err(error) = pause_locked(&core, &sandbox, guard).await {
            tracing::warn!(%id, error = error.chain(), "an auto-pause failed and is tried again");
            let retry = i64::try_from(core.config.deadlines.pause_retry_ms).unwrap_or(i64::MAX);
            let again = core.sources.now_ms().saturating_add(retry);
            let amended = core.registry.amend(&sandbox, |record| {
                // While an outcome is not known yet, it is still `snapshotting`: its life ends when the guest runs again.
                if record.deadline.is_some() {
                    record.deadline = Some(again);
                }
            });
            if let Err(error) = amended {
                tracing::error!(%id, error = error.chain(), "cannot set a new deadline");
            }
        }
    } else {
        tracing::info!(%id, state = %record.state, "its time is over: delete");
        if record.state == State::Running {
            let why = format!("its {} s were over, and it has no auto_pause", record.spec.timeout_s);
            if let Err(error) = core.registry.amend(&sandbox, |record| record.reason = Some(why)) {
                tracing::warn!(%id, error = error.chain(), "cannot note why it ends");
            }
        }
        if let Err(error) = delete_locked(&core, &sandbox, guard).await {
            tracing::warn!(%id, error = error.chain(), "a delete failed and is tried again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::tests_support::sample;

    #[test]
    fn only_running_and_deleting_ones_are_ever_due() {
        let mut record = sample("sbx-a");
        record.deadline = Some(5);
        for state in State::ALL {
            record.state = state;
            assert_eq!(due(&record, 0).is_some(), matches!(state, State::Running | State::Deleting), "{state}");
        }
        record.state = State::Running;
        record.deadline = None;
        assert_eq!(due(&record, 0), None);
    }

    #[test]
    fn requests_put_an_auto_pause_off_and_a_delete_not() {
        let mut record = sample("sbx-a");
        (record.state, record.deadline) = (State::Running, Some(300_000));
        record.spec.timeout_s = 300;
        assert_eq!(due(&record, 200_000), Some(300_000));
        record.spec.auto_pause = true;
        assert_eq!(due(&record, 0), Some(300_000));
        assert_eq!(due(&record, 200_000), Some(500_000));
        // After a failed auto-pause the next try may come later than that.
        record.deadline = Some(600_000);
        assert_eq!(due(&record, 200_000), Some(600_000));
    }

    #[test]
    fn sleeps_are_bounded_both_ways() {
        assert_eq!(sleep_for(None, 0), Duration::from_secs(30));
        assert_eq!(sleep_for(Some(2_000), 0), Duration::from_secs(2));
        assert_eq!(sleep_for(Some(0), 1_000_000), Duration::from_millis(500));
        assert_eq!(sleep_for(Some(i64::MAX), 0), Duration::from_secs(30));
    }
}
