//! Commits to a sandbox's head that several operations share. See `stasis_snapshot::commit` for the protocol; here are only its uses.

use super::Core;
use crate::error::{Error, StoreContext as _};
use crate::fail_points::{Point, reach};
use crate::journal::OperationId;
use crate::registry::Sandbox;
use crate::states::{Event, State};
use crate::store::place;
use stasis_snapshot::commit::{
    Attempt, Backoff, Change, Current, Head, HeadError, HeadState, ObjectHead, Outcome, Register, Sent,
};
use stasis_snapshot::ids::CommitId;

impl Core {
    /// A fresh commit id.
    pub(super) fn commit_id(&self) -> CommitId {
        CommitId(self.sources.random())
    }

    /// Writes the attempts of an operation down before the first of them is sent.
    pub(super) fn propose(&self, operation: OperationId, attempts: &[&Attempt]) -> Result<(), Error> {
        let json = serde_json::to_string(attempts).map_err(|_| Error::Bug("an attempt that is no JSON"))?;
        Ok(self.journal.propose(operation, &json)?)
    }

    pub(super) fn register(&self, sandbox: &Sandbox) -> Result<Register<ObjectHead>, Error> {
        Ok(self.store.head_of(&place(&sandbox.tenant, &sandbox.id)?))
    }

    pub(super) fn head_error(sandbox: &Sandbox) -> impl FnOnce(HeadError) -> Error {
        let id = sandbox.id.clone();
        move |source| Error::Head { id, source }
    }

    /// What a head that says `state` carries for us.
    pub(super) fn head_record(sandbox: &Sandbox, state: State) -> Result<serde_json::Value, Error> {
        let portable = sandbox.record().portable(state);
        let versioned = portable.encode().map_err(|_| Error::Bug("a record that is no JSON"))?;
        let body: serde_json::Value =
            serde_json::from_slice(&versioned.bytes).map_err(|_| Error::Bug("a record that is no JSON"))?;
        Ok(serde_json::json!({ "version": versioned.version, "body": body }))
    }

    /// The head as it is, from memory or from the store. What another supervisor may change at any time, having the sandbox live, is not
    /// believed from memory: once it sleeps there, it may be woken here.
    pub(super) async fn current_head(&self, sandbox: &Sandbox) -> Result<Option<Current>, Error> {
        if let Some(Current { head, etag }) = sandbox.head()
            && (head.owner == self.owner || head.state.at_rest())
        {
            return Ok(Some(Current { head, etag }));
        }
        let head = self.register(sandbox)?.read().await.doing("read the head")?;
        if let Some(current) = &head {
            self.check_floor(sandbox, &current.head)?;
        }
        sandbox.set_head(head.clone());
        Ok(head)
    }

    /// Refuses a head that is older than the last one that the journal knows: sequence numbers only rise. What happened since, on other hosts, no
    /// seal can tell. A head that `stasis repair` wrote in the place of a lost one begins anew.
    fn check_floor(&self, sandbox: &Sandbox, head: &Head) -> Result<(), Error> {
        let known = sandbox.record().seq;
        if head.seq < known && self.store.seals().is_on() && head.owner != crate::cli::REPAIR_OWNER {
            return Err(Error::RolledBack { id: sandbox.id.clone(), found: head.seq, known });
        }
        Ok(())
    }

    /// The head of a sandbox whose guest runs here. One that is not ours, or not live, says that somebody has taken the sandbox over: nothing of
    /// this guest may be committed on it.
    pub(super) async fn held_head(&self, sandbox: &Sandbox) -> Result<Current, Error> {
        let current = self.current_head(sandbox).await?.ok_or_else(|| Error::Damaged {
            object: format!("the head of {}", sandbox.id),
            source: "it is not in the store".into(),
        })?;
        if current.head.owner != self.owner || current.head.state != HeadState::Live {
            sandbox.set_head(None);
            let Current { head, .. } = current;
            return Err(Error::Fenced { id: sandbox.id.clone(), owner: head.owner, epoch: head.epoch });
        }
        Ok(current)
    }

