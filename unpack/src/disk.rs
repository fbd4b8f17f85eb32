//! The disk as blocks: where content goes, one file behind the other, and what of it is used at the end.
//!
//! Blocks are dealt in one direction. What upper layers take away again is given back to the host's file system and is free for the guest, but
//! not dealt again: so every file lies in one piece, and the octets depend on nothing but the layers.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;

use rustix::fs::{FallocateFlags, fallocate};

/// Octets of a block.
pub const BLOCK: u64 = 4096;
/// Octets that are read at once. As many zeros on end are not written: the disk is empty there.
const PIECE: usize = 64 << 10;

/// Where the content of a file is: never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content {
    /// Its first block.
    pub block: u64,
    /// Octets.
    pub len: u64,
}

impl Content {
    /// Blocks it takes.
    pub fn blocks(self) -> u64 {
        self.len.div_ceil(BLOCK)
    }
}

/// See the module.
#[derive(Debug)]
pub struct Disk {
    file: File,
    /// The first block that was not dealt yet.
    next: u64,
    blocks: u64,
    free_again: Vec<Content>,
}

impl Disk {
    /// A disk of so many blocks, of which those below `first` are somebody else's to write.
    pub fn new(file: File, first: u64, blocks: u64) -> Self {
        Self { file, next: first, blocks, free_again: Vec::new() }
    }

    /// Blocks in a row.
    pub fn deal(&mut self, blocks: u64) -> io::Result<u64> {
        let first = self.next;
        let end = first.checked_add(blocks).filter(|end| *end <= self.blocks);
        self.next = end.ok_or_else(|| io::Error::other("the image does not fit its disk (templates.disk_mib)"))?;
        Ok(first)
    }

    /// Keeps `len` octets of `body`; `None` for none.
    pub fn keep(&mut self, body: &mut impl Read, len: u64) -> io::Result<Option<Content>> {
        if len == 0 {
            return Ok(None);
        }
        let content = Content { block: self.deal(len.div_ceil(BLOCK))?, len };
        let mut piece = vec![0; PIECE];
        let mut done = 0;
        while done < len {
            let part = usize::try_from(len - done).unwrap_or(PIECE).min(PIECE);
            body.read_exact(&mut piece[..part]).map_err(early)?;
            if piece[..part].iter().any(|octet| *octet != 0) {
                self.file.write_all_at(&piece[..part], content.block * BLOCK + done)?;
            }
            done += part as u64;
        }
        Ok(Some(content))
    }

    /// Gives content back.
    pub fn forget(&mut self, content: Content) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, flags, content.block * BLOCK, content.blocks() * BLOCK)?;
        self.free_again.push(content);
        Ok(())
    }

    /// Writes octets at a block, `offset` octets behind its beginning.
    pub fn put(&self, block: u64, offset: u64, octets: &[u8]) -> io::Result<()> {
        self.file.write_all_at(octets, block * BLOCK + offset)
    }

    /// One bit for each block, set when it is used.
    pub fn used(&self) -> Vec<u8> {
        let mut bits = vec![0; self.blocks.div_ceil(8) as usize];
        (0..self.next).for_each(|block| bits[(block / 8) as usize] |= 1 << (block % 8));
        for content in &self.free_again {
            (content.block..content.block + content.blocks())
                .for_each(|block| bits[(block / 8) as usize] &= !(1 << (block % 8)));
        }
        bits
    }
}

fn early(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::UnexpectedEof { io::Error::other("its archive is cut short") } else { error }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_where_it_was_put_and_what_is_forgotten_is_free() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(100 * BLOCK).unwrap();
        let mut disk = Disk::new(file.try_clone().unwrap(), 10, 100);
        let long = [vec![7; 5000], vec![0; 200_000], vec![9; 3]].concat();
        let one = disk.keep(&mut long.as_slice(), long.len() as u64).unwrap().unwrap();
        let two = disk.keep(&mut b"two".as_slice(), 3).unwrap().unwrap();
        assert_eq!((one.block, two.block), (10, 10 + one.blocks()));
        let read = |content: Content| {
            let mut found = vec![1; content.len as usize];
            file.read_exact_at(&mut found, content.block * BLOCK).unwrap();
            found
        };
        assert_eq!((read(one), read(two)), (long.clone(), b"two".to_vec()));
        disk.forget(one).unwrap();
        assert!(read(one).iter().all(|octet| *octet == 0));
        let used: Vec<u64> = (0..100).filter(|n| disk.used()[n / 8] >> (n % 8) & 1 == 1).map(|n| n as u64).collect();
        assert_eq!(used, (0..10).chain([two.block]).collect::<Vec<_>>());
        assert_eq!(disk.keep(&mut b"".as_slice(), 0).unwrap(), None);
        // A body that ends early, and more than there is.
        assert!(disk.keep(&mut b"short".as_slice(), 6).is_err());
        assert!(disk.keep(&mut long.as_slice(), u64::MAX).is_err());
    }
}
