//! Pause and resume through the REST API with pulse guests on this machine's own `/dev/kvm`: what is left, what is durable, what is refused.

use serde_json::{Value, json};
use stasis_api::dev::{Fault, Rule};
use stasis_tests::host;
use stasis_tests::service::{Options, Service};
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::no_pulse;

fn main() {
    Suite::default()
        .test("a_sandbox_sleeps_and_wakes_and_nothing_is_left", no_pulse(), sleeps_and_wakes)
        .test("paused_is_answered_only_after_the_head_is_committed", no_pulse(), durable_before_success)
        .test("a_client_that_hangs_up_cancels_nothing", no_pulse(), hang_up)
        .test("bad_requests_are_refused_and_lose_nothing", no_pulse(), bad_requests)
        .test("another_tenant_sees_nothing", no_pulse(), other_tenant)
        .test("damaged_objects_are_named_and_the_sandbox_stays_paused", no_pulse(), damaged_objects)
        .test("an_empty_supervisor_finds_what_sleeps_in_the_bucket", no_pulse(), bucket_is_the_catalogue)
        .test("a_supervisor_that_is_told_to_end_leaves_its_guests_running", no_pulse(), told_to_end)
        .test("or_pauses_them_all", no_pulse(), pauses_all)
        .test(
            "linux_is_refused_on_software_kvm_with_the_way_out",
            no_pulse().or_else(hardware).or_else(no_images),
            software_kvm,
        )
        .main();
}

fn no_images() -> Option<String> {
    host::missing(&host::built("images/templates/debian-bookworm"), "guest-images/linux/build makes it")
}

fn hardware() -> Option<String> {
    host::no_linux_guest().is_none().then(|| "this machine has hardware virtualization".to_owned())
}

async fn sleeps_and_wakes() -> Outcome {
    let service = Service::start(Options::default()).await?;
    let id = service.create_pulse().await?;
    for generation in 1..=3 {
        service.pulse_is_well(&id).await?;
        let paused = service.pause(&id).await?.expect(201)?;
        assert_eq!(paused.text("state"), "paused");
        for phase in ["stop", "state", "upload", "manifest", "head", "sent"] {
            assert!(paused.timing.contains(phase), "{phase} in {:?}", paused.timing);
        }
        service.await_no_vmm().await?;
        assert!(!service.run_dir(&id).exists(), "no socket is left");
        let left = walk(&service.dir.path().join("d"));
        // The supervisor's own, and that of the processes which go on beside it.
        let ours = |f: &String| {
            ["/journal.db", "/lock", "/owner", "/packs/", "/run/pool-", "/warden.", "/dialler-"]
                .iter()
                .any(|part| f.contains(part))
        };
        assert!(left.iter().all(ours), "no file is left: {left:?}");
        assert!(service.objects("v1/test/sandbox").iter().any(|o| o.ends_with("head")));
        let resumed = service.resume(&id).await?.expect(200)?;
        assert_eq!(resumed.text("state"), "running");
        assert!(resumed.timing.contains("dur="), "{:?}", resumed.timing);
        service.pulse_is_well(&id).await?;
        let counts = service.vmm(&id).metrics().await?.exit_counter.unwrap_or_default();
        assert_eq!(counts.out_gaps, 0, "generation {generation}");
    }
    service.call("DELETE", &format!("/v1/sandbox/{id}"), None).await?.expect(204)?;
    service.await_no_vmm().await?;
    // What it had stays until `stasis gc` takes it after the grace (house.rs); the tombstone stays for ever.
    let head =
        service.objects("v1/test/sandbox").into_iter().find(|o| o.ends_with("head")).ok_or("the head is gone")?;
    assert!(std::fs::read_to_string(head)?.contains("\"deleted\""), "a tombstone is left");
    Ok(())
}

fn walk(dir: &std::path::Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(walk(&path));
        } else {
            found.push(path.to_string_lossy().into_owned());
        }
    }
    found
}

async fn durable_before_success() -> Outcome {
    let service = Service::start(Options::default()).await?;
    let id = service.create_pulse().await?;
    service.proxy.add(Rule::once(http::Method::PUT, "/head", Fault::Hold));
    let mut pausing = std::pin::pin!(service.pause(&id));
    tokio::select! {
        answer = &mut pausing => return Err(format!("an answer before the head was stored: {answer:?}").into()),
        held = service.await_held() => held?,
    }
    // Nobody is told before, and the state is not either.
    tokio::select! {
        answer = &mut pausing => return Err(format!("an answer before the head was stored: {answer:?}").into()),
        state = service.state(&id) => assert_eq!(state?, "snapshotting"),
    }
    service.proxy.release();
    pausing.await?.expect(201)?;
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}

