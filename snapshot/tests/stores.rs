//! One contract for every store; and what the S3 store and granted URLs make of a server that fails.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod support;

use std::{
    collections::HashMap,
    convert::Infallible,
    fs::File,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use hyper::{Request, Response, StatusCode, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use s3s::{auth::SimpleAuth, service::S3ServiceBuilder};
use stasis_snapshot::{
    capture::{CaptureRequest, Options, capture},
    commit::{Attempt, Backoff, Change, HeadState, ObjectHead, Outcome, Register, Sent},
    grant::{Access, GrantedObject},
    granted::{Direct, GrantedPacks, PackSink, PackSource, Patience, StoreClient},
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
use tokio_util::sync::CancellationToken;

const TTL: Duration = Duration::from_mins(1);

fn settings(address: SocketAddr) -> S3Settings {
    S3Settings {
        endpoint: format!("http://{address}"),
        region: "here".into(),
        bucket: "bucket".into(),
        access_key: "access".into(),
        secret_key: "secret".into(),
        path_style: true,
        request_timeout: Duration::from_secs(10),
        commit_timeout: Duration::from_secs(10),
    }
}

/// An S3 server over a directory. It lives as long as the runtime of the test.
async fn s3_server(root: &Path) -> SocketAddr {
    std::fs::create_dir(root.join("bucket")).unwrap();
    let service = {
        let mut builder = S3ServiceBuilder::new(s3s_fs::FileSystem::new(root).unwrap());
        builder.set_auth(SimpleAuth::from_single("access", "secret"));
        builder.build()
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            let service = service.clone();
            tokio::spawn(async move { http1::Builder::new().serve_connection(TokioIo::new(socket), service).await });
        }
    });
    address
}

/// A server that answers as `script` says: request number to status and body; `None` never answers.
async fn scripted(
    script: impl Fn(u32) -> Option<(u16, &'static str)> + Send + Sync + 'static,
) -> (SocketAddr, Arc<AtomicU32>) {
    let count = Arc::new(AtomicU32::new(0));
    let script = Arc::new(script);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let seen = count.clone();
    tokio::spawn(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            let (seen, script) = (seen.clone(), script.clone());
            tokio::spawn(async move {
                let answer = service_fn(move |_: Request<Incoming>| {
                    let answer = script(seen.fetch_add(1, Ordering::SeqCst));
                    async move {
                        let Some((status, body)) = answer else { return std::future::pending().await };
                        let response = Response::builder().status(StatusCode::from_u16(status).unwrap());
                        Ok::<_, Infallible>(response.header("etag", "\"tag\"").body(body.to_owned()).unwrap())
                    }
                });
                http1::Builder::new().serve_connection(TokioIo::new(socket), answer).await
            });
        }
    });
    (address, count)
}

fn kind<T: std::fmt::Debug>(result: Result<T, StoreError>) -> ErrorKind {
    result.unwrap_err().kind
}

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

#[derive(Clone, Copy)]
enum Grant {
    Put,
    Get,
}

/// What a VMM gets.
fn direct() -> StoreClient {
    StoreClient::new(Arc::new(Direct)).unwrap()
}

