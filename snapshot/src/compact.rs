//! Compaction: which pages a capture should write anew although they have not changed, so that old packs fall out of use.
//!
//! Two things are bounded: the share of a pack that nobody needs any more (it is stored and paid for all the same), and the number of
//! generations that a manifest names (a resume has that many places to read from). A pause pays for a bounded number of pages, so that a large
//! debt is paid off over several captures.
//!
//! Packs below a template's prefix are left alone: they are shared by all its clones, and nothing is freed by not needing them.

use std::{collections::HashMap, ops::Range};

use crate::{
    image::{ImageMap, PageRef},
    layout::{Part, Place},
    pack::PackEntry,
};

/// When to write anew, and how much at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// A pack of whose pages less than this many per cent are needed is written anew.
    pub live_percent: u8,
    /// Generations that the new manifest may name, its own included.
    pub generations: usize,
    /// Pages that one capture writes anew at most.
    pub pages: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { live_percent: 50, generations: 8, pages: 4096 }
    }
}

/// What the maps need of one pack.
struct Use<'a> {
    /// Its place in the list, which is by age: a capture appends its packs to its parent's.
    pack: usize,
    generation: &'a str,
    pages: u64,
    live: u64,
    /// Image, pages.
    runs: Vec<(usize, Range<u64>)>,
}

impl Use<'_> {
    fn live_per_mille(&self) -> u64 {
        self.live.min(self.pages) * 1000 / self.pages.max(1)
    }
}

/// For each map, the pages to write anew: sorted, disjoint, all of them in packs. `packs` and `maps` are those of the parent.
///
/// First the packs whose live share is too low, the emptiest first. Then, while there are too many generations, the one with the fewest
/// live pages: getting rid of that one costs least, whereas the oldest is as a rule the first capture and holds most of the image. Those
/// that hold no more than twice what is written anyway go with it, so that not every capture has to write one anew.
pub fn plan(packs: &[PackEntry], maps: &[ImageMap], limits: Limits) -> Vec<Vec<Range<u64>>> {
    let mut uses = uses(packs, maps);
    uses.retain(|used| used.live > 0);
    let mut plan = Plan { ranges: vec![Vec::new(); maps.len()], left: limits.pages };

    let low = u64::from(limits.live_percent) * 10;
    uses.sort_by_key(|used| (used.live_per_mille(), used.pack));
    let (sparse, mut dense): (Vec<_>, Vec<_>) = uses.into_iter().partition(|used| used.live_per_mille() < low);
    for used in &sparse {
        plan.take(used);
    }

    let mut generations: HashMap<&str, (u64, usize)> = HashMap::new();
    // What of the sparse ones did not fit still names its generation, and is dealt with by a later capture.
    for used in &dense {
        let (live, first) = generations.entry(used.generation).or_insert((0, used.pack));
        *live += used.live;
        *first = used.pack.min(*first);
    }
    let mut cheapest: Vec<_> = generations.into_iter().map(|(name, (live, first))| (live, first, name)).collect();
    cheapest.sort_unstable();
    let surplus = (cheapest.len() + 1).saturating_sub(limits.generations.max(1));
    dense.sort_by_key(|used| used.pack);
    let mut written = 0;
    for (n, (live, _, name)) in cheapest.into_iter().enumerate() {
        if surplus == 0 || (n >= surplus && live > 2 * written) {
            break;
        }
        written += live;
        dense.iter().filter(|used| used.generation == name).for_each(|used| plan.take(used));
    }
    plan.finish()
}

fn uses<'a>(packs: &'a [PackEntry], maps: &[ImageMap]) -> Vec<Use<'a>> {
    let mut uses: Vec<Option<Use<'a>>> = packs
        .iter()
        .enumerate()
        .map(|(pack, entry)| {
            let Some(Part::Generation { generation, .. }) = Place::of(&entry.key).map(|place| place.part) else {
                return None;
            };
            let pages = entry.frames.iter().map(|frame| u64::from(frame.pages)).sum();
            Some(Use { pack, generation, pages, live: 0, runs: Vec::new() })
        })
        .collect();
    for (image, map) in maps.iter().enumerate() {
        for run in map.runs() {
            if let PageRef::Pack { pack, .. } = run.at
                && let Some(Some(used)) = uses.get_mut(pack as usize)
            {
                used.live += run.pages;
                used.runs.push((image, run.start..run.end()));
            }
        }
    }
    uses.into_iter().flatten().collect()
}

