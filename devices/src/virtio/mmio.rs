//! The virtio-mmio transport, virtio 1.2 §4.2, version 2 only: registers, feature negotiation, the status machine, one interrupt.
//!
//! An [`MmioDevice`] takes 4 KiB of guest physical addresses. vCPU threads call [`read`](MmioDevice::read) and
//! [`write`](MmioDevice::write); the I/O thread runs it as an event subscriber (`Arc<Mutex<MmioDevice>>` is one). A notification only
//! signals the queue's event, also when it comes as an MMIO exit instead of through an ioeventfd, so device work never runs on a vCPU.
//!
//! The [`Interrupt`] is shared: the VMM may serve the two interrupt registers, which a guest's handler uses on each interrupt, without
//! the device's lock, and so without waiting for block I/O.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio as reg;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::interrupt::{CONFIG_CHANGE, Interrupt, USED_BUFFER};
use super::queue::{QueueState, VirtQueue};
use super::status::{self, StatusChange};
use super::{DeviceError, DeviceIo, DeviceState, RestoreError, VirtioDevice};
use crate::GuestMemory;

/// Size of the register window, bytes.
pub const WINDOW_BYTES: u64 = 0x1000;
/// Offset of the QueueNotify register: the ioeventfds' address, with the queue's index as datamatch, 32 bits wide.
pub const QUEUE_NOTIFY: u64 = reg::VIRTIO_MMIO_QUEUE_NOTIFY as u64;
/// Offset of the InterruptStatus register, for VMMs that serve it from [`Interrupt::status`].
pub const INTERRUPT_STATUS: u64 = reg::VIRTIO_MMIO_INTERRUPT_STATUS as u64;
/// Offset of the InterruptACK register, for VMMs that serve it from [`Interrupt::acknowledge`].
pub const INTERRUPT_ACK: u64 = reg::VIRTIO_MMIO_INTERRUPT_ACK as u64;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION_MODERN: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"STAS");
const CONFIG: u64 = reg::VIRTIO_MMIO_CONFIG as u64;
const TRANSPORT_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | INDIRECT;
const INDIRECT: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// Event data of the device's host events; queue events carry the queue's index.
const HOST_EVENTS: u32 = u32::MAX;
/// A guest can break and reset a device for ever; only the first few faults are worth a line in the log.
const LOGGED_FAULTS: u64 = 8;

/// Saved state of an [`MmioDevice`] with its queues and device model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioState {
    /// Device type, virtio 1.2 §5.
    pub device_type: u32,
    /// DeviceFeaturesSel.
    pub device_features_sel: u32,
    /// DriverFeaturesSel.
    pub driver_features_sel: u32,
    /// Features the driver accepted.
    pub driver_features: u64,
    /// QueueSel.
    pub queue_sel: u32,
    /// Device status, virtio 1.2 §2.1.
    pub status: u32,
    /// InterruptStatus.
    pub interrupt_status: u32,
    /// ConfigGeneration.
    pub config_generation: u32,
    /// Each queue of the device.
    pub queues: Vec<QueueState>,
    /// Device-specific state.
    pub device: DeviceState,
}

impl MmioState {
    /// Version of this structure and all that it contains.
    pub const VERSION: u16 = 1;
}

/// A virtio device at its place in the guest's physical address space.
pub struct MmioDevice {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    queues: Vec<VirtQueue>,
    queue_events: Vec<EventFd>,
    interrupt: Arc<Interrupt>,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    status: u32,
    config_generation: u32,
    faults: u64,
    completed: Arc<AtomicU64>,
}

impl MmioDevice {
    /// Puts `device` behind a transport after power-on. `irq` is the irqfd of the device's own, edge-triggered GSI.
    pub fn new(device: Box<dyn VirtioDevice>, memory: GuestMemory, irq: EventFd) -> io::Result<Self> {
        let queues: Vec<_> =
            (0u16..).zip(device.queue_sizes()).map(|(index, &size)| VirtQueue::new(index, size)).collect();
        let queue_events = queues.iter().map(|_| EventFd::new(EFD_NONBLOCK)).collect::<io::Result<_>>()?;
        Ok(Self {
            device,
            memory,
            queues,
            queue_events,
            interrupt: Arc::new(Interrupt::new(irq)),
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            status: 0,
            config_generation: 0,
            faults: 0,
            completed: Arc::default(),
        })
    }

