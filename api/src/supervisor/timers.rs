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

/// When something is next to be done about this sandbox, if ever.
fn due(record: &Record) -> Option<UnixMs> {
    match record.state {
        State::Running => record.deadline,
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
            let Some(at) = due(&sandbox.record()) else { continue };
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
    if due(&record).is_none_or(|at| at > core.sources.now_ms()) {
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
            assert_eq!(due(&record).is_some(), matches!(state, State::Running | State::Deleting), "{state}");
        }
        record.state = State::Running;
        record.deadline = None;
        assert_eq!(due(&record), None);
    }

    #[test]
    fn sleeps_are_bounded_both_ways() {
        assert_eq!(sleep_for(None, 0), Duration::from_secs(30));
        assert_eq!(sleep_for(Some(2_000), 0), Duration::from_secs(2));
        assert_eq!(sleep_for(Some(0), 1_000_000), Duration::from_millis(500));
        assert_eq!(sleep_for(Some(i64::MAX), 0), Duration::from_secs(30));
    }
}
