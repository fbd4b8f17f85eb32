//! Presigned URLs. A token is 52 characters of `a-z0-9`: 12 that name the URL and 40 that are its secret (206 random bits). Only a hash of the
//! whole is stored, and compared in constant time after a look-up by the name alone.
//!
//! They are this host's alone: a sandbox that another host takes up needs new ones.

use super::{Doing as _, Journal, JournalError};
use crate::ids::SandboxId;
use crate::sources::{Sources, UnixMs};
use rusqlite::{OptionalExtension as _, params};
use std::fmt;
use std::num::NonZeroU16;

/// What ids begin with.
const PREFIX: &str = "psu-";
const NAME_CHARS: usize = 12;
const SECRET_CHARS: usize = 40;
/// Characters of a token: a DNS label has at most 63.
pub const TOKEN_CHARS: usize = NAME_CHARS + SECRET_CHARS;
/// Presigned URLs of one sandbox at most, the expired ones not counted.
pub const MOST: i64 = 1000;

/// A token as a client gave it. It opens a sandbox to whoever has it, so it is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// Reads what has the form of a token.
    pub fn parse(text: &str) -> Option<Self> {
        let alphabet = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        (alphabet && text.len() == TOKEN_CHARS).then(|| Self(text.to_owned()))
    }

    /// The text, for the one answer that shows it.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// The id of the URL, which is no secret.
    pub fn id(&self) -> String {
        format!("{PREFIX}{}", self.0.get(..NAME_CHARS).unwrap_or_default())
    }

    fn hash(&self) -> blake3::Hash {
        blake3::Hash::from_bytes(blake3::derive_key("stasis 2026 presigned url token at rest", self.0.as_bytes()))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({})", self.id())
    }
}

/// A presigned URL without its token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PresignedUrl {
    /// `psu-…`.
    pub id: String,
    /// The sandbox it leads to.
    pub sandbox: SandboxId,
    /// The port it leads to.
    pub port: NonZeroU16,
    /// When it was made.
    pub created_at: UnixMs,
    /// From when on it leads nowhere.
    pub expires_at: UnixMs,
}

