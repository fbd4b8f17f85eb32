//! An inode: its fields, the extents that say where its content is, and the block of its attributes.

use std::collections::BTreeMap;
use std::io;

use super::EPOCH;
use super::geometry::INODE;
use crate::disk::{BLOCK, Disk};

/// Octets that an inode has for where its content is, or for the target of a short link.
pub(super) const MAP: usize = 60;
/// Blocks of an extent at most.
const EXTENT: u64 = 32_768;
/// Extents, or blocks of extents, in an inode.
const IN_INODE: usize = 4;
/// Extents in a block of them.
const IN_BLOCK: usize = (BLOCK as usize - 12) / 12;
/// `EXT4_EXTENTS_FL`
const EXTENTS: u32 = 0x8_0000;
/// Octets of the fields behind the first 128.
const EXTRA: u16 = 32;
/// Beginning of a block of attributes.
const ATTRIBUTES: u32 = 0xea02_0000;
/// What names of attributes begin with, and the number that stands for it, in the order in which they are sorted.
const SPACES: [(&[u8], u8); 2] = [(b"user.", 1), (b"security.", 6)];

/// Where the content of an inode is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Where {
    /// From this block on, in one piece.
    Piece(u64),
    /// A file without content.
    None,
    /// In the inode itself: a short link.
    Here([u8; MAP]),
    /// It has none and could have none.
    Nowhere,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Inode {
    /// Kind and permissions.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: i64,
    pub(super) links: u32,
    /// Octets.
    pub(super) size: u64,
    pub(super) content: Where,
    /// The block of its attributes.
    pub(super) attributes: Option<u64>,
}

impl Inode {
    pub(super) fn empty(mode: u32) -> Self {
        Self { mode, uid: 0, gid: 0, mtime: EPOCH.into(), links: 1, size: 0, content: Where::None, attributes: None }
    }

    pub(super) fn file(mode: u32, block: u64, size: u64) -> Self {
        Self { size, content: Where::Piece(block), ..Self::empty(mode) }
    }

    /// `target` is shorter than [`MAP`].
    pub(super) fn short_link(target: &[u8]) -> Self {
        let mut here = [0; MAP];
        here[..target.len()].copy_from_slice(target);
        Self { size: target.len() as u64, content: Where::Here(here), ..Self::empty(0o120_777) }
    }

    /// What it says of where its content is, and the blocks that it uses for content. Extents that do not fit get blocks of their own.
    pub(super) fn map(&self, disk: &mut Disk) -> io::Result<([u8; MAP], u64)> {
        let first = match self.content {
            Where::Here(here) => return Ok((here, 0)),
            Where::Nowhere => return Ok(([0; MAP], 0)),
            Where::None => 0,
            Where::Piece(first) => first,
        };
        let blocks = self.size.div_ceil(BLOCK);
        let extents: Vec<_> =
            (0..blocks).step_by(EXTENT as usize).map(|at| extent(at, (blocks - at).min(EXTENT), first + at)).collect();
        if extents.len() <= IN_INODE {
            return Ok((map(0, IN_INODE, &extents), blocks));
        }
        let mut indexes = Vec::new();
        for (number, extents) in extents.chunks(IN_BLOCK).enumerate() {
            let at = disk.deal(1)?;
            disk.put(at, 0, &map::<{ BLOCK as usize }>(0, IN_BLOCK, extents))?;
            indexes.push(index(number as u64 * IN_BLOCK as u64 * EXTENT, at));
        }
        if indexes.len() > IN_INODE {
            return Err(io::Error::other("a file of the image is too large"));
        }
        Ok((map(1, IN_INODE, &indexes), blocks + indexes.len() as u64))
    }

