//! Where time, randomness and ids come from. Everything in this crate that needs one of them gets a [`Sources`], so that a test owns them.
//!
//! Clocks are never compared between hosts for correctness: times here are for people, for deadlines of this host, and for ordering a list.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Milliseconds since the Unix epoch.
pub type UnixMs = i64;

/// A wall clock.
pub trait Clock: Send + Sync {
    /// Now.
    fn now_ms(&self) -> UnixMs;
}

/// A source of random octets that nobody can predict.
pub trait Entropy: Send + Sync {
    /// Fills `buf`.
    fn fill(&self, buf: &mut [u8]);
}

/// The host's clock.
#[derive(Clone, Copy, Debug)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now_ms(&self) -> UnixMs {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    }
}

/// The operating system's random numbers.
#[derive(Clone, Copy, Debug)]
pub struct SystemEntropy;

impl Entropy for SystemEntropy {
    fn fill(&self, buf: &mut [u8]) {
        use rand::RngCore as _;
        // `rand::rng` is a ChaCha generator seeded and reseeded from the kernel: it cannot fail after start-up.
        rand::rng().fill_bytes(buf);
    }
}

/// The clock and the entropy in use.
#[derive(Clone)]
pub struct Sources {
    /// Wall clock.
    pub clock: Arc<dyn Clock>,
    /// Random octets.
    pub entropy: Arc<dyn Entropy>,
}

impl Sources {
    /// Those of the host.
    pub fn system() -> Self {
        Self { clock: Arc::new(SystemClock), entropy: Arc::new(SystemEntropy) }
    }

    /// Now, by the wall clock.
    pub fn now_ms(&self) -> UnixMs {
        self.clock.now_ms()
    }

    /// `N` random octets.
    pub fn random<const N: usize>(&self) -> [u8; N] {
        let mut buf = [0; N];
        self.entropy.fill(&mut buf);
        buf
    }

    /// `chars` characters of `a-z0-9`, each drawn evenly.
    pub fn word(&self, chars: usize) -> String {
        const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
        let mut out = String::with_capacity(chars);
        while out.len() < chars {
            for byte in self.random::<32>() {
                // 252 = 7 * 36: larger values would favour the first letters.
                if byte < 252 && out.len() < chars {
                    out.push(char::from(ALPHABET[usize::from(byte % 36)]));
                }
            }
        }
        out
    }
}

/// RFC 3339 in UTC with milliseconds, as answers carry it.
pub fn rfc3339(at: UnixMs) -> String {
    let (days, ms) = (at.div_euclid(86_400_000), at.rem_euclid(86_400_000));
    let (year, month, day) = civil_from_days(days);
    let s = ms / 1000;
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z", s / 3600, s / 60 % 60, s % 60, ms % 1000)
}

/// Gregorian date of a day number (0 is 1970-01-01), by counting in 400-year eras that start on 1 March.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_gregorian() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(rfc3339(951_782_400_000), "2000-02-29T00:00:00.000Z");
        assert_eq!(rfc3339(1_709_251_199_999), "2024-02-29T23:59:59.999Z");
        assert_eq!(rfc3339(4_107_542_400_000), "2100-03-01T00:00:00.000Z");
        assert_eq!(rfc3339(-1), "1969-12-31T23:59:59.999Z");
    }

    #[test]
    fn words_have_the_asked_length_and_alphabet() {
        let word = Sources::system().word(77);
        assert_eq!(word.len(), 77);
        assert!(word.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()));
    }
}
