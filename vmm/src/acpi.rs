//! The ACPI tables: hardware-reduced, no PCI. They announce the vCPUs, the I/O APIC, COM1, each virtio-mmio window (`LNRO0005`), the VM
//! generation id with the event device that carries its interrupt, power-off and reset.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use stasis_devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout;

const OEM: [u8; 6] = *b"STASIS";
const OEM_TABLE: [u8; 8] = *b"STASISVM";

/// Writes all tables; the root pointer is at the start of [`layout::ACPI`].
pub(crate) fn write(memory: &GuestMemory, vcpus: u8, virtio_windows: u32) -> Result<(), GuestMemoryError> {
    const RSDP_SIZE: u64 = 64;
    let mut at = layout::ACPI.start + RSDP_SIZE;
    let mut put = |bytes: &[u8]| -> Result<u64, GuestMemoryError> {
        let table = at;
        memory.write_slice(bytes, GuestAddress(table))?;
        at = (table + bytes.len() as u64).next_multiple_of(16);
        Ok(table)
    };
    let dsdt = put(&dsdt(virtio_windows))?;
    let fadt = put(&fadt(dsdt))?;
    let madt = put(&madt(vcpus))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(&bytes(&xsdt))?;
    memory.write_slice(&bytes(&Rsdp::new(OEM, xsdt)), GuestAddress(layout::ACPI.start))
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut out = Vec::new();
    table.to_aml_bytes(&mut out);
    out
}

fn port(address: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(address))
}

fn fadt(dsdt: u64) -> Vec<u8> {
    // "VGA not present", "MSI not supported", "CMOS RTC not present" (ACPI 6.5 §5.2.9.3).
    const NO_VGA_NO_MSI_NO_RTC: u16 = (1 << 2) | (1 << 3) | (1 << 5);
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = NO_VGA_NO_MSI_NO_RTC.into();
    fadt.reset_reg = port(layout::RESET_PORT);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = port(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(layout::SLEEP_STATUS_PORT);
    bytes(&fadt.finalize())
}

fn madt(vcpus: u8) -> Vec<u8> {
    let mut madt = MADT::new(OEM, OEM_TABLE, 1, LocalInterruptController::Address(layout::LAPIC));
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    bytes(&madt)
}

fn dsdt(virtio_windows: u32) -> Vec<u8> {
    let mut body = Vec::new();
    for window in 0..virtio_windows {
        body.extend(virtio(window));
    }
    body.extend(serial());
    body.extend(generation_id());
    body.extend(event_device());
    let s5 =
        aml::Name::new(aml::Path::new("_S5_"), &aml::Package::new(vec![&layout::SLEEP_TYPE_S5, &0_u8, &0_u8, &0_u8]));
    body.extend(bytes(&s5));
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, 1);
    table.append_slice(&body);
    table.update_checksum();
    table.as_slice().to_vec()
}

fn interrupt(gsi: u32) -> aml::Interrupt {
    aml::Interrupt::new(true, true, false, false, gsi)
}

fn virtio(window: u32) -> Vec<u8> {
    let base = layout::VIRTIO_MMIO_BASE + u64::from(window) * layout::VIRTIO_MMIO_SIZE;
    bytes(&aml::Device::new(
        format!("_SB_.VIO{window:X}").as_str().into(),
        vec![
            &aml::Name::new("_HID".into(), &"LNRO0005"),
            &aml::Name::new("_UID".into(), &window),
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    // The gap is below 4 GiB.
                    &aml::Memory32Fixed::new(true, base as u32, layout::VIRTIO_MMIO_SIZE as u32),
                    &interrupt(layout::VIRTIO_GSI_BASE + window),
                ]),
            ),
        ],
    ))
}

fn serial() -> Vec<u8> {
    let ports = layout::SERIAL_PORTS;
    bytes(&aml::Device::new(
        "_SB_.COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::IO::new(ports.start, ports.start, 0, ports.len() as u8),
                    &interrupt(layout::SERIAL_GSI),
                ]),
            ),
        ],
    ))
}

fn generation_id() -> Vec<u8> {
    let (low, high) = ((layout::VMGENID & 0xffff_ffff) as u32, (layout::VMGENID >> 32) as u32);
    bytes(&aml::Device::new(
        "_SB_.VGEN".into(),
        vec![
            &aml::Name::new("_HID".into(), &"STAS0001"),
            &aml::Name::new("_CID".into(), &"VM_Gen_Counter"),
            &aml::Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &aml::Name::new("ADDR".into(), &aml::Package::new(vec![&low, &high])),
        ],
    ))
}

fn event_device() -> Vec<u8> {
    // "The generation id changed" (Virtual Machine Generation ID §3, notification 0x80).
    const CHANGED: u8 = 0x80;
    bytes(&aml::Device::new(
        "_SB_.GED_".into(),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0013"),
            &aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&interrupt(layout::GED_GSI)])),
            &aml::Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&aml::Notify::new(&aml::Path::new("\\_SB_.VGEN"), &CHANGED)],
            ),
        ],
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_table_sums_to_zero() {
        for table in [dsdt(3), fadt(0xe_0100), madt(8)] {
            assert_eq!(table.iter().fold(0_u8, |sum, b| sum.wrapping_add(*b)), 0);
            assert_eq!(u32::from_le_bytes([table[4], table[5], table[6], table[7]]) as usize, table.len());
        }
    }
}
