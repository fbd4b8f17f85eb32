//! The state machine of a sandbox, as data. [`TABLE`] is the whole of it; [`next`] is the only reader, and `registry` the only caller that moves.
//!
//! ```text
//!            ready            pause              committed
//! starting ────────▶ running ───────▶ snapshotting ──────────▶ paused ──resume──▶ unpausing ──ready──▶ running
//!     │ failed          │ ▲                │ failed, cancelled      ▲                 │ failed
//!     ▼                 │ └────────────────┘                        └─────────────────┘
//!  deleted ◀──gone── deleting ◀──delete── running, paused, stopped, deleting
//!
//! running ──stop──▶ stopping ──stored──▶ stopped ──start──▶ starting ──ready──▶ running
//! ```

use serde::{Deserialize, Serialize};
use std::fmt;

/// What a sandbox is doing, in the words of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(rename = "SandboxState")]
pub enum State {
    /// Its VM boots.
    Starting,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs are parked and its state is being stored.
    Snapshotting,
    /// No VM; its commit is in the bucket.
    Paused,
    /// A VM is being made from its commit.
    Unpausing,
    /// Its disk is being stored, its memory dropped.
    Stopping,
    /// No VM; its disk is in the bucket.
    Stopped,
    /// Its VM and its objects are being removed.
    Deleting,
    /// Gone for ever; the record says why.
    Deleted,
}

/// What happens to a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// Asked for.
    Create,
    /// The guest is ready for requests.
    Ready,
    /// Pause or auto-pause.
    Pause,
    /// The pause's head is proven committed.
    Committed,
    /// A named snapshot.
    Snapshot,
    /// The named snapshot is proven committed.
    Captured,
    /// Resume, invoke, any tool request.
    Resume,
    /// Stop.
    Stop,
    /// The stop's head is proven committed.
    Stored,
    /// Start of a stopped one.
    Start,
    /// A start of a stopped one failed.
    StartFailed,
    /// The operation of a transition state failed, was cancelled or timed out, and that is proven.
    Failed,
    /// The VM died and a commit exists.
    LostCommitted,
    /// The VM died and the last commit is a stop's.
    LostStored,
    /// The VM died and nothing was ever committed.
    Lost,
    /// Its head says that it was paused: by another supervisor, or before it was deleted.
    FoundPaused,
    /// Its head says that it was stopped: likewise.
    FoundStopped,
    /// Delete.
    Delete,
    /// Nothing is left.
    Gone,
}

impl Event {
    /// All of them.
    pub const ALL: [Self; 19] = [
        Self::Create,
        Self::Ready,
        Self::Pause,
        Self::Committed,
        Self::Snapshot,
        Self::Captured,
        Self::Resume,
        Self::Stop,
        Self::Stored,
        Self::Start,
        Self::StartFailed,
        Self::Failed,
        Self::LostCommitted,
        Self::LostStored,
        Self::Lost,
        Self::FoundPaused,
        Self::FoundStopped,
        Self::Delete,
        Self::Gone,
    ];

    /// The journal's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Ready => "ready",
            Self::Pause => "pause",
            Self::Committed => "committed",
            Self::Snapshot => "snapshot",
            Self::Captured => "captured",
            Self::Resume => "resume",
            Self::Stop => "stop",
            Self::Stored => "stored",
            Self::Start => "start",
            Self::StartFailed => "start_failed",
            Self::Failed => "failed",
            Self::LostCommitted => "lost_committed",
            Self::LostStored => "lost_stored",
            Self::Lost => "lost",
            Self::FoundPaused => "found_paused",
            Self::FoundStopped => "found_stopped",
            Self::Delete => "delete",
            Self::Gone => "gone",
        }
    }

    /// Reads the journal's word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|event| event.as_str() == word)
    }
}

/// One row: in `from`, `event` leads to `to`. `from` is `None` for what does not exist yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Before.
    pub from: Option<State>,
    /// What happens.
    pub event: Event,
    /// After.
    pub to: State,
}

const fn row(from: State, event: Event, to: State) -> Row {
    Row { from: Some(from), event, to }
}

/// Every legal move. What is not here is refused.
pub const TABLE: &[Row] = &[
    Row { from: None, event: Event::Create, to: State::Starting },
    row(State::Starting, Event::Ready, State::Running),
    row(State::Starting, Event::Failed, State::Deleted),
    row(State::Starting, Event::StartFailed, State::Stopped),
    row(State::Running, Event::Pause, State::Snapshotting),
    row(State::Snapshotting, Event::Committed, State::Paused),
    row(State::Snapshotting, Event::Failed, State::Running),
    row(State::Running, Event::Snapshot, State::Snapshotting),
    row(State::Snapshotting, Event::Captured, State::Running),
    row(State::Paused, Event::Resume, State::Unpausing),
    row(State::Unpausing, Event::Ready, State::Running),
    row(State::Unpausing, Event::Failed, State::Paused),
    row(State::Running, Event::Stop, State::Stopping),
    row(State::Stopping, Event::Stored, State::Stopped),
    row(State::Stopping, Event::Failed, State::Running),
    row(State::Stopped, Event::Start, State::Starting),
    row(State::Running, Event::Delete, State::Deleting),
    row(State::Paused, Event::Delete, State::Deleting),
    row(State::Stopped, Event::Delete, State::Deleting),
    // A delete that failed stays where it is, and is asked for again.
    row(State::Deleting, Event::Delete, State::Deleting),
    row(State::Deleting, Event::Gone, State::Deleted),
    // A VM may die at any time that it exists.
    row(State::Running, Event::LostCommitted, State::Paused),
    row(State::Running, Event::LostStored, State::Stopped),
    row(State::Running, Event::Lost, State::Deleted),
    row(State::Snapshotting, Event::LostCommitted, State::Paused),
    row(State::Snapshotting, Event::LostStored, State::Stopped),
    row(State::Snapshotting, Event::Lost, State::Deleted),
    row(State::Stopping, Event::LostCommitted, State::Paused),
    row(State::Stopping, Event::LostStored, State::Stopped),
    row(State::Stopping, Event::Lost, State::Deleted),
    // Supervisors share a bucket: what rests there may be unknown here, deleted, or have run elsewhere since.
    Row { from: None, event: Event::FoundPaused, to: State::Paused },
    Row { from: None, event: Event::FoundStopped, to: State::Stopped },
    row(State::Deleted, Event::FoundPaused, State::Paused),
    row(State::Deleted, Event::FoundStopped, State::Stopped),
    row(State::Stopped, Event::FoundPaused, State::Paused),
    row(State::Paused, Event::FoundStopped, State::Stopped),
];

