//! Ranges of pages.

use std::ops::Range;

/// The same pages as sorted, disjoint ranges.
pub(super) fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// Whether sorted, disjoint ranges contain `page`.
pub(super) fn contains(ranges: &[Range<u64>], page: u64) -> bool {
    let after = ranges.partition_point(|range| range.start <= page);
    after.checked_sub(1).and_then(|at| ranges.get(at)).is_some_and(|range| range.contains(&page))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joined_ranges_are_sorted_and_disjoint() {
        let ranges = joined(vec![5..9, 0..2, 2..3, 7..12, 20..20, 14..15]);
        assert_eq!(ranges, [0..3, 5..12, 14..15]);
        let pages: Vec<_> = (0..30).filter(|&page| contains(&ranges, page)).collect();
        assert_eq!(pages, [0, 1, 2, 5, 6, 7, 8, 9, 10, 11, 14]);
    }
}
