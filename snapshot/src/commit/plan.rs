//! What to write next: pure functions from the current head to an [`Attempt`]. Ids come from the caller.

use serde::{Deserialize, Serialize};

use super::head::{Current, Head, HeadError, HeadState, MAX_ANCESTORS, Rule, validate};
use crate::{ids::CommitId, manifest::ManifestRef, store::ETag};

/// What the head must be for an attempt to be applied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Expected {
    /// There is none.
    Absent,
    /// The one with this tag.
    Match(ETag),
}

/// One commit, fixed before it is first sent. Serialise it into the journal before sending.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Journaled", into = "Journaled")]
pub struct Attempt {
    pub(super) expected: Expected,
    pub(super) head: Head,
    pub(super) body: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Journaled {
    expected: Expected,
    body: String,
}

/// What an owner changes within its epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The new state.
    pub state: HeadState,
    /// The new manifest; `None` keeps the current one.
    pub manifest: Option<ManifestRef>,
    /// The new record.
    pub record: serde_json::Value,
}

impl Attempt {
    /// The first head of a sandbox, in epoch 1.
    pub fn first(sandbox: &str, owner: &str, change: Change, commit: CommitId) -> Result<Self, HeadError> {
        let head = Head {
            format: Head::format(),
            sandbox: sandbox.to_owned(),
            state: change.state,
            epoch: 1,
            owner: owner.to_owned(),
            seq: 1,
            commit,
            parent: None,
            ancestors: Vec::new(),
            manifest: change.manifest,
            record: change.record,
        };
        Self::checked(head, None)
    }

    /// The next head within the epoch: a pause, a stop, a new record.
    pub fn next(current: &Current, change: Change, commit: CommitId) -> Result<Self, HeadError> {
        let head = Head {
            state: change.state,
            manifest: change.manifest.or_else(|| current.head.manifest.clone()),
            record: change.record,
            ..successor(&current.head, commit)
        };
        Self::checked(head, Some(current))
    }

    /// `owner` takes a sandbox that is at rest: epoch + 1, live. No vCPU may run before this is committed and still the head.
    pub fn claim(current: &Current, owner: &str, commit: CommitId) -> Result<Self, HeadError> {
        if !current.head.state.at_rest() {
            return Err(HeadError::Rule(match current.head.state {
                HeadState::Deleted => Rule::Deleted,
                _ => Rule::NotAtRest,
            }));
        }
        Self::take_over(current, owner, commit)
    }

    /// `owner` takes a sandbox whatever its state. The owner before it can commit nothing more, but its guest may go on running:
    /// only for one that is known to be dead.
    pub fn take_over(current: &Current, owner: &str, commit: CommitId) -> Result<Self, HeadError> {
        let head = Head {
            state: HeadState::Live,
            epoch: current.head.epoch + 1,
            owner: owner.to_owned(),
            ..successor(&current.head, commit)
        };
        Self::checked(head, Some(current))
    }

    /// The tombstone.
    pub fn delete(current: &Current, commit: CommitId) -> Result<Self, HeadError> {
        let head = Head { state: HeadState::Deleted, ..successor(&current.head, commit) };
        Self::checked(head, Some(current))
    }

    /// The tombstone's last change: it names no manifest any more, so that what it named may be removed and the sandbox cannot be put back.
    pub fn purge(current: &Current, commit: CommitId) -> Result<Self, HeadError> {
        if current.head.state != HeadState::Deleted {
            return Err(HeadError::Rule(Rule::NotDeleted));
        }
        let head = Head { manifest: None, ..successor(&current.head, commit) };
        Self::checked(head, Some(current))
    }

