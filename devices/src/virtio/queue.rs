//! One virtqueue: what the driver configured, and the rings once they are ready.
//!
//! Ring arithmetic is virtio-queue's; the walk of a chain is [`chain`](super::chain)'s. Every write to the used ring goes through
//! vm-memory and so marks its page.

use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueState as RingState, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::Chain;
use super::{DeviceError, RestoreError};
use crate::GuestMemory;

/// Flags and index in front of a used ring's elements.
const USED_RING_HEADER_BYTES: u64 = 4;
/// Head and length.
const USED_ELEMENT_BYTES: u64 = 8;

/// Saved state of a [`VirtQueue`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Descriptors, as the driver chose.
    pub size: u16,
    /// The rings are in use.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub descriptor_table: u64,
    /// Guest physical address of the available ring.
    pub available_ring: u64,
    /// Guest physical address of the used ring.
    pub used_ring: u64,
    /// Index of the next entry to take from the available ring; 0 unless ready.
    pub next_available: u16,
    /// Index of the next entry to write in the used ring; 0 unless ready.
    pub next_used: u16,
}

/// A virtqueue of a device.
#[derive(Debug)]
pub struct VirtQueue {
    index: u16,
    max_size: u16,
    setup: QueueState,
    rings: Option<Queue>,
    indirect: bool,
}

impl VirtQueue {
    /// Queue `index`, of at most `max_size` descriptors.
    pub fn new(index: u16, max_size: u16) -> Self {
        Self {
            index,
            max_size,
            setup: QueueState { size: max_size, ..QueueState::default() },
            rings: None,
            indirect: false,
        }
    }

    /// Largest size the driver may choose.
    pub fn max_size(&self) -> u16 {
        self.max_size
    }

    /// Whether the rings are in use.
    pub fn is_ready(&self) -> bool {
        self.rings.is_some()
    }

    /// What the driver configures before the queue is ready; not to be changed after.
    pub(super) fn setup_mut(&mut self) -> Option<&mut QueueState> {
        self.rings.is_none().then_some(&mut self.setup)
    }

    /// Back to power-on.
    pub(super) fn reset(&mut self) {
        *self = Self::new(self.index, self.max_size);
    }

    /// Stops using the rings; the configuration stays.
    pub(super) fn disable(&mut self) {
        self.rings = None;
    }

    /// Checks size, alignment and place of the rings and begins to use them.
    pub(super) fn enable(&mut self, memory: &GuestMemory, indirect: bool) -> Result<(), DeviceError> {
        self.enable_at(memory, indirect, 0, 0)
    }

    fn enable_at(
        &mut self,
        memory: &GuestMemory,
        indirect: bool,
        next_avail: u16,
        next_used: u16,
    ) -> Result<(), DeviceError> {
        let rings = Queue::try_from(RingState {
            max_size: self.max_size,
            next_avail,
            next_used,
            event_idx_enabled: false,
            size: self.setup.size,
            ready: true,
            desc_table: self.setup.descriptor_table,
            avail_ring: self.setup.available_ring,
            used_ring: self.setup.used_ring,
        })
        .map_err(|source| DeviceError::Ring { queue: self.index, source })?;
        // virtio-queue takes a ring at 0 for one that was never set.
        if self.setup.available_ring == 0 || !rings.is_valid(memory) {
            return Err(DeviceError::RingRange(self.index));
        }
        self.rings = Some(rings);
        self.indirect = indirect;
        Ok(())
    }

    /// Takes the next available chain; none when there is none or the queue is not ready.
    pub fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, DeviceError> {
        let index = self.index;
        let Some(rings) = &mut self.rings else {
            return Ok(None);
        };
        // `iter` refuses an available index more than the queue's size ahead.
        let head = rings
            .iter(memory)
            .map_err(|source| DeviceError::Ring { queue: index, source })?
            .next()
            .map(|c| c.head_index());
        let Some(head) = head else { return Ok(None) };
        Chain::walk(memory, GuestAddress(rings.desc_table()), rings.size(), head, self.indirect).map(Some)
    }

    /// Gives the chain taken last back.
    pub fn unpop(&mut self) {
        if let Some(rings) = &mut self.rings {
            rings.go_to_previous_position();
        }
    }

