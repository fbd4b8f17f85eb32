//! A private, sparse overlay over a read-only base: what a guest sees as its disk, and what a capture reads.
//!
//! The disk is divided into blocks of [`BLOCK_BYTES`]. A block is *present* when the overlay file holds its content; any other reads
//! as the base, zero past the base's end. A block is *dirty* when it changed since the dirty set was last taken; the capture takes
//! the set, and merges it back if it fails. A disk that is restored lazily also has *absent* blocks: the snapshot has their content,
//! and it is not here yet. See `lazy.rs`.
//!
//! # Threads
//!
//! All methods take `&self`. One lock guards the two bitmaps and is held for the length of a write, so writes are serial. Dirty bits
//! are set before the bytes are written, so that a write that fails half-way is not lost on a capture; present bits after, so that
//! nobody reads a block that is not there. Reads take the lock just to look at the bitmaps: a read beside a write of the same blocks
//! may see either, and a capture that took the dirty set before the write finds the block dirty again. No block becomes absent
//! while the disk is in use, so what was found here stays here; absent blocks are fetched without the lock.

mod block_set;
mod lazy;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use block_set::BlockSet;
pub use lazy::BlockSource;
use lazy::Lazy;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

/// Size of a block, bytes: the unit of presence, of dirtiness, and of a page in an image.
pub const BLOCK_BYTES: u64 = 4096;
/// Largest disk, bytes. Bounds the bitmaps: 64 MiB each at this size.
pub const MAX_DISK_BYTES: u64 = 1 << 41;

const BLOCK: usize = BLOCK_BYTES as usize;
/// Written at once where holes cannot be punched.
static ZEROS: [u8; 16 * BLOCK] = [0; 16 * BLOCK];

