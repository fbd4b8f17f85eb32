//! Sending attempts and settling what came of them.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use super::{
    head::{Current, Head, HeadState},
    plan::{Attempt, Expected},
    storage::{HeadStorage, StoredHead, WriteReply},
};
use crate::store::{ErrorKind, Operation, StoreError};

const FIRST_WAIT: Duration = Duration::from_millis(50);
const MAX_WAIT: Duration = Duration::from_secs(1);

/// Whether requests for an attempt may have been sent before this call. Whoever does not know says [`Sent::Maybe`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// Surely not.
    Never,
    /// By an earlier call whose outcome was unknown, or before a crash.
    Maybe,
}

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
    /// Neither can land: the head they were to replace does not exist any more.
    Gone {
        /// What the store said.
        cause: StoreError,
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
    let mine = attempt.head();
    let Some(Current { head, etag }) = head else {
        return match attempt.expected() {
            Expected::Absent => Verdict::Undecided,
            Expected::Match(_) => Verdict::Gone,
        };
    };
    if head.chain().any(|commit| commit == mine.commit) {
        return Verdict::Committed;
    }
    // An older head than the one to replace can only be a stale read.
    if matches!(attempt.expected(), Expected::Match(expected) if expected == etag) || head.seq < mine.seq {
        return Verdict::Undecided;
    }
    // Somebody took our seq. The head names those before it only so far.
    if head.chain().count() as u64 <= head.seq - mine.seq {
        return Verdict::TooOld;
    }
    if head.epoch > mine.epoch || head.owner != mine.owner { Verdict::Fenced } else { Verdict::Superseded }
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
        Self { deadline: tokio::time::Instant::now() + total, next: FIRST_WAIT }
    }
}

#[async_trait]
impl Pacer for Backoff {
    async fn wait(&mut self) -> bool {
        let until = tokio::time::Instant::now() + self.next;
        if until > self.deadline {
            return false;
        }
        tokio::time::sleep_until(until).await;
        self.next = (self.next * 2).min(MAX_WAIT);
        true
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
        let Some(StoredHead { bytes, etag }) = self.storage.read().await? else {
            return Ok(None);
        };
        match Head::decode(&bytes) {
            Ok(head) => Ok(Some(Current { head, etag })),
            Err(error) => Err(StoreError::new(ErrorKind::Corrupt, Operation::Get, self.storage.key()).because(error)),
        }
    }

    /// Sends `attempt`, as often as it takes, until it is known what came of it or `pacer` gives up.
    pub async fn commit(&self, attempt: &Attempt, sent: Sent, pacer: &mut dyn Pacer) -> Outcome {
        // Whether any request of this attempt may yet be applied, or another commit may have won: only the head can tell.
        let mut unclear = sent == Sent::Maybe;
        loop {
            let mut cause = match self.write(attempt).await {
                WriteReply::Applied(etag) => {
                    return Outcome::Committed { now: Current { head: attempt.head().clone(), etag } };
                }
                WriteReply::NotApplied(cause) => {
                    match meaning(&cause) {
                        Meaning::Refused if !unclear => return Outcome::Refused { cause },
                        Meaning::Contested => unclear = true,
                        Meaning::Refused | Meaning::NotReached => {}
                    }
                    cause
                }
                WriteReply::Unclear(cause) => {
                    unclear = true;
                    cause
                }
            };
            match self.read().await {
                Ok(head) => match (judge(attempt, head.as_ref()), head) {
                    (Verdict::Committed, Some(now)) => return Outcome::Committed { now },
                    (Verdict::Superseded, Some(by)) => return Outcome::Superseded { by },
                    (Verdict::Fenced, Some(by)) => return Outcome::Fenced { by },
                    (Verdict::Gone, _) => return Outcome::Refused { cause },
                    (Verdict::TooOld, _) => return Outcome::Unknown { cause },
                    _ => {}
                },
                Err(error) => cause = error,
            }
            if !pacer.wait().await {
                return if unclear { Outcome::Unknown { cause } } else { Outcome::Refused { cause } };
            }
        }
    }

    /// Only reads: what became of an attempt that may have been sent before (after a crash). `Unknown` where it may yet land.
    pub async fn settle(&self, attempt: &Attempt, pacer: &mut dyn Pacer) -> Outcome {
        loop {
            let undecided = || StoreError::new(ErrorKind::Conflict, Operation::Get, self.storage.key());
            let cause = match self.read().await {
                Ok(head) => match (judge(attempt, head.as_ref()), head) {
                    (Verdict::Committed, Some(now)) => return Outcome::Committed { now },
                    (Verdict::Superseded, Some(by)) => return Outcome::Superseded { by },
                    (Verdict::Fenced, Some(by)) => return Outcome::Fenced { by },
                    (Verdict::Gone, _) => {
                        let kind = ErrorKind::NotFound;
                        let cause = StoreError::new(kind, Operation::Get, self.storage.key());
                        return Outcome::Refused { cause };
                    }
                    _ => {
                        return Outcome::Unknown { cause: undecided().because("the commit may yet land") };
                    }
                },
                Err(error) => error,
            };
            if !pacer.wait().await {
                return Outcome::Unknown { cause };
            }
        }
    }

