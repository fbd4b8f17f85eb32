//! The tree as an ext4 file system around the content that lies on the disk already. Written for an empty disk and once: nothing is looked
//! for, moved or freed.
//!
//! | module | what |
//! | --- | --- |
//! | [`geometry`] | where everything is, from the disk's size alone |
//! | `inode` | an inode: its fields, extents and attributes |
//! | `directory` | the blocks of a directory |
//! | `superblock` | superblock, groups, bitmaps and journal |
//!
//! It is what Linux' own documentation describes (Documentation/filesystems/ext4) with as few features as a guest is well served by: extents,
//! a journal, times beyond 2038. There are no checksums of metadata: what a guest's disk holds is checked by the digests of its blocks.
//! `e2fsck` reads the result in the tests.

mod directory;
pub mod geometry;
mod inode;
mod superblock;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;

use crate::disk::{BLOCK, Disk};
use crate::tree::{Kind, Meta, ROOT, Refused, Tree};
use directory::Directory;
use geometry::{FIRST_INODE, Geometry, JOURNAL_INODE, ROOT_INODE};
use inode::Inode;

/// All times that an image does not say: a constant, so that the same image makes the same octets.
const EPOCH: u32 = 1;
/// Of the disk and of its hashes, for the same reason. No guest sees two of these disks.
const UUID: [u8; 16] = [0x6b, 0x1f, 0x0f, 0x4c, 0x5f, 0x0e, 0x4f, 0x6e, 0x9d, 0x4e, 0x73, 0x74, 0x61, 0x73, 0x69, 0x7a];
/// What `e2fsck` wants at the top.
const LOST: &[u8] = b"lost+found";
/// Names of one file at most, and directories in one directory that are counted (`EXT4_LINK_MAX`).
const LINKS: u32 = 65_000;
/// The layer of what is added here.
const LAYER: usize = usize::MAX;

/// The tree does not become a file system.
#[derive(Debug, thiserror::Error)]
pub enum Ext4Error {
    /// The image has what ext4 has not.
    #[error("{0}")]
    Image(String),
    /// The disk.
    #[error("cannot write the file system")]
    Disk(#[from] io::Error),
}

/// Writes the tree and everything around it.
pub fn write(tree: &mut Tree, disk: &mut Disk, geometry: &Geometry) -> Result<(), Ext4Error> {
    match tree.find(LOST) {
        Some(found) if !matches!(tree.node(found).kind, Kind::Directory(_)) => {
            return Err(Ext4Error::Image("its lost+found is no directory".to_owned()));
        }
        Some(_) => {}
        None => {
            let meta = Meta { mode: 0o700, mtime: EPOCH.into(), ..Meta::default() };
            let put = tree.put(LOST, LAYER, meta, Kind::Directory(BTreeMap::new()));
            put.map_err(|refused: Refused| Ext4Error::Image(refused.to_string()))?;
        }
    }
    let tree = &*tree;
    let walk = Walk::of(tree);
    let most = geometry.inodes();
    if walk.next - 1 > most {
        let what = format!("it has more files and directories than its disk has room for, {most} (templates.disk_mib)");
        return Err(Ext4Error::Image(what));
    }
    let mut directories = vec![0; geometry.groups as usize];
    for &(node, parent) in &walk.order {
        let number = walk.numbers[&node];
        if matches!(tree.node(node).kind, Kind::Directory(_)) {
            directories[geometry.group_of(number)] += 1;
        }
        let inode = make(tree, disk, &walk, node, parent)?;
        write_inode(disk, geometry, number, &inode)?;
    }
    let journal = Inode::file(0o100_600, geometry.journal, geometry::JOURNAL_BLOCKS * BLOCK);
    let journal = write_inode(disk, geometry, JOURNAL_INODE, &journal)?;
    superblock::write(disk, geometry, walk.next, &directories, &journal)?;
    Ok(())
}

/// All inodes, in the order in which a walk meets them.
struct Walk {
    /// Each with the number of the directory of its first name.
    order: Vec<(usize, u32)>,
    numbers: BTreeMap<usize, u32>,
    /// The first number that is free.
    next: u32,
}

impl Walk {
    fn of(tree: &Tree) -> Self {
        let mut walk =
            Self { order: vec![(ROOT, ROOT_INODE)], numbers: BTreeMap::from([(ROOT, ROOT_INODE)]), next: FIRST_INODE };
        let mut at = 0;
        while let Some(&(directory, _)) = walk.order.get(at) {
            at += 1;
            for (_, node) in tree.names(directory) {
                if let Entry::Vacant(free) = walk.numbers.entry(node) {
                    free.insert(walk.next);
                    walk.next += 1;
                    walk.order.push((node, walk.numbers[&directory]));
                }
            }
        }
        walk
    }
}

/// An inode of the tree, with what it has on the disk beside itself.
fn make(tree: &Tree, disk: &mut Disk, walk: &Walk, node: usize, parent: u32) -> Result<Inode, Ext4Error> {
    let found = tree.node(node);
    let mode = found.meta.mode;
    let mut inode = match &found.kind {
        Kind::Directory(_) => {
            let mut names = Directory::new(walk.numbers[&node], parent);
            let mut links = 2;
            for (name, child) in tree.names(node) {
                let kind = &tree.node(child).kind;
                links += u32::from(matches!(kind, Kind::Directory(_)));
                names.add(name, walk.numbers[&child], kind);
            }
            let octets = names.finish();
            let at = disk.deal(octets.len() as u64 / BLOCK)?;
            disk.put(at, 0, &octets)?;
            // Beyond what it can count it says 1 (the feature `dir_nlink`).
            let links = if links > LINKS { 1 } else { links };
            Inode { links, ..Inode::file(0o040_000 | mode, at, octets.len() as u64) }
        }
        Kind::File(None) => Inode::empty(0o100_000 | mode),
        Kind::File(Some(content)) => Inode::file(0o100_000 | mode, content.block, content.len),
        Kind::Symlink(target) if target.len() < inode::MAP => Inode::short_link(target),
        Kind::Symlink(target) => {
            let at = disk.deal(1)?;
            disk.put(at, 0, target)?;
            Inode::file(0o120_777, at, target.len() as u64)
        }
        Kind::Fifo => Inode { content: inode::Where::Nowhere, ..Inode::empty(0o010_000 | mode) },
    };
    if !matches!(found.kind, Kind::Directory(_)) {
        inode.links = found.links;
        if inode.links > LINKS {
            return Err(Ext4Error::Image(format!("a file of it has {} names, at most {LINKS} are taken", inode.links)));
        }
    }
    (inode.uid, inode.gid, inode.mtime) = (found.meta.uid, found.meta.gid, found.meta.mtime);
    if !found.meta.xattrs.is_empty() {
        let at = disk.deal(1)?;
        disk.put(at, 0, &inode::attributes(&found.meta.xattrs))?;
        inode.attributes = Some(at);
    }
    Ok(inode)
}

/// Writes an inode, and answers what it says of where its content is.
fn write_inode(
    disk: &mut Disk,
    geometry: &Geometry,
    number: u32,
    inode: &Inode,
) -> Result<[u8; inode::MAP], Ext4Error> {
    let (map, blocks) = inode.map(disk)?;
    let (block, offset) = geometry.place_of(number);
    disk.put(block, offset, &inode.encode(&map, blocks))?;
    Ok(map)
}
