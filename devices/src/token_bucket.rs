//! How much may happen in a time: a token bucket that may go into debt.
//!
//! What something costs is often known only when it has happened (a frame's length is known when it was read). So a bucket lets anything through
//! while it holds something, and then waits until its debt is paid. Time comes in from outside.

use std::time::{Duration, Instant};

const NANOSECONDS: u128 = 1_000_000_000;

/// A bucket of tokens.
#[derive(Debug)]
pub struct TokenBucket {
    per_second: u64,
    burst: u64,
    /// Negative: a debt.
    level: i128,
    /// Up to when `level` counts.
    counted: Instant,
}

impl TokenBucket {
    /// A full bucket that gets `per_second` tokens a second, at least 1, and holds `burst` at most.
    pub fn new(per_second: u64, burst: u64, now: Instant) -> Self {
        Self { per_second: per_second.max(1), burst, level: burst.into(), counted: now }
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.counted).as_nanos();
        let tokens = elapsed.saturating_mul(self.per_second.into()) / NANOSECONDS;
        if tokens == 0 {
            return;
        }
        self.level += i128::try_from(tokens).unwrap_or(i128::MAX / 2);
        if self.level >= i128::from(self.burst) {
            self.level = self.burst.into();
            self.counted = now;
        } else {
            // Only what whole tokens took, rounded up: the rest of the time counts for the next one.
            self.counted += nanoseconds((tokens * NANOSECONDS).div_ceil(self.per_second.into()));
        }
    }

    /// When something may happen; none: now.
    pub fn opens(&mut self, now: Instant) -> Option<Instant> {
        self.refill(now);
        if self.level > 0 {
            return None;
        }
        let missing = (1 - self.level).unsigned_abs();
        Some(self.counted + nanoseconds((missing * NANOSECONDS).div_ceil(self.per_second.into())))
    }

    /// Something has happened that costs so many tokens.
    pub fn take(&mut self, tokens: u64) {
        self.level -= i128::from(tokens);
    }
}

fn nanoseconds(count: u128) -> Duration {
    Duration::from_nanos(u64::try_from(count).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MOST: u64 = 65_553;

    proptest! {
        /// Whatever is asked at whatever times, not more happens than burst, rate and the one debt allow, and it opens when it says.
        #[test]
        fn the_rate_holds_over_any_history(
            rate in 1_u64..3_000_000_000,
            burst in 1_u64..10_000_000,
            steps in prop::collection::vec((0_u64..50_000_000, 1..MOST), 1..200),
        ) {
            let start = Instant::now();
            let mut now = start;
            let mut bucket = TokenBucket::new(rate, burst, start);
            let mut happened = 0_u128;
            for (wait, tokens) in steps {
                now += Duration::from_nanos(wait);
                if let Some(at) = bucket.opens(now) {
                    prop_assert!(at > now);
                    prop_assert_eq!(bucket.opens(at), None);
                    // It has counted up to `at`: the clock goes on from there.
                    now = at;
                }
                bucket.take(tokens);
                happened += u128::from(tokens);
                let allowed = u128::from(rate) * (now - start).as_nanos() / NANOSECONDS + u128::from(burst + MOST + 1);
                prop_assert!(happened <= allowed, "{happened} of {allowed}");
            }
        }
    }
}
