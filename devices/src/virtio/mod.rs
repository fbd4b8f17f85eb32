//! Virtio 1.2 devices: the contract between a device model and its transport, and what both share.
//!
//! [`mmio`] is the transport: it owns registers, queues and the interrupt. [`block`], [`vsock`], [`rng`] and [`net`] are device models behind
//! [`VirtioDevice`]. [`chain`] and [`queue`] are the only code that looks at rings, and they trust nothing in them.
//!
//! # Faults
//!
//! A driver that breaks the protocol (a descriptor loop, a buffer outside memory, an available index that jumps) is a
//! [`DeviceError`]. The transport then sets DEVICE_NEEDS_RESET, resets the model, raises a configuration interrupt and does nothing
//! more until the driver resets the device. A request that is well formed but cannot be served (a read past the end of the disk, an
//! I/O error of the host) is answered in the device's own protocol and is no fault.
//!
//! # Features that are not offered
//!
//! VIRTIO_F_EVENT_IDX: a buffer that is available but not consumed when a snapshot is taken leaves the driver believing that it has
//! notified, and with event indexes it never does so again. The flags of the available ring suppress interrupts well enough here.
//! Packed rings, in-order use and queue reset: no device here gains from them.

pub mod block;
pub mod chain;
pub mod interrupt;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
mod status;
mod timer;
pub mod vsock;

#[cfg(test)]
mod driver;
#[cfg(test)]
mod hostile_tests;

use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};

use crate::GuestMemory;
use chain::Chain;
use queue::VirtQueue;