    /// Sends `cancel`, made of `pending` by [`Attempt::cancel`], until one of the two is known to have won.
    pub async fn cancel(&self, pending: &Attempt, cancel: &Attempt, pacer: &mut dyn Pacer) -> Cancelled {
        loop {
            let mut cause = match self.write(cancel).await {
                WriteReply::Applied(etag) => {
                    return Cancelled::Won { now: Current { head: cancel.head().clone(), etag } };
                }
                WriteReply::NotApplied(cause) | WriteReply::Unclear(cause) => cause,
            };
            match self.read().await {
                Ok(Some(now)) if judge(pending, Some(&now)) == Verdict::Committed => {
                    return Cancelled::Landed { now };
                }
                Ok(head) => match (judge(cancel, head.as_ref()), head) {
                    (Verdict::Committed, Some(now)) => {
                        return if now.head.commit == cancel.head().commit {
                            Cancelled::Won { now }
                        } else if same_owner(cancel.head(), &now.head) {
                            Cancelled::Superseded { by: now }
                        } else {
                            Cancelled::Fenced { by: now }
                        };
                    }
                    (Verdict::Superseded, Some(by)) => return Cancelled::Superseded { by },
                    (Verdict::Fenced, Some(by)) => return Cancelled::Fenced { by },
                    (Verdict::Gone, _) => return Cancelled::Gone { cause },
                    (Verdict::TooOld, _) => return Cancelled::Unknown { cause },
                    _ => {}
                },
                Err(error) => cause = error,
            }
            if !pacer.wait().await {
                return Cancelled::Unknown { cause };
            }
        }
    }

    /// The end of a pause: commits `attempt` as long as `commit_pacer` allows, then cancels it as long as `cancel_pacer` allows.
    pub async fn end_pause(
        &self,
        attempt: &Attempt,
        cancel: &Attempt,
        sent: Sent,
        commit_pacer: &mut dyn Pacer,
        cancel_pacer: &mut dyn Pacer,
    ) -> PauseEnd {
        let cause = match self.commit(attempt, sent, commit_pacer).await {
            Outcome::Committed { now } => return PauseEnd::Paused { now },
            Outcome::Fenced { by } => return PauseEnd::Fenced { by },
            Outcome::Superseded { by } => return self.overtaken(attempt, by),
            Outcome::Refused { cause } => return PauseEnd::RunAgain { now: None, cause },
            Outcome::Unknown { cause } => cause,
        };
        match self.cancel(attempt, cancel, cancel_pacer).await {
            Cancelled::Won { now } => PauseEnd::RunAgain { now: Some(now), cause },
            Cancelled::Landed { now } => PauseEnd::Paused { now },
            Cancelled::Superseded { by } => self.overtaken(attempt, by),
            Cancelled::Fenced { by } => PauseEnd::Fenced { by },
            Cancelled::Gone { cause } => PauseEnd::RunAgain { now: None, cause },
            Cancelled::Unknown { cause } => PauseEnd::Unknown { cause },
        }
    }

    /// Another commit took the place of a pause: the guest runs again only on one that leaves it to us.
    fn overtaken(&self, attempt: &Attempt, by: Current) -> PauseEnd {
        if by.head.state == HeadState::Live && same_owner(attempt.head(), &by.head) {
            let cause = StoreError::new(ErrorKind::PreconditionFailed, Operation::Put, self.storage.key())
                .because("another commit of the same owner took its place");
            PauseEnd::RunAgain { now: Some(by), cause }
        } else {
            PauseEnd::Fenced { by }
        }
    }

    async fn write(&self, attempt: &Attempt) -> WriteReply {
        self.storage.write(Bytes::from(attempt.body.clone()), attempt.expected()).await
    }
}

fn same_owner(a: &Head, b: &Head) -> bool {
    a.epoch == b.epoch && a.owner == b.owner
}

/// What a request that was not applied says of the head.
enum Meaning {
    /// The store was not reached: try again.
    NotReached,
    /// The head may not be what was expected: somebody else may have won.
    Contested,
    /// The store did not look at the head, nor will it: nobody has won, and there is no point in trying again.
    Refused,
}

fn meaning(cause: &StoreError) -> Meaning {
    match cause.kind {
        ErrorKind::Unavailable => Meaning::NotReached,
        ErrorKind::PreconditionFailed | ErrorKind::NotFound | ErrorKind::Conflict => Meaning::Contested,
        ErrorKind::Unauthorized
        | ErrorKind::Forbidden
        | ErrorKind::Full
        | ErrorKind::NoSuchBucket
        | ErrorKind::Corrupt
        | ErrorKind::Other => Meaning::Refused,
    }
}
