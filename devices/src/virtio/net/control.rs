//! The control queue, virtio 1.2 §5.1.6.5. The one command there is here says that the driver has announced the guest.

use virtio_bindings::virtio_net as b;
use vm_memory::Bytes;

use super::super::chain::Chain;
use super::super::{DeviceError, DeviceIo};
use super::CONTROL;

/// Commands handled in one call.
const BATCH: usize = 64;

/// What a command asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// The announcement was made.
    Announced,
    /// Nothing that this device does.
    Unknown,
}

impl Command {
    fn decode([class, command]: [u8; 2]) -> Self {
        match (u32::from(class), u32::from(command)) {
            (b::VIRTIO_NET_CTRL_ANNOUNCE, b::VIRTIO_NET_CTRL_ANNOUNCE_ACK) => Self::Announced,
            _ => Self::Unknown,
        }
    }
}

/// Takes the driver's commands, and answers each with what `carry_out` says of it.
pub(super) fn serve(io: &mut DeviceIo<'_>, mut carry_out: impl FnMut(Command) -> bool) -> Result<(), DeviceError> {
    for _ in 0..BATCH {
        let Some(mut chain) = io.pop(CONTROL)? else { return Ok(()) };
        let command = read(io, &mut chain)?;
        let answer_at = chain.writable.split_last_byte().ok_or(DeviceError::TooShort {
            direction: "writable",
            have: 0,
            need: 1,
        })?;
        let before = chain.writable.remaining() as u32;
        let answer = if carry_out(command) { b::VIRTIO_NET_OK } else { b::VIRTIO_NET_ERR };
        io.memory().write_obj(answer as u8, answer_at).map_err(DeviceError::Memory)?;
        io.complete(CONTROL, chain.head, before + 1)?;
    }
    if io.has_available(CONTROL)? {
        io.reschedule(CONTROL);
    }
    Ok(())
}

fn read(io: &DeviceIo<'_>, chain: &mut Chain) -> Result<Command, DeviceError> {
    let mut bytes = [0; 2];
    chain.readable.read(io.memory(), &mut bytes)?;
    Ok(Command::decode(bytes))
}