async fn granted(store: &dyn ObjectStore, keys: &[&str], what: Grant) -> GrantedPacks {
    let mut files: HashMap<u64, File> = HashMap::new();
    let mut objects = Vec::new();
    for (token, key) in (0..).zip(keys) {
        let grant = match what {
            Grant::Put => store.grant_put(key, TTL).await.unwrap(),
            Grant::Get => store.grant_get(key, TTL).await.unwrap(),
        };
        let access = match grant {
            RawGrant::Url(url) => Access::Url(url),
            RawGrant::File(file) => {
                files.insert(token, file);
                Access::Fd(token)
            }
        };
        objects.push(GrantedObject { key: (*key).to_owned(), access, cache: None });
    }
    let packs = GrantedPacks::new(direct(), objects, &mut files, Patience::default()).unwrap();
    assert!(files.is_empty());
    packs
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

fn url_grant(address: SocketAddr, patience: Patience) -> GrantedPacks {
    let url = format!("http://{address}/bucket/pack?X-Amz-Signature=geheim");
    let object = GrantedObject { key: "pack".into(), access: Access::Url(url), cache: None };
    GrantedPacks::new(direct(), vec![object], &mut HashMap::new(), patience).unwrap()
}

const HASTY: Patience =
    Patience { attempt: Duration::from_millis(200), attempts: 3, backoff: Duration::from_millis(1) };

#[tokio::test]
async fn granted_packs_are_retried_unless_refused() {
    let (address, count) = scripted(|n| Some((if n < 2 { 503 } else { 200 }, ""))).await;
    assert_eq!(url_grant(address, HASTY).put(0, Bytes::from_static(b"x")).await.unwrap(), "pack");
    assert_eq!(count.load(Ordering::SeqCst), 3);

    for (status, expected, tries) in [
        (503, ErrorKind::Unavailable, 3),
        (401, ErrorKind::Unauthorized, 1),
        (403, ErrorKind::Forbidden, 1),
        (404, ErrorKind::NotFound, 1),
        (507, ErrorKind::Full, 1),
    ] {
        let (address, count) = scripted(move |_| Some((status, ""))).await;
        let error = url_grant(address, HASTY).put(0, Bytes::new()).await.unwrap_err();
        assert_eq!((error.kind, error.key.as_str()), (expected, "pack"));
        assert_eq!(count.load(Ordering::SeqCst), tries, "{status}");
        let (address, _) = scripted(move |_| Some((status, ""))).await;
        assert_eq!(kind(url_grant(address, HASTY).get_range("pack", 0..4).await), expected);
    }

    let (address, count) = scripted(|_| None).await;
    let error = url_grant(address, HASTY).put(0, Bytes::new()).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert_eq!(count.load(Ordering::SeqCst), 3);
    // The URL is a credential.
    let chain = format!("{error} {error:?}");
    assert!(!chain.contains("geheim"), "{chain}");
    assert!(!format!("{:?}", url_grant(address, HASTY)).contains("geheim"));
}

#[tokio::test]
async fn a_request_that_is_stuck_is_sent_again_on_another_connection() {
    // Number 25 is never answered, nor is its hedge refused.
    let (address, count) = scripted(|n| (n != 25).then_some((200, ""))).await;
    let objects = (0..40).map(|n| GrantedObject {
        key: format!("pack/{n}"),
        access: Access::Url(format!("http://{address}/pack/{n}")),
        cache: None,
    });
    let packs = GrantedPacks::new(direct(), objects.collect(), &mut HashMap::new(), Patience::default()).unwrap();
    let start = Instant::now();
    for n in 0..40 {
        assert_eq!(packs.put(n, Bytes::from_static(b"x")).await.unwrap(), format!("pack/{n}"));
    }
    assert!(start.elapsed() < Patience::default().attempt, "it was the time-out that helped");
    // A busy machine may have stalled another one.
    let asked = count.load(Ordering::SeqCst);
    assert!((41..=45).contains(&asked), "{asked} requests");

    // Ranged GETs alike; a store that is slow as a whole is not asked twice for everything.
    let (address, count) = scripted(|n| (n < 20 || n % 2 == 0).then_some((206, "abcd"))).await;
    let packs = url_grant(address, Patience { attempt: Duration::from_millis(400), ..HASTY });
    for _ in 0..30 {
        packs.get_range("pack", 0..4).await.unwrap();
    }
    let asked = count.load(Ordering::SeqCst);
    assert!((31..=50).contains(&asked), "{asked} requests");
}

#[tokio::test]
async fn packs_are_copied_to_the_local_files_that_come_with_their_grants() {
    let bucket = tempfile::tempdir().unwrap();
    let store = S3Store::new(settings(s3_server(bucket.path()).await)).unwrap();
    let cache = tempfile::tempdir().unwrap();
    let mut files = HashMap::new();
    let mut objects = Vec::new();
    for token in 0..8 {
        let key = format!("p/{token}");
        let RawGrant::Url(url) = store.grant_put(&key, TTL).await.unwrap() else { panic!("no URL") };
        // One that cannot be written, one that was not sent.
        let path = cache.path().join(token.to_string());
        std::fs::write(&path, vec![7; 3 << 20]).unwrap();
        if token != 1 {
            files.insert(token, File::options().read(true).write(token != 0).open(path).unwrap());
        }
        objects.push(GrantedObject { key, access: Access::Url(url), cache: Some(token) });
    }
    let sink = GrantedPacks::new(direct(), objects, &mut files, Patience::default()).unwrap();
    assert!(files.is_empty());
    assert_eq!(sink.cache_files().len(), 7);
    let memory = Arc::new(Pages::from_bytes(noise(1, 1100)));
    let captured = capture(CaptureRequest {
        images: vec![first_capture(ImageKind::Memory, &memory, None)],
        parent_packs: Vec::new(),
        threads: None,
        sink: Arc::new(sink),
        options: Options::default(),
        cancel: CancellationToken::new(),
        progress: None,
        connections: None,
        seal: None,
    })
    .await
    .unwrap();
    assert!(captured.packs.len() >= 4);
    for (n, pack) in captured.packs.iter().enumerate() {
        let copy = std::fs::read(cache.path().join(n.to_string())).unwrap();
        let same = copy == store.get(&pack.key).await.unwrap().bytes;
        assert_eq!(same, n > 1, "pack {n}");
        assert_eq!(Digest::of(&copy) == pack.digest, n > 1);
    }
}

#[tokio::test]
async fn a_server_that_sends_another_length_is_not_believed() {
    for (status, body) in [(206, "abc"), (206, "abcde"), (200, "abcd")] {
        let (address, _) = scripted(move |_| Some((status, body))).await;
        let got = url_grant(address, HASTY).get_range("pack", 0..4).await;
        assert_eq!(kind(got), ErrorKind::Corrupt, "{status} {body}");
    }
}

#[tokio::test]
async fn a_grant_without_its_descriptor_is_an_error() {
    let object = GrantedObject { key: "pack".into(), access: Access::Fd(7), cache: None };
    let error = GrantedPacks::new(direct(), vec![object], &mut HashMap::new(), HASTY).unwrap_err();
    assert_eq!(error.key, "pack");
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
    let captured = capture(CaptureRequest {
        images: vec![first_capture(ImageKind::Memory, &memory, None)],
        parent_packs: Vec::new(),
        threads: None,
        sink: Arc::new(granted(&store, &keys, Grant::Put).await),
        options: Options::default(),
        cancel: CancellationToken::new(),
        progress: None,
        connections: None,
        seal: None,
    })
    .await
    .unwrap();
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
