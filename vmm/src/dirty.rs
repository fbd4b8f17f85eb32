//! Which pages of memory a capture has to look at.
//!
//! Three sources, never one without the others: what vCPUs wrote, what this process wrote on behalf of devices, and the **carry-over**:
//! pages of an earlier capture that never became durable. A page leaves the carry-over only when its bytes are in a confirmed pack, and
//! the memory then is compared against that pack, not against the parent.
//!
//! What vCPUs wrote is told by the host's page tables where the kernel can ([`Presence`]), else by KVM's dirty log, which costs the guest
//! a fault for each 4 KiB page it writes and every huge page. Neither runs before the first capture: a guest that was never captured is
//! dirty wherever it exists. Both are superset trackers: digests tell which pages changed.
//!
//! With the guest running ([`DirtyTracker::collect`] in a round), a page is taken out of the tracker before it is read, so that a write
//! that the reader misses is found by the next collection.

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use stasis_snapshot::page::PAGE_SIZE;

use crate::kvm::{self, During, KvmError};
use crate::memory::{GuestRam, MemoryError, Slot};
use crate::pages::PageSet;
use crate::presence::{Presence, PresenceError};

/// Pages of the dirty log cleared with one call (64 MiB): KVM holds its lock for one call.
const CLEAR_STEP: u64 = 16384;
/// Written pages that [`DirtyTracker::collect_lightly`] leaves unprotected at most (64 MiB): the next collection finds all of them again, and a
/// capture then has to tell by digests which were not.
const LIGHT_PAGES: u64 = 16384;

/// The dirty set cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DirtyError {
    /// From KVM.
    #[error("cannot read KVM's dirty log")]
    Kvm(#[from] KvmError),
    /// From the page tables.
    #[error(transparent)]
    Presence(#[from] PresenceError),
    /// From the memory file.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// What tells which pages vCPUs wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// Nothing yet: all that exists is dirty.
    Existence,
    PageTables,
    KvmLog,
}

/// What becomes of pages that were collected, where page tables tell of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    /// Writes to them are tracked anew. It takes the kernel a walk over all that KVM knows of the memory, and the guest a fault for each granule
    /// that it writes to again.
    Track,
    /// They stay written until they are collected to be tracked: for a guest that will hardly run again, or writes to them again at once.
    Leave,
}

/// Tracks the pages that may differ from the last durable ones.
pub(crate) struct DirtyTracker {
    source: Source,
    carry_over: PageSet,
}

/// Gives guest memory to KVM, or changes whether its writes are logged.
pub(crate) fn set_memslots(vm: &VmFd, slots: &[Slot], log: bool) -> Result<(), KvmError> {
    for (slot, part) in slots.iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: part.start,
            memory_size: part.len,
            userspace_addr: part.host,
        };
        // SAFETY: the addresses are reserved, or mapped, by what gave out the slots, which is kept longer than `vm`.
        unsafe { vm.set_user_memory_region(region) }.during("give guest memory to KVM")?;
    }
    Ok(())
}

impl DirtyTracker {
    /// For a machine that boots: everything that exists is dirty, nothing is tracked.
    pub(crate) fn for_boot(pages: u64) -> Self {
        Self { source: Source::Existence, carry_over: PageSet::new(pages) }
    }

    /// For a machine that was restored and has not run: nothing is dirty, all further writes are tracked.
    pub(crate) fn for_restored(vm: &VmFd, ram: &GuestRam, presence: &Presence) -> Result<Self, DirtyError> {
        let source = if presence.tracks_writes() {
            // Nothing is mapped yet that could have been written.
            presence.track()?;
            Source::PageTables
        } else {
            set_memslots(vm, &ram.slots(), true)?;
            // The log begins with every bit set.
            clear_all(vm, ram)?;
            Source::KvmLog
        };
        ram.take_device_writes();
        Ok(Self { source, carry_over: PageSet::new(ram.pages()) })
    }

    /// Pages that may differ from the last durable ones, as of the last [`collect`](Self::collect).
    pub(crate) fn pages(&self) -> &PageSet {
        &self.carry_over
    }