/// What went wrong with an overlay.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// The disk's size is zero, not a multiple of 512, or too large.
    #[error("{0} bytes is no size for a disk: a multiple of 512 up to 2 TiB is needed")]
    Size(u64),
    /// The overlay file is not empty, so absent blocks would not be holes.
    #[error("the overlay file already has {0} bytes, an empty one is needed")]
    NotEmpty(u64),
    /// The range goes past the end of the disk.
    #[error("{len} bytes at {offset} go past the end of the disk of {size} bytes")]
    OutOfRange {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Of the disk, bytes.
        size: u64,
    },
    /// A block operation was given a buffer that is no whole number of blocks.
    #[error("a buffer of {0} bytes is no whole number of blocks")]
    Unaligned(usize),
    /// The disk was opened without an overlay.
    #[error("the disk is read-only")]
    ReadOnly,
    /// The host's file system refused.
    #[error("cannot {operation} at byte {offset}")]
    Io {
        /// What was tried, on which file.
        operation: &'static str,
        /// Where.
        offset: u64,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

type Result<T> = std::result::Result<T, OverlayError>;

/// A disk. See the module's documentation.
#[derive(Debug)]
pub struct Overlay {
    size: u64,
    base: Option<Base>,
    /// None for a read-only disk.
    file: Option<File>,
    blocks: Mutex<Blocks>,
    lazy: Lazy,
}

#[derive(Debug)]
struct Base {
    file: File,
    len: u64,
}

#[derive(Debug)]
struct Blocks {
    present: BlockSet,
    dirty: BlockSet,
    /// Their content is the snapshot's. Empty and without bound on a disk that is not lazy.
    absent: BlockSet,
    /// The file system can punch holes; false after it said that it cannot.
    punch: bool,
    /// A failed write may have left bytes in a block that is not present, so absent blocks are holes no longer.
    torn: bool,
}

impl Overlay {
    /// A writable disk of `size` bytes over `base`, or over nothing but zeros. `file` must be empty and private to this disk.
    pub fn new(base: Option<File>, file: File, size: u64) -> Result<Self> {
        let len = file.metadata().map_err(|source| io_error("stat the overlay", 0, source))?.len();
        if len != 0 {
            return Err(OverlayError::NotEmpty(len));
        }
        let disk = Self::with_files(base, Some(file), size)?;
        if let Some(file) = &disk.file {
            let len = disk.block_count() * BLOCK_BYTES;
            file.set_len(len).map_err(|source| io_error("size the overlay", len, source))?;
        }
        Ok(disk)
    }

    /// A read-only disk of `size` bytes.
    pub fn read_only(base: File, size: u64) -> Result<Self> {
        Self::with_files(Some(base), None, size)
    }

    fn with_files(base: Option<File>, file: Option<File>, size: u64) -> Result<Self> {
        if size == 0 || size > MAX_DISK_BYTES || !size.is_multiple_of(512) {
            return Err(OverlayError::Size(size));
        }
        let base = match base {
            Some(file) => {
                let len = file.metadata().map_err(|source| io_error("stat the base", 0, source))?.len();
                Some(Base { file, len })
            }
            None => None,
        };
        let count = size.div_ceil(BLOCK_BYTES);
        let blocks = Blocks {
            present: BlockSet::new(count),
            dirty: BlockSet::new(count),
            absent: BlockSet::new(0),
            punch: true,
            torn: false,
        };
        Ok(Self { size, base, file, blocks: Mutex::new(blocks), lazy: Lazy::default() })
    }

    /// Size that the guest sees, bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Blocks of the disk; the last may be partial.
    pub fn block_count(&self) -> u64 {
        self.size.div_ceil(BLOCK_BYTES)
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.file.is_none()
    }

    /// Reads the disk at byte `offset`.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.check(offset, out.len() as u64)?;
        self.read_merged(offset, out)
    }

    /// Writes the disk at byte `offset`. On an error some of `data` may have been written.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.check(offset, data.len() as u64)?;
        self.fetch_partial(offset, data.len() as u64)?;
        let mut blocks = self.lock();
        blocks.dirty.insert(&blocks_of(offset, data.len() as u64));
        let result = self.write_locked(&mut blocks, offset, data);
        blocks.torn |= result.is_err();
        result
    }

    fn write_locked(&self, blocks: &mut Blocks, mut offset: u64, mut data: &[u8]) -> Result<()> {
        while !data.is_empty() {
            let block = offset / BLOCK_BYTES;
            let within = (offset % BLOCK_BYTES) as usize;
            let len = if within == 0 && data.len() >= BLOCK {
                let len = data.len() / BLOCK * BLOCK;
                self.write_file(offset, &data[..len])?;
                len
            } else {
                let len = data.len().min(BLOCK - within);
                if blocks.present.contains(block) {
                    self.write_file(offset, &data[..len])?;
                } else {
                    let mut whole = [0; BLOCK];
                    self.read_base(block * BLOCK_BYTES, &mut whole)?;
                    whole[within..within + len].copy_from_slice(&data[..len]);
                    self.write_file(block * BLOCK_BYTES, &whole)?;
                }
                len
            };
            blocks.now_here(&(block..(offset + len as u64).div_ceil(BLOCK_BYTES)));
            offset += len as u64;
            data = &data[len..];
        }
        Ok(())
    }

    /// Makes `len` bytes at `offset` read as zero, without room on the host where it can punch holes.
    pub fn zero_at(&self, offset: u64, len: u64) -> Result<()> {
        self.check(offset, len)?;
        self.fetch_partial(offset, len)?;
        let end = offset + len;
        let whole = offset.div_ceil(BLOCK_BYTES)..end / BLOCK_BYTES;
        let mut blocks = self.lock();
        blocks.dirty.insert(&blocks_of(offset, len));
        let result = if whole.is_empty() {
            self.zero_partial(&mut blocks, offset, end)
        } else {
            self.zero_partial(&mut blocks, offset, whole.start * BLOCK_BYTES)
                .and_then(|()| self.zero_blocks(&mut blocks, &whole))
                .and_then(|()| self.zero_partial(&mut blocks, whole.end * BLOCK_BYTES, end))
        };
        blocks.torn |= result.is_err();
        result
    }

    /// Bytes from `offset` to `end`, which lie in at most two blocks.
    fn zero_partial(&self, blocks: &mut Blocks, offset: u64, end: u64) -> Result<()> {
        let len = (end - offset) as usize;
        self.write_locked(blocks, offset, &ZEROS[..len])
    }

    /// Makes whole blocks present and zero.
    fn zero_blocks(&self, blocks: &mut Blocks, range: &Range<u64>) -> Result<()> {
        let file = self.file()?;
        let offset = range.start * BLOCK_BYTES;
        // Absent blocks are holes already, unless a write failed.
        let stale = if blocks.torn { vec![range.clone()] } else { blocks.present.ranges_within(range) };
        if !stale.is_empty() && blocks.punch {
            let len = (range.end - range.start) * BLOCK_BYTES;
            match rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len) {
                Ok(()) => {
                    blocks.now_here(range);
                    return Ok(());
                }
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => blocks.punch = false,
                Err(error) => {
                    return Err(io_error("punch a hole in the overlay", offset, error.into()));
                }
            }
        }
        for run in stale {
            let mut at = run.start * BLOCK_BYTES;
            while at < run.end * BLOCK_BYTES {
                let len = (run.end * BLOCK_BYTES - at).min(ZEROS.len() as u64);
                self.write_file(at, &ZEROS[..len as usize])?;
                at += len;
            }
        }
        blocks.now_here(range);
        Ok(())
    }

    /// Makes everything written so far durable on the host (fdatasync).
    pub fn flush(&self) -> Result<()> {
        match &self.file {
            Some(file) => file.sync_data().map_err(|source| io_error("flush the overlay", 0, source)),
            None => Ok(()),
        }
    }

    /// Reads whole blocks from block `first` on, as the guest sees them; past the end of a partial last block, zeros.
    pub fn read_blocks(&self, first: u64, out: &mut [u8]) -> Result<()> {
        let offset = self.check_blocks(first, out.len())?;
        self.read_merged(offset, out)
    }

    /// Puts the content of saved blocks in place from block `first` on: present, and not dirty. On a lazy disk only those that are
    /// absent: the guest has written the others.
    pub fn restore_block(&self, first: u64, data: &[u8]) -> Result<()> {
        self.check_blocks(first, data.len())?;
        let all = first..first + data.len() as u64 / BLOCK_BYTES;
        // The look at the set and the write are one step for everybody who writes: none can come between.
        let mut blocks = self.lock();
        for run in self.to_restore(&blocks, all) {
            let part = (run.start - first) as usize * BLOCK..(run.end - first) as usize * BLOCK;
            let result = self.write_file(run.start * BLOCK_BYTES, &data[part]);
            blocks.torn |= result.is_err();
            result?;
            blocks.now_here(&run);
        }
        Ok(())
    }

    /// Makes the blocks of `range` present and zero, and not dirty. On a lazy disk only those that are absent.
    pub fn restore_zero(&self, range: Range<u64>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        if range.end > self.block_count() {
            return Err(self.out_of_range(
                range.start.saturating_mul(BLOCK_BYTES),
                (range.end - range.start).saturating_mul(BLOCK_BYTES),
            ));
        }
        let mut blocks = self.lock();
        for run in self.to_restore(&blocks, range) {
            let result = self.zero_blocks(&mut blocks, &run);
            blocks.torn |= result.is_err();
            result?;
        }
        Ok(())
    }

    /// Blocks that the overlay holds, as ascending, disjoint, non-adjacent ranges.
    pub fn present(&self) -> Vec<Range<u64>> {
        self.lock().present.ranges()
    }

    /// Blocks that changed since the set was last taken, in the same form.
    pub fn dirty(&self) -> Vec<Range<u64>> {
        self.lock().dirty.ranges()
    }

    /// Number of dirty blocks.
    pub fn dirty_count(&self) -> u64 {
        self.lock().dirty.len()
    }

    /// Takes the dirty set, leaving it empty. Whoever takes it and does not commit merges it back.
    pub fn take_dirty(&self) -> Vec<Range<u64>> {
        let mut blocks = self.lock();
        let taken = blocks.dirty.ranges();
        blocks.dirty.clear();
        taken
    }

    /// Adds `ranges` to the dirty set. Blocks past the end of the disk are ignored.
    pub fn merge_dirty(&self, ranges: &[Range<u64>]) {
        let mut blocks = self.lock();
        for range in ranges {
            blocks.dirty.insert(range);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Blocks> {
        // Bits are set after the bytes are written, so the sets are sound wherever a panic struck.
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self) -> Result<&File> {
        self.file.as_ref().ok_or(OverlayError::ReadOnly)
    }

    fn check(&self, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(self.out_of_range(offset, len)),
        }
    }

    /// Answers the first byte of the blocks.
    fn check_blocks(&self, first: u64, len: usize) -> Result<u64> {
        if !len.is_multiple_of(BLOCK) {
            return Err(OverlayError::Unaligned(len));
        }
        match first.checked_add(len as u64 / BLOCK_BYTES) {
            Some(end) if end <= self.block_count() => Ok(first * BLOCK_BYTES),
            _ => Err(self.out_of_range(first.saturating_mul(BLOCK_BYTES), len as u64)),
        }
    }

    fn out_of_range(&self, offset: u64, len: u64) -> OverlayError {
        OverlayError::OutOfRange { offset, len, size: self.size }
    }

    /// Reads from the overlay file where blocks are present, from the base elsewhere, in as few reads as there are runs.
    fn read_merged(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let end = offset + out.len() as u64;
        let wanted = offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES);
        self.fetch_absent(&wanted)?;
        let present = self.lock().present.ranges_within(&wanted);
        let mut at = offset;
        let part = |from: u64, to: u64| (from - offset) as usize..(to - offset) as usize;
        for run in present {
            let start = (run.start * BLOCK_BYTES).max(at);
            let stop = (run.end * BLOCK_BYTES).min(end);
            self.read_base(at, &mut out[part(at, start)])?;
            self.read_file(start, &mut out[part(start, stop)])?;
            at = stop;
        }
        self.read_base(at, &mut out[part(at, end)])
    }

    fn read_file(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.file()?.read_exact_at(out, offset).map_err(|source| io_error("read the overlay", offset, source))
    }

    fn write_file(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.file()?.write_all_at(data, offset).map_err(|source| io_error("write the overlay", offset, source))
    }

    fn read_base(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let backed =
            self.base.as_ref().map_or(0, |base| base.len.saturating_sub(offset)).min(out.len() as u64) as usize;
        let (backed, beyond) = out.split_at_mut(backed);
        beyond.fill(0);
        match &self.base {
            Some(base) if !backed.is_empty() => {
                base.file.read_exact_at(backed, offset).map_err(|source| io_error("read the base", offset, source))
            }
            _ => Ok(()),
        }
    }
}

impl Blocks {
    /// The overlay file holds the content of these blocks from now on.
    fn now_here(&mut self, range: &Range<u64>) {
        self.present.insert(range);
        self.absent.remove(range);
    }
}

/// Blocks that `len` bytes at `offset` touch.
fn blocks_of(offset: u64, len: u64) -> Range<u64> {
    let first = offset / BLOCK_BYTES;
    if len == 0 { first..first } else { first..(offset + len).div_ceil(BLOCK_BYTES) }
}

fn io_error(operation: &'static str, offset: u64, source: io::Error) -> OverlayError {
    OverlayError::Io { operation, offset, source }
}

#[cfg(test)]
mod tests;
