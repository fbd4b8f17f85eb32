//! Where everything of the file system is. All of its own lies at the beginning of the disk (`flex_bg`) without copies (`sparse_super2`): what
//! is behind that is one piece, for content.

use crate::disk::BLOCK;

/// Blocks of a group: as many as one block has bits.
pub(super) const GROUP_BLOCKS: u64 = 8 * BLOCK;
/// Of the journal: 16 MiB, as the other templates have.
pub(super) const JOURNAL_BLOCKS: u64 = 4096;
/// Octets of an inode.
pub(super) const INODE: u64 = 256;
/// Octets of disk for each inode, as `mke2fs` deals them.
const OCTETS_PER_INODE: u64 = 16 << 10;
/// Octets of a group's descriptor.
pub(super) const DESCRIPTOR: u64 = 32;

pub(super) const ROOT_INODE: u32 = 2;
pub(super) const JOURNAL_INODE: u32 = 8;
/// The first one that is nobody's already.
pub(super) const FIRST_INODE: u32 = 11;

/// See the module. Places are numbers of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Blocks of the disk.
    pub blocks: u64,
    /// Groups of blocks, and of inodes.
    pub groups: u64,
    /// Inodes of one group.
    pub(super) group_inodes: u64,
    /// One block for each group, as the next.
    pub(super) block_bitmaps: u64,
    pub(super) inode_bitmaps: u64,
    pub(super) inode_tables: u64,
    pub(super) journal: u64,
    /// The first that is for content.
    pub first: u64,
}

impl Geometry {
    /// Of a disk of so many octets; `None` when it is too small or too large to be one.
    pub fn of(octets: u64) -> Option<Self> {
        let blocks = octets / BLOCK;
        let groups = blocks.div_ceil(GROUP_BLOCKS);
        // Whole blocks of inodes, and no more than one block has bits.
        let group_inodes = (octets / OCTETS_PER_INODE)
            .checked_div(groups)?
            .next_multiple_of(BLOCK / INODE)
            .clamp(BLOCK / INODE, GROUP_BLOCKS);
        let block_bitmaps = 1 + (groups * DESCRIPTOR).div_ceil(BLOCK);
        let inode_bitmaps = block_bitmaps + groups;
        let inode_tables = inode_bitmaps + groups;
        let journal = inode_tables + groups * group_inodes * INODE / BLOCK;
        let first = journal + JOURNAL_BLOCKS;
        // Numbers of blocks have 32 bits here.
        (first < blocks && u32::try_from(blocks).is_ok()).then_some(Self {
            blocks,
            groups,
            group_inodes,
            block_bitmaps,
            inode_bitmaps,
            inode_tables,
            journal,
            first,
        })
    }

    /// All inodes.
    pub(super) fn inodes(&self) -> u32 {
        // A disk of 2^32 blocks has 2^30.
        (self.groups * self.group_inodes) as u32
    }

    /// The group of an inode.
    pub(super) fn group_of(&self, inode: u32) -> usize {
        (u64::from(inode - 1) / self.group_inodes) as usize
    }

    /// The block of an inode and its place in there. The tables of all groups are one.
    pub(super) fn place_of(&self, inode: u32) -> (u64, u64) {
        let at = u64::from(inode - 1) * INODE;
        (self.inode_tables + at / BLOCK, at % BLOCK)
    }

    /// Blocks of a group; the last one has what is left.
    pub(super) fn blocks_of(&self, group: u64) -> u64 {
        (self.blocks - group * GROUP_BLOCKS).min(GROUP_BLOCKS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_overlaps_and_small_disks_are_none() {
        for mib in [20, 64, 127, 128, 129, 10 << 10, 1 << 20] {
            let found = Geometry::of(mib << 20).unwrap();
            assert!(found.block_bitmaps > (found.groups * DESCRIPTOR) / BLOCK, "{found:?}");
            assert_eq!(found.inode_tables - found.inode_bitmaps, found.groups);
            let last = found.place_of(found.inodes());
            assert_eq!((last.0 + 1, last.1), (found.journal, BLOCK - INODE), "{found:?}");
            assert_eq!((0..found.groups).map(|group| found.blocks_of(group)).sum::<u64>(), found.blocks);
        }
        assert_eq!((Geometry::of(0), Geometry::of(16 << 20), Geometry::of(u64::MAX)), (None, None, None));
    }
}
