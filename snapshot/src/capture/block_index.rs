//! Template blocks by content.

use std::io;

use super::{
    PageReader,
    page_hash::{Page, PageHasher},
};
use crate::{
    ids::Digest,
    page::{PAGE_SIZE, is_zero},
};

/// Blocks read in one call.
const STEP: u64 = 64;
/// A block is looked for in so many slots; what finds none free is left out.
const PROBES: usize = 16;
/// First octets of an encoded index; the last one is the version.
const MAGIC: [u8; 8] = *b"stsblix\x01";
const HEADER: usize = MAGIC.len() + 32;

/// Blocks of a template disk by a hash of their content. A hit is only a hint: bytes are compared before it is used. So nothing depends on what
/// an index says, and a guest that makes pages collide makes its own captures slower.
///
/// Memory, and encoded size: 8 bytes a slot, up to three slots a block that is not zero. Encoded: magic, digest of the template, slots
/// little-endian.
pub struct BlockIndex {
    hasher: PageHasher,
    /// A power of two of them, or none: 32 bits of the hash, then the block plus one; 0 is free.
    slots: Vec<u64>,
}

impl std::fmt::Debug for BlockIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockIndex").field("slots", &self.slots.len()).finish_non_exhaustive()
    }
}

/// An index that blocks are added to.
pub struct BlockIndexBuilder {
    hasher: PageHasher,
    /// Hashes, and the blocks plus one.
    found: Vec<(u64, u32)>,
}

impl Default for BlockIndexBuilder {
    fn default() -> Self {
        Self { hasher: hasher(), found: Vec::new() }
    }
}

impl BlockIndexBuilder {
    /// Adds whole blocks from `first` on. Zero blocks are left out, and those whose number has no place in a slot.
    pub fn add(&mut self, first: u64, bytes: &[u8]) {
        for (block, bytes) in (first..).zip(bytes.as_chunks::<PAGE_SIZE>().0) {
            let next = u32::try_from(block).ok().and_then(|block| block.checked_add(1));
            if let (false, Some(next)) = (is_zero(bytes), next) {
                self.found.push((hash(&self.hasher, bytes), next));
            }
        }
    }

    /// The index. Of equal blocks it has the first one.
    pub fn finish(self) -> BlockIndex {
        let slots = if self.found.is_empty() { 0 } else { (self.found.len() * 3 / 2).next_power_of_two().max(PROBES) };
        let mut index = BlockIndex { hasher: self.hasher, slots: vec![0; slots] };
        for (hash, next) in self.found {
            let tag = hash >> 32;
            // Two blocks of one tag at one place are taken for equal: what is lost is a hint.
            if let Some(slot) = index.places(hash).find(|&at| index.slots[at] == 0 || index.slots[at] >> 32 == tag)
                && index.slots[slot] == 0
            {
                index.slots[slot] = tag << 32 | u64::from(next);
            }
        }
        index
    }
}

impl BlockIndex {
    /// Reads and hashes all blocks. Blocking.
    pub fn build(reader: &dyn PageReader, blocks: u64) -> io::Result<Self> {
        let mut builder = BlockIndexBuilder::default();
        let mut buffer = vec![0; STEP as usize * PAGE_SIZE];
        let mut first = 0;
        while first < blocks {
            let count = STEP.min(blocks - first);
            let bytes = &mut buffer[..count as usize * PAGE_SIZE];
            reader.read(first, bytes)?;
            builder.add(first, bytes);
            first += count;
        }
        Ok(builder.finish())
    }

    /// The octets of the index of the template `base`.
    pub fn encode(&self, base: Digest) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + self.slots.len() * 8);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&base.0);
        self.slots.iter().for_each(|slot| bytes.extend_from_slice(&slot.to_le_bytes()));
        bytes
    }

    /// Whether `bytes` begin an encoded index of `base`.
    pub fn is_of(bytes: &[u8], base: Digest) -> bool {
        bytes.starts_with(&MAGIC) && bytes.get(MAGIC.len()..HEADER) == Some(&base.0)
    }

    /// Reads an encoded index of `base`; `None` when it is something else.
    pub fn decode(bytes: &[u8], base: Digest) -> Option<Self> {
        let (slots, rest) = bytes.get(HEADER..)?.as_chunks::<8>();
        let whole = rest.is_empty() && (slots.is_empty() || slots.len().is_power_of_two() && slots.len() >= PROBES);
        if !whole || !Self::is_of(bytes, base) {
            return None;
        }
        Some(Self { hasher: hasher(), slots: slots.iter().map(|slot| u64::from_le_bytes(*slot)).collect() })
    }

    /// Octets of [`BlockIndex::encode`] that [`BlockIndex::is_of`] looks at.
    pub const HEADER_BYTES: usize = HEADER;

    /// A block that may equal the page.
    pub(super) fn candidate(&self, page: &Page) -> Option<u64> {
        if self.slots.is_empty() {
            return None;
        }
        let hash = hash(&self.hasher, page);
        self.places(hash)
            .map(|at| self.slots[at])
            .take_while(|slot| *slot != 0)
            .find(|slot| slot >> 32 == hash >> 32)
            .map(|slot| (slot & u64::from(u32::MAX)) - 1)
    }

    /// Where what has this hash may be.
    fn places(&self, hash: u64) -> impl Iterator<Item = usize> + use<> {
        let mask = self.slots.len() - 1;
        (0..PROBES).map(move |probe| (hash as usize).wrapping_add(probe) & mask)
    }
}

/// Hashes must be the same in every process, so the key is no secret.
fn hasher() -> PageHasher {
    PageHasher::public("stasis block index 1")
}

fn hash(hasher: &PageHasher, page: &Page) -> u64 {
    hasher.hash(page) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(n: u64) -> Page {
        let mut page = [0; PAGE_SIZE];
        page.as_chunks_mut::<8>()
            .0
            .iter_mut()
            .for_each(|word| *word = n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
        page
    }

    #[test]
    fn every_block_is_found_before_and_after_a_trip_through_a_file() {
        let mut builder = BlockIndexBuilder::default();
        for block in 0..5000 {
            // Block 0 is zero, the last thousand repeat the first ones.
            builder.add(block, &page(if block < 4000 { block } else { block - 4000 }));
        }
        let index = builder.finish();
        let base = Digest::of(b"base");
        let bytes = index.encode(base);
        let read = BlockIndex::decode(&bytes, base).unwrap();
        for index in [&index, &read] {
            assert_eq!(index.candidate(&page(0)), None);
            let found = (1..4000).filter(|block| index.candidate(&page(*block)) == Some(*block)).count();
            // Full neighbourhoods may push a few out.
            assert!(found >= 3990, "{found}");
            assert_eq!(index.candidate(&page(70_000)), None);
        }
        for (bytes, of) in [
            (&bytes[..], Digest::of(b"another")),
            (&bytes[..bytes.len() - 1], base),
            (&bytes[..bytes.len() - 8], base),
            (&bytes[..HEADER - 1], base),
            (&[0; 80][..], base),
        ] {
            assert!(BlockIndex::decode(bytes, of).is_none());
        }
        let none = BlockIndexBuilder::default().finish();
        assert_eq!(BlockIndex::decode(&none.encode(base), base).unwrap().candidate(&page(1)), None);
    }
}
