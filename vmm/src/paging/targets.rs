//! Where the pager's pages go.

use std::sync::Arc;

use stasis_snapshot::capture::{PageDigests, PageReader};
use stasis_snapshot::page::PAGE_SIZE;
use stasis_snapshot::pager::PageTarget;

use crate::machine::disk::{BaseFile, Disk};
use crate::memory::GuestRam;

/// Blocks that are copied at once.
const COPY: u64 = 64;

/// Hands base blocks to `write`, a run of them at a time.
fn copy_base(
    base: Option<&BaseFile>,
    first_page: u64,
    first_block: u64,
    pages: u64,
    write: impl Fn(u64, &[u8]) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let base = base.ok_or_else(|| std::io::Error::other("pages refer to a base that is not there"))?;
    let mut buffer = vec![0; COPY.min(pages) as usize * PAGE_SIZE];
    let mut done = 0;
    while done < pages {
        let blocks = COPY.min(pages - done);
        let bytes = &mut buffer[..blocks as usize * PAGE_SIZE];
        base.read(first_block + done, bytes)?;
        write(first_page + done, bytes)?;
        done += blocks;
    }
    Ok(())
}

/// Memory, filled through the image mapping. Pages that equal blocks of the first disk's base are copied from it.
pub(crate) struct MemoryTarget {
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) base: Option<BaseFile>,
    /// Noted as they arrive: what the next capture compares with.
    pub(crate) digests: Arc<PageDigests>,
}

impl PageTarget for MemoryTarget {
    fn place(&self, first_page: u64, bytes: &[u8]) -> std::io::Result<()> {
        self.digests.note(first_page, bytes);
        self.ram.write(first_page, bytes)
    }

    fn place_base(&self, first_page: u64, first_block: u64, pages: u64) -> std::io::Result<()> {
        copy_base(self.base.as_ref(), first_page, first_block, pages, |page, bytes| self.place(page, bytes))
    }
}

/// A disk. Blocks that equal the base at their own place are left to it.
pub(crate) struct DiskTarget {
    pub(crate) disk: Disk,
    /// As for memory.
    pub(crate) digests: Arc<PageDigests>,
}

impl PageTarget for DiskTarget {
    fn place(&self, first_page: u64, bytes: &[u8]) -> std::io::Result<()> {
        self.digests.note(first_page, bytes);
        self.disk.overlay.restore_block(first_page, bytes).map_err(std::io::Error::other)
    }

    fn place_base(&self, first_page: u64, first_block: u64, pages: u64) -> std::io::Result<()> {
        if first_page == first_block {
            return Ok(());
        }
        copy_base(self.disk.base.as_ref(), first_page, first_block, pages, |page, bytes| self.place(page, bytes))
    }
}
