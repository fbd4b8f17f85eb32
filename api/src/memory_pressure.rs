//! How short of memory this host is, and what that means for memory that is only kept for speed.

use std::fs;

/// Memory that is available, below which half of what is kept goes, per mille of all.
const LITTLE: u64 = 100;
/// Below this everything goes.
const VERY_LITTLE: u64 = 50;
/// Per cent of the last ten seconds in which some task waited for memory, from which on half of what is kept goes.
const SOME_WAIT: u64 = 20;
/// In which all tasks waited, from which on everything goes.
const ALL_WAIT: u64 = 10;

/// What the kernel says of memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Memory of the host, bytes.
    pub total: u64,
    /// Of it free or reclaimable, bytes.
    pub available: u64,
    /// Per cent of the last ten seconds in which some task waited for memory; 0 where the kernel does not count it.
    pub some_wait: u64,
    /// In which all did.
    pub all_wait: u64,
}

/// What to do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Nothing.
    Keep,
    /// Drop half of what is kept.
    Halve,
    /// Drop everything.
    Drop,
}

impl Sample {
    /// Asks the kernel.
    pub fn take() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        Self::of(&read("/proc/meminfo"), &read("/proc/pressure/memory"))
    }

    fn of(meminfo: &str, pressure: &str) -> Self {
        let kib = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.split_ascii_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0) << 10
        };
        let waits = |kind: &str| {
            let line = pressure.lines().find(|line| line.starts_with(kind)).unwrap_or_default();
            let share = line.split_ascii_whitespace().find_map(|word| word.strip_prefix("avg10="));
            share.and_then(|share| share.split('.').next()).and_then(|whole| whole.parse().ok()).unwrap_or(0)
        };
        Self {
            total: kib("MemTotal"),
            available: kib("MemAvailable"),
            some_wait: waits("some"),
            all_wait: waits("full"),
        }
    }

    /// What to do. A kernel that says nothing is believed to have enough.
    pub fn advise(&self) -> Advice {
        let share = (self.available * 1000).checked_div(self.total).unwrap_or(1000);
        if share < VERY_LITTLE || self.all_wait >= ALL_WAIT {
            Advice::Drop
        } else if share < LITTLE || self.some_wait >= SOME_WAIT {
            Advice::Halve
        } else {
            Advice::Keep
        }
    }
}

/// Memory that this process and its children may use, bytes: the host's, or less where a control group bounds it.
pub fn host_bytes() -> u64 {
    let group = fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    Sample::take().total.min(group.unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal:       1000000 kB\nMemFree: 1 kB\nMemAvailable:    300000 kB\n";
    const PRESSURE: &str =
        "some avg10=12.34 avg60=0.00 avg300=0.00 total=1\nfull avg10=9.99 avg60=0.00 avg300=0.00 total=1\n";

    #[test]
    fn the_kernels_words_are_read() {
        let sample = Sample::of(MEMINFO, PRESSURE);
        assert_eq!((sample.total, sample.available), (1_000_000 << 10, 300_000 << 10));
        assert_eq!((sample.some_wait, sample.all_wait), (12, 9));
        assert_eq!(sample.advise(), Advice::Keep);
        assert_eq!(Sample::of("", "").advise(), Advice::Keep);
        assert!(host_bytes() > 0);
    }

    #[test]
    fn little_memory_and_long_waits_drop_what_is_kept() {
        let with = |available, some_wait, all_wait| Sample { total: 1000, available, some_wait, all_wait }.advise();
        assert_eq!(with(100, 0, 0), Advice::Keep);
        assert_eq!(with(99, 0, 0), Advice::Halve);
        assert_eq!(with(49, 0, 0), Advice::Drop);
        assert_eq!(with(900, 20, 0), Advice::Halve);
        assert_eq!(with(900, 20, 10), Advice::Drop);
    }
}
