//! From a VM to packs in the store and a manifest beside them: what pauses, named snapshots and templates share. Nothing here commits.

use super::machine::vmm_error;
use super::{Core, draft};
use crate::error::{Error, StoreContext as _, chain};
use crate::fail_points::{Point, reach};
use crate::known_packs::KnownPacks;
use crate::registry::Sandbox;
use crate::store::Grants;
use crate::timing::Timing;
use crate::vmm_process::Vmm;
use bytes::Bytes;
use stasis_snapshot::capture::{Options, packs_needed};
use stasis_snapshot::ids::Digest;
use stasis_snapshot::layout::{Generation, Owner};
use stasis_snapshot::manifest::{Lineage, Manifest, ManifestError, ManifestRef};
use stasis_snapshot::seal::WrappedKey;
use stasis_snapshot::store::{ErrorKind, Precondition};
use stasis_vmm::control::types::{CaptureMode, CaptureReport, CaptureRequest};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Grants live as long as the capture that uses them, and this much more for clocks that differ.
const GRANT_SLACK: Duration = Duration::from_mins(5);
/// Attempts at a manifest PUT, whose name no other commit shares: it may be sent again blindly.
const MANIFEST_TRIES: u32 = 3;

/// What a capture may write: the VMM's figure and pages to look at.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    pub(super) packs_needed: u32,
    pub(super) pages: u64,
}

/// How many packs a capture may write. More connections make smaller and more packs, and the VMM's own figure knows nothing of ours.
fn packs_to_grant(size: Size, connections: u16) -> u32 {
    let options = Options { connections, ..Options::default() };
    size.packs_needed.max(packs_needed(size.pages, &options))
}

/// A manifest that is in the store, and that no head names yet.
#[derive(Debug)]
pub(super) struct Published {
    pub(super) manifest: ManifestRef,
    pub(super) bytes: Bytes,
    pub(super) known: Arc<KnownPacks>,
    /// Objects of the generation that it does not name.
    pub(super) leftovers: Vec<String>,
}

impl Core {
    /// Leave to write the packs of `generation`, with the local files that are to hold `copies` as well.
    pub(super) async fn grant_packs(&self, generation: &Generation, size: Size, copies: bool) -> Result<Grants, Error> {
        let n = packs_to_grant(size, self.config.limits.connections);
        let keys = (0..n).map(|n| generation.pack(n)).collect();
        let mut grants = self.store.grant_puts(keys, self.config.deadlines.capture() + GRANT_SLACK).await?;
        if copies {
            self.add_cache_files(&mut grants, true);
        }
        Ok(grants)
    }

    /// Has the VMM capture its machine into `grants`: the draft of a manifest (nothing for a round) and what it took.
    pub(super) async fn capture(
        &self,
        sandbox: &Sandbox,
        vm: &Vmm,
        grants: Grants,
        mode: CaptureMode,
        timing: &mut Timing,
    ) -> Result<(Bytes, CaptureReport), Error> {
        let begun = Instant::now();
        if !grants.files.is_empty() {
            vm.client.send_files(grants.files).await.map_err(vmm_error(sandbox, vm, "hand it the packs to write"))?;
        }
        let limit = self.config.deadlines.capture();
        let share = self.shares.join(Some(&vm.client));
        let connections = match mode {
            CaptureMode::Round => share.connections().min(self.config.run_ahead.connections),
            CaptureMode::Stopped | CaptureMode::Disks | CaptureMode::Staged => share.connections(),
        };
        let request = CaptureRequest {
            packs: grants.objects,
            connections,
            deadline_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
            mode,
            memory_bytes: Some(self.config.limits.capture_memory_mib << 20),
            seal: self.data_key(sandbox)?,
        };
        // The VMM keeps the deadline; ours is for a VMM that does not.
        let capture = tokio::time::timeout(limit + self.config.deadlines.control(), vm.client.capture(&request));
        let Ok(outcome) = capture.await else {
            if let Err(error) = vm.client.cancel_capture().await {
                tracing::warn!(id = %sandbox.id, error = chain(&error), "cannot cancel a capture");
            }
            return Err(Error::Deadline { id: sandbox.id.clone(), what: "the upload", ms: limit.as_millis() });
        };
        let captured = outcome.map_err(vmm_error(sandbox, vm, "capture and upload its state"))?;
        reach(Point::PacksSent);
        let (took, report) = (begun.elapsed(), &captured.1);
        timing.phase("state", Duration::from_micros(report.state_us));
        timing.phase("upload", took.saturating_sub(Duration::from_micros(report.state_us)));
        Ok(captured)
    }