async fn hang_up() -> Outcome {
    let service = Service::start(Options::default()).await?;
    let id = service.create_pulse().await?;
    service.proxy.add(Rule::once(http::Method::PUT, "/pack/", Fault::Hold));
    tokio::select! {
        answer = service.pause(&id) => return Err(format!("an answer before the pack was stored: {answer:?}").into()),
        held = service.await_held() => held?,
    }
    service.proxy.release();
    service.await_state(&id, "paused").await?;
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}

async fn bad_requests() -> Outcome {
    let service = Service::start(Options::default()).await?;
    let id = service.create_pulse().await?;
    let key = service.key.clone();
    let raw = |method: &'static str, path: String, body: Option<&str>, key: String| {
        let (service, body) = (&service, body.map(str::to_owned));
        async move { service.call_as(&key, method, &path, body).await }
    };
    let pause = format!("/v1/sandbox/{id}/pause");
    for (key, path) in [("", pause.clone()), ("stasis_wrong", pause.clone())] {
        let refused = raw("POST", path, None, key.to_owned()).await?.expect(401)?;
        assert!(!refused.text("message").is_empty());
    }
    for unknown in ["sbx-aaaaaaaaaaaaaaaaaaaa", "no%20id", "..%2f..", "SBX-1"] {
        let refused = raw("POST", format!("/v1/sandbox/{unknown}/pause"), None, key.clone()).await?.expect(404)?;
        assert!(!refused.text("message").is_empty(), "{unknown}");
    }
    raw("POST", format!("/v1/sandbox/{id}/resume"), None, key.clone()).await?.expect(409)?;
    for (body, field) in [
        (r#"{"template_name":"test/pulse","vcpu":0}"#, "vcpu"),
        (r#"{"template_name":"test/pulse","vcpu":9}"#, "vcpu"),
        (r#"{"template_name":"test/pulse","memory":8}"#, "memory"),
        (r#"{"template_name":"test/pulse","memory":513}"#, "memory"),
        (r#"{"template_name":"test/pulse","memory_mib":99999}"#, "memory"),
        (r#"{"template_name":"test/pulse","timeout":0}"#, "timeout"),
        (r#"{"template_name":"test/pulse","timeout":28801}"#, "timeout"),
        (r#"{"template_name":"test/pulse","vcpu":"many"}"#, "vcpu"),
    ] {
        let refused = raw("POST", "/v1/sandbox".to_owned(), Some(body), key.clone()).await?.expect(400)?;
        let named = refused.json["errors"].as_array().cloned().unwrap_or_default();
        let named = named.iter().any(|e| e["field"].as_str().is_some_and(|f| f.contains(field)));
        assert!(named, "{body}: {:?}", refused.json);
    }
    raw("POST", "/v1/sandbox".to_owned(), Some("{"), key.clone()).await?.expect(400)?;
    let unknown = raw("POST", "/v1/sandbox/".to_owned(), Some(r#"{"template_name":"no/such"}"#), key.clone()).await?;
    assert!((400..500).contains(&unknown.status) && unknown.text("message").contains("no/such"), "{unknown:?}");
    let huge = format!(r#"{{"template_name":"{}"}}"#, "x".repeat(11 << 20));
    raw("POST", "/v1/sandbox".to_owned(), Some(&huge), key.clone()).await?.expect(413)?;
    raw("PATCH", format!("/v1/sandbox/{id}"), None, key.clone()).await?.expect(405)?;
    raw("GET", "/v1/nothing".to_owned(), None, key.clone()).await?.expect(404)?;
    service.pulse_is_well(&id).await?;
    service.pause(&id).await?.expect(201)?;
    service.pause(&id).await?.expect(409)?;
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}

async fn told_to_end() -> Outcome {
    let mut service = Service::start(Options::default()).await?;
    let id = service.create_pulse().await?;
    let guests = service.vmm_pids();
    assert!(service.end_supervisor().await?, "{}", service.log());
    assert_eq!(service.vmm_pids(), guests, "the guest goes on");
    service.pulse_is_well(&id).await?;
    service.start_supervisor().await?;
    assert_eq!((service.state(&id).await?.as_str(), service.vmm_pids()), ("running", guests), "adopted");
    service.pause(&id).await?.expect(201)?;
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}

async fn pauses_all() -> Outcome {
    let mut options = Options::default();
    options.environment.push(("STASIS_PAUSE_ALL".to_owned(), "true".to_owned()));
    let mut service = Service::start(options).await?;
    let mut ids = Vec::new();
    for _ in 0..6 {
        ids.push(service.create_pulse().await?);
    }
    assert!(service.end_supervisor().await?, "{}", service.log());
    service.await_no_vmm().await?;
    service.start_supervisor().await?;
    for id in &ids {
        assert_eq!(service.state(id).await?, "paused");
        service.resume(id).await?.expect(200)?;
        service.pulse_is_well(id).await?;
    }
    Ok(())
}

async fn other_tenant() -> Outcome {
    let service = Service::start(Options::default()).await?;
    let id = service.create_pulse().await?;
    let other = service.other_key()?;
    for (method, path) in [
        ("GET", format!("/v1/sandbox/{id}")),
        ("POST", format!("/v1/sandbox/{id}/pause")),
        ("POST", format!("/v1/sandbox/{id}/resume")),
        ("GET", format!("/v1/sandbox/{id}/inspect")),
        ("DELETE", format!("/v1/sandbox/{id}")),
    ] {
        service.call_as(&other, method, &path, None).await?.expect(404)?;
    }
    let listed = service.call_as(&other, "GET", "/v1/sandboxes", None).await?.expect(200)?;
    assert_eq!(listed.json["total_items"], json!(0));
    service.pulse_is_well(&id).await?;
    assert!(!service.log().contains(&service.key), "keys are not logged");
    Ok(())
}

async fn damaged_objects() -> Outcome {
    let service = Service::start(cold()).await?;
    let id = service.create_pulse().await?;
    service.pause(&id).await?.expect(201)?;
    for (part, fault) in [
        ("/manifest", Fault::FlipBit),
        ("/manifest", Fault::Truncate),
        ("/manifest", Fault::Refuse(404)),
        ("/pack/", Fault::FlipBit),
        ("/pack/", Fault::Truncate),
        ("/pack/", Fault::Refuse(404)),
    ] {
        service.proxy.add(Rule::every(http::Method::GET, part, fault.clone()));
        let woken = service.resume(&id).await?;
        if woken.status == 200 {
            // Pages come when they are touched: the guest runs until it touches one that cannot be had.
            assert_eq!(part, "/pack/", "{fault:?}: {woken:?}");
            if fault == Fault::FlipBit {
                // Only one frame of each answer is damaged: the guest may never need it, but must never see it.
                tokio::select! {
                    paused = service.await_state(&id, "paused") => paused?,
                    // It says which it was, and not how long it takes.
                    well = service.pulse_is_well(&id) => well?,
                }
                service.proxy.clear();
                if service.pause(&id).await?.status == 201 {
                    continue;
                }
            }
            service.await_state(&id, "paused").await?;
        } else {
            assert!(woken.status >= 500, "{part} {fault:?}: {woken:?}");
            assert!(woken.text("message").contains(part.trim_matches('/')), "{part} {fault:?}: {woken:?}");
            assert_eq!(service.state(&id).await?, "paused", "{part} {fault:?}");
        }
        service.await_no_vmm().await.map_err(|e| format!("{part} {fault:?}: {e}"))?;
        service.proxy.clear();
    }
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}

/// Nothing is kept on the host: every wake reads the store.
fn cold() -> Options {
    with(&[("STASIS_KEEP_MEMORY_MIB", "0"), ("STASIS_PACK_CACHE_MIB", "0")])
}

fn with(environment: &[(&str, &str)]) -> Options {
    let mut options = Options::default();
    options.environment.extend(environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
    options
}

async fn bucket_is_the_catalogue() -> Outcome {
    let mut service = Service::start(Options::default()).await?;
    let id = service.create_pulse().await?;
    service.pause(&id).await?.expect(201)?;
    service.kill_supervisor()?;
    service.lose_data()?;
    service.key = service.same_tenant_key()?;
    service.start_supervisor().await?;
    service.await_state(&id, "paused").await?;
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}

async fn software_kvm() -> Outcome {
    let options = Options { images: Some(host::built("images")), ..Options::default() };
    let service = Service::start(options).await?;
    let body: Value = json!({"template_name": "system/debian:bookworm"});
    let refused = service.call("POST", "/v1/sandbox", Some(body)).await?;
    assert!(refused.status >= 400 && refused.text("message").contains("tests/rig"), "{refused:?}");
    Ok(())
}
