//! The embedded S3 server as the S3 store sees it, directly and through the fault proxy.

use bytes::Bytes;
use http::Method;
use stasis_api::dev::{EmbeddedS3, Fault, FaultProxy, LinkShape, Rule};
use stasis_snapshot::store::probe::probe;
use stasis_snapshot::store::s3::{S3Settings, S3Store};
use stasis_snapshot::store::{ErrorKind, ObjectStore, Precondition, RawGrant};
use std::sync::Arc;
use std::time::{Duration, Instant};

async fn server() -> (tempfile::TempDir, EmbeddedS3) {
    let dir = tempfile::tempdir().unwrap();
    let s3 = EmbeddedS3::start(dir.path(), "127.0.0.1:0".parse().unwrap(), "bucket", "access", "secret").await.unwrap();
    (dir, s3)
}

fn settings(endpoint: String) -> S3Settings {
    S3Settings {
        endpoint,
        region: "us-east-1".to_owned(),
        bucket: "bucket".to_owned(),
        access_key: "access".to_owned(),
        secret_key: "secret".to_owned(),
        path_style: true,
        request_timeout: Duration::from_millis(1500),
        commit_timeout: Duration::from_millis(1500),
    }
}

fn store(endpoint: String) -> S3Store {
    S3Store::new(settings(endpoint)).unwrap()
}

#[tokio::test]
async fn it_has_conditional_writes_as_the_commit_protocol_needs_them() {
    let (_dir, s3) = server().await;
    let found = probe(&store(s3.endpoint()), "nonce").await.unwrap();
    assert!(found.conditional_writes, "{:?}", found.reasons);
}

#[tokio::test]
async fn of_many_writers_under_one_precondition_exactly_one_wins() {
    let (_dir, s3) = server().await;
    let store = Arc::new(store(s3.endpoint()));
    let mut tag = store.put("head", Bytes::from("0"), &Precondition::IfAbsent).await.unwrap();
    for round in 1..6 {
        let writers = (0..8).map(|n| {
            let (store, tag) = (store.clone(), tag.clone());
            tokio::spawn(async move {
                store.put("head", Bytes::from(format!("{round}-{n}")), &Precondition::IfMatch(tag)).await
            })
        });
        let mut won = Vec::new();
        for writer in futures::future::join_all(writers).await {
            match writer.unwrap() {
                Ok(new) => won.push(new),
                Err(e) => assert_eq!(e.kind, ErrorKind::PreconditionFailed),
            }
        }
        assert_eq!(won.len(), 1, "round {round}");
        let read = store.get("head").await.unwrap();
        assert_eq!(read.etag, won[0], "the tag belongs to the body");
        tag = read.etag;
    }
}

#[tokio::test]
async fn presigned_urls_open_one_object_and_no_other() {
    let (_dir, s3) = server().await;
    let store = store(s3.endpoint());
    let url = |grant| match grant {
        RawGrant::Url(url) => url,
        RawGrant::File(_) => panic!("an S3 store grants URLs"),
    };
    let put = url(store.grant_put("v1/pack/0", Duration::from_mins(1)).await.unwrap());
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    assert_eq!(http.put(&put).body("pack").send().await.unwrap().status(), 200);
    assert_eq!(store.get("v1/pack/0").await.unwrap().bytes, "pack");
    let get = url(store.grant_get("v1/pack/0", Duration::from_mins(1)).await.unwrap());
    let answer = http.get(&get).header("range", "bytes=1-2").send().await.unwrap();
    assert_eq!((answer.status().as_u16(), answer.bytes().await.unwrap()), (206, Bytes::from("ac")));
    for forged in [put.replace("pack/0", "pack/1"), get.replace("X-Amz-Expires=60", "X-Amz-Expires=61")] {
        assert_eq!(http.put(&forged).body("x").send().await.unwrap().status(), 403, "{forged}");
    }
    assert_eq!(http.delete(&put).send().await.unwrap().status(), 403);
    assert_eq!(
        http.get(format!("{}/bucket/v1/pack/0", s3.endpoint())).send().await.unwrap().status(),
        403,
        "nobody reads without a signature"
    );
}

