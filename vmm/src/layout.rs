//! Guest physical address space and interrupt lines: every address that the guest can see, in one place.
//!
//! A snapshot fixes these for its guest, so a change here is a new [`LAYOUT_VERSION`].

use std::ops::Range;

/// Version of everything in this file; saved with each machine and refused when it differs.
pub(crate) const LAYOUT_VERSION: u16 = 1;

/// RAM below the MMIO gap ends here at the latest, guest physical.
pub(crate) const GAP_START: u64 = 0xc000_0000;
/// RAM above the gap starts here, guest physical.
pub(crate) const GAP_END: u64 = 0x1_0000_0000;

/// First virtio-mmio window; window `n` is at `VIRTIO_MMIO_BASE + n * VIRTIO_MMIO_SIZE`.
pub(crate) const VIRTIO_MMIO_BASE: u64 = 0xd000_0000;
/// Size of a virtio-mmio window, bytes.
pub(crate) const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// Interrupt line of the first virtio-mmio window; window `n` has `VIRTIO_GSI_BASE + n`.
pub(crate) const VIRTIO_GSI_BASE: u32 = 5;
/// Windows there are: interrupt lines 5 to 15.
pub(crate) const VIRTIO_WINDOWS: u32 = 11;
/// Interrupt line of COM1.
pub(crate) const SERIAL_GSI: u32 = 4;
/// Interrupt line of the ACPI generic event device (VM generation id).
pub(crate) const GED_GSI: u32 = 16;

/// Real-mode task state segment that KVM needs on Intel hosts, inside the gap.
pub(crate) const KVM_TSS: u64 = 0xfffb_d000;
/// Identity page table that KVM needs on Intel hosts, inside the gap.
pub(crate) const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// I/O APIC registers.
pub(crate) const IOAPIC: u32 = 0xfec0_0000;
/// Local APIC registers.
pub(crate) const LAPIC: u32 = 0xfee0_0000;

/// Global descriptor table for the 64-bit boot protocol.
pub(crate) const BOOT_GDT: u64 = 0x500;
/// PVH start info.
pub(crate) const PVH_INFO: u64 = 0x6000;
/// PVH memory map.
pub(crate) const PVH_MEMMAP: u64 = 0x6800;
/// PVH module list.
pub(crate) const PVH_MODULES: u64 = 0x6c00;
/// Linux boot parameters ("zero page").
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// Stack pointer at entry.
pub(crate) const BOOT_STACK: u64 = 0x8ff0;
/// Page tables for the 64-bit boot protocol: one PML4, one PDPT, four PDs.
pub(crate) const BOOT_PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub(crate) const CMDLINE: u64 = 0x2_0000;
/// Longest command line with its NUL, bytes.
pub(crate) const CMDLINE_MAX: usize = 2048;
/// VM generation id, in ACPI-reserved memory just below the EBDA.
pub(crate) const VMGENID: u64 = 0x9_e000;
/// First byte that the guest may not use as RAM below 1 MiB: the VM generation id and the legacy hole start here.
pub(crate) const LOW_RAM_END: u64 = 0x9_e000;
/// ACPI tables: the root pointer first, so that a guest's scan of the BIOS area finds it too.
pub(crate) const ACPI: Range<u64> = 0xe_0000..0x10_0000;
/// RAM from here up.
pub(crate) const HIGH_RAM_START: u64 = 0x10_0000;

/// COM1 ports.
pub(crate) const SERIAL_PORTS: Range<u16> = 0x3f8..0x400;
/// Keyboard controller data and command ports: only the reset command works.
pub(crate) const I8042_PORTS: Range<u16> = 0x60..0x65;
/// ACPI sleep control register (hardware-reduced), one byte.
pub(crate) const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register, one byte.
pub(crate) const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register, one byte.
pub(crate) const RESET_PORT: u16 = 0x602;
/// Value that resets when written to [`RESET_PORT`].
pub(crate) const RESET_VALUE: u8 = 1;
/// SLP_TYP of S5, as the DSDT's `_S5` package says it.
pub(crate) const SLEEP_TYPE_S5: u8 = 5;
/// 32-bit OUT port of the exit counter.
pub(crate) const EXIT_COUNTER_OUT: u16 = 0x2f0;
/// 32-bit IN port of the exit counter.
pub(crate) const EXIT_COUNTER_IN: u16 = 0x2f4;

/// The parts of RAM: (guest physical start, bytes). The memory image is their concatenation.
pub(crate) fn ram(memory_bytes: u64) -> Vec<(u64, u64)> {
    if memory_bytes <= GAP_START {
        vec![(0, memory_bytes)]
    } else {
        vec![(0, GAP_START), (GAP_END, memory_bytes - GAP_START)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_round_the_gap_and_loses_nothing() {
        for mib in [16, 512, 3072, 3073, 6144, 8192_u64] {
            let parts = ram(mib << 20);
            assert_eq!(parts.iter().map(|p| p.1).sum::<u64>(), mib << 20);
            for (start, bytes) in parts {
                assert!(start + bytes <= GAP_START || start >= GAP_END);
            }
        }
    }
}
