//! One contract for every store; what the S3 store makes of a server that fails; and what is found of objects that were damaged in one.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod servers;
mod support;

use std::{
    path::Path,
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use servers::{Grant, TTL, granted, kind, request, s3_server, scripted, settings};
use stasis_snapshot::{
    capture::capture,
    commit::{Attempt, Backoff, Change, HeadState, ObjectHead, Outcome, Register, Sent},
    granted::{PackSink, PackSource},
    ids::{CommitId, Digest},
    layout::Owner,
    manifest::{ImageKind, ManifestRef},
    seal::Seals,
    store::{
        ETag, ErrorKind, ObjectStore, Operation, Precondition, RawGrant, StoreError,
        directory::DirectoryStore,
        probe::probe,
        s3::{S3Settings, S3Store},
    },
    verify::verify,
};
use support::{Pages, first_capture, manifest_of, noise};
use tokio::net::TcpListener;

/// What the callers of every store rely on.
async fn contract(store: &dyn ObjectStore) {
    let body = Bytes::from_static;
    let put = |key, text, precondition: Precondition| async move { store.put(key, body(text), &precondition).await };

    // Whole objects.
    assert_eq!(kind(store.get("v1/a/x").await), ErrorKind::NotFound);
    let first = put("v1/a/x", b"one", Precondition::None).await.unwrap();
    let got = store.get("v1/a/x").await.unwrap();
    assert_eq!((&got.bytes[..], &got.etag), (&b"one"[..], &first));
    let second = put("v1/a/x", b"two!", Precondition::None).await.unwrap();
    assert_ne!(first, second);
    put("v1/a/empty", b"", Precondition::None).await.unwrap();
    assert_eq!(store.get("v1/a/empty").await.unwrap().bytes.len(), 0);

    // Ranges are exact or an error.
    assert_eq!(&store.get_range("v1/a/x", 1..3).await.unwrap()[..], b"wo");
    assert_eq!(&store.get_range("v1/a/x", 0..4).await.unwrap()[..], b"two!");
    assert_eq!(store.get_range("v1/a/x", 2..2).await.unwrap().len(), 0);
    assert_eq!(kind(store.get_range("v1/a/x", 2..5).await), ErrorKind::Corrupt);
    assert_eq!(kind(store.get_range("v1/a/x", 9..12).await), ErrorKind::Corrupt);
    assert_eq!(kind(store.get_range("v1/a/y", 0..1).await), ErrorKind::NotFound);

    // Conditional writes.
    let created = put("v1/a/head", b"h1", Precondition::IfAbsent).await.unwrap();
    let refused = put("v1/a/head", b"h2", Precondition::IfAbsent).await.unwrap_err();
    assert_eq!((refused.kind, refused.maybe_applied), (ErrorKind::PreconditionFailed, false));
    let changed = put("v1/a/head", b"h3", Precondition::IfMatch(created.clone())).await.unwrap();
    assert_ne!(created, changed);
    assert_eq!(kind(put("v1/a/head", b"h4", Precondition::IfMatch(created)).await), ErrorKind::PreconditionFailed);
    let read = store.get("v1/a/head").await.unwrap();
    assert_eq!((&read.bytes[..], &read.etag), (&b"h3"[..], &changed));
    let missing = kind(put("v1/a/none", b"h5", Precondition::IfMatch(changed)).await);
    assert!(matches!(missing, ErrorKind::PreconditionFailed | ErrorKind::NotFound));
    assert_eq!(kind(store.get("v1/a/none").await), ErrorKind::NotFound);

    // Grants reach their object and no other.
    let packs = granted(store, &["v1/a/pack/0", "v1/a/pack/1"], Grant::Put).await;
    assert_eq!(packs.put(1, body(b"pack one")).await.unwrap(), "v1/a/pack/1");
    assert_eq!(packs.put(0, body(b"pack zero")).await.unwrap(), "v1/a/pack/0");
    assert_eq!(kind(packs.put(2, body(b"?")).await), ErrorKind::Other);
    assert_eq!(&store.get("v1/a/pack/1").await.unwrap().bytes[..], b"pack one");
    let packs = granted(store, &["v1/a/pack/0"], Grant::Get).await;
    assert_eq!(&packs.get_range("v1/a/pack/0", 5..9).await.unwrap()[..], b"zero");
    assert_eq!(kind(packs.get_range("v1/a/pack/0", 5..10).await), ErrorKind::Corrupt);
    assert_eq!(kind(packs.get_range("v1/a/pack/1", 0..1).await), ErrorKind::Forbidden);

    // Deletion.
    store.delete("v1/a/x").await.unwrap();
    store.delete("v1/a/x").await.unwrap();
    assert_eq!(kind(store.get("v1/a/x").await), ErrorKind::NotFound);

    // Listings, over more than a page.
    for n in 0..1003 {
        store.put(&format!("v1/list/{n:04}/o"), body(b"abc"), &Precondition::None).await.unwrap();
    }
    store.put("v1/list2", body(b"d"), &Precondition::None).await.unwrap();
    let first = store.list("v1/list/", None).await.unwrap();
    assert_eq!(first.objects.len(), 1000);
    let second = store.list("v1/list/", first.next.as_deref()).await.unwrap();
    assert_eq!(second.next, None);
    let keys: Vec<_> = first.objects.iter().chain(&second.objects).map(|object| object.key.clone()).collect();
    assert_eq!(keys, (0..1003).map(|n| format!("v1/list/{n:04}/o")).collect::<Vec<_>>());
    assert!(first.objects.iter().all(|object| object.size == 3));
    let cut = store.list("v1/list/000", None).await.unwrap();
    assert_eq!(cut.objects.len(), 10);
    assert!(store.list("v2", None).await.unwrap().objects.is_empty());

    // The probe believes it, and leaves nothing.
    let found = probe(store, "nonce").await.unwrap();
    assert!(found.conditional_writes, "{:?}", found.reasons);
    assert!(store.list("v1/probe/", None).await.unwrap().objects.is_empty());
}

#[tokio::test]
async fn the_directory_store_keeps_the_contract() {
    let root = tempfile::tempdir().unwrap();
    let store = DirectoryStore::open(root.path()).unwrap();
    contract(&store).await;
}

#[tokio::test]
async fn the_s3_store_keeps_the_contract() {
    let root = tempfile::tempdir().unwrap();
    let store = S3Store::new(settings(s3_server(root.path()).await)).unwrap();
    contract(&store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_writers_one_wins_in_a_directory() {
    let root = tempfile::tempdir().unwrap();
    let stores: Vec<_> = (0..4).map(|_| Arc::new(DirectoryStore::open(root.path()).unwrap())).collect();
    stores[0].put("head", Bytes::from_static(b"0"), &Precondition::IfAbsent).await.unwrap();
    let writers = stores.iter().cloned().map(|store| {
        tokio::spawn(async move {
            let mut won = 0;
            while won < 20 {
                let now = store.get("head").await.unwrap();
                let next = std::str::from_utf8(&now.bytes).unwrap().parse::<u32>().unwrap() + 1;
                match store.put("head", next.to_string().into(), &Precondition::IfMatch(now.etag)).await {
                    Ok(_) => won += 1,
                    Err(error) => assert_eq!(error.kind, ErrorKind::PreconditionFailed),
                }
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    assert_eq!(&stores[0].get("head").await.unwrap().bytes[..], b"80");
}

#[tokio::test]
async fn a_directory_keeps_keys_inside_and_hides_its_own_files() {
    let root = tempfile::tempdir().unwrap();
    let store = DirectoryStore::open(root.path()).unwrap();
    for bad in ["", "/", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", ".lock", "a/.hidden", "a\0b", "a b"] {
        assert_eq!(kind(store.put(bad, Bytes::new(), &Precondition::None).await), ErrorKind::Other, "{bad:?}");
        assert_eq!(kind(store.get(bad).await), ErrorKind::Other, "{bad:?}");
        assert_eq!(kind(store.grant_put(bad, TTL).await), ErrorKind::Other, "{bad:?}");
    }
    store.put("a/b", Bytes::from_static(b"x"), &Precondition::IfAbsent).await.unwrap();
    std::fs::write(root.path().join("a/.tmp-left-over"), b"x").unwrap();
    let listed = store.list("", None).await.unwrap();
    assert_eq!(listed.objects.len(), 1, "{listed:?}");

    // A refused write leaves no temporary file, a deletion no empty directory.
    store.put("c/d/e", Bytes::new(), &Precondition::IfAbsent).await.unwrap();
    store.put("c/d/e", Bytes::new(), &Precondition::IfAbsent).await.unwrap_err();
    assert_eq!(std::fs::read_dir(root.path().join("c/d")).unwrap().count(), 1);
    store.delete("c/d/e").await.unwrap();
    assert!(!root.path().join("c").exists());

    let granted = store.grant_put("g/1", TTL).await.unwrap();
    assert!(matches!(granted, RawGrant::File(_)));
    assert_eq!(kind(store.grant_put("g/1", TTL).await), ErrorKind::PreconditionFailed);
}

#[tokio::test]
async fn a_directory_that_is_gone_is_no_bucket() {
    let root = tempfile::tempdir().unwrap();
    assert_eq!(kind(DirectoryStore::open(root.path().join("none"))), ErrorKind::NoSuchBucket);
    let store = DirectoryStore::open(root.path()).unwrap();
    drop(root);
    for result in [
        kind(store.get("a").await),
        kind(store.put("a/b", Bytes::new(), &Precondition::IfAbsent).await),
        kind(store.list("", None).await),
        kind(store.delete("a").await),
        kind(store.grant_put("a/b", TTL).await),
    ] {
        assert_eq!(result, ErrorKind::NoSuchBucket);
    }
}

#[tokio::test]
async fn wrong_credentials_are_told_apart_from_a_missing_object() {
    let root = tempfile::tempdir().unwrap();
    let address = s3_server(root.path()).await;
    let store = S3Store::new(S3Settings { secret_key: "wrong".into(), ..settings(address) }).unwrap();
    let error = store.put("a", Bytes::new(), &Precondition::IfAbsent).await.unwrap_err();
    assert_eq!((error.kind, error.maybe_applied, error.operation), (ErrorKind::Forbidden, false, Operation::Put));
    assert_eq!(kind(store.list("", None).await), ErrorKind::Forbidden);
}

#[tokio::test]
async fn s3_requests_are_sent_once_and_end_in_time() {
    let (address, count) = scripted(|_| Some((503, "<Error><Code>SlowDown</Code></Error>"))).await;
    let store = S3Store::new(settings(address)).unwrap();
    let error = store.put("head", Bytes::new(), &Precondition::IfAbsent).await.unwrap_err();
    assert_eq!((error.kind, error.maybe_applied), (ErrorKind::Unavailable, true));
    assert_eq!(kind(store.get("head").await), ErrorKind::Unavailable);
    assert_eq!(kind(store.list("", None).await), ErrorKind::Unavailable);
    assert_eq!(count.load(Ordering::SeqCst), 3);

    let (address, _) = scripted(|_| None).await;
    let patient = settings(address);
    let whole = Duration::from_mins(2);
    let hasty = S3Settings { commit_timeout: Duration::from_millis(100), request_timeout: whole, ..patient };
    let store = S3Store::new(hasty).unwrap();
    let start = Instant::now();
    let error = store.put("head", Bytes::new(), &Precondition::IfMatch(ETag("x".into()))).await.unwrap_err();
    assert_eq!((error.kind, error.maybe_applied), (ErrorKind::Unavailable, true));
    assert!(start.elapsed() < whole, "the other time-out ended it");

    // Nobody listens: surely not applied.
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let store = S3Store::new(settings(closed)).unwrap();
    let error = store.put("head", Bytes::new(), &Precondition::IfAbsent).await.unwrap_err();
    assert_eq!((error.kind, error.maybe_applied), (ErrorKind::Unavailable, false));
}

#[tokio::test]
async fn s3_answers_become_kinds() {
    for (status, body, expected) in [
        (401, "", ErrorKind::Unauthorized),
        (403, "", ErrorKind::Forbidden),
        (404, "<Error><Code>NoSuchBucket</Code></Error>", ErrorKind::NoSuchBucket),
        (409, "<Error><Code>ConditionalRequestConflict</Code></Error>", ErrorKind::Conflict),
        (412, "", ErrorKind::PreconditionFailed),
        (507, "", ErrorKind::Full),
    ] {
        let (address, _) = scripted(move |_| Some((status, body))).await;
        let store = S3Store::new(settings(address)).unwrap();
        let error = store.put("some/key", Bytes::new(), &Precondition::IfAbsent).await.unwrap_err();
        assert_eq!((error.kind, error.key.as_str()), (expected, "some/key"));
        if status != 412 && status != 409 {
            assert_eq!(kind(store.list("", None).await), expected, "list with {status}");
        }
    }
}

/// A store that does not look at preconditions.
#[derive(Debug)]
struct Careless(DirectoryStore);

#[async_trait::async_trait]
impl ObjectStore for Careless {
    async fn get(&self, key: &str) -> Result<stasis_snapshot::store::Object, StoreError> {
        self.0.get(key).await
    }
    async fn get_range(&self, key: &str, range: std::ops::Range<u64>) -> Result<Bytes, StoreError> {
        self.0.get_range(key, range).await
    }
    async fn put(&self, key: &str, bytes: Bytes, _: &Precondition) -> Result<ETag, StoreError> {
        self.0.put(key, bytes, &Precondition::None).await
    }
    async fn list(&self, prefix: &str, next: Option<&str>) -> Result<stasis_snapshot::store::ListPage, StoreError> {
        self.0.list(prefix, next).await
    }
    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.0.delete(key).await
    }
    async fn grant_put(&self, key: &str, ttl: Duration) -> Result<RawGrant, StoreError> {
        self.0.grant_put(key, ttl).await
    }
    async fn grant_get(&self, key: &str, ttl: Duration) -> Result<RawGrant, StoreError> {
        self.0.grant_get(key, ttl).await
    }
}

#[tokio::test]
async fn a_store_without_conditional_writes_is_found_out() {
    let root = tempfile::tempdir().unwrap();
    let store = Careless(DirectoryStore::open(root.path()).unwrap());
    let found = probe(&store, "n").await.unwrap();
    assert!(!found.conditional_writes);
    assert_eq!(found.reasons.len(), 2, "{:?}", found.reasons);
    assert!(store.list("", None).await.unwrap().objects.is_empty());
}

#[tokio::test]
async fn heads_are_committed_through_every_store() {
    let directory = tempfile::tempdir().unwrap();
    let bucket = tempfile::tempdir().unwrap();
    let careless = tempfile::tempdir().unwrap();
    let key = Owner::sandbox("t", "sb").unwrap().head();
    let store: Arc<dyn ObjectStore> = Arc::new(DirectoryStore::open(directory.path()).unwrap());
    commits(ObjectHead::new(store, &key)).await;
    let store: Arc<dyn ObjectStore> = Arc::new(S3Store::new(settings(s3_server(bucket.path()).await)).unwrap());
    commits(ObjectHead::new(store, &key)).await;
    let store: Arc<dyn ObjectStore> = Arc::new(Careless(DirectoryStore::open(careless.path()).unwrap()));
    commits(ObjectHead::unconditional(store, &key)).await;
}

async fn commits(head: ObjectHead) {
    let register = Register::new(head);
    let id = |n| CommitId([n; 16]);
    let change = |state| Change {
        state,
        manifest: Some(ManifestRef { key: "m".into(), digest: Digest([0; 32]) }),
        record: serde_json::json!({ "name": "x" }),
    };
    let mut pacer = Backoff::within(Duration::from_secs(5));
    assert_eq!(register.read().await.unwrap(), None);
    let first = Attempt::first("sb", "a", change(HeadState::Paused), id(1)).unwrap();
    let Outcome::Committed { now } = register.commit(&first, Sent::Never, &mut pacer).await else { panic!() };
    assert_eq!(register.read().await.unwrap(), Some(now.clone()));

    let mine = Attempt::claim(&now, "a", id(2)).unwrap();
    let theirs = Attempt::claim(&now, "b", id(3)).unwrap();
    let Outcome::Committed { now } = register.commit(&mine, Sent::Never, &mut pacer).await else { panic!() };
    let lost = register.commit(&theirs, Sent::Never, &mut pacer).await;
    assert!(matches!(&lost, Outcome::Fenced { by } if *by == now), "{lost:?}");
    // Sent again, as after a crash: still committed, and nothing happens twice.
    let again = register.commit(&mine, Sent::Maybe, &mut pacer).await;
    assert!(matches!(&again, Outcome::Committed { now: head } if *head == now), "{again:?}");
    let settled = register.settle(&first, &mut pacer).await;
    assert!(matches!(settled, Outcome::Committed { .. }), "{settled:?}");

    let tombstone = Attempt::delete(&now, id(4)).unwrap();
    assert!(matches!(register.commit(&tombstone, Sent::Never, &mut pacer).await, Outcome::Committed { .. }));
}

#[tokio::test]
async fn a_head_that_no_request_reached_is_refused_not_unknown() {
    let change = Change { state: HeadState::Live, manifest: None, record: serde_json::Value::Null };
    let attempt = Attempt::first("sb", "a", change, CommitId([1; 16])).unwrap();
    let commit = |address, total| {
        let attempt = &attempt;
        async move {
            let store: Arc<dyn ObjectStore> = Arc::new(S3Store::new(settings(address)).unwrap());
            let register = Register::new(ObjectHead::new(store, "head"));
            register.commit(attempt, Sent::Never, &mut Backoff::within(Duration::from_millis(total))).await
        }
    };
    let (forbidden, count) = scripted(|_| Some((403, ""))).await;
    assert!(matches!(commit(forbidden, 5000).await, Outcome::Refused { cause } if cause.kind == ErrorKind::Forbidden));
    assert_eq!(count.load(Ordering::SeqCst), 1);
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    assert!(matches!(commit(closed, 200).await, Outcome::Refused { cause } if cause.kind == ErrorKind::Unavailable));
    let (failing, _) = scripted(|_| Some((500, ""))).await;
    assert!(matches!(commit(failing, 200).await, Outcome::Unknown { .. }));
    // The request was answered with a failure, but the head is there: the content decides.
    let body = Mutex::new(Some(serde_json::to_value(&attempt).unwrap()["body"].as_str().unwrap().to_owned()));
    let body: &'static str = Box::leak(body.into_inner().unwrap().unwrap().into_boxed_str());
    let (applied, _) = scripted(move |n| Some(if n == 0 { (500, "") } else { (200, body) })).await;
    assert!(matches!(commit(applied, 200).await, Outcome::Committed { .. }));
}

#[tokio::test]
async fn verify_names_every_damaged_and_missing_object() {
    let root = tempfile::tempdir().unwrap();
    let store = DirectoryStore::open(root.path()).unwrap();
    let keys: Vec<_> = (0..8).map(|n| format!("g/pack/{n}")).collect();
    let keys: Vec<_> = keys.iter().map(String::as_str).collect();
    let memory = Arc::new(Pages::from_bytes(noise(1, 1100)));
    let image = first_capture(ImageKind::Memory, &memory, None);
    let captured = capture(request(image, granted(&store, &keys, Grant::Put).await)).await.unwrap();
    let bytes = Bytes::from(manifest_of(&captured, &[ImageKind::Memory], 0).encode().unwrap());
    let manifest = ManifestRef { key: "g/manifest".into(), digest: Digest::of(&bytes) };
    assert_eq!(verify(&store, &manifest, &Seals::none()).await.unwrap().problems.len(), 1);
    store.put("g/manifest", bytes, &Precondition::IfAbsent).await.unwrap();
    let report = verify(&store, &manifest, &Seals::none()).await.unwrap();
    assert_eq!(report.problems, []);
    assert_eq!(report.packs as usize, captured.packs.len());
    assert!(report.packs >= 4 && report.frames >= 17);

    let change = |n: usize, change: &dyn Fn(&mut Vec<u8>)| {
        let path = root.path().join(keys[n]);
        let mut bytes = std::fs::read(&path).unwrap();
        change(&mut bytes);
        std::fs::write(path, bytes).unwrap();
    };
    change(0, &|bytes| bytes[100] ^= 1);
    change(1, &|bytes| bytes.truncate(bytes.len() - 1));
    change(2, &|bytes| bytes[0] ^= 1);
    std::fs::remove_file(root.path().join(keys[3])).unwrap();
    let report = verify(&store, &manifest, &Seals::none()).await.unwrap();
    for key in &keys[..4] {
        assert!(report.problems.iter().any(|problem| problem.key == **key), "{key}: {:?}", report.problems);
    }
    assert!(report.problems.iter().any(|problem| problem.what.contains("frame 0: digest")));
    change_manifest(root.path());
    let report = verify(&store, &manifest, &Seals::none()).await.unwrap();
    assert_eq!(report.problems.len(), 1);
    assert_eq!(report.problems[0].key, "g/manifest");
}

fn change_manifest(root: &Path) {
    let path = root.join("g/manifest");
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(path, bytes).unwrap();
}
