//! userfaultfd: the few calls of it that the VMM needs (Linux `include/uapi/linux/userfaultfd.h`).
//!
//! Two uses, on ranges of the guest mapping that never overlap: **absent** ranges fault to us on every first access, and are made
//! **present** when their content is in place; on present ranges writes are tracked in the page tables (asynchronous write protection),
//! without a fault ever reaching us.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

const UFFD_API: u64 = 0xaa;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const MODE_MISSING: u64 = 1;
const MODE_WP: u64 = 1 << 1;
const MODE_MINOR: u64 = 1 << 2;
const EVENT_PAGEFAULT: u8 = 0x12;

#[repr(C)]
#[derive(Default)]
struct Api {
    version: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct UffdRange {
    start: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct Register {
    range: UffdRange,
    mode: u64,
    ioctls: u64,
}

/// `uffd_msg` of a page fault; other events are never asked for.
#[repr(C)]
#[derive(Clone, Copy)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}

mod request {
    use super::{Api, Register, UffdRange};
    use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr};

    ioctl_io_nr!(USERFAULTFD_IOC_NEW, 0xaa, 0x00);
    ioctl_iowr_nr!(UFFDIO_API, 0xaa, 0x3f, Api);
    ioctl_iowr_nr!(UFFDIO_REGISTER, 0xaa, 0x00, Register);
    ioctl_ior_nr!(UFFDIO_UNREGISTER, 0xaa, 0x01, UffdRange);
    ioctl_ior_nr!(UFFDIO_WAKE, 0xaa, 0x02, UffdRange);
}

/// What this kernel's userfaultfd can do for memory files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Abilities {
    /// Faults on pages that are not there, and on those that are but are not mapped.
    pub(crate) absent: bool,
    /// Asynchronous write protection.
    pub(crate) track_writes: bool,
}

/// A userfaultfd of this process.
pub(crate) struct Uffd {
    file: File,
    abilities: Abilities,
}

fn range_of(addresses: &Range<u64>) -> UffdRange {
    UffdRange { start: addresses.start, len: addresses.end - addresses.start }
}

fn check(ret: i32) -> io::Result<()> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A new descriptor: from `/dev/userfaultfd`, whose permissions are an operator's to give, or by the system call.
fn open(device: Option<&File>) -> io::Result<File> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let raw = match device {
        // SAFETY: the call takes flags and makes a descriptor.
        Some(device) => unsafe {
            ioctl_with_val(device, request::USERFAULTFD_IOC_NEW(), u64::from(flags.unsigned_abs()))
        },
        // SAFETY: as above.
        None => unsafe { libc::syscall(libc::SYS_userfaultfd, flags) as i32 },
    };
    check(raw)?;
    // SAFETY: just made, and nobody else's.
    Ok(unsafe { File::from_raw_fd(raw) })
}

impl Uffd {
    /// Opens one with as much as the kernel has. Features are fixed with the first handshake, so it is tried from most to least.
    pub(crate) fn new(device: Option<&File>) -> io::Result<Self> {
        let absent = FEATURE_MISSING_SHMEM | FEATURE_MINOR_SHMEM;
        let track = FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC;
        let tries = [
            (absent | track, Abilities { absent: true, track_writes: true }),
            (absent, Abilities { absent: true, track_writes: false }),
        ];
        let mut last = io::Error::from(io::ErrorKind::Unsupported);
        for (features, abilities) in tries {
            let file = open(device)?;
            let mut api = Api { version: UFFD_API, features, ..Api::default() };
            // SAFETY: the kernel reads and writes one uffdio_api.
            match check(unsafe { ioctl_with_mut_ref(&file, request::UFFDIO_API(), &mut api) }) {
                Ok(()) => return Ok(Self { file, abilities }),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    pub(crate) fn abilities(&self) -> Abilities {
        self.abilities
    }

    /// First accesses to `addresses` fault to us from now on, whether or not the memory file has the page.
    pub(crate) fn make_absent(&self, addresses: &Range<u64>) -> io::Result<()> {
        self.register(addresses, MODE_MISSING | MODE_MINOR)
    }

    /// Accesses to `addresses`, which were absent, are the kernel's business from now on; whoever waits for them goes on. Between the two
    /// steps a write is not tracked, but leaves a page that is mapped and not write-protected, which counts as written.
    pub(crate) fn make_present(&self, addresses: &Range<u64>) -> io::Result<()> {
        self.unregister(addresses)?;
        self.track_writes(addresses)
    }

    /// Faults on `addresses` are the kernel's business alone.
    pub(crate) fn unregister(&self, addresses: &Range<u64>) -> io::Result<()> {
        // SAFETY: the kernel reads one uffdio_range. This changes no memory.
        check(unsafe { ioctl_with_ref(&self.file, request::UFFDIO_UNREGISTER(), &range_of(addresses)) })
    }

    /// Writes to `addresses`, which are not absent, are tracked from now on, where the kernel can.
    pub(crate) fn track_writes(&self, addresses: &Range<u64>) -> io::Result<()> {
        if self.abilities.track_writes { self.register(addresses, MODE_WP) } else { Ok(()) }
    }

    /// Lets whoever waits for `addresses` try again.
    pub(crate) fn wake(&self, addresses: &Range<u64>) -> io::Result<()> {
        // SAFETY: the kernel reads one uffdio_range.
        check(unsafe { ioctl_with_ref(&self.file, request::UFFDIO_WAKE(), &range_of(addresses)) })
    }

    fn register(&self, addresses: &Range<u64>, mode: u64) -> io::Result<()> {
        let mut register = Register { range: range_of(addresses), mode, ioctls: 0 };
        // SAFETY: the kernel reads and writes one uffdio_register. What faults from now on waits; its content does not change.
        check(unsafe { ioctl_with_mut_ref(&self.file, request::UFFDIO_REGISTER(), &mut register) })
    }

    /// The address of a fault that waits, if one does.
    pub(crate) fn next_fault(&self) -> io::Result<Option<u64>> {
        let mut message = MaybeUninit::<Message>::uninit();
        // SAFETY: the kernel writes at most one whole message.
        let got = unsafe { libc::read(self.file.as_raw_fd(), message.as_mut_ptr().cast(), size_of::<Message>()) };
        if got < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(error) };
        }
        if got.unsigned_abs() != size_of::<Message>() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // SAFETY: the kernel wrote it whole.
        let message = unsafe { message.assume_init() };
        Ok((message.event == EVENT_PAGEFAULT).then_some(message.address))
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
