//! What a host keeps ready, through the REST API with pulse guests: memory, packs, started VMMs, booted templates; and what it does ahead.

use std::path::Path;
use std::time::{Duration, Instant};

use http::Method;
use serde_json::{Value, json};
use stasis_api::dev::{Fault, Rule};
use stasis_tests::service::{Options, Service};
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::{Error, no_pulse, until};

/// For what happens by itself in the background of a busy machine.
const PATIENCE: Duration = Duration::from_mins(2);

fn main() {
    Suite::default()
        .test("a_wake_on_the_same_host_needs_nothing_from_the_store", no_pulse(), kept_memory)
        .test("kept_memory_goes_with_its_sandbox_and_within_its_budget", no_pulse(), kept_memory_goes)
        .test("a_wake_from_local_packs_asks_the_store_for_no_pack", no_pulse(), local_packs)
        .test("idle_vmms_are_used_replaced_and_ended", no_pulse(), pool)
        .test("many_pauses_at_once_all_succeed", no_pulse(), many_at_once)
        .test("a_booted_template_is_shared_by_creates_and_supervisors", no_pulse(), booted_template)
        .test("a_named_snapshot_leaves_its_sandbox_running_and_starts_others", no_pulse(), named_snapshot)
        .test("memory_that_equals_the_template_disk_is_not_sent", no_pulse(), template_blocks)
        .test("what_was_sent_ahead_is_not_sent_again", no_pulse(), run_ahead)
        .test("a_page_that_cannot_be_fetched_ends_in_paused", no_pulse(), lost_page)
        .main();
}

