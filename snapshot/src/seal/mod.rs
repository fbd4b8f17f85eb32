//! Seals: what makes a bucket readable and writable by the operator alone. Everything in it is untrusted input until a seal says otherwise.
//!
//! | file | what |
//! | --- | --- |
//! | `operator` | [`OperatorKey`], from which the keys of everything else are derived; its file |
//! | `data` | [`DataKey`]: what frames and states are encrypted with; wrapped under an operator's key wherever it is stored |
//! | `frames` | [`PackCipher`]: the frames of one pack |
//! | `object` | the envelope of a manifest: a MAC, and the wrapped keys of the packs that it names |
//! | `head` | the envelope of a head |
//! | `cipher` | AES-256-GCM |
//! | `bytes` | short secrets in records: any bytes, bound to a purpose and a place |
//! | [`rotate`] | moves a bucket from old operator's keys to the current one |
//!
//! # Keys
//!
//! ```text
//! operator's key ─┬─ MAC of manifests      (keyed BLAKE3)
//!  (32 bytes,     ├─ MAC of heads          (keyed BLAKE3)
//!   a file)       ├─ short secrets         (AES-256-GCM, random nonces)
//!                 └─ wrapping ─ data key ─┬─ one key a pack, by its store key: frame n under nonce n
//!                     (AES-256-GCM,       └─ one key a state, by a random salt: under nonce 0
//!                      random nonces)
//! ```
//!
//! Derivation is BLAKE3's, each with a context of its own. Nonces never repeat under a key: a pack's name holds the commit id (128 random
//! bits) and its number, no name is ever granted twice, and what is sent again is the same bytes.
//!
//! # Who holds what
//!
//! The supervisor holds the operator's keys. A VMM is handed the data keys that its sandbox needs, never an operator's key. Keys are
//! overwritten when they are let go, and print as nothing.
//!
//! # Places
//!
//! A seal names the place that its object was made for: the store key, which holds tenant, sandbox or snapshot, seq, epoch and commit id. An
//! object that was moved is refused by name: [`SealError::Replayed`] where it is the owner's own older one, [`SealError::Swapped`] otherwise.

mod bytes;
mod cipher;
mod data;
mod frames;
mod head;
mod object;
mod operator;
pub mod rotate;

pub use cipher::TAG;
pub use data::{DataKey, DataKeyId, DataKeys, SealedState, WrappedKey};
pub use frames::{FrameInfo, PackCipher};
pub use head::sealed_under as head_sealed_under;
pub use object::{Opened, sealed_under as manifest_sealed_under};
pub use operator::{KeyFileError, KeyId, OperatorKey};

pub(crate) use head::split as split_head;
pub(crate) use object::{SEALED_VERSION, split as split_manifest};

use crate::layout::{Part, Place};

/// Why an object is not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum SealError {
    #[error("it is not sealed, and unsealed objects are not accepted here (seal.accept_unsealed)")]
    NotSealed,
    #[error(
        "it was sealed under the operator's key {key}, which is not configured ({configured}): without that key it cannot be read"
    )]
    KeyUnknown { key: KeyId, configured: String },
    #[error("it is truncated: {got} bytes, expected {expected}")]
    Truncated { got: u64, expected: u64 },
    #[error("it was tampered with: its seal does not match")]
    Tampered,
    #[error("it was replayed: it is an older one of the same owner, sealed as {of:?}")]
    Replayed { of: String },
    #[error("it was swapped: it belongs elsewhere, sealed as {of:?}")]
    Swapped { of: String },
    #[error("its seal is malformed: {0}")]
    Malformed(&'static str),
    #[error("the data key {0} was not stored with it")]
    NoDataKey(DataKeyId),
    #[error("the wrapped data key {0} does not open: it was tampered with")]
    Wrapped(DataKeyId),
    #[error("the sealed bytes do not open: they were tampered with, or belong elsewhere")]
    Bytes,
}

/// What an operator has configured: keys to seal with and to open with, and whether what has no seal is accepted.
#[derive(Debug)]
pub struct Seals {
    /// The current key first.
    keys: Vec<OperatorKey>,
    accept_unsealed: bool,
}

impl Seals {
    /// Seals with `current`; opens what was sealed under it or under one of `old`.
    pub fn new(current: OperatorKey, old: Vec<OperatorKey>, accept_unsealed: bool) -> Self {
        let mut keys = vec![current];
        for key in old {
            if keys.iter().all(|known| known.id() != key.id()) {
                keys.push(key);
            }
        }
        Self { keys, accept_unsealed }
    }

    /// No keys: nothing is sealed, and what is sealed is refused.
    pub fn none() -> Self {
        Self { keys: Vec::new(), accept_unsealed: true }
    }

    /// Whether there are keys.
    pub fn is_on(&self) -> bool {
        !self.keys.is_empty()
    }

    /// The id of the key that seals.
    pub fn current(&self) -> Option<KeyId> {
        self.keys.first().map(OperatorKey::id)
    }

    /// The ids of all keys, the current one first.
    pub fn ids(&self) -> impl Iterator<Item = KeyId> {
        self.keys.iter().map(OperatorKey::id)
    }

    fn key(&self, id: KeyId) -> Result<&OperatorKey, SealError> {
        self.keys.iter().find(|key| key.id() == id).ok_or_else(|| {
            let ids: Vec<String> = self.ids().map(|id| id.to_string()).collect();
            let configured =
                if ids.is_empty() { "no key is".to_owned() } else { format!("only {} is", ids.join(", ")) };
            SealError::KeyUnknown { key: id, configured }
        })
    }

    fn unsealed<T>(&self, object: T) -> Result<T, SealError> {
        if self.accept_unsealed { Ok(object) } else { Err(SealError::NotSealed) }
    }

    /// Wraps a data key under the current key. `nonce` is random. `None` without keys.
    pub fn wrap(&self, key: &DataKey, nonce: [u8; 12]) -> Option<WrappedKey> {
        self.keys.first().map(|operator| operator.wrap(key, nonce))
    }

    /// Unwraps a data key.
    pub fn unwrap(&self, wrapped: &WrappedKey) -> Result<DataKey, SealError> {
        self.key(wrapped.under)?.unwrap(wrapped)
    }

    /// Unwraps all of them.
    pub fn unwrap_all(&self, wrapped: &[WrappedKey]) -> Result<DataKeys, SealError> {
        wrapped.iter().map(|wrapped| self.unwrap(wrapped)).collect::<Result<Vec<_>, _>>().map(DataKeys::new)
    }
}

/// Why an authentic object is not the one for `place`.
fn misplaced(place: &str, of: &str) -> SealError {
    let older = match (Place::of(place), Place::of(of)) {
        (Some(wanted), Some(found)) if wanted.owner == found.owner => match (wanted.part, found.part) {
            (
                Part::Generation { seq, epoch, manifest: true, .. },
                Part::Generation { seq: of_seq, epoch: of_epoch, manifest: true, .. },
            ) => (of_epoch, of_seq) <= (epoch, seq),
            _ => false,
        },
        _ => false,
    };
    let of = of.to_owned();
    if older { SealError::Replayed { of } } else { SealError::Swapped { of } }
}

#[cfg(test)]
mod tests;
