//! The transmit queue: frames of the guest, checked, to the tap.

use std::io;
use std::time::Instant;

use super::super::chain::Chain;
use super::super::{DeviceError, DeviceIo};
use super::header::{self, HEADER_BYTES, Header};
use super::{BATCH, BATCH_BYTES, Net, TRANSMIT};

/// What the next frame of the guest waits for, if anything.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Waiting {
    /// Room in the host's queue.
    room: bool,
    /// The limit.
    until: Option<Instant>,
}

impl Waiting {
    pub(super) fn for_room(self) -> bool {
        self.room
    }

    pub(super) fn until(self) -> Option<Instant> {
        self.until
    }

    pub(super) fn room_has_come(&mut self) {
        self.room = false;
    }
}

/// What became of a frame.
enum Fate {
    /// It passed; so many packets on the wire.
    Passed(u64),
    /// It is lost.
    Lost,
    /// The host has no room for it now.
    Waits,
}

impl Net {
    /// Sends what the driver has made available.
    pub(super) fn pump_transmit(&mut self, io: &mut DeviceIo<'_>, now: Instant) -> Result<(), DeviceError> {
        let mut moved = 0;
        for _ in 0..BATCH {
            if self.transmitting.room {
                return Ok(());
            }
            self.transmitting.until = self.from_guest.opens(now);
            if self.transmitting.until.is_some() || moved >= BATCH_BYTES {
                break;
            }
            let Some(mut chain) = io.pop(TRANSMIT)? else { return Ok(()) };
            let mut bytes = [0; HEADER_BYTES];
            chain.readable.read(io.memory(), &mut bytes)?;
            let len = chain.readable.remaining();
            match self.send(io, &Header::decode(&bytes), &chain)? {
                Fate::Passed(packets) => {
                    self.counters.from_guest.passed(len);
                    self.from_guest.passed(len, packets);
                }
                Fate::Lost => {
                    self.counters.from_guest.lost();
                    // It costs the host as much as one that passes.
                    self.from_guest.passed(len, 1);
                }
                Fate::Waits => {
                    io.unpop(TRANSMIT);
                    self.transmitting.room = true;
                    return Ok(());
                }
            }
            io.complete(TRANSMIT, chain.head, 0)?;
            moved += len;
        }
        if self.transmitting.until.is_none() && io.has_available(TRANSMIT)? {
            io.reschedule(TRANSMIT);
        }
        Ok(())
    }

    fn send(&mut self, io: &DeviceIo<'_>, header: &Header, chain: &Chain) -> Result<Fate, DeviceError> {
        let len = chain.readable.remaining();
        let checked = match header::check(header, len, self.offloads()) {
            Ok(checked) => checked,
            Err(refused) => {
                tracing::debug!(%refused, "a frame of the guest was dropped");
                return Ok(Fate::Lost);
            }
        };
        let Some(tap) = &self.tap else { return Ok(Fate::Lost) };
        let mut slices = Vec::new();
        chain.readable.slices(io.memory(), &mut slices)?;
        Ok(match tap.send(&checked.encode(), &slices) {
            Ok(()) => Fate::Passed(checked.segments(len)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Fate::Waits,
            Err(error) => {
                // A tap that is down, a header that the kernel takes for wrong after all, or no memory.
                self.note_host_error("writing to the tap", &error);
                Fate::Lost
            }
        })
    }
}
