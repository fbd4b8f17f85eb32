//! Digests as bytes, for memory that stays on a host between two processes. They come with their key, so they belong to nobody but the
//! owner of that memory, and never go into a snapshot.
//!
//! ```text
//! key  (number:u32 known:[u64; 8] zero:[u64; 8] digest:u128 for each page that is known and not zero)*    little endian
//! ```

use super::{GRANULE, Granule, Noted, PageDigests, PageHasher, WORDS};
use std::io;
use std::sync::PoisonError;

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "page digests are cut off or out of order")
}

/// Takes `N` bytes off the front.
fn take<const N: usize>(bytes: &mut &[u8]) -> io::Result<[u8; N]> {
    let (head, rest) = bytes.split_first_chunk().ok_or_else(malformed)?;
    *bytes = rest;
    Ok(*head)
}

fn take_words(bytes: &mut &[u8]) -> io::Result<[u64; WORDS]> {
    let mut words = [0; WORDS];
    for word in &mut words {
        *word = u64::from_le_bytes(take(bytes)?);
    }
    Ok(words)
}

impl PageDigests {
    /// Everything that is noted. Consistent only while nobody notes.
    pub fn export(&self) -> Vec<u8> {
        let mut bytes = self.hasher.to_bytes();
        for (number, slot) in (0_u32..).zip(&self.granules) {
            let slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(granule) = &*slot else { continue };
            bytes.extend(number.to_le_bytes());
            granule.known.iter().chain(&granule.zero).for_each(|word| bytes.extend(word.to_le_bytes()));
            for at in 0..GRANULE as usize {
                if let Some(Noted::Digest(digest)) = granule.get(at) {
                    bytes.extend(digest.to_le_bytes());
                }
            }
        }
        bytes
    }

    /// What [`export`](Self::export) gave, for an image of `pages` pages. Allocates no more than the digests of what `bytes` names.
    pub fn import(pages: u64, mut bytes: &[u8]) -> io::Result<Self> {
        let hasher = PageHasher::from_bytes(&mut bytes).ok_or_else(malformed)?;
        let mut digests = Self::with_hasher(pages, hasher);
        let mut next = 0;
        while !bytes.is_empty() {
            let number = u32::from_le_bytes(take(&mut bytes)?) as usize;
            if number < next {
                return Err(malformed());
            }
            next = number + 1;
            let mut granule = Granule { known: take_words(&mut bytes)?, zero: take_words(&mut bytes)?, digests: None };
            for at in 0..GRANULE as usize {
                let (word, bit) = (at / 64, 1_u64 << (at % 64));
                if granule.known[word] & bit != 0 && granule.zero[word] & bit == 0 {
                    granule.set(at, Noted::Digest(u128::from_le_bytes(take(&mut bytes)?)));
                }
            }
            let slot = digests.granules.get_mut(number).ok_or_else(malformed)?;
            *slot.get_mut().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(granule));
        }
        Ok(digests)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PAGE_SIZE;

    #[test]
    fn what_is_taken_over_tells_the_same() {
        let digests = PageDigests::new(2000).unwrap();
        let page = |fill: u8| vec![fill; PAGE_SIZE];
        digests.note(1, &page(1));
        digests.note(1999, &page(7));
        digests.note_zero(600..700);
        let bytes = digests.export();
        let again = PageDigests::import(2000, &bytes).unwrap();
        for (number, fill, same) in
            [(1, 1, true), (1, 2, false), (1999, 7, true), (650, 0, true), (650, 1, false), (2, 0, false)]
        {
            assert_eq!(again.unchanged(number, &page(fill)), same, "page {number} of {fill}");
        }
        assert_eq!(again.export(), bytes);
        for cut in [0, 10, bytes.len() - 1] {
            assert!(PageDigests::import(2000, &bytes[..cut]).is_err(), "cut to {cut}");
        }
        assert!(PageDigests::import(1000, &bytes).is_err(), "for a smaller image");
    }
}
