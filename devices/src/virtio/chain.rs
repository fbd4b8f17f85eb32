//! Descriptor chains: a walk that trusts nothing, and cursors over the buffers it finds.
//!
//! virtio-queue's own iterator ends a malformed chain as if it were complete. A device must not act on half a request, so the walk
//! here checks all of a chain before the device sees any of it: at most as many descriptors as the queue has (which also ends loops),
//! indexes inside their table, every buffer in guest memory, readable before writable, indirect tables only where virtio 1.2 §2.7.5.3
//! allows them. What was checked is copied: a driver that rewrites its descriptors later changes nothing.

use std::collections::VecDeque;

use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_INDIRECT;
use virtio_queue::desc::split::Descriptor;
use vm_memory::bitmap::MS;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::DeviceError;
use crate::GuestMemory;

const DESCRIPTOR_BYTES: u64 = 16;

/// A checked descriptor chain.
#[derive(Debug)]
pub struct Chain {
    /// Index of its first descriptor: its name in the used ring.
    pub head: u16,
    /// What the driver wrote for the device.
    pub readable: Buffers,
    /// What the device may fill.
    pub writable: Buffers,
}

/// A descriptor table: the queue's own, or an indirect one.
#[derive(Clone, Copy)]
struct Table {
    address: GuestAddress,
    size: u16,
}

impl Table {
    fn read(self, memory: &GuestMemory, index: u16) -> Result<Descriptor, DeviceError> {
        if index >= self.size {
            return Err(DeviceError::DescriptorIndex { index, size: self.size });
        }
        let outside =
            DeviceError::BufferRange { address: self.address.0, len: u64::from(self.size) * DESCRIPTOR_BYTES };
        let Some(address) = self.address.checked_add(u64::from(index) * DESCRIPTOR_BYTES) else {
            return Err(outside);
        };
        memory.read_obj(address).map_err(|_| outside)
    }
}

impl Chain {
    /// Walks the chain that starts at `head` in the table of `queue_size` descriptors at `table`.
    pub(super) fn walk(
        memory: &GuestMemory,
        table: GuestAddress,
        queue_size: u16,
        head: u16,
        indirect_negotiated: bool,
    ) -> Result<Self, DeviceError> {
        let mut chain = Self { head, readable: Buffers::default(), writable: Buffers::default() };
        let mut table = Table { address: table, size: queue_size };
        let mut inside_indirect = false;
        let mut index = head;
        let mut budget = queue_size;
        loop {
            let descriptor = table.read(memory, index)?;
            if u32::from(descriptor.flags()) & VRING_DESC_F_INDIRECT != 0 {
                if !indirect_negotiated {
                    return Err(DeviceError::Indirect("the feature was not negotiated"));
                }
                if inside_indirect {
                    return Err(DeviceError::Indirect("a table inside a table"));
                }
                if descriptor.has_next() {
                    return Err(DeviceError::Indirect("it must be the last of its chain"));
                }
                table = indirect_table(&descriptor, queue_size)?;
                inside_indirect = true;
                index = 0;
                continue;
            }
            budget = budget.checked_sub(1).ok_or(DeviceError::ChainTooLong(queue_size))?;
            chain.push(memory, &descriptor)?;
            if !descriptor.has_next() {
                return Ok(chain);
            }
            index = descriptor.next();
        }
    }

    fn push(&mut self, memory: &GuestMemory, descriptor: &Descriptor) -> Result<(), DeviceError> {
        let buffers = if descriptor.is_write_only() {
            &mut self.writable
        } else {
            if !self.writable.segments.is_empty() {
                return Err(DeviceError::ReadableAfterWritable);
            }
            &mut self.readable
        };
        let (address, len) = (descriptor.addr(), descriptor.len());
        // Zero bytes anywhere are harmless, but they still end the readable part.
        if len != 0 && !GuestMemoryBackend::check_range(memory, address, len as usize) {
            return Err(DeviceError::BufferRange { address: address.0, len: u64::from(len) });
        }
        buffers.remaining += u64::from(len);
        buffers.segments.push_back(Segment { address, len });
        // virtio 1.2 §2.7.5.2; also keeps every length that a device reports within its 32 bits.
        if self.readable.remaining + self.writable.remaining > u64::from(u32::MAX) {
            return Err(DeviceError::ChainTooLarge);
        }
        Ok(())
    }
}

