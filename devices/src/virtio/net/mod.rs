//! virtio-net, virtio 1.2 §5.1, on a tap.
//!
//! One pair of queues and the control queue. Frames go between the tap and the guest's buffers without a copy (`tap`), one system call
//! each. Received frames are spread over as many chains as they need (mergeable buffers). Checksums and the segmentation of TCP over IPv4
//! are left to whoever needs them; nothing is offered for IPv6, so a driver does not ask for it. What the guest says of a frame it sends is
//! checked before the host's kernel is told (`header`).
//!
//! | file | what |
//! | --- | --- |
//! | `header` | the header in front of a frame, and what of it is believed |
//! | `rate` | how much may pass in a time |
//! | `tap` | the tap: all of this device's `unsafe` |
//! | `watch` | what the event loop watches: tap and timer |
//! | `receive`, `transmit`, `control` | the three queues |
//! | `counters` | what passed, what did not |
//!
//! # Bounds
//!
//! A call moves at most 256 frames or 4 MiB each way, so that other devices get their turns. One frame at most waits here: one
//! that was taken from the tap and for which the guest has no buffers. It is dropped after a second, at a reset, and with this process:
//! a snapshot has no frames. Frames that wait longer wait in the tap's own queue, which the kernel bounds.
//!
//! # Without a link
//!
//! A device without a tap has its link down: what the guest sends is dropped and counted. A tap that disappears is given up; one that is down
//! loses frames, as a cable does. Neither ends anything but traffic.
//!
//! # Snapshots
//!
//! Addresses, routes and connections of the guest live in its memory; the device restores its queues, and sets the tap's offloads again, for
//! another process may have made it. The guest is then asked to announce itself (VIRTIO_NET_S_ANNOUNCE), so that the network
//! learns where it is now.

mod control;
pub mod counters;
mod header;
mod rate;
mod receive;
mod tap;
mod transmit;
mod watch;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net as b;

use self::control::Command;
pub use self::counters::NetCounters;
use self::header::Offloads;
use self::rate::Limiter;
pub use self::rate::RateLimit;
use self::receive::Waiting;
use self::tap::{ReceiveOffloads, Tap};
use self::watch::Watch;
use super::{DeviceError, DeviceIo, DeviceState, RestoreError, VirtioDevice};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];

/// Frames of one direction moved in one call.
const BATCH: usize = 256;
/// Bytes of one direction moved in one call.
const BATCH_BYTES: u64 = 4 << 20;
/// How long a frame waits for buffers of the guest.
const PATIENCE: Duration = Duration::from_secs(1);
/// A tap can fail every frame; only the first few are worth a line in the log.
const LOGGED_HOST_ERRORS: u32 = 8;

const fn bit(feature: u32) -> u64 {
    1 << feature
}

const FEATURES: u64 = bit(b::VIRTIO_NET_F_CSUM)
    | bit(b::VIRTIO_NET_F_GUEST_CSUM)
    | bit(b::VIRTIO_NET_F_MTU)
    | bit(b::VIRTIO_NET_F_MAC)
    | bit(b::VIRTIO_NET_F_GUEST_TSO4)
    | bit(b::VIRTIO_NET_F_HOST_TSO4)
    | bit(b::VIRTIO_NET_F_MRG_RXBUF)
    | bit(b::VIRTIO_NET_F_STATUS)
    | bit(b::VIRTIO_NET_F_CTRL_VQ)
    | bit(b::VIRTIO_NET_F_GUEST_ANNOUNCE);

/// Saved state of a [`Net`]. What the limits had left is not part of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// The guest's address.
    pub mac: [u8; 6],
    /// Largest packet, bytes.
    pub mtu: u16,
}

impl NetState {
    /// Version of this structure.
    pub const VERSION: u16 = 1;
}

/// What a [`Net`] is made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// The guest's address, which is no group's.
    pub mac: [u8; 6],
    /// Largest packet, bytes.
    pub mtu: u16,
    /// Limits of what the guest receives.
    pub to_guest: RateLimit,
    /// Limits of what the guest sends.
    pub from_guest: RateLimit,
}

