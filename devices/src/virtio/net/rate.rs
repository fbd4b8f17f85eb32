//! How much may pass in a time, in bytes and in packets.

use std::time::{Duration, Instant};

use crate::token_bucket::TokenBucket;

/// Limits of one direction. Without one, nothing is limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimit {
    /// Bytes of frames a second, at least 1.
    pub bytes_per_second: Option<u64>,
    /// Packets a second, at least 1. A frame that will be segmented counts as its segments.
    pub packets_per_second: Option<u64>,
    /// Bytes that may pass at once after a pause; what flows in [`BURST`] when absent.
    pub burst_bytes: Option<u64>,
    /// Packets that may.
    pub burst_packets: Option<u64>,
}

/// What may pass at once after a pause, where nobody says: what flows in this time, but not less than the two constants below.
const BURST: Duration = Duration::from_millis(100);
const BURST_BYTES: u64 = 128 * 1024;
const BURST_PACKETS: u64 = 64;

/// A bucket that holds `burst`, or what flows in [`BURST`], or `least`.
fn bucket(per_second: u64, burst: Option<u64>, least: u64, now: Instant) -> TokenBucket {
    let usual = u128::from(per_second) * BURST.as_millis() / 1000;
    let usual = u64::try_from(usual).unwrap_or(u64::MAX).max(least);
    // An empty bucket would never open.
    TokenBucket::new(per_second, burst.unwrap_or(usual).max(1), now)
}

/// The limits of one direction at work.
#[derive(Debug)]
pub(super) struct Limiter {
    bytes: Option<TokenBucket>,
    packets: Option<TokenBucket>,
}

impl Limiter {
    pub(super) fn new(limit: RateLimit, now: Instant) -> Self {
        Self {
            bytes: limit.bytes_per_second.map(|rate| bucket(rate, limit.burst_bytes, BURST_BYTES, now)),
            packets: limit.packets_per_second.map(|rate| bucket(rate, limit.burst_packets, BURST_PACKETS, now)),
        }
    }

    /// When the next frame may pass; none: now.
    pub(super) fn opens(&mut self, now: Instant) -> Option<Instant> {
        let bytes = self.bytes.as_mut().and_then(|bucket| bucket.opens(now));
        let packets = self.packets.as_mut().and_then(|bucket| bucket.opens(now));
        bytes.max(packets)
    }

    /// A frame of `bytes` has passed as `packets` packets.
    pub(super) fn passed(&mut self, bytes: u64, packets: u64) {
        for (bucket, tokens) in [(&mut self.bytes, bytes), (&mut self.packets, packets)] {
            if let Some(bucket) = bucket {
                bucket.take(tokens);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_limited_without_limits() {
        let now = Instant::now();
        let mut limiter = Limiter::new(RateLimit::default(), now);
        limiter.passed(u64::MAX, u64::MAX);
        assert_eq!(limiter.opens(now), None);
    }

    #[test]
    fn the_stricter_limit_decides_and_debts_are_paid_by_time() {
        let start = Instant::now();
        let limit =
            RateLimit { bytes_per_second: Some(10_000_000), packets_per_second: Some(1000), ..RateLimit::default() };
        let mut limiter = Limiter::new(limit, start);
        // The bursts: a second's tenth, here 1 000 000 bytes and 100 packets.
        limiter.passed(1000, 100);
        assert_eq!(limiter.opens(start), Some(start + Duration::from_millis(1)));
        limiter.passed(1_999_000, 0);
        assert_eq!(limiter.opens(start), Some(start + Duration::from_nanos(100_000_100)));
        assert_eq!(limiter.opens(start + Duration::from_millis(101)), None);
    }
    #[test]
    fn a_burst_that_is_said_counts() {
        let start = Instant::now();
        let limit = RateLimit { bytes_per_second: Some(1000), burst_bytes: Some(5000), ..RateLimit::default() };
        let mut limiter = Limiter::new(limit, start);
        limiter.passed(4999, 1);
        assert_eq!(limiter.opens(start), None);
        limiter.passed(1, 1);
        assert_eq!(limiter.opens(start), Some(start + Duration::from_millis(1)));
        let none = RateLimit { packets_per_second: Some(10), burst_packets: Some(0), ..RateLimit::default() };
        assert_eq!(Limiter::new(none, start).opens(start), None, "one passes");
    }
}
