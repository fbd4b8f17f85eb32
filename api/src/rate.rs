//! How many requests a minute: of one tenant, and of all together. A bucket of tokens each, which holds a minute's worth, so that a burst after
//! silence is served at once.

use crate::sources::UnixMs;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

const MINUTE_MS: i64 = 60_000;

/// Tokens, in parts of one by [`MINUTE_MS`]: at `per_minute` tokens a minute each millisecond adds `per_minute` parts.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    parts: i64,
    at: UnixMs,
}

impl Bucket {
    fn full(per_minute: u32, now: UnixMs) -> Self {
        Self { parts: i64::from(per_minute) * MINUTE_MS, at: now }
    }

    /// What is in it at `now`. A clock that was set back adds nothing.
    fn filled(self, per_minute: u32, now: UnixMs) -> Self {
        let rate = i64::from(per_minute);
        let passed = (now - self.at).clamp(0, MINUTE_MS);
        Self { parts: (self.parts + passed * rate).min(rate * MINUTE_MS), at: now }
    }

    /// Milliseconds until there is a token; 0 when there is one.
    fn wait_ms(self, per_minute: u32) -> i64 {
        let missing = MINUTE_MS - self.parts;
        if missing <= 0 { 0 } else { (missing + i64::from(per_minute) - 1) / i64::from(per_minute) }
    }
}

/// Too many requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("more than {per_minute} requests a minute; try again in {retry_after_s} s")]
pub struct TooMany {
    /// How many there may be.
    pub per_minute: u32,
    /// When there is a token again, seconds.
    pub retry_after_s: u32,
}

/// The buckets. A limit of 0 is none.
#[derive(Debug)]
pub struct Rates {
    tenant_per_minute: u32,
    host_per_minute: u32,
    // At most one bucket for each tenant that has a key.
    buckets: Mutex<(Option<Bucket>, HashMap<String, Bucket>)>,
}

impl Rates {
    /// With full buckets.
    pub fn new(tenant_per_minute: u32, host_per_minute: u32) -> Self {
        Self { tenant_per_minute, host_per_minute, buckets: Mutex::default() }
    }

    /// Takes a token of the tenant's and one of the host's for a request at `now`, or neither.
    pub fn take(&self, tenant: &str, now: UnixMs) -> Result<(), TooMany> {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let (host, tenants) = &mut *buckets;
        let own = filled(tenants.get(tenant).copied(), self.tenant_per_minute, now)?;
        let all = filled(*host, self.host_per_minute, now)?;
        if let Some(own) = own {
            tenants.insert(tenant.to_owned(), less_one(own));
        }
        *host = all.map(less_one);
        Ok(())
    }
}

fn less_one(bucket: Bucket) -> Bucket {
    Bucket { parts: bucket.parts - MINUTE_MS, ..bucket }
}

/// The bucket with a token in it; `None` without a limit.
fn filled(bucket: Option<Bucket>, per_minute: u32, now: UnixMs) -> Result<Option<Bucket>, TooMany> {
    if per_minute == 0 {
        return Ok(None);
    }
    let bucket = bucket.map_or_else(|| Bucket::full(per_minute, now), |bucket| bucket.filled(per_minute, now));
    match bucket.wait_ms(per_minute) {
        0 => Ok(Some(bucket)),
        wait => {
            let retry_after_s = u32::try_from((wait + 999) / 1000).unwrap_or(u32::MAX);
            Err(TooMany { per_minute, retry_after_s })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(rates: &Rates, tenant: &str, now: UnixMs) -> usize {
        (0..10_000).take_while(|_| rates.take(tenant, now).is_ok()).count()
    }

    #[test]
    fn a_burst_is_a_minutes_worth_and_then_it_is_the_rate() {
        let rates = Rates::new(60, 0);
        assert_eq!(taken(&rates, "a", 1_000), 60);
        assert_eq!(rates.take("a", 1_000).unwrap_err(), TooMany { per_minute: 60, retry_after_s: 1 });
        assert_eq!(taken(&rates, "a", 1_999), 0);
        assert_eq!(taken(&rates, "a", 2_000), 1);
        assert_eq!(taken(&rates, "a", 12_000), 10);
        assert_eq!(taken(&rates, "a", 999_999_999), 60, "no more than a minute's worth is saved up");
    }

    #[test]
    fn tenants_do_not_take_each_others_and_all_share_the_hosts() {
        let rates = Rates::new(5, 8);
        assert_eq!(taken(&rates, "a", 0), 5);
        assert_eq!(taken(&rates, "b", 0), 3);
        assert_eq!(rates.take("b", 0).unwrap_err().per_minute, 8);
        // The host's bucket refused, so b's own still has two.
        assert_eq!(taken(&rates, "b", 60_000), 5);
    }

    #[test]
    fn no_limit_is_no_limit_and_a_clock_that_is_set_back_gives_nothing() {
        assert_eq!(taken(&Rates::new(0, 0), "a", 0), 10_000);
        let rates = Rates::new(3, 0);
        assert_eq!(taken(&rates, "a", 100_000), 3);
        assert_eq!(taken(&rates, "a", 0), 0);
        assert_eq!(rates.take("a", 0).unwrap_err().retry_after_s, 20);
    }
}
