//! What the last operations of a sandbox cost, for people who watch. In memory alone: a restart of the supervisor forgets it.

use crate::sources::UnixMs;
use crate::timing::Timing;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// Operations of one sandbox that are remembered.
const REMEMBERED: usize = 8;

/// One operation that has ended.
#[derive(Clone, Debug)]
pub struct Cost {
    /// `pause`, `resume`, `create`, `stop`, `start`, `snapshot`.
    pub operation: &'static str,
    /// When it ended.
    pub ended_at: UnixMs,
    /// From its first step to its last. Phases may overlap, so their sum may be more.
    pub took: Duration,
    /// Why it failed.
    pub failure: Option<String>,
    /// Phases and bytes.
    pub timing: Timing,
}

/// The last of them, oldest first.
#[derive(Clone, Debug, Default)]
pub struct Costs(VecDeque<Arc<Cost>>);

impl Costs {
    /// Adds one, and forgets the oldest when there are too many.
    pub fn add(&mut self, cost: Cost) {
        if self.0.len() == REMEMBERED {
            self.0.pop_front();
        }
        self.0.push_back(Arc::new(cost));
    }

    /// Oldest first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Arc<Cost>> {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_ones_are_kept() {
        let mut costs = Costs::default();
        for at in 0..20 {
            let timing = Timing::default();
            costs.add(Cost { operation: "pause", ended_at: at, took: Duration::ZERO, failure: None, timing });
        }
        let kept: Vec<_> = costs.iter().map(|cost| cost.ended_at).collect();
        assert_eq!(kept, (12..20).collect::<Vec<_>>());
    }
}
