//! What is around inodes and content: bitmaps, descriptors of groups, the journal's beginning and the superblock. Written last.

use std::io;

use super::geometry::{DESCRIPTOR, FIRST_INODE, GROUP_BLOCKS, Geometry, INODE, JOURNAL_BLOCKS, JOURNAL_INODE};
use super::inode::MAP;
use super::{EPOCH, UUID};
use crate::disk::{BLOCK, Disk};

/// `has_journal`, `ext_attr`, `dir_index`, `sparse_super2`.
const COMPATIBLE: u32 = 0x4 | 0x8 | 0x20 | 0x200;
/// `filetype`, `extents`, `flex_bg`.
const INCOMPATIBLE: u32 = 0x2 | 0x40 | 0x200;
/// `large_file`, `dir_nlink`, `extra_isize`.
const COMPATIBLE_TO_READ: u32 = 0x2 | 0x20 | 0x40;
/// Label of the file system, as of the other templates'.
const LABEL: &[u8] = b"root";

/// `next` is the first inode that is free, `directories` how many each group has, `journal` what the journal's inode says of where it is.
pub(super) fn write(
    disk: &mut Disk,
    geometry: &Geometry,
    next: u32,
    directories: &[u16],
    journal: &[u8; MAP],
) -> io::Result<()> {
    let used = disk.used();
    let used_inodes = bits(u64::from(next - 1), geometry.groups * geometry.group_inodes);
    let (mut free_blocks, mut free_inodes) = (0, 0);
    let mut descriptors = Vec::new();
    for group in 0..geometry.groups {
        let blocks = &used[part(group, GROUP_BLOCKS, used.len())];
        let inodes = &used_inodes[part(group, geometry.group_inodes, used_inodes.len())];
        let free = [geometry.blocks_of(group) - ones(blocks), geometry.group_inodes - ones(inodes)];
        free_blocks += free[0];
        free_inodes += free[1];
        disk.put(geometry.block_bitmaps + group, 0, &bitmap(blocks, geometry.blocks_of(group)))?;
        disk.put(geometry.inode_bitmaps + group, 0, &bitmap(inodes, geometry.group_inodes))?;
        let table = geometry.inode_tables + group * geometry.group_inodes * INODE / BLOCK;
        for place in [geometry.block_bitmaps + group, geometry.inode_bitmaps + group, table] {
            descriptors.extend_from_slice(&(place as u32).to_le_bytes());
        }
        for count in [free[0] as u16, free[1] as u16, directories[group as usize]] {
            descriptors.extend_from_slice(&count.to_le_bytes());
        }
        descriptors.resize(((group + 1) * DESCRIPTOR) as usize, 0);
    }
    disk.put(1, 0, &descriptors)?;
    disk.put(geometry.journal, 0, &journal_head())?;
    disk.put(0, 1024, &superblock(geometry, free_blocks as u32, free_inodes as u32, journal))
}

/// The octets of a bitmap that are a group's.
fn part(group: u64, group_bits: u64, octets: usize) -> std::ops::Range<usize> {
    let at = |group: u64| ((group * group_bits / 8) as usize).min(octets);
    at(group)..at(group + 1)
}

/// The first `ones` of `all` bits are set.
fn bits(ones: u64, all: u64) -> Vec<u8> {
    let mut out = vec![0; all.div_ceil(8) as usize];
    (0..ones).for_each(|bit| out[(bit / 8) as usize] |= 1 << (bit % 8));
    out
}

fn ones(bits: &[u8]) -> u64 {
    bits.iter().map(|octet| u64::from(octet.count_ones())).sum()
}

/// A block of a bitmap: what is behind the group's own bits counts as used.
fn bitmap(bits: &[u8], own: u64) -> Vec<u8> {
    let mut out = vec![0xff; BLOCK as usize];
    out[..bits.len()].copy_from_slice(bits);
    (own..(bits.len() as u64) * 8).for_each(|bit| out[(bit / 8) as usize] |= 1 << (bit % 8));
    out
}

/// The journal's own superblock, big-endian (version 2, empty).
fn journal_head() -> Vec<u8> {
    let mut out = vec![0; 1024];
    let mut put = |at: usize, value: u32| out[at..at + 4].copy_from_slice(&value.to_be_bytes());
    put(0x00, 0xc03b_3998);
    put(0x04, 4);
    put(0x0c, BLOCK as u32);
    put(0x10, JOURNAL_BLOCKS as u32);
    // Its log begins behind this block, with transaction 1.
    put(0x14, 1);
    put(0x18, 1);
    // One file system uses it.
    put(0x40, 1);
    out
}

fn superblock(geometry: &Geometry, free_blocks: u32, free_inodes: u32, journal: &[u8; MAP]) -> [u8; 1024] {
    let mut out = [0; 1024];
    let mut put = |at: usize, octets: &[u8]| out[at..at + octets.len()].copy_from_slice(octets);
    let group = GROUP_BLOCKS as u32;
    for (at, value) in [
        (0x00, geometry.inodes()),
        (0x04, geometry.blocks as u32),
        (0x0c, free_blocks),
        (0x10, free_inodes),
        // Blocks and clusters of 1024 << 2 octets.
        (0x18, 2),
        (0x1c, 2),
        (0x20, group),
        (0x24, group),
        (0x28, geometry.group_inodes as u32),
        (0x30, EPOCH),
        (0x40, EPOCH),
        // Revision 1: what follows counts.
        (0x4c, 1),
        (0x54, FIRST_INODE),
        (0x5c, COMPATIBLE),
        (0x60, INCOMPATIBLE),
        (0x64, COMPATIBLE_TO_READ),
        (0xe0, JOURNAL_INODE),
        // Mounted with user_xattr and acl, as mke2fs has it.
        (0x100, 0xc),
        (0x108, EPOCH),
        // Names are hashed with signed characters.
        (0x160, 1),
        // A copy of where the journal is, and its length.
        (0x10c + MAP + 4, (JOURNAL_BLOCKS * BLOCK) as u32),
    ] {
        put(at, &value.to_le_bytes());
    }
    for (at, value) in [
        // Mounts are not counted.
        (0x36, 0xffff),
        (0x38, 0xef53),
        // Clean; goes on after errors.
        (0x3a, 1),
        (0x3c, 1),
        (0x58, INODE as u16),
        (0x15c, 32),
        (0x15e, 32),
    ] {
        put(at, &value.to_le_bytes());
    }
    put(0x68, &UUID);
    put(0x78, LABEL);
    put(0xec, &UUID);
    // half_md4; the copy of the journal's place is one.
    put(0xfc, &[1, 1]);
    put(0x10c, journal);
    // Groups of 16 groups.
    put(0x174, &[4]);
    out
}
