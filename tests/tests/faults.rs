//! The store fails, the VMM dies, the supervisor dies: a pause that cannot succeed leaves a running guest that noticed nothing.

use std::time::Duration;

use http::Method;
use stasis_api::dev::{Fault, Rule};
use stasis_tests::invariants::come_to_rest;
use stasis_tests::service::{Options, Service};
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::{Error, no_pulse};

fn main() {
    let mut suite = Suite::default();
    for (step, path) in [("pack", "/pack/"), ("manifest", "/manifest"), ("head", "/head")] {
        for (name, fault, status, cause) in [
            ("refused_401", Fault::Refuse(401), 502, &["401", "credential", "unauthori"][..]),
            ("refused_403", Fault::Refuse(403), 502, &["403", "forbidden", "permission"]),
            ("busy_503", Fault::Refuse(503), 503, &["503", "unavailable"]),
            ("full_507", Fault::Refuse(507), 507, &["507", "full", "space"]),
            ("wrong_bucket_404", Fault::Refuse(404), 502, &["404", "bucket", "not found", "no such"]),
            ("down", Fault::Drop, 503, &["connect", "closed", "reach", "unavailable", "error sending"]),
            ("silent", Fault::Hang, 503, &["time", "deadline", "within"]),
        ] {
            let test = format!("a_store_that_is_{name}_at_the_{step}_leaves_the_guest_running");
            suite = suite.test(&test, no_pulse(), move || store_fails(path, fault, status, cause));
        }
    }
    suite
        .test("a_lost_reply_to_the_head_is_settled_as_paused", no_pulse(), || head_settles(Fault::LoseReply))
        .test("a_500_after_the_head_was_stored_is_settled_as_paused", no_pulse(), || {
            head_settles(Fault::ReplaceReply(500))
        })
        .test("a_head_that_lands_late_is_never_behind_a_running_guest", no_pulse(), late_head)
        .test("a_vmm_killed_while_it_runs_is_noticed", no_pulse(), vmm_killed)
        .test("a_vmm_killed_during_a_pause_goes_back_to_its_last_commit", no_pulse(), vmm_killed_in_pause)
        .test("a_supervisor_killed_adopts_its_guests", no_pulse(), supervisor_killed)
        .test("a_supervisor_killed_during_a_pause_ends_in_a_known_state", no_pulse(), supervisor_killed_in_pause)
        .main();
}

/// Answers within seconds, so that a test of every fault at every step stays short, and yet not sooner than a busy machine does.
fn impatient() -> Options {
    let mut options = Options::default();
    for (name, ms) in [("STORE", "3000"), ("COMMIT", "3000"), ("SETTLE", "8000"), ("CAPTURE", "12000")] {
        options.environment.push((format!("STASIS_DEADLINES_{name}_MS"), ms.to_owned()));
    }
    options
}

