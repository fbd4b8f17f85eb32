//! The operator's key: 32 random bytes in a file, and the keys that are derived from it. The bytes themselves are not kept.

use std::{fmt, str::FromStr};

use zeroize::Zeroizing;

use super::{DataKey, SealError, TAG, WrappedKey, cipher::Cipher};
use crate::ids::BadHex;

/// What the file begins with.
const FILE_WORD: &str = "stasis-operator-key-1";

/// Names an operator's key: derived from it, so that a key cannot go by another one's name.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyId(pub(super) [u8; 8]);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for KeyId {
    type Err = BadHex;

    fn from_str(text: &str) -> Result<Self, BadHex> {
        crate::ids::parse_hex(text).map(Self)
    }
}

/// Why a text is no operator's key. The text itself is in no message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyFileError {
    /// It is something else.
    #[error("it is no operator's key: one line, \"{FILE_WORD}\" and 64 hex digits, is expected")]
    Form,
}

/// One operator's key.
pub struct OperatorKey {
    id: KeyId,
    pub(super) manifest_mac: Zeroizing<[u8; 32]>,
    pub(super) head_mac: Zeroizing<[u8; 32]>,
    wrapping: Cipher,
    pub(super) bytes: Cipher,
}

impl fmt::Debug for OperatorKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OperatorKey({})", self.id)
    }
}

impl OperatorKey {
    /// From 32 random bytes.
    pub fn new(secret: &[u8; 32]) -> Self {
        let derive = |context| Zeroizing::new(blake3::derive_key(context, secret));
        let mut id = [0; 8];
        id.copy_from_slice(&derive("stasis 2026 snapshot seal: id of an operator's key")[..8]);
        Self {
            id: KeyId(id),
            manifest_mac: derive("stasis 2026 snapshot seal: MAC of manifests"),
            head_mac: derive("stasis 2026 snapshot seal: MAC of heads"),
            wrapping: Cipher::new(&derive("stasis 2026 snapshot seal: wrapping of data keys")),
            bytes: Cipher::new(&derive("stasis 2026 snapshot seal: short secrets")),
        }
    }

    /// Reads the text of a key file.
    pub fn parse(text: &str) -> Result<Self, KeyFileError> {
        let line = text.strip_suffix('\n').unwrap_or(text);
        let hex = line.strip_prefix(FILE_WORD).and_then(|rest| rest.strip_prefix(' ')).ok_or(KeyFileError::Form)?;
        let secret = Zeroizing::new(crate::ids::parse_hex::<32>(hex).map_err(|_| KeyFileError::Form)?);
        Ok(Self::new(&secret))
    }

    /// The text of a key file.
    pub fn file_text(secret: &[u8; 32]) -> Zeroizing<String> {
        let mut text = Zeroizing::new(String::with_capacity(FILE_WORD.len() + 66));
        text.push_str(FILE_WORD);
        text.push(' ');
        for byte in secret {
            for digit in [byte >> 4, byte & 15] {
                text.push(char::from_digit(digit.into(), 16).unwrap_or('0'));
            }
        }
        text.push('\n');
        text
    }

    /// Its id.
    pub fn id(&self) -> KeyId {
        self.id
    }

    pub(super) fn wrap(&self, key: &DataKey, nonce: [u8; 12]) -> WrappedKey {
        let mut text = Zeroizing::new(*key.secret);
        let tag = self.wrapping.seal(nonce, &key.id().0, &mut text[..]);
        let mut sealed = [0; 32 + TAG];
        sealed[..32].copy_from_slice(&text[..]);
        sealed[32..].copy_from_slice(&tag);
        WrappedKey { id: key.id(), under: self.id, nonce, sealed }
    }

    pub(super) fn unwrap(&self, wrapped: &WrappedKey) -> Result<DataKey, SealError> {
        let failed = SealError::Wrapped(wrapped.id);
        let (text, tag) = wrapped.sealed.split_last_chunk::<TAG>().ok_or(failed.clone())?;
        let mut secret = Zeroizing::new([0; 32]);
        self.wrapping.open(wrapped.nonce, &wrapped.id.0, text, tag, &mut secret[..]).ok_or(failed)?;
        Ok(DataKey::new(wrapped.id, &secret))
    }
}
