//! VM generation id: 16 bytes in guest memory that change whenever the VM is restored, and an interrupt that says so.
//!
//! The VMM picks the address and describes it in ACPI. On a restore it writes a fresh id with [`VmGenId::restore`] before a vCPU runs
//! and calls [`VmGenId::notify`] once vCPU and interrupt controller state are in place, so that the interrupt is not overwritten.

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::GuestMemory;

/// Size of the id, bytes.
pub const ID_BYTES: u64 = 16;

/// Why the id could not be written or announced.
#[derive(Debug, thiserror::Error)]
pub enum VmGenIdError {
    /// The address is not aligned to 8 bytes or the id does not lie in guest memory: the VMM's layout or the snapshot is wrong.
    #[error("cannot write the VM generation id at guest address {address:#x}")]
    Write {
        /// Guest physical.
        address: u64,
        /// Absent when the address is misaligned.
        #[source]
        source: Option<vm_memory::GuestMemoryError>,
    },
    /// The interrupt's eventfd refused the write.
    #[error("cannot raise the interrupt of the VM generation id")]
    Notify(#[source] std::io::Error),
}

/// Saved state of a [`VmGenId`]. The id itself is not part of it: no two restores may share one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmGenIdState {
    /// Guest physical address of the id.
    pub address: u64,
}

impl VmGenIdState {
    /// Version of this structure.
    pub const VERSION: u16 = 1;
}

/// The device.
#[derive(Debug)]
pub struct VmGenId {
    address: GuestAddress,
    irq: EventFd,
}

impl VmGenId {
    /// Writes `id` at `address` for a VM that boots. Nothing is announced: the guest reads it when it finds the device.
    pub fn new(memory: &GuestMemory, address: GuestAddress, irq: EventFd, id: [u8; 16]) -> Result<Self, VmGenIdError> {
        if !address.0.is_multiple_of(8) {
            return Err(VmGenIdError::Write { address: address.0, source: None });
        }
        memory
            .write_slice(&id, address)
            .map_err(|source| VmGenIdError::Write { address: address.0, source: Some(source) })?;
        Ok(Self { address, irq })
    }

    /// Writes `new_id`, which no VM had before, where the saved device kept its id. Call [`notify`](Self::notify) later.
    pub fn restore(
        memory: &GuestMemory,
        state: &VmGenIdState,
        irq: EventFd,
        new_id: [u8; 16],
    ) -> Result<Self, VmGenIdError> {
        Self::new(memory, GuestAddress(state.address), irq, new_id)
    }

    /// Tells the guest that the id changed. After vCPU and interrupt controller state are set, before the first vCPU runs.
    pub fn notify(&self) -> Result<(), VmGenIdError> {
        self.irq.write(1).map_err(VmGenIdError::Notify)
    }

    /// Guest physical address of the id.
    pub fn address(&self) -> GuestAddress {
        self.address
    }

    /// The state for a snapshot.
    pub fn save(&self) -> VmGenIdState {
        VmGenIdState { address: self.address.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::bitmap::Bitmap;
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap()
    }

    #[test]
    fn a_restore_writes_the_new_id_marks_the_page_and_notifies_only_when_asked() {
        let memory = memory();
        let device = VmGenId::new(&memory, GuestAddress(0x3000), EventFd::new(0).unwrap(), [1; 16]).unwrap();
        let irq = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        let restored_memory = self::memory();
        let restored = VmGenId::restore(&restored_memory, &device.save(), irq.try_clone().unwrap(), [2; 16]).unwrap();
        let mut id = [0; 16];
        restored_memory.read_slice(&mut id, GuestAddress(0x3000)).unwrap();
        assert_eq!(id, [2; 16]);
        assert!(restored_memory.iter().next().unwrap().bitmap().dirty_at(0x3000));
        assert!(irq.read().is_err(), "no interrupt before notify");
        restored.notify().unwrap();
        assert_eq!(irq.read().unwrap(), 1);
    }

    #[test]
    fn addresses_outside_memory_or_misaligned_are_errors() {
        for address in [0xfff8, 0x10000, u64::MAX - 7, 0x3004] {
            let state = VmGenIdState { address };
            assert!(VmGenId::restore(&memory(), &state, EventFd::new(0).unwrap(), [2; 16]).is_err(), "{address:#x}");
        }
    }
}
