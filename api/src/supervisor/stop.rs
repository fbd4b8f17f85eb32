//! Stop: the guest writes its disks out, stands still, and its disks alone are captured and committed. What it had in memory is gone.
//!
//! All the rules of a pause hold (see `pause` and `settle`): success is answered when the head is committed, a failure before the head PUT
//! lets the guest run on, and after it the outcome is settled first.

use super::capture::Size;
use super::machine::vmm_error;
use super::settle::{Answer, ReadyToCommit, abandon, answer, finish};
use super::{Core, detached, spawn_within};
use crate::error::Error;
use crate::fail_points::{Point, reach};
use crate::journal::{OperationId, OperationKind};
use crate::registry::{OperationGuard, Sandbox};
use crate::states::{Event, State};
use crate::store::place;
use crate::timing::Timing;
use crate::vmm_process::Vmm;
use stasis_agent::protocol::ExecRequest;
use stasis_snapshot::commit::{Attempt, Change, HeadState, Sent};
use stasis_snapshot::compact;
use stasis_snapshot::manifest::Lineage;
use stasis_vmm::control::types::CaptureMode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// How long a guest may take to write its disks out.
const SYNC: Duration = Duration::from_mins(1);
/// How long its agent may need beyond that.
const MARGIN: Duration = Duration::from_secs(5);

/// Stops a running sandbox and waits until that is durable, or known to have failed, or unknown.
pub async fn stop(core: &Arc<Core>, sandbox: &Arc<Sandbox>) -> Answer {
    let state = sandbox.state();
    if state != State::Running && !state.leads_to_running() {
        return Err(Error::State { id: sandbox.id.clone(), state, verb: "stop" });
    }
    let guard = sandbox.lock().await;
    let (tell, told) = oneshot::channel();
    let (core, sandbox) = (core.clone(), sandbox.clone());
    detached(async move {
        spawn_within(run(core, sandbox, guard, tell));
        told.await.unwrap_or(Err(Error::Bug("a stop did not end")))
    })
    .await
}

async fn run(core: Arc<Core>, sandbox: Arc<Sandbox>, guard: OperationGuard, tell: oneshot::Sender<Answer>) {
    let (operation, vm) = match begin(&core, &sandbox) {
        Ok(begun) => begun,
        Err(error) => return answer(tell, Err(error)),
    };
    let (mut timing, since) = (Timing::default(), Instant::now());
    let result = match prepare(&core, &sandbox, &vm, operation, &mut timing).await {
        Ok(mut ready) => finish(&core, &sandbox, &mut ready, &[operation], Some(tell), &mut timing, &guard).await,
        Err(error) => {
            // The head PUT was never sent: nothing can have been committed.
            abandon(&core, &sandbox, &error, &guard).await;
            Some((tell, Err(error)))
        }
    };
    sandbox.set_phase(None);
    if let Some((_, outcome)) = &result {
        core.account(&sandbox, "stop", since, outcome.as_ref().err(), &timing);
    }
    let note = match &result {
        Some((_, Err(error))) => error.chain(),
        Some((_, Ok(_))) => "ok".to_owned(),
        None => "settled after the answer".to_owned(),
    };
    if let Err(error) = core.journal.end(operation, &note, core.sources.now_ms()) {
        tracing::error!(id = %sandbox.id, error = error.to_string(), "cannot note the end of a stop");
    }
    // The lock is free before the answer, so that a client's next request finds it so.
    drop(guard);
    if let Some((tell, outcome)) = result {
        answer(tell, outcome.map(|record| (record, timing)));
    }
}

fn begin(core: &Core, sandbox: &Sandbox) -> Result<(OperationId, Arc<Vmm>), Error> {
    let state = sandbox.state();
    if state != State::Running {
        return Err(Error::State { id: sandbox.id.clone(), state, verb: "stop" });
    }
    let vm = sandbox.vm().ok_or(Error::Bug("a running sandbox without a VM"))?;
    let operation = core.journal.begin(&sandbox.id, OperationKind::Stop, core.sources.now_ms())?;
    core.registry.begin(sandbox, Event::Stop, "stop")?;
    Ok((operation, vm))
}

