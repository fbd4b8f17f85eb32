//! Keeping house, and two owners of one sandbox, through the programs: `stasis serve` twice over one bucket, `stasis gc`, `verify` and `repair`.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use stasis_api::dev::{Fault, Rule};
use stasis_tests::service::{Options, Reply, Second, Service};
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::{Error, no_pulse, until};

/// `stasis` found something damaged.
const DAMAGED: i32 = 7;

fn main() {
    Suite::default()
        .test("a_copied_state_directory_owns_nothing_that_runs_elsewhere", no_pulse(), copied_while_running)
        .test("of_two_owners_that_wake_one_sandbox_exactly_one_wins", no_pulse(), copied_while_paused)
        .test("two_supervisors_of_one_bucket_wake_one_sandbox_at_once", no_pulse(), woken_twice_at_once)
        .test("a_delayed_old_process_is_fenced_and_loses_nothing_committed", no_pulse(), delayed_process)
        .test("a_dead_process_that_comes_back_commits_nothing_over_the_new_owner", no_pulse(), || comes_back(false))
        .test("it_does_not_when_it_learns_of_it_only_at_its_pause_either", no_pulse(), || comes_back(true))
        .test("a_head_of_a_delayed_old_process_lands_too_late", no_pulse(), delayed_head)
        .test("a_deleted_sandbox_is_put_back_until_it_is_purged", no_pulse(), delete_and_undelete)
        .test("garbage_goes_in_two_passes_and_sandboxes_stay", no_pulse(), two_passes)
        .test("a_snapshot_that_is_restored_while_it_is_purged_stays_whole", no_pulse(), fork_is_kept)
        .test("the_supervisor_collects_by_the_clock", no_pulse(), collected_by_the_clock)
        .test("damage_is_found_and_repaired_from_an_older_snapshot", no_pulse(), verify_and_repair)
        .main();
}

fn copy_dir(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy_dir(&entry.path(), &target)?;
        } else if kind.is_file() {
            std::fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// Copies the state directory with its supervisor stopped, so that the copy is whole.
async fn copy_state(service: &mut Service) -> Result<(), Error> {
    service.kill_supervisor()?;
    copy_dir(&service.dir.path().join("d"), &service.dir.path().join("e"))?;
    service.start_supervisor().await
}

async fn at(service: &Service, second: &Second, method: &str, path: &str, body: Option<Value>) -> Result<Reply, Error> {
    service.call_at(&second.url, &service.key, method, path, body.map(|b| b.to_string())).await
}

async fn sleeps(service: &Service) -> Result<String, Error> {
    let id = service.create_pulse().await?;
    service.pause(&id).await?.expect(201)?;
    Ok(id)
}

/// The original's guest runs on and pauses; the copy is refused, and may have the sandbox once it sleeps.
async fn copied_while_running() -> Outcome {
    let mut service = Service::start(Options::default()).await?;
    let id = sleeps(&service).await?;
    service.resume(&id).await?.expect(200)?;
    let never_paused = service.create_pulse().await?;
    copy_state(&mut service).await?;
    let second = service.start_second("e").await?;
    let path = format!("/v1/sandbox/{id}/resume");
    let refused = at(&service, &second, "POST", &path, None).await?.expect(409)?;
    assert!(refused.text("message").contains("belongs to supervisor"), "{refused:?}");
    service.pulse_is_well(&id).await?;
    service.pulse_is_well(&never_paused).await?;
    service.pause(&id).await?.expect(201)?;
    service.pause(&never_paused).await?.expect(201)?;
    at(&service, &second, "POST", &path, None).await?.expect(200)?;
    // Now it is the original that comes too late.
    service.resume(&id).await?.expect(409)?;
    assert!(service.vmm_pids().is_empty());
    at(&service, &second, "POST", &format!("/v1/sandbox/{id}/pause"), None).await?.expect(201)?;
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}

async fn copied_while_paused() -> Outcome {
    let mut service = Service::start(Options::default()).await?;
    let id = sleeps(&service).await?;
    copy_state(&mut service).await?;
    let second = service.start_second("e").await?;
    let path = format!("/v1/sandbox/{id}/resume");
    for _ in 0..4 {
        let (here, there) = tokio::join!(service.resume(&id), at(&service, &second, "POST", &path, None));
        let (here, there) = (here?, there?);
        let (winner, loser) = if here.status == 200 { (here, there) } else { (there, here) };
        winner.expect(200)?;
        let loser = loser.expect(409)?;
        assert!(loser.text("message").contains("belongs to supervisor"), "{loser:?}");
        // The loser asks again and is refused again, and the winner's sandbox goes on.
        let pause = format!("/v1/sandbox/{id}/pause");
        if service.state(&id).await? == "running" {
            at(&service, &second, "POST", &path, None).await?.expect(409)?;
            service.pulse_is_well(&id).await?;
            service.pause(&id).await?.expect(201)?;
        } else {
            service.resume(&id).await?.expect(409)?;
            assert!(service.vmm_pids().is_empty(), "the loser's VMM is gone");
            at(&service, &second, "POST", &pause, None).await?.expect(201)?;
        }
    }
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}

fn signal(pid: u32, signal: rustix::process::Signal) -> Result<(), Error> {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).ok_or("no pid")?;
    Ok(rustix::process::kill_process(pid, signal)?)
}