/// Where `event` leads from `from`; `None` when the table forbids it.
pub fn next(from: Option<State>, event: Event) -> Option<State> {
    TABLE.iter().find(|row| row.from == from && row.event == event).map(|row| row.to)
}

impl State {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Starting,
        Self::Running,
        Self::Snapshotting,
        Self::Paused,
        Self::Unpausing,
        Self::Stopping,
        Self::Stopped,
        Self::Deleting,
        Self::Deleted,
    ];

    /// The API's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Snapshotting => "snapshotting",
            Self::Paused => "paused",
            Self::Unpausing => "unpausing",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Deleting => "deleting",
            Self::Deleted => "deleted",
        }
    }

    /// Reads the API's word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == word)
    }

    /// An operation is under way, whose end leads out of this state.
    pub fn in_transition(self) -> bool {
        matches!(self, Self::Starting | Self::Snapshotting | Self::Unpausing | Self::Stopping | Self::Deleting)
    }

    /// A request that needs `running` waits for the end of this state instead of being refused (design §7).
    pub fn leads_to_running(self) -> bool {
        matches!(self, Self::Starting | Self::Unpausing)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EVENTS: [Event; 19] = Event::ALL;

    #[test]
    fn no_pair_of_state_and_event_has_two_rows() {
        for (i, a) in TABLE.iter().enumerate() {
            assert!(!TABLE[i + 1..].iter().any(|b| a.from == b.from && a.event == b.event), "{a:?}");
        }
    }

    #[test]
    fn requests_are_legal_exactly_where_the_design_says() {
        let from = |event| State::ALL.into_iter().filter(|s| next(Some(*s), event).is_some()).collect::<Vec<_>>();
        assert_eq!(from(Event::Pause), [State::Running]);
        assert_eq!(from(Event::Resume), [State::Paused]);
        assert_eq!(from(Event::Stop), [State::Running]);
        assert_eq!(from(Event::Start), [State::Stopped]);
        assert_eq!(from(Event::Delete), [State::Running, State::Paused, State::Stopped, State::Deleting]);
        assert_eq!(from(Event::Create), []);
    }

    #[test]
    fn every_transition_state_can_end_well_and_badly() {
        for state in State::ALL.into_iter().filter(|s| s.in_transition() && *s != State::Deleting) {
            let ends = TABLE.iter().filter(|row| row.from == Some(state)).map(|row| row.to).collect::<Vec<_>>();
            assert!(ends.iter().any(|to| !to.in_transition()), "{state} never ends");
            assert!(next(Some(state), Event::Failed).is_some(), "{state} cannot fail");
        }
    }

    #[test]
    fn only_what_the_bucket_still_has_leaves_deleted() {
        let leaves = EVENTS.into_iter().filter(|event| next(Some(State::Deleted), *event).is_some());
        assert_eq!(leaves.collect::<Vec<_>>(), [Event::FoundPaused, Event::FoundStopped]);
    }

    #[test]
    fn words_read_back() {
        for state in State::ALL {
            assert_eq!(State::parse(state.as_str()), Some(state));
        }
        assert_eq!(State::parse("creating"), None);
        for event in Event::ALL {
            assert_eq!(Event::parse(event.as_str()), Some(event));
        }
    }

    proptest! {
        /// Whatever happens in whatever order: `paused` is only entered with a whole commit, `stopped` only with one of disks alone.
        #[test]
        fn rest_means_committed(events in prop::collection::vec(0..EVENTS.len(), 0..200)) {
            let mut state = next(None, Event::Create);
            let mut commit = None;
            for event in events.into_iter().map(|i| EVENTS[i]) {
                // The caller's part of the contract: it reports a loss, and the failure of a first boot or a later one, as what it is.
                let honest = match event {
                    Event::LostCommitted => commit == Some(State::Paused),
                    Event::LostStored | Event::StartFailed => commit == Some(State::Stopped),
                    Event::Lost => commit.is_none(),
                    Event::Failed if state == Some(State::Starting) => commit.is_none(),
                    _ => true,
                };
                let Some(to) = next(state, event).filter(|_| honest) else { continue };
                match event {
                    Event::Committed | Event::FoundPaused => commit = Some(State::Paused),
                    Event::Stored | Event::FoundStopped => commit = Some(State::Stopped),
                    _ => {}
                }
                if matches!(to, State::Paused | State::Stopped) {
                    prop_assert_eq!(commit, Some(to));
                }
                if state == Some(State::Deleted) {
                    prop_assert!(matches!(to, State::Paused | State::Stopped), "left deleted for {to}");
                }
                state = Some(to);
            }
        }
    }
}
