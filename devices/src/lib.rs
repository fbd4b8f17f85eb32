//! Device models: serial, i8042, exit counter, VM generation id, and virtio block, vsock and rng behind a virtio-mmio transport.
//!
//! This crate knows no KVM, no store and no snapshot format. The VMM maps each device at its ports or addresses, turns exits into
//! `read` and `write` calls, registers [`queue_events`](virtio::mmio::MmioDevice::queue_events) as ioeventfds and every interrupt
//! [`EventFd`](vmm_sys_util::eventfd::EventFd) as an edge-triggered irqfd.
//!
//! # Threads
//!
//! Port devices are called from vCPU threads, under a lock of the VMM. A virtio device lives in an
//! `Arc<Mutex<`[`MmioDevice`](virtio::mmio::MmioDevice)`>>`: vCPU threads use its registers, and one I/O thread of the VMM, which
//! drives an [`event_manager::EventManager`], does all its work. No device starts a thread.
//!
//! # Quiescence
//!
//! All work, block I/O included, is synchronous inside one event handler, under the device's lock. So whoever has parked the I/O loop
//! between two events, or holds the lock, sees a device with nothing in flight: every descriptor chain that was taken from an
//! available ring has been returned in the used ring, and no write to guest memory or disk is pending. Save then. An event that was
//! signalled but not handled is not saved: [`kick_all`](virtio::mmio::MmioDevice::kick_all) on resume looks at every queue.
//!
//! # Dirty pages
//!
//! Devices write guest memory only through `vm-memory`'s `Bytes` methods, which mark [`GuestMemory`]'s bitmap after the bytes are
//! there. The VMM harvests that bitmap beside KVM's dirty log.
//!
//! # Saved state
//!
//! Each device has a `*State` of explicit fields, its `VERSION`, `save` and `restore`. A state is untrusted input: `restore` answers
//! an error, never panics, and gives a hostile guest nothing that it could not also reach through the device's registers.

pub mod exit_counter;
pub mod i8042;
pub mod overlay;
pub mod serial;
pub mod token_bucket;
pub mod virtio;
pub mod vmgenid;

/// Guest memory with the bitmap that records which pages devices wrote.
pub type GuestMemory = vm_memory::GuestMemoryMmap<vm_memory::bitmap::AtomicBitmap>;