    /// `owner` puts a deleted sandbox back as it was at its last pause or stop: `state` says which of the two its manifest is of.
    pub fn undelete(
        current: &Current,
        state: HeadState,
        owner: &str,
        record: serde_json::Value,
        commit: CommitId,
    ) -> Result<Self, HeadError> {
        if current.head.state != HeadState::Deleted {
            return Err(HeadError::Rule(Rule::NotDeleted));
        }
        let head = Head {
            state,
            epoch: current.head.epoch + 1,
            owner: owner.to_owned(),
            record,
            ..successor(&current.head, commit)
        };
        Self::checked(head, Some(current))
    }

    /// The cancel commit of `self`: what was there before, as a new commit under the same precondition. `before` is the head that `self` was
    /// built on. Where there was none, an attempt at a first pause is cancelled by a live head, one at a creation by a tombstone.
    pub fn cancel(&self, before: Option<&Current>, commit: CommitId) -> Result<Self, HeadError> {
        let head = match (before, &self.expected) {
            (Some(before), Expected::Match(etag)) if *etag == before.etag => successor(&before.head, commit),
            (None, Expected::Absent) => Head {
                commit,
                state: if self.head.state.at_rest() { HeadState::Live } else { HeadState::Deleted },
                manifest: None,
                ..self.head.clone()
            },
            _ => return Err(HeadError::Rule(Rule::NotItsBase)),
        };
        if commit == self.head.commit {
            return Err(HeadError::Rule(Rule::CommitId));
        }
        Self::checked(head, before)
    }

    fn checked(head: Head, current: Option<&Current>) -> Result<Self, HeadError> {
        validate(&head, current.map(|current| &current.head)).map_err(HeadError::Rule)?;
        Ok(Self {
            expected: current.map_or(Expected::Absent, |current| Expected::Match(current.etag.clone())),
            body: head.encode()?,
            head,
        })
    }

    /// The head that this attempt writes.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// Under which precondition.
    pub fn expected(&self) -> &Expected {
        &self.expected
    }
}

impl From<Attempt> for Journaled {
    fn from(attempt: Attempt) -> Self {
        Self { expected: attempt.expected, body: attempt.body }
    }
}

impl TryFrom<Journaled> for Attempt {
    type Error = HeadError;

    fn try_from(journaled: Journaled) -> Result<Self, HeadError> {
        Ok(Self { head: Head::decode(journaled.body.as_bytes())?, expected: journaled.expected, body: journaled.body })
    }
}