    /// Device type, virtio 1.2 §5.
    pub fn device_type(&self) -> u32 {
        self.device.device_type()
    }

    /// One event per queue, in order: register the i-th as ioeventfd at [`QUEUE_NOTIFY`] with datamatch i.
    pub fn queue_events(&self) -> &[EventFd] {
        &self.queue_events
    }

    /// The device's interrupt, which works without the device's lock.
    pub fn interrupt(&self) -> Arc<Interrupt> {
        Arc::clone(&self.interrupt)
    }

    /// Counts the requests and buffers returned to the driver since the device was created. Read without the device's lock: a guest can
    /// keep its device busy for as long as it likes.
    pub fn completed(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.completed)
    }

    /// The driver runs the device: DRIVER_OK is set, and neither FAILED nor DEVICE_NEEDS_RESET.
    pub fn is_active(&self) -> bool {
        status::is_active(self.status)
    }

    /// A read of `data.len()` bytes at `offset` in the window. Registers are 32 bits wide; other accesses to them answer zero.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            let config = self.device.config();
            let from = usize::try_from(offset).map_or(config.len(), |offset| offset.min(config.len()));
            let len = data.len().min(config.len() - from);
            data[..len].copy_from_slice(&config[from..from + len]);
        } else if data.len() == 4
            && let Ok(register) = u32::try_from(offset)
        {
            data.copy_from_slice(&self.read_register(register).to_le_bytes());
        }
    }

    fn read_register(&self, register: u32) -> u32 {
        let queue = self.queues.get(self.queue_sel as usize);
        match register {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION_MODERN,
            reg::VIRTIO_MMIO_DEVICE_ID => self.device.device_type(),
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_sel {
                0 => self.offered_features() as u32,
                1 => (self.offered_features() >> 32) as u32,
                _ => 0,
            },
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => queue.map_or(0, |queue| u32::from(queue.max_size())),
            reg::VIRTIO_MMIO_QUEUE_READY => queue.map_or(0, |queue| u32::from(queue.is_ready())),
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            reg::VIRTIO_MMIO_STATUS => self.status,
            reg::VIRTIO_MMIO_CONFIG_GENERATION => self.config_generation,
            // No shared memory regions: a length of -1 says so (virtio 1.2 §4.2.2).
            reg::VIRTIO_MMIO_SHM_LEN_LOW
            | reg::VIRTIO_MMIO_SHM_LEN_HIGH
            | reg::VIRTIO_MMIO_SHM_BASE_LOW
            | reg::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    /// A write of `data` at `offset` in the window. Registers take 32 bits; other accesses, and writes to the configuration space,
    /// which is read-only in every device here, are ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(register), Ok(bytes)) = (u32::try_from(offset), <[u8; 4]>::try_from(data))
            && offset < CONFIG
        {
            self.write_register(register, u32::from_le_bytes(bytes));
        }
    }

    fn write_register(&mut self, register: u32, value: u32) {
        match register {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES if status::may_negotiate(self.status) => match self.driver_features_sel {
                0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value),
                1 => self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32,
                _ => {}
            },
            reg::VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => {
                if let Some(event) = self.queue_events.get(value as usize)
                    && let Err(error) = event.write(1)
                {
                    tracing::debug!(%error, "queue event already pending");
                }
            }
            reg::VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            reg::VIRTIO_MMIO_STATUS => self.write_status(value),
            reg::VIRTIO_MMIO_QUEUE_READY => self.write_queue_ready(value),
            _ if status::may_set_up_queues(self.status) => self.write_queue_setup(register, value),
            _ => {}
        }
    }

    fn write_queue_setup(&mut self, register: u32, value: u32) {
        let Some(setup) = self.queues.get_mut(self.queue_sel as usize).and_then(VirtQueue::setup_mut) else {
            return;
        };
        let low = |address: &mut u64| *address = *address & !0xffff_ffff | u64::from(value);
        let high = |address: &mut u64| *address = *address & 0xffff_ffff | u64::from(value) << 32;
        match register {
            // Checked with the rest when the queue becomes ready; 0 is refused then.
            reg::VIRTIO_MMIO_QUEUE_NUM => setup.size = u16::try_from(value).unwrap_or(0),
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => low(&mut setup.descriptor_table),
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => high(&mut setup.descriptor_table),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => low(&mut setup.available_ring),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => high(&mut setup.available_ring),
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => low(&mut setup.used_ring),
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => high(&mut setup.used_ring),
            _ => {}
        }
    }

    fn write_queue_ready(&mut self, value: u32) {
        let indirect = self.driver_features & INDIRECT != 0;
        let Some(queue) = self.queues.get_mut(self.queue_sel as usize) else {
            return;
        };
        match value {
            0 => queue.disable(),
            1 if status::may_set_up_queues(self.status) && !queue.is_ready() => {
                if let Err(error) = queue.enable(&self.memory, indirect) {
                    self.fault(&error);
                }
            }
            _ => {}
        }
    }

    fn write_status(&mut self, value: u32) {
        match status::plan(self.status, value, self.features_acceptable()) {
            StatusChange::Reset => self.reset(),
            StatusChange::To(next) => {
                let was_active = self.is_active();
                self.status = next;
                if self.is_active() && !was_active {
                    if let Err(error) = self.device.activate(self.driver_features) {
                        self.fault(&error);
                    }
                } else if was_active && !self.is_active() {
                    self.device.reset();
                }
            }
        }
    }

    fn reset(&mut self) {
        self.device.reset();
        self.queues.iter_mut().for_each(VirtQueue::reset);
        self.interrupt.acknowledge(u32::MAX);
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        self.status = 0;
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered_features() == 0 && self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0
    }

    /// The driver broke the protocol: nothing more happens until it resets the device.
    fn fault(&mut self, error: &DeviceError) {
        self.faults += 1;
        if self.faults <= LOGGED_FAULTS {
            tracing::warn!(
                device_type = self.device.device_type(),
                error = error as &dyn std::error::Error,
                "device needs a reset"
            );
        }
        self.device.reset();
        self.status |= status::NEEDS_RESET;
        // virtio 1.2 §2.1.2: the notification only after DRIVER_OK.
        if self.status & status::DRIVER_OK != 0 {
            self.interrupt.raise(CONFIG_CHANGE);
        }
    }

    /// Runs `work` on an active device, then raises the interrupt it owes, if any, and asks for the turns it wants.
    fn run(&mut self, work: impl FnOnce(&mut dyn VirtioDevice, &mut DeviceIo<'_>) -> Result<(), DeviceError>) {
        if !self.is_active() {
            return;
        }
        let mut io = DeviceIo::new(&self.memory, &mut self.queues);
        let result = work(&mut *self.device, &mut io);
        let (used, again, config_changed) = (io.used, io.again, io.config_changed);
        self.completed.fetch_add(io.completed, Ordering::Relaxed);
        if config_changed {
            // Before the interrupt: who reads the space because of it must find the new generation.
            self.config_generation = self.config_generation.wrapping_add(1);
            self.interrupt.raise(CONFIG_CHANGE);
        }
        let wanted = (0u32..)
            .zip(&self.queues)
            .any(|(index, queue)| used & 1 << index != 0 && queue.wants_interrupt(&self.memory));
        if wanted {
            self.interrupt.raise(USED_BUFFER);
        }
        if let Err(error) = result {
            return self.fault(&error);
        }
        for (_, event) in (0u32..).zip(&self.queue_events).filter(|(index, _)| again & 1 << index != 0) {
            if let Err(error) = event.write(1) {
                tracing::debug!(%error, "queue event already pending");
            }
        }
    }

    /// Looks at every queue of an active device and raises its interrupt once, wanted or not. On every resume, restored or not, when
    /// vCPU and interrupt controller state are in place: notifications and interrupts that were on their way are not part of a
    /// snapshot, and spurious ones are harmless. Guest memory must be accessible.
    pub fn kick_all(&mut self) {
        for queue in 0..self.queues.len() {
            self.run(|device, io| device.process_queue(queue, io));
        }
        if self.is_active() {
            self.interrupt.raise(USED_BUFFER);
        } else if self.status & status::NEEDS_RESET != 0 && self.status & status::DRIVER_OK != 0 {
            self.interrupt.raise(CONFIG_CHANGE);
        }
    }

    /// The state for a snapshot. The caller has parked the I/O loop or holds the lock, so nothing is in flight.
    pub fn save(&self) -> MmioState {
        MmioState {
            device_type: self.device.device_type(),
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            status: self.status,
            interrupt_status: self.interrupt.status(),
            config_generation: self.config_generation,
            queues: self.queues.iter().map(VirtQueue::save).collect(),
            device: self.device.save(),
        }
    }

    /// Takes `state` up in a device fresh from [`new`](Self::new), with the same model and configuration. Guest memory is not
    /// touched, so its pages may still be absent; [`kick_all`](Self::kick_all) follows when they can be read.
    pub fn restore(&mut self, state: &MmioState) -> Result<(), RestoreError> {
        let same = |field, saved: u64, actual: u64| {
            if saved == actual { Ok(()) } else { Err(RestoreError::Mismatch { field, saved, actual }) }
        };
        same("device type", state.device_type.into(), self.device.device_type().into())?;
        same("number of queues", state.queues.len() as u64, self.queues.len() as u64)?;
        if !status::is_reachable(state.status) {
            return Err(RestoreError::Impossible { field: "device status", value: state.status.into() });
        }
        if state.interrupt_status & !(USED_BUFFER | CONFIG_CHANGE) != 0 {
            return Err(RestoreError::Impossible { field: "interrupt status", value: state.interrupt_status.into() });
        }
        self.driver_features = state.driver_features;
        if state.status & status::FEATURES_OK != 0 && !self.features_acceptable() {
            return Err(RestoreError::Impossible { field: "feature set", value: state.driver_features });
        }
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.queue_sel = state.queue_sel;
        self.config_generation = state.config_generation;
        let indirect = self.driver_features & INDIRECT != 0;
        for (queue, saved) in self.queues.iter_mut().zip(&state.queues) {
            queue.restore(saved, &self.memory, indirect)?;
        }
        self.device.restore(&state.device)?;
        if status::is_active(state.status) {
            self.device.activate(self.driver_features).map_err(RestoreError::Device)?;
        }
        self.interrupt.restore(state.interrupt_status);
        self.status = state.status;
        Ok(())
    }
}

impl MutEventSubscriber for MmioDevice {
    fn init(&mut self, ops: &mut EventOps) {
        let queues =
            (0u32..).zip(&self.queue_events).map(|(index, event)| Events::with_data(event, index, EventSet::IN));
        let host = self.device.host_events().map(|fd| Events::with_data_raw(fd, HOST_EVENTS, EventSet::IN));
        for events in queues.chain(host) {
            if let Err(error) = ops.add(events) {
                tracing::error!(%error, fd = events.fd(), "cannot watch a device's event");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if events.data() == HOST_EVENTS {
            return self.run(|device, io| device.process_host_events(io));
        }
        let queue = events.data() as usize;
        if let Some(event) = self.queue_events.get(queue) {
            // Before the rings are read: a notification that comes in between is then seen next time. Fails when already drained.
            let _ = event.read();
            self.run(|device, io| device.process_queue(queue, io));
        }
    }
}

impl std::fmt::Debug for MmioDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MmioDevice")
            .field("device_type", &self.device.device_type())
            .field("status", &self.status)
            .field("fd", &self.queue_events.first().map(AsRawFd::as_raw_fd))
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
