//! The head's body, and the rules that every new one obeys.

use serde::{Deserialize, Serialize};

use crate::{ids::CommitId, manifest::ManifestRef, store::ETag};

/// The head format this build writes and reads.
const FORMAT: u16 = 1;
/// Ancestors a head names beyond its parent.
pub const MAX_ANCESTORS: usize = 30;
/// Bytes of a head at most.
pub const MAX_LEN: usize = 1 << 20;

/// What may be done with the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeadState {
    /// The owner may have a guest running.
    Live,
    /// Nobody runs a guest; the manifest is the whole sandbox. Anyone may claim it.
    Paused,
    /// Nobody runs a guest and there is no memory to go on from. Anyone may claim it.
    Stopped,
    /// A tombstone: nothing follows it.
    Deleted,
}

/// The body of a head.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// Head format version.
    pub format: u16,
    /// Sandbox id.
    pub sandbox: String,
    /// State.
    pub state: HeadState,
    /// Which owner, from 1; rises with every claim.
    pub epoch: u64,
    /// The owner's name: where to forward requests to. Changes only with the epoch.
    pub owner: String,
    /// Which commit, from 1.
    pub seq: u64,
    /// This commit.
    pub commit: CommitId,
    /// The commit it was built on.
    pub parent: Option<CommitId>,
    /// The commits before the parent, newest first, at most [`MAX_ANCESTORS`].
    #[serde(default)]
    pub ancestors: Vec<CommitId>,
    /// The newest manifest, while there is one. A live sandbox keeps the one it was resumed from.
    pub manifest: Option<ManifestRef>,
    /// The sandbox's record: the supervisor's type.
    pub record: serde_json::Value,
}

/// A head as it was read or written, with its tag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Current {
    /// The body.
    pub head: Head,
    /// Its tag.
    pub etag: ETag,
}

/// A rule that a new head would break.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum Rule {
    #[error("the head is for sandbox {0:?}")]
    Sandbox(String),
    #[error("seq must be {expected}, not {got}")]
    Seq { expected: u64, got: u64 },
    #[error("the parent must be the current commit, and the ancestors those before it")]
    Parent,
    #[error("the commit id was used before")]
    CommitId,
    #[error("epoch {got} after {current}: it stays, or rises by one with a claim")]
    Epoch { current: u64, got: u64 },
    #[error("the owner changes only with the epoch")]
    Owner,
    #[error("only a claim (epoch + 1) makes a sandbox that is at rest live")]
    Wake,
    #[error("a claim leaves the sandbox live or deleted")]
    Claim,
    #[error("a paused sandbox needs a manifest")]
    NoManifest,
    #[error("a tombstone is final")]
    Deleted,
}

/// Why bytes are no head.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum HeadError {
    #[error("head of {0} bytes: at most {MAX_LEN}")]
    TooLarge(usize),
    #[error("head is format version {0}; this build reads {FORMAT}")]
    Format(u16),
    #[error("head is malformed")]
    Malformed(#[source] serde_json::Error),
    #[error("head breaks a rule")]
    Rule(#[source] Rule),
}

impl Head {
    /// The body as it is stored: JSON, for people too.
    pub fn encode(&self) -> Result<String, HeadError> {
        todo!()
    }

    /// Reads a body.
    pub fn decode(bytes: &[u8]) -> Result<Self, HeadError> {
        let _ = bytes;
        todo!()
    }
}

/// Whether `new` may follow `current` (`None`: there is no head yet). Checked before every PUT.
pub fn validate(new: &Head, current: Option<&Head>) -> Result<(), Rule> {
    let _ = (new, current);
    todo!()
}