/// `current` again, as the commit after it.
fn successor(current: &Head, commit: CommitId) -> Head {
    Head {
        format: Head::format(),
        seq: current.seq + 1,
        commit,
        parent: Some(current.commit),
        ancestors: current.chain().skip(1).take(MAX_ANCESTORS).collect(),
        ..current.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{commit::head::tests::head, ids::Digest};

    fn current(state: HeadState) -> Current {
        Current { head: head(state), etag: ETag("e".into()) }
    }

    fn id(n: u8) -> CommitId {
        CommitId([n; 16])
    }

    fn pause(state: HeadState) -> Change {
        Change {
            state,
            manifest: Some(ManifestRef { key: "new".into(), digest: Digest([1; 32]) }),
            record: serde_json::json!({"paused": true}),
        }
    }

    #[test]
    fn an_attempt_survives_the_journal_byte_for_byte() {
        let attempt = Attempt::next(&current(HeadState::Live), pause(HeadState::Paused), id(9)).unwrap();
        let json = serde_json::to_string(&attempt).unwrap();
        let read: Attempt = serde_json::from_str(&json).unwrap();
        assert_eq!(read, attempt);
        assert_eq!(read.body, attempt.body);
    }

    #[test]
    fn a_cancel_commit_is_what_was_there_before() {
        let before = current(HeadState::Live);
        let attempt = Attempt::next(&before, pause(HeadState::Paused), id(9)).unwrap();
        let cancel = attempt.cancel(Some(&before), id(10)).unwrap();
        assert_eq!(cancel.expected, attempt.expected);
        assert_eq!(cancel.head.seq, attempt.head.seq);
        assert_eq!(cancel.head.parent, attempt.head.parent);
        assert_eq!(cancel.head.state, HeadState::Live);
        assert_eq!(cancel.head.manifest, before.head.manifest);
        assert_eq!(cancel.head.record, before.head.record);

        assert!(attempt.cancel(Some(&before), id(9)).is_err());
        assert!(attempt.cancel(None, id(10)).is_err());
        let other = Current { etag: ETag("f".into()), ..before };
        assert!(attempt.cancel(Some(&other), id(10)).is_err());
    }

    #[test]
    fn a_first_commit_is_cancelled_by_live_or_tombstone() {
        let pause = Attempt::first("sb", "a", pause(HeadState::Paused), id(1)).unwrap();
        let cancel = pause.cancel(None, id(2)).unwrap();
        assert_eq!(cancel.head.state, HeadState::Live);
        assert_eq!(cancel.head.manifest, None);
        assert_eq!(cancel.expected, Expected::Absent);
        let create = Change { state: HeadState::Live, manifest: None, record: serde_json::Value::Null };
        let create = Attempt::first("sb", "a", create, id(1)).unwrap();
        let cancel = create.cancel(None, id(2)).unwrap();
        assert_eq!(cancel.head.state, HeadState::Deleted);
    }

    #[test]
    fn only_what_is_at_rest_is_claimed() {
        for state in [HeadState::Paused, HeadState::Stopped] {
            let claim = Attempt::claim(&current(state), "host-b", id(9)).unwrap();
            assert_eq!(claim.head.epoch, 4);
            assert_eq!(claim.head.owner, "host-b");
            assert_eq!(claim.head.state, HeadState::Live);
        }
        for state in [HeadState::Live, HeadState::Deleted] {
            assert!(Attempt::claim(&current(state), "host-b", id(9)).is_err());
        }
        assert!(Attempt::take_over(&current(HeadState::Live), "host-b", id(9)).is_ok());
        assert!(Attempt::take_over(&current(HeadState::Deleted), "host-b", id(9)).is_err());
    }

    #[test]
    fn a_deleted_sandbox_is_put_back_or_purged() {
        let buried = Attempt::delete(&current(HeadState::Paused), id(8)).unwrap();
        let tombstone = Current { head: buried.head.clone(), etag: ETag("t".into()) };
        let back = Attempt::undelete(&tombstone, HeadState::Paused, "host-b", serde_json::Value::Null, id(9)).unwrap();
        assert_eq!((back.head.state, back.head.epoch), (HeadState::Paused, tombstone.head.epoch + 1));
        assert_eq!(back.head.manifest, tombstone.head.manifest);
        let purge = Attempt::purge(&tombstone, id(9)).unwrap();
        assert_eq!(purge.expected, back.expected, "only one of the two can land");
        let purged = Current { head: purge.head, etag: ETag("u".into()) };
        assert!(Attempt::undelete(&purged, HeadState::Paused, "host-b", serde_json::Value::Null, id(10)).is_err());
        assert!(Attempt::purge(&purged, id(10)).is_err());
        assert!(
            Attempt::undelete(
                &current(HeadState::Paused),
                HeadState::Paused,
                "host-b",
                serde_json::Value::Null,
                id(10)
            )
            .is_err()
        );
    }

    #[test]
    fn ancestors_are_kept_up_to_the_bound() {
        let mut now = current(HeadState::Live);
        for n in 3..100u8 {
            let change = Change { state: HeadState::Live, manifest: None, record: serde_json::Value::Null };
            let attempt = Attempt::next(&now, change, id(n)).unwrap();
            assert_eq!(attempt.head.parent, Some(id(n - 1)));
            assert_eq!(attempt.head.ancestors.len(), usize::from(n - 2).min(MAX_ANCESTORS));
            now.head = attempt.head;
        }
        assert_eq!(now.head.manifest, head(HeadState::Live).manifest);
    }
}