/// Takes over whatever the first supervisor holds, in the second one.
async fn take_over(service: &Service, second: &Second, id: &str) -> Result<(), Error> {
    let found = at(service, second, "POST", "/v1/recover", Some(json!({"take_over": true}))).await?.expect(200)?;
    let items = found.json["items"].as_array().cloned().unwrap_or_default();
    assert!(items.iter().any(|item| item["id"] == id && item["outcome"] == "recovered"), "{items:?}");
    Ok(())
}

/// A second supervisor with an empty data directory, whose key is the same tenant's.
async fn stranger(service: &Service) -> Result<(Second, String), Error> {
    let second = service.start_second("e").await?;
    let key = service.key_in("e")?;
    Ok((second, key))
}

/// Two supervisors that share nothing but the bucket are asked for the same sandboxes at the same time, several times each.
async fn woken_twice_at_once() -> Outcome {
    let service = Service::start(Options::default()).await?;
    let ids = [sleeps(&service).await?, sleeps(&service).await?];
    // Its journal is empty, so it takes up what sleeps in the bucket by itself.
    let (second, second_key) = stranger(&service).await?;
    let there = |id: &str, verb: &str| {
        let (service, url, key, path) =
            (&service, second.url.clone(), second_key.clone(), format!("/v1/sandbox/{id}/{verb}"));
        async move { service.call_at(&url, &key, "POST", &path, None).await }
    };
    let mut wins = [0, 0];
    for round in 0..4 {
        for id in &ids {
            // Whose request is sent first alternates, or one of them might never win.
            let asks = (0..6).map(async |n| {
                let here = (n + round) % 2 == 0;
                let reply = if here { service.resume(id).await } else { there(id, "resume").await };
                reply.map(|reply| (here, reply))
            });
            let replies = futures::future::try_join_all(asks).await?;
            let here_won = replies.iter().any(|(here, reply)| *here && reply.status == 200);
            wins[usize::from(here_won)] += 1;
            for (here, reply) in replies {
                if here == here_won {
                    // One wake serves them all; who comes when it is over finds it running.
                    assert!(reply.status == 200 || reply.text("message").contains("is running"), "{reply:?}");
                } else {
                    assert!(reply.expect(409)?.text("message").contains("belongs to supervisor"), "only one may win");
                }
            }
            if here_won {
                service.pulse_is_well(id).await?;
                let counts = service.vmm(id).metrics().await?.exit_counter.unwrap_or_default();
                assert_eq!(counts.out_gaps, 0, "a wake that lost has taken something");
                service.pause(id).await?.expect(201)?;
            } else {
                there(id, "pause").await?.expect(201)?;
            }
            service.await_no_vmm().await?;
            until("the end of the other side's VMMs", || Ok(second.vmm_pids().is_empty().then_some(()))).await?;
            let verified = service.stasis(&["verify", id]).await?;
            assert_eq!(verified.code, 0, "{verified:?}");
        }
    }
    println!("won by the second and by the first: {wins:?}");
    for id in &ids {
        service.resume(id).await?.expect(200)?;
        service.pulse_is_well(id).await?;
        assert_eq!(service.vmm(id).metrics().await?.exit_counter.unwrap_or_default().out_gaps, 0);
    }
    Ok(())
}