#[tokio::test]
async fn wrong_keys_and_wrong_buckets_are_told_apart() {
    let (_dir, s3) = server().await;
    let kind = |settings: S3Settings| async move {
        let store = S3Store::new(settings).unwrap();
        store.put("x", Bytes::from("x"), &Precondition::None).await.unwrap_err().kind
    };
    assert_eq!(
        kind(S3Settings { bucket: "nope".to_owned(), ..settings(s3.endpoint()) }).await,
        ErrorKind::NoSuchBucket
    );
    let wrong = kind(S3Settings { secret_key: "wrong".to_owned(), ..settings(s3.endpoint()) }).await;
    assert!(matches!(wrong, ErrorKind::Forbidden | ErrorKind::Unauthorized), "{wrong:?}");
}

#[tokio::test]
async fn deleting_leaves_no_file() {
    let (dir, s3) = server().await;
    let store = store(s3.endpoint());
    store.put("a/b", Bytes::from("x"), &Precondition::None).await.unwrap();
    store.delete("a/b").await.unwrap();
    let left = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .filter(|name| name != "bucket")
        .collect::<Vec<_>>();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(store.get("a/b").await.unwrap_err().kind, ErrorKind::NotFound);
}

#[tokio::test]
async fn each_fault_shows_as_what_it_is() {
    let (_dir, s3) = server().await;
    let proxy = FaultProxy::start(s3.addr()).await.unwrap();
    let store = store(proxy.endpoint());
    let direct = self::store(s3.endpoint());
    let put = |key: &'static str| store.put(key, Bytes::from("x"), &Precondition::IfAbsent);
    put("untouched").await.unwrap();

    for (status, kind) in [
        (401, ErrorKind::Unauthorized),
        (403, ErrorKind::Forbidden),
        (503, ErrorKind::Unavailable),
        (507, ErrorKind::Full),
    ] {
        proxy.add(Rule::once(Method::PUT, "refused", Fault::Refuse(status)));
        let error = put("refused").await.unwrap_err();
        assert_eq!((error.kind, error.maybe_applied && status != 503), (kind, false), "{status}");
        assert_eq!(direct.get("refused").await.unwrap_err().kind, ErrorKind::NotFound);
    }
    for (key, fault, applied) in [
        ("dropped", Fault::Drop, false),
        ("hung", Fault::Hang, false),
        ("lost", Fault::LoseReply, true),
        ("replaced", Fault::ReplaceReply(500), true),
    ] {
        proxy.add(Rule::once(Method::PUT, key, fault));
        let error = put(key).await.unwrap_err();
        assert!(error.maybe_applied, "{key}: {error}");
        assert_eq!(direct.get(key).await.is_ok(), applied, "{key}");
    }
    proxy.add(Rule::once(Method::PUT, "late", Fault::ApplyLate(Duration::from_secs(3))));
    assert!(put("late").await.unwrap_err().maybe_applied);
    assert!(direct.get("late").await.is_err(), "not yet");
    let lands = async {
        while direct.get("late").await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_mins(1), lands).await.expect("it never lands");

    proxy.add(Rule::once(Method::PUT, "held", Fault::Hold));
    let held = async {
        while proxy.held() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let before = direct.get("held").await.is_err();
        proxy.release();
        before
    };
    let (stored, before) = tokio::join!(put("held"), held);
    assert!(stored.is_ok() && before, "{stored:?} {before}");
    assert_eq!(proxy.held(), 0);

    direct.put("whole", Bytes::from("whole object"), &Precondition::None).await.unwrap();
    proxy.add(Rule::once(Method::GET, "whole", Fault::FlipBit));
    assert_ne!(store.get("whole").await.unwrap().bytes, "whole object");
    proxy.add(Rule::once(Method::GET, "whole", Fault::Truncate));
    assert!(store.get("whole").await.unwrap().bytes.len() < 12);
    assert_eq!(store.get("whole").await.unwrap().bytes, "whole object", "a rule that is spent does nothing");

    proxy.add(Rule::every(Method::PUT, "counted", Fault::Refuse(503)).after(1));
    put("counted-1").await.unwrap();
    put("counted-2").await.unwrap_err();
    proxy.clear();
    put("counted-3").await.unwrap();
    assert!(
        proxy.take_seen().iter().any(|seen| seen.path.contains("counted-2") && seen.fault == Some(Fault::Refuse(503)))
    );
    assert!(proxy.take_seen().is_empty());
}

/// Bytes that do not repeat soon.
fn body(len: usize) -> Bytes {
    (0..len).map(|n| (n * 31 + n / 251) as u8).collect::<Vec<_>>().into()
}

