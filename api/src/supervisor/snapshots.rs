//! Named snapshots: captures of a running sandbox that stay when it goes on, is paused or deleted, and that new sandboxes start from.
//!
//! The packs are the sandbox's own, in the generation of the capture: its next pause names them too. The snapshot has a manifest and a head of
//! its own, which is all that makes it one, and all that a collector needs to know; the head is written once, and replaced by a tombstone.
//!
//! The guest runs while pages are sent ahead, stops while state and residue are copied, and runs while that is sent. The sandbox is
//! `snapshotting` until the snapshot's head is settled; whatever comes of it, the guest runs.

use super::capture::Size;
use super::machine::vmm_error;
use super::{Core, detached};
use crate::error::{Error, StoreContext as _};
use crate::fail_points::{Point, reach};
use crate::ids::SandboxId;
use crate::journal::OperationKind;
use crate::record::{Portable, Record, Spec};
use crate::registry::{OperationGuard, Sandbox};
use crate::snapshot_request;
use crate::sources::UnixMs;
use crate::states::{Event, State};
use crate::store::place;
use crate::timing::Timing;
use crate::vmm_process::Vmm;
use futures::{StreamExt as _, TryStreamExt as _};
use serde::{Deserialize, Serialize};
use stasis_snapshot::commit::{Attempt, Backoff, Change, Current, HeadState, Outcome, Register, Sent};
use stasis_snapshot::layout::Owner;
use stasis_snapshot::manifest::{Lineage, ManifestRef, Versioned};
use stasis_vmm::control::types::CaptureMode;
use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// `snap-` and so many random characters.
const ID_CHARS: usize = 20;
/// Less than this is left to the stop.
const WORTH_A_ROUND_PAGES: u64 = 256;
/// Heads read at once for a list.
const READS: usize = 16;

/// A named snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// `snap-…`
    pub id: String,
    /// Whose.
    pub tenant: String,
    /// As requests name it.
    pub name: String,
    /// When it was made.
    pub created_at: UnixMs,
    /// What the sandbox was made as.
    pub spec: Spec,
    /// What it is.
    pub manifest: ManifestRef,
}

/// What the head of a snapshot carries for us, beside the sandbox's own record.
#[derive(Debug, Serialize, Deserialize)]
struct Named {
    version: u16,
    name: String,
    created_at: UnixMs,
    body: serde_json::Value,
}

/// Names of snapshots that are being made: two of one name must not both find that there is none.
#[derive(Debug, Default)]
pub struct Reservations(Mutex<HashSet<(String, String)>>);

/// A name, reserved until this is dropped.
#[derive(Debug)]
struct Reservation {
    core: Arc<Core>,
    key: (String, String),
}