fn indirect_table(descriptor: &Descriptor, queue_size: u16) -> Result<Table, DeviceError> {
    let len = u64::from(descriptor.len());
    if len == 0 || !len.is_multiple_of(DESCRIPTOR_BYTES) {
        return Err(DeviceError::Indirect("its length is no table of descriptors"));
    }
    // virtio 1.2 §2.7.5.3.1: no chain is longer than the queue, indirect or not.
    match u16::try_from(len / DESCRIPTOR_BYTES) {
        Ok(size) if size <= queue_size => Ok(Table { address: descriptor.addr(), size }),
        _ => Err(DeviceError::ChainTooLong(queue_size)),
    }
}

/// A piece of guest memory, as the host's kernel can be given it.
pub type Slice<'m> = VolatileSlice<'m, MS<'m, GuestMemory>>;

#[derive(Clone, Copy, Debug)]
struct Segment {
    address: GuestAddress,
    len: u32,
}

/// The buffers of one direction, consumed from the front; where one ends and the next begins does not show (virtio 1.2 §2.7.4).
#[derive(Clone, Debug, Default)]
pub struct Buffers {
    segments: VecDeque<Segment>,
    remaining: u64,
}

impl Buffers {
    /// Bytes not consumed yet, at most 2^32 - 1.
    pub fn remaining(&self) -> u64 {
        self.remaining
    }

    /// Fills `out` from guest memory.
    pub fn read(&mut self, memory: &GuestMemory, out: &mut [u8]) -> Result<(), DeviceError> {
        self.require("readable", out.len())?;
        let mut done = 0;
        while done < out.len() {
            let (address, len) = self.take(out.len() - done);
            memory.read_slice(&mut out[done..done + len], address).map_err(DeviceError::Memory)?;
            done += len;
        }
        Ok(())
    }

    /// Copies `data` to guest memory and marks its pages.
    pub fn write(&mut self, memory: &GuestMemory, data: &[u8]) -> Result<(), DeviceError> {
        self.require("writable", data.len())?;
        let mut done = 0;
        while done < data.len() {
            let (address, len) = self.take(data.len() - done);
            memory.write_slice(&data[done..done + len], address).map_err(DeviceError::Memory)?;
            done += len;
        }
        Ok(())
    }

    /// Cuts off the first `len` bytes.
    pub fn split_front(&mut self, len: usize) -> Result<Self, DeviceError> {
        self.require("first", len)?;
        let mut front = Self::default();
        while front.remaining < len as u64 {
            let (address, taken) = self.take(len - front.remaining as usize);
            front.segments.push_back(Segment { address, len: taken as u32 });
            front.remaining += taken as u64;
        }
        Ok(front)
    }

