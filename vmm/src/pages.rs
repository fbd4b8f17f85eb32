//! A set of image pages: one bit a page, worked on by words, handed out as runs.

use std::ops::Range;

/// A set of page numbers below a fixed bound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// The empty set of pages below `pages`.
    pub(crate) fn new(pages: u64) -> Self {
        Self { words: vec![0; pages.div_ceil(64) as usize], pages }
    }

    /// Page numbers are below this.
    pub(crate) fn bound(&self) -> u64 {
        self.pages
    }

    /// Adds a range; pages past the bound are ignored.
    pub(crate) fn insert(&mut self, range: Range<u64>) {
        self.each_word(range, |word, mask| *word |= mask);
    }

    /// Takes a range out.
    pub(crate) fn remove(&mut self, range: Range<u64>) {
        self.each_word(range, |word, mask| *word &= !mask);
    }

    /// Adds every page of `other`, which has the same bound.
    pub(crate) fn union(&mut self, other: &PageSet) {
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
    }

    /// Takes out every page that `other`, which has the same bound, does not have.
    pub(crate) fn intersect(&mut self, other: &PageSet) {
        for (word, only) in self.words.iter_mut().zip(&other.words) {
            *word &= only;
        }
    }

    /// Takes out every page of `other`, which has the same bound.
    pub(crate) fn subtract(&mut self, other: &PageSet) {
        for (word, less) in self.words.iter_mut().zip(&other.words) {
            *word &= !less;
        }
    }

    /// Whether every page of the range is in.
    pub(crate) fn contains_all(&self, range: Range<u64>) -> bool {
        let mut at = range.start;
        while at < range.end {
            let bit = at % 64;
            let len = (64 - bit).min(range.end - at);
            let mask = if len == 64 { u64::MAX } else { ((1 << len) - 1) << bit };
            if self.words.get((at / 64) as usize).is_none_or(|word| word & mask != mask) {
                return false;
            }
            at += len;
        }
        true
    }

    /// Adds bits in KVM's dirty-log layout: bit `i` of `words` is page `first + i`, and `first` is a multiple of 64.
    pub(crate) fn union_words(&mut self, first: u64, words: &[u64]) {
        let start = (first / 64) as usize;
        for (word, more) in self.words.iter_mut().skip(start).zip(words) {
            *word |= more;
        }
        self.trim();
    }

    /// How many pages are in.
    pub(crate) fn len(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// The maximal runs of pages within `range`, ascending.
    pub(crate) fn runs_within(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let end = range.end.min(self.pages);
        let mut runs = Vec::new();
        let mut at = range.start;
        while let Some(start) = self.next(at, end, true) {
            let stop = self.next(start, end, false).unwrap_or(end);
            runs.push(start..stop);
            at = stop;
        }
        runs
    }

    /// The first page in `from..end` whose membership is `member`.
    fn next(&self, from: u64, end: u64, member: bool) -> Option<u64> {
        let mut at = from;
        while at < end {
            let word = *self.words.get((at / 64) as usize)?;
            let candidates = if member { word } else { !word } >> (at % 64);
            if candidates != 0 {
                let found = at + u64::from(candidates.trailing_zeros());
                return (found < end).then_some(found);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    /// The maximal runs of pages, ascending.
    pub(crate) fn runs(&self) -> Vec<Range<u64>> {
        self.runs_within(0..self.pages)
    }

    fn each_word(&mut self, range: Range<u64>, f: impl Fn(&mut u64, u64)) {
        let end = range.end.min(self.pages);
        let mut at = range.start;
        while at < end {
            let bit = at % 64;
            let len = (64 - bit).min(end - at);
            let mask = if len == 64 { u64::MAX } else { ((1 << len) - 1) << bit };
            f(&mut self.words[(at / 64) as usize], mask);
            at += len;
        }
    }

    fn trim(&mut self) {
        let used = self.pages % 64;
        if used != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << used) - 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_like_a_set_of_numbers(pages in 1_u64..400, steps in prop::collection::vec((any::<bool>(), 0_u64..420, 0_u64..200), 0..12), window in (0_u64..420, 0_u64..420)) {
            let mut set = PageSet::new(pages);
            let mut model = BTreeSet::new();
            for (add, from, len) in steps {
                if add {
                    set.insert(from..from + len);
                    model.extend((from..from + len).filter(|p| *p < pages));
                } else {
                    set.remove(from..from + len);
                    model.retain(|p| !(from..from + len).contains(p));
                }
            }
            prop_assert_eq!(set.runs().into_iter().flatten().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.len(), model.len() as u64);
            prop_assert!(set.runs().windows(2).all(|w| w[0].end < w[1].start));
            let (from, to) = window;
            prop_assert_eq!(set.runs_within(from..to).into_iter().flatten().collect::<Vec<_>>(), model.range(from..to.max(from)).copied().collect::<Vec<_>>());
            prop_assert_eq!(set.contains_all(from..to), (from..to).all(|p| model.contains(&p)));
        }
    }

    #[test]
    fn words_past_the_last_page_are_not_pages() {
        let mut set = PageSet::new(70);
        set.union_words(0, &[0, u64::MAX]);
        assert_eq!(set.runs(), vec![64..70]);
        assert_eq!(set.len(), 6);
    }
}
