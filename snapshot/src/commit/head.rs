//! The head's body, and the rules that every new one obeys.

use serde::{Deserialize, Serialize};

use crate::{
    ids::CommitId,
    manifest::ManifestRef,
    seal::{self, SealError},
    store::ETag,
};

/// The head format this build writes and reads.
const FORMAT: u16 = 1;
/// Ancestors a head names beyond its parent.
pub const MAX_ANCESTORS: usize = 14;
/// What seq and epoch may be: what JSON readers take for an integer, and one more never overflows.
const NUMBERS: std::ops::RangeInclusive<u64> = 1..=1 << 53;
/// Bytes of a head at most.
const MAX_LEN: usize = 1 << 20;
/// Bytes that an envelope takes beside the head, generously.
const ENVELOPE: usize = 4096;

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
    /// A tombstone. While it names a manifest the sandbox can be put back; one that names none is final.
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
    #[error("seq and epoch are numbers from 1 to 2^53")]
    Number,
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
    #[error("a tombstone is final, but for being put back (at rest, epoch + 1) or purged while it names a manifest")]
    Deleted,
    #[error("only a deleted sandbox can be put back")]
    NotDeleted,
    #[error("the sandbox is live: only one at rest can be claimed")]
    NotAtRest,
    #[error("a cancel commit needs the head that the cancelled one was built on")]
    NotItsBase,
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
    #[error(transparent)]
    Seal(#[from] SealError),
}

impl Head {
    /// The body as it is stored: JSON, for people too.
    pub fn encode(&self) -> Result<String, HeadError> {
        let body = serde_json::to_string_pretty(self).map_err(HeadError::Malformed)?;
        if body.len() > MAX_LEN {
            return Err(HeadError::TooLarge(body.len()));
        }
        Ok(body)
    }

    /// Bytes that [`Head::decode`] allocates at most at one time for an input of `len` bytes: the record is a tree of JSON values.
    pub const fn decode_bound(len: usize) -> usize {
        let read = if len > MAX_LEN + ENVELOPE { 0 } else { len };
        (16 << 10) + 128 * read
    }

    /// Reads a body, out of its envelope if it has one, whose MAC is not looked at: see [`Seals::open_head`](crate::seal::Seals::open_head).
    pub fn decode(bytes: &[u8]) -> Result<Self, HeadError> {
        #[derive(Deserialize)]
        struct Version {
            format: u16,
        }
        if bytes.len() > MAX_LEN + ENVELOPE {
            return Err(HeadError::TooLarge(bytes.len()));
        }
        let bytes = seal::split_head(bytes)?.map_or(bytes, |split| split.body);
        if bytes.len() > MAX_LEN {
            return Err(HeadError::TooLarge(bytes.len()));
        }
        let head: Self = serde_json::from_slice(bytes).map_err(|error| {
            // Another version may have other fields: say that, not which field is strange.
            match serde_json::from_slice::<Version>(bytes) {
                Ok(Version { format }) if format != FORMAT => HeadError::Format(format),
                _ => HeadError::Malformed(error),
            }
        })?;
        if head.format != FORMAT {
            return Err(HeadError::Format(head.format));
        }
        head.check().map_err(HeadError::Rule)?;
        Ok(head)
    }

    /// What holds of every head by itself.
    fn check(&self) -> Result<(), Rule> {
        if self.state == HeadState::Paused && self.manifest.is_none() {
            return Err(Rule::NoManifest);
        }
        if ![self.seq, self.epoch].iter().all(|n| NUMBERS.contains(n)) {
            return Err(Rule::Number);
        }
        let before = usize::from(self.parent.is_some()) + self.ancestors.len();
        let expected = usize::try_from(self.seq - 1).unwrap_or(usize::MAX).min(1 + MAX_ANCESTORS);
        if before != expected || (self.parent.is_none() && before > 0) {
            return Err(Rule::Parent);
        }
        Ok(())
    }

    /// This commit and those before it, newest first, as far back as the head names them.
    pub(super) fn chain(&self) -> impl Iterator<Item = CommitId> {
        std::iter::once(self.commit).chain(self.parent).chain(self.ancestors.iter().copied())
    }

    /// The format version that new heads have.
    pub(super) const fn format() -> u16 {
        FORMAT
    }
}

impl HeadState {
    /// Whether nobody runs a guest and a claim may make it live.
    pub fn at_rest(self) -> bool {
        match self {
            Self::Paused | Self::Stopped => true,
            Self::Live | Self::Deleted => false,
        }
    }
}

