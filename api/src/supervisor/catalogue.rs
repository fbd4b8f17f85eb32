//! The bucket is the catalogue: sandboxes found by their heads alone, for a data directory that was lost or is new.
//!
//! A head that says `paused` or `stopped` belongs to whoever resumes or starts it, so it is taken up. One that says `live` belongs to its owner: it is only
//! reported, unless the caller knows that the owner is dead and asks to take it over, which puts it back to its last pause or stop.

use super::Core;
use crate::error::{Error, StoreContext as _};
use crate::ids::SandboxId;
use crate::journal::keys::is_tenant;
use crate::record::{Portable, Record};
use crate::registry::Sandbox;
use crate::states::State;
use crate::store::place;
use serde::Serialize;
use stasis_snapshot::commit::{Attempt, Current, Head, HeadState};
use stasis_snapshot::manifest::Versioned;

/// What became of one head.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct Found {
    /// Whose.
    pub tenant: String,
    /// Which.
    pub id: SandboxId,
    /// `recovered`, `known`, `live`, `never-paused`, `deleted` or `unreadable`.
    pub outcome: &'static str,
    /// Who owns it, why it cannot be read.
    pub note: String,
}

/// Looks at every head of `tenant`, or of all tenants, and takes up what may be taken up.
pub async fn recover(core: &Core, tenant: Option<&str>, take_over: bool) -> Result<Vec<Found>, Error> {
    let prefix = match tenant {
        Some(tenant) => stasis_snapshot::layout::sandboxes(tenant)?,
        None => "v1/".to_owned(),
    };
    let mut found = Vec::new();
    for (key, _) in core.store.list_all(&prefix).await? {
        let Some((tenant, id)) = head_key(&key) else { continue };
        let (outcome, note) = match one(core, &tenant, &id, take_over).await {
            Ok(outcome) => outcome,
            Err(error) => ("unreadable", error.chain()),
        };
        tracing::info!(%id, tenant, outcome, note, "found in the bucket");
        found.push(Found { tenant, id, outcome, note });
    }
    Ok(found)
}

/// At the start with an empty journal. A store that cannot be listed now can be recovered from later, by hand.
pub(super) async fn recover_at_start(core: &Core) {
    match recover(core, None, false).await {
        Ok(found) if found.is_empty() => {}
        Ok(found) => {
            let recovered = found.iter().filter(|f| f.outcome == "recovered").count();
            tracing::info!(
                recovered,
                heads = found.len(),
                "the journal is empty; sandboxes were recovered from the bucket"
            );
        }
        Err(error) => tracing::warn!(
            error = error.chain(),
            "the bucket cannot be searched for sandboxes; try stasis recover later"
        ),
    }
}

/// Tenant and id of a head's key; `None` for every other key.
fn head_key(key: &str) -> Option<(String, SandboxId)> {
    let mut parts = key.split('/');
    let (version, tenant, kind, id, name) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let is_head = version == "v1" && kind == "sandbox" && name == "head" && parts.next().is_none() && is_tenant(tenant);
    is_head.then(|| SandboxId::parse(id)).flatten().map(|id| (tenant.to_owned(), id))
}

async fn one(core: &Core, tenant: &str, id: &SandboxId, take_over: bool) -> Result<(&'static str, String), Error> {
    let _one_at_a_time = core.adoption.lock().await;
    // One that was deleted here may have been put back elsewhere: the head says.
    if core.registry.get(id).is_some_and(|known| known.state() != State::Deleted) {
        return Ok(("known", String::new()));
    }
    let register = core.store.head_of(&place(tenant, id)?);
    let Some(current) = register.read().await.doing("read a head")? else {
        return Ok(("unreadable", "it is gone".to_owned()));
    };
    let head = &current.head;
    let held = format!("held by supervisor {} since epoch {}", head.owner, head.epoch);
    match (head.state, head.manifest.is_some()) {
        (HeadState::Deleted, _) => Ok(("deleted", String::new())),
        (_, false) => Ok(("never-paused", held)),
        (HeadState::Paused | HeadState::Stopped, true) => {
            adopt(core, tenant, id, current)?;
            Ok(("recovered", String::new()))
        }
        (HeadState::Live, true) if take_over || head.owner == core.owner => {
            let sandbox = adopt(core, tenant, id, current.clone())?;
            // Until the head says that it rests, nobody wakes it here. One that was faster has taken it over as well.
            let _guard = sandbox.lock().await;
            if !matches!(sandbox.state(), State::Paused | State::Stopped) {
                return Ok(("recovered", String::new()));
            }
            let attempt =
                Attempt::take_over(&current, &core.owner, core.commit_id()).map_err(Core::head_error(&sandbox))?;
            core.commit(&sandbox, &attempt, "take the sandbox over").await?;
            core.lay_to_rest(&sandbox).await;
            Ok(("recovered", format!("taken over; was {held}")))
        }
        (HeadState::Live, true) => {
            Ok(("live", format!("{held}; take it over only if that supervisor is gone for good")))
        }
    }
}

