//! What the sandboxes of a tenant are doing, for people who watch: once (`GET /v1/live`), or as it changes (`GET /v1/events`). Wakes nothing.
//!
//! `/v1/events` is a stream of server-sent events: `sandbox` with a sandbox as `/v1/live` lists it, each time it has changed; `gone` with
//! the id of one that was deleted; `listed` after those that were there when the stream began. What a watcher missed is not sent later:
//! it is always told how things stand now, so a slow one costs nothing.

use super::answers::live_sandbox;
use super::auth::authenticated;
use super::table::Route;
use super::{Shared, Tenant};
use crate::costs::Cost;
use crate::openapi::{Operation, Tag};
use crate::registry::Sandbox;
use crate::sources::rfc3339;
use crate::states::State as SandboxState;
use crate::supervisor::Core;
use crate::wire::live::{LiveList, LiveSandbox, Moved, PastOperation, Phase};
use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, Uri};
use axum::response::sse::{Event, Sse};
use futures::Stream;
use futures::stream::{self, StreamExt as _};
use serde_json::json;
use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Changes that come sooner after each other are told together.
const TOGETHER: Duration = Duration::from_millis(50);
/// A watcher that is told nothing hears this often that the stream is alive; then its key is looked at again.
const ALIVE: Duration = Duration::from_secs(15);

pub(super) fn routes() -> Vec<Route> {
    let operation = Operation::new("listLiveSandboxes", Tag::Sandbox, "Show what all sandboxes are doing")
        .says("With what their last operations cost. Wakes nothing. `GET /v1/events` tells the same as it changes, as server-sent events.")
        .answers::<LiveList>(200, "All sandboxes that are not deleted.");
    vec![Route::get("/v1/live", live, operation)]
}

fn watched(of: &Sandbox) -> LiveSandbox {
    let record = of.record();
    LiveSandbox {
        sandbox: live_sandbox(of),
        agent: record.spec.agent,
        timeout_at: record.deadline.map(|at| at / 1000),
        operations: of.costs().iter().map(|cost| operation(cost)).collect(),
    }
}

fn operation(cost: &Cost) -> PastOperation {
    let ms = |took: Duration| (took.as_secs_f64() * 1_000_000.0).round() / 1000.0;
    PastOperation {
        operation: cost.operation,
        ended_at: rfc3339(cost.ended_at),
        ms: ms(cost.took),
        phases: cost.timing.phases().iter().map(|&(name, took)| Phase { name, ms: ms(took) }).collect(),
        bytes: cost.timing.byte_counts().iter().map(|&(name, bytes)| Moved { name, bytes }).collect(),
        failure: cost.failure.clone(),
    }
}

/// Those that are not deleted, in the order of their making.
fn of_tenant(core: &Core, tenant: &str) -> Vec<Arc<Sandbox>> {
    let mut all = core.registry.all();
    all.retain(|sandbox| sandbox.tenant == tenant && sandbox.state() != SandboxState::Deleted);
    all.sort_by_key(|sandbox| (sandbox.record().spec.created_at, sandbox.id.clone()));
    all
}

/// 200 with the tenant's sandboxes, what they are doing, and what their last operations cost.
async fn live(State(core): Shared, Tenant(tenant): Tenant) -> Json<LiveList> {
    Json(LiveList { items: of_tenant(&core, &tenant).iter().map(|sandbox| watched(sandbox)).collect() })
}

/// 200 and events until the client goes away, its key is refused, or the supervisor ends.
pub(super) async fn events(
    State(core): Shared,
    Tenant(tenant): Tenant,
    uri: Uri,
    headers: HeaderMap,
) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let ending = core.ending.clone();
    let mut changes = core.registry.changes();
    changes.mark_changed();
    let watcher =
        Watcher { core, tenant, uri, headers, changes, told: BTreeMap::new(), listed: false, next: VecDeque::new() };
    let events = stream::unfold(watcher, |mut watcher| async move { Some((watcher.next().await?, watcher)) });
    Sse::new(events.take_until(ending.cancelled_owned()).map(Ok))
}

/// Who watches, and what it was told.
struct Watcher {
    core: Arc<Core>,
    tenant: String,
    uri: Uri,
    headers: HeaderMap,
    changes: watch::Receiver<u64>,
    /// Each sandbox as it was last told.
    told: BTreeMap<String, String>,
    listed: bool,
    next: VecDeque<Event>,
}

impl Watcher {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.next.pop_front() {
                return Some(event);
            }
            match tokio::time::timeout(ALIVE, self.changes.changed()).await {
                Ok(Ok(())) => {
                    tokio::time::sleep(TOGETHER).await;
                    self.changes.mark_unchanged();
                    self.look();
                }
                Ok(Err(_)) => return None,
                Err(_) => {
                    // A revoked key and a session that is over see nothing more.
                    let still = authenticated(&self.core, &self.uri, &self.headers).ok();
                    return (still.as_ref() == Some(&self.tenant)).then(|| Event::default().comment("alive"));
                }
            }
        }
    }

    /// Puts what differs from what was told into the queue.
    fn look(&mut self) {
        let mut before = std::mem::take(&mut self.told);
        for sandbox in of_tenant(&self.core, &self.tenant) {
            let (id, now) = (sandbox.id.to_string(), json!(watched(&sandbox)).to_string());
            if before.remove(&id).as_ref() != Some(&now) {
                self.next.push_back(Event::default().event("sandbox").data(&now));
            }
            self.told.insert(id, now);
        }
        let gone = before.keys().map(|id| Event::default().event("gone").data(json!({ "id": id }).to_string()));
        self.next.extend(gone);
        if !std::mem::replace(&mut self.listed, true) {
            self.next.push_back(Event::default().event("listed").data("{}"));
        }
    }
}
