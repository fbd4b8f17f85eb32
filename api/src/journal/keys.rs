//! API keys. A key is `sk_<id>_<secret>`; only a hash of it is stored. The secret has 190 random bits, so a fast hash is enough: there is
//! nothing to guess. Each request looks its key up, so that a revocation holds from the next request on.

use super::{Doing as _, Journal, JournalError};
use crate::sources::{Sources, UnixMs};
use rusqlite::{OptionalExtension as _, params};

const ID_CHARS: usize = 8;
const SECRET_CHARS: usize = 37;

/// A key as it is listed: without its secret.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Key {
    /// Names it in `stasis key revoke`.
    pub id: String,
    /// Whose sandboxes it reaches.
    pub tenant: String,
    /// For people.
    pub label: String,
    /// When it was made.
    pub created_at: UnixMs,
    /// Since when it is refused.
    pub revoked_at: Option<UnixMs>,
}

/// What is stored of a key.
pub(super) fn hash(secret: &str) -> String {
    blake3::derive_key("stasis 2026 api key at rest", secret.as_bytes()).iter().fold(String::new(), |mut hex, byte| {
        use std::fmt::Write as _;
        // Writing to a String cannot fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// Whether a word has the form of a key, known here or not.
pub fn looks_like_key(word: &str) -> bool {
    let alphabet = |part: &str| part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    word.strip_prefix("sk_").and_then(|rest| rest.split_once('_')).is_some_and(|(id, secret)| {
        id.len() == ID_CHARS && secret.len() == SECRET_CHARS && alphabet(id) && alphabet(secret)
    })
}

/// A tenant is a path component in the store.
pub fn is_tenant(name: &str) -> bool {
    (1..=40).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
}

impl Journal {
    /// Makes a key for `tenant` (see [`is_tenant`]) and returns it whole, for the only time.
    pub fn create_key(&self, tenant: &str, label: &str, sources: &Sources) -> Result<(Key, String), JournalError> {
        let key = Key {
            id: sources.word(ID_CHARS),
            tenant: tenant.to_owned(),
            label: label.to_owned(),
            created_at: sources.now_ms(),
            revoked_at: None,
        };
        let secret = format!("sk_{}_{}", key.id, sources.word(SECRET_CHARS));
        self.lock()
            .execute(
                "INSERT INTO keys (id, tenant, label, hash, created_at) VALUES (?1, ?2, ?3, ?4, ?5)",
                params![key.id, key.tenant, key.label, hash(&secret), key.created_at],
            )
            .doing("store an API key")?;
        Ok((key, secret))
    }

    /// The tenant that this key speaks for; `None` when it is unknown or revoked.
    pub fn tenant_of_key(&self, secret: &str) -> Result<Option<String>, JournalError> {
        self.lock()
            .query_row("SELECT tenant FROM keys WHERE hash = ?1 AND revoked_at IS NULL", [hash(secret)], |row| {
                row.get(0)
            })
            .optional()
            .doing("look up an API key")
    }

    /// All keys, oldest first.
    pub fn keys(&self) -> Result<Vec<Key>, JournalError> {
        let connection = self.lock();
        let mut statement = connection
            .prepare("SELECT id, tenant, label, created_at, revoked_at FROM keys ORDER BY created_at, id")
            .doing("list the API keys")?;
        let rows = statement.query_map([], |row| {
            Ok(Key {
                id: row.get(0)?,
                tenant: row.get(1)?,
                label: row.get(2)?,
                created_at: row.get(3)?,
                revoked_at: row.get(4)?,
            })
        });
        rows.and_then(Iterator::collect).doing("list the API keys")
    }

    /// Refuses the key from now on. False when there is no such key.
    pub fn revoke_key(&self, id: &str, now: UnixMs) -> Result<bool, JournalError> {
        self.lock()
            .execute("UPDATE keys SET revoked_at = coalesce(revoked_at, ?2) WHERE id = ?1", params![id, now])
            .doing("revoke an API key")
            .map(|n| n > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_opens_its_tenant_until_it_is_revoked() {
        let journal = Journal::in_memory().unwrap();
        let sources = Sources::system();
        let (key, secret) = journal.create_key("acme", "laptop", &sources).unwrap();
        assert!(looks_like_key(&secret) && !looks_like_key("sk_live_x") && !looks_like_key(&secret[1..]));
        assert_eq!(journal.tenant_of_key(&secret).unwrap().as_deref(), Some("acme"));
        assert_eq!(journal.tenant_of_key(&format!("{secret}x")).unwrap(), None);
        assert_eq!(journal.tenant_of_key("").unwrap(), None);
        assert!(journal.revoke_key(&key.id, 5).unwrap());
        assert!(journal.revoke_key(&key.id, 6).unwrap());
        assert!(!journal.revoke_key("nothing", 6).unwrap());
        assert_eq!(journal.tenant_of_key(&secret).unwrap(), None);
        assert_eq!(journal.keys().unwrap()[0].revoked_at, Some(5));
    }

    #[test]
    fn the_secret_is_not_stored() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal.db");
        let journal = Journal::open(&path).unwrap();
        let (_, secret) = journal.create_key("acme", "", &Sources::system()).unwrap();
        drop(journal);
        let tail = &secret.as_bytes()[12..];
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            let content = std::fs::read(entry.unwrap().path()).unwrap();
            assert!(!content.windows(tail.len()).any(|w| w == tail));
        }
    }

    #[test]
    fn tenants_are_path_components() {
        assert!(is_tenant("dev") && is_tenant("a-1"));
        for bad in ["", "..", "a/b", "A", "-a", &"a".repeat(41)] {
            assert!(!is_tenant(bad), "{bad}");
        }
    }
}