struct Plan {
    ranges: Vec<Vec<Range<u64>>>,
    left: u64,
}

impl Plan {
    /// Takes as much of a pack as may still be taken. A part frees nothing yet, but what is left of the pack is sparser at the next capture.
    fn take(&mut self, used: &Use<'_>) {
        for (image, range) in &used.runs {
            let pages = (range.end - range.start).min(self.left);
            if pages > 0 {
                self.ranges[*image].push(range.start..range.start + pages);
                self.left -= pages;
            }
        }
    }

    fn finish(mut self) -> Vec<Vec<Range<u64>>> {
        for ranges in &mut self.ranges {
            ranges.sort_unstable_by_key(|range| range.start);
            ranges.dedup_by(|next, before| {
                let joined = before.end == next.start;
                if joined {
                    before.end = next.end;
                }
                joined
            });
        }
        self.ranges
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::{
        ids::{CommitId, Digest},
        image::Run,
        layout::Owner,
        pack::{Codec, FrameEntry},
    };

    const FRAME: u32 = 16;

    /// A pack of so many pages, stored as they are.
    fn entry(key: String, pages: u32) -> PackEntry {
        let frame = |n| {
            let pages = FRAME.min(pages - n * FRAME);
            let offset = 16 + n * FRAME * 4096;
            FrameEntry { offset, stored_len: pages * 4096, pages, codec: Codec::Raw, digest: Digest([0; 32]) }
        };
        let frames = (0..pages.div_ceil(FRAME)).map(frame).collect();
        PackEntry { key, size: 16 + pages * 4096, digest: Digest([0; 32]), frames, sealed: None }
    }

    fn key(seq: u64, n: u32) -> String {
        Owner::sandbox("t", "sb").unwrap().generation(seq, 1, CommitId([seq as u8; 16])).pack(n)
    }

    /// Writes `ranges` into packs of a new generation, as a capture does.
    fn capture(packs: &mut Vec<PackEntry>, maps: &mut [ImageMap], seq: u64, ranges: &[Vec<Range<u64>>]) {
        let mut n = 0;
        for (map, ranges) in maps.iter_mut().zip(ranges) {
            let pages: Vec<u64> = ranges.iter().flat_map(Clone::clone).collect();
            for pages in pages.chunks(4 * FRAME as usize) {
                let pack = packs.len() as u32;
                packs.push(entry(key(seq, n), pages.len() as u32));
                n += 1;
                let runs: Vec<Run> = pages
                    .iter()
                    .zip(0..)
                    .map(|(&start, i)| Run {
                        start,
                        pages: 1,
                        at: PageRef::Pack { pack, frame: i / FRAME, index: i % FRAME },
                    })
                    .collect();
                *map = map.overlay(&runs).unwrap();
            }
        }
        // What no page needs is not in a manifest.
        let needed: Vec<bool> = (0..packs.len())
            .map(|n| {
                maps.iter().any(|map| {
                    map.runs().iter().any(|run| matches!(run.at, PageRef::Pack { pack, .. } if pack as usize == n))
                })
            })
            .collect();
        let renumber = |old: u32| needed[..old as usize].iter().filter(|needed| **needed).count() as u32;
        maps.iter_mut().for_each(|map| *map = map.renumbered(renumber));
        let mut needed = needed.into_iter();
        packs.retain(|_| needed.next().unwrap());
    }

    fn generations(packs: &[PackEntry]) -> usize {
        let mut names: Vec<&str> = packs.iter().map(|pack| pack.key.split("/pack/").next().unwrap()).collect();
        names.sort_unstable();
        names.dedup();
        names.len()
    }

    #[test]
    fn a_pack_that_is_hardly_needed_is_written_anew() {
        let (mut packs, mut maps) = (Vec::new(), vec![ImageMap::zero(256)]);
        capture(&mut packs, &mut maps, 1, &[vec![0..64]]);
        capture(&mut packs, &mut maps, 2, &[vec![0..32]]);
        assert_eq!(plan(&packs, &maps, Limits::default()), [vec![]; 1], "half of it is needed");
        capture(&mut packs, &mut maps, 3, &[vec![40..41]]);
        assert_eq!(plan(&packs, &maps, Limits::default()), [vec![32..40, 41..64]]);
        assert_eq!(plan(&packs, &maps, Limits { pages: 10, ..Limits::default() }), [vec![32..40, 41..43]]);
        packs[0].key = "v1/template/ab/pack/0".into();
        assert_eq!(plan(&packs, &maps, Limits::default()), [vec![]], "a template's packs are shared");
    }

    #[test]
    fn the_cheapest_generations_go_when_there_are_too_many() {
        let (mut packs, mut maps) = (Vec::new(), vec![ImageMap::zero(600), ImageMap::zero(64)]);
        capture(&mut packs, &mut maps, 1, &[vec![0..300], vec![]]);
        for seq in 2..8 {
            assert_eq!(plan(&packs, &maps, Limits::default()), [vec![], vec![]], "before generation {seq}");
            let start = 300 + (seq - 2) * 16;
            capture(&mut packs, &mut maps, seq, &[vec![start..start + 16], vec![seq * 3..seq * 3 + 1]]);
        }
        capture(&mut packs, &mut maps, 8, &[vec![500..508], vec![]]);
        assert_eq!(generations(&packs), 8);
        // The next cheapest holds 17 pages, more than twice as many.
        let only: Vec<Range<u64>> = std::iter::once(500..508).collect();
        assert_eq!(plan(&packs, &maps, Limits::default()), [only, vec![]]);
        let next = plan(&packs, &maps, Limits { generations: 7, ..Limits::default() });
        assert_eq!(next[0], [300..396, 500..508]);
        assert_eq!(next[1].len(), 6);
    }

    /// What is dirty, and what the plan adds to it.
    fn together(dirty: &[Vec<Range<u64>>], plan: &[Vec<Range<u64>>]) -> Vec<Vec<Range<u64>>> {
        let pages = |ranges: &[Range<u64>]| ranges.iter().flat_map(Clone::clone).collect::<BTreeSet<u64>>();
        let both =
            dirty.iter().zip(plan).map(|(dirty, plan)| pages(dirty).union(&pages(plan)).copied().collect::<Vec<_>>());
        both.map(|pages| pages.into_iter().map(|page| page..page + 1).collect()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn plans_are_sound_and_bounded(
            dirty in prop::collection::vec((0usize..2, 0u64..500, 1u64..60), 1..30),
            pages in prop::sample::select(vec![0, 1, 30, 200, u64::MAX]),
        ) {
            let limits = Limits { pages, ..Limits::default() };
            let (mut packs, mut maps) = (Vec::new(), vec![ImageMap::zero(600), ImageMap::base(600, 300)]);
            let mut seq = 0;
            for (image, start, len) in dirty {
                let plan = plan(&packs, &maps, limits);
                prop_assert_eq!(plan.len(), 2);
                let mut total = 0;
                for (map, ranges) in maps.iter().zip(&plan) {
                    prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
                    for page in ranges.iter().flat_map(Clone::clone) {
                        let at = map.lookup(page);
                        prop_assert!(matches!(at, Some(PageRef::Pack { .. })), "{:?}", at);
                        total += 1;
                    }
                }
                prop_assert!(total <= pages);
                let mut written = vec![Vec::new(), Vec::new()];
                written[image].push(start..start + len);
                seq += 1;
                capture(&mut packs, &mut maps, seq, &together(&written, &plan));
                prop_assert!(pages < u64::MAX || generations(&packs) <= limits.generations);
            }
            // Nothing is written any more: what is hardly needed goes, and then no more is asked for.
            let sparse = Limits { generations: usize::MAX, pages: pages.max(30), ..limits };
            for _ in 0..100 {
                let plan = plan(&packs, &maps, sparse);
                if plan.iter().any(|ranges| !ranges.is_empty()) {
                    seq += 1;
                    capture(&mut packs, &mut maps, seq, &plan);
                }
            }
            prop_assert!(plan(&packs, &maps, sparse).iter().all(Vec::is_empty));
        }
    }
}
