//! The interrupt of a virtio-mmio device: a status register that vCPUs acknowledge, and an irqfd that the I/O thread signals.

use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_mmio as reg;
use vmm_sys_util::eventfd::EventFd;

/// A buffer was used.
pub(super) const USED_BUFFER: u32 = reg::VIRTIO_MMIO_INT_VRING;
/// The configuration changed, or the device needs a reset.
pub(super) const CONFIG_CHANGE: u32 = reg::VIRTIO_MMIO_INT_CONFIG;

/// The interrupt of one device: its status register and its irqfd.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    irq: EventFd,
}

impl Interrupt {
    pub(super) fn new(irq: EventFd) -> Self {
        Self { status: AtomicU32::new(0), irq }
    }

    /// The InterruptStatus register.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// A write of `bits` to the InterruptACK register.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// The status bit first: a handler that runs between the two must see it, and one that runs after finds the used ring filled.
    pub(super) fn raise(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::SeqCst);
        if let Err(error) = self.irq.write(1) {
            tracing::warn!(%error, "cannot raise a virtio interrupt");
        }
    }

    /// The InterruptStatus register of a saved device; nothing is raised.
    pub(super) fn restore(&self, status: u32) {
        self.status.store(status, Ordering::SeqCst);
    }
}
