//! What an operation cost, told to those who count and those who watch.

use super::Core;
use crate::costs::Cost;
use crate::error::Error;
use crate::registry::Sandbox;
use crate::timing::Timing;
use std::time::Instant;

impl Core {
    /// Counts an operation that began at `begun` and has ended, and remembers it with its sandbox.
    pub(super) fn account(
        &self,
        sandbox: &Sandbox,
        operation: &'static str,
        begun: Instant,
        failure: Option<&Error>,
        timing: &Timing,
    ) {
        self.metrics.operation(operation, failure.is_none(), timing);
        sandbox.note_cost(Cost {
            operation,
            ended_at: self.sources.now_ms(),
            took: begun.elapsed(),
            failure: failure.map(Error::chain),
            timing: timing.clone(),
        });
    }
}