/// `status` says what the store's failure is to the client, or 504 when that ran out of time first.
async fn store_fails(path: &'static str, fault: Fault, status: u16, cause: &'static [&'static str]) -> Outcome {
    let service = Service::start(impatient()).await?;
    let id = service.create_pulse().await?;
    service.proxy.add(Rule::every(Method::PUT, path, fault.clone()));
    let failed = service.pause(&id).await?;
    assert!(failed.status == status || failed.status == 504, "{failed:?}");
    assert!(path == "/head" || failed.status != 504 || matches!(fault, Fault::Hang), "{failed:?}");
    let message = failed.text("message").to_lowercase();
    assert!(cause.iter().any(|word| message.contains(word)), "the cause is named: {message}");
    service.proxy.clear();
    // An unknown outcome at the head is settled with the store back; every other failure has the guest running already.
    service.await_state(&id, "running").await?;
    service.pulse_is_well(&id).await?;
    service.pause(&id).await?.expect(201)?;
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}

async fn head_settles(fault: Fault) -> Outcome {
    let service = Service::start(impatient()).await?;
    let id = service.create_pulse().await?;
    service.proxy.add(Rule::once(Method::PUT, "/head", fault));
    service.pause(&id).await?.expect(201)?;
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}

/// The head PUT times out and lands later. Whatever the answer was: either the sandbox is paused, or it runs and the late head was burnt.
async fn late_head() -> Outcome {
    let service = Service::start(impatient()).await?;
    let id = service.create_pulse().await?;
    service.proxy.add(Rule::once(Method::PUT, "/head", Fault::ApplyLate(Duration::from_secs(5))));
    let answer = service.pause(&id).await?;
    let state = service.state(&id).await?;
    tokio::time::sleep(Duration::from_secs(6)).await;
    match answer.status {
        201 => assert_eq!(state, "paused"),
        _ => service.await_state(&id, "running").await?,
    }
    if state == "paused" {
        service.resume(&id).await?.expect(200)?;
    }
    service.pulse_is_well(&id).await?;
    service.pause(&id).await?.expect(201)?;
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}

fn kill(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// Without a commit the sandbox is lost, and says so; with one it goes back to that.
async fn vmm_killed() -> Outcome {
    let service = Service::start(impatient()).await?;
    let never_paused = service.create_pulse().await?;
    service.vmm_pids().into_iter().for_each(kill);
    service.await_state(&never_paused, "deleted").await.or_else(|e| {
        // A deleted sandbox may also be gone from the API; the log then says why.
        if service.log().contains(&never_paused) { Ok(()) } else { Err(e) }
    })?;
    let id = service.create_pulse().await?;
    service.pause(&id).await?.expect(201)?;
    service.resume(&id).await?.expect(200)?;
    service.vmm_pids().into_iter().for_each(kill);
    service.await_state(&id, "paused").await?;
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}

async fn vmm_killed_in_pause() -> Outcome {
    let service = Service::start(impatient()).await?;
    let id = service.create_pulse().await?;
    service.pause(&id).await?.expect(201)?;
    service.resume(&id).await?.expect(200)?;
    service.proxy.add(Rule::once(Method::PUT, "/pack/", Fault::Hold));
    let killing = async {
        service.await_held().await?;
        service.vmm_pids().into_iter().for_each(kill);
        Ok::<_, Error>(())
    };
    let (answer, killed) = tokio::join!(service.pause(&id), killing);
    killed?;
    assert!(answer?.status >= 500);
    service.proxy.release();
    service.await_state(&id, "paused").await?;
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}

async fn supervisor_killed() -> Outcome {
    let mut service = Service::start(impatient()).await?;
    let running = service.create_pulse().await?;
    let paused = service.create_pulse().await?;
    service.pause(&paused).await?.expect(201)?;
    let pids = service.vmm_pids();
    service.kill_supervisor()?;
    service.start_supervisor().await?;
    assert_eq!(service.vmm_pids(), pids, "the guest was adopted, not started anew");
    assert_eq!(service.state(&running).await?, "running");
    assert_eq!(service.state(&paused).await?, "paused");
    service.pulse_is_well(&running).await?;
    service.pause(&running).await?.expect(201)?;
    service.resume(&running).await?.expect(200)?;
    service.resume(&paused).await?.expect(200)?;
    service.pulse_is_well(&running).await?;
    service.pulse_is_well(&paused).await
}

/// Killed with the upload, with the manifest and with the head under way.
async fn supervisor_killed_in_pause() -> Outcome {
    for path in ["/pack/", "/manifest", "/head"] {
        let mut service = Service::start(impatient()).await?;
        let id = service.create_pulse().await?;
        service.proxy.add(Rule::once(Method::PUT, path, Fault::Hold));
        tokio::select! {
            answer = service.pause(&id) => return Err(format!("{path}: an answer before the kill: {answer:?}").into()),
            held = service.await_held() => held?,
        }
        service.kill_supervisor()?;
        service.proxy.release();
        service.start_supervisor().await?;
        match come_to_rest(&service, &id).await?["state"].as_str() {
            Some("paused") => drop(service.resume(&id).await?.expect(200)?),
            Some("running") => {}
            other => return Err(format!("{path}: the sandbox is {other:?}: {}", service.log()).into()),
        }
        service.pulse_is_well(&id).await?;
        service.pause(&id).await?.expect(201)?;
        service.resume(&id).await?.expect(200)?;
        service.pulse_is_well(&id).await?;
    }
    Ok(())
}
