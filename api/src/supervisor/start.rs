//! Start of a stopped sandbox: its head is claimed, and its template boots anew over the disks of its stop.
//!
//! The claim comes first, since a booted guest runs. A failure ends the VM, says in the head that the sandbox rests, and leaves it `stopped`.

use super::materialise::{self, Source};
use super::{Core, blocking, detached};
use crate::admission::Purpose;
use crate::error::Error;
use crate::journal::{OperationId, OperationKind};
use crate::record::{Record, Spec};
use crate::registry::{OperationGuard, Sandbox};
use crate::states::{Event, State};
use crate::store::Grants;
use crate::template::Template;
use crate::timing::Timing;
use stasis_snapshot::commit::{Attempt, Current, HeadState};
use stasis_snapshot::manifest::ManifestRef;
use stasis_snapshot::seal::DataKey;
use stasis_vmm::control::types::{DisksFrom, FdToken};
use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

/// A head from memory may be older than the one in the store; a fresh one is tried once.
const CLAIM_TRIES: u32 = 2;

/// Disks as a stop left them: what a boot is handed instead of the template's.
pub(super) struct StoredDisks {
    manifest: File,
    digest: String,
    grants: Grants,
    keys: Vec<DataKey>,
    connections: u16,
}

impl StoredDisks {
    /// Adds the files that it needs to `files`, and names them for the VMM.
    pub(super) fn enclose(self, core: &Core, files: &mut Vec<(FdToken, File)>) -> DisksFrom {
        let manifest = core.store.token();
        files.push((manifest, self.manifest));
        files.extend(self.grants.files);
        DisksFrom {
            manifest,
            manifest_digest: self.digest,
            packs: self.grants.objects,
            connections: self.connections,
            keys: self.keys,
        }
    }
}

/// Starts a stopped sandbox and waits until it runs.
pub async fn start(core: &Arc<Core>, sandbox: &Arc<Sandbox>) -> Result<(Record, Timing), Error> {
    let stopped = || match sandbox.state() {
        State::Stopped => Ok(()),
        state => Err(Error::State { id: sandbox.id.clone(), state, verb: "start" }),
    };
    stopped()?;
    let guard = sandbox.lock().await;
    stopped()?;
    let (core, sandbox) = (core.clone(), sandbox.clone());
    detached(async move { run(&core, &sandbox, guard).await }).await
}

async fn run(core: &Arc<Core>, sandbox: &Arc<Sandbox>, guard: OperationGuard) -> Result<(Record, Timing), Error> {
    let operation = core.journal.begin(&sandbox.id, OperationKind::Start, core.sources.now_ms())?;
    let (mut timing, since) = (Timing::default(), Instant::now());
    let begin = || core.registry.begin(sandbox, Event::Start, "start");
    let outcome = match core.admitted(&sandbox.tenant, Purpose::Start, begin) {
        Ok(_) => boot(core, sandbox, operation, &mut timing).await,
        Err(refused) => {
            core.journal.end(operation, &refused.chain(), core.sources.now_ms())?;
            return Err(refused);
        }
    };
    let outcome = match outcome {
        Ok(()) => {
            let head = sandbox.head();
            core.registry.record(sandbox, Event::Ready, None, |record| {
                if let Some(head) = head {
                    (record.epoch, record.seq) = (head.head.epoch, head.head.seq);
                    record.commit = head.head.manifest;
                }
                (record.disks_only, record.origin, record.reason) = (true, None, None);
            })
        }
        Err(error) => {
            let reason = format!("the start failed: {}", error.chain());
            core.end_vm(sandbox).await;
            core.registry
                .record(sandbox, Event::StartFailed, Some(&reason), |record| record.reason = Some(reason.clone()))?;
            core.lay_to_rest(sandbox).await;
            core.follow_head(sandbox);
            Err(error)
        }
    };
    sandbox.set_phase(None);
    core.account(sandbox, "start", since, outcome.as_ref().err(), &timing);
    let note = outcome.as_ref().err().map_or_else(|| "ok".to_owned(), Error::chain);
    core.journal.end(operation, &note, core.sources.now_ms())?;
    drop(guard);
    outcome.map(|record| (record, timing))
}