/// The device.
pub struct Net {
    config: NetConfig,
    /// The link is up while there is one.
    tap: Option<Tap>,
    watch: Watch,
    clock: Box<dyn Fn() -> Instant + Send>,
    counters: Arc<NetCounters>,
    /// Negotiated; 0 while the device is not active.
    features: u64,
    active: bool,
    /// The tap does not know yet what was negotiated. Told with the first work, so that no vCPU thread does it.
    offloads_due: bool,
    /// The guest is asked to announce itself.
    announce: bool,
    /// The driver must be told to look at the configuration space.
    config_changed: bool,
    /// This device goes on where another one was.
    restored: bool,
    to_guest: Limiter,
    from_guest: Limiter,
    receiving: Waiting,
    transmitting: transmit::Waiting,
    /// Errors of the tap that were logged.
    host_errors: u32,
}

impl Net {
    /// A device on `tap`, a tap that is attached or a datagram socket whose other end takes frames with a header of 12 bytes; without one its link is down.
    pub fn new(config: NetConfig, tap: Option<OwnedFd>) -> io::Result<Self> {
        Self::with_clock(config, tap, Instant::now)
    }

    /// The same with a clock of the caller's.
    pub fn with_clock(
        config: NetConfig,
        tap: Option<OwnedFd>,
        clock: impl Fn() -> Instant + Send + 'static,
    ) -> io::Result<Self> {
        let tap = tap.map(Tap::new).transpose()?;
        let now = clock();
        Ok(Self {
            watch: Watch::new(tap.as_ref().map(AsRawFd::as_raw_fd))?,
            tap,
            clock: Box::new(clock),
            counters: Arc::default(),
            features: 0,
            active: false,
            offloads_due: false,
            announce: false,
            config_changed: false,
            restored: false,
            to_guest: Limiter::new(config.to_guest, now),
            from_guest: Limiter::new(config.from_guest, now),
            receiving: Waiting::default(),
            transmitting: transmit::Waiting::default(),
            host_errors: 0,
            config,
        })
    }

    /// What passed and what did not.
    pub fn counters(&self) -> Arc<NetCounters> {
        Arc::clone(&self.counters)
    }

    fn has(&self, feature: u32) -> bool {
        self.features & bit(feature) != 0
    }

    fn offloads(&self) -> Offloads {
        Offloads {
            checksum: self.has(b::VIRTIO_NET_F_CSUM),
            tso4: self.has(b::VIRTIO_NET_F_HOST_TSO4),
            mtu: self.config.mtu,
        }
    }

    fn status(&self) -> u16 {
        let up = if self.tap.is_some() { b::VIRTIO_NET_S_LINK_UP } else { 0 };
        let announce = if self.announce { b::VIRTIO_NET_S_ANNOUNCE } else { 0 };
        (up | announce) as u16
    }

