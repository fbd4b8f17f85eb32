//! The life of a sandbox through the REST API, with pulse guests: stop and start, ends of lives, named snapshots in both dialects, limits, lists.

use std::time::{Duration, Instant};

use http::Method;
use serde_json::{Value, json};
use stasis_api::dev::{Fault, Rule};
use stasis_tests::invariants::{come_to_rest, legal_moves};
use stasis_tests::service::{Options, Reply, Service};
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::{Error, no_pulse, until};

fn main() {
    Suite::default()
        .test("a_stopped_sandbox_starts_anew_under_its_id", no_pulse(), stop_and_start)
        .test("a_stop_that_fails_leaves_a_guest_that_can_still_be_paused_whole", no_pulse(), stop_fails)
        .test("a_supervisor_killed_in_a_stop_or_a_start_ends_in_a_known_state", no_pulse(), killed_between)
        .test("a_started_guest_that_dies_is_back_at_its_stop", no_pulse(), started_and_lost)
        .test("what_was_stopped_elsewhere_is_started_here", no_pulse(), stopped_elsewhere)
        .test("a_sandbox_pauses_itself_and_its_time_starts_anew_when_it_wakes", no_pulse(), auto_pause)
        .test("an_auto_pause_that_fails_is_tried_until_it_succeeds", no_pulse(), auto_pause_fails)
        .test("a_timer_waits_for_the_operation_under_way", no_pulse(), timer_waits)
        .test("named_snapshots_in_the_older_dialect", no_pulse(), older_dialect)
        .test("restores_take_overrides_and_a_snapshot_in_use_stays", no_pulse(), overrides)
        .test("limits_have_their_statuses_and_say_when_to_come_back", no_pulse(), limits)
        .test("a_full_host_takes_no_more", no_pulse(), full_host)
        .test("too_many_requests_are_refused_by_tenant", no_pulse(), rate)
        .test("lists_are_filtered_sorted_and_paged_and_wake_nothing", no_pulse(), lists)
        .test("a_hundred_requests_cause_one_wake", no_pulse(), wake_storm)
        .test("undeletes_recoveries_and_wakes_at_once_make_one_guest", no_pulse(), put_back_at_once)
        .main();
}