    /// Adds what was written since the last call that tracked, and begins to track where nothing was tracked yet. The guest may run. An error
    /// loses nothing: what its source does not tell again is added before it is answered.
    pub(crate) fn collect(
        &mut self,
        vm: &VmFd,
        ram: &GuestRam,
        presence: &Presence,
        then: Then,
    ) -> Result<(), DirtyError> {
        match self.source {
            Source::Existence if then == Then::Leave => self.carry_over.union(&ram.existing_pages()?),
            Source::Existence if presence.tracks_writes() => {
                presence.start_tracking()?;
                self.carry_over.union(&ram.existing_pages()?);
                self.source = Source::PageTables;
            }
            Source::Existence => {
                set_memslots(vm, &ram.slots(), true)?;
                clear_all(vm, ram)?;
                self.carry_over.union(&ram.existing_pages()?);
                self.source = Source::KvmLog;
            }
            Source::PageTables => match then {
                Then::Track => presence.take_written(&mut self.carry_over)?,
                Then::Leave => presence.leave_written(&mut self.carry_over)?,
            },
            Source::KvmLog => {
                let mut logged = PageSet::new(ram.pages());
                let harvested = harvest_log(vm, ram, true, &mut logged);
                let existing = ram.existing_pages();
                // KVM logs a page that a read maps writable, also one that was never there.
                if let Ok(existing) = &existing {
                    logged.intersect(existing);
                }
                self.carry_over.union(&logged);
                harvested?;
                existing?;
            }
        }
        self.carry_over.union(&ram.take_device_writes());
        Ok(())
    }

    /// The same for a guest that stands still and goes on at once, after a round has collected shortly before: what was written since is what the
    /// guest is at work on. Where it is little, it is left as it is, since the guest would pay a fault for each granule of it.
    pub(crate) fn collect_lightly(&mut self, vm: &VmFd, ram: &GuestRam, presence: &Presence) -> Result<(), DirtyError> {
        let little = self.source == Source::PageTables && presence.written()?.len() <= LIGHT_PAGES;
        self.collect(vm, ram, presence, if little { Then::Leave } else { Then::Track })
    }

    /// What [`collect`](Self::collect) would lead to, leaving all as it is. Device writes of this moment may be missing.
    pub(crate) fn estimate(&self, vm: &VmFd, ram: &GuestRam, presence: &Presence) -> Result<PageSet, DirtyError> {
        let mut pages = match self.source {
            Source::Existence => ram.existing_pages()?,
            Source::PageTables => presence.written()?,
            Source::KvmLog => {
                let mut logged = PageSet::new(ram.pages());
                harvest_log(vm, ram, false, &mut logged)?;
                logged.intersect(&ram.existing_pages()?);
                logged
            }
        };
        pages.union(&self.carry_over);
        Ok(pages)
    }

    /// These pages are in confirmed packs now.
    pub(crate) fn settled(&mut self, pages: std::ops::Range<u64>) {
        self.carry_over.remove(pages);
    }
}

/// Reads the log slot by slot and, if asked to, clears what it read in steps: clearing write-protects the pages again, so a write after it is
/// logged anew. Whatever comes of it, all that was cleared is in `into`.
fn harvest_log(vm: &VmFd, ram: &GuestRam, clear: bool, into: &mut PageSet) -> Result<(), KvmError> {
    let mut first = 0;
    for (slot, bytes) in ram.slots().iter().map(|slot| slot.len).enumerate() {
        let pages = bytes / PAGE_SIZE as u64;
        let words = vm.get_dirty_log(slot as u32, bytes as usize).during("read the dirty log")?;
        into.union_words(first, &words);
        if clear {
            clear_slot(vm, slot as u32, pages, &words)?;
        }
        first += pages;
    }
    Ok(())
}

fn clear_all(vm: &VmFd, ram: &GuestRam) -> Result<(), KvmError> {
    for (slot, bytes) in ram.slots().iter().map(|slot| slot.len).enumerate() {
        let pages = bytes / PAGE_SIZE as u64;
        clear_slot(vm, slot as u32, pages, &vec![u64::MAX; pages.div_ceil(64) as usize])?;
    }
    Ok(())
}

fn clear_slot(vm: &VmFd, slot: u32, pages: u64, words: &[u64]) -> Result<(), KvmError> {
    for (step, words) in words.chunks((CLEAR_STEP / 64) as usize).enumerate() {
        if words.iter().any(|word| *word != 0) {
            let first = step as u64 * CLEAR_STEP;
            kvm::clear_dirty_log(vm, slot, first, CLEAR_STEP.min(pages - first) as u32, words)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
