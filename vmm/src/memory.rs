//! Guest memory: one memfd, given to KVM as one or two memslots around the MMIO gap.
//!
//! The **memory image** of a snapshot is the memfd's content: image page `i` is bytes `i * 4096..` of the file, whatever its GPA. It is
//! mapped twice, each time whole and in image order:
//!
//! - the **guest mapping** is what KVM and the devices use ([`GuestMemory`]). Its page tables are what write tracking reads and where a
//!   page that is not there yet faults;
//! - the **image mapping** is what restores fill and captures read. It leaves no trace in the guest mapping's page tables, and never
//!   faults on a page that is not there yet.
//!
//! Both are aligned to 2 MiB and ask for huge pages: where the host gives them to memory files (`shmem_enabled` is `advise`), a granule
//! of the guest is one entry in every page table on its way.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use rustix::mm::{Advice, MapFlags, ProtFlags};
use stasis_devices::GuestMemory;
use stasis_snapshot::page::PAGE_SIZE;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion, VolatileSlice};

use crate::layout;
use crate::pages::PageSet;

/// Pages of a granule: 2 MiB, the huge page of x86-64, and the unit in which memory arrives after a restore.
pub(crate) const GRANULE_PAGES: u64 = 512;
const GRANULE_BYTES: usize = GRANULE_PAGES as usize * PAGE_SIZE;

/// Why guest memory could not be made, read or written.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The kernel refused the memory.
    #[error("cannot {what} guest memory of {bytes} bytes")]
    Map {
        /// What was asked of the kernel.
        what: &'static str,
        /// Size asked for.
        bytes: u64,
        /// The kernel's answer.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The memory file that was given is not one that fits.
    #[error("the memory file has {found} bytes, the machine {expected}")]
    Size {
        /// Of the file.
        found: u64,
        /// Of the machine.
        expected: u64,
    },
    /// The memory file cannot be searched for data.
    #[error("cannot look for written pages in guest memory")]
    Seek(#[source] std::io::Error),
}

/// Addresses for one mapping of the whole memory file, given back when dropped.
struct Mapping {
    base: *mut u8,
    len: usize,
}

// SAFETY: plain memory at a fixed place; what is done with it is up to the methods that use it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Reserves `len` bytes of addresses, aligned to a granule. Nothing can be read or written there yet.
    fn reserve(len: usize) -> rustix::io::Result<Self> {
        let room = len + GRANULE_BYTES;
        // SAFETY: a new private mapping at a place of the kernel's choice; nothing else uses it.
        let reserved = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                room,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let skip = reserved.cast::<u8>().align_offset(GRANULE_BYTES);
        // SAFETY: at most a granule further, and the reservation is a granule longer than what is kept.
        let base = unsafe { reserved.cast::<u8>().add(skip) };
        let mapping = Self { base, len };
        // What is left of the reservation on both sides goes.
        let (head, tail) = (skip, room - skip - len);
        if head > 0 {
            // SAFETY: this part of the reservation is not used.
            unsafe { rustix::mm::munmap(reserved, head) }?;
        }
        // SAFETY: as above; `tail` may be 0 only if `skip` is a whole granule, which it never is.
        unsafe { rustix::mm::munmap(base.add(len).cast(), tail) }?;
        Ok(mapping)
    }

    /// Maps `file`, shared, over the whole reservation, in place of what was mapped there.
    fn map(&self, file: &File) -> rustix::io::Result<()> {
        // SAFETY: replaces the reservation or the file before, whose addresses are ours: `ReservedRam` gives nobody a way to use them.
        unsafe {
            rustix::mm::mmap(
                self.base.cast(),
                self.len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED,
                file,
                0,
            )
        }?;
        // SAFETY: the mapping is ours. Advice only: a kernel without huge pages refuses it, and small ones do.
        if let Err(error) = unsafe { rustix::mm::madvise(self.base.cast(), self.len, Advice::LinuxHugepage) } {
            tracing::debug!(%error, "no huge pages");
        }
        // SAFETY: as above. A core dump of the VMM is not to hold the guest.
        let _ = unsafe { rustix::mm::madvise(self.base.cast(), self.len, Advice::LinuxDontDump) };
        Ok(())
    }

    /// The bytes of `range`, checked to lie within.
    fn slice(&self, range: Range<u64>) -> std::io::Result<VolatileSlice<'_>> {
        let past = || std::io::Error::other("pages past the end of guest memory");
        let (start, end) =
            (usize::try_from(range.start).map_err(|_| past())?, usize::try_from(range.end).map_err(|_| past())?);
        if start > end || end > self.len {
            return Err(past());
        }
        // SAFETY: within the mapping, which lives as long as the borrow; a volatile slice may be written to by others meanwhile.
        Ok(unsafe { VolatileSlice::new(self.base.add(start), end - start) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: reserved by `reserve`; whoever was given addresses in it holds the owner of this.
        if let Err(error) = unsafe { rustix::mm::munmap(self.base.cast(), self.len) } {
            tracing::error!(%error, "cannot unmap guest memory");
        }
    }
}

fn fail<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    what: &'static str,
    bytes: u64,
) -> impl FnOnce(E) -> MemoryError {
    move |source| MemoryError::Map { what, bytes, source: source.into() }
}

