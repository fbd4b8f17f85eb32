//! `PAGEMAP_SCAN` (Linux 6.7, Documentation/admin-guide/mm/pagemap.rst): which mapped pages were written since they were last
//! write-protected, by looking at page tables, and protecting them again in the same step.

use std::fs::File;
use std::io;
use std::ops::Range;

use vmm_sys_util::ioctl::ioctl_with_mut_ref;

const WP_MATCHING: u64 = 1;
const CHECK_WPASYNC: u64 = 1 << 1;
const IS_WRITTEN: u64 = 1 << 1;
const IS_PRESENT: u64 = 1 << 3;
const IS_HUGE: u64 = 1 << 6;
/// Regions taken with one call.
const REGIONS: usize = 512;

#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

mod request {
    use super::ScanArg;
    use vmm_sys_util::ioctl_iowr_nr;

    ioctl_iowr_nr!(PAGEMAP_SCAN, b'f' as u32, 16, ScanArg);
}

/// This process's page tables.
pub(crate) struct Pagemap(File);

impl Pagemap {
    /// That which `pagemap`, an open `/proc/self/pagemap`, tells of. Fails where the kernel has no `PAGEMAP_SCAN`.
    pub(crate) fn new(pagemap: &File) -> io::Result<Self> {
        let pagemap = Self(pagemap.try_clone()?);
        let page = [0_u8; 1];
        let at = page.as_ptr() as u64 & !0xfff;
        pagemap.scan(&(at..at + 0x1000), 0, IS_PRESENT, &mut |_| ())?;
        Ok(pagemap)
    }

    /// Host addresses that are mapped and were written since [`take_written`](Self::take_written), or were mapped since by a read.
    pub(crate) fn written(&self, addresses: &Range<u64>, found: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
        self.scan(addresses, 0, IS_PRESENT | IS_WRITTEN, &mut |region| found(region.start..region.end))
    }

    /// The same, and write-protects them in the same step. All of `addresses` must be registered for asynchronous write protection.
    pub(crate) fn take_written(&self, addresses: &Range<u64>, found: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
        let flags = WP_MATCHING | CHECK_WPASYNC;
        self.scan(addresses, flags, IS_PRESENT | IS_WRITTEN, &mut |region| found(region.start..region.end))
    }

    /// Host addresses that are mapped, and for each run whether by huge pages.
    pub(crate) fn mapped(&self, addresses: &Range<u64>, found: &mut dyn FnMut(Range<u64>, bool)) -> io::Result<()> {
        self.scan(addresses, 0, IS_PRESENT, &mut |region| {
            found(region.start..region.end, region.categories & IS_HUGE != 0);
        })
    }

    fn scan(&self, addresses: &Range<u64>, flags: u64, mask: u64, found: &mut dyn FnMut(Region)) -> io::Result<()> {
        let mut regions = [Region::default(); REGIONS];
        let mut start = addresses.start;
        while start < addresses.end {
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                flags,
                start,
                end: addresses.end,
                vec: regions.as_mut_ptr() as u64,
                vec_len: REGIONS as u64,
                category_mask: mask,
                return_mask: mask | IS_HUGE,
                ..ScanArg::default()
            };
            // SAFETY: the kernel reads and writes one pm_scan_arg, and writes at most `vec_len` regions where `vec` points.
            let count = unsafe { ioctl_with_mut_ref(&self.0, request::PAGEMAP_SCAN(), &mut arg) };
            if count < 0 {
                return Err(io::Error::last_os_error());
            }
            regions.iter().take(count.unsigned_abs() as usize).for_each(|region| found(*region));
            // A walk that does not get on would never end.
            if arg.walk_end <= start {
                break;
            }
            start = arg.walk_end;
        }
        Ok(())
    }
}
