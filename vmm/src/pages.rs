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

    /// The maximal runs of pages, ascending.
    pub(crate) fn runs(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (i, &word) in self.words.iter().enumerate() {
            let base = i as u64 * 64;
            let mut rest = word;
            while rest != 0 {
                let from = u64::from(rest.trailing_zeros());
                let len = u64::from((!(rest >> from)).trailing_zeros()).min(64 - from);
                let run = base + from..base + from + len;
                match runs.last_mut() {
                    Some(last) if last.end == run.start => last.end = run.end,
                    _ => runs.push(run.clone()),
                }
                if from + len == 64 {
                    break;
                }
                rest &= u64::MAX << (from + len);
            }
        }
        runs
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
        fn behaves_like_a_set_of_numbers(pages in 1_u64..400, steps in prop::collection::vec((any::<bool>(), 0_u64..420, 0_u64..200), 0..12)) {
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
