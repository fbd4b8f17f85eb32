//! The working set: which granules the guest touched in the first seconds after a wake, first-touched first. It shapes the next boot
//! pack and is what the next restore fetches first.
//!
//! Order comes from the faults; granules that were there before anybody faulted (prefetched, or kept on the host) are found in the page
//! tables when the recording ends, and keep the order of the recording before. Bounded in time and size, so that a guest that runs for
//! days does not end up with all its memory in its working set.

use std::collections::HashSet;
use std::sync::Mutex;

use stasis_snapshot::manifest::Touch;

use crate::bus::lock;
use crate::memory::GRANULE_PAGES;
use crate::pages::PageSet;

/// Granules in a working set at most (1 GiB).
const MAX_GRANULES: usize = 512;

/// A recording.
pub(crate) struct WorkingSet {
    /// First pages of granules, from the snapshot that was restored.
    before: Vec<u64>,
    pages: u64,
    recording: Mutex<Recording>,
}

enum Recording {
    /// First pages of granules in the order of their faults.
    Open(Vec<u64>),
    Closed(Vec<u64>),
}

impl WorkingSet {
    /// Begins a recording for memory of `pages` pages, restored with this order.
    pub(crate) fn new(before: &[Touch], pages: u64) -> Self {
        let memory = before.iter().filter(|touch| touch.image as usize == super::MEMORY);
        let before = memory
            .flat_map(|touch| {
                let (start, end) =
                    (touch.start / GRANULE_PAGES, touch.start.saturating_add(touch.pages).div_ceil(GRANULE_PAGES));
                start..end.min(pages.div_ceil(GRANULE_PAGES))
            })
            .map(|granule| granule * GRANULE_PAGES)
            .take(MAX_GRANULES)
            .collect();
        Self { before, pages, recording: Mutex::new(Recording::Open(Vec::new())) }
    }

    /// Of a machine that booted: what it touched since says nothing about its next wake.
    pub(crate) fn unknown(pages: u64) -> Self {
        Self { before: Vec::new(), pages, recording: Mutex::new(Recording::Closed(Vec::new())) }
    }

    /// The granule that begins at `first_page` faulted.
    pub(crate) fn touched(&self, first_page: u64) {
        if let Recording::Open(order) = &mut *lock(&self.recording)
            && order.len() < MAX_GRANULES
        {
            order.push(first_page);
        }
    }

    /// Ends the recording, if it is still open: `mapped` are the pages that were touched in any way.
    pub(crate) fn close(&self, mapped: &PageSet) {
        let mut recording = lock(&self.recording);
        if let Recording::Open(faulted) = &*recording {
            *recording = Recording::Closed(merge(&self.before, faulted, mapped));
        }
    }

    /// Still recording.
    pub(crate) fn is_open(&self) -> bool {
        matches!(&*lock(&self.recording), Recording::Open(_))
    }

    /// The order as a manifest has it.
    pub(crate) fn order(&self) -> Vec<Touch> {
        let recording = lock(&self.recording);
        let (Recording::Open(granules) | Recording::Closed(granules)) = &*recording;
        let touch = |&start: &u64| Touch { image: 0, start, pages: GRANULE_PAGES.min(self.pages - start) };
        granules.iter().map(touch).collect()
    }
}

/// What was recorded before and is still used, then what faulted, then what else is mapped.
fn merge(before: &[u64], faulted: &[u64], mapped: &PageSet) -> Vec<u64> {
    let mapped: Vec<u64> = {
        let mut granules: Vec<u64> = mapped
            .runs()
            .into_iter()
            .flat_map(|run| run.start / GRANULE_PAGES..run.end.div_ceil(GRANULE_PAGES))
            .map(|granule| granule * GRANULE_PAGES)
            .collect();
        granules.dedup();
        granules
    };
    let used: HashSet<u64> = mapped.iter().chain(faulted).copied().collect();
    let mut seen = HashSet::new();
    let order = before.iter().filter(|granule| used.contains(granule)).chain(faulted).chain(&mapped);
    order.copied().filter(|granule| seen.insert(*granule)).take(MAX_GRANULES).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(granules: &[u64]) -> Vec<u64> {
        granules.iter().map(|g| g * GRANULE_PAGES).collect()
    }

    #[test]
    fn what_is_used_again_keeps_its_place_and_what_is_not_goes() {
        let mut mapped = PageSet::new(10 * GRANULE_PAGES);
        mapped.insert(3 * GRANULE_PAGES + 7..3 * GRANULE_PAGES + 9);
        mapped.insert(9 * GRANULE_PAGES..10 * GRANULE_PAGES);
        assert_eq!(merge(&pages(&[5, 3, 1]), &pages(&[8, 1]), &mapped), pages(&[3, 1, 8, 9]));
    }

    #[test]
    fn a_closed_recording_takes_nothing_more() {
        let total = 4 * GRANULE_PAGES + 3;
        let set = WorkingSet::new(&[Touch { image: 0, start: 1, pages: GRANULE_PAGES }], total);
        set.touched(4 * GRANULE_PAGES);
        set.close(&PageSet::new(total));
        set.touched(0);
        assert_eq!(set.order(), [Touch { image: 0, start: 4 * GRANULE_PAGES, pages: 3 }]);
    }
}
