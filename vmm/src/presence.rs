//! Which parts of guest memory are there, and which of those were written: the page tables of the guest mapping, by granule.
//!
//! After a restore most granules are **absent**: an access faults to the pager (see [`crate::paging`]), which fills the image mapping and
//! then makes the granule **present**. Writes to present memory are tracked in the page tables themselves, where the kernel can: a granule
//! that a huge page maps stays one entry, costs the guest one cheap fault for its first write after a capture, and counts as written
//! whole; the capture finds out by digests which of its pages changed. On small pages the tracking is exact.
//!
//! One lock covers both: a granule never becomes present between the two steps of a look at what was written.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use crate::bus::lock;
use crate::inherited::HostFiles;
use crate::memory::{GRANULE_PAGES, GuestRam};
use crate::pagemap::Pagemap;
use crate::pages::PageSet;
use crate::uffd::Uffd;

/// What becomes of pages that were found written.
#[derive(Clone, Copy)]
enum After {
    /// They are write-protected in the same step: the next write is found again.
    Protect,
    /// Nothing: they are found again without one.
    Leave,
}

/// Page tables of guest memory cannot be read or changed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} of guest memory")]
pub struct PresenceError {
    /// What was asked of the kernel.
    pub what: &'static str,
    /// Its answer.
    #[source]
    pub source: io::Error,
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> PresenceError {
    move |source| PresenceError { what, source }
}

/// Presence and write tracking of one guest's memory.
pub(crate) struct Presence {
    ram: Arc<GuestRam>,
    /// None where the kernel gives us no userfaultfd: memory is then always present.
    uffd: Option<Uffd>,
    /// None where writes cannot be tracked by page tables.
    pagemap: Option<Pagemap>,
    present: Mutex<PageSet>,
}

impl Presence {
    /// All memory is present; nothing is tracked yet.
    pub(crate) fn new(ram: Arc<GuestRam>, files: &HostFiles) -> Self {
        let uffd = match Uffd::new(files.userfaultfd.as_ref()) {
            Ok(uffd) => Some(uffd),
            Err(error) => {
                tracing::info!(%error, "no userfaultfd: restores will be eager");
                None
            }
        };
        let can = uffd.as_ref().map(Uffd::abilities);
        let opened = files.pagemap.as_ref().ok_or(io::ErrorKind::NotFound.into());
        let pagemap = match opened.and_then(Pagemap::new) {
            // A page that is swapped out leaves no trace in the page tables of a shared mapping, nor does what was written to it.
            Ok(pagemap) if can.is_some_and(|can| can.track_writes) && !host_swaps() => Some(pagemap),
            Ok(_) => None,
            Err(error) => {
                tracing::debug!(%error, "no PAGEMAP_SCAN: writes are tracked by KVM");
                None
            }
        };
        let mut present = PageSet::new(ram.pages());
        present.insert(0..ram.pages());
        Self { ram, uffd, pagemap, present: Mutex::new(present) }
    }

    /// The same on a kernel whose page tables do not tell.
    #[cfg(test)]
    pub(crate) fn without_page_tables(ram: Arc<GuestRam>, files: &HostFiles) -> Self {
        Self { pagemap: None, ..Self::new(ram, files) }
    }

    /// Has the kernel forget that writes to these pages are tracked.
    #[cfg(test)]
    pub(crate) fn forget_tracking(&self, pages: Range<u64>) {
        if let Some(uffd) = &self.uffd {
            uffd.unregister(&self.ram.guest_addresses(pages)).unwrap();
        }
    }

    /// Faults can be served.
    pub(crate) fn can_be_absent(&self) -> bool {
        self.uffd.as_ref().is_some_and(|uffd| uffd.abilities().absent)
    }

    /// Page tables tell what was written.
    pub(crate) fn tracks_writes(&self) -> bool {
        self.pagemap.is_some()
    }

    /// The userfaultfd, to be polled for faults.
    pub(crate) fn uffd(&self) -> Option<&Uffd> {
        self.uffd.as_ref()
    }

    /// Makes whole granules absent, before anything runs.
    pub(crate) fn make_absent(&self, absent: &PageSet) -> Result<(), PresenceError> {
        let Some(uffd) = &self.uffd else { return Ok(()) };
        let mut present = lock(&self.present);
        for pages in absent.runs() {
            uffd.make_absent(&self.ram.guest_addresses(pages.clone())).map_err(failed("ask for the faults"))?;
            present.remove(pages);
        }
        Ok(())
    }

    /// The content of these pages, whole granules that were absent, is in place: whoever waits for them goes on.
    pub(crate) fn make_present(&self, pages: Range<u64>) -> Result<(), PresenceError> {
        let Some(uffd) = &self.uffd else { return Ok(()) };
        let mut present = lock(&self.present);
        uffd.make_present(&self.ram.guest_addresses(pages.clone())).map_err(failed("hand over pages"))?;
        present.insert(pages);
        Ok(())
    }

    /// Lets whoever waits for these pages look again.
    pub(crate) fn wake(&self, pages: Range<u64>) -> Result<(), PresenceError> {
        let Some(uffd) = &self.uffd else { return Ok(()) };
        uffd.wake(&self.ram.guest_addresses(pages)).map_err(failed("wake those that wait for pages"))
    }

