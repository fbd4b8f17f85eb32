//! What passed and what did not, counted where it happens and read by anybody.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of one direction.
#[derive(Debug, Default)]
pub struct Traffic {
    packets: AtomicU64,
    bytes: AtomicU64,
    dropped: AtomicU64,
}

impl Traffic {
    pub(super) fn passed(&self, bytes: u64) {
        self.packets.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn lost(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    /// Frames that passed. One that is segmented later counts once.
    pub fn packets(&self) -> u64 {
        self.packets.load(Ordering::Relaxed)
    }

    /// Bytes of the frames that passed, from the Ethernet header on.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Frames that were taken and did not pass: refused, without room, or without a link.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

/// Counters of a device since it was made.
#[derive(Debug, Default)]
pub struct NetCounters {
    /// What the guest received.
    pub to_guest: Traffic,
    /// What the guest sent.
    pub from_guest: Traffic,
}