async fn delayed_process() -> Outcome {
    let mut service = Service::start(Options::default()).await?;
    let id = sleeps(&service).await?;
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await?;
    // It stands still; somebody is sure that it is dead.
    signal(service.supervisor_pid(), rustix::process::Signal::STOP)?;
    let (second, second_key) = stranger(&service).await?;
    let first_key = std::mem::replace(&mut service.key, second_key.clone());
    take_over(&service, &second, &id).await?;
    let path = |verb: &str| format!("/v1/sandbox/{id}/{verb}");
    at(&service, &second, "POST", &path("resume"), None).await?.expect(200)?;
    at(&service, &second, "POST", &path("pause"), None).await?.expect(201)?;
    // It goes on, and knows nothing of it.
    signal(service.supervisor_pid(), rustix::process::Signal::CONT)?;
    service.key = first_key;
    let fenced = service.pause(&id).await?.expect(409)?;
    assert!(fenced.text("message").contains("belongs to supervisor"), "{fenced:?}");
    assert!(service.vmm_pids().is_empty(), "a fenced guest does not run");
    assert_eq!(service.state(&id).await?, "paused", "back at what is committed");
    service.key = second_key;
    at(&service, &second, "POST", &path("resume"), None).await?.expect(200)?;
    at(&service, &second, "POST", &path("pause"), None).await?.expect(201)?;
    Ok(())
}

/// The head in the bucket, as it is.
fn head_of(service: &Service, id: &str) -> Result<Vec<u8>, Error> {
    let found = service.objects(&format!("v1/test/sandbox/{id}/head"));
    Ok(std::fs::read(found.first().ok_or("there is no head")?)?)
}

/// A supervisor dies, its guest runs on; the sandbox is taken over and paused elsewhere, and then the supervisor is back and finds its guest.
/// `blind`: it cannot ask the store who owns it until it pauses.
async fn comes_back(blind: bool) -> Outcome {
    let mut service = Service::start(Options::default()).await?;
    let id = sleeps(&service).await?;
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await?;
    service.kill_supervisor()?;
    let (second, second_key) = stranger(&service).await?;
    let first_key = std::mem::replace(&mut service.key, second_key.clone());
    take_over(&service, &second, &id).await?;
    let path = |verb: &str| format!("/v1/sandbox/{id}/{verb}");
    at(&service, &second, "POST", &path("resume"), None).await?.expect(200)?;
    at(&service, &second, "POST", &path("pause"), None).await?.expect(201)?;
    let committed = head_of(&service, &id)?;
    service.key = first_key;
    let head_path = format!("/{id}/head");
    if blind {
        service.proxy.add(Rule::every(http::Method::GET, &head_path, Fault::Refuse(403)));
    }
    service.start_supervisor().await?;
    if blind {
        let asked = || Ok(service.log().contains("whether it is still ours is not known yet").then_some(()));
        until("the question who owns it", asked).await?;
        service.pulse_is_well(&id).await?;
        service.proxy.clear();
        let fenced = service.pause(&id).await?.expect(409)?;
        assert!(fenced.text("message").contains("belongs to supervisor"), "{fenced:?}");
    }
    service.await_state(&id, "paused").await?;
    service.await_no_vmm().await?;
    assert!(head_of(&service, &id)? == committed, "what the new owner has committed stands");
    // And it is what is woken, wherever.
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}

/// The head PUT of the old owner is under way while the sandbox is taken over.
async fn delayed_head() -> Outcome {
    let mut options = Options::default();
    options.environment.push(("STASIS_DEADLINES_COMMIT_MS".to_owned(), "10000".to_owned()));
    let service = Service::start(options).await?;
    let id = sleeps(&service).await?;
    service.resume(&id).await?.expect(200)?;
    let (second, second_key) = stranger(&service).await?;
    let delay = Duration::from_secs(4);
    service.proxy.add(Rule::once(http::Method::PUT, "/head", Fault::Delay(delay)));
    let take = async {
        tokio::time::sleep(delay / 2).await;
        let body = json!({"take_over": true}).to_string();
        service.call_at(&second.url, &second_key, "POST", "/v1/recover", Some(body)).await?.expect(200)?;
        let resume = format!("/v1/sandbox/{id}/resume");
        service.call_at(&second.url, &second_key, "POST", &resume, None).await?.expect(200)
    };
    let (late, taken) = tokio::join!(service.pause(&id), take);
    taken?;
    let late = late?.expect(409)?;
    assert!(late.text("message").contains("belongs to supervisor"), "{late:?}");
    assert!(service.vmm_pids().is_empty(), "a fenced guest does not run");
    let pause = format!("/v1/sandbox/{id}/pause");
    service.call_at(&second.url, &second_key, "POST", &pause, None).await?.expect(201)?;
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}

