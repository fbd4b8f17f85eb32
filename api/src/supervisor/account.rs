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
        let (ended_at, took) = (self.sources.now_ms(), begun.elapsed());
        self.metrics.operation(operation, failure.is_none(), timing);
        self.telemetry.operation(&sandbox.id, operation, ended_at, took, failure, timing);
        sandbox.note_cost(Cost {
            operation,
            ended_at,
            took,
            failure: failure.map(Error::chain),
            timing: timing.clone(),
        });
    }
}
