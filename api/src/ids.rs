//! Ids of sandboxes. They are DNS labels (`<id>.<domain>`, `<id>-<port>.<domain>`), unique without coordination, and never reused.

use crate::sources::Sources;
use serde::{Deserialize, Serialize};
use std::fmt;

/// `sbx-` and 20 characters of `a-z0-9` (103 random bits).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(inline)]
pub struct SandboxId(String);

const PREFIX: &str = "sbx-";
const RANDOM_CHARS: usize = 20;
/// A label has 63 octets, and `-65535` must still fit behind the id.
const MAX_LEN: usize = 57;

impl SandboxId {
    /// A new one.
    pub fn new(sources: &Sources) -> Self {
        loop {
            // `-<digits>` at the end would read as a port in a host name.
            if let Some(id) = Self::parse(&format!("{PREFIX}{}", sources.word(RANDOM_CHARS))) {
                return id;
            }
        }
    }

    /// Reads one; `None` when it cannot be an id of ours. Ids are path components in stores and run directories, so nothing else may pass.
    pub fn parse(text: &str) -> Option<Self> {
        let word = text.strip_prefix(PREFIX)?;
        let alphabet = word.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let port_like = word.bytes().all(|b| b.is_ascii_digit());
        (alphabet && !port_like && text.len() <= MAX_LEN).then(|| Self(text.to_owned()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for SandboxId {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text).ok_or_else(|| format!("{text:?} is not a sandbox id"))
    }
}

impl From<SandboxId> for String {
    fn from(id: SandboxId) -> Self {
        id.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_ids_parse_and_differ() {
        let sources = Sources::system();
        let (a, b) = (SandboxId::new(&sources), SandboxId::new(&sources));
        assert_ne!(a, b);
        assert_eq!(SandboxId::parse(a.as_str()), Some(a));
    }

    #[test]
    fn what_is_not_an_id_does_not_parse() {
        for bad in ["", "sbx-", "sbx-123", "sbx-A1", "sbx-a/b", "sbx-..", "sbx-a-1", "snap-abc", "sbx-a\n"] {
            assert_eq!(SandboxId::parse(bad), None, "{bad:?}");
        }
        assert_eq!(SandboxId::parse(&format!("sbx-{}", "a".repeat(54))), None);
        assert!(SandboxId::parse("sbx-abc123").is_some());
    }
}
