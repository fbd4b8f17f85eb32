//! Taps: a link of the host's kernel whose other end is a descriptor. Frames come and go with virtio's header, in which each side says what it
//! left to the other: checksums, and cutting large packets into small ones.

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Result;
use rustix::ioctl::{Opcode, Setter, ioctl, opcode};
use std::os::fd::OwnedFd;

/// `TUNSETIFF`
const SET_INTERFACE: Opcode = opcode::write::<i32>(b'T', 202);
/// `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`
const FRAMES: u16 = 0x0002 | 0x1000 | 0x4000;

/// `struct ifreq` as far as `TUNSETIFF` reads it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// Makes a tap of this name in the calling thread's namespace. It ends with its last descriptor. Reads and writes do not wait.
pub fn open(name: &str) -> Result<OwnedFd> {
    let tap = openat(CWD, "/dev/net/tun", OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())?;
    let mut request = InterfaceRequest { name: [0; 16], flags: FRAMES, rest: [0; 22] };
    let bytes = name.as_bytes().get(..name.len().min(15)).unwrap_or_default();
    request.name[..bytes.len()].copy_from_slice(bytes);
    // SAFETY: TUNSETIFF reads and writes a `struct ifreq` of 40 octets, which `InterfaceRequest` is as large as.
    unsafe { ioctl(&tap, Setter::<SET_INTERFACE, _>::new(request)) }?;
    Ok(tap)
}