/// A part of RAM as KVM is told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Guest physical.
    pub(crate) start: u64,
    /// Bytes.
    pub(crate) len: u64,
    /// Host address in the guest mapping.
    pub(crate) host: u64,
}

/// A guest's RAM before it is known what is in it: addresses, and behind them a memory file of its own, which another one may replace.
///
/// It is mapped this early because of what it costs later: the kernel goes through all that KVM knows of a memslot when its addresses are mapped
/// anew, a millisecond for each GiB.
pub(crate) struct ReservedRam {
    guest: Mapping,
    image: Mapping,
    file: File,
    bytes: u64,
}

impl ReservedRam {
    /// Reserves addresses for `bytes` of memory, twice, and maps a new file there.
    pub(crate) fn new(bytes: u64) -> Result<Self, MemoryError> {
        let reserve = || Mapping::reserve(bytes as usize).map_err(fail("reserve addresses for", bytes));
        let file: File = rustix::fs::memfd_create("guest-memory", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(fail("create", bytes))?
            .into();
        rustix::fs::ftruncate(&file, bytes).map_err(fail("size", bytes))?;
        let (guest, image) = (reserve()?, reserve()?);
        guest.map(&file).map_err(fail("map", bytes))?;
        image.map(&file).map_err(fail("map", bytes))?;
        Ok(Self { guest, image, file, bytes })
    }

    /// Memslots, in image order.
    pub(crate) fn slots(&self) -> Vec<Slot> {
        let mut host = self.guest.base as u64;
        let slot = |(start, len)| {
            let slot = Slot { start, len, host };
            host += len;
            slot
        };
        layout::ram(self.bytes).into_iter().map(slot).collect()
    }

    /// Maps `file`, which is sized if it is empty, in place of the own one. A page that was never written does not exist and is zero.
    pub(crate) fn map(mut self, file: Option<File>) -> Result<GuestRam, MemoryError> {
        let bytes = self.bytes;
        if let Some(file) = file {
            match file.metadata().map_err(fail("look at", bytes))?.len() {
                0 => rustix::fs::ftruncate(&file, bytes).map_err(fail("size", bytes))?,
                found if found == bytes => {}
                found => return Err(MemoryError::Size { found, expected: bytes }),
            }
            self.guest.map(&file).map_err(fail("map", bytes))?;
            self.image.map(&file).map_err(fail("map", bytes))?;
            self.file = file;
        }
        let mut regions = Vec::new();
        for Slot { start, len, host } in self.slots() {
            let bitmap = AtomicBitmap::new(len as usize, std::num::NonZeroUsize::MIN.saturating_add(PAGE_SIZE - 1));
            let builder = MmapRegionBuilder::new_with_bitmap(len as usize, bitmap)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE);
            // SAFETY: a slot lies within the guest mapping; `GuestRam` keeps that as long as anybody has its `GuestMemory`: the machine
            // drops its devices first.
            let builder = unsafe { builder.with_raw_mmap_pointer(host as *mut u8) };
            let region = GuestRegionMmap::new(builder.build().map_err(fail("describe", bytes))?, GuestAddress(start))
                .ok_or_else(|| fail("place", bytes)("address overflow"))?;
            regions.push(region);
        }
        let memory = GuestMemory::from_regions(regions).map_err(fail("arrange", bytes))?;
        let Self { guest, image, file, .. } = self;
        Ok(GuestRam { memory, guest, image, file, pages: bytes / PAGE_SIZE as u64 })
    }
}

/// The guest's RAM.
pub(crate) struct GuestRam {
    memory: GuestMemory,
    guest: Mapping,
    image: Mapping,
    file: File,
    pages: u64,
}

