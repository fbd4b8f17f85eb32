//! What a guest needs after a restore: the time of day, random numbers that no other guest restored from the same snapshot draws, and for a
//! clone a name of its own.
//!
//! The kernel's VM generation id driver does the second when the kernel has it (5.18 and later, and Debian's bookworm kernels are built
//! without it); fresh bytes through the agent work with every kernel.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Instant;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use stasis_agent::protocol::{Identity, WakeReply, WakeRequest};

use crate::network::connections;

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
    #[error("{0:?} is no host name or no machine id")]
    BadIdentity(Identity),
    #[error("cannot {operation}")]
    Kernel {
        operation: &'static str,
        #[source]
        source: io::Error,
    },
}

/// Reseeds the random pool, takes a new identity on, then sets the wall clock. `received`: when the request had come in.
pub(crate) fn apply(request: &WakeRequest, received: Instant) -> Result<WakeReply, WakeError> {
    let seed =
        STANDARD.decode(&request.entropy).ok().and_then(|seed| seed.try_into().ok()).ok_or(WakeError::BadEntropy)?;
    if let Some(identity) = &request.identity {
        check(identity)?;
    }
    reseed(seed)?;
    // Only of a guest: an agent that is a process among others is on a machine that has not slept. A kernel that cannot leaves them to the
    // resets of the host.
    if std::process::id() == 1
        && let Err(error) = connections::reset_all()
    {
        eprintln!("stasis-agent: connections of before the wake: {error}");
    }
    if let Some(identity) = &request.identity {
        take_on(identity, Path::new("/"))?;
    }
    set_clock(request.unix_time_ns, received)
}

/// Sets the wall clock to what the host's said when it wrote a request that had come in when it was `received`.
pub(crate) fn set_clock(unix_time_ns: u64, received: Instant) -> Result<WakeReply, WakeError> {
    // Time has gone by since the host looked at its clock; of that, what passed in here is known.
    let now = i128::from(unix_time_ns) + received.elapsed().as_nanos().cast_signed();
    let target = timespec(now).ok_or(WakeError::BadTime(unix_time_ns))?;
    let before = nanoseconds(clock_gettime(ClockId::Realtime));
    clock_settime(ClockId::Realtime, target)
        .map_err(|source| WakeError::Kernel { operation: "set the clock", source: source.into() })?;
    let step = now - before;
    Ok(WakeReply { stepped_ns: i64::try_from(step).unwrap_or(if step < 0 { i64::MIN } else { i64::MAX }) })
}

fn check(identity: &Identity) -> Result<(), WakeError> {
    let name = identity.hostname.as_bytes();
    let label = (1..=63).contains(&name.len())
        && name.iter().all(|c| c.is_ascii_alphanumeric() || *c == b'-')
        && name.first() != Some(&b'-')
        && name.last() != Some(&b'-');
    let id = identity.machine_id.as_bytes();
    let digits = id.len() == 32 && id.iter().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'));
    if label && digits && id.iter().any(|c| *c != b'0') {
        Ok(())
    } else {
        Err(WakeError::BadIdentity(identity.clone()))
    }
}

/// The kernel's host name, and the files under `root` that say host name and machine id to everybody else.
fn take_on(identity: &Identity, root: &Path) -> Result<(), WakeError> {
    let failed = |operation| move |source: io::Error| WakeError::Kernel { operation, source };
    rustix::system::sethostname(identity.hostname.as_bytes())
        .map_err(|errno| failed("set the host name")(errno.into()))?;
    write_names(identity, root).map_err(failed("write host name and machine id"))
}

fn write_names(identity: &Identity, root: &Path) -> io::Result<()> {
    let etc = root.join("etc");
    if !etc.is_dir() {
        // A guest without a root file system has nowhere to say it.
        return Ok(());
    }
    fs::write(etc.join("hostname"), format!("{}\n", identity.hostname))?;
    let machine_id = etc.join("machine-id");
    // Some images ship it read-only.
    match fs::remove_file(&machine_id) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::write(machine_id, format!("{}\n", identity.machine_id))
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
        WakeRequest { unix_time_ns: 0, entropy: STANDARD.encode(entropy), identity: None }
    }

    #[test]
    fn entropy_of_another_size_is_refused_before_anything_changes() {
        for size in [0, 31, 33, 1000] {
            assert!(matches!(apply(&request(&vec![7; size]), Instant::now()), Err(WakeError::BadEntropy)));
        }
        let not_base64 = WakeRequest { unix_time_ns: 0, entropy: "%".repeat(44), identity: None };
        assert!(matches!(apply(&not_base64, Instant::now()), Err(WakeError::BadEntropy)));
    }

    #[test]
    fn an_identity_is_checked_before_anything_changes() {
        let identity = |hostname: &str, machine_id: &str| Identity {
            hostname: hostname.to_owned(),
            machine_id: machine_id.to_owned(),
        };
        let id = "0123456789abcdef0123456789abcdef";
        assert!(check(&identity("sbx-a1", id)).is_ok());
        let long = "a".repeat(64);
        for (name, id) in
            [("", id), ("-a", id), ("a.b", id), (long.as_str(), id), ("a", ""), ("a", &id[1..]), ("a", &"0".repeat(32))]
        {
            let request = WakeRequest { identity: Some(identity(name, id)), ..request(&[7; 32]) };
            assert!(matches!(apply(&request, Instant::now()), Err(WakeError::BadIdentity(_))), "{name:?} {id:?}");
        }
    }

    #[test]
    fn names_are_written_where_programs_look_for_them() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let identity = Identity { hostname: "sbx-a".to_owned(), machine_id: "1".repeat(32) };
        write_names(&identity, root).unwrap();
        fs::create_dir_all(root.join("etc")).unwrap();
        write_names(&identity, root).unwrap();
        let read = |name: &str| fs::read_to_string(root.join("etc").join(name)).unwrap();
        assert_eq!((read("hostname"), read("machine-id")), ("sbx-a\n".to_owned(), format!("{}\n", "1".repeat(32))));
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
