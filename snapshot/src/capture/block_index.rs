//! Template blocks by content.

use std::{collections::HashMap, io};

use super::PageReader;
use crate::{
    ids::Digest,
    page::{PAGE_SIZE, is_zero},
};

/// Blocks read in one call.
const STEP: u64 = 64;

/// Blocks of a template disk by a short hash of their content. A hit is only a hint: bytes are compared before it is used.
#[derive(Debug, Default)]
pub struct BlockIndex {
    blocks: HashMap<u64, u64>,
}

impl BlockIndex {
    /// Reads and hashes all blocks. Zero blocks are left out. Blocking.
    pub fn build(reader: &dyn PageReader, blocks: u64) -> io::Result<Self> {
        let mut index = Self::default();
        let mut buffer = vec![0; STEP as usize * PAGE_SIZE];
        let mut first = 0;
        while first < blocks {
            let count = STEP.min(blocks - first);
            let bytes = &mut buffer[..count as usize * PAGE_SIZE];
            reader.read(first, bytes)?;
            for (block, bytes) in (first..).zip(bytes.chunks_exact(PAGE_SIZE)) {
                if !is_zero(bytes) {
                    index.blocks.entry(short_hash(bytes)).or_insert(block);
                }
            }
            first += count;
        }
        Ok(index)
    }

    /// A block that may equal the page.
    pub(super) fn candidate(&self, page: &[u8]) -> Option<u64> {
        if self.blocks.is_empty() {
            return None;
        }
        self.blocks.get(&short_hash(page)).copied()
    }
}

fn short_hash(bytes: &[u8]) -> u64 {
    let mut short = [0; 8];
    short.copy_from_slice(&Digest::of(bytes).0[..8]);
    u64::from_le_bytes(short)
}