    /// Appends what is left of the buffers to `slices`, for system calls that take many; nothing is consumed. A write through a slice does
    /// not mark its pages: whoever makes it does.
    pub fn slices<'m>(&self, memory: &'m GuestMemory, slices: &mut Vec<Slice<'m>>) -> Result<(), DeviceError> {
        for segment in self.segments.iter().filter(|segment| segment.len != 0) {
            for slice in GuestMemoryBackend::get_slices(memory, segment.address, segment.len as usize) {
                slices.push(slice.map_err(DeviceError::Memory)?);
            }
        }
        Ok(())
    }

    /// Cuts off the last byte and answers where it is. None when nothing remains.
    pub fn split_last_byte(&mut self) -> Option<GuestAddress> {
        while let Some(last) = self.segments.back_mut() {
            if last.len == 0 {
                self.segments.pop_back();
                continue;
            }
            last.len -= 1;
            self.remaining -= 1;
            // In range: the whole segment was checked to lie in memory.
            return last.address.checked_add(u64::from(last.len));
        }
        None
    }

    fn require(&self, direction: &'static str, need: usize) -> Result<(), DeviceError> {
        if self.remaining < need as u64 {
            return Err(DeviceError::TooShort { direction, have: self.remaining, need: need as u64 });
        }
        Ok(())
    }

    /// Consumes at most `limit` bytes of the front segment; the caller has checked that `limit` remain.
    fn take(&mut self, limit: usize) -> (GuestAddress, usize) {
        while let Some(front) = self.segments.front_mut() {
            let len = (front.len as usize).min(limit);
            if len == 0 {
                self.segments.pop_front();
                continue;
            }
            let address = front.address;
            front.address = address.unchecked_add(len as u64);
            front.len -= len as u32;
            self.remaining -= len as u64;
            return (address, len);
        }
        (GuestAddress(0), 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;

    /// A chain of the given buffers in a table at 0.
    fn walk(memory: &GuestMemory, buffers: &[(u64, u32, u16)]) -> Result<Chain, DeviceError> {
        for (index, &(address, len, flags)) in (0u16..).zip(buffers) {
            let last = usize::from(index) + 1 == buffers.len();
            let descriptor = Descriptor::new(address, len, if last { flags } else { flags | NEXT }, index + 1);
            memory.write_obj(descriptor, GuestAddress(u64::from(index) * DESCRIPTOR_BYTES)).unwrap();
        }
        Chain::walk(memory, GuestAddress(0), 1024, 0, false)
    }

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 0x1_0000), (GuestAddress(0x1_0000), 0x80_0000)]).unwrap()
    }

    #[test]
    fn cursors_cross_buffers_regions_and_empty_buffers() {
        let memory = memory();
        let data: Vec<u8> = (0..100).collect();
        memory.write_slice(&data[..60], GuestAddress(0x1_0000 - 30)).unwrap();
        memory.write_slice(&data[60..], GuestAddress(0x2_0000)).unwrap();
        let mut chain = walk(
            &memory,
            &[
                (0x1_0000 - 30, 60, 0),
                (u64::MAX, 0, 0),
                (0x2_0000, 40, 0),
                (0x3_0000, 10, WRITE),
                (7, 0, WRITE),
                (0x4_0000, 10, WRITE),
            ],
        )
        .unwrap();
        assert_eq!((chain.readable.remaining(), chain.writable.remaining()), (100, 20));
        let (mut first, mut rest) = ([0; 7], [0; 93]);
        chain.readable.read(&memory, &mut first).unwrap();
        chain.readable.read(&memory, &mut rest).unwrap();
        assert_eq!([first.as_slice(), &rest].concat(), data);
        assert!(matches!(chain.readable.read(&memory, &mut [0]), Err(DeviceError::TooShort { .. })));

        assert_eq!(chain.writable.split_last_byte(), Some(GuestAddress(0x4_0009)));
        chain.writable.write(&memory, &data[..19]).unwrap();
        assert!(chain.writable.write(&memory, &[0]).is_err());
        let mut written = [0; 10];
        memory.read_slice(&mut written, GuestAddress(0x4_0000)).unwrap();
        assert_eq!(written, [10, 11, 12, 13, 14, 15, 16, 17, 18, 0]);
    }

    #[test]
    fn a_front_is_cut_off_and_the_rest_seen_as_slices() {
        let memory = memory();
        // The second buffer crosses from one region into the next.
        let mut chain = walk(&memory, &[(0x100, 8, WRITE), (0x1_0000 - 30, 60, WRITE), (0x2_0000, 5, WRITE)]).unwrap();
        let mut front = chain.writable.split_front(12).unwrap();
        assert_eq!((front.remaining(), chain.writable.remaining()), (12, 61));
        front.write(&memory, &[7; 12]).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x1_0000 - 30)).unwrap(), 0x0707_0707);
        let mut slices = Vec::new();
        chain.writable.slices(&memory, &mut slices).unwrap();
        assert_eq!(slices.iter().map(VolatileSlice::len).collect::<Vec<_>>(), [26, 30, 5]);
        assert!(chain.writable.split_front(62).is_err());
    }

    #[test]
    fn four_gibibytes_are_too_much_for_one_chain() {
        let memory = memory();
        let buffer = (0x1_0000, 0x80_0000, WRITE);
        assert_eq!(walk(&memory, &[buffer; 511]).unwrap().writable.remaining(), 511 * 0x80_0000);
        assert!(matches!(walk(&memory, &[buffer; 512]), Err(DeviceError::ChainTooLarge)));
    }
}
