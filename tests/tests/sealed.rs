//! Sealed snapshots, through the programs and an S3 server: nothing of a guest is readable in the bucket, and whatever is changed there is
//! refused by name, with the sandbox paused as before. Keys are rotated and lost.

use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use std::io::Write as _;

use bytes::Bytes;
use serde_json::json;
use stasis_snapshot::commit::Head;
use stasis_snapshot::manifest::Manifest;
use stasis_snapshot::pack::decode_frame;
use stasis_snapshot::seal::{DataKeys, OperatorKey, PackCipher, Seals};
use stasis_snapshot::store::{ObjectStore, Precondition};
use stasis_tests::host;
use stasis_tests::service::{Options, Service, small_images};
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::{Error, no_pulse, pulse};

fn main() {
    Suite::default()
        .test("nothing_of_a_guest_is_readable_in_the_bucket", no_pulse(), unreadable)
        .test("what_was_changed_in_the_bucket_is_refused_by_name", no_pulse(), changed)
        .test("an_older_head_is_refused_by_who_knows_a_newer_one", no_pulse(), older_head)
        .test("keys_are_rotated_and_a_lost_one_is_said_to_be_lost", no_pulse(), rotated)
        .test("an_older_bucket_is_taken_over_when_that_is_allowed", no_pulse(), taken_over)
        .main();
}

/// Writes an operator's key.
fn key_file(dir: &Path, n: u8) -> Result<PathBuf, Error> {
    let path = dir.join(format!("operator-{n}.key"));
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
    file.write_all(OperatorKey::file_text(&[n; 32]).as_bytes())?;
    Ok(path)
}

fn id_of(n: u8) -> String {
    OperatorKey::new(&[n; 32]).id().to_string()
}

