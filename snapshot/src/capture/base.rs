//! Template blocks by content.

use std::io;

use super::PageReader;
use crate::page::{PAGE_SIZE, is_zero};

/// Pages read at a time while the index is built.
const READ_PAGES: u64 = 64;

/// Blocks of a template disk by a short hash of their content. A hit is only a hint: bytes are compared before it is used.
#[derive(Debug, Default)]
pub struct BlockIndex {
    /// (hash, block), sorted.
    entries: Vec<(u64, u64)>,
}

fn short_hash(page: &[u8]) -> u64 {
    let digest = blake3::hash(page);
    let mut short = [0; 8];
    short.copy_from_slice(&digest.as_bytes()[..8]);
    u64::from_le_bytes(short)
}

impl BlockIndex {
    /// Reads and hashes all blocks. Zero blocks are left out. Blocking.
    pub fn build(reader: &dyn PageReader, blocks: u64) -> io::Result<Self> {
        let mut entries = Vec::new();
        let mut buffer = vec![0; READ_PAGES as usize * PAGE_SIZE];
        let mut first = 0;
        while first < blocks {
            let count = READ_PAGES.min(blocks - first);
            let part = &mut buffer[..count as usize * PAGE_SIZE];
            reader.read(first, part)?;
            for (page, block) in part.chunks_exact(PAGE_SIZE).zip(first..) {
                if !is_zero(page) {
                    entries.push((short_hash(page), block));
                }
            }
            first += count;
        }
        entries.sort_unstable();
        entries.dedup_by_key(|(hash, _)| *hash);
        Ok(Self { entries })
    }

    /// A block that may equal `page`.
    pub(super) fn find(&self, page: &[u8]) -> Option<u64> {
        let hash = short_hash(page);
        let at = self.entries.binary_search_by_key(&hash, |(hash, _)| *hash).ok()?;
        Some(self.entries[at].1)
    }
}
