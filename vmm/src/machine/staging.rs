//! Staging: a copy of the pages that a capture is to send, so that the guest need stand still for the copying alone.
//!
//! The memory is made and touched before the guest is stopped: first use of fresh memory costs more than the copy. Which pages really
//! changed is left to the capture: telling costs as much as copying.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use stasis_snapshot::capture::PageReader;
use stasis_snapshot::page::PAGE_SIZE;

use super::disk::Disk;
use crate::memory::GuestRam;
use crate::pages::PageSet;

/// Pages copied with one call.
const STEP: u64 = 512;

/// Copied pages of memory.
pub(crate) struct Staging {
    bytes: Vec<u8>,
    /// Which pages, ascending, and where the first of each run is in `bytes`, in pages.
    runs: Vec<(Range<u64>, u64)>,
    used: u64,
}

impl Staging {
    /// Room for about `pages` pages, touched. More are taken if needed, while the guest stands still.
    pub(crate) fn with_room(pages: u64) -> Self {
        let mut bytes = vec![0_u8; pages as usize * PAGE_SIZE];
        // A zeroed allocation is only promised: a write to each page makes it.
        for page in bytes.chunks_mut(PAGE_SIZE) {
            if let Some(first) = page.first_mut() {
                *first = std::hint::black_box(0);
            }
        }
        Self { bytes, runs: Vec::new(), used: 0 }
    }

    /// Copies `pages` of memory. vCPUs and devices stand still.
    pub(super) fn copy(&mut self, ram: &GuestRam, pages: &PageSet) -> io::Result<()> {
        for run in pages.runs() {
            let mut first = run.start;
            while first < run.end {
                let count = STEP.min(run.end - first);
                let into = self.room(count);
                ram.read(first, into)?;
                self.push(first..first + count);
                first += count;
            }
        }
        Ok(())
    }

    /// Copies dirty blocks of a disk.
    pub(super) fn copy_disk(disk: &Disk, blocks: &PageSet) -> io::Result<Arc<dyn PageReader>> {
        let mut copy = Self { bytes: Vec::new(), runs: Vec::new(), used: 0 };
        for run in blocks.runs() {
            let mut first = run.start;
            while first < run.end {
                let count = STEP.min(run.end - first);
                PageReader::read(disk, first, copy.room(count))?;
                copy.push(first..first + count);
                first += count;
            }
        }
        Ok(Arc::new(copy))
    }

    fn room(&mut self, pages: u64) -> &mut [u8] {
        let start = self.used as usize * PAGE_SIZE;
        let end = start + pages as usize * PAGE_SIZE;
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        &mut self.bytes[start..end]
    }

    fn push(&mut self, pages: Range<u64>) {
        let at = self.used;
        self.used += pages.end - pages.start;
        match self.runs.last_mut() {
            Some((last, _)) if last.end == pages.start => last.end = pages.end,
            _ => self.runs.push((pages, at)),
        }
    }

    fn find(&self, first_page: u64, pages: u64) -> Option<&[u8]> {
        let after = self.runs.partition_point(|(run, _)| run.start <= first_page);
        let (run, at) = self.runs.get(after.checked_sub(1)?)?;
        let end = first_page.checked_add(pages)?;
        if end > run.end {
            return None;
        }
        let start = (at + (first_page - run.start)) as usize * PAGE_SIZE;
        self.bytes.get(start..start + pages as usize * PAGE_SIZE)
    }
}

impl PageReader for Staging {
    fn read(&self, first_page: u64, into: &mut [u8]) -> io::Result<()> {
        let pages = (into.len() / PAGE_SIZE) as u64;
        let found = self.find(first_page, pages);
        into.copy_from_slice(found.ok_or_else(|| io::Error::other("the page was not staged"))?);
        Ok(())
    }

    fn view(&self, first_page: u64, pages: u64) -> Option<&[u8]> {
        self.find(first_page, pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::ReservedRam;

    #[test]
    fn staged_pages_are_what_memory_was() {
        let ram = ReservedRam::new(8 << 20).unwrap().map(None).unwrap();
        let mut pages = PageSet::new(ram.pages());
        for (first, fill) in [(3, 1), (4, 2), (700, 3), (2047, 4)] {
            ram.write(first, &[fill; PAGE_SIZE]).unwrap();
            pages.insert(first..first + 1);
        }
        let mut staging = Staging::with_room(2);
        staging.copy(&ram, &pages).unwrap();
        ram.write(3, &[9; 2 * PAGE_SIZE]).unwrap();
        let both = staging.view(3, 2).unwrap();
        assert!(both[..PAGE_SIZE] == [1; PAGE_SIZE] && both[PAGE_SIZE..] == [2; PAGE_SIZE]);
        let mut page = [0; PAGE_SIZE];
        staging.read(2047, &mut page).unwrap();
        assert_eq!(page, [4; PAGE_SIZE]);
        assert!(staging.view(4, 2).is_none() && staging.read(5, &mut page).is_err());
    }
}
