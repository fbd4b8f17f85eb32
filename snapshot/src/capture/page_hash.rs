//! A keyed hash of one page.

use std::io;

/// Hashes pages under a secret key.
pub(super) struct PageHasher {
    key: [u8; 32],
}

impl PageHasher {
    /// With a key from the kernel.
    pub(super) fn random() -> io::Result<Self> {
        let mut key = [0; 32];
        let mut filled = 0;
        while filled < key.len() {
            filled += rustix::rand::getrandom(&mut key[filled..], rustix::rand::GetRandomFlags::empty())?;
        }
        Ok(Self { key })
    }

    /// The key as bytes.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        self.key.to_vec()
    }

    /// Takes a key off the front of `bytes`.
    pub(super) fn from_bytes(bytes: &mut &[u8]) -> Option<Self> {
        let (key, rest) = bytes.split_first_chunk()?;
        *bytes = rest;
        Some(Self { key: *key })
    }

    /// The hash of `page`.
    pub(super) fn hash(&self, page: &[u8]) -> u128 {
        let mut short = [0; 16];
        short.copy_from_slice(&blake3::keyed_hash(&self.key, page).as_bytes()[..16]);
        u128::from_le_bytes(short)
    }
}