impl GuestRam {
    /// The guest mapping, as devices use it. Cheap to clone.
    pub(crate) fn guest_memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Pages of the memory image.
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// Memslots, in image order.
    pub(crate) fn slots(&self) -> Vec<Slot> {
        self.memory.iter().map(|r| Slot { start: r.start_addr().0, len: r.len(), host: r.as_ptr() as u64 }).collect()
    }

    /// Host addresses of `pages` in the guest mapping.
    pub(crate) fn guest_addresses(&self, pages: Range<u64>) -> Range<u64> {
        let at = |page: u64| self.guest.base as u64 + page.min(self.pages) * PAGE_SIZE as u64;
        at(pages.start)..at(pages.end)
    }

    /// The image page at a host address of the guest mapping.
    pub(crate) fn page_at(&self, address: u64) -> Option<u64> {
        let page = address.checked_sub(self.guest.base as u64)? / PAGE_SIZE as u64;
        (page < self.pages).then_some(page)
    }

    /// The image pages that exist in the memory file. All others are zero.
    pub(crate) fn existing_pages(&self) -> Result<PageSet, MemoryError> {
        use rustix::fs::{SeekFrom, seek};
        let end = self.pages * PAGE_SIZE as u64;
        let mut set = PageSet::new(self.pages);
        let mut at = 0;
        while at < end {
            let data = match seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) => data,
                Err(rustix::io::Errno::NXIO) => break,
                Err(e) => return Err(MemoryError::Seek(e.into())),
            };
            let hole = seek(&self.file, SeekFrom::Hole(data)).map_err(|e| MemoryError::Seek(e.into()))?;
            set.insert(data / PAGE_SIZE as u64..hole.min(end).div_ceil(PAGE_SIZE as u64));
            at = hole;
        }
        Ok(set)
    }

    /// Takes the pages that devices wrote since the last call, and forgets them.
    pub(crate) fn take_device_writes(&self) -> PageSet {
        let mut set = PageSet::new(self.pages);
        let mut first = 0;
        for region in self.memory.iter() {
            let mapping: &MmapRegion<AtomicBitmap> = region;
            set.union_words(first, &mapping.bitmap().get_and_reset());
            first += region.len() / PAGE_SIZE as u64;
        }
        set
    }

    /// Writes whole pages from `first_page` of the image on, past the guest mapping.
    pub(crate) fn write(&self, first_page: u64, bytes: &[u8]) -> std::io::Result<()> {
        let start = first_page * PAGE_SIZE as u64;
        self.image.slice(start..start + bytes.len() as u64)?.copy_from(bytes);
        Ok(())
    }

    /// Reads whole pages from `first_page` of the image on, past the guest mapping.
    pub(crate) fn read(&self, first_page: u64, into: &mut [u8]) -> std::io::Result<()> {
        let start = first_page * PAGE_SIZE as u64;
        self.image.slice(start..start + into.len() as u64)?.copy_to(into);
        Ok(())
    }
}

/// Reads memory for a capture while the guest runs: what it reads may be torn, and is then found dirty again.
pub(crate) struct RunningRam(pub(crate) Arc<GuestRam>);

impl stasis_snapshot::capture::PageReader for RunningRam {
    fn read(&self, first_page: u64, into: &mut [u8]) -> std::io::Result<()> {
        self.0.read(first_page, into)
    }
}

/// Reads memory for a capture while the guest stands still, from start to end of the capture.
pub(crate) struct StoppedRam(pub(crate) Arc<GuestRam>);

impl stasis_snapshot::capture::PageReader for StoppedRam {
    fn read(&self, first_page: u64, into: &mut [u8]) -> std::io::Result<()> {
        self.0.read(first_page, into)
    }

    fn view(&self, first_page: u64, pages: u64) -> Option<&[u8]> {
        let start = first_page.checked_mul(PAGE_SIZE as u64)?;
        let slice = self.0.image.slice(start..start.checked_add(pages.checked_mul(PAGE_SIZE as u64)?)?).ok()?;
        // SAFETY: within the image mapping, which `self` keeps. vCPUs and devices are parked as long as this reader is used, and the pager
        // only writes pages that do not exist for the guest yet, which a capture does not look at.
        Some(unsafe { std::slice::from_raw_parts(slice.ptr_guard().as_ptr(), slice.len()) })
    }
}