impl Reservation {
    fn of(core: &Arc<Core>, tenant: &str, name: &str) -> Result<Self, Error> {
        let key = (tenant.to_owned(), name.to_owned());
        let free = core.snapshot_names.0.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone());
        if free { Ok(Self { core: core.clone(), key }) } else { Err(Error::SnapshotExists(key.1)) }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.core.snapshot_names.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

fn owner(tenant: &str, id: &str) -> Result<Owner, Error> {
    Ok(Owner::snapshot(tenant, id)?)
}

/// Makes a snapshot of a running sandbox and waits until it is durable.
pub async fn create(
    core: &Arc<Core>,
    sandbox: &Arc<Sandbox>,
    asked: snapshot_request::Create,
) -> Result<(Snapshot, Timing), Error> {
    let state = sandbox.state();
    if state != State::Running && !state.leads_to_running() {
        return Err(Error::State { id: sandbox.id.clone(), state, verb: "snapshot" });
    }
    let id = format!("snap-{}", core.sources.word(ID_CHARS));
    let name = asked.name.clone().unwrap_or_else(|| made_up(&sandbox.record().spec.template_name, &id));
    let reserved = Reservation::of(core, &sandbox.tenant, &name)?;
    if list(core, &sandbox.tenant).await?.iter().any(|snapshot| snapshot.name == name) {
        return Err(Error::SnapshotExists(name));
    }
    let guard = sandbox.lock().await;
    let (core, sandbox) = (core.clone(), sandbox.clone());
    detached(async move {
        // Held as long as the work goes on, whatever becomes of the client.
        let _reserved = reserved;
        let operation = core.journal.begin(&sandbox.id, OperationKind::Snapshot, core.sources.now_ms())?;
        let outcome = match core.registry.begin(&sandbox, Event::Snapshot, "snapshot") {
            Ok(_) => {
                let (mut timing, since) = (Timing::default(), Instant::now());
                let made = take(&core, &sandbox, &id, &name, &mut timing).await;
                core.account(&sandbox, "snapshot", since, made.as_ref().err(), &timing);
                after(&core, &sandbox, made.as_ref().err(), &guard).await?;
                made.map(|snapshot| (snapshot, timing))
            }
            Err(error) => Err(error),
        };
        sandbox.set_phase(None);
        let note = outcome.as_ref().err().map_or_else(|| "ok".to_owned(), Error::chain);
        core.journal.end(operation, &note, core.sources.now_ms())?;
        if outcome.is_ok()
            && asked.kill_sandbox_after
            && let Err(error) = super::delete::delete_locked(&core, &sandbox, guard).await
        {
            // The snapshot is what was asked for, and it is there; the timers ask for the delete again.
            tracing::warn!(id = %sandbox.id, error = error.chain(), "the source of a snapshot is still being deleted");
        }
        outcome
    })
    .await
}

/// What becomes of the source: its guest goes on, if it can and is still ours.
async fn after(
    core: &Arc<Core>,
    sandbox: &Arc<Sandbox>,
    failure: Option<&Error>,
    guard: &OperationGuard,
) -> Result<(), Error> {
    if sandbox.vm().is_none_or(|vm| vm.has_ended()) {
        core.lose(sandbox, guard).await;
        return Ok(());
    }
    if let Some(fenced @ Error::Fenced { .. }) = failure {
        return core.give_way(sandbox, fenced, guard).await;
    }
    let note = failure.map(|e| format!("the snapshot failed: {}", e.chain()));
    let event = if failure.is_none() { Event::Captured } else { Event::Failed };
    core.registry.record(sandbox, event, note.as_deref(), |record| record.reason.clone_from(&note)).map(drop)
}

/// A name for a snapshot that was given none: from its template, and its id, so that it is nobody else's.
fn made_up(template: &str, id: &str) -> String {
    let word: String = template.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(40).collect();
    format!("{word}-{}", id.trim_start_matches("snap-").get(..8).unwrap_or_default())
}

async fn take(
    core: &Arc<Core>,
    sandbox: &Sandbox,
    id: &str,
    name: &str,
    timing: &mut Timing,
) -> Result<Snapshot, Error> {
    let vm = sandbox.vm().ok_or(Error::Bug("a running sandbox without a VM"))?;
    let current = core.held_head(sandbox).await?;
    sandbox.set_phase(Some("ahead"));
    let begun = Instant::now();
    send_ahead(core, sandbox, &vm).await;
    timing.since("ahead", begun);

    sandbox.set_phase(Some("upload"));
    let size = dirty(core, sandbox, &vm).await?;
    let commit = core.commit_id();
    let generation = place(&sandbox.tenant, &sandbox.id)?.generation(current.head.seq + 1, current.head.epoch, commit);
    let grants = core.grant_packs(&generation, size, true).await?;
    let granted: Vec<_> = grants.objects.iter().map(|object| object.key.clone()).collect();
    let origin = sandbox.record().origin;
    let (captured, known) = tokio::join!(
        core.capture(sandbox, &vm, grants, CaptureMode::Staged, timing),
        core.known_packs(sandbox, current.head.manifest.as_ref().or(origin.as_ref()))
    );
    let (draft, report) = captured?;
    timing.phase("stop", Duration::from_micros(report.stop_us));

    sandbox.set_phase(Some("commit"));
    let begun = Instant::now();
    let own = owner(&sandbox.tenant, id)?;
    let lineage = Lineage {
        sandbox: sandbox.id.to_string(),
        seq: current.head.seq,
        epoch: current.head.epoch,
        commit,
        parent: current.head.manifest,
    };
    let key = own.generation(1, 1, commit).manifest();
    let place = place(&sandbox.tenant, &sandbox.id)?;
    let published = core.publish(sandbox, &draft, lineage, (&place, &generation, key), &known).await?;
    timing.bytes("sent", report.sent_bytes + published.bytes.len() as u64);
    timing.since("manifest", begun);

    let begun = Instant::now();
    let snapshot = Snapshot {
        id: id.to_owned(),
        tenant: sandbox.tenant.clone(),
        name: name.to_owned(),
        created_at: core.sources.now_ms(),
        spec: sandbox.record().spec,
        manifest: published.manifest,
    };
    if let Some(policy) = &snapshot.spec.network_policy {
        core.journal.share_secrets(id, policy.secrets())?;
    }
    commit_head(core, sandbox, &snapshot, commit).await?;
    timing.since("head", begun);
    let unwritten = granted.into_iter().filter(|key| !published.known.names(key)).collect();
    core.clean_up(published.leftovers, unwritten);
    Ok(snapshot)
}

async fn dirty(core: &Core, sandbox: &Sandbox, vm: &Vmm) -> Result<Size, Error> {
    let control = core.config.deadlines.control();
    let dirty = tokio::time::timeout(control, vm.client.dirty())
        .await
        .map_err(|_| Error::Deadline {
            id: sandbox.id.clone(),
            what: "a look at what is dirty",
            ms: control.as_millis(),
        })?
        .map_err(vmm_error(sandbox, vm, "ask what is dirty"))?;
    Ok(Size { packs_needed: dirty.packs_needed, pages: dirty.memory_pages + dirty.disk_blocks })
}

/// The first part of a snapshot, with the guest running. What cannot be sent ahead is sent later.
async fn send_ahead(core: &Core, sandbox: &Sandbox, vm: &Vmm) {
    // A round that was under way anyway is waited for: two of them would get into each other's way.
    let _turn = sandbox.next_round().await;
    let ahead = async {
        let size = dirty(core, sandbox, vm).await?;
        if size.pages >= WORTH_A_ROUND_PAGES {
            core.round(sandbox, size).await?;
        }
        Ok::<_, Error>(())
    };
    if let Err(error) = ahead.await {
        tracing::warn!(id = %sandbox.id, error = error.chain(), "nothing was sent ahead of a snapshot");
    }
}

async fn commit_head(
    core: &Core,
    sandbox: &Sandbox,
    snapshot: &Snapshot,
    commit: stasis_snapshot::ids::CommitId,
) -> Result<(), Error> {
    let portable = sandbox.record().portable(State::Paused);
    let bug = |_| Error::Bug("a record that is no JSON");
    let record = Named {
        version: Portable::VERSION,
        name: snapshot.name.clone(),
        created_at: snapshot.created_at,
        body: serde_json::to_value(&portable).map_err(bug)?,
    };
    let change = Change {
        state: HeadState::Paused,
        manifest: Some(snapshot.manifest.clone()),
        record: serde_json::to_value(&record).map_err(bug)?,
    };
    let attempt = Attempt::first(&snapshot.id, &core.owner, change, commit).map_err(Core::head_error(sandbox))?;
    let register = core.store.head_of(&owner(&snapshot.tenant, &snapshot.id)?);
    let mut pacer = Backoff::within(core.config.deadlines.settle());
    reach(Point::HeadSends);
    let outcome = register.commit(&attempt, Sent::Never, &mut pacer).await;
    reach(Point::HeadSettled);
    match outcome {
        Outcome::Committed { .. } => Ok(()),
        // Its id is random, and nobody else's.
        Outcome::Superseded { .. } | Outcome::Fenced { .. } => Err(Error::SnapshotExists(snapshot.name.clone())),
        Outcome::Refused { cause } => Err(Error::Store { action: "commit the head of the snapshot", source: cause }),
        // Nothing depends on it: it may show up later, under the name that was asked for.
        Outcome::Unknown { cause } => {
            Err(Error::Store { action: "see whether the snapshot was committed", source: cause })
        }
    }
}

/// Every snapshot of `tenant`, in no order. What cannot be read is left out, and logged.
pub async fn list(core: &Core, tenant: &str) -> Result<Vec<Snapshot>, Error> {
    let prefix = format!("v1/{tenant}/snapshot/");
    let heads = core.store.list_all(&prefix).await?;
    let ids = heads.into_iter().filter_map(|(key, _)| {
        let id = key.strip_prefix(&prefix)?.strip_suffix("/head")?;
        (!id.contains('/')).then(|| id.to_owned())
    });
    let read = |id: String| async move {
        let current = core.store.head_of(&owner(tenant, &id)?).read().await.doing("read a snapshot's head")?;
        Ok::<_, Error>(current.and_then(|current| match snapshot_in(tenant, current) {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(id, error, "a snapshot's head cannot be used");
                None
            }
        }))
    };
    let found: Vec<_> = futures::stream::iter(ids).map(read).buffer_unordered(READS).try_collect().await?;
    Ok(found.into_iter().flatten().collect())
}

