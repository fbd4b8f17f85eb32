//! The guest's side of a virtio device, for tests: a driver that works the registers and builds rings in guest memory.
//!
//! It can follow the protocol ([`Driver::start`], [`Driver::add`], [`Driver::take_used`]) and break it (`write_descriptor`,
//! `set_available_index`). Queue q has its rings from `ring_base(q)` on; the area from [`ARENA`] on is for buffers.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};

use event_manager::{EventManager, SubscriberOps};
use virtio_bindings::virtio_mmio as reg;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::mmio::MmioDevice;
use super::{VirtioDevice, status};
use crate::GuestMemory;

pub(crate) const MEMORY_BYTES: u64 = 8 << 20;
pub(crate) const ARENA: u64 = 1 << 20;
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;
pub(crate) const F_VERSION_1: u64 = 1 << 32;
pub(crate) const F_INDIRECT: u64 = 1 << 28;

/// Guest memory in two regions, so that buffers can cross from one to the other.
pub(crate) fn memory() -> GuestMemory {
    let half = MEMORY_BYTES as usize / 2;
    GuestMemory::from_ranges(&[(GuestAddress(0), half), (GuestAddress(half as u64), half)]).unwrap()
}

#[derive(Clone, Copy)]
pub(crate) struct Buffer {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) writable: bool,
}

pub(crate) fn readable(address: u64, len: u32) -> Buffer {
    Buffer { address, len, writable: false }
}

pub(crate) fn writable(address: u64, len: u32) -> Buffer {
    Buffer { address, len, writable: true }
}

#[derive(Clone, Default)]
struct Rings {
    size: u16,
    free: Vec<u16>,
    available: u16,
    used: u16,
    chains: std::collections::HashMap<u16, Vec<u16>>,
}

pub(crate) struct Driver {
    pub(crate) memory: GuestMemory,
    pub(crate) irq: EventFd,
    device: Arc<Mutex<MmioDevice>>,
    events: EventManager<Arc<Mutex<MmioDevice>>>,
    rings: Vec<Rings>,
}

impl Driver {
    pub(crate) fn new(model: impl VirtioDevice + 'static) -> Self {
        Self::on(model, memory())
    }

    /// A device that has not been touched, on memory that may have a past.
    pub(crate) fn on(model: impl VirtioDevice + 'static, memory: GuestMemory) -> Self {
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let device = MmioDevice::new(Box::new(model), memory.clone(), irq.try_clone().unwrap()).unwrap();
        let queues = device.queue_events().len();
        let device = Arc::new(Mutex::new(device));
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(Arc::clone(&device));
        Self { memory, irq, device, events, rings: vec![Rings::default(); queues] }
    }

    /// A driver that goes on where `self` was, with a restored device on the same guest memory.
    pub(crate) fn migrate(&self, model: impl VirtioDevice + 'static) -> Self {
        let state = self.device().save();
        let bytes = postcard::to_stdvec(&state).unwrap();
        let state = postcard::from_bytes(&bytes).unwrap();
        let mut next = Self::on(model, self.memory.clone());
        next.device().restore(&state).unwrap();
        next.rings = self.rings.clone();
        next
    }

