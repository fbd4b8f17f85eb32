//! What must hold of a service whatever was done to it: tests that crash and break things end with these.
//!
//! - Every move of every sandbox is in the journal, one after the other, and in the state table.
//! - A sandbox has one VMM at most.
//! - Whatever was interrupted comes to rest, and what is not deleted can be used.
//! - What a guest has done since is never less than what it had done when a pause was answered.
//! - Nothing is left of what is gone.

use std::time::{Duration, Instant};

use serde_json::Value;
use stasis_api::ids::SandboxId;
use stasis_api::states::{Event, State, next};

use crate::service::Service;
use crate::vmm::{Error, until};

/// How long a sandbox may take to come to rest once nothing is broken any more.
const REST: Duration = Duration::from_mins(3);

/// States without an operation under way, in the words of the API.
pub const AT_REST: [&str; 4] = ["running", "paused", "stopped", "deleted"];

/// The moves of a sandbox, checked: each begins where the one before ended, and is in the table. Answers the words of the events with the states they led to.
pub fn legal_moves(service: &Service, id: &str) -> Result<Vec<(Event, State)>, Error> {
    let key = SandboxId::parse(id).ok_or("no id")?;
    let mut at = None;
    let mut moves = Vec::new();
    for row in service.journal()?.transitions(&key)? {
        let before = row.before.as_deref().map(|word| State::parse(word).ok_or(format!("{word} is no state")));
        let (before, event) = (before.transpose()?, Event::parse(&row.event).ok_or("no event")?);
        let to = next(before, event);
        if before != at || to.map(State::as_str) != Some(row.after.as_str()) {
            return Err(format!("{id} was {at:?} and made an illegal move: {row:?}").into());
        }
        at = to;
        moves.extend(to.map(|to| (event, to)));
    }
    Ok(moves)
}

/// No sandbox has two VMMs, and none that is away has one.
pub fn one_vmm_each<'a>(service: &Service, ids: impl IntoIterator<Item = &'a String>) -> Result<(), Error> {
    for id in ids {
        let pids = service.vmms_of(id);
        if pids.len() > 1 {
            return Err(format!("{id} has several VMMs: {pids:?}").into());
        }
    }
    Ok(())
}

/// What the API says of a sandbox once no operation is under way; a delete that did not end is asked for again.
pub async fn come_to_rest(service: &Service, id: &str) -> Result<Value, Error> {
    let begun = Instant::now();
    loop {
        let told = service.call("GET", &format!("/v1/sandbox/{id}"), None).await?;
        let state = told.text("state");
        if AT_REST.contains(&state.as_str()) {
            return Ok(told.json);
        }
        if begun.elapsed() > REST {
            return Err(format!("{id} is stuck: {told:?}; log: {}", service.log()).into());
        }
        if state == "deleting" {
            service.call("DELETE", &format!("/v1/sandbox/{id}"), None).await?;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// What a guest of pulse has done so far: it only grows, also over a pause, and begins anew with a boot. Fails when it has lost or doubled anything.
pub async fn progress(service: &Service, id: &str) -> Result<u64, Error> {
    let counts = service.vmm(id).metrics().await?.exit_counter.ok_or("a guest without a counter")?;
    if counts.out_gaps > 0 {
        return Err(format!("{id} went back in time: {counts:?}").into());
    }
    Ok(counts.outs)
}

/// Brings a sandbox that is not deleted to `running` and sees that its guest is well. Answers its progress.
pub async fn is_usable(service: &Service, id: &str) -> Result<u64, Error> {
    let told = come_to_rest(service, id).await?;
    let verb = match told["state"].as_str() {
        Some("paused") => Some("resume"),
        Some("stopped") => Some("start"),
        _ => None,
    };
    if let Some(verb) = verb {
        service.call("POST", &format!("/v1/sandbox/{id}/{verb}"), None).await?.expect(200)?;
    }
    service.pulse_is_well(id).await?;
    progress(service, id).await
}

/// Deletes what is there and waits until no process, run directory or socket is left.
pub async fn nothing_is_left<'a>(service: &Service, ids: impl IntoIterator<Item = &'a String>) -> Result<(), Error> {
    for id in ids {
        let begun = Instant::now();
        while come_to_rest(service, id).await?["state"] != "deleted" {
            let reply = service.call("DELETE", &format!("/v1/sandbox/{id}"), None).await?;
            // One whose life ends by itself just now is asked again.
            if ![204, 409].contains(&reply.status) || begun.elapsed() > REST {
                return Err(format!("{id} cannot be deleted: {reply:?}").into());
            }
        }
    }
    service.await_no_vmm().await.map_err(|e| format!("{e}; log: {}", service.log()))?;
    until("idle VMMs that are used", || {
        // Each has its run directory, and each run directory its VMM.
        let dirs = std::fs::read_dir(service.dir.path().join("d/run"))?.flatten().count();
        Ok((dirs == service.idle_vmm_pids().len()).then_some(()))
    })
    .await
}