/// `None` for a tombstone.
fn snapshot_in(tenant: &str, current: Current) -> Result<Option<Snapshot>, String> {
    let head = current.head;
    let (HeadState::Paused, Some(manifest)) = (head.state, head.manifest) else { return Ok(None) };
    let named: Named = serde_json::from_value(head.record).map_err(|e| e.to_string())?;
    let versioned = Versioned { version: named.version, bytes: named.body.to_string().into_bytes() };
    let portable = Portable::decode(&versioned).map_err(|e| e.to_string())?;
    let (id, tenant) = (head.sandbox, tenant.to_owned());
    Ok(Some(Snapshot { id, tenant, name: named.name, created_at: named.created_at, spec: portable.spec, manifest }))
}

/// A sandbox that was restored from the snapshot and has a VM here. Nothing of it would be lost: its own head names the packs it needs. Clients
/// are told all the same that the snapshot is in use.
fn user_of(core: &Core, tenant: &str, id: &str) -> Option<SandboxId> {
    let users = core.registry.with_vm().into_iter();
    users
        .filter(|sandbox| sandbox.tenant == tenant && sandbox.record().spec.snapshot.as_deref() == Some(id))
        .map(|sandbox| sandbox.id.clone())
        .next()
}

/// Deletes a snapshot: a tombstone in place of its head. What only it named is left to the collector. Sandboxes that were made from it name
/// what they need in their own heads.
pub async fn delete(core: &Arc<Core>, tenant: &str, id: &str) -> Result<(), Error> {
    let missing = || Error::NoSnapshot(id.to_owned());
    let place = owner(tenant, id).map_err(|_| missing())?;
    let register: Register<_> = core.store.head_of(&place);
    let current = register.read().await.doing("read a snapshot's head")?.ok_or_else(missing)?;
    if current.head.state == HeadState::Deleted {
        return Err(missing());
    }
    let attempt = Attempt::delete(&current, core.commit_id())
        .map_err(|e| Error::Damaged { object: place.head(), source: e.into() })?;
    if let Some(user) = user_of(core, tenant, id) {
        return Err(Error::SnapshotInUse { snapshot: id.to_owned(), sandbox: user });
    }
    let (settle, core, id) = (core.config.deadlines.settle(), core.clone(), id.to_owned());
    detached(async move {
        core.journal.forget_secrets(&id)?;
        reach(Point::HeadSends);
        let outcome = register.commit(&attempt, Sent::Never, &mut Backoff::within(settle)).await;
        reach(Point::HeadSettled);
        match outcome {
            // By somebody else: it is deleted all the same.
            Outcome::Committed { .. } | Outcome::Superseded { .. } | Outcome::Fenced { .. } => Ok(()),
            Outcome::Refused { cause } | Outcome::Unknown { cause } => {
                Err(Error::Store { action: "write the tombstone of the snapshot", source: cause })
            }
        }
    })
    .await
}

