//! What the packs of a grant make of a server that fails, stalls or says too much.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod servers;
mod support;

use std::{
    collections::HashMap,
    fs::File,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use servers::{TTL, direct, kind, request, s3_server, scripted, settings};
use stasis_snapshot::{
    capture::capture,
    grant::{Access, GrantedObject},
    granted::{GrantedPacks, PackSink, PackSource, Patience},
    ids::Digest,
    manifest::ImageKind,
    store::{ErrorKind, ObjectStore, RawGrant, s3::S3Store},
};
use support::{Pages, first_capture, noise};

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
    let image = first_capture(ImageKind::Memory, &memory, None);
    let captured = capture(request(image, sink)).await.unwrap();
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