    /// Sends one attempt and settles it. On success the head is remembered; otherwise it is forgotten, to be read again.
    pub(super) async fn commit(
        &self,
        sandbox: &Sandbox,
        attempt: &Attempt,
        action: &'static str,
    ) -> Result<Current, Error> {
        let mut pacer = Backoff::within(self.config.deadlines.settle());
        let register = self.register(sandbox)?;
        reach(Point::HeadSends);
        let outcome = register.commit(attempt, Sent::Never, &mut pacer).await;
        reach(Point::HeadSettled);
        let lost = |by: Current| {
            sandbox.set_head(None);
            Error::Fenced { id: sandbox.id.clone(), owner: by.head.owner, epoch: by.head.epoch }
        };
        match outcome {
            Outcome::Committed { now } => {
                sandbox.set_head(Some(now.clone()));
                Ok(now)
            }
            Outcome::Superseded { by } | Outcome::Fenced { by } => Err(lost(by)),
            Outcome::Refused { cause } => {
                sandbox.set_head(None);
                Err(Error::Store { action, source: cause })
            }
            Outcome::Unknown { cause } => {
                sandbox.set_head(None);
                Err(Error::Unknown { id: sandbox.id.clone(), action, source: cause })
            }
        }
    }

    /// Says in the bucket that nobody runs the guest, so that anybody may resume or start it. Best effort: when it fails, the head still names us as
    /// the owner, and the next resume here takes over from ourselves.
    pub(super) async fn lay_to_rest(&self, sandbox: &Sandbox) {
        let rest = async {
            let Some(current) = self.current_head(sandbox).await? else { return Ok(()) };
            if current.head.owner != self.owner || current.head.state != HeadState::Live {
                return Ok(());
            }
            let (state, rest) = match sandbox.record().rest() {
                Some(State::Stopped) => (HeadState::Stopped, State::Stopped),
                _ => (HeadState::Paused, State::Paused),
            };
            let change = Change { state, manifest: None, record: Self::head_record(sandbox, rest)? };
            let attempt = Attempt::next(&current, change, self.commit_id()).map_err(Self::head_error(sandbox))?;
            self.commit(sandbox, &attempt, "say in the head that it rests").await.map(drop)
        };
        if let Err(error) = rest.await {
            tracing::warn!(id = %sandbox.id, error = error.chain(), "the head still says live");
        }
    }

    /// Takes over from the head what another supervisor made of a sandbox that rests here: `stopped` where it was paused, or the other way.
    pub(super) fn follow_head(&self, sandbox: &Sandbox) {
        let Some(Current { head, .. }) = sandbox.head() else { return };
        let event = match (sandbox.state(), head.state) {
            (State::Paused, HeadState::Stopped) => Event::FoundStopped,
            (State::Stopped, HeadState::Paused) => Event::FoundPaused,
            _ => return,
        };
        let note = "as its head says: another supervisor had it";
        let followed = self.registry.record(sandbox, event, Some(note), |record| {
            record.disks_only = event == Event::FoundStopped;
            record.commit = head.manifest;
            (record.epoch, record.seq, record.reason) = (head.epoch, head.seq, None);
        });
        if let Err(error) = followed {
            tracing::error!(id = %sandbox.id, error = error.chain(), "cannot follow its head");
        }
    }

    /// Writes the tombstone. `Ok` also when there is no head, or when it is buried already.
    pub(super) async fn bury(&self, sandbox: &Sandbox) -> Result<(), Error> {
        self.kept.forget(&sandbox.id);
        // Twice: a head remembered from before may be an older one.
        for last in [false, true] {
            let Some(current) = self.current_head(sandbox).await? else { return Ok(()) };
            if current.head.state == HeadState::Deleted {
                return Ok(());
            }
            if current.head.state == HeadState::Live && current.head.owner != self.owner {
                return Err(Error::Fenced {
                    id: sandbox.id.clone(),
                    owner: current.head.owner,
                    epoch: current.head.epoch,
                });
            }
            let attempt = Attempt::delete(&current, self.commit_id()).map_err(Self::head_error(sandbox))?;
            match self.commit(sandbox, &attempt, "write the tombstone").await {
                Err(Error::Fenced { .. }) if !last => {}
                outcome => return outcome.map(drop),
            }
        }
        Ok(())
    }
}
