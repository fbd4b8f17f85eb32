//! Secrets of policies: what is put into headers of requests on their way out, and the keys of sandboxes' certificate authorities. They are
//! in this file alone, which is its owner's alone: records name them, and nothing of them goes to the bucket, into an answer or a log.
//!
//! Each belongs to an owner, a sandbox or a named snapshot, and is gone with its last one. Another host that takes a sandbox up finds the
//! names and not the texts: what needs them is refused there until the sandbox gets a new policy by a restore.

use super::{Doing as _, Journal, JournalError};
use rusqlite::{OptionalExtension as _, params};

impl Journal {
    /// Keeps `text` for `owner` under `name`, which nothing else is called.
    pub fn keep_secret(&self, owner: &str, name: &str, text: &str) -> Result<(), JournalError> {
        self.lock()
            .execute("INSERT INTO secrets (name, owner, text) VALUES (?1, ?2, ?3)", params![name, owner, text])
            .doing("keep a secret")
            .map(drop)
    }

    /// Lets `owner` have those of `names` that are kept here, too.
    pub fn share_secrets<'a>(&self, owner: &str, names: impl IntoIterator<Item = &'a str>) -> Result<(), JournalError> {
        let connection = self.lock();
        for name in names {
            connection
                .execute(
                    "INSERT OR IGNORE INTO secrets (name, owner, text) SELECT name, ?2, text FROM secrets WHERE name = ?1 LIMIT 1",
                    params![name, owner],
                )
                .doing("share a secret")?;
        }
        Ok(())
    }

    /// The text under `name`, if `owner` has it.
    pub fn secret(&self, owner: &str, name: &str) -> Result<Option<String>, JournalError> {
        self.lock()
            .query_row("SELECT text FROM secrets WHERE name = ?1 AND owner = ?2", params![name, owner], |row| {
                row.get(0)
            })
            .optional()
            .doing("read a secret")
    }

    /// Forgets what `owner` has.
    pub fn forget_secrets(&self, owner: &str) -> Result<(), JournalError> {
        self.lock().execute("DELETE FROM secrets WHERE owner = ?1", [owner]).doing("forget secrets").map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_its_owners_and_is_gone_with_the_last_one() {
        let journal = Journal::in_memory().unwrap();
        journal.keep_secret("sbx-a", "one", "s3cret").unwrap();
        assert_eq!(journal.secret("sbx-a", "one").unwrap().as_deref(), Some("s3cret"));
        assert_eq!(journal.secret("sbx-b", "one").unwrap(), None);
        journal.share_secrets("snap-a", ["one", "another"]).unwrap();
        journal.share_secrets("snap-a", ["one"]).unwrap();
        journal.forget_secrets("sbx-a").unwrap();
        assert_eq!(journal.secret("sbx-a", "one").unwrap(), None);
        journal.share_secrets("sbx-b", ["one"]).unwrap();
        assert_eq!(journal.secret("sbx-b", "one").unwrap().as_deref(), Some("s3cret"));
        ["snap-a", "sbx-b"].iter().for_each(|owner| journal.forget_secrets(owner).unwrap());
        journal.share_secrets("sbx-c", ["one"]).unwrap();
        assert_eq!(journal.secret("sbx-c", "one").unwrap(), None);
    }
}