fn with(more: &[(&str, &str)]) -> Options {
    let mut options = Options::default();
    options.environment.extend(more.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    options
}

async fn post(service: &Service, path: &str, body: Value) -> Result<Reply, Error> {
    service.call("POST", path, Some(body)).await
}

async fn verb(service: &Service, id: &str, verb: &str) -> Result<Reply, Error> {
    service.call("POST", &format!("/v1/sandbox/{id}/{verb}"), None).await
}

async fn create(service: &Service, more: Value) -> Result<Reply, Error> {
    let mut body = json!({"template_name": "test/pulse", "memory": 32});
    for (name, value) in more.as_object().cloned().unwrap_or_default() {
        body[name] = value;
    }
    post(service, "/v1/sandbox", body).await
}

/// The head in the bucket.
fn head(service: &Service, id: &str) -> Result<Value, Error> {
    let heads = service.objects(&format!("v1/test/sandbox/{id}/head"));
    Ok(serde_json::from_slice(&std::fs::read(heads.first().ok_or("there is no head")?)?)?)
}

/// Times that the guest on this console has booted.
fn boots(service: &Service, id: &str) -> usize {
    service.console(id).matches("R\n").count()
}

async fn stop_and_start() -> Outcome {
    let service = Service::start(Options::default()).await?;
    let id = service.create_pulse().await?;
    for (word, status) in [("start", 409), ("resume", 409)] {
        assert!(verb(&service, &id, word).await?.expect(status)?.text("message").contains("is running"));
    }
    let stopped = verb(&service, &id, "stop").await?.expect(200)?;
    assert_eq!(stopped.text("state"), "stopped");
    for phase in ["stop", "upload", "manifest", "head"] {
        assert!(stopped.timing.contains(phase), "{phase} in {:?}", stopped.timing);
    }
    assert!(service.vmm_pids().is_empty() && !service.run_dir(&id).exists(), "nothing of it is left here");
    assert_eq!(head(&service, &id)?["state"], "stopped");
    let packs = service.objects(&format!("v1/test/sandbox/{id}/")).into_iter();
    assert_eq!(packs.filter(|path| path.to_string_lossy().contains("/pack/")).count(), 0, "no memory was sent");
    for word in ["stop", "pause", "resume"] {
        let refused = verb(&service, &id, word).await?.expect(409)?;
        assert!(refused.text("message").contains("is stopped"), "{refused:?}");
    }
    assert_eq!(verb(&service, &id, "start").await?.expect(200)?.text("state"), "running");
    service.pulse_is_well(&id).await?;
    assert_eq!(boots(&service, &id), 1, "it booted");
    // From here on it is as any other.
    service.pause(&id).await?.expect(201)?;
    assert!(verb(&service, &id, "start").await?.expect(409)?.text("message").contains("is paused"));
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await?;
    assert_eq!(boots(&service, &id), 0, "it did not boot");
    verb(&service, &id, "stop").await?.expect(200)?;
    assert_eq!(service.stasis(&["verify", &id]).await?.code, 0);
    let path = format!("/v1/sandbox/{id}");
    service.call("DELETE", &path, None).await?.expect(204)?;
    let back = verb(&service, &id, "undelete").await?.expect(200)?;
    assert_eq!(back.text("state"), "stopped", "as it was deleted");
    verb(&service, &id, "start").await?.expect(200)?;
    service.pulse_is_well(&id).await
}

async fn stop_fails() -> Outcome {
    let service =
        Service::start(with(&[("STASIS_DEADLINES_COMMIT_MS", "1500"), ("STASIS_KEEP_MEMORY_MIB", "0")])).await?;
    let id = service.create_pulse().await?;
    // What was written before the failed stop and never after it must be in the next pause.
    service.pulse_is_well(&id).await?;
    service.proxy.add(Rule::every(Method::PUT, "/head", Fault::Refuse(403)));
    let failed = verb(&service, &id, "stop").await?;
    assert!(failed.status >= 500, "{failed:?}");
    service.proxy.clear();
    service.await_state(&id, "running").await?;
    service.pulse_is_well(&id).await?;
    service.pause(&id).await?.expect(201)?;
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}

async fn killed_between() -> Outcome {
    let mut service = Service::start(Options::default()).await?;
    let id = service.create_pulse().await?;
    for word in ["stop", "start"] {
        service.proxy.add(Rule::once(Method::PUT, "/head", Fault::Hold));
        tokio::select! {
            answer = verb(&service, &id, word) => return Err(format!("{word}: an answer before the kill: {answer:?}").into()),
            held = service.await_held() => held?,
        }
        service.kill_supervisor()?;
        service.proxy.release();
        service.start_supervisor().await?;
        // Either has won, the operation or its undoing.
        let state = come_to_rest(&service, &id).await?["state"].clone();
        assert!(state == "running" || state == "stopped", "{word}: {state}");
        if state == "running" {
            service.pulse_is_well(&id).await?;
            verb(&service, &id, "stop").await?.expect(200)?;
        }
        assert!(service.vmm_pids().is_empty());
    }
    verb(&service, &id, "start").await?.expect(200)?;
    service.pulse_is_well(&id).await
}

async fn started_and_lost() -> Outcome {
    let service = Service::start(Options::default()).await?;
    let id = service.create_pulse().await?;
    verb(&service, &id, "stop").await?.expect(200)?;
    verb(&service, &id, "start").await?.expect(200)?;
    for pid in service.vmm_pids() {
        let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).ok_or("no pid")?;
        rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
    }
    service.await_state(&id, "stopped").await?;
    let told = service.call("GET", &format!("/v1/sandbox/{id}"), None).await?.text("reason");
    assert!(told.contains("back at that stop"), "{told}");
    verb(&service, &id, "start").await?.expect(200)?;
    service.pulse_is_well(&id).await
}

