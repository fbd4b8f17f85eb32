//! Short secrets: any bytes under the operator's key, for records that travel through the bucket or lie in a journal.
//!
//! `purpose` says what they are, `place` whose; both are bound, and sealed bytes of another purpose or place do not open.

use zeroize::Zeroizing;

use super::{KeyId, SealError, Seals, TAG};

const VERSION: u8 = 1;
/// Version, id of the operator's key, nonce.
const PREFIX: usize = 1 + 8 + 12;

impl Seals {
    /// Seals `bytes`. `nonce` is random. `None` without keys.
    pub fn seal_bytes(&self, purpose: &str, place: &str, nonce: [u8; 12], bytes: &[u8]) -> Option<Vec<u8>> {
        let key = self.keys.first()?;
        let mut sealed = Vec::with_capacity(PREFIX + bytes.len() + TAG);
        sealed.push(VERSION);
        sealed.extend_from_slice(&key.id().0);
        sealed.extend_from_slice(&nonce);
        sealed.extend_from_slice(bytes);
        let tag = key.bytes.seal(nonce, &aad(purpose, place), &mut sealed[PREFIX..]);
        sealed.extend_from_slice(&tag);
        Some(sealed)
    }

    /// Opens what [`Seals::seal_bytes`] made for the same purpose and place.
    pub fn open_bytes(&self, purpose: &str, place: &str, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let short = SealError::Malformed("sealed bytes are too short");
        let (prefix, rest) = sealed.split_first_chunk::<PREFIX>().ok_or(short.clone())?;
        let (text, tag) = rest.split_last_chunk::<TAG>().ok_or(short)?;
        if prefix[0] != VERSION {
            return Err(SealError::Malformed("sealed bytes are of another version"));
        }
        let (mut id, mut nonce) = ([0; 8], [0; 12]);
        id.copy_from_slice(&prefix[1..9]);
        nonce.copy_from_slice(&prefix[9..]);
        let mut bytes = Zeroizing::new(vec![0; text.len()]);
        self.key(KeyId(id))?.bytes.open(nonce, &aad(purpose, place), text, tag, &mut bytes).ok_or(SealError::Bytes)?;
        Ok(bytes)
    }
}

/// Both, so that no two pairs are the same bytes.
fn aad(purpose: &str, place: &str) -> Vec<u8> {
    let mut aad = (purpose.len() as u64).to_le_bytes().to_vec();
    aad.extend_from_slice(purpose.as_bytes());
    aad.extend_from_slice(place.as_bytes());
    aad
}