/// Whether `new` may follow `current` (`None`: there is no head yet). Checked before every PUT.
pub fn validate(new: &Head, current: Option<&Head>) -> Result<(), Rule> {
    new.check()?;
    let Some(current) = current else {
        return if new.seq == 1 { Ok(()) } else { Err(Rule::Seq { expected: 1, got: new.seq }) };
    };
    if new.sandbox != current.sandbox {
        return Err(Rule::Sandbox(current.sandbox.clone()));
    }
    if new.seq != current.seq + 1 {
        return Err(Rule::Seq { expected: current.seq + 1, got: new.seq });
    }
    if current.chain().any(|commit| commit == new.commit) {
        return Err(Rule::CommitId);
    }
    if !new.chain().skip(1).eq(current.chain().take(1 + MAX_ANCESTORS)) {
        return Err(Rule::Parent);
    }
    if current.state == HeadState::Deleted {
        let purged = new.state == HeadState::Deleted
            && new.manifest.is_none()
            && new.epoch == current.epoch
            && new.owner == current.owner;
        let put_back = new.state.at_rest() && new.manifest == current.manifest && new.epoch == current.epoch + 1;
        return if current.manifest.is_some() && (purged || put_back) { Ok(()) } else { Err(Rule::Deleted) };
    }
    if new.epoch == current.epoch {
        if new.owner != current.owner {
            return Err(Rule::Owner);
        }
        if current.state.at_rest() && new.state == HeadState::Live {
            return Err(Rule::Wake);
        }
    } else if new.epoch == current.epoch + 1 {
        if new.state.at_rest() {
            return Err(Rule::Claim);
        }
    } else {
        return Err(Rule::Epoch { current: current.epoch, got: new.epoch });
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::ids::Digest;

    pub(in crate::commit) fn head(state: HeadState) -> Head {
        Head {
            format: FORMAT,
            sandbox: "sb".into(),
            state,
            epoch: 3,
            owner: "host-a".into(),
            seq: 2,
            commit: CommitId([2; 16]),
            parent: Some(CommitId([1; 16])),
            ancestors: vec![],
            manifest: Some(ManifestRef { key: "m".into(), digest: Digest([7; 32]) }),
            record: serde_json::json!({"name": "x"}),
        }
    }

    fn after(current: &Head, state: HeadState) -> Head {
        Head {
            state,
            seq: 3,
            commit: CommitId([3; 16]),
            parent: Some(current.commit),
            ancestors: vec![CommitId([1; 16])],
            ..current.clone()
        }
    }

    #[test]
    fn comes_back_and_is_strict() {
        let head = head(HeadState::Paused);
        let body = head.encode().unwrap();
        assert_eq!(Head::decode(body.as_bytes()).unwrap(), head);
        let spoiled = |from: &str, to: &str| Head::decode(body.replace(from, to).as_bytes());
        assert!(matches!(spoiled("\"format\": 1", "\"format\": 9"), Err(HeadError::Format(9))));
        assert!(matches!(spoiled("\"seq\": 2", "\"seq\": 2, \"x\": 1"), Err(HeadError::Malformed(_))));
        assert!(matches!(spoiled("\"seq\": 2", "\"seq\": 3"), Err(HeadError::Rule(Rule::Parent))));
        for len in 0..body.len() {
            assert!(Head::decode(&body.as_bytes()[..len]).is_err());
        }
        let huge = vec![b' '; MAX_LEN + 1];
        assert!(matches!(Head::decode(&huge), Err(HeadError::TooLarge(_))));
    }

    #[test]
    fn each_rule_is_enforced() {
        use HeadState::{Deleted, Live, Paused, Stopped};
        type Spoil = fn(&mut Head);
        let live = head(Live);
        let paused = head(Paused);
        let cases: [(&Head, HeadState, Spoil, Result<(), Rule>); 16] = [
            (&live, Paused, |_| (), Ok(())),
            (&live, Stopped, |h| h.manifest = None, Ok(())),
            (&live, Deleted, |_| (), Ok(())),
            (&paused, Paused, |_| (), Ok(())),
            (&paused, Live, |h| h.epoch = 4, Ok(())),
            (
                &paused,
                Live,
                |h| {
                    h.epoch = 4;
                    h.owner = "host-b".into();
                },
                Ok(()),
            ),
            (&paused, Live, |_| (), Err(Rule::Wake)),
            (&live, Paused, |h| h.epoch = 4, Err(Rule::Claim)),
            (&live, Live, |h| h.owner = "b".into(), Err(Rule::Owner)),
            (&live, Live, |h| h.epoch = 5, Err(Rule::Epoch { current: 3, got: 5 })),
            (&live, Live, |h| h.epoch = 2, Err(Rule::Epoch { current: 3, got: 2 })),
            (&live, Paused, |h| h.manifest = None, Err(Rule::NoManifest)),
            (&live, Live, |h| h.sandbox = "other".into(), Err(Rule::Sandbox("sb".into()))),
            (&live, Live, |h| h.commit = CommitId([1; 16]), Err(Rule::CommitId)),
            (&live, Live, |h| h.parent = Some(CommitId([9; 16])), Err(Rule::Parent)),
            (&live, Live, |h| h.ancestors.clear(), Err(Rule::Parent)),
        ];
        for (n, (current, state, spoil, expected)) in cases.into_iter().enumerate() {
            let mut new = after(current, state);
            spoil(&mut new);
            assert_eq!(validate(&new, Some(current)), expected, "case {n}");
        }
        let tombstone = head(Deleted);
        let follows = |state, epoch, manifest: bool| {
            let mut new = Head { epoch, ..after(&tombstone, state) };
            new.manifest = new.manifest.filter(|_| manifest);
            validate(&new, Some(&tombstone))
        };
        assert_eq!(follows(Paused, 4, true), Ok(()));
        assert_eq!(follows(Stopped, 4, true), Ok(()));
        assert_eq!(follows(Deleted, 3, false), Ok(()));
        for (state, epoch, manifest) in [
            (Live, 4, true),
            (Live, 3, true),
            (Paused, 3, true),
            (Stopped, 3, true),
            (Deleted, 3, true),
            (Deleted, 4, false),
        ] {
            assert_eq!(follows(state, epoch, manifest), Err(Rule::Deleted), "{state:?} {epoch} {manifest}");
        }
        let purged = Head { manifest: None, ..tombstone };
        let back = Head {
            epoch: 4,
            manifest: Some(ManifestRef { key: "m".into(), digest: Digest([7; 32]) }),
            ..after(&purged, Paused)
        };
        assert_eq!(validate(&back, Some(&purged)), Err(Rule::Deleted));
        let mut first = head(Live);
        assert!(validate(&first, None).is_err());
        first.seq = 1;
        first.parent = None;
        assert_eq!(validate(&first, None), Ok(()));
    }
}
