//! What one pass tells the next.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

const FORMAT: u16 = 1;
/// Candidates kept from one pass to the next. What does not fit is a candidate again at a later pass.
const MAX_CANDIDATES: usize = 500_000;

/// Milliseconds since the epoch by the clock of whoever runs the pass.
pub(super) type Ms = i64;

/// That something was seen unchanged since a time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sighting {
    /// What it was: a commit id, a tag.
    pub what: String,
    /// Since when.
    pub since: Ms,
}

/// What the passes over one tenant have seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    format: u16,
    /// Unreachable objects, and since when they are.
    pub candidates: BTreeMap<String, Ms>,
    /// Tombstones that name a manifest, by the key of the head: which commit, since when.
    pub tombstones: BTreeMap<String, Sighting>,
    /// Leases: which tag, since when.
    pub leases: BTreeMap<String, Sighting>,
}

/// Why a memory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A newer build wrote it.
    #[error("it is format version {0}; this build reads {FORMAT}")]
    Format(u16),
    /// It is no memory. Deleting it is safe: the grace of every candidate begins anew.
    #[error("it is malformed; deleting it is safe, the grace of everything unreachable begins anew")]
    Malformed(#[from] serde_json::Error),
}

impl Default for Memory {
    fn default() -> Self {
        Self { format: FORMAT, candidates: BTreeMap::new(), tombstones: BTreeMap::new(), leases: BTreeMap::new() }
    }
}

impl Memory {
    /// As it is stored.
    pub fn encode(&self) -> Result<Vec<u8>, MemoryError> {
        let mut bounded = self.clone();
        while bounded.candidates.len() > MAX_CANDIDATES {
            bounded.candidates.pop_last();
        }
        Ok(serde_json::to_vec(&bounded)?)
    }

    /// Reads what [`Memory::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, MemoryError> {
        #[derive(Deserialize)]
        struct Version {
            format: u16,
        }
        let Version { format } = serde_json::from_slice(bytes)?;
        if format != FORMAT {
            return Err(MemoryError::Format(format));
        }
        Ok(serde_json::from_slice(bytes)?)
    }

    /// Whether there is nothing to remember.
    pub fn is_empty(&self) -> bool {
        self.candidates.is_empty() && self.tombstones.is_empty() && self.leases.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comes_back_and_names_its_version() {
        let mut memory = Memory::default();
        memory.candidates.insert("v1/t/sandbox/s/1-1-0/manifest".into(), 7);
        memory.tombstones.insert("v1/t/sandbox/s/head".into(), Sighting { what: "ab".into(), since: 3 });
        let bytes = memory.encode().unwrap();
        assert_eq!(Memory::decode(&bytes).unwrap(), memory);
        assert!(matches!(Memory::decode(br#"{"format":2,"new":1}"#), Err(MemoryError::Format(2))));
        assert!(matches!(Memory::decode(b"{"), Err(MemoryError::Malformed(_))));
    }
}
