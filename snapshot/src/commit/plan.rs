//! What to write next: pure functions from the current head to an [`Attempt`]. Ids come from the caller.

use serde::{Deserialize, Serialize};

use super::head::{Current, Head, HeadError, HeadState};
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
    pub fn first(
        sandbox: &str,
        owner: &str,
        change: Change,
        commit: CommitId,
    ) -> Result<Self, HeadError> {
        let _ = (sandbox, owner, change, commit);
        todo!()
    }

    /// The next head within the epoch: a pause, a stop, a new record.
    pub fn next(current: &Current, change: Change, commit: CommitId) -> Result<Self, HeadError> {
        let _ = (current, change, commit);
        todo!()
    }

    /// `owner` takes a sandbox that is at rest: epoch + 1, live. No vCPU may run before this is committed and still the head.
    pub fn claim(current: &Current, owner: &str, commit: CommitId) -> Result<Self, HeadError> {
        let _ = (current, owner, commit);
        todo!()
    }

    /// `owner` takes a sandbox whatever its state. The owner before it can commit nothing more, but its guest may go on running:
    /// only for one that is known to be dead.
    pub fn take_over(current: &Current, owner: &str, commit: CommitId) -> Result<Self, HeadError> {
        let _ = (current, owner, commit);
        todo!()
    }

    /// The tombstone.
    pub fn delete(current: &Current, commit: CommitId) -> Result<Self, HeadError> {
        let _ = (current, commit);
        todo!()
    }

    /// The cancel commit of `self`: what was there before, as a new commit under the same precondition. `before` is the head that `self` was
    /// built on. Where there was none, an attempt at a first pause is cancelled by a live head, one at a creation by a tombstone.
    pub fn cancel(&self, before: Option<&Current>, commit: CommitId) -> Result<Self, HeadError> {
        let _ = (before, commit);
        todo!()
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
        Self {
            expected: attempt.expected,
            body: attempt.body,
        }
    }
}

impl TryFrom<Journaled> for Attempt {
    type Error = HeadError;

    fn try_from(journaled: Journaled) -> Result<Self, HeadError> {
        Ok(Self {
            head: Head::decode(journaled.body.as_bytes())?,
            expected: journaled.expected,
            body: journaled.body,
        })
    }
}
