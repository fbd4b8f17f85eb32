//! Operations: begun, perhaps with a head proposal that was sent, ended. One that has no end was interrupted by the death of the supervisor.

use super::{Doing as _, Journal, JournalError};
use crate::fail_points::{Point, reach};
use crate::ids::SandboxId;
use crate::sources::UnixMs;
use rusqlite::params;
use serde::{Deserialize, Serialize};

/// Names an operation in the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OperationId(pub(super) i64);

/// What is being done to a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationKind {
    /// Boot it.
    Create,
    /// Capture, commit, end its VM.
    Pause,
    /// Claim, restore, run.
    Resume,
    /// Capture while it runs, commit under a name.
    Snapshot,
    /// Capture its disks, commit, end its VM.
    Stop,
    /// Claim, boot over the disks of its stop.
    Start,
    /// Tombstone, end its VM, remove its objects.
    Delete,
}

impl OperationKind {
    /// The verb.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Snapshot => "snapshot",
            Self::Stop => "stop",
            Self::Start => "start",
            Self::Delete => "delete",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        [Self::Create, Self::Pause, Self::Resume, Self::Snapshot, Self::Stop, Self::Start, Self::Delete]
            .into_iter()
            .find(|kind| kind.as_str() == word)
    }
}

/// An operation without an end.
#[derive(Clone, Debug)]
pub struct Interrupted {
    /// Its number.
    pub id: OperationId,
    /// On which sandbox.
    pub sandbox: SandboxId,
    /// What it was.
    pub kind: OperationKind,
    /// The head proposal that may have been sent, as JSON: it must be settled or burnt before anything else.
    pub proposal: Option<String>,
}

impl Journal {
    /// Writes down that an operation begins. Comes before its first effect.
    pub fn begin(&self, sandbox: &SandboxId, kind: OperationKind, now: UnixMs) -> Result<OperationId, JournalError> {
        reach(Point::Begin);
        let connection = self.lock();
        connection
            .execute(
                "INSERT INTO operations (sandbox, kind, begun_at) VALUES (?1, ?2, ?3)",
                params![sandbox.as_str(), kind.as_str(), now],
            )
            .doing("begin an operation")?;
        reach(Point::Begun);
        Ok(OperationId(connection.last_insert_rowid()))
    }

    /// Writes down the head proposal that is about to be sent for the first time.
    pub fn propose(&self, operation: OperationId, proposal: &str) -> Result<(), JournalError> {
        reach(Point::Propose);
        self.lock()
            .execute("UPDATE operations SET proposal = ?2 WHERE number = ?1", params![operation.0, proposal])
            .doing("note a head proposal")?;
        reach(Point::Proposed);
        Ok(())
    }

    /// Writes down that none of its proposals can land any more. Comes before a guest goes on: whoever finds the proposals of a pause
    /// sends them again.
    pub fn withdraw(&self, operation: OperationId) -> Result<(), JournalError> {
        reach(Point::Withdraw);
        self.lock()
            .execute("UPDATE operations SET proposal = NULL WHERE number = ?1", params![operation.0])
            .doing("withdraw head proposals")?;
        reach(Point::Withdrawn);
        Ok(())
    }

    /// Writes down how the operation ended.
    pub fn end(&self, operation: OperationId, outcome: &str, now: UnixMs) -> Result<(), JournalError> {
        reach(Point::End);
        self.lock()
            .execute(
                "UPDATE operations SET ended_at = ?2, outcome = ?3 WHERE number = ?1",
                params![operation.0, now, outcome],
            )
            .doing("end an operation")?;
        reach(Point::Ended);
        Ok(())
    }

    /// Every operation without an end, oldest first.
    pub fn interrupted(&self) -> Result<Vec<Interrupted>, JournalError> {
        let connection = self.lock();
        let mut statement = connection
            .prepare("SELECT number, sandbox, kind, proposal FROM operations WHERE ended_at IS NULL ORDER BY number")
            .doing("list interrupted operations")?;
        let rows = statement
            .query_map([], |row| {
                Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?, row.get::<_, String>(2)?, row.get(3)?))
            })
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .doing("list interrupted operations")?;
        Ok(rows
            .into_iter()
            .filter_map(|(number, sandbox, kind, proposal)| {
                let read = SandboxId::parse(&sandbox).zip(OperationKind::parse(&kind));
                if read.is_none() {
                    tracing::error!(
                        number,
                        sandbox,
                        kind,
                        "an operation in the journal cannot be read; it is passed over"
                    );
                }
                read.map(|(sandbox, kind)| Interrupted { id: OperationId(number), sandbox, kind, proposal })
            })
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_has_no_end_is_interrupted() {
        let journal = Journal::in_memory().unwrap();
        let id = SandboxId::parse("sbx-abc").unwrap();
        let done = journal.begin(&id, OperationKind::Create, 1).unwrap();
        let open = journal.begin(&id, OperationKind::Pause, 2).unwrap();
        journal.propose(open, "{}").unwrap();
        journal.end(done, "ok", 3).unwrap();
        let found = journal.interrupted().unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].id, found[0].kind, found[0].proposal.as_deref()),
            (open, OperationKind::Pause, Some("{}"))
        );
        journal.withdraw(open).unwrap();
        assert_eq!(journal.interrupted().unwrap()[0].proposal, None);
    }
}