/// Every wake reads what the bucket holds, and settling does not take long.
fn options(more: &[(&str, &str)]) -> Options {
    let mut options = Options::default();
    let ours =
        [("STASIS_KEEP_MEMORY_MIB", "0"), ("STASIS_PACK_CACHE_MIB", "0"), ("STASIS_DEADLINES_SETTLE_MS", "3000")];
    options.environment.extend(ours.iter().chain(more).map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
    options
}

async fn sealed_service(keys: &tempfile::TempDir) -> Result<Service, Error> {
    let key = key_file(keys.path(), 1)?;
    Service::start(options(&[("STASIS_SEAL_KEY_FILE", &key.display().to_string())])).await
}

async fn restart(service: &mut Service) -> Result<(), Error> {
    service.kill_supervisor()?;
    service.start_supervisor().await
}

/// Every object of the bucket.
async fn objects(store: &dyn ObjectStore) -> Result<Vec<(String, Bytes)>, Error> {
    let (mut found, mut next): (Vec<_>, Option<String>) = (Vec::new(), None);
    loop {
        let page = store.list("v1/", next.as_deref()).await?;
        for object in page.objects {
            let bytes = store.get(&object.key).await?.bytes;
            found.push((object.key, bytes));
        }
        match page.next {
            Some(token) => next = Some(token),
            None => return Ok(found),
        }
    }
}

fn contains(bytes: &[u8], marker: &str) -> bool {
    bytes.windows(marker.len()).any(|window| window == marker.as_bytes())
}

/// Objects of the bucket that hold `marker` as they are.
async fn holding(service: &Service, marker: &str) -> Result<Vec<String>, Error> {
    let all = objects(service.store()?.as_ref()).await?;
    assert!(all.iter().any(|(key, _)| key.contains("/pack/")));
    Ok(all.into_iter().filter(|(_, bytes)| contains(bytes, marker)).map(|(key, _)| key).collect())
}

/// Packs of the paused sandbox in whose frames `marker` is found by who decodes them, with the keys that `seals` open and without.
async fn decoded(service: &Service, id: &str, seals: &Seals, marker: &str) -> Result<[Vec<String>; 2], Error> {
    let store = service.store()?;
    let head = Head::decode(&store.get(&format!("v1/test/sandbox/{id}/head")).await?.bytes)?;
    let named = head.manifest.ok_or("the head names no manifest")?;
    let bytes = store.get(&named.key).await?.bytes;
    let (manifest, keys) = if seals.is_on() {
        let (manifest, wrapped) = Manifest::open(&named, &bytes, seals)?;
        (manifest, seals.unwrap_all(&wrapped)?)
    } else {
        (Manifest::decode(&bytes)?, DataKeys::default())
    };
    let [mut with, mut without] = [Vec::new(), Vec::new()];
    for entry in &manifest.packs {
        let pack = store.get(&entry.key).await?.bytes;
        let cipher = entry.sealed.and_then(|id| keys.get(id)).map(|key| PackCipher::new(key, &entry.key));
        for (number, frame) in (0..).zip(&entry.frames) {
            let stored = &pack[frame.offset as usize..][..frame.stored_len as usize];
            for (found, cipher) in [(&mut with, cipher.as_ref()), (&mut without, None)] {
                // What is encrypted does not decode; by chance some of it may.
                let pages = decode_frame(frame, number, stored, cipher).unwrap_or_default();
                if contains(&pages, marker) {
                    found.push(entry.key.clone());
                }
            }
        }
    }
    Ok([with, without])
}

async fn unreadable() -> Outcome {
    let keys = host::scratch()?;
    let key = key_file(keys.path(), 1)?.display().to_string();
    // The kernel's command line is in the guest's memory.
    let marker: String = format!("m={:032x}", rand::random::<u128>());
    for sealed in [false, true] {
        let dir = host::scratch()?;
        let images = small_images(dir.path())?;
        let template = json!({
            "name": "test/pulse", "kernel": pulse(), "disk_mib": 0, "min_memory_mib": 32, "exit_counter": true,
            "cmdline": format!("fill=8 hot=1 mix=real count=1 {marker}"), "ready": {"serial": "R\n"},
        });
        std::fs::write(images.join("templates/pulse/template.json"), template.to_string())?;
        let setting = [("STASIS_SEAL_KEY_FILE", key.as_str())];
        let mut options = options(if sealed { &setting } else { &[] });
        options.images = Some(images);
        let service = Service::start(options).await?;
        let id = service.create_pulse().await?;
        for _ in 0..2 {
            service.pause(&id).await?.expect(201)?;
            service.resume(&id).await?.expect(200)?;
            service.pulse_is_well(&id).await?;
        }
        service.pause(&id).await?.expect(201)?;
        let seals = if sealed { Seals::new(OperatorKey::new(&[1; 32]), Vec::new(), false) } else { Seals::none() };
        let [with_keys, without] = decoded(&service, &id, &seals, &marker).await?;
        assert!(!with_keys.is_empty(), "the marker is nowhere, so its absence would show nothing");
        if sealed {
            let found = holding(&service, &marker).await?;
            assert!(found.is_empty() && without.is_empty(), "{found:?}, {without:?}");
            let inspected = service.call("GET", &format!("/v1/sandbox/{id}/inspect"), None).await?.expect(200)?.json;
            assert_eq!(inspected["manifest"]["sealed"], json!(id_of(1)));
            assert!(inspected["manifest"]["packs"][0]["data_key"].is_string(), "{inspected}");
            // With the key everything is checked; without, what can be.
            let with = service.stasis(&["verify", &id]).await?;
            assert_eq!(
                (with.code, &with.json["problems"], &with.json["frames_not_opened"]),
                (0, &json!([]), &json!(0))
            );
            let mut service = service;
            service.set_environment("STASIS_SEAL_KEY_FILE", None);
            let without = service.stasis(&["verify", "--all"]).await?;
            assert_eq!((without.code, &without.json["problems"]), (0, &json!([])), "{without:?}");
            assert_eq!((&without.json["frames"], &without.json["seals_not_checked"]), (&json!(0), &json!(2)));
            assert!(without.json["frames_not_opened"].as_u64() > Some(0), "{without:?}");
            let collected = service.stasis(&["gc", "--grace", "1s"]).await?;
            assert_eq!(collected.code, 0, "{collected:?}");
        } else {
            assert_eq!(without, with_keys, "where nothing is sealed nobody needs a key");
        }
    }
    Ok(())
}

/// Puts `bytes` in the place of an object, has the sandbox woken, and puts the object back.
async fn refused(service: &mut Service, id: &str, key: &str, bytes: Bytes, names: &[&str]) -> Result<(), Error> {
    let store = service.store()?;
    let before = store.get(key).await?.bytes;
    assert_ne!(before, bytes, "nothing was changed of {key}");
    store.put(key, bytes, &Precondition::None).await?;
    let is_head = key.ends_with("/head");
    if is_head {
        // One that knows the head from before would not look at it.
        restart(service).await?;
    }
    let answer = service.resume(id).await?;
    let said = answer.json.to_string();
    if key.contains("/pack/") && answer.status == 200 {
        // It is paged in; the guest ends where it would read what is not its own.
        service.await_state(id, "paused").await?;
    } else {
        assert!(answer.status >= 500, "{answer:?}");
        assert!(names.iter().any(|name| said.contains(name)), "{key}: {said}, and not {names:?}");
    }
    assert_eq!(service.state(id).await?, "paused");
    assert!(service.vmms_of(id).is_empty(), "a guest is left");
    // A head that was claimed meanwhile has gone on.
    if is_head || store.get(key).await?.bytes != before {
        store.put(key, before, &Precondition::None).await?;
    }
    if is_head {
        restart(service).await?;
    }
    Ok(())
}

async fn named_manifest(service: &Service, head: &str) -> Result<String, Error> {
    let head = Head::decode(&service.store()?.get(head).await?.bytes)?;
    Ok(head.manifest.ok_or("the head names no manifest")?.key)
}

async fn changed() -> Outcome {
    let keys = host::scratch()?;
    let mut service = sealed_service(&keys).await?;
    let (id, neighbour) = (service.create_pulse().await?, service.create_pulse().await?);
    service.pause(&neighbour).await?.expect(201)?;
    let other = service.other_key()?;
    let body = json!({"template_name": "test/pulse", "memory": 32}).to_string();
    let theirs = service.call_as(&other, "POST", "/v1/sandbox", Some(body)).await?.expect(201)?.text("id");
    service.call_as(&other, "POST", &format!("/v1/sandbox/{theirs}/pause"), None).await?.expect(201)?;
    service.pause(&id).await?.expect(201)?;
    let head = format!("v1/test/sandbox/{id}/head");
    let older = named_manifest(&service, &head).await?;
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await?;
    service.pause(&id).await?.expect(201)?;

    let store = service.store()?;
    let manifest = named_manifest(&service, &head).await?;
    let bytes = store.get(&manifest).await?.bytes;
    let flipped = |at: usize| {
        let mut bytes = bytes.to_vec();
        bytes[at] ^= 0x10;
        Bytes::from(bytes)
    };
    let seal = u32::from_le_bytes(bytes[12..16].try_into()?) as usize;
    for at in [3, 20, 64 + 30, 64 + seal + 20, 64 + seal + 200, bytes.len() - 60, bytes.len() - 1] {
        refused(&mut service, &id, &manifest, flipped(at), &["it was tampered with"]).await?;
    }
    for len in [0, 40, 64, 64 + seal, bytes.len() - 1] {
        refused(&mut service, &id, &manifest, bytes.slice(..len), &["it is truncated"]).await?;
    }
    // Its inner manifest without the envelope, the digests right.
    let bare = bytes.slice(64 + seal..bytes.len() - 32);
    refused(&mut service, &id, &manifest, bare, &["it is not sealed"]).await?;
    let older = store.get(&older).await?.bytes;
    refused(&mut service, &id, &manifest, older, &["it was replayed"]).await?;
    for (tenant, id_of_other) in [("test", &neighbour), ("other", &theirs)] {
        let place = format!("v1/{tenant}/sandbox/{id_of_other}/head");
        let swapped = store.get(&named_manifest(&service, &place).await?).await?.bytes;
        refused(&mut service, &id, &manifest, swapped, &["it was swapped"]).await?;
        let swapped = store.get(&place).await?.bytes;
        refused(&mut service, &id, &head, swapped, &["it was swapped"]).await?;
    }
    let body = store.get(&head).await?.bytes;
    let text = String::from_utf8(body.to_vec())?;
    refused(&mut service, &id, &head, text.replace("\"paused\"", "\"stopped\"").into(), &["it was tampered with"])
        .await?;
    refused(&mut service, &id, &head, body.slice(..body.len() - 2), &["truncated"]).await?;
    let packs: Vec<String> = objects(store.as_ref())
        .await?
        .into_iter()
        .map(|(key, _)| key)
        .filter(|key| key.starts_with(&format!("v1/test/sandbox/{id}/")) && key.contains("/pack/"))
        .collect();
    assert!(!packs.is_empty());
    let mut spoiled = Vec::new();
    for key in &packs {
        let pack = store.get(key).await?.bytes;
        let mut wrong = pack.to_vec();
        wrong.iter_mut().skip(16).step_by(1000).for_each(|byte| *byte ^= 1);
        store.put(key, wrong.into(), &Precondition::None).await?;
        spoiled.push((key.clone(), pack));
    }
    let answer = service.resume(&id).await?;
    if answer.status == 200 {
        service.await_state(&id, "paused").await?;
    }
    assert_eq!(service.state(&id).await?, "paused");
    let verified = service.stasis(&["verify", &id]).await?;
    assert_eq!(verified.code, 7, "{verified:?}");
    assert!(verified.json["problems"].to_string().contains("digest does not match"));
    for (key, pack) in spoiled {
        store.put(&key, pack, &Precondition::None).await?;
    }
    // Everything is as it was.
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}

async fn older_head() -> Outcome {
    let keys = host::scratch()?;
    let mut service = sealed_service(&keys).await?;
    let id = service.create_pulse().await?;
    service.pause(&id).await?.expect(201)?;
    let head = format!("v1/test/sandbox/{id}/head");
    let store = service.store()?;
    let first = store.get(&head).await?.bytes;
    service.resume(&id).await?.expect(200)?;
    service.pause(&id).await?.expect(201)?;
    let second = store.get(&head).await?.bytes;
    store.put(&head, first, &Precondition::None).await?;
    restart(&mut service).await?;
    let answer = service.resume(&id).await?;
    assert!(answer.json.to_string().contains("an older head was put in its place"), "{answer:?}");
    assert_eq!(service.state(&id).await?, "paused");
    // Who has never seen a newer one cannot know: it is the operator's own, and authentic.
    let other = service.start_second("d2").await?;
    let key = service.key_in("d2")?;
    let got = service.call_at(&other.url, &key, "GET", &format!("/v1/sandbox/{id}"), None).await?.expect(200)?;
    assert_eq!(got.text("state"), "paused");
    drop(other);
    store.put(&head, second, &Precondition::None).await?;
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}

async fn rotated() -> Outcome {
    let keys = host::scratch()?;
    let mut service = sealed_service(&keys).await?;
    let (id, still) = (service.create_pulse().await?, service.create_pulse().await?);
    service.pause(&id).await?.expect(201)?;
    service.pause(&still).await?.expect(201)?;

    // Another key alone: the old one is said to be what is missing.
    let (one, two) = (key_file(keys.path(), 2)?, keys.path().join("operator-1.key"));
    let (new, old) = (one.display().to_string(), two.display().to_string());
    service.set_environment("STASIS_SEAL_KEY_FILE", Some(&new));
    restart(&mut service).await?;
    let answer = service.resume(&id).await?;
    let said = answer.json.to_string();
    assert!(said.contains(&id_of(1)) && said.contains("not configured"), "{said}");
    assert_eq!(service.state(&id).await?, "paused");
    let verified = service.stasis(&["verify", &id]).await?;
    assert!(verified.code == 7 && verified.stderr.contains(&id_of(1)), "{verified:?}");

    // Both: what is woken is read under the old one and written under the new one.
    service.set_environment("STASIS_SEAL_OLD_KEY_FILES", Some(&old));
    restart(&mut service).await?;
    for _ in 0..3 {
        service.resume(&id).await?.expect(200)?;
        service.pulse_is_well(&id).await?;
        service.pause(&id).await?.expect(201)?;
    }
    let dry = service.stasis(&["seal", "rotate", "--dry-run"]).await?;
    assert_eq!((&dry.json["current"], dry.json["moved"].as_array().map(Vec::len)), (&json!(1), Some(1)), "{dry:?}");
    let moved = service.stasis(&["seal", "rotate"]).await?;
    assert_eq!((moved.code, moved.json["moved"].as_array().map(Vec::len)), (0, Some(1)), "{moved:?}");
    assert_eq!(moved.json["needed"], json!({ (id_of(2)): 2 }));
    // The supervisor knew the head that was replaced.
    service.resume(&still).await?.expect(200)?;
    service.pulse_is_well(&still).await?;
    service.pause(&still).await?.expect(201)?;

    // The old key is gone for good.
    std::fs::remove_file(&two)?;
    service.set_environment("STASIS_SEAL_OLD_KEY_FILES", None);
    restart(&mut service).await?;
    for id in [&id, &still] {
        service.resume(id).await?.expect(200)?;
        service.pulse_is_well(id).await?;
        service.pause(id).await?.expect(201)?;
        let verified = service.stasis(&["verify", id]).await?;
        assert_eq!((verified.code, &verified.json["frames_not_opened"]), (0, &json!(0)), "{verified:?}");
    }
    let made = service.stasis(&["seal", "key", "--out", &keys.path().join("made.key").display().to_string()]).await?;
    assert!(made.code == 0 && made.json["id"].as_str().is_some_and(|id| id.len() == 16), "{made:?}");
    Ok(())
}

async fn taken_over() -> Outcome {
    let keys = host::scratch()?;
    let mut service = Service::start(options(&[])).await?;
    let id = service.create_pulse().await?;
    service.pause(&id).await?.expect(201)?;
    let key = key_file(keys.path(), 1)?.display().to_string();
    service.set_environment("STASIS_SEAL_KEY_FILE", Some(&key));
    restart(&mut service).await?;
    let answer = service.resume(&id).await?;
    assert!(answer.json.to_string().contains("it is not sealed"), "{answer:?}");
    assert_eq!(service.state(&id).await?, "paused");
    service.set_environment("STASIS_SEAL_ACCEPT_UNSEALED", Some("on"));
    restart(&mut service).await?;
    service.resume(&id).await?.expect(200)?;
    service.pause(&id).await?.expect(201)?;
    service.set_environment("STASIS_SEAL_ACCEPT_UNSEALED", None);
    restart(&mut service).await?;
    service.resume(&id).await?.expect(200)?;
    service.pulse_is_well(&id).await
}