async fn stopped_elsewhere() -> Outcome {
    let service = Service::start(Options::default()).await?;
    let id = service.create_pulse().await?;
    service.pause(&id).await?.expect(201)?;
    let second = service.start_second("e").await?;
    let key = service.key_in("e")?;
    let there = |word: &str| {
        let (service, url, key, path) = (&service, &second.url, &key, format!("/v1/sandbox/{id}/{word}"));
        async move { service.call_at(url, key, "POST", &path, None).await }
    };
    service.resume(&id).await?.expect(200)?;
    verb(&service, &id, "stop").await?.expect(200)?;
    let refused = there("resume").await?.expect(409)?;
    assert!(refused.text("message").contains("is stopped"), "{refused:?}");
    assert_eq!(there("start").await?.expect(200)?.text("state"), "running");
    assert!(verb(&service, &id, "start").await?.expect(409)?.text("message").contains("belongs to supervisor"));
    there("pause").await?.expect(201)?;
    let refused = verb(&service, &id, "start").await?.expect(409)?;
    assert!(refused.text("message").contains("is paused"), "{refused:?}");
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}

async fn auto_pause() -> Outcome {
    let service = Service::start(Options::default()).await?;
    let made = create(&service, json!({"timeout": 2, "auto_pause": true})).await?.expect(201)?;
    let id = made.text("id");
    assert_eq!(
        (&made.json["timeout"], &made.json["timeout_min"], &made.json["auto_pause"]),
        (&json!(2), &json!(1), &json!(true))
    );
    let listed = service.call("GET", "/v1/sandboxes", None).await?.expect(200)?;
    let first_end = listed.json["items"][0]["timeout_at"].as_i64();
    service.await_state(&id, "paused").await?;
    // Asking wakes nothing.
    for _ in 0..20 {
        assert_eq!(service.state(&id).await?, "paused");
        let listed = service.call("GET", "/v1/sandboxes", None).await?.expect(200)?;
        assert_eq!(listed.json["items"][0]["state"], "paused");
    }
    assert!(service.vmm_pids().is_empty());
    // On a machine that stands still meanwhile it may be paused again before it is looked at.
    let mut ends = None;
    for _ in 0..10 {
        service.resume(&id).await?.expect(200)?;
        let listed = service.call("GET", "/v1/sandboxes", None).await?.expect(200)?;
        ends = listed.json["items"][0]["timeout_at"].as_i64();
        service.await_state(&id, "paused").await?;
        if ends.is_some() {
            break;
        }
    }
    assert!(ends > first_end, "its time starts anew: {ends:?} after {first_end:?}");
    // Without it, the end of its time is its end.
    let id = create(&service, json!({"timeout": 1})).await?.expect(201)?.text("id");
    service.await_state(&id, "deleted").await?;
    let told = service.call("GET", &format!("/v1/sandbox/{id}"), None).await?.expect(200)?.text("reason");
    assert!(told.contains("no auto_pause"), "{told}");
    Ok(())
}

async fn auto_pause_fails() -> Outcome {
    let service = Service::start(with(&[("STASIS_DEADLINES_PAUSE_RETRY_MS", "300")])).await?;
    service.proxy.add(Rule::every(Method::PUT, "/head", Fault::Refuse(403)).after(1));
    let id = create(&service, json!({"timeout": 1, "auto_pause": true})).await?.expect(201)?.text("id");
    let failures = || service.log().matches("an auto-pause failed and is tried again").count();
    until("three auto-pauses that fail", || Ok((failures() >= 3).then_some(()))).await?;
    service.pulse_is_well(&id).await?;
    service.proxy.clear();
    service.await_state(&id, "paused").await
}

