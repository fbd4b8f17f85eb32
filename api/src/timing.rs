//! What an operation cost: phases and bytes, for the `Server-Timing` header and the log.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

/// Phases in the order in which they ended, and counters.
#[derive(Clone, Debug, Default)]
pub struct Timing {
    phases: Vec<(&'static str, Duration)>,
    bytes: Vec<(&'static str, u64)>,
}

impl Timing {
    /// Adds a phase.
    pub fn phase(&mut self, name: &'static str, took: Duration) {
        self.phases.push((name, took));
    }

    /// Adds a phase that began at `since` and ends now.
    pub fn since(&mut self, name: &'static str, since: Instant) {
        self.phase(name, since.elapsed());
    }

    /// Adds a count of bytes.
    pub fn bytes(&mut self, name: &'static str, bytes: u64) {
        self.bytes.push((name, bytes));
    }

    /// Names and durations, in the order in which they ended.
    pub fn phases(&self) -> &[(&'static str, Duration)] {
        &self.phases
    }

    /// Names and values of the counts of bytes.
    pub fn byte_counts(&self) -> &[(&'static str, u64)] {
        &self.bytes
    }

    /// Adds all of another operation's.
    pub fn append(&mut self, other: Self) {
        self.phases.extend(other.phases);
        self.bytes.extend(other.bytes);
    }

    /// As the header's value: durations in ms, byte counts as descriptions.
    pub fn header(&self) -> String {
        let mut out = String::new();
        for (name, took) in &self.phases {
            let comma = if out.is_empty() { "" } else { ", " };
            // Writing to a String cannot fail.
            let _ = write!(out, "{comma}{name};dur={:.3}", took.as_secs_f64() * 1000.0);
        }
        for (name, bytes) in &self.bytes {
            let comma = if out.is_empty() { "" } else { ", " };
            let _ = write!(out, "{comma}{name};desc=\"{bytes} bytes\"");
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_lists_phases_then_bytes() {
        let mut timing = Timing::default();
        assert_eq!(timing.header(), "");
        timing.phase("stop", Duration::from_micros(1500));
        timing.phase("upload", Duration::from_millis(20));
        timing.bytes("sent", 123);
        assert_eq!(timing.header(), "stop;dur=1.500, upload;dur=20.000, sent;desc=\"123 bytes\"");
    }
}
