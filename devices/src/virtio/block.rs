//! virtio-blk, virtio 1.2 §5.2, on an [`Overlay`].
//!
//! One queue. A request is served, start to end, when it is taken: its data goes through a bounded buffer between the host's file and
//! guest memory, so guest memory is only touched through vm-memory and its pages are marked. A request that the disk cannot serve is
//! answered VIRTIO_BLK_S_IOERR; only one that has no header or no room for a status byte breaks the device.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk as b;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::Bytes;

use super::chain::{Buffers, Chain};
use super::{DeviceError, DeviceIo, DeviceState, RestoreError, VirtioDevice};
use crate::GuestMemory;
use crate::overlay::{BLOCK_BYTES, Overlay, OverlayError};

/// Unit of sector numbers, bytes, and the logical block size.
pub const SECTOR_BYTES: u64 = 512;

const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: [u16; 1] = [QUEUE_SIZE];
/// A request also has a header and a status descriptor.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
const SEGMENT_BYTES: u32 = 64 * 1024;
/// Largest data part of a read or write, bytes: what the two limits above allow.
const REQUEST_BYTES: u64 = SEGMENTS as u64 * SEGMENT_BYTES as u64;
/// Data moved in one call before other devices get their turn, bytes.
const CALL_BYTES: u64 = 4 << 20;
/// Requests served in one call: flushes and empty transfers move nothing, and a guest can make them as fast as they are served.
const CALL_REQUESTS: u32 = 64;
const BUFFER_BYTES: usize = 256 * 1024;
/// Sectors of one discard or write-zeroes segment: 1 GiB.
const ZERO_SECTORS: u32 = 1 << 21;
/// Segments of one discard or write-zeroes request.
const ZERO_SEGMENTS: u32 = 16;
/// A full disk fails every write of the guest; only the first few are worth a line in the log.
const LOGGED_HOST_ERRORS: u32 = 8;
const HEADER_BYTES: usize = 16;
const ZERO_SEGMENT_BYTES: usize = 16;
/// Length of the answer to VIRTIO_BLK_T_GET_ID, bytes.
pub const ID_BYTES: usize = 20;

const DISCARD: u64 = 1 << b::VIRTIO_BLK_F_DISCARD;
const WRITE_ZEROES: u64 = 1 << b::VIRTIO_BLK_F_WRITE_ZEROES;

/// Saved state of a [`Block`]. The disk's content is the snapshot's own matter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Size of the disk, sectors.
    pub sectors: u64,
    /// Writes are refused.
    pub read_only: bool,
}

impl BlockState {
    /// Version of this structure.
    pub const VERSION: u16 = 1;
}

/// The device.
pub struct Block {
    disk: Arc<Overlay>,
    id: [u8; ID_BYTES],
    /// Negotiated, while active.
    features: u64,
    buffer: Box<[u8]>,
    /// Errors of the host's file system that were logged.
    host_errors: u32,
}

