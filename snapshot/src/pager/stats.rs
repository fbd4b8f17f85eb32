//! What a pager did.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// What came from one source for one urgency.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Reads of the cache, GETs of the store, calls for a base window.
    pub requests: u64,
    /// Bytes read or received; bytes placed for the base.
    pub bytes: u64,
    /// Frames that were placed from them; windows for the base.
    pub units: u64,
}

/// Traffic by urgency, in the order of [`Urgency`](super::Urgency).
pub type ByUrgency = [Traffic; 3];

/// What a pager did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagerStats {
    /// From the pack cache.
    pub cache: ByUrgency,
    /// From the store.
    pub store: ByUrgency,
    /// From the base's file.
    pub base: ByUrgency,
    /// Pages placed, of any source.
    pub placed_pages: u64,
    /// Demands that had to wait.
    pub demands: u64,
    /// Their waiting times, added.
    pub demand_wait: Duration,
    /// The longest of them.
    pub longest_demand_wait: Duration,
    /// Frames whose bytes in the cache were not theirs.
    pub bad_in_cache: u64,
    /// Frames that were fetched once more because the store's bytes were not theirs.
    pub fetched_again: u64,
}

impl PagerStats {
    /// Everything that came from the store.
    pub fn from_store(&self) -> Traffic {
        sum(&self.store)
    }

    /// Everything that came from the cache.
    pub fn from_cache(&self) -> Traffic {
        sum(&self.cache)
    }
}

fn sum(of: &ByUrgency) -> Traffic {
    of.iter().fold(Traffic::default(), |sum, one| Traffic {
        requests: sum.requests + one.requests,
        bytes: sum.bytes + one.bytes,
        units: sum.units + one.units,
    })
}

/// The same, being kept.
#[derive(Debug, Default)]
pub(super) struct Counters(Mutex<PagerStats>);

impl Counters {
    pub(super) fn get(&self) -> PagerStats {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn count(&self, change: impl FnOnce(&mut PagerStats)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(super) fn waited(&self, for_: Duration) {
        self.count(|stats| {
            stats.demands += 1;
            stats.demand_wait += for_;
            stats.longest_demand_wait = stats.longest_demand_wait.max(for_);
        });
    }
}
