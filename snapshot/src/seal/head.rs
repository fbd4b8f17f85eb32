//! The envelope of a head: format version 2, JSON like the head in it, with the head's own text unchanged.
//!
//! ```text
//! {"format":2,"seal":{"key":"<16 hex>","of":"<the head's store key>","mac":"<64 hex>"},"head":<the head>}
//! ```
//!
//! The MAC covers place and text, each octet of it. It is read by its exact form, so that there is one way to write a head.

use super::{KeyId, SealError, Seals, misplaced};
use crate::ids::{Digest, parse_hex};

const BEGIN: &[u8] = b"{\"format\":2,\"seal\":{\"key\":\"";
const OF: &[u8] = b"\",\"of\":\"";
const MAC: &[u8] = b"\",\"mac\":\"";
const HEAD: &[u8] = b"\"},\"head\":";
const END: &[u8] = b"}";

/// A head out of its envelope. Nothing in it is authentic yet.
pub(crate) struct Split<'a> {
    pub(crate) under: KeyId,
    pub(crate) of: &'a str,
    mac: [u8; 32],
    /// The head's own text.
    pub(crate) body: &'a [u8],
}

/// Takes an envelope apart; `None` for a head without one.
pub(crate) fn split(bytes: &[u8]) -> Result<Option<Split<'_>>, SealError> {
    let Some(rest) = bytes.strip_prefix(BEGIN) else { return Ok(None) };
    split_rest(rest).map(Some).ok_or(SealError::Malformed("the envelope of the head has another form, or is truncated"))
}

fn split_rest(rest: &[u8]) -> Option<Split<'_>> {
    let (key, rest) = rest.split_at_checked(16)?;
    let rest = rest.strip_prefix(OF)?;
    let (of, rest) = rest.split_at_checked(rest.iter().position(|c| *c == b'"')?)?;
    let (mac, rest) = rest.strip_prefix(MAC)?.split_at_checked(64)?;
    let body = rest.strip_prefix(HEAD)?.strip_suffix(END)?;
    let text = |bytes| std::str::from_utf8(bytes).ok();
    Some(Split { under: text(key)?.parse().ok()?, of: text(of)?, mac: parse_hex(text(mac)?).ok()?, body })
}

/// Under which operator's key a head is sealed; not authentic. `None` for one that is not.
pub fn sealed_under(bytes: &[u8]) -> Option<KeyId> {
    Some(split(bytes).ok()??.under)
}

fn mac(key: &[u8; 32], of: &str, body: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(&(of.len() as u64).to_le_bytes());
    hasher.update(of.as_bytes());
    hasher.update(body);
    hasher.finalize()
}

impl Seals {
    /// Puts the body of the head under `key` into its envelope; without keys it stays as it is.
    pub fn seal_head(&self, key: &str, body: &[u8]) -> Vec<u8> {
        let Some(operator) = self.keys.first() else { return body.to_vec() };
        let mac = mac(&operator.head_mac, key, body);
        let id = operator.id().to_string();
        [BEGIN, id.as_bytes(), OF, key.as_bytes(), MAC, Digest(*mac.as_bytes()).to_string().as_bytes(), HEAD, body, END]
            .concat()
    }

    /// The body of the head under `key`, once it is known to be what was sealed for it.
    pub fn open_head<'a>(&self, key: &str, bytes: &'a [u8]) -> Result<&'a [u8], SealError> {
        let Some(found) = split(bytes)? else { return self.unsealed(bytes) };
        let operator = self.key(found.under)?;
        // In constant time: that is what a `blake3::Hash` compares in.
        if mac(&operator.head_mac, found.of, found.body) != blake3::Hash::from_bytes(found.mac) {
            return Err(SealError::Tampered);
        }
        if found.of != key {
            return Err(misplaced(key, found.of));
        }
        Ok(found.body)
    }
}