/// Why a request was answered with an error status.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("not supported")]
    Unsupported,
    #[error("{0}")]
    Invalid(&'static str),
    #[error(transparent)]
    Disk(#[from] OverlayError),
    /// No answer: the device breaks.
    #[error(transparent)]
    Fault(#[from] DeviceError),
}

impl Block {
    /// A block device on `disk`, read-only if the disk is. `id` is its serial number, zero padded.
    pub fn new(disk: Arc<Overlay>, id: [u8; ID_BYTES]) -> Self {
        Self { disk, id, features: 0, buffer: vec![0; BUFFER_BYTES].into_boxed_slice(), host_errors: 0 }
    }

    fn sectors(&self) -> u64 {
        self.disk.size() / SECTOR_BYTES
    }

    /// Serves one request; answers the bytes written to its buffers and those of data moved.
    fn serve(&mut self, memory: &GuestMemory, chain: &mut Chain) -> Result<(u32, u64), DeviceError> {
        let mut header = [0; HEADER_BYTES];
        chain.readable.read(memory, &mut header)?;
        let status_at = chain.writable.split_last_byte().ok_or(DeviceError::TooShort {
            direction: "writable",
            have: 0,
            need: 1,
        })?;
        let writable = chain.writable.remaining();
        let readable = chain.readable.remaining();
        let kind = u32::from_le_bytes(field(&header, 0));
        let sector = u64::from_le_bytes(field(&header, 8));
        let result = match kind {
            b::VIRTIO_BLK_T_IN => self.read(memory, sector, &mut chain.writable),
            b::VIRTIO_BLK_T_OUT => self.write(memory, sector, &mut chain.readable),
            b::VIRTIO_BLK_T_FLUSH => self.disk.flush().map_err(Refusal::from),
            b::VIRTIO_BLK_T_GET_ID => self.identify(memory, &mut chain.writable),
            b::VIRTIO_BLK_T_DISCARD if self.features & DISCARD != 0 => self.zero(memory, &mut chain.readable, 0),
            b::VIRTIO_BLK_T_WRITE_ZEROES if self.features & WRITE_ZEROES != 0 => {
                self.zero(memory, &mut chain.readable, 1)
            }
            _ => Err(Refusal::Unsupported),
        };
        let status = match result {
            Ok(()) => b::VIRTIO_BLK_S_OK,
            Err(Refusal::Fault(fault)) => return Err(fault),
            Err(Refusal::Unsupported) => b::VIRTIO_BLK_S_UNSUPP,
            Err(Refusal::Disk(error @ OverlayError::Io { .. })) if self.host_errors < LOGGED_HOST_ERRORS => {
                self.host_errors += 1;
                tracing::warn!(kind, sector, error = &error as &dyn std::error::Error, "block request failed");
                b::VIRTIO_BLK_S_IOERR
            }
            Err(refusal @ (Refusal::Invalid(_) | Refusal::Disk(_))) => {
                tracing::debug!(kind, sector, error = &refusal as &dyn std::error::Error, "block request failed");
                b::VIRTIO_BLK_S_IOERR
            }
        };
        memory.write_obj(status as u8, status_at).map_err(DeviceError::Memory)?;
        // Up to and including the status byte, which is the last: a driver may rely on no byte beyond the used length.
        Ok((writable as u32 + 1, writable.max(readable)))
    }

    /// First byte of a transfer, if it is one that the disk can serve.
    fn transfer(sector: u64, len: u64) -> Result<u64, Refusal> {
        if !len.is_multiple_of(SECTOR_BYTES) {
            return Err(Refusal::Invalid("a transfer of no whole number of sectors"));
        }
        if len > REQUEST_BYTES {
            return Err(Refusal::Invalid("a transfer beyond the announced limits"));
        }
        sector.checked_mul(SECTOR_BYTES).ok_or(Refusal::Invalid("a sector number that overflows"))
    }

    fn read(&mut self, memory: &GuestMemory, sector: u64, out: &mut Buffers) -> Result<(), Refusal> {
        let mut offset = Self::transfer(sector, out.remaining())?;
        // All or nothing where the end of the disk is concerned.
        check_end(&self.disk, offset, out.remaining())?;
        while out.remaining() > 0 {
            let len = out.remaining().min(BUFFER_BYTES as u64);
            let part = &mut self.buffer[..len as usize];
            self.disk.read_at(offset, part)?;
            out.write(memory, part)?;
            offset += len;
        }
        Ok(())
    }

    fn write(&mut self, memory: &GuestMemory, sector: u64, data: &mut Buffers) -> Result<(), Refusal> {
        let mut offset = Self::transfer(sector, data.remaining())?;
        check_end(&self.disk, offset, data.remaining())?;
        if self.disk.is_read_only() {
            return Err(OverlayError::ReadOnly.into());
        }
        while data.remaining() > 0 {
            let len = data.remaining().min(BUFFER_BYTES as u64);
            let part = &mut self.buffer[..len as usize];
            data.read(memory, part)?;
            self.disk.write_at(offset, part)?;
            offset += len;
        }
        Ok(())
    }

    fn identify(&self, memory: &GuestMemory, out: &mut Buffers) -> Result<(), Refusal> {
        let len = out.remaining().min(ID_BYTES as u64) as usize;
        Ok(out.write(memory, &self.id[..len])?)
    }

    /// Discard and write-zeroes: both make their sectors read as zero, which is one of the outcomes that a discard may have.
    fn zero(&self, memory: &GuestMemory, segments: &mut Buffers, allowed_flags: u32) -> Result<(), Refusal> {
        if self.disk.is_read_only() {
            return Err(OverlayError::ReadOnly.into());
        }
        let bytes = segments.remaining();
        if bytes == 0 || !bytes.is_multiple_of(ZERO_SEGMENT_BYTES as u64) {
            return Err(Refusal::Invalid("no whole number of discard segments"));
        }
        if bytes / ZERO_SEGMENT_BYTES as u64 > u64::from(ZERO_SEGMENTS) {
            return Err(Refusal::Invalid("too many discard segments"));
        }
        while segments.remaining() > 0 {
            let mut segment = [0; ZERO_SEGMENT_BYTES];
            segments.read(memory, &mut segment)?;
            let sector = u64::from_le_bytes(field(&segment, 0));
            let [count, flags] = [8, 12].map(|at| u32::from_le_bytes(field(&segment, at)));
            // virtio 1.2 §5.2.6.2: reserved bits, and unmap for a discard, are answered "unsupported".
            if flags & !allowed_flags != 0 {
                return Err(Refusal::Unsupported);
            }
            if count > ZERO_SECTORS {
                return Err(Refusal::Invalid("a discard beyond the announced limits"));
            }
            let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Refusal::Invalid("a sector number that overflows"))?;
            self.disk.zero_at(offset, u64::from(count) * SECTOR_BYTES)?;
        }
        Ok(())
    }
}

fn check_end(disk: &Overlay, offset: u64, len: u64) -> Result<(), OverlayError> {
    match offset.checked_add(len) {
        Some(end) if end <= disk.size() => Ok(()),
        _ => Err(OverlayError::OutOfRange { offset, len, size: disk.size() }),
    }
}

/// `N` bytes of `bytes` from `at` on, which the callers' fixed sizes contain.
fn field<const N: usize>(bytes: &[u8; 16], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[at + i])
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let common = [
            b::VIRTIO_BLK_F_SIZE_MAX,
            b::VIRTIO_BLK_F_SEG_MAX,
            b::VIRTIO_BLK_F_BLK_SIZE,
            b::VIRTIO_BLK_F_TOPOLOGY,
            b::VIRTIO_BLK_F_FLUSH,
        ]
        .iter()
        .fold(0, |features, bit| features | 1 << bit);
        if self.disk.is_read_only() { common | 1 << b::VIRTIO_BLK_F_RO } else { common | DISCARD | WRITE_ZEROES }
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Vec<u8> {
        let block_sectors = (BLOCK_BYTES / SECTOR_BYTES) as u32;
        let mut config = Vec::with_capacity(60);
        config.extend(self.sectors().to_le_bytes());
        config.extend(SEGMENT_BYTES.to_le_bytes());
        config.extend(SEGMENTS.to_le_bytes());
        config.extend([0; 4]); // geometry, not offered
        config.extend((SECTOR_BYTES as u32).to_le_bytes());
        config.extend([block_sectors.trailing_zeros() as u8, 0]); // physical block exponent, alignment offset
        config.extend((block_sectors as u16).to_le_bytes()); // minimum I/O size, logical blocks
        config.extend(0u32.to_le_bytes()); // optimal I/O size: no preference
        config.extend([0; 4]); // write-back mode, unused, number of queues: not offered
        config.extend(ZERO_SECTORS.to_le_bytes()); // discard
        config.extend(ZERO_SEGMENTS.to_le_bytes());
        config.extend(block_sectors.to_le_bytes()); // alignment of discards
        config.extend(ZERO_SECTORS.to_le_bytes()); // write zeroes
        config.extend(ZERO_SEGMENTS.to_le_bytes());
        config.extend([1, 0, 0, 0]); // write zeroes may unmap; padding
        config
    }

    fn activate(&mut self, features: u64) -> Result<(), DeviceError> {
        self.features = features;
        Ok(())
    }

    fn reset(&mut self) {
        self.features = 0;
    }

    fn process_queue(&mut self, queue: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        let (mut moved, mut served) = (0, 0);
        while let Some(mut chain) = io.pop(queue)? {
            let (written, data) = self.serve(io.memory(), &mut chain)?;
            io.complete(queue, chain.head, written)?;
            moved += data;
            served += 1;
            if (moved >= CALL_BYTES || served >= CALL_REQUESTS) && io.has_available(queue)? {
                io.reschedule(queue);
                break;
            }
        }
        Ok(())
    }

    fn save(&self) -> DeviceState {
        DeviceState::Block(BlockState { sectors: self.sectors(), read_only: self.disk.is_read_only() })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Block(BlockState { sectors, read_only }) = *state else {
            return Err(RestoreError::Foreign);
        };
        if sectors != self.sectors() {
            return Err(RestoreError::Mismatch {
                field: "disk size in sectors",
                saved: sectors,
                actual: self.sectors(),
            });
        }
        if read_only != self.disk.is_read_only() {
            let actual = self.disk.is_read_only();
            return Err(RestoreError::Mismatch {
                field: "read-only flag",
                saved: read_only.into(),
                actual: actual.into(),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "block_tests.rs"]
mod tests;