    /// Whether [`pop`](Self::pop) would find a chain.
    pub fn has_available(&self, memory: &GuestMemory) -> Result<bool, DeviceError> {
        match &self.rings {
            Some(rings) => Ok(self.available_index(memory)? != rings.next_avail()),
            None => Ok(false),
        }
    }

    /// The driver's available index; 0 when the queue is not ready.
    pub fn available_index(&self, memory: &GuestMemory) -> Result<u16, DeviceError> {
        match &self.rings {
            Some(rings) => rings
                .avail_idx(memory, Ordering::Acquire)
                .map(|index| index.0)
                .map_err(|source| DeviceError::Ring { queue: self.index, source }),
            None => Ok(0),
        }
    }

    /// Puts a chain in the used ring.
    pub fn complete(&mut self, memory: &GuestMemory, head: u16, written: u32) -> Result<(), DeviceError> {
        let index = self.index;
        match &mut self.rings {
            Some(rings) => {
                rings.add_used(memory, head, written).map_err(|source| DeviceError::Ring { queue: index, source })
            }
            None => Ok(()),
        }
    }

    /// Puts chains in the used ring that the driver must find together: their elements are all there before the index says so.
    pub fn complete_together(&mut self, memory: &GuestMemory, used: &[(u16, u32)]) -> Result<(), DeviceError> {
        let index = self.index;
        let Some(rings) = &mut self.rings else { return Ok(()) };
        let broken = |source| DeviceError::Ring { queue: index, source };
        let Some((&(last_head, last_written), before)) = used.split_last() else { return Ok(()) };
        let first = rings.next_used();
        for (offset, &(head, written)) in (0_u16..).zip(before) {
            let slot = u64::from(first.wrapping_add(offset) % rings.size());
            let at = GuestAddress(rings.used_ring() + USED_RING_HEADER_BYTES + slot * USED_ELEMENT_BYTES);
            let element = u64::from(written) << 32 | u64::from(head);
            memory.write_obj(element.to_le(), at).map_err(|source| broken(virtio_queue::Error::GuestMemory(source)))?;
        }
        // The last element and the index, in the order that a driver needs.
        rings.set_next_used(first.wrapping_add(before.len() as u16));
        rings.add_used(memory, last_head, last_written).map_err(broken)
    }

    /// Whether the driver wants to hear of used buffers (virtio 1.2 §2.7.7). In doubt, yes.
    pub fn wants_interrupt(&self, memory: &GuestMemory) -> bool {
        // The driver clears the flag, then looks at the used index; we wrote the used index, then look at the flag.
        fence(Ordering::SeqCst);
        memory
            .load::<u16>(GuestAddress(self.setup.available_ring), Ordering::Relaxed)
            .map_or(true, |flags| u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// The state for a snapshot.
    pub fn save(&self) -> QueueState {
        QueueState {
            ready: self.rings.is_some(),
            next_available: self.rings.as_ref().map_or(0, QueueT::next_avail),
            next_used: self.rings.as_ref().map_or(0, QueueT::next_used),
            ..self.setup.clone()
        }
    }

    /// Takes `state` up. Guest memory is not read: its pages may not be there yet. An available index that is implausible is found at
    /// the first notification, like one that a running driver writes.
    pub(super) fn restore(
        &mut self,
        state: &QueueState,
        memory: &GuestMemory,
        indirect: bool,
    ) -> Result<(), RestoreError> {
        self.reset();
        // What a driver could write in the size register before the queue is ready is not checked until then.
        self.setup = QueueState { ready: false, next_available: 0, next_used: 0, ..state.clone() };
        if !state.ready {
            return Ok(());
        }
        // Nothing is in flight in a saved device, but a driver that broke the protocol may have left one chain unreturned.
        let unreturned = state.next_available.wrapping_sub(state.next_used);
        if unreturned > state.size {
            return Err(RestoreError::Impossible { field: "queue index", value: u64::from(unreturned) });
        }
        let queue = self.index;
        self.enable_at(memory, indirect, state.next_available, state.next_used)
            .map_err(|source| RestoreError::Queue { queue, source })
    }
}
