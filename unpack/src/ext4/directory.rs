//! The blocks of a directory: names one behind the other, the last of a block reaching to its end.

use crate::disk::BLOCK;
use crate::tree::Kind;

const BLOCK_LEN: usize = BLOCK as usize;
const DIRECTORY: u8 = 2;

/// See the module.
pub(super) struct Directory {
    octets: Vec<u8>,
    /// Where the last name begins.
    last: usize,
}

impl Directory {
    /// One with its own two names.
    pub(super) fn new(own: u32, parent: u32) -> Self {
        let mut directory = Self { octets: Vec::new(), last: 0 };
        directory.push(b".", own, DIRECTORY);
        directory.push(b"..", parent, DIRECTORY);
        directory
    }

    pub(super) fn add(&mut self, name: &[u8], inode: u32, kind: &Kind) {
        let kind = match kind {
            Kind::File(_) => 1,
            Kind::Directory(_) => DIRECTORY,
            Kind::Fifo => 5,
            Kind::Symlink(_) => 7,
        };
        self.push(name, inode, kind);
    }

    /// `name` has at most 255 octets.
    fn push(&mut self, name: &[u8], inode: u32, kind: u8) {
        let len = (8 + name.len()).next_multiple_of(4);
        if self.octets.len() % BLOCK_LEN + len > BLOCK_LEN {
            self.close();
        }
        self.last = self.octets.len();
        self.octets.extend_from_slice(&inode.to_le_bytes());
        self.octets.extend_from_slice(&(len as u16).to_le_bytes());
        self.octets.extend_from_slice(&[name.len() as u8, kind]);
        self.octets.extend_from_slice(name);
        self.octets.resize(self.last + len, 0);
    }

    /// Has the last name reach to the end of its block.
    fn close(&mut self) {
        let end = self.octets.len().next_multiple_of(BLOCK_LEN);
        if let Some(len) = self.octets.get_mut(self.last + 4..self.last + 6) {
            len.copy_from_slice(&((end - self.last) as u16).to_le_bytes());
        }
        self.octets.resize(end, 0);
    }

    /// Whole blocks.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.close();
        self.octets
    }
}
