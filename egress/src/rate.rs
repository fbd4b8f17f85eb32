//! Limits over time. The clock is the caller's.

use std::collections::HashSet;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// So many a second, and so many at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Refilled each second.
    pub a_second: u32,
    /// Held at most.
    pub burst: u32,
}

/// A token bucket.
#[derive(Debug)]
pub(crate) struct Bucket {
    rate: Rate,
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    pub(crate) fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, tokens: f64::from(rate.burst), filled: now }
    }

    /// Takes one; false when there is none.
    pub(crate) fn take(&mut self, now: Instant) -> bool {
        let gained = now.saturating_duration_since(self.filled).as_secs_f64() * f64::from(self.rate.a_second);
        self.tokens = (self.tokens + gained).min(f64::from(self.rate.burst));
        self.filled = now;
        let there = self.tokens >= 1.0;
        if there {
            self.tokens -= 1.0;
        }
        there
    }
}

/// So many different things in a window of time. What was counted in it may come again.
#[derive(Debug)]
pub(crate) struct Distinct<T> {
    most: usize,
    window: Duration,
    began: Instant,
    seen: HashSet<T>,
}

impl<T: Eq + Hash> Distinct<T> {
    pub(crate) fn new(most: usize, window: Duration, now: Instant) -> Self {
        Self { most, window, began: now, seen: HashSet::new() }
    }

    /// Counts `thing`; false when it is one too many.
    pub(crate) fn take(&mut self, thing: T, now: Instant) -> bool {
        if now.saturating_duration_since(self.began) >= self.window {
            self.seen.clear();
            self.began = now;
        }
        if self.seen.contains(&thing) {
            return true;
        }
        self.seen.len() < self.most && self.seen.insert(thing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_more_than_the_rate_passes(steps in prop::collection::vec(0_u64..300, 1..200)) {
            let start = Instant::now();
            let mut bucket = Bucket::new(Rate { a_second: 10, burst: 5 }, start);
            let (mut now, mut passed) = (Duration::ZERO, 0_u32);
            for step in steps {
                now += Duration::from_millis(step);
                passed += u32::from(bucket.take(start + now));
            }
            prop_assert!(f64::from(passed) <= 5.0 + now.as_secs_f64() * 10.0 + 1e-6);
            prop_assert!(passed >= 1);
        }
    }

    #[test]
    fn a_window_takes_so_many_and_the_same_again() {
        let start = Instant::now();
        let mut names = Distinct::new(2, Duration::from_mins(1), start);
        assert!(names.take("a", start) && names.take("b", start) && names.take("a", start));
        assert!(!names.take("c", start + Duration::from_secs(59)));
        assert!(names.take("c", start + Duration::from_mins(1)));
    }
}
