//! AES-256-GCM: the one place that encrypts and decrypts.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

/// Bytes of a tag.
pub const TAG: usize = 16;

/// A key. The library clears its schedule when it is dropped.
pub(super) struct Cipher {
    key: LessSafeKey,
    #[cfg(test)]
    secret: [u8; 32],
}

impl Cipher {
    pub(super) fn new(secret: &[u8; 32]) -> Self {
        #[expect(clippy::expect_used, reason = "AES-256 takes any 32 bytes")]
        let unbound = UnboundKey::new(&AES_256_GCM, secret).expect("32 bytes");
        Self {
            key: LessSafeKey::new(unbound),
            #[cfg(test)]
            secret: *secret,
        }
    }

    /// Encrypts in place; answers the tag. No two calls with one key may have the same nonce.
    pub(super) fn seal(&self, nonce: [u8; 12], aad: &[u8], text: &mut [u8]) -> [u8; TAG] {
        #[cfg(test)]
        witness::note(self.secret, nonce);
        let nonce = Nonce::assume_unique_for_key(nonce);
        #[expect(clippy::expect_used, reason = "fails only for texts of 64 GiB")]
        let sealed = self.key.seal_in_place_separate_tag(nonce, Aad::from(aad), text).expect("a short text");
        let mut tag = [0; TAG];
        tag.copy_from_slice(sealed.as_ref());
        tag
    }

    /// Decrypts into `out`, of the same length; `None` where text, tag, nonce or `aad` is not what it was.
    pub(super) fn open(&self, nonce: [u8; 12], aad: &[u8], text: &[u8], tag: &[u8; TAG], out: &mut [u8]) -> Option<()> {
        let nonce = Nonce::assume_unique_for_key(nonce);
        self.key.open_separate_gather(nonce, Aad::from(aad), text, tag, out).ok()
    }
}

/// Notes every pair of key and nonce that is used, for the test that no pair is used twice.
#[cfg(test)]
pub(super) mod witness {
    use std::sync::{Mutex, PoisonError};

    type Pair = ([u8; 32], [u8; 12]);

    static SEEN: Mutex<Option<Vec<Pair>>> = Mutex::new(None);

    pub(in crate::seal) fn begin() {
        *SEEN.lock().unwrap_or_else(PoisonError::into_inner) = Some(Vec::new());
    }

    pub(super) fn note(key: [u8; 32], nonce: [u8; 12]) {
        if let Some(seen) = &mut *SEEN.lock().unwrap_or_else(PoisonError::into_inner) {
            seen.push((key, nonce));
        }
    }

    pub(in crate::seal) fn end() -> Vec<Pair> {
        SEEN.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default()
    }
}
