//! Images: a sequence of pages, and for each page where its bytes are. Memory and disks alike.
//!
//! A map is a list of runs that covers every page exactly once, in order, so that a mostly empty image is a few runs long.
//! Maps are plain values: a new generation is the parent's map with newer runs laid over it.

use std::{collections::BTreeMap, sync::Arc};

use crate::pack::PackEntry;

/// Pages an image has at most (16 TiB).
pub const MAX_PAGES: u64 = 1 << 32;

/// Where the bytes of one page are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageRef {
    /// The page is all zero.
    Zero,
    /// Page `index` of frame `frame` of pack `pack`, counted in the manifest's pack list.
    Pack {
        /// Position in the pack list.
        pack: u32,
        /// Position in the pack's frame list.
        frame: u32,
        /// Position in the frame.
        index: u32,
    },
    /// The page equals this block (4 KiB) of the template's disk.
    Base {
        /// Block number.
        block: u64,
    },
}

/// Consecutive pages whose bytes are at consecutive places: blocks of the base, or pages of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Run {
    /// First page.
    pub start: u64,
    /// How many pages, at least one.
    pub pages: u64,
    /// Where the first page is.
    pub at: PageRef,
}

/// Where every page of an image is. Covers pages `0..pages()` exactly once, in order; neighbours that could be one run are one run. Clones share
/// their runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageMap {
    runs: Arc<Vec<Run>>,
    pages: u64,
}

/// Why runs are no map, or a map does not fit its packs and base.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum MapError {
    #[error("image of {0} pages: at most {MAX_PAGES}")]
    TooLarge(u64),
    #[error("empty run at page {0}")]
    EmptyRun(u64),
    #[error("run begins at page {start}, expected {expected}: pages must be covered once and in order")]
    Gap { start: u64, expected: u64 },
    #[error("run at page {start} ends beyond the image's {pages} pages")]
    Beyond { start: u64, pages: u64 },
    #[error("page {page} refers to pack {pack}; there are {packs}")]
    NoSuchPack { page: u64, pack: u32, packs: usize },
    #[error("page {page} refers to frame {frame} of pack {key}, which has {frames}")]
    NoSuchFrame { page: u64, frame: u32, key: String, frames: usize },
    #[error("page {page} refers to page {index} of frame {frame} of pack {key}, which has {pages}")]
    NoSuchIndex { page: u64, frame: u32, key: String, index: u64, pages: u32 },
    #[error("page {page} refers to base block {block}; the base has {blocks}")]
    NoSuchBlock { page: u64, block: u64, blocks: u64 },
}

impl PageRef {
    /// The place `pages` further on in the same run. Saturates: the result is only meaningful within a valid run.
    #[must_use]
    pub fn advance(self, pages: u64) -> Self {
        match self {
            Self::Zero => Self::Zero,
            Self::Pack { pack, frame, index } => Self::Pack {
                pack,
                frame,
                index: u32::try_from(u64::from(index).saturating_add(pages)).unwrap_or(u32::MAX),
            },
            Self::Base { block } => Self::Base { block: block.saturating_add(pages) },
        }
    }
}

impl Run {
    /// The page after the last.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.pages)
    }
}

impl ImageMap {
    /// An image of `pages` zero pages. `pages` above [`MAX_PAGES`] are cut off.
    pub fn zero(pages: u64) -> Self {
        Self::base(pages, 0)
    }

    /// An image whose page `i` equals base block `i` for the first `blocks` blocks, and is zero beyond.
    pub fn base(pages: u64, blocks: u64) -> Self {
        let pages = pages.min(MAX_PAGES);
        let blocks = blocks.min(pages);
        let mut runs = Vec::new();
        for (start, end, at) in [(0, blocks, PageRef::Base { block: 0 }), (blocks, pages, PageRef::Zero)] {
            if start < end {
                runs.push(Run { start, pages: end - start, at });
            }
        }
        Self { runs: Arc::new(runs), pages }
    }

    /// A map from runs that cover `pages` pages once and in order. For input that is not trusted; checks all but the references.
    pub fn from_runs(pages: u64, input: impl IntoIterator<Item = Run>) -> Result<Self, MapError> {
        if pages > MAX_PAGES {
            return Err(MapError::TooLarge(pages));
        }
        let mut runs = Vec::new();
        let mut expected = 0;
        for run in input {
            if run.pages == 0 {
                return Err(MapError::EmptyRun(run.start));
            }
            if run.start != expected {
                return Err(MapError::Gap { start: run.start, expected });
            }
            if run.pages > pages - run.start {
                return Err(MapError::Beyond { start: run.start, pages });
            }
            expected = run.end();
            push(&mut runs, run);
        }
        if expected == pages {
            Ok(Self { runs: Arc::new(runs), pages })
        } else {
            Err(MapError::Gap { start: pages, expected })
        }
    }

