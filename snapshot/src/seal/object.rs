//! The envelope of a manifest: format version 2. All numbers are little endian.
//!
//! ```text
//! sealed manifest = header seal manifest mac        nothing between, nothing after
//!
//! header (64 bytes; the layout is every manifest's)
//!    8  format version u16               2
//!   12  bytes of the seal u32
//!   16  bytes of the whole object u64
//!   24  BLAKE3 of the seal
//!
//! seal
//!    0  id of the operator's key, 8 bytes
//!    8  bytes of the place u16, number of wrapped keys u16
//!   12  the place: the store key that it was sealed for
//!       wrapped keys, 84 bytes each: id of the data key (16), of the operator's key (8), nonce (12), key and tag (48)
//!
//! manifest                               a whole one of format version 1
//! mac (32 bytes)                         keyed BLAKE3 of everything before it
//! ```
//!
//! The MAC is checked before anything of the manifest is decoded. Who has no key can still split the envelope and check the digests.

use super::{KeyId, OperatorKey, SealError, Seals, WrappedKey, misplaced};
use crate::{
    ids::Digest,
    manifest::{self, HEADER_LEN, Header, ManifestError},
};

/// The format version of a sealed manifest.
pub(crate) const SEALED_VERSION: u16 = 2;
const MAC: usize = 32;
const FIXED: usize = 12;

/// A manifest out of its envelope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened<'a> {
    /// The manifest: what [`crate::manifest::Manifest::decode`] takes.
    pub manifest: &'a [u8],
    /// The data keys that its packs and its state need.
    pub keys: Vec<WrappedKey>,
    /// Under which operator's key it is sealed; `None` for one that is not.
    pub under: Option<KeyId>,
}

/// An envelope whose lengths and digests are right. Nothing in it is authentic yet.
pub(crate) struct Split<'a> {
    pub(crate) under: KeyId,
    pub(crate) place: &'a str,
    pub(crate) manifest: &'a [u8],
    keys: &'a [u8],
    covered: &'a [u8],
    mac: [u8; MAC],
}

/// Takes an envelope apart; `None` for a manifest without one.
pub(crate) fn split(object: &[u8]) -> Result<Option<Split<'_>>, SealError> {
    let header = match Header::read(object) {
        Ok(header) if header.version == SEALED_VERSION => header,
        // What is no manifest is for the manifest's own checks to name.
        _ => return Ok(None),
    };
    let got = object.len() as u64;
    if header.len > manifest::MAX_LEN {
        return Err(SealError::Malformed("it is larger than a manifest may be"));
    }
    if got < header.len {
        return Err(SealError::Truncated { got, expected: header.len });
    }
    if got > header.len {
        return Err(SealError::Malformed("it is followed by bytes that do not belong to it"));
    }
    let malformed = || SealError::Malformed("its lengths do not fit");
    let (covered, mac) = object.split_last_chunk::<MAC>().ok_or_else(malformed)?;
    let body = covered.get(HEADER_LEN..).ok_or_else(malformed)?;
    let (seal, manifest) = body.split_at_checked(header.sections as usize).ok_or_else(malformed)?;
    if Digest::of(seal) != header.table_digest {
        return Err(SealError::Tampered);
    }
    let (fixed, rest) = seal.split_first_chunk::<FIXED>().ok_or_else(malformed)?;
    let mut id = [0; 8];
    id.copy_from_slice(&fixed[..8]);
    let length = |at: usize| usize::from(u16::from_le_bytes([fixed[at], fixed[at + 1]]));
    let (place, keys) = rest.split_at_checked(length(8)).ok_or_else(malformed)?;
    if keys.len() != length(10) * WrappedKey::LEN {
        return Err(malformed());
    }
    let place = std::str::from_utf8(place).map_err(|_| SealError::Malformed("its place is no text"))?;
    Ok(Some(Split { under: KeyId(id), place, manifest, keys, covered, mac: *mac }))
}

/// Under which operator's key a manifest is sealed, and under which each of its data keys is wrapped; none of it is authentic. `None` for one that
/// is not sealed.
pub fn sealed_under(object: &[u8]) -> Option<(KeyId, Vec<KeyId>)> {
    let split = split(object).ok()??;
    Some((split.under, split.keys().into_iter().map(|key| key.under).collect()))
}

impl Split<'_> {
    pub(crate) fn keys(&self) -> Vec<WrappedKey> {
        self.keys.as_chunks().0.iter().map(WrappedKey::take).collect()
    }

    fn is_authentic(&self, key: &OperatorKey) -> bool {
        // In constant time: that is what a `blake3::Hash` compares in.
        blake3::keyed_hash(&key.manifest_mac, self.covered) == blake3::Hash::from_bytes(self.mac)
    }
}

impl Seals {
    /// Puts an encoded manifest into its envelope; without keys it stays as it is. `keys` are those that its packs and its state need.
    pub fn seal_manifest(&self, place: &str, manifest: Vec<u8>, keys: &[WrappedKey]) -> Result<Vec<u8>, SealError> {
        let Some(operator) = self.keys.first() else { return Ok(manifest) };
        let length = |len: usize| u16::try_from(len).map_err(|_| SealError::Malformed("a place or too many keys"));
        let mut seal = operator.id().0.to_vec();
        seal.extend_from_slice(&length(place.len())?.to_le_bytes());
        seal.extend_from_slice(&length(keys.len())?.to_le_bytes());
        seal.extend_from_slice(place.as_bytes());
        keys.iter().for_each(|key| key.put(&mut seal));
        let len = HEADER_LEN + seal.len() + manifest.len() + MAC;
        if len as u64 > manifest::MAX_LEN {
            return Err(SealError::Malformed("it is larger than a manifest may be"));
        }
        let mut object = Vec::with_capacity(len);
        object.extend_from_slice(&manifest::sealed_header(seal.len() as u32, len as u64, Digest::of(&seal)));
        object.extend_from_slice(&seal);
        object.extend_from_slice(&manifest);
        let mac = blake3::keyed_hash(&operator.manifest_mac, &object);
        object.extend_from_slice(mac.as_bytes());
        Ok(object)
    }

    /// Takes a manifest out of its envelope, once it is known to be what was sealed for `place`.
    pub fn open_manifest<'a>(&self, place: &str, object: &'a [u8]) -> Result<Opened<'a>, SealError> {
        let Some(split) = split(object)? else {
            return match Header::read(object) {
                Err(ManifestError::Truncated { got, expected }) => Err(SealError::Truncated { got, expected }),
                // Of a manifest that was sealed, or is none: nobody can tell.
                Err(_) if self.is_on() => Err(SealError::Tampered),
                _ => self.unsealed(Opened { manifest: object, keys: Vec::new(), under: None }),
            };
        };
        if !split.is_authentic(self.key(split.under)?) {
            return Err(SealError::Tampered);
        }
        if split.place != place {
            return Err(misplaced(place, split.place));
        }
        Ok(Opened { manifest: split.manifest, keys: split.keys(), under: Some(split.under) })
    }
}