impl Journal {
    /// Makes one that is good for `life_ms`, and its token for the only time. `None` when the sandbox has [`MOST`] already. Forgets expired ones.
    pub fn create_presigned(
        &self,
        sandbox: &SandboxId,
        port: NonZeroU16,
        life_ms: i64,
        sources: &Sources,
    ) -> Result<Option<(PresignedUrl, Token)>, JournalError> {
        let token = Token(sources.word(TOKEN_CHARS));
        let created_at = sources.now_ms();
        let url = PresignedUrl {
            id: token.id(),
            sandbox: sandbox.clone(),
            port,
            created_at,
            expires_at: created_at.saturating_add(life_ms),
        };
        let connection = self.lock();
        connection
            .execute("DELETE FROM presigned_urls WHERE expires_at <= ?1", [created_at])
            .doing("forget expired presigned URLs")?;
        let count: i64 = connection
            .query_row("SELECT count(*) FROM presigned_urls WHERE sandbox = ?1", [sandbox.as_str()], |row| row.get(0))
            .doing("count presigned URLs")?;
        if count >= MOST {
            return Ok(None);
        }
        connection
            .execute(
                "INSERT INTO presigned_urls (id, sandbox, port, hash, created_at, expires_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                params![
                    url.id,
                    sandbox.as_str(),
                    port.get(),
                    token.hash().as_bytes().as_slice(),
                    created_at,
                    url.expires_at
                ],
            )
            .doing("store a presigned URL")?;
        Ok(Some((url, token)))
    }

    /// What the token opens at `now`; `None` when it was never made, has expired, or was deleted.
    pub fn presigned_of(&self, token: &Token, now: UnixMs) -> Result<Option<PresignedUrl>, JournalError> {
        let found = self
            .lock()
            .query_row(
                "SELECT sandbox, port, created_at, expires_at, hash FROM presigned_urls WHERE id = ?1",
                [token.id()],
                |row| {
                    let sandbox: String = row.get(0)?;
                    let port: u16 = row.get(1)?;
                    let hash: [u8; 32] = row.get(4)?;
                    Ok((sandbox, port, row.get(2)?, row.get(3)?, hash))
                },
            )
            .optional()
            .doing("look up a presigned URL")?;
        let Some((sandbox, port, created_at, expires_at, hash)) = found else { return Ok(None) };
        // blake3 compares its hashes in constant time.
        let genuine = token.hash() == blake3::Hash::from_bytes(hash);
        let url = SandboxId::parse(&sandbox).zip(NonZeroU16::new(port)).map(|(sandbox, port)| PresignedUrl {
            id: token.id(),
            sandbox,
            port,
            created_at,
            expires_at,
        });
        Ok(url.filter(|url| genuine && now < url.expires_at))
    }

    /// Forgets one of that sandbox's. False when it has none of that id.
    pub fn delete_presigned(&self, sandbox: &SandboxId, id: &str) -> Result<bool, JournalError> {
        self.lock()
            .execute("DELETE FROM presigned_urls WHERE id = ?1 AND sandbox = ?2", params![id, sandbox.as_str()])
            .doing("delete a presigned URL")
            .map(|n| n > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(port: u16) -> NonZeroU16 {
        NonZeroU16::new(port).unwrap()
    }

    #[test]
    fn a_token_opens_its_port_until_it_expires_or_is_deleted() {
        let (journal, sources) = (Journal::in_memory().unwrap(), Sources::system());
        let sandbox = SandboxId::parse("sbx-a").unwrap();
        let (url, token) = journal.create_presigned(&sandbox, port(8080), 5000, &sources).unwrap().unwrap();
        let now = url.created_at;
        assert_eq!(Token::parse(token.reveal()), Some(token.clone()));
        assert_eq!(journal.presigned_of(&token, now).unwrap().as_ref(), Some(&url));
        assert_eq!(journal.presigned_of(&token, now + 4999).unwrap().as_ref(), Some(&url));
        assert_eq!(journal.presigned_of(&token, now + 5000).unwrap(), None);
        // The right name with another secret, and another name.
        let mut other = token.reveal().to_owned();
        let last = if other.pop() == Some('a') { 'b' } else { 'a' };
        other.push(last);
        assert_eq!(journal.presigned_of(&Token::parse(&other).unwrap(), now).unwrap(), None);
        let stranger = Token::parse(&sources.word(TOKEN_CHARS)).unwrap();
        assert_eq!(journal.presigned_of(&stranger, now).unwrap(), None);
        assert!(!journal.delete_presigned(&SandboxId::parse("sbx-b").unwrap(), &url.id).unwrap());
        assert!(journal.delete_presigned(&sandbox, &url.id).unwrap());
        assert!(!journal.delete_presigned(&sandbox, &url.id).unwrap());
        assert_eq!(journal.presigned_of(&token, now).unwrap(), None);
    }

    #[test]
    fn tokens_are_neither_stored_nor_printed() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(&dir.path().join("journal.db")).unwrap();
        let sandbox = SandboxId::parse("sbx-a").unwrap();
        let (url, token) = journal.create_presigned(&sandbox, port(80), 5000, &Sources::system()).unwrap().unwrap();
        let secret = &token.reveal()[NAME_CHARS..];
        assert!(!format!("{token:?} {url:?}").contains(secret));
        drop(journal);
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            let content = std::fs::read(entry.unwrap().path()).unwrap();
            assert!(!content.windows(secret.len()).any(|w| w == secret.as_bytes()));
        }
    }

    #[test]
    fn a_sandbox_has_so_many_at_most_and_expired_ones_do_not_count() {
        let (journal, sources) = (Journal::in_memory().unwrap(), Sources::system());
        let sandbox = SandboxId::parse("sbx-a").unwrap();
        for _ in 0..10 {
            assert!(journal.create_presigned(&sandbox, port(80), 0, &sources).unwrap().is_some());
        }
        for _ in 0..MOST {
            assert!(journal.create_presigned(&sandbox, port(80), 3_600_000, &sources).unwrap().is_some());
        }
        assert!(journal.create_presigned(&sandbox, port(80), 3_600_000, &sources).unwrap().is_none());
        assert!(
            journal.create_presigned(&SandboxId::parse("sbx-b").unwrap(), port(80), 1, &sources).unwrap().is_some()
        );
    }

    #[test]
    fn what_is_no_token_does_not_parse() {
        for bad in ["", "sbx-a1", &"a".repeat(TOKEN_CHARS - 1), &"A".repeat(TOKEN_CHARS), &"-".repeat(TOKEN_CHARS)] {
            assert_eq!(Token::parse(bad), None, "{bad}");
        }
    }
}