    /// From now on writes to present memory are tracked; what is mapped already counts as written.
    pub(crate) fn track(&self) -> Result<(), PresenceError> {
        self.track_present(&lock(&self.present))
    }

    /// The same, and what was written before counts as not written.
    pub(crate) fn start_tracking(&self) -> Result<(), PresenceError> {
        let present = lock(&self.present);
        self.track_present(&present)?;
        self.add_written(&present, &mut PageSet::new(self.ram.pages()), After::Protect)
    }

    fn track_present(&self, present: &PageSet) -> Result<(), PresenceError> {
        let Some(uffd) = &self.uffd else { return Ok(()) };
        for pages in present.runs() {
            uffd.track_writes(&self.ram.guest_addresses(pages)).map_err(failed("track the writes"))?;
        }
        Ok(())
    }

    /// Adds to `written` the present pages written since the last call, or since tracking began; a superset of them, and on an error all that
    /// are present: some are not told again.
    pub(crate) fn take_written(&self, written: &mut PageSet) -> Result<(), PresenceError> {
        self.add_written(&lock(&self.present), written, After::Protect)
    }

    /// The same, and leaves them as they are: they count as written until they are taken, and the next write to them costs the guest nothing.
    pub(crate) fn leave_written(&self, written: &mut PageSet) -> Result<(), PresenceError> {
        self.add_written(&lock(&self.present), written, After::Leave)
    }

    fn add_written(&self, present: &PageSet, written: &mut PageSet, after: After) -> Result<(), PresenceError> {
        let Some(pagemap) = &self.pagemap else { return Ok(()) };
        let taken = present.runs().into_iter().try_for_each(|pages| {
            let (addresses, found) =
                (self.ram.guest_addresses(pages), &mut |found: Range<u64>| self.insert(written, found));
            match after {
                After::Protect => pagemap.take_written(&addresses, found),
                After::Leave => pagemap.written(&addresses, found),
            }
        });
        // Swap was switched on: nothing is known for certain any more, so everything is looked at.
        if taken.is_err() || host_swaps() {
            written.union(present);
        }
        taken.map_err(failed("collect the written pages"))
    }

    /// What [`take_written`](Self::take_written) would answer; changes nothing.
    pub(crate) fn written(&self) -> Result<PageSet, PresenceError> {
        let mut written = PageSet::new(self.ram.pages());
        let Some(pagemap) = &self.pagemap else { return Ok(written) };
        for pages in lock(&self.present).runs() {
            pagemap
                .written(&self.ram.guest_addresses(pages), &mut |found| self.insert(&mut written, found))
                .map_err(failed("look for the written pages"))?;
        }
        Ok(written)
    }

    /// Pages that are mapped: those that the guest or a device touched since this mapping was made; granules whole where huge pages are
    /// used.
    pub(crate) fn touched(&self) -> Result<PageSet, PresenceError> {
        let mut touched = PageSet::new(self.ram.pages());
        let Some(pagemap) = &self.pagemap else { return Ok(touched) };
        let all = self.ram.guest_addresses(0..self.ram.pages());
        pagemap
            .mapped(&all, &mut |found, _| self.insert(&mut touched, found))
            .map_err(failed("look for the touched pages"))?;
        Ok(touched)
    }

    /// Guest memory that huge pages map, KiB.
    pub(crate) fn huge_kib(&self) -> u64 {
        let Some(pagemap) = &self.pagemap else { return 0 };
        let mut bytes = 0;
        let all = self.ram.guest_addresses(0..self.ram.pages());
        let counted = pagemap.mapped(&all, &mut |found, huge| bytes += if huge { found.end - found.start } else { 0 });
        if counted.is_ok() { bytes / 1024 } else { 0 }
    }

    /// Pages that are present: whole granules.
    pub(crate) fn present(&self) -> PageSet {
        lock(&self.present).clone()
    }

    /// Pages that are not: whole granules.
    pub(crate) fn absent(&self) -> PageSet {
        let mut absent = PageSet::new(self.ram.pages());
        absent.insert(0..self.ram.pages());
        absent.subtract(&lock(&self.present));
        absent
    }

    /// Whether these pages are present.
    pub(crate) fn is_present(&self, pages: Range<u64>) -> bool {
        lock(&self.present).contains_all(pages)
    }

    /// The pages of the granule at a host address of the guest mapping.
    pub(crate) fn granule_at(&self, address: u64) -> Option<Range<u64>> {
        self.ram.page_at(address).map(|page| granule_pages(page / GRANULE_PAGES, self.ram.pages()))
    }

    /// The granules that `pages` touch.
    pub(crate) fn granules_of(&self, pages: Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
        let all = self.ram.pages();
        (pages.start / GRANULE_PAGES..pages.end.div_ceil(GRANULE_PAGES)).map(move |granule| granule_pages(granule, all))
    }

    fn insert(&self, set: &mut PageSet, addresses: Range<u64>) {
        let first = self.ram.page_at(addresses.start).unwrap_or(0);
        set.insert(first..first + (addresses.end - addresses.start) / stasis_snapshot::page::PAGE_SIZE as u64);
    }
}

/// The pages of granule `granule`, cut off at the end of the image.
fn granule_pages(granule: u64, pages: u64) -> Range<u64> {
    let first = granule * GRANULE_PAGES;
    first..(first + GRANULE_PAGES).min(pages)
}

fn host_swaps() -> bool {
    rustix::system::sysinfo().totalswap > 0
}
