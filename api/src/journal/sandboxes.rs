//! Records of sandboxes and their moves.

use super::{Doing as _, Journal, JournalError};
use crate::fail_points::{Point, reach};
use crate::ids::SandboxId;
use crate::record::Record;
use crate::sources::UnixMs;
use crate::states::{Event, State};
use rusqlite::params;

/// One move of one state machine.
#[derive(Clone, Debug)]
pub struct Move<'a> {
    /// State before; `None` at creation.
    pub before: Option<State>,
    /// What happened.
    pub event: Event,
    /// When.
    pub at: UnixMs,
    /// For people.
    pub note: Option<&'a str>,
}

/// A move as it is listed.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, schemars::JsonSchema)]
pub struct Transition {
    /// When.
    pub at: UnixMs,
    /// State before.
    pub before: Option<String>,
    /// What happened.
    pub event: String,
    /// State after.
    pub after: String,
    /// For people.
    pub note: Option<String>,
}

fn text(record: &Record) -> Result<String, JournalError> {
    serde_json::to_string(record).map_err(|source| JournalError::Record { what: record.id.to_string(), source })
}

impl Journal {
    /// Stores a record and the move that led to it, together.
    pub fn store_move(&self, record: &Record, by: &Move<'_>) -> Result<(), JournalError> {
        let json = text(record)?;
        reach(Point::Move);
        let mut connection = self.lock();
        let mut store = || -> rusqlite::Result<()> {
            let all = connection.transaction()?;
            all.execute(
                "INSERT INTO sandboxes (id, tenant, state, created_at, record) VALUES (?1, ?2, ?3, ?4, ?5)
                 ON CONFLICT (id) DO UPDATE SET state = excluded.state, record = excluded.record",
                params![record.id.as_str(), record.tenant, record.state.as_str(), record.spec.created_at, json],
            )?;
            all.execute(
                "INSERT INTO transitions (sandbox, at, before, event, after, note) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                params![
                    record.id.as_str(),
                    by.at,
                    by.before.map(State::as_str),
                    by.event.as_str(),
                    record.state.as_str(),
                    by.note
                ],
            )?;
            if record.state == State::Deleted {
                all.execute("DELETE FROM secrets WHERE owner = ?1", [record.id.as_str()])?;
            }
            all.commit()
        };
        store().doing("store a transition")?;
        reach(Point::Moved);
        Ok(())
    }

    /// Stores a record that did not move.
    pub fn store_record(&self, record: &Record) -> Result<(), JournalError> {
        let json = text(record)?;
        reach(Point::Amend);
        self.lock()
            .execute("UPDATE sandboxes SET record = ?2 WHERE id = ?1", params![record.id.as_str(), json])
            .doing("store a record")?;
        reach(Point::Amended);
        Ok(())
    }

    /// All records. One that cannot be read is an error: guessing about a sandbox is worse than stopping.
    pub fn records(&self) -> Result<Vec<Record>, JournalError> {
        let connection = self.lock();
        let mut statement = connection
            .prepare("SELECT id, record FROM sandboxes ORDER BY created_at, id")
            .doing("list the sandboxes")?;
        let rows = statement
            .query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .doing("list the sandboxes")?;
        rows.into_iter()
            .map(|(id, json)| serde_json::from_str(&json).map_err(|source| JournalError::Record { what: id, source }))
            .collect()
    }

    /// The moves of one sandbox, oldest first.
    pub fn transitions(&self, id: &SandboxId) -> Result<Vec<Transition>, JournalError> {
        let connection = self.lock();
        let mut statement = connection
            .prepare("SELECT at, before, event, after, note FROM transitions WHERE sandbox = ?1 ORDER BY number")
            .doing("list transitions")?;
        statement
            .query_map([id.as_str()], |row| {
                Ok(Transition {
                    at: row.get(0)?,
                    before: row.get(1)?,
                    event: row.get(2)?,
                    after: row.get(3)?,
                    note: row.get(4)?,
                })
            })
            .and_then(Iterator::collect)
            .doing("list transitions")
    }
}

/// A record to test with.
#[cfg(test)]
pub(crate) mod tests_support {
    use super::*;
    use crate::record::Spec;

    pub(crate) fn sample(id: &str) -> Record {
        let spec = Spec {
            template_name: "t".to_owned(),
            template_id: "tpl-1".to_owned(),
            template_digest: "d".to_owned(),
            rootfs_digest: None,
            agent: false,
            vcpu: 1,
            memory_mib: 64,
            disk_mib: 0,
            timeout_s: 300,
            auto_pause: false,
            env_vars: std::collections::BTreeMap::new(),
            port: None,
            network_policy: None,
            network: false,
            authority: None,
            snapshot: None,
            created_at: 1000,
        };
        Record::new(SandboxId::parse(id).unwrap(), "dev".to_owned(), spec)
    }
}

#[cfg(test)]
mod tests {
    use super::tests_support::sample;
    use super::*;

    #[test]
    fn a_record_reads_back_with_its_moves() {
        let journal = Journal::in_memory().unwrap();
        let mut record = sample("sbx-a");
        journal.store_move(&record, &Move { before: None, event: Event::Create, at: 1, note: None }).unwrap();
        record.state = State::Running;
        journal
            .store_move(&record, &Move { before: Some(State::Starting), event: Event::Ready, at: 2, note: Some("n") })
            .unwrap();
        assert_eq!(journal.records().unwrap(), [record.clone()]);
        let moves = journal.transitions(&record.id).unwrap();
        assert_eq!(moves.iter().map(|m| m.after.as_str()).collect::<Vec<_>>(), ["starting", "running"]);
        assert_eq!((moves[1].event.as_str(), moves[1].note.as_deref()), ("ready", Some("n")));
    }

    #[test]
    fn a_deleted_sandbox_has_no_secrets() {
        let journal = Journal::in_memory().unwrap();
        let mut record = sample("sbx-a");
        journal.store_move(&record, &Move { before: None, event: Event::Create, at: 1, note: None }).unwrap();
        journal.keep_secret("sbx-a", "one", "s3cret").unwrap();
        record.state = State::Deleted;
        journal
            .store_move(&record, &Move { before: Some(State::Deleting), event: Event::Gone, at: 2, note: None })
            .unwrap();
        assert_eq!(journal.secret("sbx-a", "one").unwrap(), None);
    }

    #[test]
    fn an_unreadable_record_stops_the_start() {
        let journal = Journal::in_memory().unwrap();
        let record = sample("sbx-a");
        journal.store_move(&record, &Move { before: None, event: Event::Create, at: 1, note: None }).unwrap();
        journal.lock().execute("UPDATE sandboxes SET record = '{}'", []).unwrap();
        assert!(matches!(journal.records(), Err(JournalError::Record { .. })));
    }
}
