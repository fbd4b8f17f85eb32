//! The journal: what this host must remember across its own death. One SQLite file, one connection, short statements.
//!
//! - `keys`: API keys, hashed.
//! - `sandboxes`: the record of each sandbox as it was last moved, with the VMM that runs it.
//! - `operations`: what was begun, written **before** it begins, and how it ended. What has no end when the supervisor starts was interrupted.
//! - `transitions`: every move of every state machine, for people.
//! - `presigned_urls`: presigned URLs, their tokens hashed.
//! - `sessions`: sessions of the page for people, their tokens hashed.
//! - `secrets`: texts that policies name, each with its owner.
//! - `digests`: BLAKE3 of template files by path, size and time.
//!
//! Nothing here but secrets is needed by another host: the bucket is the catalogue, and an empty journal is rebuilt from it
//! (`supervisor::catalogue`).
//!
//! Write-ahead logging without a sync per statement: a killed process loses nothing. A power cut may lose the last statements, but it also
//! ends every VM, and what was committed is read from the bucket.
//!
//! Statements take tens of microseconds, so callers run them in place, from any thread; the connection's lock is never held across a wait.

pub mod keys;
mod operations;
pub mod presigned;
mod sandboxes;
mod secrets;
mod sessions;

pub use operations::{Interrupted, OperationId, OperationKind};
#[cfg(test)]
pub(crate) use sandboxes::tests_support;
pub use sandboxes::{Move, Transition};

use rusqlite::{Connection, OptionalExtension as _, params};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Raised when a table changes its meaning.
const SCHEMA: i64 = 1;

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    CREATE TABLE IF NOT EXISTS keys (
        id TEXT PRIMARY KEY, tenant TEXT NOT NULL, label TEXT NOT NULL, hash TEXT NOT NULL UNIQUE,
        created_at INTEGER NOT NULL, revoked_at INTEGER) STRICT;
    CREATE TABLE IF NOT EXISTS sandboxes (
        id TEXT PRIMARY KEY, tenant TEXT NOT NULL, state TEXT NOT NULL, created_at INTEGER NOT NULL, record TEXT NOT NULL) STRICT;
    CREATE TABLE IF NOT EXISTS operations (
        number INTEGER PRIMARY KEY, sandbox TEXT NOT NULL, kind TEXT NOT NULL, begun_at INTEGER NOT NULL,
        proposal TEXT, ended_at INTEGER, outcome TEXT) STRICT;
    CREATE INDEX IF NOT EXISTS operations_open ON operations (sandbox) WHERE ended_at IS NULL;
    CREATE TABLE IF NOT EXISTS transitions (
        number INTEGER PRIMARY KEY, sandbox TEXT NOT NULL, at INTEGER NOT NULL, before TEXT, event TEXT NOT NULL,
        after TEXT NOT NULL, note TEXT) STRICT;
    CREATE TABLE IF NOT EXISTS presigned_urls (
        id TEXT PRIMARY KEY, sandbox TEXT NOT NULL, port INTEGER NOT NULL, hash BLOB NOT NULL,
        created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL) STRICT;
    CREATE TABLE IF NOT EXISTS sessions (hash BLOB PRIMARY KEY, key TEXT NOT NULL, expires_at INTEGER NOT NULL) STRICT;
    CREATE TABLE IF NOT EXISTS secrets (
        name TEXT NOT NULL, owner TEXT NOT NULL, text TEXT NOT NULL, PRIMARY KEY (name, owner)) STRICT;
    CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, digest TEXT NOT NULL) STRICT;
";

