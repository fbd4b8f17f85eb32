//! The receive queue: frames from the tap into as many of the guest's buffers as they need.

use std::collections::VecDeque;
use std::io;
use std::time::Instant;

use virtio_bindings::virtio_net as b;
use vm_memory::VolatileSlice;

use super::super::chain::{Buffers, Slice};
use super::super::{DeviceError, DeviceIo};
use super::header::{ETHERNET_TAGGED_BYTES, HEADER_BYTES, Header, MAX_FRAME};
use super::tap::MAX_SLICES;
use super::{BATCH, BATCH_BYTES, Net, PATIENCE, RECEIVE};

/// Frames copied in one call: whoever gives buffers of a byte each makes one of them cost as much as thousands.
const COPIES: usize = 16;

/// A frame that was taken from the tap, and for which the guest has no buffers yet.
struct Held {
    header: [u8; HEADER_BYTES],
    frame: Vec<u8>,
    /// It is dropped then.
    until: Instant,
}

/// What the next frame for the guest waits for, if anything.
#[derive(Default)]
pub(super) struct Waiting {
    /// The driver has made buffers available since they last ran out.
    buffers: bool,
    held: Option<Held>,
    /// The limit.
    limit: Option<Instant>,
    /// Frames that were copied in this call.
    copies: usize,
}

impl Waiting {
    /// Whether a frame could go to the guest at once.
    pub(super) fn wants_frames(&self) -> bool {
        self.buffers && self.held.is_none() && self.limit.is_none()
    }

    /// When something is to be done whatever else happens.
    pub(super) fn until(&self) -> Option<Instant> {
        self.limit.into_iter().chain(self.held.as_ref().map(|held| held.until)).min()
    }

    pub(super) fn buffers_may_have_come(&mut self) {
        self.buffers = true;
    }

    /// Drops everything; answers whether a frame was.
    pub(super) fn forget(&mut self) -> bool {
        std::mem::take(self).held.is_some()
    }
}

/// A chain that was taken from the available ring, to be used or given back in this call.
struct Room {
    head: u16,
    buffers: Buffers,
}

/// Buffers for the next frames.
#[derive(Default)]
struct Rooms {
    chains: VecDeque<Room>,
    bytes: u64,
}

impl Rooms {
    /// Takes chains until there is room for `need` bytes, or none is left.
    fn gather(&mut self, io: &mut DeviceIo<'_>, need: u64, mergeable: bool) -> Result<(), DeviceError> {
        while self.bytes < need && (mergeable || self.chains.is_empty()) {
            let Some(chain) = io.pop(RECEIVE)? else { return Ok(()) };
            let buffers = chain.writable;
            let have = buffers.remaining();
            self.chains.push_back(Room { head: chain.head, buffers });
            self.bytes += have;
            if chain.readable.remaining() != 0 {
                return Err(DeviceError::Malformed("a receive buffer must be writable"));
            }
            // virtio 1.2 §5.1.6.3.1: each buffer holds a header at least.
            if have < HEADER_BYTES as u64 {
                return Err(DeviceError::TooShort { direction: "writable", have, need: HEADER_BYTES as u64 });
            }
        }
        Ok(())
    }

    /// Gives all back that was not used.
    fn give_back(&mut self, io: &mut DeviceIo<'_>) {
        for _ in self.chains.drain(..) {
            io.unpop(RECEIVE);
        }
        self.bytes = 0;
    }

    /// The room for a frame behind the header's, which is cut off.
    fn slices<'m>(&mut self, io: &DeviceIo<'m>) -> Result<(Buffers, Vec<Slice<'m>>), DeviceError> {
        let mut slices = Vec::with_capacity(self.chains.len());
        let mut header = Buffers::default();
        for (index, room) in self.chains.iter_mut().enumerate() {
            if index == 0 {
                header = room.buffers.split_front(HEADER_BYTES)?;
            }
            room.buffers.slices(io.memory(), &mut slices)?;
        }
        Ok((header, slices))
    }

    /// Returns the chains that a frame of `len` bytes fills to the driver, its header in `header_at`.
    fn complete(
        &mut self,
        io: &mut DeviceIo<'_>,
        mut header_at: Buffers,
        header: [u8; HEADER_BYTES],
        len: u64,
    ) -> Result<(), DeviceError> {
        let mut used = Vec::new();
        let mut left = len;
        let mut in_front = HEADER_BYTES as u64;
        while let Some(room) = self.chains.pop_front() {
            let have = room.buffers.remaining();
            let filled = have.min(left);
            left -= filled;
            used.push((room.head, (filled + in_front) as u32));
            self.bytes -= have + in_front;
            in_front = 0;
            if left == 0 {
                break;
            }
        }
        let header = Header { num_buffers: used.len() as u16, ..Header::decode(&header) };
        header_at.write(io.memory(), &header.encode())?;
        io.complete_together(RECEIVE, &used)
    }
}

