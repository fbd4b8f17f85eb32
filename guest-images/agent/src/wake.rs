//! What a guest needs after a restore: the time of day, and random numbers that no other guest restored from the same snapshot draws.
//!
//! The kernel's VM generation id driver does the second when the kernel has it (5.18 and later, and Debian's bookworm kernels are built
//! without it); fresh bytes through the agent work with every kernel.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Instant;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use stasis_agent::protocol::{WakeReply, WakeRequest};

const SEED_BYTES: usize = 32;
const SEED_BYTES_C: libc::c_int = 32;
const NANOSECONDS: i128 = 1_000_000_000;

/// `struct rand_pool_info` of `linux/random.h` with the seed as its buffer.
#[repr(C)]
struct RandPoolInfo {
    entropy_bits: libc::c_int,
    buffer_bytes: libc::c_int,
    buffer: [u8; SEED_BYTES],
}

/// `_IOW('R', 0x03, int[2])` and `_IO('R', 0x07)` of `linux/random.h`.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// Why a wake was not carried out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WakeError {
    #[error("entropy must be base64 of {SEED_BYTES} bytes")]
    BadEntropy,
    #[error("unix_time_ns {0} is beyond what the clock can hold")]
    BadTime(u64),
    #[error("cannot {operation}")]
    Kernel {
        operation: &'static str,
        #[source]
        source: io::Error,
    },
}

/// Reseeds the random pool, then sets the wall clock. `received`: when the request had come in.
pub(crate) fn apply(request: &WakeRequest, received: Instant) -> Result<WakeReply, WakeError> {
    let seed =
        STANDARD.decode(&request.entropy).ok().and_then(|seed| seed.try_into().ok()).ok_or(WakeError::BadEntropy)?;
    reseed(seed)?;
    // Time has gone by since the host looked at its clock; of that, what passed in here is known.
    let now = i128::from(request.unix_time_ns) + received.elapsed().as_nanos().cast_signed();
    let target = timespec(now).ok_or(WakeError::BadTime(request.unix_time_ns))?;
    let before = nanoseconds(clock_gettime(ClockId::Realtime));
    clock_settime(ClockId::Realtime, target)
        .map_err(|source| WakeError::Kernel { operation: "set the clock", source: source.into() })?;
    let step = now - before;
    Ok(WakeReply { stepped_ns: i64::try_from(step).unwrap_or(if step < 0 { i64::MIN } else { i64::MAX }) })
}

fn timespec(nanoseconds: i128) -> Option<Timespec> {
    Some(Timespec {
        tv_sec: i64::try_from(nanoseconds.div_euclid(NANOSECONDS)).ok()?,
        tv_nsec: i64::try_from(nanoseconds.rem_euclid(NANOSECONDS)).ok()?,
    })
}

fn nanoseconds(time: Timespec) -> i128 {
    i128::from(time.tv_sec) * NANOSECONDS + i128::from(time.tv_nsec)
}

/// Mixes the seed into the kernel's input pool and makes the generator that every reader uses draw from it at once.
fn reseed(seed: [u8; SEED_BYTES]) -> Result<(), WakeError> {
    let failed = |operation| move |source| WakeError::Kernel { operation, source };
    let random = File::options().write(true).open("/dev/urandom").map_err(failed("open /dev/urandom"))?;
    let info = RandPoolInfo { entropy_bits: SEED_BYTES_C * 8, buffer_bytes: SEED_BYTES_C, buffer: seed };
    // SAFETY: the kernel reads a rand_pool_info and `buffer_bytes` bytes behind it; `info` has that layout and lives through the call.
    let added = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) };
    if added < 0 {
        return Err(failed("add entropy to the random pool")(io::Error::last_os_error()));
    }
    // SAFETY: this ioctl takes no argument and touches no memory of ours.
    let reseeded = unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) };
    if reseeded < 0 {
        return Err(failed("reseed the random generator")(io::Error::last_os_error()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(entropy: &[u8]) -> WakeRequest {
        WakeRequest { unix_time_ns: 0, entropy: STANDARD.encode(entropy) }
    }

    #[test]
    fn entropy_of_another_size_is_refused_before_anything_changes() {
        for size in [0, 31, 33, 1000] {
            assert!(matches!(apply(&request(&vec![7; size]), Instant::now()), Err(WakeError::BadEntropy)));
        }
        let not_base64 = WakeRequest { unix_time_ns: 0, entropy: "%".repeat(44) };
        assert!(matches!(apply(&not_base64, Instant::now()), Err(WakeError::BadEntropy)));
    }

    #[test]
    fn nanoseconds_and_timespec_are_inverse() {
        for time in [0, 1, NANOSECONDS - 1, NANOSECONDS, 1_700_000_000_123_456_789, i128::from(u64::MAX)] {
            assert_eq!(nanoseconds(timespec(time).unwrap()), time);
        }
    }

    #[test]
    fn the_pool_info_has_no_padding() {
        assert_eq!(size_of::<RandPoolInfo>(), 8 + SEED_BYTES);
        assert_eq!(usize::try_from(SEED_BYTES_C), Ok(SEED_BYTES));
    }
}
