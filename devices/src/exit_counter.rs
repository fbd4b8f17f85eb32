//! A test device on I/O ports: it proves that no port exit is lost or doubled across pause and restore.
//!
//! The guest writes 1, 2, 3, … with 32-bit OUTs; a value that does not follow the one before is a gap. A 32-bit IN answers a number
//! that grows by one with each read, so the guest checks the other direction.

use serde::{Deserialize, Serialize};

/// Saved state of an [`ExitCounter`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitCounterState {
    /// OUTs seen.
    pub outs: u64,
    /// INs answered.
    pub ins: u64,
    /// OUTs whose value did not follow the one before.
    pub out_gaps: u64,
    /// The last value written.
    pub last_out: Option<u32>,
}

impl ExitCounterState {
    /// Version of this structure.
    pub const VERSION: u16 = 1;
}

/// The device. Its whole state is what it counted.
#[derive(Debug, Default)]
pub struct ExitCounter {
    state: ExitCounterState,
}

impl ExitCounter {
    /// A counter that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// A 32-bit OUT. The first value is free.
    pub fn write(&mut self, value: u32) {
        self.state.outs += 1;
        if self.state.last_out.is_some_and(|last| value != last.wrapping_add(1)) {
            self.state.out_gaps += 1;
        }
        self.state.last_out = Some(value);
    }

    /// A 32-bit IN: 0 for the first, then one more each time.
    pub fn read(&mut self) -> u32 {
        let answer = self.state.ins as u32;
        self.state.ins += 1;
        answer
    }

    /// What was counted so far.
    pub fn counts(&self) -> &ExitCounterState {
        &self.state
    }

    /// The state for a snapshot.
    pub fn save(&self) -> ExitCounterState {
        self.state.clone()
    }

    /// A counter that goes on where `state` was saved. Every state is valid.
    pub fn restore(state: &ExitCounterState) -> Self {
        Self { state: state.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consecutive_outs_leave_no_gap_and_any_start_is_free() {
        let mut counter = ExitCounter::new();
        for value in [u32::MAX - 1, u32::MAX, 0, 1] {
            counter.write(value);
        }
        assert_eq!((counter.counts().outs, counter.counts().out_gaps), (4, 0));
    }

    #[test]
    fn a_lost_and_a_doubled_out_are_both_gaps() {
        let mut counter = ExitCounter::new();
        for value in [5, 6, 6, 7, 9, 10] {
            counter.write(value);
        }
        assert_eq!((counter.counts().outs, counter.counts().out_gaps), (6, 2));
    }

    #[test]
    fn both_directions_go_on_after_a_restore() {
        let mut counter = ExitCounter::new();
        counter.write(7);
        assert_eq!((counter.read(), counter.read()), (0, 1));
        let mut restored = ExitCounter::restore(&counter.save());
        restored.write(8);
        assert_eq!(restored.read(), 2);
        assert_eq!(restored.counts().out_gaps, 0);
        restored.write(8);
        assert_eq!(restored.counts().out_gaps, 1);
    }
}
