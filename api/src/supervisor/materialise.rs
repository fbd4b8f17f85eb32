//! A VM from a manifest: what wakes and starts from a template or a named snapshot share. The VM stands still afterwards; whether its guest may
//! run is the caller's to know.

use super::files::{Disks, in_memory};
use super::machine::vmm_error;
use super::{Core, blocking};
use crate::error::Error;
use crate::fail_points::{Point, reach};
use crate::kept_memory::Kept;
use crate::known_packs::{KnownPacks, SignedGrants};
use crate::record::Spec;
use crate::registry::Sandbox;
use crate::store::Grants;
use crate::timing::Timing;
use crate::vmm_process::Vmm;
use stasis_snapshot::ids::CommitId;
use stasis_snapshot::manifest::ManifestRef;
use stasis_snapshot::seal::DataKey;
use stasis_vmm::control::client::ClientError;
use stasis_vmm::control::types::{Paging, RestoreReport, RestoreRequest};
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Grants live as long as pages may be fetched by them: a guest that is not swept touches some of its pages late.
const GRANT_LIFE: Duration = Duration::from_hours(7 * 24);

/// Grants that were signed so long ago are signed anew for a wake, ms.
const GRANT_AGE_MS: i64 = 24 * 60 * 60 * 1000;

/// How long a VMM whose connection broke may take to end.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What of a manifest is on this host already.
#[derive(Default)]
pub(super) struct Held {
    /// The manifest, whose digest was checked, and the packs that it names.
    pub(super) manifest: Option<(File, Arc<KnownPacks>)>,
    /// A memory file that nobody else uses, and the notes that belong to it.
    pub(super) memory: Option<(Arc<File>, File)>,
}

impl From<Kept> for Held {
    fn from(kept: Kept) -> Self {
        Self { manifest: Some((kept.manifest, kept.known)), memory: Some((kept.memory, kept.notes)) }
    }
}

pub(super) struct Restored {
    pub(super) vm: Arc<Vmm>,
    fetched: Duration,
    pub(super) spawned: Duration,
    pub(super) took: Duration,
    report: RestoreReport,
}

impl Restored {
    pub(super) fn tell(&self, timing: &mut Timing) {
        timing.phase("manifest", self.fetched);
        timing.phase("spawn", self.spawned);
        timing.phase("restore", self.took);
        timing.bytes("fetched", self.report.fetched_bytes);
        if self.report.kept {
            timing.phase("kept", Duration::ZERO);
        }
    }
}

/// What a restore reads: the manifest and its digest, and leave to read its packs.
pub(super) struct Source {
    pub(super) manifest: File,
    pub(super) grants: Grants,
    pub(super) known: Arc<KnownPacks>,
    /// Of packs and a state that are encrypted.
    pub(super) keys: Vec<DataKey>,
    pub(super) took: Duration,
}

/// The manifest, from memory or from the store. `memory_is_here`: few packs will be read, if any, so none gets a local file that has none yet.
pub(super) async fn source(
    core: &Core,
    sandbox: &Sandbox,
    spec: &Spec,
    named: &ManifestRef,
    held: Option<(File, Arc<KnownPacks>)>,
    memory_is_here: bool,
) -> Result<Source, Error> {
    let begun = Instant::now();
    let (manifest, known) = if let Some(held) = held {
        held
    } else {
        let (manifest, keys, bytes) = core.fetch_manifest(named).await?;
        let found = KnownPacks::of(&manifest, keys);
        let known = sandbox.known_packs().filter(|known| known.equals(&found)).unwrap_or_else(|| Arc::new(found));
        (in_memory("manifest", &bytes)?, known)
    };
    let foreign = |digest: String| Some(digest.as_str()) != spec.rootfs_digest.as_deref();
    if known.bases().iter().any(|base| foreign(base.to_string())) {
        return Err(Error::Damaged {
            object: named.key.clone(),
            source: "it refers to a template disk that is not the sandbox's".into(),
        });
    }
    let mut grants = match known.signed(core.sources.now_ms() - GRANT_AGE_MS) {
        Some(signed) => Grants { objects: signed.objects.clone(), files: Vec::new() },
        None => core.store.grant_gets(known.keys().cloned().collect(), GRANT_LIFE).await?,
    };
    core.add_cache_files(&mut grants, !memory_is_here);
    let keys = core.keys_to_restore(&named.key, &known)?;
    Ok(Source { manifest, grants, known, keys, took: begun.elapsed() })
}