/// Everything from the guest's own write-out to a manifest in the store, with what is journaled before the head PUT.
async fn prepare(
    core: &Core,
    sandbox: &Sandbox,
    vm: &Vmm,
    operation: OperationId,
    timing: &mut Timing,
) -> Result<ReadyToCommit, Error> {
    let begun = Instant::now();
    sandbox.set_phase(Some("sync"));
    write_out(core, sandbox, vm).await?;
    timing.since("sync", begun);

    let control = core.config.deadlines.control();
    sandbox.set_phase(Some("stop"));
    let begun = Instant::now();
    core.lower_network(sandbox, vm).await?;
    let report = tokio::time::timeout(control, vm.client.pause())
        .await
        .map_err(|_| Error::Deadline { id: sandbox.id.clone(), what: "stopping the guest", ms: control.as_millis() })?
        .map_err(vmm_error(sandbox, vm, "stop the guest"))?;
    reach(Point::GuestParked);
    timing.since("stop", begun);

    let current = core.held_head(sandbox).await?;
    let place = place(&sandbox.tenant, &sandbox.id)?;
    let commit = core.commit_id();
    let generation = place.generation(current.head.seq + 1, current.head.epoch, commit);
    let size = Size { packs_needed: 1, pages: report.dirty_disk_blocks + compact::Limits::default().pages };
    let grants = core.grant_packs(&generation, size, true).await?;
    let granted: Vec<_> = grants.objects.iter().map(|object| object.key.clone()).collect();

    let origin = sandbox.record().origin;
    sandbox.set_phase(Some("upload"));
    let (captured, known) = tokio::join!(
        core.capture(sandbox, vm, grants, CaptureMode::Disks, timing),
        core.known_packs(sandbox, current.head.manifest.as_ref().or(origin.as_ref()))
    );
    let (draft, captured) = captured?;

    sandbox.set_phase(Some("commit"));
    let begun = Instant::now();
    let lineage = Lineage {
        sandbox: sandbox.id.to_string(),
        seq: current.head.seq + 1,
        epoch: current.head.epoch,
        commit,
        parent: current.head.manifest.clone(),
    };
    let stored = (&place, &generation, generation.manifest());
    let published = core.publish(sandbox, &draft, lineage, stored, &known).await?;
    timing.bytes("sent", captured.sent_bytes + published.bytes.len() as u64);
    timing.since("manifest", begun);

    let change = Change {
        state: HeadState::Stopped,
        manifest: Some(published.manifest),
        record: Core::head_record(sandbox, State::Stopped)?,
    };
    let attempt = Attempt::next(&current, change, commit).map_err(Core::head_error(sandbox))?;
    let cancel = attempt.cancel(Some(&current), core.commit_id()).map_err(Core::head_error(sandbox))?;
    core.propose(operation, &[&attempt, &cancel])?;
    Ok(ReadyToCommit {
        attempt,
        cancel,
        sent: Sent::Never,
        leftovers: published.leftovers,
        unwritten: granted.into_iter().filter(|key| !published.known.names(key)).collect(),
        known: Some(published.known),
        notes: None,
    })
}

/// What the guest has written to files is on its disks afterwards. A guest whose agent cannot say so is not stopped: what it has in memory would
/// be lost in silence.
async fn write_out(core: &Core, sandbox: &Sandbox, vm: &Vmm) -> Result<(), Error> {
    if !sandbox.record().spec.agent {
        return Ok(());
    }
    let failed = |what: String| Error::Agent { id: sandbox.id.clone(), action: "write its disks out", what };
    let request = ExecRequest {
        command: "sync".to_owned(),
        cwd: None,
        user: None,
        env: std::collections::BTreeMap::new(),
        timeout_ms: u64::try_from(SYNC.as_millis()).unwrap_or(u64::MAX),
        output_limit: 4096,
    };
    let done = core.agent(vm).exec(&request, SYNC + MARGIN).await.map_err(|e| failed(e.to_string()))?;
    if done.exit_code == 0 { Ok(()) } else { Err(failed(format!("sync ended with status {}", done.exit_code))) }
}