    pub(crate) fn device(&self) -> MutexGuard<'_, MmioDevice> {
        self.device.lock().unwrap()
    }

    /// Requests and buffers that came back.
    pub(crate) fn completed(&self) -> u64 {
        self.device().completed().load(Ordering::Relaxed)
    }

    pub(crate) fn read(&self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.device().read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn write(&self, register: u32, value: u32) {
        self.device().write(register.into(), &value.to_le_bytes());
    }

    pub(crate) fn status(&self) -> u32 {
        self.read(reg::VIRTIO_MMIO_STATUS)
    }

    pub(crate) fn needs_reset(&self) -> bool {
        self.status() & status::NEEDS_RESET != 0
    }

    pub(crate) fn offered(&self) -> u64 {
        let half = |sel| {
            self.write(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, sel);
            u64::from(self.read(reg::VIRTIO_MMIO_DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    /// Reset, then negotiation up to FEATURES_OK. Answers whether the device took `features`.
    pub(crate) fn negotiate(&self, features: u64) -> bool {
        self.write(reg::VIRTIO_MMIO_STATUS, 0);
        self.write(reg::VIRTIO_MMIO_STATUS, 1);
        self.write(reg::VIRTIO_MMIO_STATUS, 3);
        for half in [0, 1] {
            self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.write(reg::VIRTIO_MMIO_STATUS, 11);
        self.status() == 11
    }

    pub(crate) fn ring_base(queue: usize) -> u64 {
        0x1_0000 * (queue as u64 + 1)
    }

    /// Addresses of descriptor table, available ring and used ring for `size` descriptors.
    pub(crate) fn ring_addresses(queue: usize, size: u16) -> [u64; 3] {
        let table = Self::ring_base(queue);
        let available = table + 16 * u64::from(size);
        let used = (available + 6 + 2 * u64::from(size)).next_multiple_of(4);
        [table, available, used]
    }

    pub(crate) fn configure_queue(&self, queue: usize, size: u32, addresses: [u64; 3]) {
        self.write(reg::VIRTIO_MMIO_QUEUE_SEL, queue as u32);
        self.write(reg::VIRTIO_MMIO_QUEUE_NUM, size);
        let registers = [
            (reg::VIRTIO_MMIO_QUEUE_DESC_LOW, reg::VIRTIO_MMIO_QUEUE_DESC_HIGH),
            (reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH),
            (reg::VIRTIO_MMIO_QUEUE_USED_LOW, reg::VIRTIO_MMIO_QUEUE_USED_HIGH),
        ];
        for ((low, high), address) in registers.into_iter().zip(addresses) {
            self.write(low, address as u32);
            self.write(high, (address >> 32) as u32);
        }
        self.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
    }

    pub(crate) fn set_up_queue(&mut self, queue: usize, size: u16) {
        let addresses = Self::ring_addresses(queue, size);
        let bytes = 22 * usize::from(size) + 6 + 2 * usize::from(size) + 64;
        self.memory.write_slice(&vec![0; bytes], GuestAddress(addresses[0])).unwrap();
        self.rings[queue] = Rings { size, free: (0..size).rev().collect(), ..Rings::default() };
        self.configure_queue(queue, size.into(), addresses);
    }

    /// The whole initialisation with queues of `size`, or less where the device has less, and all features of `features` that are offered.
    pub(crate) fn start(&mut self, size: u16, features: u64) {
        let features = features & self.offered() | F_VERSION_1;
        assert!(self.negotiate(features));
        for queue in 0..self.rings.len() {
            self.write(reg::VIRTIO_MMIO_QUEUE_SEL, queue as u32);
            let most = self.read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX) as u16;
            self.set_up_queue(queue, size.min(most));
        }
        self.write(reg::VIRTIO_MMIO_STATUS, 15);
        assert_eq!(self.status(), 15);
    }

    pub(crate) fn write_descriptor(&self, queue: usize, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        self.write_descriptor_at(Self::ring_base(queue), index, address, len, flags, next);
    }

    pub(crate) fn write_descriptor_at(&self, table: u64, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(table + 16 * u64::from(index))).unwrap();
    }

    fn available_ring(&self, queue: usize) -> u64 {
        Self::ring_addresses(queue, self.rings[queue].size)[1]
    }

    pub(crate) fn set_available_index(&self, queue: usize, index: u16) {
        self.memory.write_obj(index, GuestAddress(self.available_ring(queue) + 2)).unwrap();
    }

    pub(crate) fn set_no_interrupt(&self, queue: usize, on: bool) {
        self.memory.write_obj(u16::from(on), GuestAddress(self.available_ring(queue))).unwrap();
    }

    /// Makes descriptor `head` available.
    pub(crate) fn publish(&mut self, queue: usize, head: u16) {
        let ring = self.available_ring(queue);
        let rings = &mut self.rings[queue];
        let slot = u64::from(rings.available % rings.size);
        self.memory.write_obj(head, GuestAddress(ring + 4 + 2 * slot)).unwrap();
        rings.available = rings.available.wrapping_add(1);
        let available = rings.available;
        self.set_available_index(queue, available);
    }

    /// Makes a chain of `buffers` available; answers its head. None when there are not enough free descriptors.
    pub(crate) fn try_add(&mut self, queue: usize, buffers: &[Buffer]) -> Option<u16> {
        let rings = &mut self.rings[queue];
        if rings.free.len() < buffers.len() {
            return None;
        }
        let indexes = rings.free.split_off(rings.free.len() - buffers.len());
        for (at, buffer) in buffers.iter().enumerate() {
            let next = indexes.get(at + 1).copied();
            let flags = if buffer.writable { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
            self.write_descriptor(queue, indexes[at], buffer.address, buffer.len, flags, next.unwrap_or(0));
        }
        let head = indexes[0];
        self.rings[queue].chains.insert(head, indexes);
        self.publish(queue, head);
        Some(head)
    }

    pub(crate) fn add(&mut self, queue: usize, buffers: &[Buffer]) -> u16 {
        self.try_add(queue, buffers).unwrap()
    }

    pub(crate) fn notify(&self, queue: usize) {
        self.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, queue as u32);
    }

    /// Runs the I/O loop until nothing happens for `milliseconds`.
    pub(crate) fn run(&mut self, milliseconds: i32) {
        while self.events.run_with_timeout(milliseconds).unwrap() != 0 {}
    }

    /// One turn of the I/O loop.
    pub(crate) fn turn(&mut self, milliseconds: i32) {
        self.events.run_with_timeout(milliseconds).unwrap();
    }

    pub(crate) fn used_index(&self, queue: usize) -> u16 {
        let [_, _, used] = Self::ring_addresses(queue, self.rings[queue].size);
        self.memory.read_obj(GuestAddress(used + 2)).unwrap()
    }

    /// The next used element: head and length.
    pub(crate) fn take_used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let rings = &mut self.rings[queue];
        let [_, _, used] = Self::ring_addresses(queue, rings.size);
        let index: u16 = self.memory.read_obj(GuestAddress(used + 2)).unwrap();
        if index == rings.used {
            return None;
        }
        let slot = used + 4 + 8 * u64::from(rings.used % rings.size);
        let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        rings.used = rings.used.wrapping_add(1);
        let head = head as u16;
        rings.free.extend(rings.chains.remove(&head).unwrap_or_default());
        Some((head, len))
    }

    /// Handles the interrupt as a guest does: the status that was acknowledged, 0 if there was none.
    pub(crate) fn take_interrupt(&self) -> u32 {
        if self.irq.read().is_err() {
            return 0;
        }
        let status = self.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS);
        self.write(reg::VIRTIO_MMIO_INTERRUPT_ACK, status);
        status
    }

    /// Whether the page at `address` was marked as written by a device.
    pub(crate) fn is_dirty(&self, address: u64) -> bool {
        let (region, offset) = self.memory.to_region_addr(GuestAddress(address)).unwrap();
        region.bitmap().dirty_at(offset.0 as usize)
    }

    pub(crate) fn clear_dirty(&self) {
        self.memory.iter().for_each(|region| (**region).bitmap().reset());
    }

    pub(crate) fn put(&self, address: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(address)).unwrap();
    }

    pub(crate) fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }
}