    /// As the disk has it, with what [`Inode::map`] has answered.
    pub(super) fn encode(&self, map: &[u8; MAP], blocks: u64) -> [u8; INODE as usize] {
        let mut out = [0; INODE as usize];
        let mut put = |at: usize, octets: &[u8]| out[at..at + octets.len()].copy_from_slice(octets);
        let low = |value: u32| (value as u16).to_le_bytes();
        let high = |value: u32| ((value >> 16) as u16).to_le_bytes();
        // The second as 32 signed bits, and in the extra field how often they went round.
        let seconds = self.mtime as i32;
        let rounds = (((self.mtime - i64::from(seconds)) >> 32) & 3).unsigned_abs() as u32;
        put(0x00, &low(self.mode));
        put(0x02, &low(self.uid));
        put(0x04, &(self.size as u32).to_le_bytes());
        put(0x08, &EPOCH.to_le_bytes());
        put(0x0c, &EPOCH.to_le_bytes());
        put(0x10, &seconds.to_le_bytes());
        put(0x18, &low(self.gid));
        put(0x1a, &low(self.links));
        // Counted in sectors, attributes included.
        let sectors = (blocks + u64::from(self.attributes.is_some())) * (BLOCK / 512);
        put(0x1c, &(sectors as u32).to_le_bytes());
        if matches!(self.content, Where::Piece(_) | Where::None) {
            put(0x20, &EXTENTS.to_le_bytes());
        }
        put(0x28, map);
        put(0x68, &(self.attributes.unwrap_or_default() as u32).to_le_bytes());
        put(0x6c, &((self.size >> 32) as u32).to_le_bytes());
        put(0x74, &((sectors >> 32) as u16).to_le_bytes());
        put(0x78, &high(self.uid));
        put(0x7a, &high(self.gid));
        put(0x80, &EXTRA.to_le_bytes());
        put(0x88, &rounds.to_le_bytes());
        put(0x90, &EPOCH.to_le_bytes());
        out
    }
}

/// The head of a list of extents (`depth` 0) or of blocks of them (1), and the list.
fn map<const N: usize>(depth: u16, most: usize, entries: &[[u8; 12]]) -> [u8; N] {
    let mut out = [0; N];
    let head = [0xf30a, entries.len() as u16, most as u16, depth].map(u16::to_le_bytes).concat();
    out[..head.len()].copy_from_slice(&head);
    for (place, entry) in out[12..].chunks_exact_mut(12).zip(entries) {
        place.copy_from_slice(entry);
    }
    out
}

fn extent(at: u64, blocks: u64, first: u64) -> [u8; 12] {
    let mut out = [0; 12];
    out[..4].copy_from_slice(&(at as u32).to_le_bytes());
    out[4..6].copy_from_slice(&(blocks as u16).to_le_bytes());
    out[8..].copy_from_slice(&(first as u32).to_le_bytes());
    out
}

fn index(at: u64, block: u64) -> [u8; 12] {
    let mut out = [0; 12];
    out[..4].copy_from_slice(&(at as u32).to_le_bytes());
    out[4..8].copy_from_slice(&(block as u32).to_le_bytes());
    out
}

/// The block of attributes. They fit: a layer's are bounded when it is read (`layer::MAX_XATTRS`).
pub(super) fn attributes(of: &BTreeMap<Vec<u8>, Vec<u8>>) -> Vec<u8> {
    let mut sorted: Vec<_> = of
        .iter()
        .filter_map(|(name, value)| {
            SPACES.iter().find_map(|(space, number)| Some((*number, name.strip_prefix(*space)?, value.as_slice())))
        })
        .collect();
    sorted.sort_by_key(|(number, name, _)| (*number, name.len(), *name));
    let mut out = vec![0; BLOCK as usize];
    out[..4].copy_from_slice(&ATTRIBUTES.to_le_bytes());
    // One inode has it, and it is one block. A hash of 0: it is never shared.
    out[4..12].copy_from_slice(&[1, 0, 0, 0, 1, 0, 0, 0]);
    let (mut at, mut end) = (32, out.len());
    for (number, name, value) in sorted {
        end -= value.len().next_multiple_of(4);
        out[end..end + value.len()].copy_from_slice(value);
        let place = if value.is_empty() { 0 } else { end as u16 };
        out[at..at + 2].copy_from_slice(&[name.len() as u8, number]);
        out[at + 2..at + 4].copy_from_slice(&place.to_le_bytes());
        out[at + 8..at + 12].copy_from_slice(&(value.len() as u32).to_le_bytes());
        let hash = hash(name, &out[end..end + value.len().next_multiple_of(4)]);
        out[at + 12..at + 16].copy_from_slice(&hash.to_le_bytes());
        out[at + 16..at + 16 + name.len()].copy_from_slice(name);
        at += 16 + name.len().next_multiple_of(4);
    }
    out
}

/// `ext4_xattr_hash_entry`; `value` is padded to words.
fn hash(name: &[u8], value: &[u8]) -> u32 {
    let named = name.iter().fold(0_u32, |hash, octet| (hash << 5) ^ (hash >> 27) ^ u32::from(*octet));
    value.chunks_exact(4).fold(named, |hash, word| {
        let word = word.iter().rev().fold(0, |word, octet| word << 8 | u32::from(*octet));
        (hash << 16) ^ (hash >> 16) ^ word
    })
}