#[tokio::test]
async fn bodies_of_many_pieces_and_ranges_of_them_are_whole() {
    let (_dir, s3) = server().await;
    let store = store(s3.endpoint());
    let whole = body(9 << 20);
    assert!(s3.take_exchanges().is_empty(), "the first call begins the record");
    store.put("big", whole.clone(), &Precondition::None).await.unwrap();
    assert_eq!(store.get("big").await.unwrap().bytes, whole);
    for range in [0..1_u64, 5..4100, (1 << 20) - 1..(4 << 20) + 1, (9 << 20) - 1..9 << 20] {
        let part = store.get_range("big", range.clone()).await.unwrap();
        assert_eq!(part, whole.slice(range.start as usize..range.end as usize), "{range:?}");
    }
    store.get_range("big", 9 << 20..(9 << 20) + 1).await.unwrap_err();
    let seen = s3.take_exchanges();
    assert_eq!((seen[0].method.clone(), seen[0].path.as_str(), seen[0].sent), (Method::PUT, "/bucket/big", 9 << 20));
    assert_eq!(seen.iter().map(|x| x.answered).collect::<Vec<_>>()[1..4], [9 << 20, 1, 4095]);
    assert_eq!((seen.len(), seen[6].status), (7, 416), "{seen:?}");
    assert!(s3.take_exchanges().is_empty());
}

#[tokio::test]
async fn a_restart_keeps_bodies_and_tags_and_sweeps_what_was_half_written() {
    let (dir, s3) = server().await;
    let tag = store(s3.endpoint()).put("head", Bytes::from("1"), &Precondition::IfAbsent).await.unwrap();
    drop(s3);
    std::fs::write(dir.path().join(".tmp.7"), "half").unwrap();
    let s3 = EmbeddedS3::start(dir.path(), "127.0.0.1:0".parse().unwrap(), "bucket", "access", "secret").await.unwrap();
    assert!(!dir.path().join(".tmp.7").exists());
    let store = store(s3.endpoint());
    assert_eq!(store.get("head").await.unwrap().etag, tag);
    let newer = store.put("head", Bytes::from("1"), &Precondition::IfMatch(tag.clone())).await.unwrap();
    assert_ne!(newer, tag, "the same body again is another body");
}

#[tokio::test]
async fn a_link_adds_round_trips_and_shares_its_rate() {
    let (_dir, s3) = server().await;
    let proxy = FaultProxy::start(s3.addr()).await.unwrap();
    let round_trip = Duration::from_millis(60);
    proxy.shape(Some(LinkShape { round_trip, bits_per_second: Some(80_000_000) }));
    let store = store(proxy.endpoint());
    let timed = async |bytes: usize, parallel: usize| {
        let begun = Instant::now();
        let puts = (0..parallel).map(|n| {
            let (store, body) = (&store, body(bytes));
            async move { store.put(&format!("link/{n}"), body, &Precondition::None).await.unwrap() }
        });
        futures::future::join_all(puts).await;
        begun.elapsed()
    };
    let first = timed(10, 1).await;
    assert!(first >= round_trip * 2, "a new connection costs one more: {first:?}");
    let second = timed(10, 1).await;
    assert!(second >= round_trip && second < round_trip * 2, "{second:?}");
    // 4 × 250,000 bytes at 10 MB/s: 100 ms, and the round trips of new connections.
    let shared = timed(250_000, 4).await;
    assert!(shared >= Duration::from_millis(95) + round_trip, "{shared:?}");
    let begun = Instant::now();
    assert_eq!(store.get("link/0").await.unwrap().bytes, body(250_000));
    assert!(begun.elapsed() >= Duration::from_millis(20) + round_trip, "{:?}", begun.elapsed());
    store.delete("link/0").await.unwrap();
    assert_eq!(store.list("link/", None).await.unwrap().objects.len(), 3);

    proxy.add(Rule::once(Method::PUT, "refused", Fault::Refuse(503)));
    store.put("refused", Bytes::from("x"), &Precondition::None).await.unwrap_err();
    proxy.shape(None);
    // The fastest of some: the machine may be busy.
    let mut plain = round_trip;
    for _ in 0..10 {
        plain = plain.min(timed(10, 1).await);
    }
    assert!(plain < round_trip, "{plain:?}");
}
