//! Loading a kernel and putting vCPU 0 at its entry.
//!
//! Two ways in. **PVH** (32-bit protected mode, paging off) where an ELF kernel has the note: the entry of Debian's kernels and of pulse.
//! The **64-bit Linux boot protocol** (long mode, identity map of 4 GiB, `%rsi` = zero page) for other ELF kernels and for bzImage.
//! Both get the same memory map and the ACPI root pointer.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use kvm_bindings::{kvm_dtable, kvm_fpu, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use stasis_devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use crate::kvm::{During, KvmError};
use crate::layout;

/// Why a guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel file is no kernel, or does not fit.
    #[error("cannot load the kernel: it must be an x86-64 ELF vmlinux or a bzImage that fits into guest memory")]
    Kernel(#[source] linux_loader::loader::Error),
    /// A file cannot be read.
    #[error("cannot read the {what}")]
    Read {
        /// Which file.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The initramfs does not fit between kernel and end of low memory.
    #[error(
        "the initramfs ({initramfs} bytes) does not fit into {free} bytes behind the kernel; give the guest more memory"
    )]
    NoRoom {
        /// Its size.
        initramfs: u64,
        /// Room there is.
        free: u64,
    },
    /// The command line is too long or holds a NUL.
    #[error("the kernel command line must have at most {max} bytes and no NUL; it has {len}", max = layout::CMDLINE_MAX - 1)]
    Cmdline {
        /// Its length, bytes.
        len: usize,
    },
    /// A boot structure cannot be written into guest memory.
    #[error("cannot write the {what} into guest memory")]
    Write {
        /// Which structure.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// vCPU 0 cannot be set up.
    #[error("cannot set up vCPU 0")]
    Kvm(#[from] KvmError),
}

fn write<E: std::error::Error + Send + Sync + 'static>(what: &'static str) -> impl FnOnce(E) -> BootError {
    move |source| BootError::Write { what, source: Box::new(source) }
}

/// Where and how vCPU 0 starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// 32-bit, guest physical entry point; `%ebx` = [`layout::PVH_INFO`].
    Pvh(u64),
    /// 64-bit, guest physical entry point; `%rsi` = [`layout::ZERO_PAGE`].
    Linux64(u64),
}

/// Loads kernel, initramfs and command line and writes the boot structures. The ACPI tables are at [`layout::ACPI`] already.
pub(crate) fn load(
    memory: &GuestMemory,
    memory_bytes: u64,
    mut kernel: File,
    initramfs: Option<File>,
    cmdline: &str,
) -> Result<Entry, BootError> {
    if cmdline.len() >= layout::CMDLINE_MAX || cmdline.contains('\0') {
        return Err(BootError::Cmdline { len: cmdline.len() });
    }
    let mut magic = [0; 4];
    kernel.read_exact(&mut magic).map_err(|source| BootError::Read { what: "kernel", source })?;
    kernel.rewind().map_err(|source| BootError::Read { what: "kernel", source })?;
    let high = Some(GuestAddress(layout::HIGH_RAM_START));
    let loaded = if magic == *b"\x7fELF" {
        Elf::load(memory, None, &mut kernel, high)
    } else {
        BzImage::load(memory, None, &mut kernel, high)
    }
    .map_err(BootError::Kernel)?;
    let kernel_end = match loaded.setup_header {
        // A bzImage unpacks itself: it says how much room it needs from its load address.
        Some(header) => loaded.kernel_load.0 + u64::from(header.init_size),
        None => loaded.kernel_end,
    };
    let initramfs = initramfs.map(|file| load_initramfs(memory, memory_bytes, kernel_end, file)).transpose()?;
    let mut line = cmdline.as_bytes().to_vec();
    line.push(0);
    memory.write_slice(&line, GuestAddress(layout::CMDLINE)).map_err(write("command line"))?;
    if let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap {
        write_pvh(memory, memory_bytes, initramfs)?;
        return Ok(Entry::Pvh(entry.0));
    }
    write_zero_page(memory, memory_bytes, initramfs, loaded.setup_header)?;
    // The 64-bit entry of a bzImage is 0x200 behind its 32-bit one (Linux x86 boot protocol, "64-bit boot protocol").
    let offset = if loaded.setup_header.is_some() { 0x200 } else { 0 };
    Ok(Entry::Linux64(loaded.kernel_load.0 + offset))
}

