//! The tap: frames between a host's interface and guest memory, without a copy between.
//!
//! A frame is read or written by one system call, its header from and to a buffer of ours, the rest right from and to the guest's buffers.
//! The kernel reads and writes those as it does any process's memory: pages that are absent fault in, and a guest that changes a frame
//! while it is sent changes only that frame. All of this device's `unsafe` is here.
//!
//! The descriptor is a tap (`IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`), opened and attached by somebody else, or a datagram socket whose other
//! end speaks the same: frames with a header of [`HEADER_BYTES`] in front.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use super::header::HEADER_BYTES;

/// Slices of one call, the header not counted: one less than the kernel takes (UIO_MAXIOV).
pub(super) const MAX_SLICES: usize = 1023;
/// [`HEADER_BYTES`] as the kernel takes it.
const HEADER_BYTES_C: libc::c_int = 12;
const _: () = assert!(HEADER_BYTES == 12);

/// What the guest takes that the host need not finish.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ReceiveOffloads {
    /// Frames without a checksum.
    pub(super) checksum: bool,
    /// TCP over IPv4 that is not segmented; only with `checksum`.
    pub(super) tso4: bool,
}

/// An open tap. Calls never block.
#[derive(Debug)]
pub(super) struct Tap {
    fd: OwnedFd,
}

impl Tap {
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
        Ok(Self { fd })
    }

    /// Tells the kernel the size of headers, and what the guest takes. It forgets the second when the tap gets another owner.
    pub(super) fn set_offloads(&self, offloads: ReceiveOffloads) -> io::Result<()> {
        let header_bytes = HEADER_BYTES_C;
        let mut flags = 0;
        if offloads.checksum {
            flags |= libc::TUN_F_CSUM;
            if offloads.tso4 {
                flags |= libc::TUN_F_TSO4;
            }
        }
        // SAFETY: the kernel reads one int, which lives through the call.
        let sized = unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header_bytes) };
        // SAFETY: this request takes its argument by value and touches no memory of ours.
        let told = unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) };
        if sized == 0 && told == 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            // A socket has no offloads: its other end sees the header and does what it says.
            error if error.raw_os_error() == Some(libc::ENOTTY) => Ok(()),
            error => Err(error),
        }
    }

    /// Reads the next frame: its header, the rest into `slices`, whose pages are marked. Answers the frame's length without the header,
    /// which is beyond that of `slices` when they were too short for it.
    pub(super) fn receive<B: BitmapSlice>(
        &self,
        header: &mut [u8; HEADER_BYTES],
        slices: &[VolatileSlice<'_, B>],
    ) -> io::Result<usize> {
        let guards: Vec<_> = slices.iter().take(MAX_SLICES).map(VolatileSlice::ptr_guard_mut).collect();
        let mut vectors = Vec::with_capacity(guards.len() + 1);
        vectors.push(libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: HEADER_BYTES });
        vectors.extend(guards.iter().map(|g| libc::iovec { iov_base: g.as_ptr().cast(), iov_len: g.len() }));
        let read = loop {
            // SAFETY: the first vector is `header`, borrowed for this call; each other one is a slice of guest memory, which stays mapped
            // while its slice and guard live, and of which nobody holds a reference: all accesses to it are volatile or the kernel's.
            let read = unsafe { libc::readv(self.fd.as_raw_fd(), vectors.as_ptr(), count(&vectors)) };
            match usize::try_from(read) {
                Ok(read) => break read,
                Err(_) => interrupted()?,
            }
        };
        let Some(frame) = read.checked_sub(HEADER_BYTES) else {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "a frame without a header"));
        };
        let mut left = frame;
        for slice in slices {
            let filled = left.min(slice.len());
            slice.bitmap().mark_dirty(0, filled);
            left -= filled;
        }
        Ok(frame)
    }

    /// Writes a frame: `header`, then what is in `slices`.
    pub(super) fn send<B: BitmapSlice>(
        &self,
        header: &[u8; HEADER_BYTES],
        slices: &[VolatileSlice<'_, B>],
    ) -> io::Result<()> {
        if slices.len() > MAX_SLICES {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a frame of too many pieces"));
        }
        let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard).collect();
        let mut vectors = Vec::with_capacity(guards.len() + 1);
        vectors.push(libc::iovec { iov_base: header.as_ptr().cast_mut().cast(), iov_len: HEADER_BYTES });
        vectors.extend(guards.iter().map(|g| libc::iovec { iov_base: g.as_ptr().cast_mut().cast(), iov_len: g.len() }));
        loop {
            // SAFETY: as in `receive`; the kernel only reads, so that constant pointers may be given as mutable ones.
            let written = unsafe { libc::writev(self.fd.as_raw_fd(), vectors.as_ptr(), count(&vectors)) };
            if written >= 0 {
                return Ok(());
            }
            interrupted()?;
        }
    }
}

/// How many vectors: never more than [`MAX_SLICES`] and the header's.
fn count(vectors: &[libc::iovec]) -> libc::c_int {
    vectors.len().try_into().unwrap_or(libc::c_int::MAX)
}

/// Fine if the last call was interrupted by a signal; else its error.
fn interrupted() -> io::Result<()> {
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
