//! virtio-rng, virtio 1.2 §5.4: each buffer is filled with random bytes of the host's kernel.
//!
//! The device is pull only and has no state: a restored guest asks anew, and the host never answers the same bytes twice.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::{DeviceError, DeviceIo, DeviceState, RestoreError, VirtioDevice};

/// Most bytes given for one buffer; the used length says how many.
pub const REQUEST_BYTES: u64 = 64 * 1024;

const QUEUE_SIZES: [u16; 1] = [64];
/// Bytes given in one call, so that a guest that asks for ever does not keep other devices waiting.
const CALL_BYTES: u64 = 256 * 1024;
const CHUNK: usize = 4096;

/// Saved state of an [`Rng`]: nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {}

impl RngState {
    /// Version of this structure.
    pub const VERSION: u16 = 1;
}

/// The device.
#[derive(Debug, Default)]
pub struct Rng {}

impl Rng {
    /// An entropy device.
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&mut self, _features: u64) -> Result<(), DeviceError> {
        Ok(())
    }

    fn reset(&mut self) {}

    fn process_queue(&mut self, queue: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        let mut given = 0;
        while let Some(mut chain) = io.pop(queue)? {
            if chain.readable.remaining() != 0 || chain.writable.remaining() == 0 {
                return Err(DeviceError::Malformed(
                    "an entropy buffer must be writable and not empty",
                ));
            }
            let len = chain.writable.remaining().min(REQUEST_BYTES);
            let mut chunk = [0; CHUNK];
            let mut left = len as usize;
            while left > 0 {
                let part = &mut chunk[..left.min(CHUNK)];
                fill_random(part)?;
                chain.writable.write(io.memory(), part)?;
                left -= part.len();
            }
            io.complete(queue, chain.head, len as u32)?;
            given += len;
            if given >= CALL_BYTES && io.has_available(queue)? {
                io.reschedule(queue);
                break;
            }
        }
        Ok(())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Rng(RngState {})
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Rng(RngState {}) => Ok(()),
            DeviceState::Block(_) | DeviceState::Vsock(_) => Err(RestoreError::Foreign),
        }
    }
}

fn fill_random(mut out: &mut [u8]) -> Result<(), DeviceError> {
    while !out.is_empty() {
        match rustix::rand::getrandom(&mut *out, rustix::rand::GetRandomFlags::empty()) {
            Ok(filled) => out = &mut out[filled..],
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                return Err(DeviceError::Host {
                    operation: "getrandom",
                    source: error.into(),
                });
            }
        }
    }
    Ok(())
}
