//! The frames of one pack, encrypted: AES-256-GCM under a key that is derived from the data key and the pack's store key, frame `n` under
//! nonce `n`. The tag follows the frame's bytes and is counted among them.

use super::{DataKey, TAG, cipher::Cipher};
use crate::pack::Codec;

/// Seals and opens the frames of one pack.
pub struct PackCipher {
    key: Cipher,
    /// The pack's store key, then what is said of a frame.
    aad: Vec<u8>,
}

impl std::fmt::Debug for PackCipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PackCipher")
    }
}

/// What is said of a frame besides its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameInfo {
    /// Its place in the pack.
    pub number: u32,
    /// Its pages.
    pub pages: u32,
    /// How its bytes are compressed.
    pub codec: Codec,
}

impl FrameInfo {
    fn nonce(self) -> [u8; 12] {
        let mut nonce = [0; 12];
        nonce[..4].copy_from_slice(&self.number.to_le_bytes());
        nonce
    }
}

impl PackCipher {
    /// Of the pack under `store_key`.
    pub fn new(key: &DataKey, store_key: &str) -> Self {
        Self {
            key: key.derived("stasis 2026 snapshot seal: frames of a pack", store_key.as_bytes()),
            aad: store_key.as_bytes().to_vec(),
        }
    }

    fn aad(&self, frame: FrameInfo) -> Vec<u8> {
        let mut aad = Vec::with_capacity(self.aad.len() + 9);
        aad.extend_from_slice(&self.aad);
        aad.extend_from_slice(&frame.number.to_le_bytes());
        aad.extend_from_slice(&frame.pages.to_le_bytes());
        aad.push(match frame.codec {
            Codec::Raw => 0,
            Codec::Lz4 => 1,
            Codec::Zstd => 2,
        });
        aad
    }

    /// Encrypts a frame in place, its last [`TAG`] bytes being room for the tag.
    pub fn seal(&self, frame: FrameInfo, bytes: &mut [u8]) {
        let Some((text, room)) = bytes.split_last_chunk_mut::<TAG>() else { return };
        *room = self.key.seal(frame.nonce(), &self.aad(frame), text);
    }

    /// Decrypts a frame; `None` where it was changed, or belongs elsewhere.
    pub fn open(&self, frame: FrameInfo, bytes: &[u8]) -> Option<Vec<u8>> {
        let (text, tag) = bytes.split_last_chunk::<TAG>()?;
        let mut out = vec![0; text.len()];
        self.key.open(frame.nonce(), &self.aad(frame), text, tag, &mut out)?;
        Some(out)
    }
}
