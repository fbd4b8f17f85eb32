//! virtio-vsock, virtio 1.2 §5.10: the host's side of a guest's stream sockets, on unix sockets.
//!
//! - A host client connects to the device's listener and writes `CONNECT <port>\n`. When the guest accepts on that port, the client
//!   reads `OK <host port>\n`; from then on bytes flow. When the guest refuses, or does not answer in time, the socket is closed.
//! - A guest that connects to port P of the host (CID 2) reaches the unix socket `<path>_<P>`, or is reset if nobody listens there.
//!
//! Everything runs in the transport's calls: guest packets when a queue is notified, host sockets when their epoll is readable.
//!
//! # Bounds
//!
//! A guest that asks for connections faster than [`VsockConfig::connects_per_second`] is refused without a look at the host's sockets. At most
//! [`VsockConfig::max_connections`] sockets, each with at most 128 KiB that wait for the host; towards the guest nothing waits
//! but at most one reset per packet received or connection. The transmit queue is not read while 256 resets wait for a
//! receive buffer, as virtio 1.2 §5.10.6.1.2 allows. Clients beyond the bound wait in the listener's backlog.
//!
//! # Snapshots
//!
//! A connection does not survive into another process: its host end is a socket of the old one. The restored device queues a
//! transport-reset event, which makes the guest's driver drop its connections, and holds packets for the guest back until the driver
//! has taken that event: a connection made sooner would be dropped with the old ones. In a VM that is paused and resumed in the same
//! process, connections go on.

mod connection;
mod greeting;
mod mux;
mod packet;
mod sockets;

use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use self::connection::WINDOW_BYTES;
use self::mux::{HOST_PORTS, Mux};
use self::packet::{HEADER_BYTES, Header};
use super::{DeviceError, DeviceIo, DeviceState, RestoreError, VirtioDevice};

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];

/// Feature bit: stream sockets.
const F_STREAM: u64 = 1 << 0;
/// Payload of the event that tells the driver to drop its connections (VIRTIO_VSOCK_EVENT_TRANSPORT_RESET).
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// Packets of one direction handled in one call.
const BATCH: usize = 256;
/// Largest payload sent to the guest in one packet, bytes.
const PACKET_BYTES: usize = 64 * 1024;
/// How long packets are held back for a driver that does not take its transport-reset event. Less than the time a client waits.
const RESET_HOLD: Duration = Duration::from_secs(3);

/// Saved state of a [`Vsock`]. Connections are not part of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// Context id of the guest.
    pub guest_cid: u32,
    /// The host port that the next host-initiated connection gets: not one that the guest may remember.
    pub next_host_port: u32,
}

impl VsockState {
    /// Version of this structure.
    pub const VERSION: u16 = 1;
}

/// What a [`Vsock`] is made with.
#[derive(Clone, Debug)]
pub struct VsockConfig {
    /// Context id of the guest, 3 or more.
    pub guest_cid: u32,
    /// A guest's connection to port P of the host goes to the unix socket at this path followed by `_P`; without it they are refused.
    pub services: Option<PathBuf>,
    /// Connections at one time, the ones being set up included.
    pub max_connections: usize,
    /// How long a connection may take to be set up.
    pub connect_timeout: Duration,
    /// Connections to the host that the guest may ask for a second, and as many at once; more are refused.
    pub connects_per_second: u64,
}

impl VsockConfig {
    /// The defaults: 256 connections, 5 s, 500 a second.
    pub fn new(guest_cid: u32) -> Self {
        Self {
            guest_cid,
            services: None,
            max_connections: 256,
            connect_timeout: Duration::from_secs(5),
            connects_per_second: 500,
        }
    }
}

/// Where the transport-reset event of a restored device is.
#[derive(Clone, Copy, Debug)]
enum TransportReset {
    /// Not needed, or taken by the driver.
    Done,
    /// Waits for a buffer. Packets are held back until the time given; it starts with the first call after the restore.
    Owed { hold_until: Option<Instant> },
    /// In the driver's buffer; its available index changes when the driver has handled it and gives the buffer back.
    Sent { available: u16, hold_until: Instant },
}

/// The device.
pub struct Vsock {
    mux: Mux,
    transport_reset: TransportReset,
    buffer: Box<[u8]>,
}

impl Vsock {
    /// A device whose host clients connect to `listener`.
    pub fn new(config: VsockConfig, listener: UnixListener) -> io::Result<Self> {
        Ok(Self {
            mux: Mux::new(config, listener)?,
            transport_reset: TransportReset::Done,
            // A packet of the guest fills its window at most.
            buffer: vec![0; WINDOW_BYTES as usize].into_boxed_slice(),
        })
    }

    /// All that the queues allow now. Every entry point ends here, since each queue's progress may be what another waits for.
    fn pump(&mut self, io: &mut DeviceIo<'_>, now: Instant) -> Result<(), DeviceError> {
        self.pump_events(io, now)?;
        self.pump_transmit(io, now)?;
        self.pump_receive(io, now)?;
        // Room for replies may have come only now.
        if !self.mux.is_choked() && io.has_available(TX)? {
            io.reschedule(TX);
        }
        self.watch(now)
    }

