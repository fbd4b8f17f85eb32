//! Sending attempts and settling what came of them.

use std::time::Duration;

use async_trait::async_trait;

use super::{
    head::{Current, Head},
    plan::Attempt,
    storage::HeadStorage,
};
use crate::store::StoreError;

/// What came of a commit.
#[derive(Debug)]
pub enum Outcome {
    /// It was applied. `now` is the head: this commit, or one built on it since.
    Committed {
        /// The head now.
        now: Current,
    },
    /// It was not applied and can never be: another commit of the same epoch took its place.
    Superseded {
        /// The head now.
        by: Current,
    },
    /// It was not applied and can never be: a later epoch took its place.
    Fenced {
        /// The head now.
        by: Current,
    },
    /// It was not applied and can never be: no request got as far as the head.
    Refused {
        /// What the store said.
        cause: StoreError,
    },
    /// Not known: it may have been applied, or may yet be.
    Unknown {
        /// The last thing that the store said.
        cause: StoreError,
    },
}

/// What came of a cancel commit.
#[derive(Debug)]
pub enum Cancelled {
    /// The cancel commit is the head: the cancelled one can never land.
    Won {
        /// The head now.
        now: Current,
    },
    /// Too late: the commit had been applied.
    Landed {
        /// The head now.
        now: Current,
    },
    /// Neither can land: another commit of the same epoch took the place.
    Superseded {
        /// The head now.
        by: Current,
    },
    /// Neither can land: a later epoch took the place.
    Fenced {
        /// The head now.
        by: Current,
    },
    /// Not known.
    Unknown {
        /// The last thing that the store said.
        cause: StoreError,
    },
}

/// How a pause ended: what may be done with the guest.
#[derive(Debug)]
pub enum PauseEnd {
    /// Committed: answer success, free the VM.
    Paused {
        /// The head now.
        now: Current,
    },
    /// Not committed and never will be: the guest runs again.
    RunAgain {
        /// The head to build on; `None` when there is none, or when it is as it was before the attempt.
        now: Option<Current>,
        /// Why the pause failed.
        cause: StoreError,
    },
    /// Somebody else owns the sandbox: the guest must never run again, the VM is ended.
    Fenced {
        /// The head now.
        by: Current,
    },
    /// Not known: the guest stays stopped and the VM stays; call again with the same attempts.
    Unknown {
        /// The last thing that the store said.
        cause: StoreError,
    },
}

/// What a head says of a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the head or in its past.
    Committed,
    /// It lost to a commit of its own epoch.
    Superseded,
    /// It lost to a later epoch.
    Fenced,
    /// The head is still the one it was to replace: it may yet land.
    Undecided,
    /// The head it was to replace does not exist: it can never land.
    Gone,
    /// The head is so much newer that its list of ancestors does not reach back.
    TooOld,
}

/// Reads off the head what became of `attempt`.
pub fn judge(attempt: &Attempt, head: Option<&Current>) -> Verdict {
    let _ = (attempt, head);
    todo!()
}

/// Waits between requests, and says when to stop.
#[async_trait]
pub trait Pacer: Send {
    /// Waits before the next request; `false` without waiting when there shall be none.
    async fn wait(&mut self) -> bool;
}

/// Doubling waits up to a second within a total time.
#[derive(Debug)]
pub struct Backoff {
    deadline: tokio::time::Instant,
    next: Duration,
}

impl Backoff {
    /// Gives up after `total` from now. The first wait is 50 ms.
    pub fn within(total: Duration) -> Self {
        Self {
            deadline: tokio::time::Instant::now() + total,
            next: Duration::from_millis(50),
        }
    }
}

#[async_trait]
impl Pacer for Backoff {
    async fn wait(&mut self) -> bool {
        let _ = (self.deadline, self.next);
        todo!()
    }
}

/// One head, for as long as somebody works with it. Stateless: what must survive is in the attempts.
#[derive(Clone, Debug)]
pub struct Register<S> {
    storage: S,
}

impl<S: HeadStorage> Register<S> {
    /// The register kept in `storage`.
    pub fn new(storage: S) -> Self {
        Self { storage }
    }

    /// The head as it is now, checked.
    pub async fn read(&self) -> Result<Option<Current>, StoreError> {
        let _ = (&self.storage, Head::decode(&[]));
        todo!()
    }

    /// Sends `attempt`, as often as it takes, until it is known what came of it or `pacer` gives up.
    pub async fn commit(&self, attempt: &Attempt, pacer: &mut dyn Pacer) -> Outcome {
        let _ = (attempt, pacer);
        todo!()
    }

    /// Only reads: what became of an attempt that may have been sent before (after a crash). `Unknown` where it may yet land.
    pub async fn settle(&self, attempt: &Attempt, pacer: &mut dyn Pacer) -> Outcome {
        let _ = (attempt, pacer);
        todo!()
    }

    /// Sends `cancel`, made of `pending` by [`Attempt::cancel`], until one of the two is known to have won.
    pub async fn cancel(
        &self,
        pending: &Attempt,
        cancel: &Attempt,
        pacer: &mut dyn Pacer,
    ) -> Cancelled {
        let _ = (pending, cancel, pacer);
        todo!()
    }

    /// The end of a pause: commits `attempt` as long as `commit_pacer` allows, then cancels it as long as `cancel_pacer` allows.
    pub async fn end_pause(
        &self,
        attempt: &Attempt,
        cancel: &Attempt,
        commit_pacer: &mut dyn Pacer,
        cancel_pacer: &mut dyn Pacer,
    ) -> PauseEnd {
        let _ = (attempt, cancel, commit_pacer, cancel_pacer);
        todo!()
    }
}
