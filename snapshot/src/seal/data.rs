//! Data keys: what the frames and states of a sandbox are encrypted with.

use std::{collections::HashMap, fmt};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use zeroize::{Zeroize as _, Zeroizing};

use super::{KeyId, SealError, TAG, cipher::Cipher};
use crate::ids::{CommitId, parse_hex};

/// Names a data key: 128 random bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DataKeyId(pub [u8; 16]);

impl fmt::Display for DataKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        CommitId(self.0).fmt(f)
    }
}

impl fmt::Debug for DataKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        CommitId(self.0).fmt(f)
    }
}

/// A data key. Its JSON, in which a VMM gets it, is the only form that shows it.
#[derive(Clone)]
pub struct DataKey {
    id: DataKeyId,
    pub(super) secret: Zeroizing<[u8; 32]>,
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DataKey({})", self.id)
    }
}

impl PartialEq for DataKey {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id && verify_slices_are_equal(&self.secret[..], &other.secret[..]).is_ok()
    }
}

impl Eq for DataKey {}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wire {
    id: String,
    secret: String,
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.secret.zeroize();
    }
}

impl Serialize for DataKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut secret = String::with_capacity(64);
        for byte in self.secret.iter() {
            for digit in [byte >> 4, byte & 15] {
                secret.push(char::from_digit(digit.into(), 16).unwrap_or('0'));
            }
        }
        Wire { id: self.id.to_string(), secret }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for DataKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let wire = Wire::deserialize(deserializer)?;
        let id = parse_hex(&wire.id).map_err(de::Error::custom)?;
        let secret = Zeroizing::new(parse_hex(&wire.secret).map_err(|_| de::Error::custom("not a data key"))?);
        Ok(Self::new(DataKeyId(id), &secret))
    }
}

impl DataKey {
    /// From random bytes, both of them.
    pub fn new(id: DataKeyId, secret: &[u8; 32]) -> Self {
        Self { id, secret: Zeroizing::new(*secret) }
    }

    /// Its id.
    pub fn id(&self) -> DataKeyId {
        self.id
    }

    /// A key of its own for what `name` names.
    pub(super) fn derived(&self, context: &str, name: &[u8]) -> Cipher {
        let mut hasher = blake3::Hasher::new_derive_key(context);
        hasher.update(&self.secret[..]);
        hasher.update(name);
        Cipher::new(&Zeroizing::new(*hasher.finalize().as_bytes()))
    }

    fn state_cipher(&self, salt: &[u8; 32]) -> Cipher {
        self.derived("stasis 2026 snapshot seal: state", salt)
    }

    /// Encrypts the state of a machine. `salt` is random.
    pub fn seal_state(&self, salt: [u8; 32], mut state: Vec<u8>) -> SealedState {
        let tag = self.state_cipher(&salt).seal([0; 12], &salt, &mut state);
        state.extend_from_slice(&tag);
        SealedState { key: self.id, salt, bytes: state }
    }

    /// Decrypts it.
    pub fn open_state(&self, sealed: &SealedState) -> Result<Vec<u8>, SealError> {
        let (text, tag) = sealed.bytes.split_last_chunk::<TAG>().ok_or(SealError::Bytes)?;
        let mut state = vec![0; text.len()];
        self.state_cipher(&sealed.salt)
            .open([0; 12], &sealed.salt, text, tag, &mut state)
            .map(|()| state)
            .ok_or(SealError::Bytes)
    }
}

/// The state of a machine, encrypted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedState {
    /// Under which key.
    pub key: DataKeyId,
    /// Random, and never used twice.
    pub salt: [u8; 32],
    /// Ciphertext and tag.
    pub bytes: Vec<u8>,
}

impl Serialize for DataKeyId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        CommitId(self.0).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for DataKeyId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        CommitId::deserialize(deserializer).map(|id| Self(id.0))
    }
}

/// Data keys by their ids.
#[derive(Clone, Debug, Default)]
pub struct DataKeys(HashMap<DataKeyId, DataKey>);

impl DataKeys {
    /// These.
    pub fn new(keys: impl IntoIterator<Item = DataKey>) -> Self {
        Self(keys.into_iter().map(|key| (key.id(), key)).collect())
    }

    /// The one with this id.
    pub fn get(&self, id: DataKeyId) -> Option<&DataKey> {
        self.0.get(&id)
    }

    /// All of them, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &DataKey> {
        self.0.values()
    }

    /// Adds one.
    pub fn insert(&mut self, key: DataKey) {
        self.0.insert(key.id(), key);
    }
}

/// A data key under an operator's key. What a journal and a manifest hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrappedKey {
    /// Of the data key.
    pub id: DataKeyId,
    /// Under which operator's key.
    pub under: KeyId,
    pub(super) nonce: [u8; 12],
    pub(super) sealed: [u8; 32 + TAG],
}

impl WrappedKey {
    /// Bytes of one.
    pub(super) const LEN: usize = 16 + 8 + 12 + 32 + TAG;

    pub(super) fn put(&self, into: &mut Vec<u8>) {
        into.extend_from_slice(&self.id.0);
        into.extend_from_slice(&self.under.0);
        into.extend_from_slice(&self.nonce);
        into.extend_from_slice(&self.sealed);
    }

    pub(super) fn take(bytes: &[u8; Self::LEN]) -> Self {
        let part = |from: usize, to: usize| &bytes[from..to];
        let (mut id, mut under, mut nonce, mut sealed) = ([0; 16], [0; 8], [0; 12], [0; 32 + TAG]);
        id.copy_from_slice(part(0, 16));
        under.copy_from_slice(part(16, 24));
        nonce.copy_from_slice(part(24, 36));
        sealed.copy_from_slice(part(36, Self::LEN));
        Self { id: DataKeyId(id), under: KeyId(under), nonce, sealed }
    }
}

impl Serialize for WrappedKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut bytes = Vec::with_capacity(Self::LEN);
        self.put(&mut bytes);
        serializer.collect_str(&hex(&bytes))
    }
}

impl<'de> Deserialize<'de> for WrappedKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_hex(&text).map(|bytes| Self::take(&bytes)).map_err(de::Error::custom)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        text.extend([byte >> 4, byte & 15].map(|digit| char::from_digit(digit.into(), 16).unwrap_or('0')));
        text
    })
}