/// Puts the initramfs as high as possible below the gap: kernels want it away from where they unpack.
fn load_initramfs(
    memory: &GuestMemory,
    memory_bytes: u64,
    kernel_end: u64,
    mut file: File,
) -> Result<(u64, u64), BootError> {
    let read = |source| BootError::Read { what: "initramfs", source };
    let size = file.seek(SeekFrom::End(0)).map_err(read)?;
    file.rewind().map_err(read)?;
    let top = memory_bytes.min(layout::GAP_START);
    let free = top.saturating_sub(kernel_end.next_multiple_of(4096));
    if size > free {
        return Err(BootError::NoRoom { initramfs: size, free });
    }
    let at = (top - size) & !0xfff;
    memory.read_exact_volatile_from(GuestAddress(at), &mut file, size as usize).map_err(write("initramfs"))?;
    Ok((at, size))
}

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// The guest's memory map: (guest physical start, bytes, type).
fn memory_map(memory_bytes: u64) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::LOW_RAM_END, E820_RAM),
        (layout::LOW_RAM_END, layout::HIGH_RAM_START - layout::LOW_RAM_END, E820_RESERVED),
    ];
    for (start, bytes) in layout::ram(memory_bytes) {
        let from = start.max(layout::HIGH_RAM_START);
        map.push((from, start + bytes - from, E820_RAM));
    }
    map
}

fn write_pvh(memory: &GuestMemory, memory_bytes: u64, initramfs: Option<(u64, u64)>) -> Result<(), BootError> {
    const START_MAGIC: u32 = 0x336e_c578;
    let map: Vec<_> = memory_map(memory_bytes)
        .into_iter()
        .map(|(addr, size, type_)| hvm_memmap_table_entry { addr, size, type_, reserved: 0 })
        .collect();
    let info = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        nr_modules: u32::from(initramfs.is_some()),
        modlist_paddr: if initramfs.is_some() { layout::PVH_MODULES } else { 0 },
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: layout::ACPI.start,
        memmap_paddr: layout::PVH_MEMMAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&info, GuestAddress(layout::PVH_INFO));
    params.set_sections(&map, GuestAddress(layout::PVH_MEMMAP));
    if let Some((paddr, size)) = initramfs {
        let module = hvm_modlist_entry { paddr, size, ..Default::default() };
        params.set_modules(&[module], GuestAddress(layout::PVH_MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, memory).map_err(write("PVH start info"))
}

fn write_zero_page(
    memory: &GuestMemory,
    memory_bytes: u64,
    initramfs: Option<(u64, u64)>,
    header: Option<setup_header>,
) -> Result<(), BootError> {
    const BOOT_FLAG: u16 = 0xaa55;
    const HEADER_MAGIC: u32 = 0x5372_6448;
    const LOADER_UNDEFINED: u8 = 0xff;
    let bare =
        setup_header { boot_flag: BOOT_FLAG, header: HEADER_MAGIC, kernel_alignment: 0x100_0000, ..Default::default() };
    let mut zero_page = boot_params { hdr: header.unwrap_or(bare), ..Default::default() };
    zero_page.hdr.type_of_loader = LOADER_UNDEFINED;
    zero_page.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    zero_page.hdr.cmdline_size = layout::CMDLINE_MAX as u32;
    if let Some((start, size)) = initramfs {
        // Below the MMIO gap, so both fit into 32 bits.
        zero_page.hdr.ramdisk_image = start as u32;
        zero_page.hdr.ramdisk_size = size as u32;
    }
    zero_page.acpi_rsdp_addr = layout::ACPI.start;
    let map = memory_map(memory_bytes);
    for (entry, (addr, size, type_)) in zero_page.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: *addr, size: *size, r#type: *type_ };
    }
    zero_page.e820_entries = map.len() as u8;
    let params = BootParams::new(&zero_page, GuestAddress(layout::ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&params, memory).map_err(write("zero page"))
}

/// A flat segment for the boot GDT: base 0, limit 4 GiB.
struct FlatSegment {
    index: u8,
    access: u8,
    /// L and D/B bits.
    long: bool,
    big: bool,
}

const CODE: u8 = 0x9b;
const DATA: u8 = 0x93;
const BUSY_TSS: u8 = 0x8b;

impl FlatSegment {
    fn kvm(&self) -> kvm_segment {
        kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector: u16::from(self.index) * 8,
            type_: self.access & 0xf,
            present: 1,
            dpl: 0,
            db: u8::from(self.big),
            s: (self.access >> 4) & 1,
            l: u8::from(self.long),
            g: 1,
            ..Default::default()
        }
    }

    fn descriptor(&self) -> u64 {
        let flags = 0x8 | (u64::from(self.big) << 2) | (u64::from(self.long) << 1);
        0xffff | (u64::from(self.access) << 40) | (0xf << 48) | (flags << 52)
    }
}

