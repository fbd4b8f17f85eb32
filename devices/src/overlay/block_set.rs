//! A set of block numbers below a fixed bound, one bit each, with ranges in and ranges out.

use std::ops::Range;

const BITS: u64 = u64::BITS as u64;

/// The set. Numbers at or above the bound are never members.
#[derive(Clone, Debug)]
pub(super) struct BlockSet {
    words: Vec<u64>,
    bound: u64,
}

impl BlockSet {
    /// No members, out of `bound` possible ones.
    pub(super) fn new(bound: u64) -> Self {
        Self { words: vec![0; bound.div_ceil(BITS) as usize], bound }
    }

    pub(super) fn contains(&self, block: u64) -> bool {
        block < self.bound && self.words[(block / BITS) as usize] & 1 << (block % BITS) != 0
    }

    pub(super) fn insert(&mut self, range: &Range<u64>) {
        self.change(range, |word, bits| *word |= bits);
    }

    pub(super) fn remove(&mut self, range: &Range<u64>) {
        self.change(range, |word, bits| *word &= !bits);
    }

    fn change(&mut self, range: &Range<u64>, change: impl Fn(&mut u64, u64)) {
        let mut at = range.start;
        let end = range.end.min(self.bound);
        while at < end {
            let bit = at % BITS;
            let count = (BITS - bit).min(end - at);
            change(&mut self.words[(at / BITS) as usize], u64::MAX >> (BITS - count) << bit);
            at += count;
        }
    }

    pub(super) fn clear(&mut self) {
        self.words.fill(0);
    }

    pub(super) fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    pub(super) fn ranges(&self) -> Vec<Range<u64>> {
        self.ranges_within(&(0..self.bound))
    }

    /// Members inside `window`, as maximal ascending ranges.
    pub(super) fn ranges_within(&self, window: &Range<u64>) -> Vec<Range<u64>> {
        let mut ranges = Vec::new();
        let end = window.end.min(self.bound);
        let mut at = self.next(window.start, end, true);
        while at < end {
            let stop = self.next(at, end, false);
            ranges.push(at..stop);
            at = self.next(stop, end, true);
        }
        ranges
    }

    /// The first number from `from` on whose membership is `member`; `end` if there is none below it.
    fn next(&self, from: u64, end: u64, member: bool) -> u64 {
        let mut at = from;
        while at < end {
            let word = self.words[(at / BITS) as usize];
            let candidates = if member { word } else { !word } >> (at % BITS);
            if candidates != 0 {
                return (at + u64::from(candidates.trailing_zeros())).min(end);
            }
            at = (at / BITS + 1) * BITS;
        }
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn agrees_with_a_plain_set(
            bound in 1u64..300,
            changes in prop::collection::vec((0u64..320, 0u64..140, any::<bool>()), 0..8),
            window in (0u64..320, 0u64..320),
        ) {
            let mut set = BlockSet::new(bound);
            let mut model = BTreeSet::new();
            for (start, len, insert) in changes {
                if insert {
                    set.insert(&(start..start + len));
                    model.extend((start..start + len).filter(|&block| block < bound));
                } else {
                    set.remove(&(start..start + len));
                    model.retain(|block| !(start..start + len).contains(block));
                }
            }
            prop_assert_eq!(set.len(), model.len() as u64);
            for block in 0..330 {
                prop_assert_eq!(set.contains(block), model.contains(&block));
            }
            let ranges = set.ranges_within(&(window.0..window.1));
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start), "maximal and ascending");
            let members: BTreeSet<u64> = ranges.into_iter().flatten().collect();
            prop_assert_eq!(members, model.into_iter().filter(|block| (window.0..window.1).contains(block)).collect());
        }
    }
}
