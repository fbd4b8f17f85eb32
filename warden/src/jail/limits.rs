//! How much a jailed process may use: from the size of the sandbox to numbers, without looking at anything.

use serde::{Deserialize, Serialize};

const MIB: u64 = 1 << 20;

/// The size of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Size {
    /// vCPUs.
    pub vcpus: u8,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// What a capture may use, MiB.
    pub capture_mib: u32,
}

/// Limits of a process, and of its control group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of memory, the guest's included (`memory.max`).
    pub memory: u64,
    /// Processor time, in hundredths of a core (`cpu.max`).
    pub cpu_percent: u32,
    /// Threads (`pids.max` and `RLIMIT_NPROC`).
    pub threads: u64,
    /// Open descriptors (`RLIMIT_NOFILE`).
    pub descriptors: u64,
    /// Of each disk of the host (`io.max`).
    pub disk: Disk,
}

/// Reads, and as many writes, of one disk in a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Bytes.
    pub bytes: u64,
    /// Requests.
    pub requests: u64,
}

impl Disk {
    /// What so many sandboxes' worth may ask for: enough that a pause into a directory is no slower for it, a part of what a disk of a server does.
    const fn shares(shares: u64) -> Self {
        Self { bytes: shares * 256 * MIB, requests: shares * 8000 }
    }
}

impl Limits {
    /// Of the VMM of a sandbox.
    ///
    /// Memory: the guest's, and once more as much for a named snapshot, which copies what changed while the guest stands still; what a
    /// capture has in flight; page tables (1/256, for two mappings of 4 KiB pages each); and 64 MiB for the VMM itself, which was seen to
    /// use 5 to 20 MiB, and for the cached pages of the files that it reads.
    ///
    /// Processor: one core for each vCPU, one for its devices and faults, and two for packing a capture.
    ///
    /// Disks: two shares, and one for each vCPU.
    ///
    /// Threads: a VMM has its vCPUs, 4 threads for faults, 12 others, and up to 64 that wait for files.
    pub fn of_vmm(size: Size) -> Self {
        let guest = u64::from(size.memory_mib) * MIB;
        Self {
            memory: 2 * guest + guest / 128 + (u64::from(size.capture_mib) + 64) * MIB,
            cpu_percent: 100 * (u32::from(size.vcpus) + 3),
            threads: u64::from(size.vcpus) + 96,
            descriptors: DESCRIPTORS,
            disk: Disk::shares(2 + u64::from(size.vcpus)),
        }
    }

    /// Of a VMM whose sandbox is not known yet: what the largest may have.
    pub fn of_idle_vmm() -> Self {
        Self::of_vmm(Size { vcpus: 8, memory_mib: 8192, capture_mib: 1024 })
    }

    /// Of the dialler.
    pub fn of_dialler() -> Self {
        let disk = Disk::shares(1);
        Self { memory: 256 * MIB, cpu_percent: 100, threads: 1100, descriptors: DESCRIPTORS, disk }
    }

    /// Of an unpacker. It is one thread, which bounds its own memory to 2 GiB; the rest is for cached pages of the disk that it writes.
    pub fn of_unpacker() -> Self {
        Self { memory: 3072 * MIB, cpu_percent: 100, threads: 1, descriptors: 64, disk: Disk::shares(2) }
    }
}

/// A directory store grants each pack of a capture as a descriptor, 8192 at most, and two may wait.
const DESCRIPTORS: u64 = 32 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_larger_sandbox_has_more_of_what_it_is_larger_in() {
        let of = |vcpus, memory_mib| Limits::of_vmm(Size { vcpus, memory_mib, capture_mib: 64 });
        let small = of(1, 256);
        assert!(small.memory > 512 * MIB && small.memory < 700 * MIB, "{small:?}");
        assert!(of(1, 512).memory >= small.memory + 512 * MIB);
        assert_eq!(of(1, 512).cpu_percent, small.cpu_percent);
        assert_eq!(of(4, 256).cpu_percent, small.cpu_percent + 300);
        assert_eq!(of(4, 256).threads, small.threads + 3);
        assert_eq!(of(4, 256).disk.requests, 2 * small.disk.requests);
    }
}
