//! A plain model of sandboxes, and what random requests, crashes and faults may make of them: the state table of the design as a test that
//! knows nothing of how the supervisor does it.
//!
//! | module | what |
//! | --- | --- |
//! | `steps` | what may be done, as data that is drawn, shrunk and printed |
//! | `run` | does the steps to a real service and looks at everything after each |
//! | here | what one sandbox may be and answer: pure functions |

pub mod run;
pub mod steps;

use stasis_api::states::{Event, State};

use steps::Ask;

/// What a request to a sandbox that nothing disturbs is answered, and the state afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// The status. `None` where the app in the guest decides, which pulse does not have.
    pub status: Option<u16>,
    /// The state afterwards.
    pub state: State,
}

/// What the design says of `ask` in the resting `state`. `committed`: what a deleted one may be put back as. One that never had a commit
/// cannot be put back; how that is refused depends on whether its tombstone could be written.
pub fn expected(state: State, committed: Option<State>, ask: Ask) -> Expected {
    let says = |status, state| Expected { status: Some(status), state };
    match (state, ask) {
        (_, Ask::Get) => says(200, state),
        (State::Running, Ask::Pause) => says(201, State::Paused),
        (State::Running, Ask::Stop) => says(200, State::Stopped),
        (State::Running, Ask::Snapshot) => says(201, State::Running),
        (State::Running | State::Paused, Ask::Invoke) => Expected { status: None, state: State::Running },
        (State::Paused, Ask::Resume) | (State::Stopped, Ask::Start) => says(200, State::Running),
        (State::Running | State::Paused | State::Stopped, Ask::Delete) => says(204, State::Deleted),
        (State::Deleted, Ask::Delete | Ask::Invoke) => says(404, State::Deleted),
        (State::Deleted, Ask::Undelete) => match committed {
            Some(rest) => says(200, rest),
            None => Expected { status: None, state: State::Deleted },
        },
        _ => says(409, state),
    }
}

/// What moves a sandbox may have made and what was answered, counted from its beginning.
#[derive(Clone, Debug, Default)]
pub struct Count {
    asked: [usize; Ask::ALL.len()],
    succeeded: [usize; Ask::ALL.len()],
}

fn place(ask: Ask) -> usize {
    Ask::ALL.iter().position(|other| *other == ask).unwrap_or_default()
}

impl Count {
    /// A request was sent.
    pub fn asked(&mut self, ask: Ask) {
        self.asked[place(ask)] += 1;
    }

    /// And answered with success.
    pub fn succeeded(&mut self, ask: Ask) {
        self.succeeded[place(ask)] += 1;
    }

    /// Why these moves do not explain these answers, or have no request behind them. `timed`: its life may end by itself.
    pub fn contradiction(&self, moves: &[(Event, State)], timed: bool) -> Option<String> {
        let made = |event| moves.iter().filter(|(made, _)| *made == event).count();
        let asked = |ask| self.asked[place(ask)];
        // A request to the app that waits is not lost when a pause comes before its connection: it wakes the sandbox once more.
        let put_to_sleep_again = if asked(Ask::Invoke) > 0 { made(Event::Committed) } else { 0 };
        // Each begins only when it was asked for.
        for (event, limit) in [
            (Event::Pause, if timed { usize::MAX } else { asked(Ask::Pause) }),
            (Event::Snapshot, asked(Ask::Snapshot)),
            (Event::Resume, asked(Ask::Resume) + asked(Ask::Invoke) + put_to_sleep_again),
            (Event::Stop, asked(Ask::Stop)),
            (Event::Start, asked(Ask::Start)),
        ] {
            if made(event) > limit {
                return Some(format!("{} times {event:?}, asked for {limit} times", made(event)));
            }
        }
        let deletions = made(Event::Delete);
        // A restarted supervisor goes on with a delete, and so do the timers; without any request there is none.
        if deletions > 0 && asked(Ask::Delete) == 0 && !timed {
            return Some("it was deleted, and nobody asked".to_owned());
        }
        // Each success has an end of its own.
        for (ask, event) in [
            (Ask::Pause, Event::Committed),
            (Ask::Snapshot, Event::Captured),
            (Ask::Stop, Event::Stored),
            (Ask::Delete, Event::Gone),
        ] {
            let answered = self.succeeded[place(ask)];
            if answered > made(event) {
                return Some(format!(
                    "{answered} times {ask:?} was answered, and {} times there was {event:?}",
                    made(event)
                ));
            }
        }
        let found = made(Event::FoundPaused) + made(Event::FoundStopped);
        if self.succeeded[place(Ask::Undelete)] > found {
            return Some("an undelete was answered and not done".to_owned());
        }
        None
    }
}

/// The state that the last pause or stop led to: where a sandbox is back when its guest is lost.
pub fn last_commit(moves: &[(Event, State)]) -> Option<State> {
    moves.iter().rev().find_map(|(event, to)| match event {
        Event::Committed | Event::Stored | Event::FoundPaused | Event::FoundStopped => Some(*to),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use stasis_api::states::next;

    /// The model and the table are written apart, and agree: what succeeds leads along legal moves, what is refused has none.
    #[test]
    fn the_model_agrees_with_the_state_table() {
        let ways = [
            (Ask::Pause, vec![Event::Pause, Event::Committed]),
            (Ask::Resume, vec![Event::Resume, Event::Ready]),
            (Ask::Stop, vec![Event::Stop, Event::Stored]),
            (Ask::Start, vec![Event::Start, Event::Ready]),
            (Ask::Snapshot, vec![Event::Snapshot, Event::Captured]),
            (Ask::Delete, vec![Event::Delete, Event::Gone]),
        ];
        for state in [State::Running, State::Paused, State::Stopped, State::Deleted] {
            for (ask, events) in &ways {
                let end = events.iter().try_fold(state, |at, event| next(Some(at), *event));
                let said = expected(state, None, *ask);
                let succeeds = said.status.is_some_and(|status| status < 300);
                assert_eq!(end.is_some(), succeeds, "{state} {ask:?}");
                assert_eq!(said.state, end.unwrap_or(state), "{state} {ask:?}");
            }
        }
    }

    #[test]
    fn an_answer_without_a_move_and_a_move_without_a_request_are_contradictions() {
        let mut count = Count::default();
        let paused =
            [(Event::Create, State::Starting), (Event::Ready, State::Running), (Event::Pause, State::Snapshotting)];
        assert!(count.contradiction(&paused, false).is_some());
        assert!(count.contradiction(&paused, true).is_none());
        count.asked(Ask::Pause);
        assert!(count.contradiction(&paused, false).is_none());
        count.succeeded(Ask::Pause);
        assert!(count.contradiction(&paused, false).is_some());
        let wakes = [
            (Event::Resume, State::Unpausing),
            (Event::Ready, State::Running),
            (Event::Pause, State::Snapshotting),
            (Event::Committed, State::Paused),
            (Event::Resume, State::Unpausing),
        ];
        let mut count = Count::default();
        count.asked(Ask::Pause);
        count.asked(Ask::Resume);
        assert!(count.contradiction(&wakes, false).is_some(), "a second wake, and no request for it");
        let mut count = Count::default();
        count.asked(Ask::Pause);
        count.asked(Ask::Invoke);
        assert!(count.contradiction(&wakes, false).is_none(), "a pause came before its connection");
        let deleted = [(Event::Delete, State::Deleting), (Event::Gone, State::Deleted)];
        assert!(Count::default().contradiction(&deleted, false).is_some());
        assert!(Count::default().contradiction(&deleted, true).is_none());
    }
}
