//! TLS that passes as it is, and TLS that does not.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::rustls::{AlertDescription, Error as TlsError, RootCertStore};

use super::world::{World, custom, soon, tls};
use crate::control::types::{Mode, Policy, RefusalKind};

fn roots(world: &World) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add(world.root.clone()).unwrap();
    roots
}

fn alert(error: &std::io::Error) -> Option<AlertDescription> {
    match error.get_ref()?.downcast_ref::<TlsError>()? {
        TlsError::AlertReceived(alert) => Some(*alert),
        _ => None,
    }
}

#[tokio::test]
async fn an_allowed_name_passes_as_it_is_and_is_counted() {
    let world = World::new(&custom(&["*.example.com"], &[])).await;
    let port = world.echo_tls("a.example.com").await;
    let guest = world.guest(port).await;
    let mut stream = soon(tls(guest, "a.example.com", roots(&world), &[])).await.unwrap();
    let sent = vec![7; 3 << 20];
    let (mut read, mut write) = tokio::io::split(&mut stream);
    let mut got = Vec::new();
    let (written, read) = soon(async {
        tokio::join!(
            async {
                write.write_all(&sent).await?;
                write.shutdown().await
            },
            read.read_to_end(&mut got)
        )
    })
    .await;
    written.unwrap();
    read.unwrap();
    assert_eq!(&got[..13], b"a.example.com");
    assert!(got[13..] == sent);
    let report = world.sandbox.counters.report(0);
    let rule = &report.rules["domain *.example.com"];
    assert_eq!((rule.allowed, rule.refused), (1, 0));
    assert!(rule.bytes_up > 3 << 20 && rule.bytes_down > 3 << 20);
}

#[tokio::test]
async fn what_is_not_allowed_gets_an_alert_at_once() {
    let world = World::new(&custom(&["*.example.com"], &[])).await;
    let port = world.echo_tls("a.example.com").await;
    for (name, expected, kind) in [
        ("example.com", AlertDescription::AccessDenied, RefusalKind::NameNotAllowed),
        ("a.example.org", AlertDescription::AccessDenied, RefusalKind::NameNotAllowed),
        ("private.example.com", AlertDescription::AccessDenied, RefusalKind::AddressNotPublic),
        ("93.184.216.34", AlertDescription::UnrecognisedName, RefusalKind::NoName),
    ] {
        let began = Instant::now();
        let error = soon(tls(world.guest(port).await, name, roots(&world), &[])).await.unwrap_err();
        assert_eq!(alert(&error), Some(expected), "{name}: {error}");
        assert!(began.elapsed() < Duration::from_secs(2));
        assert_eq!(world.refusals().last(), Some(&kind), "{name}");
    }
    let refusals = world.sandbox.counters.report(0).refusals;
    assert_eq!(refusals[1].name.as_deref(), Some("a.example.org"));
    assert_eq!((refusals[1].port, refusals[1].address), (Some(port), Some("93.184.216.34".parse().unwrap())));
    assert!(refusals[2].reason.contains("10.0.0.1, which is private"), "{}", refusals[2].reason);
}

#[tokio::test]
async fn a_hidden_name_is_refused_unless_the_operator_lets_it_pass() {
    // A ClientHello of rustls with an extension more: the lengths of record, message and extensions grow with it.
    let hello = |name: &str| {
        use tokio_rustls::rustls::{ClientConfig, ClientConnection};
        let config = ClientConfig::builder_with_provider(std::sync::Arc::new(
            tokio_rustls::rustls::crypto::ring::default_provider(),
        ));
        let config = config.with_safe_default_protocol_versions().unwrap();
        let config = config.with_root_certificates(RootCertStore::empty()).with_no_client_auth();
        let name = name.to_owned().try_into().unwrap();
        let mut bytes = Vec::new();
        ClientConnection::new(std::sync::Arc::new(config), name).unwrap().write_tls(&mut bytes).unwrap();
        let extra = [0xfe, 0x0d, 0, 4, 0, 1, 2, 3];
        let session = 5 + 4 + 2 + 32;
        let suites = session + 1 + usize::from(bytes[session]);
        let compression = suites + 2 + usize::from(u16::from_be_bytes([bytes[suites], bytes[suites + 1]]));
        let extensions = compression + 1 + usize::from(bytes[compression]);
        for at in [3, 7, extensions] {
            let grown = u16::from_be_bytes([bytes[at], bytes[at + 1]]) + 8;
            bytes[at..at + 2].copy_from_slice(&grown.to_be_bytes());
        }
        bytes.extend(extra);
        bytes
    };
    for pass in [false, true] {
        let world = World::with(&custom(&["a.example.com"], &[]), |s| s.pass_encrypted_hello = pass).await;
        let port = world.echo_tls("a.example.com").await;
        let mut guest = world.guest(port).await;
        guest.write_all(&hello("a.example.com")).await.unwrap();
        let mut answer = [0; 7];
        soon(guest.read_exact(&mut answer)).await.unwrap();
        assert_eq!(answer == [21, 3, 3, 0, 2, 2, 49], !pass, "{answer:?}");
        assert_eq!(world.refusals(), if pass { vec![] } else { vec![RefusalKind::EncryptedClientHello] });
    }
}

