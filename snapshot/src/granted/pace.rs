//! When to send a request a second time: before it failed (hedging), and after (backoff).
//!
//! A hedge is for the one request in twenty that is stuck on a slow path, not for a store that is slow as a whole: the limit follows the
//! requests around it, and hedges are one, and beyond that at most a tenth of all requests.

#![expect(clippy::cast_precision_loss, reason = "estimates")]

use std::{
    collections::VecDeque,
    hash::{BuildHasher, Hasher, RandomState},
    time::Duration,
};

/// Requests remembered.
const SAMPLES: usize = 64;
/// Fewer say nothing.
const FEWEST: usize = 4;
/// No request is hedged earlier: below this the second connection costs more than the wait.
const FLOOR: Duration = Duration::from_millis(50);
/// One of so many requests may be hedged.
const BUDGET: u64 = 10;

/// How long requests of one kind take.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Time and bytes of the last ones that succeeded.
    samples: VecDeque<(Duration, u64)>,
    started: u64,
    hedged: u64,
}

impl Pace {
    /// A request of so many bytes begins. After how long it may be hedged, if that is known.
    pub(super) fn begin(&mut self, bytes: u64) -> Option<Duration> {
        self.started += 1;
        if self.samples.len() < FEWEST {
            return None;
        }
        // A larger request may take longer in proportion; a smaller one no less, because part of the time is not the bytes'.
        let scaled = |(took, of): &(Duration, u64)| took.mul_f64((bytes as f64 / (*of as f64).max(1.0)).max(1.0));
        let mut times: Vec<_> = self.samples.iter().map(scaled).collect();
        times.sort_unstable();
        let p95 = times[(times.len() * 95).div_ceil(100) - 1];
        Some(p95.max(FLOOR))
    }

    /// Whether one more request may be sent twice; counts it.
    pub(super) fn hedge(&mut self) -> bool {
        let may = self.hedged * BUDGET <= self.started;
        self.hedged += u64::from(may);
        may
    }

    /// A request of so many bytes succeeded.
    pub(super) fn succeeded(&mut self, took: Duration, bytes: u64) {
        if self.samples.len() == SAMPLES {
            self.samples.pop_front();
        }
        self.samples.push_back((took, bytes));
    }
}

/// Between half of `wait` and all of it, so that those who failed together do not come back together.
pub(super) fn jittered(wait: Duration) -> Duration {
    let random = RandomState::new().build_hasher().finish();
    wait.mul_f64(0.5 + (random >> 11) as f64 / (1u64 << 54) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn the_limit_is_the_95th_percentile_of_the_siblings() {
        let mut pace = Pace::default();
        for n in 0..FEWEST as u64 {
            assert_eq!(pace.begin(MIB), None);
            pace.succeeded(ms(104 + n), MIB);
        }
        assert_eq!(pace.begin(MIB), Some(ms(107)));
        assert_eq!(pace.begin(4 * MIB), Some(ms(428)));
        assert_eq!(pace.begin(1), Some(ms(107)));
        // One outlier in more than twenty does not move it; what is long past is forgotten.
        (0..30).for_each(|_| pace.succeeded(ms(100), MIB));
        pace.succeeded(ms(9000), MIB);
        assert_eq!(pace.begin(MIB), Some(ms(107)));
        (0..SAMPLES).for_each(|_| pace.succeeded(ms(1), MIB));
        assert_eq!(pace.begin(MIB), Some(FLOOR));
    }

    #[test]
    fn hedges_are_one_and_a_tenth() {
        let mut pace = Pace::default();
        let mut hedged = 0;
        for started in 1..=1000 {
            pace.begin(MIB);
            hedged += u64::from(pace.hedge()) + u64::from(pace.hedge());
            assert_eq!(hedged, 1 + started / BUDGET);
        }
    }

    #[test]
    fn waits_differ_and_stay_within_bounds() {
        let waits: Vec<_> = (0..100).map(|_| jittered(ms(100))).collect();
        assert!(waits.iter().all(|wait| (ms(50)..=ms(100)).contains(wait)));
        assert!(waits.iter().any(|wait| *wait != waits[0]));
    }
}