impl Net {
    /// Takes frames from the tap while the guest has room for them.
    pub(super) fn pump_receive(&mut self, io: &mut DeviceIo<'_>, now: Instant) -> Result<(), DeviceError> {
        if self.receiving.held.as_ref().is_some_and(|held| now >= held.until) {
            self.receiving.held = None;
            self.counters.to_guest.lost();
            // There may be enough of them for the next one, and no notification will say so.
            self.receiving.buffers = true;
        }
        let mut rooms = Rooms::default();
        let done = self.receive_into(&mut rooms, io, now);
        rooms.give_back(io);
        done
    }

    fn receive_into(&mut self, rooms: &mut Rooms, io: &mut DeviceIo<'_>, now: Instant) -> Result<(), DeviceError> {
        let mut moved = 0;
        self.receiving.copies = 0;
        for _ in 0..BATCH {
            self.receiving.limit = self.to_guest.opens(now);
            if self.receiving.limit.is_some() || !self.receiving.buffers {
                return Ok(());
            }
            // The tap is still readable then: the loop comes back.
            if moved >= BATCH_BYTES || self.receiving.copies >= COPIES {
                return Ok(());
            }
            let received = match self.receiving.held.take() {
                Some(held) => self.deliver(rooms, io, held)?,
                None => self.take_frame(rooms, io, now)?,
            };
            let Some((header, len)) = received else { return Ok(()) };
            self.counters.to_guest.passed(len);
            self.to_guest.passed(len, Header::decode(&header).segments(len));
            moved += len;
        }
        Ok(())
    }

    /// Reads one frame and gives it to the guest; answers its header and length. None when there is none, or it was not delivered.
    fn take_frame(
        &mut self,
        rooms: &mut Rooms,
        io: &mut DeviceIo<'_>,
        now: Instant,
    ) -> Result<Option<([u8; HEADER_BYTES], u64)>, DeviceError> {
        let Some(tap) = &self.tap else { return Ok(None) };
        let longest = if self.has(b::VIRTIO_NET_F_GUEST_TSO4) {
            MAX_FRAME
        } else {
            u64::from(self.config.mtu) + ETHERNET_TAGGED_BYTES
        };
        rooms.gather(io, longest + HEADER_BYTES as u64, self.has(b::VIRTIO_NET_F_MRG_RXBUF))?;
        if rooms.chains.is_empty() {
            self.receiving.buffers = false;
            return Ok(None);
        }
        let mut header = [0; HEADER_BYTES];
        if rooms.bytes >= longest + HEADER_BYTES as u64 {
            let (header_at, slices) = rooms.slices(io)?;
            if slices.len() <= MAX_SLICES {
                let room: u64 = slices.iter().map(|slice| slice.len() as u64).sum();
                let read = tap.receive(&mut header, &slices);
                let Some(len) = self.frame_read(read, room) else { return Ok(None) };
                rooms.complete(io, header_at, header, len)?;
                return Ok(Some((header, len)));
            }
        }
        // The buffers that there are may be too few, or are too many: a copy waits until the frame's length is known.
        let mut frame = vec![0; MAX_FRAME as usize];
        let read = tap.receive(&mut header, &[VolatileSlice::from(frame.as_mut_slice())]);
        let Some(len) = self.frame_read(read, MAX_FRAME) else { return Ok(None) };
        frame.truncate(len as usize);
        self.deliver(rooms, io, Held { header, frame, until: now + PATIENCE })
    }

    /// The length of a frame that was read into `room` bytes; none when there was none or it is lost.
    fn frame_read(&mut self, read: io::Result<usize>, room: u64) -> Option<u64> {
        match read {
            Ok(len) if len as u64 <= room => Some(len as u64),
            Ok(_) => {
                self.counters.to_guest.lost();
                None
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => {
                self.counters.to_guest.lost();
                self.note_host_error("reading from the tap", &error);
                None
            }
        }
    }

    /// Copies a frame to the guest, or holds it until there is room.
    fn deliver(
        &mut self,
        rooms: &mut Rooms,
        io: &mut DeviceIo<'_>,
        held: Held,
    ) -> Result<Option<([u8; HEADER_BYTES], u64)>, DeviceError> {
        rooms.give_back(io);
        self.receiving.copies += 1;
        let len = held.frame.len() as u64;
        let need = len + HEADER_BYTES as u64;
        let mergeable = self.has(b::VIRTIO_NET_F_MRG_RXBUF);
        rooms.gather(io, need, mergeable)?;
        if rooms.bytes < need {
            if mergeable || rooms.chains.is_empty() {
                self.receiving.buffers = false;
                self.receiving.held = Some(held);
            } else {
                // The driver's buffers are too short for it, and will be.
                self.counters.to_guest.lost();
            }
            return Ok(None);
        }
        let (header_at, _) = rooms.slices(io)?;
        let mut left = held.frame.as_slice();
        for room in &rooms.chains {
            let (here, later) = left.split_at(left.len().min(room.buffers.remaining() as usize));
            room.buffers.clone().write(io.memory(), here)?;
            left = later;
        }
        rooms.complete(io, header_at, held.header, len)?;
        Ok(Some((held.header, len)))
    }
}