async fn timer_waits() -> Outcome {
    const LIFE: Duration = Duration::from_secs(8);
    let service = Service::start(with(&[("STASIS_DEADLINES_STORE_MS", "120000")])).await?;
    let id = create(&service, json!({"timeout": LIFE.as_secs()})).await?.expect(201)?.text("id");
    let begun = Instant::now();
    service.proxy.add(Rule::once(Method::PUT, "/manifest", Fault::Hold));
    let path = format!("/v1/sandbox/{id}/snapshot/create");
    let over = async {
        service.await_held().await?;
        // Its time is over in the middle of this, and the timers have had a look.
        tokio::time::sleep((LIFE + Duration::from_secs(2)).saturating_sub(begun.elapsed())).await;
        assert_eq!(service.state(&id).await?, "snapshotting");
        service.proxy.release();
        Ok::<_, Error>(())
    };
    let (made, over) = tokio::join!(post(&service, &path, json!({"name": "late"})), over);
    over?;
    made?.expect(201)?;
    service.await_state(&id, "deleted").await?;
    let restored = post(&service, "/v1/snapshot/restore", json!({"snapshot_name": "late"})).await?.expect(201)?;
    service.pulse_is_well(&restored.text("id")).await
}

async fn older_dialect() -> Outcome {
    let service = Service::start(Options::default()).await?;
    let id = service.create_pulse().await?;
    let path = format!("/v1/sandbox/{id}/snapshot/pause");
    let made = post(&service, &path, json!({"name": "old"})).await?.expect(201)?;
    assert_eq!((made.text("name").as_str(), made.text("state").as_str()), ("old", "paused"));
    for (a, b) in [("memory", "memory_mib"), ("disk", "disk_mib")] {
        assert!(made.json[a].is_u64() && made.json[a] == made.json[b], "{made:?}");
    }
    service.await_state(&id, "deleted").await?;
    post(&service, &path, json!({})).await?.expect(409)?;
    let body = json!({"snapshot_name": "old", "timeout_min": 2, "auto_pause": true});
    let back = post(&service, "/v1/snapshot/resume", body).await?.expect(201)?;
    assert_eq!((&back.json["timeout"], &back.json["auto_pause"]), (&json!(120), &json!(true)));
    assert_ne!(back.text("id"), id);
    service.pulse_is_well(&back.text("id")).await?;
    let path = format!("/v1/sandbox/{}/snapshot/create", back.text("id"));
    let created = post(&service, &path, json!({"kill_sandbox_after": true})).await?.expect(201)?;
    assert!(created.json.get("state").is_none());
    service.await_state(&back.text("id"), "deleted").await
}

async fn overrides() -> Outcome {
    let service = Service::start(Options::default()).await?;
    let policy = json!({"mode": "custom", "allow_domains": ["example.com"]});
    let id = create(&service, json!({"auto_pause": true, "network_policy": policy})).await?.expect(201)?.text("id");
    let made = post(&service, &format!("/v1/sandbox/{id}/snapshot/create"), json!({"name": "s"})).await?.expect(201)?;
    let restore = async |more: Value| {
        let mut body = json!({"snapshot_name": "s"});
        for (name, value) in more.as_object().cloned().unwrap_or_default() {
            body[name] = value;
        }
        post(&service, "/v1/snapshot/restore", body).await
    };
    let plain = restore(json!({})).await?.expect(201)?;
    assert_eq!((&plain.json["auto_pause"], &plain.json["timeout"]), (&json!(false), &json!(300)), "not the snapshot's");
    assert_eq!(plain.json["network_policy"], policy, "the snapshot's");
    let closed = restore(json!({"network_policy": {"mode": "deny-all"}, "timeout": 60})).await?.expect(201)?;
    assert_eq!((&closed.json["network_policy"]["mode"], &closed.json["timeout"]), (&json!("deny-all"), &json!(60)));
    for (body, field) in [
        (json!({"timeout": 0}), "timeout"),
        (json!({"timeout": 60, "timeout_min": 2}), "timeout_min"),
        (json!({"snapshot_name": ""}), "snapshot_name"),
    ] {
        let refused = restore(body).await?.expect(400)?;
        assert_eq!(refused.json["errors"][0]["field"], field, "{refused:?}");
    }
    restore(json!({"snapshot_name": "none"})).await?.expect(404)?;

    let delete = format!("/v1/snapshot/{}", made.text("id"));
    assert!(service.call("DELETE", &delete, None).await?.expect(409)?.text("message").contains("in use"));
    for one in [&plain, &closed] {
        service.pause(&one.text("id")).await?.expect(201)?;
    }
    service.call("DELETE", &delete, None).await?.expect(204)?;
    service.resume(&plain.text("id")).await?.expect(200)?;
    service.pulse_is_well(&plain.text("id")).await
}