fn with(environment: &[(&str, &str)]) -> Options {
    let mut options = Options::default();
    options.environment.extend(environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
    options
}

async fn metrics(service: &Service) -> Result<Value, Error> {
    Ok(service.call("GET", "/v1/host/metrics", None).await?.expect(200)?.json)
}

/// Waits until the metric at `pointer` is at least `least`.
async fn await_metric(service: &Service, pointer: &str, least: u64) -> Result<(), Error> {
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        if metrics(service).await?.pointer(pointer).and_then(Value::as_u64).is_some_and(|n| n >= least) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Err(format!("{pointer} is not {least} in time: {} {}", metrics(service).await?, service.log()).into())
}

/// Every read of a pack or a manifest fails.
fn refuse_reads(service: &Service) {
    for part in ["/pack/", "/manifest"] {
        service.proxy.add(Rule::every(Method::GET, part, Fault::Refuse(404)));
    }
}

async fn kept_memory() -> Outcome {
    let service = Service::start(with(&[("STASIS_PACK_CACHE_MIB", "0")])).await?;
    let id = service.create_pulse().await?;
    for generation in 1..=3 {
        service.pulse_is_well(&id).await?;
        service.pause(&id).await?.expect(201)?;
        assert_eq!(metrics(&service).await?["kept_memory"]["sandboxes"], json!(1));
        refuse_reads(&service);
        let woken = service.resume(&id).await?.expect(200)?;
        for phase in ["claim", "manifest", "spawn", "restore", "run", "wake"] {
            assert!(woken.timing.contains(phase), "{phase} in {:?}", woken.timing);
        }
        service.pulse_is_well(&id).await?;
        service.proxy.clear();
        let kept = &metrics(&service).await?["kept_memory"];
        assert_eq!((&kept["hits"], &kept["sandboxes"]), (&json!(generation), &json!(0)), "{kept}");
    }
    Ok(())
}

async fn kept_memory_goes() -> Outcome {
    // Pulse fills 8 MiB: one fits, two do not.
    let service = Service::start(with(&[("STASIS_KEEP_MEMORY_MIB", "14")])).await?;
    let (one, two) = (service.create_pulse().await?, service.create_pulse().await?);
    service.pause(&one).await?.expect(201)?;
    service.pause(&two).await?.expect(201)?;
    let kept = &metrics(&service).await?["kept_memory"];
    assert_eq!((&kept["sandboxes"], &kept["evicted"]), (&json!(1), &json!(1)), "{kept}");
    service.resume(&one).await?.expect(200)?;
    service.pulse_is_well(&one).await?;
    service.call("DELETE", &format!("/v1/sandbox/{two}"), None).await?.expect(204)?;
    assert_eq!(metrics(&service).await?["kept_memory"]["bytes"], json!(0));
    Ok(())
}

async fn local_packs() -> Outcome {
    let service = Service::start(with(&[("STASIS_KEEP_MEMORY_MIB", "0"), ("STASIS_PACK_CACHE_MIB", "256")])).await?;
    let id = service.create_pulse().await?;
    service.pause(&id).await?.expect(201)?;
    service.proxy.add(Rule::every(Method::GET, "/pack/", Fault::Refuse(404)));
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}

async fn pool() -> Outcome {
    let mut service = Service::start(with(&[("STASIS_VMM_POOL", "2")])).await?;
    await_metric(&service, "/vmm_pool", 2).await?;
    let id = service.create_pulse().await?;
    await_metric(&service, "/vmm_pool", 2).await?;
    let killed = service.idle_vmm_pids();
    killed.iter().copied().for_each(kill);
    // Until their supervisor has waited for them: the kernel takes a process's directory away before it says that the process ended.
    until("the end of the idle VMMs", || {
        Ok(killed.iter().all(|pid| !Path::new(&format!("/proc/{pid}")).exists()).then_some(()))
    })
    .await?;
    let other = service.create_pulse().await?;
    service.pulse_is_well(&id).await?;
    service.pulse_is_well(&other).await?;
    await_metric(&service, "/vmm_pool", 2).await?;
    let idle = service.idle_vmm_pids();
    service.kill_supervisor()?;
    service.start_supervisor().await?;
    await_metric(&service, "/vmm_pool", 2).await?;
    assert!(service.idle_vmm_pids().iter().all(|pid| !idle.contains(pid)), "what a killed supervisor left is ended");
    service.pulse_is_well(&id).await?;
    service.pause(&id).await?.expect(201)?;
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}

async fn many_at_once() -> Outcome {
    const MANY: usize = 20;
    let service = Service::start(Options::default()).await?;
    let mut ids = Vec::new();
    for _ in 0..MANY {
        ids.push(service.create_pulse().await?);
    }
    let pauses = ids.iter().map(|id| async {
        let begun = Instant::now();
        service.pause(id).await?.expect(201)?;
        Ok::<_, Error>(begun.elapsed())
    });
    for took in futures::future::join_all(pauses).await {
        took?;
    }
    for woken in futures::future::join_all(ids.iter().map(|id| service.resume(id))).await {
        woken?.expect(200)?;
    }
    for id in &ids {
        service.pulse_is_well(id).await?;
    }
    Ok(())
}

async fn booted_template() -> Outcome {
    let mut service = Service::start(with(&[("STASIS_GOLDEN", "on")])).await?;
    let create = || service.call("POST", "/v1/sandbox", Some(json!({"template_name": "test/pulse", "memory": 32})));
    let first = create().await?.expect(201)?;
    assert!(first.timing.contains("boot;"), "{:?}", first.timing);
    await_metric(&service, "/booted_templates", 1).await?;
    let second = create().await?.expect(201)?;
    assert!(second.timing.contains("restore;") && !second.timing.contains("boot;"), "{:?}", second.timing);
    for id in [first.text("id"), second.text("id")] {
        service.pulse_is_well(&id).await?;
    }
    // What is the template's is named by the sandbox's own manifests, and need not be checked again.
    let id = second.text("id");
    for _ in 0..2 {
        service.pause(&id).await?.expect(201)?;
        service.resume(&id).await?.expect(200)?;
        service.pulse_is_well(&id).await?;
    }
    service.kill_supervisor()?;
    service.start_supervisor().await?;
    service.pause(&id).await?.expect(201)?;
    service.resume(&id).await?.expect(200)?;
    let body = json!({"template_name": "test/pulse", "memory": 32});
    let third = service.call("POST", "/v1/sandbox", Some(body)).await?.expect(201)?;
    assert!(third.timing.contains("restore;"), "another supervisor finds it in the store: {:?}", third.timing);
    service.pulse_is_well(&third.text("id")).await
}

async fn named_snapshot() -> Outcome {
    let service = Service::start(Options::default()).await?;
    let id = service.create_pulse().await?;
    service.pulse_is_well(&id).await?;
    let path = format!("/v1/sandbox/{id}/snapshot/create");
    let made = service.call("POST", &path, Some(json!({"name": "warm"}))).await?.expect(201)?;
    assert_eq!((made.text("name").as_str(), made.json["memory"].as_u64()), ("warm", Some(32)));
    assert!(made.timing.contains("stop;"), "{:?}", made.timing);
    assert_eq!(service.state(&id).await?, "running");
    service.pulse_is_well(&id).await?;
    service.call("POST", &path, Some(json!({"name": "warm"}))).await?.expect(409)?;
    let made_up = service.call("POST", &path, Some(json!({}))).await?.expect(201)?;
    assert!(made_up.text("name").starts_with("test-pulse-"), "{made_up:?}");
    let listed = service.call("GET", "/v1/snapshots?query=war", None).await?.expect(200)?;
    assert_eq!((&listed.json["total_items"], &listed.json["items"][0]["id"]), (&json!(1), &made.json["id"]));
    // The sandbox goes on as one that was never captured.
    service.pause(&id).await?.expect(201)?;
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await?;
    service.call("DELETE", &format!("/v1/sandbox/{id}"), None).await?.expect(204)?;
    let restored =
        service.call("POST", "/v1/snapshot/restore", Some(json!({"snapshot_name": "warm"}))).await?.expect(201)?;
    let clone = restored.text("id");
    assert!(clone != id && restored.text("state") == "running");
    service.pulse_is_well(&clone).await?;
    service.pause(&clone).await?.expect(201)?;
    service.resume(&clone).await?.expect(200)?;
    service.pulse_is_well(&clone).await?;
    let delete = format!("/v1/snapshot/{}", made.text("id"));
    service.call("DELETE", &delete, None).await?.expect(409)?;
    service.pause(&clone).await?.expect(201)?;
    service.call("DELETE", &delete, None).await?.expect(204)?;
    service.call("DELETE", &delete, None).await?.expect(404)?;
    service.call("POST", "/v1/snapshot/restore", Some(json!({"snapshot_name": "warm"}))).await?.expect(404)?;
    // What was made from it needs it no more.
    service.resume(&clone).await?.expect(200)?;
    service.pulse_is_well(&clone).await
}

fn kill(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// Bytes that a reply's timing counts under `sent`.
fn sent(timing: &str) -> u64 {
    let (_, rest) = timing.split_once("sent;desc=\"").unwrap_or_default();
    rest.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// The root file system of this template is the guest's own kernel, so that the guest's memory holds blocks of it.
async fn template_blocks() -> Outcome {
    let service = Service::start(with(&[("STASIS_KEEP_MEMORY_MIB", "0"), ("STASIS_PACK_CACHE_MIB", "0")])).await?;
    let images = service.dir.path().join("images");
    let (pulse, template) = (images.join("templates/pulse"), images.join("templates/pulse-disk"));
    std::fs::create_dir(&template)?;
    let mut json: Value = serde_json::from_slice(&std::fs::read(pulse.join("template.json"))?)?;
    let kernel = json["kernel"].as_str().map(|kernel| pulse.join(kernel)).ok_or("the template names no kernel")?;
    std::fs::copy(&kernel, template.join("rootfs"))?;
    for (field, value) in [("name", json!("test/disk")), ("rootfs", json!("rootfs")), ("disk_mib", json!(1))] {
        json[field] = value;
    }
    std::fs::write(template.join("template.json"), json.to_string())?;
    let indexed = service.stasis(&["templates", "--images-dir", &images.to_string_lossy()]).await?;
    assert_eq!(indexed.code, 0, "{indexed:?}");

    let body = json!({"template_name": "test/disk", "memory": 32});
    let id = service.call("POST", "/v1/sandbox", Some(body)).await?.expect(201)?.text("id");
    let mut referred = Vec::new();
    for _ in 0..3 {
        service.pulse_is_well(&id).await?;
        service.pause(&id).await?.expect(201)?;
        let seen = service.call("GET", &format!("/v1/sandbox/{id}/inspect"), None).await?.expect(200)?;
        let memory = &seen.json["manifest"]["images"][0];
        referred.push(memory["base"].as_u64().ok_or_else(|| format!("no count in {memory}"))?);
        service.resume(&id).await?.expect(200)?;
    }
    service.pulse_is_well(&id).await?;
    assert!(referred.iter().all(|pages| *pages > 0), "{referred:?}");
    service.call("POST", &format!("/v1/sandbox/{id}/pause"), None).await?.expect(201)?;
    assert_eq!(service.stasis(&["verify", &id]).await?.code, 0);
    Ok(())
}

async fn run_ahead() -> Outcome {
    let plain = Service::start(with(&[("STASIS_KEEP_MEMORY_MIB", "0")])).await?;
    let id = plain.create_pulse().await?;
    let whole = sent(&plain.pause(&id).await?.expect(201)?.timing);
    drop(plain);
    let service = Service::start(with(&[
        ("STASIS_KEEP_MEMORY_MIB", "0"),
        ("STASIS_PACK_CACHE_MIB", "0"),
        ("STASIS_RUN_AHEAD", "on"),
        ("STASIS_RUN_AHEAD_IDLE_MS", "0"),
        ("STASIS_RUN_AHEAD_INTERVAL_MS", "100"),
        ("STASIS_RUN_AHEAD_LEAST_KIB", "4096"),
    ]))
    .await?;
    let id = service.create_pulse().await?;
    await_metric(&service, "/run_ahead/rounds", 1).await?;
    let paused = service.pause(&id).await?.expect(201)?;
    let residue = sent(&paused.timing);
    assert!(residue < whole / 2, "{residue} of {whole} bytes were left to the pause: {}", paused.timing);
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}

/// The guest is never given a wrong page, and the sandbox is never lost.
async fn lost_page() -> Outcome {
    let service = Service::start(with(&[
        ("STASIS_KEEP_MEMORY_MIB", "0"),
        ("STASIS_PACK_CACHE_MIB", "0"),
        ("STASIS_SWEEP_MIB_PER_SECOND", "1"),
    ]))
    .await?;
    let id = service.create_pulse().await?;
    service.pause(&id).await?.expect(201)?;
    service.proxy.add(Rule::every(Method::GET, "/pack/", Fault::Refuse(404)));
    // The wake may fail, or the guest may run until it touches what cannot be had.
    let woken = service.resume(&id).await?;
    assert!(woken.status == 200 || woken.status >= 500, "{woken:?}");
    service.await_state(&id, "paused").await?;
    let reason = service.call("GET", &format!("/v1/sandbox/{id}"), None).await?.text("reason");
    assert!(reason.contains("pack"), "{reason:?}");
    service.proxy.clear();
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}