/// Puts vCPU 0 at `entry`.
pub(crate) fn set_entry(vcpu: &VcpuFd, memory: &GuestMemory, entry: Entry) -> Result<(), BootError> {
    const PE: u64 = 1;
    const ET: u64 = 1 << 4;
    const PG: u64 = 1 << 31;
    const PAE: u64 = 1 << 5;
    const EFER_LME_LMA: u64 = (1 << 8) | (1 << 10);
    let long = matches!(entry, Entry::Linux64(_));
    let code = FlatSegment { index: 1, access: CODE, long, big: !long };
    let data = FlatSegment { index: 2, access: DATA, long: false, big: true };
    let tss = FlatSegment { index: 3, access: BUSY_TSS, long: false, big: false };
    let gdt = [0, code.descriptor(), data.descriptor(), tss.descriptor()];
    for (i, descriptor) in gdt.iter().enumerate() {
        memory.write_obj(*descriptor, GuestAddress(layout::BOOT_GDT + i as u64 * 8)).map_err(write("boot GDT"))?;
    }
    let mut sregs = vcpu.get_sregs().during("read sregs")?;
    sregs.cs = code.kvm();
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = data.kvm();
    }
    sregs.tr = tss.kvm();
    // A task state segment is at least 0x67 bytes long and byte-granular; nothing uses it before the guest loads its own.
    (sregs.tr.limit, sregs.tr.g) = (0x67, 0);
    sregs.gdt = kvm_dtable { base: layout::BOOT_GDT, limit: (gdt.len() * 8 - 1) as u16, ..Default::default() };
    sregs.idt = kvm_dtable { base: 0, limit: 0, ..Default::default() };
    sregs.cr0 = PE | ET;
    sregs.cr4 = 0;
    if long {
        write_identity_map(memory)?;
        sregs.cr3 = layout::BOOT_PAGE_TABLES;
        sregs.cr4 = PAE;
        sregs.cr0 |= PG;
        sregs.efer |= EFER_LME_LMA;
    }
    vcpu.set_sregs(&sregs).during("write sregs")?;
    let (rip, rbx, rsi) = match entry {
        Entry::Pvh(rip) => (rip, layout::PVH_INFO, 0),
        Entry::Linux64(rip) => (rip, 0, layout::ZERO_PAGE),
    };
    let regs = kvm_regs { rflags: 2, rip, rbx, rsi, rsp: layout::BOOT_STACK, ..Default::default() };
    vcpu.set_regs(&regs).during("write regs")?;
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).during("write fpu")?;
    Ok(())
}

/// An identity map of the first 4 GiB in 2 MiB pages.
fn write_identity_map(memory: &GuestMemory) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let put = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).map_err(write("boot page tables"));
    let (pml4, pdpt, pds) =
        (layout::BOOT_PAGE_TABLES, layout::BOOT_PAGE_TABLES + 0x1000, layout::BOOT_PAGE_TABLES + 0x2000);
    put(pml4, pdpt | PRESENT_WRITABLE)?;
    for gib in 0..4 {
        put(pdpt + gib * 8, (pds + gib * 0x1000) | PRESENT_WRITABLE)?;
        for i in 0..512 {
            put(pds + gib * 0x1000 + i * 8, (gib << 30) | (i << 21) | PRESENT_WRITABLE | LARGE)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_is_ordered_and_keeps_tables_and_gap_out_of_ram() {
        for mib in [16, 512, 6144_u64] {
            let map = memory_map(mib << 20);
            assert!(map.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
            for hole in [layout::VMGENID, layout::ACPI.start, u64::from(layout::LAPIC), layout::VIRTIO_MMIO_BASE] {
                assert!(!map.iter().any(|(s, n, t)| *t == E820_RAM && (*s..s + n).contains(&hole)), "{hole:#x}");
            }
        }
    }

    #[test]
    fn flat_descriptors_are_the_ones_of_the_manual() {
        let code64 = FlatSegment { index: 1, access: CODE, long: true, big: false };
        assert_eq!(code64.descriptor(), 0x00af_9b00_0000_ffff);
        let data = FlatSegment { index: 2, access: DATA, long: false, big: true };
        assert_eq!(data.descriptor(), 0x00cf_9300_0000_ffff);
    }
}