async fn limits() -> Outcome {
    let service = Service::start(with(&[("STASIS_LIMITS_SANDBOXES", "2")])).await?;
    let (stopped, paused) = (service.create_pulse().await?, service.create_pulse().await?);
    post(&service, &format!("/v1/sandbox/{paused}/snapshot/create"), json!({"name": "s"})).await?.expect(201)?;
    verb(&service, &stopped, "stop").await?.expect(200)?;
    service.pause(&paused).await?.expect(201)?;
    let full = [service.create_pulse().await?, service.create_pulse().await?];
    let restore = post(&service, "/v1/snapshot/restore", json!({"snapshot_name": "s"}));
    for (what, reply, status) in [
        ("create", create(&service, json!({})).await?, 409),
        ("restore", restore.await?, 429),
        ("start", verb(&service, &stopped, "start").await?, 429),
        ("wake", service.resume(&paused).await?, 429),
    ] {
        let reply = reply.expect(status)?;
        assert!(reply.text("message").contains("limit of 2 sandboxes"), "{what}: {reply:?}");
        let seconds = reply.retry_after.ok_or("no Retry-After")?;
        assert!((1..=60).contains(&seconds), "{what}: {seconds}");
    }
    // A place that becomes free is given.
    service.pause(&full[0]).await?.expect(201)?;
    service.resume(&paused).await?.expect(200)?;
    service.call("DELETE", &format!("/v1/sandbox/{}", full[1]), None).await?.expect(204)?;
    verb(&service, &stopped, "start").await?.expect(200)?;
    service.pulse_is_well(&stopped).await
}

async fn full_host() -> Outcome {
    let service = Service::start(with(&[("STASIS_LIMITS_HOST_SANDBOXES", "1")])).await?;
    let id = service.create_pulse().await?;
    let other = service.other_key()?;
    let body = json!({"template_name": "test/pulse", "memory": 32}).to_string();
    let refused = service.call_as(&other, "POST", "/v1/sandbox", Some(body.clone())).await?.expect(503)?;
    assert!(refused.retry_after.is_some() && !refused.text("message").contains(&id), "{refused:?}");
    service.pause(&id).await?.expect(201)?;
    service.call_as(&other, "POST", "/v1/sandbox", Some(body)).await?.expect(201)?;
    assert!(service.resume(&id).await?.expect(503)?.retry_after.is_some());
    assert_eq!(service.state(&id).await?, "paused", "nothing is lost by that");
    Ok(())
}

async fn rate() -> Outcome {
    let service = Service::start(with(&[("STASIS_LIMITS_REQUESTS_PER_MINUTE", "20")])).await?;
    let other = service.other_key()?;
    let mut refused = None;
    for n in 0..60 {
        let reply = service.call("GET", "/v1/sandboxes", None).await?;
        if reply.status == 429 {
            assert!(n >= 20, "refused after {n}");
            refused = Some(reply);
            break;
        }
        reply.expect(200)?;
    }
    let refused = refused.ok_or("never refused")?;
    assert!(refused.retry_after.is_some_and(|seconds| (1..=3).contains(&seconds)), "{refused:?}");
    service.call_as(&other, "GET", "/v1/sandboxes", None).await?.expect(200)?;
    service.call_as("stasis_wrong", "GET", "/v1/sandboxes", None).await?.expect(401)?;
    Ok(())
}