async fn gc(service: &Service, arguments: &[&str]) -> Result<Value, Error> {
    let ran = service.stasis(&[&["gc", "--tenant", "test"][..], arguments].concat()).await?;
    assert_eq!(ran.code, 0, "{ran:?}");
    Ok(ran.json["tenants"][0].clone())
}

fn names(service: &Service, of: &str) -> usize {
    service.objects("v1/test/sandbox").iter().filter(|path| path.to_string_lossy().contains(of)).count()
}

async fn delete_and_undelete() -> Outcome {
    let service = Service::start(Options::default()).await?;
    let id = sleeps(&service).await?;
    let path = format!("/v1/sandbox/{id}");
    service.call("POST", &format!("{path}/undelete"), None).await?.expect(409)?;
    service.call("DELETE", &path, None).await?.expect(204)?;
    assert_eq!(service.state(&id).await?, "deleted");
    // The first pass notes the tombstone, and one within the grace changes nothing.
    gc(&service, &["--grace", "0s"]).await?;
    gc(&service, &[]).await?;
    service.call("POST", &format!("{path}/undelete"), None).await?.expect(200)?;
    assert_eq!(service.state(&id).await?, "paused");
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await?;
    service.pause(&id).await?.expect(201)?;

    service.call("DELETE", &path, None).await?.expect(204)?;
    gc(&service, &["--grace", "0s"]).await?;
    let done = gc(&service, &["--grace", "0s"]).await?;
    assert_eq!(done["purged"].as_array().map(Vec::len), Some(1), "{done}");
    assert_eq!(names(&service, &id), 1, "the tombstone alone is left");
    service.call("POST", &format!("{path}/undelete"), None).await?.expect(404)?;
    Ok(())
}

/// Only the snapshot names the packs, and the head of the new sandbox is held back until the collector has purged the snapshot.
async fn fork_is_kept() -> Outcome {
    let service = Service::start(Options::default()).await?;
    let source = service.create_pulse().await?;
    let body = json!({"name": "warm", "kill_sandbox_after": true});
    let path = format!("/v1/sandbox/{source}/snapshot/create");
    let snapshot = service.call("POST", &path, Some(body)).await?.expect(201)?.text("id");
    service.proxy.take_seen();
    service.proxy.add(Rule::once(http::Method::PUT, "/sandbox/", Fault::Delay(Duration::from_secs(8))));
    let restored = service.call("POST", "/v1/snapshot/restore", Some(json!({"snapshot_name": "warm"})));
    // The host that restores it would refuse to delete it.
    let (second, second_key) = stranger(&service).await?;
    let purged = async {
        until("the head that is held back", || {
            let seen = service.proxy.take_seen();
            let held = |seen: &stasis_api::dev::Seen| seen.method == http::Method::PUT && seen.path.ends_with("/head");
            Ok(seen.iter().any(held).then_some(()))
        })
        .await?;
        let path = format!("/v1/snapshot/{snapshot}");
        service.call_at(&second.url, &second_key, "DELETE", &path, None).await?.expect(204)?;
        // The tombstone is noted, then purged; what it named is noted, then would be deleted.
        let mut purged = 0;
        for _ in 0..4 {
            let done = gc(&service, &["--grace", "0s"]).await?;
            purged += done["purged"].as_array().map_or(0, Vec::len);
            assert!(!done["deleted"].to_string().contains("/pack/"), "{done}");
        }
        assert!(purged >= 1, "the snapshot is gone for good");
        Ok::<_, Error>(())
    };
    let (restored, purged) = tokio::join!(restored, purged);
    purged?;
    let id = restored?.expect(201)?.text("id");
    service.pulse_is_well(&id).await?;
    service.pause(&id).await?.expect(201)?;
    assert_eq!(service.stasis(&["verify", &id]).await?.code, 0);
    // A snapshot that is gone before the restore asks for it is not restored.
    service.call("POST", "/v1/snapshot/restore", Some(json!({"snapshot_name": "warm"}))).await?.expect(404)?;
    Ok(())
}

