//! Guest memory: one memfd, mapped once, given to KVM as one or two memslots around the MMIO gap.
//!
//! The **memory image** of a snapshot is the memfd's content: image page `i` is bytes `i * 4096..` of the file, whatever its GPA.
//! [`GuestRam`] is shared by the vCPU set-up, the devices (through [`GuestMemory`]) and the capture; nobody else maps it.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use stasis_devices::GuestMemory;
use stasis_snapshot::page::PAGE_SIZE;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
    MmapRegion,
};

use crate::layout;
use crate::pages::PageSet;

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
    /// The memory file cannot be searched for data.
    #[error("cannot look for written pages in guest memory")]
    Seek(#[source] std::io::Error),
}

/// The guest's RAM.
pub(crate) struct GuestRam {
    memory: GuestMemory,
    file: Arc<File>,
    pages: u64,
}

impl GuestRam {
    /// Maps `bytes` of zero memory. No page exists until it is written.
    pub(crate) fn new(bytes: u64) -> Result<Self, MemoryError> {
        let fail = |what, source: Box<dyn std::error::Error + Send + Sync>| MemoryError::Map { what, bytes, source };
        let fd = rustix::fs::memfd_create("guest-memory", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(|e| fail("create", e.into()))?;
        rustix::fs::ftruncate(&fd, bytes).map_err(|e| fail("size", e.into()))?;
        let file = Arc::new(File::from(fd));
        let mut offset = 0;
        let mut regions = Vec::new();
        for (start, len) in layout::ram(bytes) {
            let mapping = MmapRegionBuilder::new_with_bitmap(
                len as usize,
                AtomicBitmap::new(len as usize, std::num::NonZeroUsize::MIN.saturating_add(PAGE_SIZE - 1)),
            )
            .with_file_offset(FileOffset::from_arc(file.clone(), offset))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(|e| fail("map", e.into()))?;
            let region = GuestRegionMmap::new(mapping, GuestAddress(start))
                .ok_or_else(|| fail("place", "address overflow".into()))?;
            regions.push(region);
            offset += len;
        }
        let memory = GuestMemory::from_regions(regions).map_err(|e| fail("arrange", e.into()))?;
        Ok(Self { memory, file, pages: bytes / PAGE_SIZE as u64 })
    }

    /// The mapping, as devices use it. Cheap to clone.
    pub(crate) fn guest_memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Pages of the memory image.
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// Memslots: (guest physical start, bytes, host address), in image order.
    pub(crate) fn slots(&self) -> Vec<(u64, u64, u64)> {
        self.memory.iter().map(|r| (r.start_addr().0, r.len(), r.as_ptr() as u64)).collect()
    }

    /// The image pages that exist in the memfd. All others are zero.
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

    /// Writes whole pages from `first_page` of the image on.
    pub(crate) fn write(&self, first_page: u64, bytes: &[u8]) -> std::io::Result<()> {
        self.parts(first_page, bytes.len(), |region, at, range| {
            region.write_slice(&bytes[range], at).map_err(std::io::Error::other)
        })
    }

    /// Splits a range of image bytes at region borders and hands each part to `f` as (region, offset in it, range of the caller's buffer).
    fn parts(
        &self,
        first_page: u64,
        len: usize,
        mut f: impl FnMut(&GuestRegionMmap<AtomicBitmap>, MemoryRegionAddress, Range<usize>) -> std::io::Result<()>,
    ) -> std::io::Result<()> {
        let mut at = first_page * PAGE_SIZE as u64;
        let mut done = 0;
        let mut base = 0;
        for region in self.memory.iter() {
            let end = base + region.len();
            if at >= base && at < end && done < len {
                let part = ((end - at) as usize).min(len - done);
                f(region, MemoryRegionAddress(at - base), done..done + part)?;
                done += part;
                at += part as u64;
            }
            base = end;
        }
        if done == len { Ok(()) } else { Err(std::io::Error::other("pages past the end of guest memory")) }
    }
}

impl stasis_snapshot::capture::PageReader for GuestRam {
    fn read(&self, first_page: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.parts(first_page, buf.len(), |region, at, range| {
            region.read_slice(&mut buf[range], at).map_err(std::io::Error::other)
        })
    }
}