    /// Checks every reference against the packs and the number of base blocks (0 without a base).
    pub fn check(&self, packs: &[PackEntry], base_blocks: u64) -> Result<(), MapError> {
        for run in self.runs.iter() {
            let page = run.start;
            match run.at {
                PageRef::Zero => {}
                PageRef::Base { block } => {
                    if block > base_blocks || run.pages > base_blocks - block {
                        return Err(MapError::NoSuchBlock {
                            page,
                            block: block.saturating_add(run.pages - 1),
                            blocks: base_blocks,
                        });
                    }
                }
                PageRef::Pack { pack, frame, index } => {
                    let entry =
                        packs.get(pack as usize).ok_or(MapError::NoSuchPack { page, pack, packs: packs.len() })?;
                    let in_frame = entry.frames.get(frame as usize).ok_or_else(|| MapError::NoSuchFrame {
                        page,
                        frame,
                        key: entry.key.clone(),
                        frames: entry.frames.len(),
                    })?;
                    let end = u64::from(index).saturating_add(run.pages);
                    if end > u64::from(in_frame.pages) {
                        return Err(MapError::NoSuchIndex {
                            page,
                            frame,
                            key: entry.key.clone(),
                            index: end - 1,
                            pages: in_frame.pages,
                        });
                    }
                }
            }
        }
        Ok(())
    }

    /// Pages in the image.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The runs, in order.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Where `page` is; `None` beyond the image.
    pub fn lookup(&self, page: u64) -> Option<PageRef> {
        if page >= self.pages {
            return None;
        }
        let after = self.runs.partition_point(|run| run.start <= page);
        let run = self.runs.get(after.checked_sub(1)?)?;
        Some(run.at.advance(page - run.start))
    }

    /// This map with `newer` laid over it. The newer runs may come in any order; where two of them cover a page, the later one wins.
    pub fn overlay(&self, newer: &[Run]) -> Result<Self, MapError> {
        for run in newer {
            if run.pages == 0 {
                return Err(MapError::EmptyRun(run.start));
            }
            if run.start > self.pages || run.pages > self.pages - run.start {
                return Err(MapError::Beyond { start: run.start, pages: self.pages });
            }
        }
        let mut top = newer.to_vec();
        top.sort_by_key(|run| run.start);
        if top.windows(2).any(|pair| pair[0].end() > pair[1].start) {
            top = layered(newer);
        }
        let mut runs = Vec::with_capacity(self.runs.len() + 2 * top.len());
        let mut below = Cursor { runs: &self.runs, page: 0 };
        for run in top {
            below.copy_until(run.start, &mut runs);
            push(&mut runs, run);
            below.skip_until(run.end());
        }
        below.copy_until(self.pages, &mut runs);
        Ok(Self { runs: Arc::new(runs), pages: self.pages })
    }

    /// The same map with every pack number replaced by `renumber(pack)`.
    #[must_use]
    pub(crate) fn renumbered(&self, renumber: impl Fn(u32) -> u32) -> Self {
        let mut map = self.clone();
        for run in Arc::make_mut(&mut map.runs) {
            if let PageRef::Pack { pack, .. } = &mut run.at {
                *pack = renumber(*pack);
            }
        }
        map
    }
}

/// Appends `run`, joined to the last one where the two are one run.
fn push(runs: &mut Vec<Run>, run: Run) {
    if let Some(last) = runs.last_mut()
        && last.end() == run.start
        && last.at.advance(last.pages) == run.at
    {
        last.pages += run.pages;
    } else {
        runs.push(run);
    }
}

/// Walks a map once, from page 0 up.
struct Cursor<'a> {
    /// From the run that holds `page` on.
    runs: &'a [Run],
    page: u64,
}

impl Cursor<'_> {
    fn copy_until(&mut self, end: u64, into: &mut Vec<Run>) {
        while self.page < end
            && let Some(run) = self.runs.first()
        {
            let until = run.end().min(end);
            if until > self.page {
                push(
                    into,
                    Run { start: self.page, pages: until - self.page, at: run.at.advance(self.page - run.start) },
                );
            }
            self.skip_until(until);
        }
    }

    fn skip_until(&mut self, page: u64) {
        self.page = self.page.max(page);
        while let Some(run) = self.runs.first()
            && run.end() <= self.page
        {
            self.runs = &self.runs[1..];
        }
    }
}