    /// Sends the transport-reset event and notices when the driver has handled it.
    fn pump_events(&mut self, io: &mut DeviceIo<'_>, now: Instant) -> Result<(), DeviceError> {
        match self.transport_reset {
            TransportReset::Done => {}
            TransportReset::Owed { hold_until } => {
                let hold_until = hold_until.unwrap_or(now + RESET_HOLD);
                self.transport_reset = TransportReset::Owed { hold_until: Some(hold_until) };
                if let Some(mut chain) = io.pop(EVENT)? {
                    chain.writable.write(io.memory(), &TRANSPORT_RESET)?;
                    io.complete(EVENT, chain.head, TRANSPORT_RESET.len() as u32)?;
                    self.transport_reset = TransportReset::Sent { available: io.available_index(EVENT)?, hold_until };
                }
            }
            TransportReset::Sent { available, hold_until } => {
                if now >= hold_until || io.available_index(EVENT)? != available {
                    self.transport_reset = TransportReset::Done;
                }
            }
        }
        Ok(())
    }

    fn packets_held(&self, now: Instant) -> bool {
        match self.transport_reset {
            TransportReset::Done => false,
            TransportReset::Owed { hold_until } => hold_until.is_none_or(|until| now < until),
            TransportReset::Sent { .. } => true,
        }
    }

    /// Takes packets of the guest.
    fn pump_transmit(&mut self, io: &mut DeviceIo<'_>, now: Instant) -> Result<(), DeviceError> {
        for _ in 0..BATCH {
            if self.mux.is_choked() {
                return Ok(());
            }
            let Some(mut chain) = io.pop(TX)? else {
                return Ok(());
            };
            let mut header = [0; HEADER_BYTES];
            chain.readable.read(io.memory(), &mut header)?;
            let header = Header::decode(&header);
            let len = header.len as usize;
            if u64::from(header.len) > chain.readable.remaining() {
                return Err(DeviceError::TooShort {
                    direction: "readable",
                    have: chain.readable.remaining(),
                    need: header.len.into(),
                });
            }
            // A payload beyond the window breaks the connection, not the device.
            let payload = if len <= self.buffer.len() {
                chain.readable.read(io.memory(), &mut self.buffer[..len])?;
                Some(&self.buffer[..len])
            } else {
                None
            };
            self.mux.receive(&header, payload, now);
            io.complete(TX, chain.head, 0)?;
        }
        if io.has_available(TX)? {
            io.reschedule(TX);
        }
        Ok(())
    }

    /// Fills receive buffers of the guest.
    fn pump_receive(&mut self, io: &mut DeviceIo<'_>, now: Instant) -> Result<(), DeviceError> {
        if self.packets_held(now) {
            return Ok(());
        }
        for _ in 0..BATCH {
            if !self.mux.may_have_packet() {
                return Ok(());
            }
            // None: what there is to send waits where it is, the bytes in their sockets.
            let Some(mut chain) = io.pop(RX)? else {
                return Ok(());
            };
            let have = chain.writable.remaining();
            // Room for a header, and for progress.
            let need = HEADER_BYTES as u64 + 1;
            if have < need {
                return Err(DeviceError::TooShort { direction: "writable", have, need });
            }
            let room = PACKET_BYTES.min(have as usize - HEADER_BYTES);
            let Some(header) = self.mux.next_packet(room, &mut self.buffer, now) else {
                io.unpop(RX);
                return Ok(());
            };
            chain.writable.write(io.memory(), &header.encode())?;
            chain.writable.write(io.memory(), &self.buffer[..header.len as usize])?;
            io.complete(RX, chain.head, HEADER_BYTES as u32 + header.len)?;
        }
        if self.mux.may_have_packet() {
            io.reschedule(RX);
        }
        Ok(())
    }

    fn watch(&mut self, now: Instant) -> Result<(), DeviceError> {
        let deadline = match self.transport_reset {
            TransportReset::Owed { hold_until: Some(until) } | TransportReset::Sent { hold_until: until, .. } => {
                Some(until).filter(|&until| now < until)
            }
            TransportReset::Owed { hold_until: None } | TransportReset::Done => None,
        };
        self.mux
            .watch(deadline, now)
            .map_err(|source| DeviceError::Host { operation: "watching vsock sockets", source })
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Vec<u8> {
        u64::from(self.mux.config.guest_cid).to_le_bytes().to_vec()
    }

    fn activate(&mut self, _features: u64) -> Result<(), DeviceError> {
        self.mux.activate();
        self.watch(Instant::now())
    }

    fn reset(&mut self) {
        self.mux.reset();
        self.transport_reset = TransportReset::Done;
        if let Err(error) = self.watch(Instant::now()) {
            tracing::warn!(error = &error as &dyn std::error::Error, "vsock reset");
        }
    }

    fn process_queue(&mut self, _queue: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        self.pump(io, Instant::now())
    }

    fn host_events(&self) -> Option<RawFd> {
        Some(self.mux.fd())
    }

    fn process_host_events(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        let now = Instant::now();
        self.mux.host_events(now);
        self.pump(io, now)
    }

    fn save(&self) -> DeviceState {
        DeviceState::Vsock(VsockState { guest_cid: self.mux.config.guest_cid, next_host_port: self.mux.next_host_port })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Vsock(VsockState { guest_cid, next_host_port }) = *state else {
            return Err(RestoreError::Foreign);
        };
        if guest_cid != self.mux.config.guest_cid {
            let (saved, actual) = (guest_cid.into(), self.mux.config.guest_cid.into());
            return Err(RestoreError::Mismatch { field: "guest CID", saved, actual });
        }
        if !HOST_PORTS.contains(&next_host_port) {
            return Err(RestoreError::Impossible { field: "next host port", value: next_host_port.into() });
        }
        self.mux.next_host_port = next_host_port;
        self.transport_reset = TransportReset::Owed { hold_until: None };
        Ok(())
    }
}

#[cfg(test)]
mod tests;