/// Takes up what rests in the bucket. The caller holds [`Core::adoption`](super::Core), and the sandbox is unknown here or deleted.
pub(super) fn adopt(
    core: &Core,
    tenant: &str,
    id: &SandboxId,
    current: Current,
) -> Result<std::sync::Arc<Sandbox>, Error> {
    let (portable, rest) = (portable(id, &current.head)?, rest(id, &current.head)?);
    let mut record = Record::new(id.clone(), tenant.to_owned(), portable.spec);
    record.data_key = core.draw_data_key();
    record.state = rest;
    record.disks_only = rest == State::Stopped;
    record.state_changed_at = core.sources.now_ms();
    record.commit.clone_from(&current.head.manifest);
    (record.epoch, record.seq) = (current.head.epoch, current.head.seq);
    let sandbox = core.registry.adopt(record, "found in the bucket")?;
    sandbox.set_head(Some(current));
    Ok(sandbox)
}

/// Where a sandbox is, or is back, that nobody runs: `paused`, or `stopped` when the head names the manifest of a stop.
pub(super) fn rest(id: &SandboxId, head: &Head) -> Result<State, Error> {
    let stopped = match head.state {
        HeadState::Paused => false,
        HeadState::Stopped => true,
        HeadState::Live | HeadState::Deleted => portable(id, head)?.state == State::Stopped,
    };
    Ok(if stopped { State::Stopped } else { State::Paused })
}

/// Our record in a head, as a head that says `state` carries it.
pub(super) fn record_at(id: &SandboxId, head: &Head, state: State) -> Result<serde_json::Value, Error> {
    let portable = Portable { state, ..portable(id, head)? };
    let versioned = portable.encode().map_err(|_| Error::Bug("a record that is no JSON"))?;
    let body: serde_json::Value =
        serde_json::from_slice(&versioned.bytes).map_err(|_| Error::Bug("a record that is no JSON"))?;
    Ok(serde_json::json!({ "version": versioned.version, "body": body }))
}

/// Our record in a head.
fn portable(id: &SandboxId, head: &Head) -> Result<Portable, Error> {
    let failed = |source| Error::Portable { id: id.clone(), source };
    let version =
        head.record.get("version").and_then(serde_json::Value::as_u64).and_then(|v| u16::try_from(v).ok()).unwrap_or(0);
    let bytes = head.record.get("body").map(ToString::to_string).unwrap_or_default().into_bytes();
    Portable::decode(&Versioned { version, bytes }).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_heads_are_heads() {
        let (tenant, id) = head_key("v1/dev/sandbox/sbx-abc/head").unwrap();
        assert_eq!((tenant.as_str(), id.as_str()), ("dev", "sbx-abc"));
        for other in [
            "v1/dev/sandbox/sbx-abc/1-1-00/manifest",
            "v1/dev/sandbox/sbx-abc/head/x",
            "v1/dev/snapshot/sbx-abc/head",
            "v1/dev/sandbox/abc/head",
            "v1/../sandbox/sbx-abc/head",
            "v2/dev/sandbox/sbx-abc/head",
            "v1/template/00/rootfs",
        ] {
            assert_eq!(head_key(other), None, "{other}");
        }
    }
}