/// Runs without overlaps, sorted: of two that cover a page the later one in the list wins.
fn layered(runs: &[Run]) -> Vec<Run> {
    let mut layers: BTreeMap<u64, Run> = BTreeMap::new();
    for &run in runs {
        if let Some((_, below)) = layers.range_mut(..run.start).next_back()
            && below.end() > run.start
        {
            let whole = *below;
            below.pages = run.start - whole.start;
            insert_tail(&mut layers, whole, run.end());
        }
        while let Some((&start, &covered)) = layers.range(run.start..run.end()).next() {
            layers.remove(&start);
            insert_tail(&mut layers, covered, run.end());
        }
        layers.insert(run.start, run);
    }
    layers.into_values().collect()
}

/// What is left of `run` from page `from` on.
fn insert_tail(layers: &mut BTreeMap<u64, Run>, run: Run, from: u64) {
    if run.end() > from {
        layers.insert(from, Run { start: from, pages: run.end() - from, at: run.at.advance(from - run.start) });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 48;

    fn any_ref() -> impl Strategy<Value = PageRef> {
        prop_oneof![
            Just(PageRef::Zero),
            (0u32..3, 0u32..2, 0u32..8).prop_map(|(pack, frame, index)| PageRef::Pack { pack, frame, index }),
            (0u64..PAGES).prop_map(|block| PageRef::Base { block }),
        ]
    }

    fn any_run() -> impl Strategy<Value = Run> {
        (0..PAGES, 1u64..12, any_ref()).prop_map(|(start, pages, at)| Run {
            start,
            pages: pages.min(PAGES - start),
            at,
        })
    }

    /// The naive model: one reference a page.
    fn lay(model: &mut [PageRef], run: Run) {
        for offset in 0..run.pages {
            model[(run.start + offset) as usize] = run.at.advance(offset);
        }
    }

    fn canonical(map: &ImageMap) -> bool {
        map.runs()
            .windows(2)
            .all(|pair| pair[0].end() == pair[1].start && pair[0].at.advance(pair[0].pages) != pair[1].at)
    }

    proptest! {
        #[test]
        fn overlays_equal_the_model(
            blocks in 0..PAGES,
            generations in prop::collection::vec(prop::collection::vec(any_run(), 0..12), 1..5),
        ) {
            let mut map = ImageMap::base(PAGES, blocks);
            let mut model: Vec<_> = (0..PAGES)
                .map(|page| if page < blocks { PageRef::Base { block: page } } else { PageRef::Zero })
                .collect();
            for newer in generations {
                map = map.overlay(&newer).unwrap();
                for run in newer {
                    lay(&mut model, run);
                }
                for page in 0..PAGES {
                    prop_assert_eq!(map.lookup(page), Some(model[page as usize]));
                }
                prop_assert_eq!(map.lookup(PAGES), None);
                prop_assert!(canonical(&map), "{:?}", map);
                prop_assert_eq!(ImageMap::from_runs(PAGES, map.runs().iter().copied()), Ok(map.clone()));
            }
        }

        #[test]
        fn runs_that_do_not_cover_the_image_once_in_order_are_refused(
            runs in prop::collection::vec(any_run(), 0..4),
        ) {
            let covers = runs.iter().try_fold(0, |at, run| (run.start == at).then(|| run.end())) == Some(PAGES);
            prop_assert_eq!(ImageMap::from_runs(PAGES, runs).is_ok(), covers);
        }
    }

    #[test]
    fn a_large_empty_image_is_one_run() {
        assert_eq!(ImageMap::zero(2 << 20).runs().len(), 1);
        assert_eq!(ImageMap::base(2 << 20, 1 << 18).runs().len(), 2);
        assert_eq!(ImageMap::zero(0).runs().len(), 0);
    }

    #[test]
    fn references_out_of_range_are_named() {
        let map = |at| ImageMap::zero(4).overlay(&[Run { start: 1, pages: 2, at }]).unwrap();
        let packs = [crate::pack::test_entry("p", &[8])];
        let pack = |pack, frame, index| map(PageRef::Pack { pack, frame, index });
        assert_eq!(pack(0, 0, 6).check(&packs, 0), Ok(()));
        assert!(matches!(pack(1, 0, 0).check(&packs, 0), Err(MapError::NoSuchPack { pack: 1, .. })));
        assert!(matches!(pack(0, 1, 0).check(&packs, 0), Err(MapError::NoSuchFrame { frame: 1, .. })));
        assert!(matches!(pack(0, 0, 7).check(&packs, 0), Err(MapError::NoSuchIndex { index: 8, .. })));
        let base = map(PageRef::Base { block: 5 });
        assert_eq!(base.check(&packs, 7), Ok(()));
        assert!(matches!(base.check(&packs, 6), Err(MapError::NoSuchBlock { block: 6, .. })));
        assert!(matches!(
            ImageMap::zero(4).overlay(&[Run { start: 3, pages: u64::MAX, at: PageRef::Zero }]),
            Err(MapError::Beyond { .. })
        ));
    }
}
