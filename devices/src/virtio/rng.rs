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
/// Buffers filled in one call: they may be of one byte each.
const CALL_BUFFERS: u32 = 64;
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
        let (mut given, mut filled) = (0, 0);
        while let Some(mut chain) = io.pop(queue)? {
            if chain.readable.remaining() != 0 || chain.writable.remaining() == 0 {
                return Err(DeviceError::Malformed("an entropy buffer must be writable and not empty"));
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
            filled += 1;
            if (given >= CALL_BYTES || filled >= CALL_BUFFERS) && io.has_available(queue)? {
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
            DeviceState::Block(_) | DeviceState::Vsock(_) | DeviceState::Net(_) => Err(RestoreError::Foreign),
        }
    }
}

fn fill_random(mut out: &mut [u8]) -> Result<(), DeviceError> {
    while !out.is_empty() {
        match rustix::rand::getrandom(&mut *out, rustix::rand::GetRandomFlags::empty()) {
            Ok(filled) => out = &mut out[filled..],
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                return Err(DeviceError::Host { operation: "getrandom", source: error.into() });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::driver::{ARENA, Driver, readable, writable};
    use super::*;

    #[test]
    fn buffers_are_filled_up_to_the_cap_and_their_pages_marked() {
        let mut driver = Driver::new(Rng::new());
        driver.start(16, 0);
        driver.clear_dirty();
        driver.add(0, &[writable(ARENA, 100)]);
        driver.add(0, &[writable(ARENA + 0x1_0000, 0x8000), writable(ARENA + 0x2_0000, 0x10_0000)]);
        driver.notify(0);
        driver.run(0);
        assert_eq!(driver.take_used(0).unwrap().1, 100);
        assert_eq!(driver.take_used(0).unwrap().1, 64 * 1024);
        assert_eq!(driver.take_interrupt(), 1);
        assert!(driver.get(ARENA, 100).iter().any(|&byte| byte != 0));
        assert!(driver.get(ARENA + 100, 100).iter().all(|&byte| byte == 0));
        assert!(driver.is_dirty(ARENA) && driver.is_dirty(ARENA + 0x2_0000) && !driver.is_dirty(ARENA + 0x3_0000));
    }

    #[test]
    fn many_requests_take_several_turns_and_all_are_served() {
        let mut driver = Driver::new(Rng::new());
        driver.start(64, 0);
        for _ in 0..64 {
            driver.add(0, &[writable(ARENA, 65536)]);
        }
        driver.notify(0);
        driver.turn(0);
        assert_eq!(driver.used_index(0), 4, "one turn is bounded");
        driver.run(0);
        assert_eq!(driver.used_index(0), 64);
    }

    #[test]
    fn empty_and_readable_buffers_break_the_device_until_a_reset() {
        for buffers in
            [[readable(ARENA, 8)].as_slice(), &[writable(ARENA, 0)], &[readable(ARENA, 8), writable(ARENA, 8)]]
        {
            let mut driver = Driver::new(Rng::new());
            driver.start(16, 0);
            driver.add(0, buffers);
            driver.notify(0);
            driver.run(0);
            assert!(driver.needs_reset());
            assert_eq!(driver.take_interrupt(), 2, "a configuration change");
            driver.start(16, 0);
            driver.add(0, &[writable(ARENA, 8)]);
            driver.notify(0);
            driver.run(0);
            assert_eq!(driver.take_used(0).unwrap().1, 8);
        }
    }
}