    /// All that the queues, the tap and the limits allow now; `work` is what there may be to do.
    fn pump(
        &mut self,
        io: &mut DeviceIo<'_>,
        work: impl FnOnce(&mut Self, &mut DeviceIo<'_>, Instant) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let now = (self.clock)();
        if std::mem::take(&mut self.offloads_due) {
            self.set_offloads();
        }
        let worked = work(self, io, now);
        if std::mem::take(&mut self.config_changed) {
            io.config_changed();
        }
        worked?;
        self.rewatch(now).map_err(|source| DeviceError::Host { operation: "watching the tap", source })
    }

    fn set_offloads(&mut self) {
        let offloads = ReceiveOffloads {
            checksum: self.has(b::VIRTIO_NET_F_GUEST_CSUM),
            tso4: self.has(b::VIRTIO_NET_F_GUEST_TSO4),
        };
        if let Some(Err(error)) = self.tap.as_ref().map(|tap| tap.set_offloads(offloads)) {
            tracing::warn!(error = &error as &dyn std::error::Error, "the tap does not take its offloads");
            self.give_tap_up();
        }
    }

    /// From now on the link is down.
    fn give_tap_up(&mut self) {
        self.watch.forget_tap();
        if self.tap.take().is_some() {
            tracing::warn!("the tap is gone: the guest's link is down");
            self.announce = false;
            self.config_changed = true;
        }
    }

    /// A frame was lost to an error of the host.
    fn note_host_error(&mut self, operation: &'static str, error: &io::Error) {
        if self.host_errors < LOGGED_HOST_ERRORS {
            self.host_errors += 1;
            tracing::warn!(operation, error = error as &dyn std::error::Error, "a frame was lost");
        }
    }

    /// Brings tap and timer up to date with what is waited for.
    fn rewatch(&mut self, now: Instant) -> io::Result<()> {
        let frames = self.active && self.receiving.wants_frames();
        let room = self.active && self.transmitting.for_room();
        let wake = self.receiving.until().into_iter().chain(self.transmitting.until()).min();
        self.watch.set(frames, room, wake.filter(|_| self.active), now)
    }

    fn carry_out(&mut self, command: Command) -> bool {
        match command {
            Command::Announced if self.has(b::VIRTIO_NET_F_GUEST_ANNOUNCE) => {
                self.announce = false;
                true
            }
            Command::Announced | Command::Unknown => false,
        }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Vec<u8> {
        let mut config = Vec::with_capacity(12);
        config.extend(self.config.mac);
        config.extend(self.status().to_le_bytes());
        config.extend([0; 2]); // number of queue pairs, not offered
        config.extend(self.config.mtu.to_le_bytes());
        config
    }

    fn activate(&mut self, features: u64) -> Result<(), DeviceError> {
        self.features = features;
        self.active = true;
        self.offloads_due = true;
        if std::mem::take(&mut self.restored) {
            self.announce = self.tap.is_some() && self.has(b::VIRTIO_NET_F_GUEST_ANNOUNCE);
            // Also without the feature: the link may have changed.
            self.config_changed = true;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.features = 0;
        self.active = false;
        self.offloads_due = false;
        self.announce = false;
        self.config_changed = false;
        if self.receiving.forget() {
            self.counters.to_guest.lost();
        }
        self.transmitting = transmit::Waiting::default();
        if let Err(error) = self.rewatch((self.clock)()) {
            tracing::warn!(error = &error as &dyn std::error::Error, "network device reset");
        }
    }

    fn process_queue(&mut self, queue: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        self.pump(io, |net, io, now| match queue {
            RECEIVE => {
                net.receiving.buffers_may_have_come();
                net.pump_receive(io, now)
            }
            TRANSMIT => net.pump_transmit(io, now),
            _ => control::serve(io, |command| net.carry_out(command)),
        })
    }

    fn host_events(&self) -> Option<RawFd> {
        Some(self.watch.fd())
    }

    fn process_host_events(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        self.pump(io, |net, io, now| {
            let happened =
                net.watch.poll().map_err(|source| DeviceError::Host { operation: "polling the tap", source })?;
            if happened.writable {
                net.transmitting.room_has_come();
            }
            net.pump_receive(io, now)?;
            net.pump_transmit(io, now)?;
            if happened.gone {
                net.give_tap_up();
            }
            Ok(())
        })
    }

    fn save(&self) -> DeviceState {
        DeviceState::Net(NetState { mac: self.config.mac, mtu: self.config.mtu })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Net(NetState { mac, mtu }) = *state else {
            return Err(RestoreError::Foreign);
        };
        if mtu != self.config.mtu {
            let (saved, actual) = (mtu.into(), self.config.mtu.into());
            return Err(RestoreError::Mismatch { field: "MTU", saved, actual });
        }
        if mac != self.config.mac {
            let number = |mac: [u8; 6]| mac.iter().fold(0, |number, &byte| number << 8 | u64::from(byte));
            let (saved, actual) = (number(mac), number(self.config.mac));
            return Err(RestoreError::Mismatch { field: "hardware address", saved, actual });
        }
        self.restored = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
