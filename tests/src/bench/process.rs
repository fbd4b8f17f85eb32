//! CPU time and memory of processes, from `/proc`.

use std::path::Path;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::samples::Samples;

/// Name of the memory file of our VMM's guests.
const GUEST_MEMORY: &str = "/memfd:guest-memory";

/// USER_HZ, the unit of times in `/proc`: the same on every x86-64 Linux.
const TICKS_PER_SECOND: u64 = 100;

/// Processor time of a process, and of its children that have ended and were waited for: the first to the nanosecond, the latter to
/// a tick. `None` when it is gone.
pub fn cpu(pid: u32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses, which may hold anything.
    let (_, fields) = stat.rsplit_once(')')?;
    let ticks: u64 = fields.split_whitespace().skip(13).take(2).filter_map(|n| n.parse::<u64>().ok()).sum();
    Some(own_clock(pid)? + Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND))
}

/// The clock that counts a process's processor time.
fn own_clock(pid: u32) -> Option<Duration> {
    let (mut clock, mut now) = (0, libc::timespec { tv_sec: 0, tv_nsec: 0 });
    // SAFETY: the calls write one clock id and one timespec.
    let told = unsafe {
        libc::clock_getcpuclockid(i32::try_from(pid).ok()?, &raw mut clock) == 0
            && libc::clock_gettime(clock, &raw mut now) == 0
    };
    told.then(|| Duration::new(now.tv_sec.try_into().unwrap_or(0), now.tv_nsec.try_into().unwrap_or(0)))
}

/// User and system time of this process, to the nanosecond.
pub fn own_cpu() -> Duration {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(now.tv_sec.try_into().unwrap_or(0), now.tv_nsec.try_into().unwrap_or(0))
}

/// Resident memory of a process outside guest memory, KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overhead {
    /// All of it, the pages of programs and libraries included that all processes of a kind share.
    pub resident: u64,
    /// What is this process's alone.
    pub private: u64,
    /// Of all of it, pages of the program's file and its libraries: the kernel has them once for all processes that run the program.
    pub program: u64,
}

impl Overhead {
    /// Adds it to the samples.
    pub fn note(self, samples: &mut Samples) {
        samples.add("overhead", "KiB", self.resident as f64);
        samples.add("overhead.private", "KiB", self.private as f64);
        samples.add("overhead.program", "KiB", self.program as f64);
    }
}

/// What a process has resident. Guest memory is what is mapped of our memory file, or for other VMMs every mapping of at least `guest_bytes`.
/// `None` when it is gone.
pub fn overhead(pid: u32, guest_bytes: u64) -> Option<Overhead> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    Some(outside(&smaps, guest_bytes))
}

fn outside(smaps: &str, guest_bytes: u64) -> Overhead {
    let (mut total, mut guest, mut file) = (Overhead::default(), false, false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((from, to)) = first.split_once('-')
            && let (Ok(from), Ok(to)) = (u64::from_str_radix(from, 16), u64::from_str_radix(to, 16))
        {
            guest = to - from >= guest_bytes || line.contains(GUEST_MEMORY);
            file = words.nth(4).is_some_and(|path| path.starts_with('/'));
        } else if !guest {
            let kib = words.next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
            match first {
                "Rss:" => {
                    total.resident += kib;
                    total.program += if file { kib } else { 0 };
                }
                "Private_Clean:" | "Private_Dirty:" => total.private += kib,
                _ => {}
            }
        }
    }
    total
}

/// What this machine is, in one line.
pub fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        text.lines()
            .find(|line| line.starts_with(name))
            .and_then(|line| line.split_once(':'))
            .map(|(_, value)| value.trim().to_owned())
    };
    let cpu = field(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| "unknown CPU".to_owned());
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = field(&read("/proc/meminfo"), "MemTotal")
        .and_then(|kib| kib.split_whitespace().next()?.parse::<u64>().ok())
        .map_or_else(|| "unknown memory".to_owned(), |kib| format!("{:.1} GiB", kib as f64 / 1_048_576.0));
    let kernel = read("/proc/sys/kernel/osrelease");
    let kvm = if Path::new("/dev/kvm").exists() {
        crate::host::no_linux_guest().map_or("KVM with hardware virtualization", |_| "software KVM (no VT-x or AMD-V)")
    } else {
        "no KVM"
    };
    let emulated = if std::env::var_os("RIG").is_some() { ", emulated by tests/rig: some 20 times slower" } else { "" };
    format!("{cpu}, {cores} CPUs, {memory}, Linux {}, {kvm}{emulated}", kernel.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_left_out() {
        let smaps = "1000-2000 rw-p 0 00:00 0 [heap]\nRss: 12 kB\nPss: 3 kB\nPrivate_Clean: 1 kB\nPrivate_Dirty: 4 kB\n10000-20000 rw-s 0 00:00 0 /dev/zero\nRss: 64 kB\n\
                     30000-31000 r--p 0 00:00 7 /usr/bin/vmm\nRss: 4 kB\n40000-41000 rw-s 0 00:00 0 /memfd:guest-memory (deleted)\nRss: 4 kB\nPrivate_Dirty: 9 kB\n";
        assert_eq!(outside(smaps, 0x10000), Overhead { resident: 16, private: 5, program: 4 });
        assert_eq!(outside(smaps, 0x100_000), Overhead { resident: 80, private: 5, program: 68 });
    }

    #[test]
    fn our_own_time_passes() {
        let before = cpu(std::process::id()).unwrap();
        let begun = std::time::Instant::now();
        let mut sum = 0_u64;
        while begun.elapsed() < Duration::from_millis(60) {
            sum = sum.wrapping_mul(31).wrapping_add(1);
        }
        assert!(cpu(std::process::id()).unwrap() > before, "{sum}");
        assert_eq!(cpu(u32::MAX), None);
    }
}