async fn boot(
    core: &Arc<Core>,
    sandbox: &Arc<Sandbox>,
    operation: OperationId,
    timing: &mut Timing,
) -> Result<(), Error> {
    let spec = sandbox.record().spec;
    let begun = Instant::now();
    sandbox.set_phase(Some("claim"));
    let template = find_template(core, &spec).await?;
    core.kvm.check(&template)?;
    let manifest = claim(core, sandbox, operation).await?;
    timing.since("claim", begun);

    let begun = Instant::now();
    sandbox.set_phase(Some("boot"));
    let share = core.shares.join(None);
    let (source, vm) =
        tokio::join!(materialise::source(core, sandbox, &spec, &manifest, None, false), core.start_vmm(sandbox));
    let (Source { manifest: encoded, grants, known, keys, took }, vm) = (source?, vm?);
    timing.phase("manifest", took);
    let digest = manifest.digest.to_string();
    let stored = StoredDisks { manifest: encoded, digest, grants, keys, connections: share.connections() };
    let tap = core.connect(sandbox, &vm).await?;
    core.raise_network(sandbox, &vm).await?;
    core.boot(sandbox, &vm, &template, tap, Some(stored)).await?;
    core.tell_image(sandbox, &template).await?;
    sandbox.set_known_packs(Some(known));
    timing.since("boot", begun);
    Ok(())
}

/// Claims the head for a new epoch: the manifest that it names.
async fn claim(core: &Core, sandbox: &Sandbox, operation: OperationId) -> Result<ManifestRef, Error> {
    let mut tries = 0;
    loop {
        tries += 1;
        let known = sandbox.head().is_some();
        let damaged = |why: &str| Error::Damaged { object: format!("the head of {}", sandbox.id), source: why.into() };
        let current = core.current_head(sandbox).await?.ok_or_else(|| damaged("it is not in the store"))?;
        let attempt = claim_of(core, sandbox, &current)?;
        let manifest = current.head.manifest.clone().ok_or_else(|| damaged("it names no manifest"))?;
        core.propose(operation, &[&attempt])?;
        match core.commit(sandbox, &attempt, "claim the sandbox").await {
            Ok(_) => return Ok(manifest),
            Err(Error::Fenced { .. }) if known && tries < CLAIM_TRIES => {}
            Err(error) => return Err(error),
        }
    }
}

/// The claim that this head allows us.
fn claim_of(core: &Core, sandbox: &Sandbox, current: &Current) -> Result<Attempt, Error> {
    let id = || sandbox.id.clone();
    let head = &current.head;
    match head.state {
        HeadState::Stopped => Attempt::claim(current, &core.owner, core.commit_id()),
        // We own it and have no VM for it: an earlier life of ours that could not say that it rests.
        HeadState::Live if head.owner == core.owner => Attempt::take_over(current, &core.owner, core.commit_id()),
        HeadState::Live => return Err(Error::Fenced { id: id(), owner: head.owner.clone(), epoch: head.epoch }),
        // Started and paused elsewhere since.
        HeadState::Paused => return Err(Error::State { id: id(), state: State::Paused, verb: "start" }),
        HeadState::Deleted => {
            let source = "it is a tombstone: the sandbox was deleted elsewhere".into();
            return Err(Error::Damaged { object: format!("the head of {}", sandbox.id), source });
        }
    }
    .map_err(Core::head_error(sandbox))
}

/// The template that the sandbox was made from, whatever its name is now.
async fn find_template(core: &Arc<Core>, spec: &Spec) -> Result<Template, Error> {
    let (core, digest, name) = (core.clone(), spec.template_digest.clone(), spec.template_name.clone());
    blocking(move || {
        core.templates.by_digest(&digest, &name, &core.journal)?.ok_or_else(|| {
            Error::Host(format!(
                "no template in {} is the one that this sandbox was made from ({name:?}, {digest}): put it back to start it",
                core.templates.dir().display()
            ))
        })
    })
    .await
}
