//! The names of objects in a bucket. One place, so that nobody else builds a key.
//!
//! ```text
//! v1/{tenant}/sandbox/{id}/head
//! v1/{tenant}/sandbox/{id}/{seq}-{epoch}-{commit}/manifest
//! v1/{tenant}/sandbox/{id}/{seq}-{epoch}-{commit}/pack/{n}
//! v1/{tenant}/snapshot/{id}/…      the same below it
//! v1/{tenant}/lease/{name}         what a writer has not committed yet (`gc`)
//! v1/template/{digest}/…
//! v1/gc/candidates/{tenant}        what the last pass of the collector found unreachable (`gc`)
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

/// What every key of `tenant` begins with, or of all tenants without one; ends with a slash.
pub fn tenant(tenant: Option<&str>) -> Result<String, BadName> {
    Ok(match tenant {
        Some(tenant) => format!("v1/{}/", name(tenant)?),
        None => "v1/".to_owned(),
    })
}

/// What every sandbox key of `tenant` begins with; ends with a slash.
pub fn sandboxes(tenant: &str) -> Result<String, BadName> {
    Ok(format!("v1/{}/sandbox/", name(tenant)?))
}

/// What every lease of `tenant` begins with; ends with a slash.
pub fn leases(tenant: &str) -> Result<String, BadName> {
    Ok(format!("v1/{}/lease/", name(tenant)?))
}

/// The lease `lease` of `tenant`.
pub fn lease(tenant: &str, lease: &str) -> Result<String, BadName> {
    Ok(format!("{}{}", leases(tenant)?, name(lease)?))
}

/// What the collector remembers of `tenant` from pass to pass.
pub fn candidates(tenant: &str) -> Result<String, BadName> {
    Ok(format!("v1/gc/candidates/{}", name(tenant)?))
}

/// What a key of a sandbox or of a named snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place<'a> {
    /// Whose.
    pub tenant: &'a str,
    /// Of a sandbox; of a named snapshot otherwise.
    pub of_sandbox: bool,
    /// Its id.
    pub id: &'a str,
    /// [`Owner::prefix`].
    pub owner: &'a str,
    /// Which of its objects.
    pub part: Part<'a>,
}

/// Which object of an owner a key names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part<'a> {
    /// The head.
    Head,
    /// An object of a generation.
    Generation {
        /// Which commit.
        seq: u64,
        /// Which owner.
        epoch: u64,
        /// [`Generation::prefix`].
        generation: &'a str,
        /// It is the manifest.
        manifest: bool,
    },
    /// Nothing that this build knows.
    Other,
}

impl<'a> Place<'a> {
    /// Reads a key; `None` when it is not below a sandbox or a named snapshot.
    pub fn of(key: &'a str) -> Option<Self> {
        let mut parts = key.splitn(5, '/');
        let (version, tenant, kind) = (parts.next()?, parts.next()?, parts.next()?);
        let (id, rest) = (parts.next()?, parts.next()?);
        let known =
            version == "v1" && matches!(kind, "sandbox" | "snapshot") && name(tenant).is_ok() && name(id).is_ok();
        known.then(|| Self {
            tenant,
            of_sandbox: kind == "sandbox",
            id,
            owner: &key[..key.len() - rest.len()],
            part: if rest == "head" { Part::Head } else { Part::below(key, rest).unwrap_or(Part::Other) },
        })
    }
}

impl<'a> Part<'a> {
    fn below(key: &'a str, rest: &'a str) -> Option<Self> {
        let (generation, object) = rest.split_once('/')?;
        let mut numbers = generation.splitn(3, '-');
        let (seq, epoch) = (numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?);
        numbers.next()?.parse::<CommitId>().ok()?;
        Some(Self::Generation {
            seq,
            epoch,
            generation: &key[..key.len() - object.len()],
            manifest: object == "manifest",
        })
    }
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
    fn keys_are_read_back() {
        for (owner, of_sandbox) in
            [(Owner::sandbox("acme", "x").unwrap(), true), (Owner::snapshot("acme", "x").unwrap(), false)]
        {
            let generation = owner.generation(3, 2, CommitId([0xab; 16]));
            let head = owner.head();
            let place = Place::of(&head).unwrap();
            assert_eq!(
                (place.tenant, place.id, place.of_sandbox, place.owner, place.part),
                ("acme", "x", of_sandbox, owner.prefix(), Part::Head)
            );
            for (key, is_manifest) in [(generation.manifest(), true), (generation.pack(12), false)] {
                let expected =
                    Part::Generation { seq: 3, epoch: 2, generation: generation.prefix(), manifest: is_manifest };
                assert_eq!(Place::of(&key).unwrap().part, expected);
            }
            for other in ["3-2-ab/manifest", "manifest", "x/y", "3-2-/pack/1", "head/x"] {
                assert_eq!(Place::of(&format!("{}{other}", owner.prefix())).unwrap().part, Part::Other, "{other}");
            }
        }
        for outside in [
            "v1/template/ab/rootfs",
            "v1/acme/lease/x",
            "v1/gc/candidates/acme",
            "v1/acme/sandbox/x",
            "v2/a/sandbox/b/head",
            "",
        ] {
            assert_eq!(Place::of(outside), None, "{outside}");
        }
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