/// What a driver did that the protocol forbids. The device stops and asks for a reset.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A ring cannot be read or written, is misaligned, or its available index is more than the queue's size ahead.
    #[error("queue {queue}: broken ring")]
    Ring {
        /// Index of the queue.
        queue: u16,
        /// What is wrong with it.
        #[source]
        source: virtio_queue::Error,
    },
    /// A ring lies outside guest memory.
    #[error("queue {0}: a ring lies outside guest memory")]
    RingRange(u16),
    /// A descriptor index is outside its table.
    #[error("descriptor {index} is outside its table of {size}")]
    DescriptorIndex {
        /// The index.
        index: u16,
        /// Descriptors in the table.
        size: u16,
    },
    /// More descriptors than the queue has: a loop, or an indirect table longer than allowed.
    #[error("a chain has more than {0} descriptors")]
    ChainTooLong(u16),
    /// The buffers of a chain add up to more than 2^32 - 1 bytes.
    #[error("the buffers of a chain add up to more than 4 GiB")]
    ChainTooLarge,
    /// A buffer, or a descriptor table, lies outside guest memory.
    #[error("{len} bytes at guest address {address:#x} are outside guest memory")]
    BufferRange {
        /// Guest physical.
        address: u64,
        /// Bytes.
        len: u64,
    },
    /// A device-readable buffer follows a device-writable one.
    #[error("a device-readable buffer follows a device-writable one")]
    ReadableAfterWritable,
    /// An indirect descriptor that was not negotiated, is nested, is chained onwards, or has a length that is no table.
    #[error("indirect descriptor: {0}")]
    Indirect(&'static str),
    /// The buffers are too small for what the device must read or write, or point the wrong way.
    #[error("the {direction} buffers of a chain have {have} bytes, {need} are needed")]
    TooShort {
        /// `readable` or `writable`, from the device's side.
        direction: &'static str,
        /// Bytes there.
        have: u64,
        /// Bytes needed.
        need: u64,
    },
    /// A request whose fields contradict each other or its buffers.
    #[error("malformed request: {0}")]
    Malformed(&'static str),
    /// A copy from or to guest memory failed although the range had been checked.
    #[error("cannot access guest memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
    /// The host failed the device in a way that no single request can answer.
    #[error("{operation} failed")]
    Host {
        /// What was tried.
        operation: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// Why a saved state was refused. The device it was offered to is unusable afterwards.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state belongs to another kind of device, or to one with another shape.
    #[error("saved {field} is {saved}, the device has {actual}")]
    Mismatch {
        /// Which field.
        field: &'static str,
        /// In the snapshot.
        saved: u64,
        /// In this device.
        actual: u64,
    },
    /// The device-specific part belongs to another kind of device.
    #[error("the saved device state belongs to another kind of device")]
    Foreign,
    /// A field has a value that no device could have saved.
    #[error("saved {field} has the impossible value {value:#x}")]
    Impossible {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A saved queue is not one that a driver could have set up.
    #[error("saved queue {queue}")]
    Queue {
        /// Index of the queue.
        queue: u16,
        /// What is wrong with it.
        #[source]
        source: DeviceError,
    },
    /// The device could not take its state up.
    #[error("cannot start the restored device")]
    Device(#[source] DeviceError),
}

/// Device-specific part of a saved virtio device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// Of a [`block::Block`].
    Block(block::BlockState),
    /// Of a [`vsock::Vsock`].
    Vsock(vsock::VsockState),
    /// Of a [`rng::Rng`].
    Rng(rng::RngState),
    /// Of a [`net::Net`].
    Net(net::NetState),
}

/// A device model behind a transport. All calls come under the transport's lock; those with a [`DeviceIo`] from the I/O thread or,
/// in [`kick_all`](mmio::MmioDevice::kick_all), while that thread is parked.
///
/// When a call returns, nothing is in flight: each chain taken with [`DeviceIo::pop`] was given back with
/// [`DeviceIo::complete`] or [`DeviceIo::unpop`].
pub trait VirtioDevice: Send {
    /// Device type, virtio 1.2 §5.
    fn device_type(&self) -> u32;

    /// Device-specific feature bits that are offered. The transport adds its own.
    fn features(&self) -> u64;

    /// Largest size of each queue, a power of two; fixes the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// The device-specific configuration space, little endian. Reads beyond it answer zero.
    fn config(&self) -> Vec<u8>;

    /// The driver has set DRIVER_OK with the device-specific bits of `features`. Queues are valid from now on.
    fn activate(&mut self, features: u64) -> Result<(), DeviceError>;

    /// Back to the state before [`activate`](Self::activate): the driver reset the device, gave up, or broke the protocol. Idempotent.
    fn reset(&mut self);

    /// Handles what is available in `queue`, at most a bounded amount of it: a device that stops early calls
    /// [`DeviceIo::reschedule`]. Called for a notification, which may be spurious.
    fn process_queue(&mut self, queue: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError>;

    /// A descriptor that polls readable while the device has work that does not come from the guest. Fixed for the device's life.
    fn host_events(&self) -> Option<RawFd> {
        None
    }

    /// Handles a bounded amount of host work. Called only between `activate` and `reset`, so an inactive device must keep its
    /// [`host_events`](Self::host_events) quiet.
    fn process_host_events(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        let _ = io;
        Ok(())
    }

    /// The state for a snapshot. Nothing is in flight.
    fn save(&self) -> DeviceState;

    /// Takes `state` up in a fresh device of the same configuration; [`activate`](Self::activate) follows if it was active.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError>;
}

/// A device's access to guest memory and queues during one call.
pub struct DeviceIo<'a> {
    memory: &'a GuestMemory,
    queues: &'a mut [VirtQueue],
    /// One bit per queue: an element was added to its used ring.
    used: u32,
    /// One bit per queue: more work remains.
    again: u32,
    completed: u64,
    config_changed: bool,
}

impl<'a> DeviceIo<'a> {
    fn new(memory: &'a GuestMemory, queues: &'a mut [VirtQueue]) -> Self {
        Self { memory, queues, used: 0, again: 0, completed: 0, config_changed: false }
    }

    /// Guest memory.
    pub fn memory(&self) -> &'a GuestMemory {
        self.memory
    }

    /// Takes the next available chain of `queue`; none when it is empty or was never set up.
    pub fn pop(&mut self, queue: usize) -> Result<Option<Chain>, DeviceError> {
        self.queues[queue].pop(self.memory)
    }

    /// Gives back the chain taken last from `queue`, untouched: the next [`pop`](Self::pop) answers it again. Once for each chain that was
    /// taken, the last one first.
    pub fn unpop(&mut self, queue: usize) {
        self.queues[queue].unpop();
    }

    /// Whether `queue` has a chain to [`pop`](Self::pop).
    pub fn has_available(&self, queue: usize) -> Result<bool, DeviceError> {
        self.queues[queue].has_available(self.memory)
    }

    /// The driver's available index of `queue`.
    pub fn available_index(&self, queue: usize) -> Result<u16, DeviceError> {
        self.queues[queue].available_index(self.memory)
    }

    /// Returns the chain that starts at descriptor `head` after `written` bytes of its writable buffers were filled. The interrupt
    /// comes once, when the device's call returns.
    pub fn complete(&mut self, queue: usize, head: u16, written: u32) -> Result<(), DeviceError> {
        self.queues[queue].complete(self.memory, head, written)?;
        self.used |= 1 << queue;
        self.completed += 1;
        Ok(())
    }

    /// Returns chains of `queue` that the driver must find together: none of them is in the used ring before all are.
    pub fn complete_together(&mut self, queue: usize, used: &[(u16, u32)]) -> Result<(), DeviceError> {
        self.queues[queue].complete_together(self.memory, used)?;
        self.used |= 1 << queue;
        self.completed += used.len() as u64;
        Ok(())
    }

    /// Tells the driver, when the device's call returns, that the configuration space has another content.
    pub fn config_changed(&mut self) {
        self.config_changed = true;
    }

    /// Asks for another call of [`VirtioDevice::process_queue`] after other devices had their turn.
    pub fn reschedule(&mut self, queue: usize) {
        self.again |= 1 << queue;
    }
}