#[tokio::test]
async fn a_new_policy_ends_what_the_old_one_let_pass() {
    let allowed = custom(&["a.example.com"], &[]);
    let world = World::new(&allowed).await;
    let port = world.echo_tls("a.example.com").await;
    let mut stream = soon(tls(world.guest(port).await, "a.example.com", roots(&world), &[])).await.unwrap();
    let mut name = [0; 13];
    soon(stream.read_exact(&mut name)).await.unwrap();
    let nothing = Policy { mode: Mode::DenyAll, ..custom(&[], &[]) };
    soon(world.sandbox.replace(&nothing, None)).await.unwrap();
    assert!(
        soon(stream.read(&mut name)).await.is_ok_and(|n| n == 0) || stream.write_all(b"x").await.is_err() || {
            soon(stream.read(&mut name)).await.is_err()
        }
    );
    let error = soon(tls(world.guest(port).await, "a.example.com", roots(&world), &[])).await.unwrap_err();
    assert_eq!(alert(&error), Some(AlertDescription::AccessDenied));
    assert_eq!(world.refusals(), [RefusalKind::DeniedByMode]);
    soon(world.sandbox.replace(&allowed, None)).await.unwrap();
    assert!(soon(tls(world.guest(port).await, "a.example.com", roots(&world), &[])).await.is_ok());
}

#[tokio::test]
async fn a_slow_or_endless_head_is_answered_in_time() {
    let world = World::new(&custom(&["a.example.com"], &[])).await;
    let mut half = world.guest(443).await;
    half.write_all(&[22, 3, 1, 1, 0, 1]).await.unwrap();
    let mut answer = Vec::new();
    let _ = soon(half.read_to_end(&mut answer)).await;
    assert_eq!(answer, [21, 3, 3, 0, 2, 2, 49]);
    let mut endless = world.guest(443).await;
    let record = [&[22, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xff][..], &vec![3; 0x4000 - 4]].concat();
    endless.write_all(&record).await.unwrap();
    answer.clear();
    let _ = soon(endless.read_to_end(&mut answer)).await;
    assert_eq!(answer.first(), Some(&21));
    assert_eq!(world.refusals()[0], RefusalKind::TooSlow);
}

#[tokio::test]
async fn readers_that_do_not_read_are_cut_off_at_the_bound() {
    let world = World::with(&custom(&["a.example.com"], &[]), |s| s.limits.buffered = 64 << 10).await;
    let port = super::world::listen(|stream| async move {
        let data = vec![1; 1 << 20];
        let mut stream = stream;
        while stream.write_all(&data).await.is_ok() {}
    })
    .await;
    let mut guests = Vec::new();
    for _ in 0..4 {
        let mut guest = world.guest(port).await;
        let hello = {
            use tokio_rustls::rustls::{ClientConfig, ClientConnection};
            let config = ClientConfig::builder_with_provider(std::sync::Arc::new(
                tokio_rustls::rustls::crypto::ring::default_provider(),
            ));
            let config = config.with_safe_default_protocol_versions().unwrap();
            let config = config.with_root_certificates(RootCertStore::empty()).with_no_client_auth();
            let mut bytes = Vec::new();
            let name = "a.example.com".try_into().unwrap();
            ClientConnection::new(std::sync::Arc::new(config), name).unwrap().write_tls(&mut bytes).unwrap();
            bytes
        };
        guest.write_all(&hello).await.unwrap();
        guests.push(guest);
    }
    soon(async {
        while !world.refusals().contains(&RefusalKind::TooMuchBuffered) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}