/// Makes a sandbox of `tenant` that goes on where the snapshot stood, under an identity of its own.
pub async fn restore(
    core: &Arc<Core>,
    tenant: &str,
    asked: snapshot_request::Restore,
) -> Result<(Record, Timing), Error> {
    let mut found = list(core, tenant).await?;
    found.retain(|snapshot| snapshot.name == asked.name);
    let snapshot = found.pop().ok_or(Error::NoSnapshot(asked.name))?;
    let spec = Spec {
        timeout_s: asked.timeout_s,
        auto_pause: asked.auto_pause,
        network_policy: asked.network_policy.or(snapshot.spec.network_policy),
        env_vars: snapshot.spec.env_vars.into_iter().chain(asked.env_vars).collect(),
        snapshot: Some(snapshot.id.clone()),
        created_at: core.sources.now_ms(),
        ..snapshot.spec
    };
    super::create::from_snapshot(core, tenant, spec, (snapshot.id, snapshot.manifest)).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::tests_support::sample;
    use stasis_snapshot::commit::Head;
    use stasis_snapshot::ids::{CommitId, Digest};
    use stasis_snapshot::store::ETag;

    #[test]
    fn a_head_says_everything_and_a_tombstone_nothing() {
        let portable = sample("sbx-a").portable(State::Paused);
        let record = Named {
            version: Portable::VERSION,
            name: "warm".to_owned(),
            created_at: 7,
            body: serde_json::to_value(&portable).unwrap(),
        };
        let manifest = ManifestRef { key: "k".to_owned(), digest: Digest::of(b"m") };
        let change = Change {
            state: HeadState::Paused,
            manifest: Some(manifest.clone()),
            record: serde_json::to_value(&record).unwrap(),
        };
        let attempt = Attempt::first("snap-a", "me", change, CommitId([1; 16])).unwrap();
        let current = |head: Head| Current { head, etag: ETag("e".to_owned()) };
        let found = snapshot_in("dev", current(attempt.head().clone())).unwrap().unwrap();
        assert_eq!((found.name.as_str(), found.created_at, found.manifest), ("warm", 7, manifest));
        assert_eq!(found.spec, portable.spec);
        let deleted = Attempt::delete(&current(attempt.head().clone()), CommitId([2; 16])).unwrap();
        assert_eq!(snapshot_in("dev", current(deleted.head().clone())).unwrap(), None);
    }

    #[test]
    fn made_up_names_are_plain() {
        assert_eq!(made_up("system/debian:bookworm", "snap-0123456789"), "system-debian-bookworm-01234567");
    }
}
