//! A fork: a sandbox whose first head names a manifest that is not its own. Until that head is there, only the owner of the manifest keeps it from
//! the collector, and the owner may be deleted meanwhile. So a lease names it first, then it is looked at whether the owner still does; the
//! lease is not given back but runs out (`stasis_snapshot::gc`, "Why nothing reachable is deleted").

use super::Core;
use crate::error::{Error, StoreContext as _};
use stasis_snapshot::commit::HeadState;
use stasis_snapshot::gc::lease::{Claims, Lease, LeaseError, SHORTEST};
use stasis_snapshot::layout::Owner;
use stasis_snapshot::manifest::ManifestRef;

/// Random characters of a lease's name.
const NAME_CHARS: usize = 20;

impl Core {
    /// Keeps `manifest` of the snapshot `id` for long enough that a head which names it can be committed.
    pub(super) async fn hold_fork(&self, tenant: &str, id: &str, manifest: &ManifestRef) -> Result<(), Error> {
        let name = format!("fork-{}", self.sources.word(NAME_CHARS));
        let claims = Claims { manifests: vec![manifest.clone()], ..Claims::default() };
        let lease = Lease::acquire(
            self.store.shared_objects(),
            self.store.is_shared(),
            (tenant, &name),
            &self.owner,
            claims,
            SHORTEST,
            self.sources.now_ms(),
        );
        lease.await.map_err(|error| match error {
            LeaseError::Store(source) => Error::Store { action: "keep the snapshot while it is restored", source },
            LeaseError::Lost { .. } | LeaseError::Name(_) | LeaseError::Body(_) => {
                Error::Bug("a lease that cannot be written")
            }
        })?;
        let owner = Owner::snapshot(tenant, id)?;
        let head = self.store.head_of(&owner).read().await.doing("look at the snapshot again")?;
        let names_it = head.is_some_and(|current| {
            current.head.state == HeadState::Paused && current.head.manifest.as_ref() == Some(manifest)
        });
        if names_it { Ok(()) } else { Err(Error::NoSnapshot(id.to_owned())) }
    }
}
