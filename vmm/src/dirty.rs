//! Which pages of memory a capture has to look at.
//!
//! Three sources, never one without the others: KVM's dirty log (what vCPUs wrote), the devices' bitmap (what this process wrote on their
//! behalf), and the **carry-over**: pages of an earlier capture that never became durable. A page leaves the carry-over only when its bytes
//! are in a confirmed pack, and the memory then is compared against that pack, not against the parent.
//!
//! The log is off until the first capture: a guest that was never captured is dirty wherever it exists. It is switched on while the vCPUs
//! stand still, so that no write falls between the first look and the log.

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use stasis_snapshot::page::PAGE_SIZE;

use crate::kvm::{self, During, KvmError};
use crate::memory::{GuestRam, MemoryError};
use crate::pages::PageSet;

/// The dirty set cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DirtyError {
    /// From KVM.
    #[error("cannot read KVM's dirty log")]
    Kvm(#[from] KvmError),
    /// From the memory file.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Tracks the pages that differ from the last durable ones.
pub(crate) struct DirtyTracker {
    logging: bool,
    carry_over: PageSet,
}

/// Gives guest memory to KVM, or changes whether its writes are logged.
pub(crate) fn set_memslots(vm: &VmFd, ram: &GuestRam, log: bool) -> Result<(), KvmError> {
    for (slot, (guest_phys_addr, memory_size, userspace_addr)) in ram.slots().into_iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr,
            memory_size,
            userspace_addr,
        };
        // SAFETY: the range is a mapping that `ram` owns, and the machine keeps `ram` longer than `vm`.
        unsafe { vm.set_user_memory_region(region) }.during("give guest memory to KVM")?;
    }
    Ok(())
}

impl DirtyTracker {
    /// For a machine that boots: everything that exists is dirty, nothing is logged.
    pub(crate) fn for_boot(pages: u64) -> Self {
        Self { logging: false, carry_over: PageSet::new(pages) }
    }

    /// For a machine that was restored and has not run: nothing is dirty, all further writes are logged.
    pub(crate) fn for_restored(vm: &VmFd, ram: &GuestRam) -> Result<Self, DirtyError> {
        set_memslots(vm, ram, true)?;
        // The restore itself wrote through the devices' mapping.
        ram.take_device_writes();
        Ok(Self { logging: true, carry_over: PageSet::new(ram.pages()) })
    }

    /// Pages that differ from the last durable ones, as of the last [`collect`](Self::collect).
    pub(crate) fn pages(&self) -> &PageSet {
        &self.carry_over
    }

    /// Adds what was written since the last call. vCPUs and devices stand still.
    pub(crate) fn collect(&mut self, vm: &VmFd, ram: &GuestRam) -> Result<(), DirtyError> {
        if self.logging {
            self.harvest_log(vm, ram)?;
        } else {
            set_memslots(vm, ram, true)?;
            self.logging = true;
            self.carry_over.union(&ram.existing_pages()?);
        }
        self.carry_over.union(&ram.take_device_writes());
        Ok(())
    }

    /// These pages are in confirmed packs now.
    pub(crate) fn settled(&mut self, pages: std::ops::Range<u64>) {
        self.carry_over.remove(pages);
    }

    /// Reads and clears the log slot by slot. Clearing write-protects the pages again; nothing runs, so nothing is lost between the two.
    fn harvest_log(&mut self, vm: &VmFd, ram: &GuestRam) -> Result<(), KvmError> {
        let mut first = 0;
        for (slot, (_, bytes, _)) in ram.slots().into_iter().enumerate() {
            let pages = bytes / PAGE_SIZE as u64;
            let words = vm.get_dirty_log(slot as u32, bytes as usize).during("read the dirty log")?;
            if words.iter().any(|w| *w != 0) {
                // At most 3 GiB or 5 GiB a slot: the count fits.
                kvm::clear_dirty_log(vm, slot as u32, 0, pages as u32, &words)?;
                self.carry_over.union_words(first, &words);
            }
            first += pages;
        }
        Ok(())
    }
}