/// Why the journal cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file cannot be opened.
    #[error("cannot open the journal {path}", path = path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// It was written by another version.
    #[error(
        "the journal has schema {found}, this stasis knows {SCHEMA}: use the stasis that wrote it, or another data directory"
    )]
    Schema {
        /// The schema in the file.
        found: String,
    },
    /// A statement failed.
    #[error("cannot {action} in the journal")]
    Statement {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: rusqlite::Error,
    },
    /// A stored record cannot be read.
    #[error("the journal's record of {what} cannot be read")]
    Record {
        /// Of what.
        what: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

/// Names the action of a failed statement.
trait Doing<T> {
    fn doing(self, action: &'static str) -> Result<T, JournalError>;
}

impl<T> Doing<T> for Result<T, rusqlite::Error> {
    fn doing(self, action: &'static str) -> Result<T, JournalError> {
        self.map_err(|source| JournalError::Statement { action, source })
    }
}

/// An open journal.
pub struct Journal {
    connection: Mutex<Connection>,
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal").finish_non_exhaustive()
    }
}

impl Journal {
    /// Opens or creates the journal. Several processes may have it open: the command line manages keys beside a running supervisor.
    pub fn open(path: &Path) -> Result<Self, JournalError> {
        use std::os::unix::fs::OpenOptionsExt as _;
        // Made private before SQLite sees it (which gives its side files the same mode). When that fails, so does the open, with its reason.
        let _ = std::fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path);
        let open = || -> rusqlite::Result<Connection> {
            let connection = Connection::open(path)?;
            connection.busy_timeout(std::time::Duration::from_secs(5))?;
            connection.pragma_update(None, "journal_mode", "WAL")?;
            connection.pragma_update(None, "synchronous", "NORMAL")?;
            Ok(connection)
        };
        Self::prepare(open().map_err(|source| JournalError::Open { path: path.to_owned(), source })?)
    }

    /// One that is gone with its handle.
    pub fn in_memory() -> Result<Self, JournalError> {
        Self::prepare(Connection::open_in_memory().doing("open a journal in memory")?)
    }

    fn prepare(connection: Connection) -> Result<Self, JournalError> {
        connection.execute_batch(TABLES).doing("create the tables")?;
        let journal = Self { connection: Mutex::new(connection) };
        let found = journal.meta("schema", || SCHEMA.to_string())?;
        if found == SCHEMA.to_string() { Ok(journal) } else { Err(JournalError::Schema { found }) }
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic while the lock was held left at most an unfinished statement, which SQLite rolls back.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The value under `name`; stores what `first` makes when there is none yet.
    pub fn meta(&self, name: &str, first: impl FnOnce() -> String) -> Result<String, JournalError> {
        let connection = self.lock();
        let known = connection
            .query_row("SELECT value FROM meta WHERE name = ?1", [name], |row| row.get(0))
            .optional()
            .doing("read a setting")?;
        if let Some(value) = known {
            return Ok(value);
        }
        let value = first();
        connection
            .execute("INSERT INTO meta (name, value) VALUES (?1, ?2)", params![name, value])
            .doing("store a setting")?;
        Ok(value)
    }

    /// Stores the value under `name`, whatever was there.
    pub fn set_meta(&self, name: &str, value: &str) -> Result<(), JournalError> {
        self.lock()
            .execute("INSERT OR REPLACE INTO meta (name, value) VALUES (?1, ?2)", params![name, value])
            .doing("store a setting")?;
        Ok(())
    }

    /// The digest of a file of that size and modification time (ns), if it was ever stored.
    pub fn cached_digest(&self, path: &Path, (size, mtime_ns): (u64, i64)) -> Result<Option<String>, JournalError> {
        self.lock()
            .query_row(
                "SELECT digest FROM digests WHERE path = ?1 AND size = ?2 AND mtime_ns = ?3",
                params![path.to_string_lossy(), i64::try_from(size).unwrap_or(i64::MAX), mtime_ns],
                |row| row.get(0),
            )
            .optional()
            .doing("look up a digest")
    }

    /// Stores the digest of a file.
    pub fn cache_digest(&self, path: &Path, (size, mtime_ns): (u64, i64), digest: &str) -> Result<(), JournalError> {
        self.lock()
            .execute(
                "INSERT OR REPLACE INTO digests (path, size, mtime_ns, digest) VALUES (?1, ?2, ?3, ?4)",
                params![path.to_string_lossy(), i64::try_from(size).unwrap_or(i64::MAX), mtime_ns, digest],
            )
            .doing("store a digest")
            .map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_of_another_schema_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal.db");
        let journal = Journal::open(&path).unwrap();
        journal.lock().execute("UPDATE meta SET value = '99' WHERE name = 'schema'", []).unwrap();
        drop(journal);
        assert!(matches!(Journal::open(&path), Err(JournalError::Schema { .. })));
    }

    #[test]
    fn the_file_is_its_owners_alone() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let _journal = Journal::open(&dir.path().join("journal.db")).unwrap();
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            assert_eq!(entry.unwrap().metadata().unwrap().permissions().mode() & 0o077, 0);
        }
    }

    #[test]
    fn settings_keep_their_first_value() {
        let journal = Journal::in_memory().unwrap();
        assert_eq!(journal.meta("owner", || "a".to_owned()).unwrap(), "a");
        assert_eq!(journal.meta("owner", || "b".to_owned()).unwrap(), "a");
    }
}