impl Core {
    /// Signs leave to read these packs beside everything else. Grants that are opened files are left to whoever needs them.
    pub(super) fn sign_ahead(self: &Arc<Self>, known: &Arc<KnownPacks>) {
        let (core, known) = (self.clone(), known.clone());
        tokio::spawn(async move {
            match core.store.grant_gets(known.keys().cloned().collect(), GRANT_LIFE).await {
                Ok(grants) if grants.files.is_empty() => {
                    known.remember(SignedGrants { objects: grants.objects, signed_ms: core.sources.now_ms() });
                }
                Ok(_) => {}
                Err(error) => tracing::debug!(error = error.chain(), "packs are left to be granted at the wake"),
            }
        });
    }
}

/// A VM with the sandbox in it, parked. Its pages may still be on their way.
pub(super) async fn materialise(
    core: &Arc<Core>,
    sandbox: &Arc<Sandbox>,
    named: &ManifestRef,
    held: Held,
) -> Result<Restored, Error> {
    let spec = sandbox.record().spec;
    let share = core.shares.join(None);
    let begun = Instant::now();
    let start = async {
        let started = core.start_vmm(sandbox).await;
        let spawned = begun.elapsed();
        let connected = match started {
            Ok(vm) => core.connect(sandbox, &vm).await.map(|tap| (vm, tap)),
            Err(error) => Err(error),
        };
        (connected, spawned)
    };
    let (rootfs, source, (vm, spawned)) = tokio::join!(
        find_rootfs(core, &spec),
        source(core, sandbox, &spec, named, held.manifest, held.memory.is_some()),
        start
    );
    let (rootfs, source, (vm, tap)) = (rootfs?, source?, vm?);
    let Disks { mut files, disks } = core.disks(&spec, rootfs.as_deref())?;
    let manifest = core.store.token();
    files.push((manifest, source.manifest));
    files.extend(source.grants.files);
    let (memory, notes) = match held.memory {
        Some((memory, notes)) => {
            let token = core.store.token();
            files.push((token, notes));
            (Some(memory), Some(token))
        }
        None => (core.memory_to_keep()?, None),
    };
    let memory_token = memory.as_deref().map(|file| core.enclose(&mut files, file)).transpose()?;
    let tap = tap.map(|tap| {
        let token = core.store.token();
        files.push((token, tap));
        token
    });
    let request = RestoreRequest {
        manifest,
        manifest_digest: named.digest.to_string(),
        packs: source.grants.objects,
        disks,
        generation_id: CommitId(core.sources.random::<16>()).to_string(),
        memory: memory_token,
        kept: notes,
        keys: source.keys,
        tap,
        // Those of now: the operator may have changed them while it slept.
        network_limits: core.config.network.limits(),
        paging: Paging {
            eager: false,
            connections: share.connections(),
            sweep_mib_per_second: core.config.warm.sweep_mib_per_second,
        },
        id: Some(sandbox.id.to_string()),
    };
    let begun = Instant::now();
    let limit = core.config.deadlines.restore();
    let load = async {
        vm.client.send_files(files).await.map_err(vmm_error(sandbox, &vm, "hand it the files to restore from"))?;
        let restored = vm.client.restore(&request).await;
        if let Err(ClientError::Unreachable { .. } | ClientError::Answer { .. }) = &restored {
            // A VMM that ends breaks its connections first; its reason is worth the moment.
            let _ = tokio::time::timeout(LAST_WORDS, vm.wait_ended()).await;
        }
        restored.map_err(vmm_error(sandbox, &vm, "restore it"))
    };
    let report = tokio::time::timeout(limit, load).await.map_err(|_| Error::Deadline {
        id: sandbox.id.clone(),
        what: "the restore",
        ms: limit.as_millis(),
    })??;
    reach(Point::Restored);
    core.trim_cache_if_due();
    if let Some(memory) = memory {
        vm.hold_memory(memory);
    }
    sandbox.set_known_packs(Some(source.known));
    Ok(Restored { vm: vm.clone(), fetched: source.took, spawned, took: begun.elapsed(), report })
}

async fn find_rootfs(core: &Arc<Core>, spec: &Spec) -> Result<Option<PathBuf>, Error> {
    let Some(digest) = spec.rootfs_digest.clone() else { return Ok(None) };
    let (core, name) = (core.clone(), spec.template_name.clone());
    blocking(move || match core.templates.rootfs_by_digest(&digest, &name, &core.journal)? {
        Some(path) => Ok(Some(path)),
        None => Err(Error::Host(format!(
            "no template in {} has the root file system {digest} that this sandbox was made from (template {name:?}): put it back to resume it",
            core.templates.dir().display()
        ))),
    })
    .await
}