async fn lists() -> Outcome {
    let service = Service::start(Options::default()).await?;
    let ids = [service.create_pulse().await?, service.create_pulse().await?, service.create_pulse().await?];
    service.pause(&ids[0]).await?.expect(201)?;
    verb(&service, &ids[1], "stop").await?.expect(200)?;
    let list = async |query: &str| -> Result<(Vec<String>, u64), Error> {
        let reply = service.call("GET", &format!("/v1/sandboxes?{query}"), None).await?.expect(200)?;
        let items = reply.json["items"].as_array().cloned().unwrap_or_default();
        for item in &items {
            for field in ["id", "template_id", "pod_id", "state", "created_at"] {
                assert!(item[field].is_string(), "{field} of {item}");
            }
        }
        let ids = items.iter().filter_map(|item| item["id"].as_str().map(str::to_owned)).collect();
        Ok((ids, reply.json["total_items"].as_u64().unwrap_or(99)))
    };
    let [paused, stopped, running] = ids.clone();
    assert_eq!(list("").await?, (vec![running.clone(), stopped.clone(), paused.clone()], 3));
    assert_eq!(list("order-by=asc&page-size=2").await?, (vec![paused.clone(), stopped.clone()], 3));
    assert_eq!(list("order-by=asc&page-size=2&page=2").await?, (vec![running.clone()], 3));
    assert_eq!(list("sort=state&order-by=asc").await?.0, [paused.clone(), running.clone(), stopped.clone()]);
    for (state, id) in [("paused", &paused), ("stopped", &stopped), ("running", &running)] {
        assert_eq!(list(&format!("state={state}")).await?, (vec![id.clone()], 1));
    }
    for (wrong, field) in
        [("state=deleted", "state"), ("page=0", "page"), ("page-size=101", "page-size"), ("sort=x", "sort")]
    {
        let refused = service.call("GET", &format!("/v1/sandboxes?{wrong}"), None).await?.expect(400)?;
        assert_eq!(refused.json["errors"][0]["field"], field);
    }
    assert_eq!(
        (service.state(&paused).await?.as_str(), service.state(&stopped).await?.as_str()),
        ("paused", "stopped")
    );
    Ok(())
}

async fn wake_storm() -> Outcome {
    let service = Service::start(Options::default()).await?;
    let id = service.create_pulse().await?;
    service.pause(&id).await?.expect(201)?;
    let epoch = head(&service, &id)?["epoch"].as_u64();
    let replies = futures::future::try_join_all((0..100).map(|_| service.resume(&id))).await?;
    // Who asks after the wake is told that it runs.
    for reply in replies {
        assert!(reply.status == 200 || reply.text("message").contains("is running"), "{reply:?}");
    }
    assert_eq!(head(&service, &id)?["epoch"].as_u64(), epoch.map(|epoch| epoch + 1), "one wake");
    assert_eq!((service.operations("resume", "ok").await?, service.operations("resume", "error").await?), (1, 0));
    assert_eq!(service.vmm_pids().len(), 1);
    service.pulse_is_well(&id).await
}

/// Whoever finds a sandbox in the bucket later than somebody else must not put it back to where it was.
async fn put_back_at_once() -> Outcome {
    let service = Service::start(Options::default()).await?;
    let id = service.create_pulse().await?;
    service.pause(&id).await?.expect(201)?;
    for round in 0..5 {
        service.call("DELETE", &format!("/v1/sandbox/{id}"), None).await?.expect(204)?;
        let undeletes = (0..8).map(async |n| {
            if n % 2 == 0 {
                verb(&service, &id, "undelete").await
            } else {
                post(&service, "/v1/recover", json!({})).await
            }
        });
        let wakes = (0..24).map(async |n: u64| {
            tokio::time::sleep(Duration::from_millis(n)).await;
            service.resume(&id).await
        });
        let (undeleted, woken) =
            tokio::join!(futures::future::try_join_all(undeletes), futures::future::try_join_all(wakes));
        let undeleted = undeleted?.iter().filter(|reply| reply.json["id"] == json!(id)).count();
        assert!(undeleted <= 1, "{undeleted} undeletes did it in round {round}");
        assert!(woken?.iter().all(|reply| reply.status < 500), "round {round}");
        if come_to_rest(&service, &id).await?["state"] == "paused" {
            service.resume(&id).await?.expect(200)?;
        }
        assert_eq!(service.vmms_of(&id).len(), 1, "round {round}");
        service.pulse_is_well(&id).await?;
        legal_moves(&service, &id)?;
        service.pause(&id).await?.expect(201)?;
    }
    Ok(())
}
