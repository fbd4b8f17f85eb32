//! The names of objects in a bucket. One place, so that nobody else builds a key.
//!
//! ```text
//! v1/{tenant}/sandbox/{id}/head
//! v1/{tenant}/sandbox/{id}/{seq}-{epoch}-{commit}/manifest
//! v1/{tenant}/sandbox/{id}/{seq}-{epoch}-{commit}/pack/{n}
//! v1/{tenant}/snapshot/{id}/…      the same below it
//! v1/template/{digest}/…
//! ```

use crate::ids::{CommitId, Digest};

/// Whose heads and generations: a sandbox's, a named snapshot's or a template's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    prefix: String,
}

/// One generation: the objects that one commit writes. Its name holds the commit id, so two writers never share one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation {
    prefix: String,
}

/// A tenant or an id that may not be part of a key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} cannot be part of an object key: use 1 to 128 letters, digits, '-' and '_'")]
pub struct BadName(pub String);

fn name(text: &str) -> Result<&str, BadName> {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || c == b'-' || c == b'_';
    if (1..=128).contains(&text.len()) && text.bytes().all(allowed) { Ok(text) } else { Err(BadName(text.to_owned())) }
}

impl Owner {
    /// The sandbox `id` of `tenant`.
    pub fn sandbox(tenant: &str, id: &str) -> Result<Self, BadName> {
        Ok(Self { prefix: format!("v1/{}/sandbox/{}/", name(tenant)?, name(id)?) })
    }

    /// The named snapshot `id` of `tenant`.
    pub fn snapshot(tenant: &str, id: &str) -> Result<Self, BadName> {
        Ok(Self { prefix: format!("v1/{}/snapshot/{}/", name(tenant)?, name(id)?) })
    }

    /// The booted template of this shape: no head, one manifest beside its generations.
    pub fn template(digest: Digest) -> Self {
        Self { prefix: template(digest) }
    }

    /// What every key of this owner begins with; ends with a slash.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The head's key.
    pub fn head(&self) -> String {
        format!("{}head", self.prefix)
    }

    /// The generation that commit `commit` writes.
    pub fn generation(&self, seq: u64, epoch: u64, commit: CommitId) -> Generation {
        Generation { prefix: format!("{}{seq}-{epoch}-{commit}/", self.prefix) }
    }
}

impl Generation {
    /// What every key of this generation begins with; ends with a slash.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The manifest's key.
    pub fn manifest(&self) -> String {
        format!("{}manifest", self.prefix)
    }

    /// The key of pack `n`.
    pub fn pack(&self, n: u32) -> String {
        format!("{}pack/{n}", self.prefix)
    }
}

/// What every sandbox key of `tenant` begins with; ends with a slash.
pub fn sandboxes(tenant: &str) -> Result<String, BadName> {
    Ok(format!("v1/{}/sandbox/", name(tenant)?))
}

/// What every key of the template begins with; ends with a slash.
pub fn template(digest: Digest) -> String {
    format!("v1/template/{digest}/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_as_documented() {
        let owner = Owner::sandbox("acme", "sb-1").unwrap();
        assert_eq!(owner.head(), "v1/acme/sandbox/sb-1/head");
        let generation = owner.generation(3, 2, CommitId([0xab; 16]));
        let commit = "ab".repeat(16);
        assert_eq!(generation.manifest(), format!("v1/acme/sandbox/sb-1/3-2-{commit}/manifest"));
        assert_eq!(generation.pack(7), format!("v1/acme/sandbox/sb-1/3-2-{commit}/pack/7"));
        assert_eq!(Owner::snapshot("acme", "s").unwrap().prefix(), "v1/acme/snapshot/s/");
        assert_eq!(Owner::template(Digest([1; 32])).prefix(), template(Digest([1; 32])));
    }

    #[test]
    fn names_that_would_leave_their_place_are_refused() {
        for bad in ["", "..", ".", "a/b", "a b", "é", "a\0", &"x".repeat(129)] {
            assert_eq!(Owner::sandbox("t", bad), Err(BadName(bad.to_owned())));
            assert_eq!(Owner::sandbox(bad, "s"), Err(BadName(bad.to_owned())));
            assert!(sandboxes(bad).is_err());
        }
    }
}