async fn collected_by_the_clock() -> Outcome {
    let mut options = Options::default();
    for (name, value) in [("STASIS_GC_EVERY_S", "1"), ("STASIS_GC_GRACE_S", "0")] {
        options.environment.push((name.to_owned(), value.to_owned()));
    }
    let service = Service::start(options).await?;
    let (kept, gone) = (sleeps(&service).await?, sleeps(&service).await?);
    service.call("DELETE", &format!("/v1/sandbox/{gone}"), None).await?.expect(204)?;
    until("the end of the deleted sandbox's objects", || Ok((names(&service, &gone) == 1).then_some(()))).await?;
    service.resume(&kept).await?.expect(200)?;
    service.pulse_is_well(&kept).await
}

async fn two_passes() -> Outcome {
    let service = Service::start(Options::default()).await?;
    let kept = sleeps(&service).await?;
    let running = sleeps(&service).await?;
    service.resume(&running).await?.expect(200)?;
    // A pause whose head is refused leaves packs and a manifest that no head names.
    let failing = sleeps(&service).await?;
    service.resume(&failing).await?.expect(200)?;
    service.proxy.add(Rule::every(http::Method::PUT, "/head", Fault::Refuse(403)));
    let failed = service.pause(&failing).await?;
    assert!(failed.status >= 500, "{failed:?}");
    service.proxy.clear();
    service.await_state(&failing, "running").await?;
    assert_eq!(names(&service, "manifest"), 4);
    // While it runs, its owner may yet use them.
    for _ in 0..2 {
        assert_eq!(gc(&service, &["--grace", "0s"]).await?["deleted"], json!([]));
    }
    service.pause(&failing).await?.expect(201)?;
    assert_eq!(gc(&service, &[]).await?["deleted"], json!([]), "within the grace");
    let would = gc(&service, &["--grace", "0s", "--dry-run"]).await?;
    let orphans = would["deleted"].as_array().cloned().unwrap_or_default();
    assert!(orphans.iter().filter_map(Value::as_str).any(|key| key.ends_with("/manifest")), "{would}");
    assert!(orphans.iter().filter_map(Value::as_str).all(|key| key.contains(&failing)), "{would}");
    let done = gc(&service, &["--grace", "0s"]).await?;
    assert_eq!(done["deleted"], would["deleted"]);
    let verified = service.stasis(&["verify", "--all"]).await?;
    assert_eq!((verified.code, verified.json["heads"].as_u64()), (0, Some(3)), "{verified:?}");
    for id in [&kept, &failing] {
        assert_eq!(service.stasis(&["verify", id]).await?.code, 0);
        service.resume(id).await?.expect(200)?;
        service.pulse_is_well(id).await?;
    }
    service.pulse_is_well(&running).await
}

async fn verify_and_repair() -> Outcome {
    let mut options = Options::default();
    // With its memory kept on this host a sandbox would wake without a look at the damage.
    options.environment.push(("STASIS_KEEP_MEMORY_MIB".to_owned(), "0".to_owned()));
    let service = Service::start(options).await?;
    let id = sleeps(&service).await?;
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await?;
    service.pause(&id).await?.expect(201)?;
    let sound = service.stasis(&["repair"]).await?;
    assert_eq!((sound.code, sound.json["items"][0]["standing"].as_str()), (0, Some("whole")), "{sound:?}");
    let newest = service
        .objects("v1/test/sandbox")
        .into_iter()
        .filter(|path| path.ends_with("manifest"))
        .max_by_key(|path| path.metadata().and_then(|found| found.modified()).ok())
        .ok_or("no manifest")?;
    std::fs::remove_file(newest)?;
    let verified = service.stasis(&["verify", &id]).await?;
    assert_eq!(verified.code, DAMAGED, "{verified:?}");
    assert_eq!(service.stasis(&["verify", "--all"]).await?.code, DAMAGED);
    assert!(service.resume(&id).await?.status >= 500);
    let blocked = service.stasis(&["gc", "--grace", "0s"]).await?;
    assert_eq!(blocked.code, DAMAGED, "what a missing manifest names is not known: {blocked:?}");
    let found = service.stasis(&["repair"]).await?;
    assert_eq!((found.code, found.json["items"][0]["standing"].as_str()), (DAMAGED, Some("repairable")), "{found:?}");
    let applied = service.stasis(&["repair", "--apply", "--deep"]).await?;
    assert_eq!((applied.code, applied.json["items"][0]["outcome"].as_str()), (0, Some("repaired")), "{applied:?}");
    assert_eq!(service.stasis(&["verify", &id]).await?.code, 0);
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}
