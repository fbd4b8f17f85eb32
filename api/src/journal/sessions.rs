//! Sessions of the page for people: what a browser has instead of an API key. A token is good for a while, and no longer than the key that
//! opened it. Only a hash of it is stored.

use super::keys::hash as hash_of_key;
use super::{Doing as _, Journal, JournalError};
use crate::sources::{Sources, UnixMs};
use rusqlite::{OptionalExtension as _, params};

const TOKEN_CHARS: usize = 48;

fn hash(token: &str) -> [u8; 32] {
    blake3::derive_key("stasis 2026 session token at rest", token.as_bytes())
}

impl Journal {
    /// Opens a session for whoever has this API key, and answers its token for the only time; `None` when the key is unknown or revoked.
    /// Forgets sessions that are over.
    pub fn open_session(&self, key: &str, life_ms: i64, sources: &Sources) -> Result<Option<String>, JournalError> {
        let (token, now) = (sources.word(TOKEN_CHARS), sources.now_ms());
        let connection = self.lock();
        connection.execute("DELETE FROM sessions WHERE expires_at <= ?1", [now]).doing("forget old sessions")?;
        let opened = connection
            .execute(
                "INSERT INTO sessions (hash, key, expires_at)
                 SELECT ?1, id, ?2 FROM keys WHERE hash = ?3 AND revoked_at IS NULL",
                params![hash(&token).as_slice(), now.saturating_add(life_ms), hash_of_key(key)],
            )
            .doing("open a session")?;
        Ok((opened == 1).then_some(token))
    }

    /// The tenant that this session speaks for at `now`.
    pub fn tenant_of_session(&self, token: &str, now: UnixMs) -> Result<Option<String>, JournalError> {
        self.lock()
            .query_row(
                "SELECT keys.tenant FROM sessions JOIN keys ON keys.id = sessions.key
                 WHERE sessions.hash = ?1 AND sessions.expires_at > ?2 AND keys.revoked_at IS NULL",
                params![hash(token).as_slice(), now],
                |row| row.get(0),
            )
            .optional()
            .doing("look up a session")
    }

    /// Ends a session.
    pub fn end_session(&self, token: &str) -> Result<(), JournalError> {
        self.lock()
            .execute("DELETE FROM sessions WHERE hash = ?1", [hash(token).as_slice()])
            .doing("end a session")
            .map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_ends_with_its_time_its_key_or_when_asked() {
        let (journal, sources) = (Journal::in_memory().unwrap(), Sources::system());
        let (key, secret) = journal.create_key("acme", "", &sources).unwrap();
        assert_eq!(journal.open_session("sk_wrong", 1000, &sources).unwrap(), None);
        let open = || journal.open_session(&secret, 60_000, &sources).unwrap().unwrap();
        let (one, two) = (open(), open());
        let now = sources.now_ms();
        let tenant = |token: &str, at| journal.tenant_of_session(token, at).unwrap();
        assert_eq!(tenant(&one, now).as_deref(), Some("acme"));
        assert_eq!(tenant(&one, now + 120_000), None);
        assert_eq!(tenant("", now), None);
        journal.end_session(&one).unwrap();
        assert_eq!((tenant(&one, now), tenant(&two, now).as_deref()), (None, Some("acme")));
        journal.revoke_key(&key.id, now).unwrap();
        assert_eq!(tenant(&two, now), None);
        assert_eq!(journal.open_session(&secret, 1000, &sources).unwrap(), None);
    }
}