    /// The packs that the next draft of a sandbox may name unasked: those of the manifest that it was last committed or restored as.
    pub(super) async fn known_packs(&self, sandbox: &Sandbox, parent: Option<&ManifestRef>) -> Arc<KnownPacks> {
        if let Some(known) = sandbox.known_packs() {
            return known;
        }
        let Some(parent) = parent else { return Arc::default() };
        match self.fetch_manifest(parent).await {
            Ok((manifest, keys, _)) => {
                let known = Arc::new(KnownPacks::of(&manifest, keys));
                sandbox.set_known_packs(Some(known.clone()));
                known
            }
            Err(error) => {
                tracing::warn!(id = %sandbox.id, error = error.chain(), "the packs of the last commit are not known");
                Arc::default()
            }
        }
    }

    /// A manifest with its data keys and its bytes, checked.
    pub(super) async fn fetch_manifest(
        &self,
        named: &ManifestRef,
    ) -> Result<(Manifest, Vec<WrappedKey>, Bytes), Error> {
        let object = self.store.objects().get(&named.key).await.doing("fetch the manifest")?;
        let (manifest, keys) = self.open_manifest(named, &object.bytes)?;
        Ok((manifest, keys, object.bytes))
    }

    /// The manifest in `bytes`, once its seal and its digest are checked, and its data keys.
    pub(super) fn open_manifest(
        &self,
        named: &ManifestRef,
        bytes: &[u8],
    ) -> Result<(Manifest, Vec<WrappedKey>), Error> {
        Manifest::open(named, bytes, self.store.seals()).map_err(|error| match error {
            ManifestError::Seal(source) => Error::Seal { object: named.key.clone(), source },
            error => Error::Damaged { object: named.key.clone(), source: error.into() },
        })
    }

    /// Makes the manifest of a draft and stores it under `key`, while the packs that it names are looked for: those that are not `known` must lie
    /// below the prefix of the owner.
    pub(super) async fn publish(
        &self,
        sandbox: &Sandbox,
        draft: &[u8],
        lineage: Lineage,
        (owner, generation, key): (&Owner, &Generation, String),
        known: &KnownPacks,
    ) -> Result<Published, Error> {
        let (manifest, plain) = draft::complete(&sandbox.record(), draft, lineage)?;
        let keys = self.keys_of(sandbox, &manifest, known)?;
        let sealed = self.store.seals().seal_manifest(&key, plain, &keys);
        let bytes: Bytes = sealed.map_err(|source| Error::Seal { object: key.clone(), source })?.into();
        let ((), leftovers) = tokio::try_join!(
            put_manifest(self, &key, bytes.clone()),
            draft::check_packs(&self.store, &sandbox.id, &manifest, owner.prefix(), generation, known)
        )?;
        reach(Point::ManifestStored);
        let known = Arc::new(KnownPacks::of(&manifest, keys));
        Ok(Published { manifest: ManifestRef { key, digest: Digest::of(&bytes) }, bytes, known, leftovers })
    }

    /// Deletes the objects that a capture left and its manifest does not name, and the local files of packs that it did not write. In a task
    /// of its own: nobody waits for it.
    pub(super) fn clean_up(self: &Arc<Self>, leftovers: Vec<String>, unwritten: Vec<String>) {
        let core = self.clone();
        tokio::spawn(async move {
            for key in leftovers.iter().filter(|key| !key.ends_with("/manifest")) {
                if let Err(error) = core.store.objects().delete(key).await {
                    tracing::warn!(key, error = chain(&error), "an unused pack stays");
                }
            }
            // A failed task of file removals has nothing to say.
            let _ = tokio::task::spawn_blocking(move || core.trim_cache(&unwritten)).await;
        });
    }
}

async fn put_manifest(core: &Core, key: &str, bytes: Bytes) -> Result<(), Error> {
    let precondition = if core.store.is_shared() { Precondition::IfAbsent } else { Precondition::None };
    let mut tries = 0;
    loop {
        tries += 1;
        match core.store.objects().put(key, bytes.clone(), &precondition).await {
            Ok(_) => return Ok(()),
            // Only we write this name: it exists because an earlier try of ours was applied and its reply lost.
            Err(e) if e.kind == ErrorKind::PreconditionFailed && tries > 1 => return Ok(()),
            Err(e) if e.is_retryable() && tries < MANIFEST_TRIES => {
                tracing::warn!(key, error = chain(&e), "the manifest is sent again");
                tokio::time::sleep(Duration::from_millis(100) * tries).await;
            }
            Err(e) => return Err(e).doing("store the manifest"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enough_packs_are_granted_for_any_number_of_connections() {
        let size = Size { packs_needed: 10, pages: 8448 + 100 };
        for connections in [1, 8, 16, 256] {
            let granted = packs_to_grant(size, connections);
            let bytes: u64 = size.pages * 4096;
            let pack = (bytes / u64::from(connections)).clamp(1 << 20, 8 << 20);
            assert!(u64::from(granted) > bytes / pack && granted >= 10, "{connections}: {granted}");
        }
    }
}
