//! A disk whose blocks come from a snapshot while the guest runs.
//!
//! A block is absent until it is restored, or written or zeroed whole: whichever comes first decides its content. What needs the
//! content of an absent block asks the [`BlockSource`] for it, which restores it before it answers.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::{BLOCK_BYTES, BlockSet, Blocks, Overlay, Result, io_error};

/// Where absent blocks come from.
pub trait BlockSource: Send + Sync {
    /// Returns when all of `blocks` that are absent have been put in place by [`Overlay::restore_block`] or
    /// [`Overlay::restore_zero`], or an error that says why they cannot be; there may be others among them. Called from the threads that use the disk, concurrently, and blocks them; the disk's lock is
    /// not held.
    fn fetch(&self, blocks: Range<u64>) -> io::Result<()>;
}

/// What a lazy disk has besides.
#[derive(Default)]
pub(super) struct Lazy {
    source: OnceLock<Arc<dyn BlockSource>>,
    /// Why the first fetch that failed did.
    failed: Mutex<Option<Arc<io::Error>>>,
}

impl fmt::Debug for Lazy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lazy").field("lazy", &self.source.get().is_some()).finish_non_exhaustive()
    }
}

impl Overlay {
    /// Declares the blocks of `absent` absent. Before the disk is used, and once; a second call changes nothing. Blocks that need
    /// nothing restored, because they are zero without a base there, or equal the base's, are not to be named.
    pub fn set_lazy(&self, source: Arc<dyn BlockSource>, absent: &[Range<u64>]) {
        let mut set = BlockSet::new(self.block_count());
        for range in absent {
            set.insert(range);
        }
        let mut blocks = self.lock();
        if self.lazy.source.set(source).is_ok() {
            blocks.absent = set;
        }
    }

    /// Blocks that are still absent, as ascending, disjoint, non-adjacent ranges.
    pub fn absent(&self) -> Vec<Range<u64>> {
        self.lock().absent.ranges()
    }

    /// Why absent blocks could not be fetched, once that has happened: the guest has seen I/O errors.
    pub fn fetch_error(&self) -> Option<Arc<io::Error>> {
        self.lazy.failed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Which blocks of `range` a restore may write.
    pub(super) fn to_restore(&self, blocks: &Blocks, range: Range<u64>) -> Vec<Range<u64>> {
        if self.lazy.source.get().is_some() { blocks.absent.ranges_within(&range) } else { vec![range] }
    }

    /// Fetches what is absent of the blocks that `len` bytes at `offset` cover in part.
    pub(super) fn fetch_partial(&self, offset: u64, len: u64) -> Result<()> {
        let end = offset + len;
        let (first, last) = (offset / BLOCK_BYTES, end / BLOCK_BYTES);
        if len > 0 && !offset.is_multiple_of(BLOCK_BYTES) {
            self.fetch_absent(&(first..first + 1))?;
        }
        if len > 0 && !end.is_multiple_of(BLOCK_BYTES) {
            self.fetch_absent(&(last..last + 1))?;
        }
        Ok(())
    }

    /// Returns when none of `blocks` is absent.
    pub(super) fn fetch_absent(&self, blocks: &Range<u64>) -> Result<()> {
        let Some(source) = self.lazy.source.get() else { return Ok(()) };
        let absent = self.lock().absent.ranges_within(blocks);
        let (Some(first), Some(last)) = (absent.first(), absent.last()) else { return Ok(()) };
        // All at once: the source has them fetched side by side.
        let wanted = first.start..last.end;
        let fetched = source.fetch(wanted.clone()).and_then(|()| {
            if self.lock().absent.ranges_within(&wanted).is_empty() {
                Ok(())
            } else {
                Err(io::Error::other("the source left blocks absent"))
            }
        });
        if let Err(error) = fetched {
            let error = Arc::new(error);
            let mut failed = self.lazy.failed.lock().unwrap_or_else(PoisonError::into_inner);
            failed.get_or_insert_with(|| Arc::clone(&error));
            let source = io::Error::other(error);
            return Err(io_error("fetch blocks from the snapshot", wanted.start * BLOCK_BYTES, source));
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "lazy_tests.rs"]
mod tests;
