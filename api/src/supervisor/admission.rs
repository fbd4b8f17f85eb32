//! Holds the door: counts those that have a VM and lets one more in, as one step. See [`crate::admission`].

use super::Core;
use crate::admission::{self, Places, Purpose};
use crate::error::Error;
use crate::registry::Sandbox;
use std::sync::{Arc, PoisonError};

impl Core {
    /// Runs `enter`, which makes one more sandbox count, if there is a place for it.
    pub(super) fn admitted<T>(
        &self,
        tenant: &str,
        purpose: Purpose,
        enter: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        let limits = &self.config.limits;
        let _one_at_a_time = self.admission.lock().unwrap_or_else(PoisonError::into_inner);
        let here = self.registry.with_vm();
        let own: Vec<_> = here.iter().filter(|sandbox| sandbox.tenant == tenant).cloned().collect();
        let (own, all) = (places(&own, limits.sandboxes), places(&here, limits.host_sandboxes));
        admission::admit(purpose, own, all, self.sources.now_ms())?;
        enter()
    }
}

fn places(taken: &[Arc<Sandbox>], limit: usize) -> Places {
    let next_end = taken.iter().filter_map(|sandbox| sandbox.record().deadline).min();
    Places { taken: taken.len(), limit, next_end }
}
