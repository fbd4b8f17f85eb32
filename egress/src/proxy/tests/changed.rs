//! TLS that is ended here, for the domains of transforms.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response, StatusCode, Version};
use http_body_util::{BodyExt as _, Either, Empty, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::RootCertStore;

use super::world::{SECRET, World, custom, listen, soon, tls, trusting};
use crate::authority;
use crate::control::types::RefusalKind;

/// A server that says in `x-seen` what came and sends the body back as it comes. `/switch` becomes an echo.
async fn mirror(world: &World, names: &[&str], alpn: &[&[u8]]) -> u16 {
    let acceptor = TlsAcceptor::from(world.server_config(names, alpn));
    listen(move |stream| {
        let acceptor = acceptor.clone();
        async move {
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            let service = service_fn(|mut request: Request<Incoming>| async move {
                if request.uri().path() == "/switch" {
                    let upgrade = hyper::upgrade::on(&mut request);
                    tokio::spawn(async move {
                        let (mut read, mut write) = tokio::io::split(TokioIo::new(upgrade.await.unwrap()));
                        tokio::io::copy(&mut read, &mut write).await
                    });
                    let answer = Response::builder().status(101).header("connection", "upgrade");
                    let answer = answer.header("upgrade", "websocket").header("sec-websocket-accept", "yes");
                    return Ok::<_, Infallible>(answer.body(Either::Right(Empty::<Bytes>::new())).unwrap());
                }
                let (parts, body) = request.into_parts();
                let mut seen: Vec<String> =
                    parts.headers.iter().map(|(n, v)| format!("{n}={}", v.to_str().unwrap())).collect();
                seen.sort();
                let seen = format!("{:?} {} {}", parts.version, parts.uri, seen.join(" "));
                Ok(Response::builder().header("x-seen", seen).body(Either::Left(body)).unwrap())
            });
            if http2 {
                let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                let _ = server.serve_connection(TokioIo::new(stream), service).await;
            } else {
                let server = hyper::server::conn::http1::Builder::new();
                let _ = server.serve_connection(TokioIo::new(stream), service).with_upgrades().await;
            }
        }
    })
    .await
}

fn seen<B>(answer: &Response<B>) -> &str {
    answer.headers()["x-seen"].to_str().unwrap()
}

fn request(uri: &str, host: Option<&str>) -> Request<Full<Bytes>> {
    let mut request = Request::builder().uri(uri).header("authorization", "mine").header("cookie", "c");
    if let Some(host) = host {
        request = request.header("host", host);
    }
    request.body(Full::new(Bytes::from_static(b"body"))).unwrap()
}

#[tokio::test]
async fn headers_are_changed_over_http1_and_the_guest_trusts_its_authority_alone() {
    let world = World::new(&custom(&[], &["api.example.com"])).await;
    let port = mirror(&world, &["api.example.com"], &[b"http/1.1"]).await;
    let roots = trusting(&world.authority.certificate_pem);
    let stream = soon(tls(world.guest(port).await, "api.example.com", roots, &[b"h2", b"http/1.1"])).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]), "what the server chose");
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    for _ in 0..2 {
        let answer = soon(sender.send_request(request("/p?q", Some("api.example.com")))).await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        let text = seen(&answer);
        assert!(text.starts_with("HTTP/1.1 /p?q ") && text.contains(&format!("authorization={SECRET}")), "{text}");
        assert!(!text.contains("mine") && !text.contains("cookie"), "{text}");
        assert_eq!(soon(answer.into_body().collect()).await.unwrap().to_bytes(), "body");
    }
    let other = soon(sender.send_request(request("/", Some("other.example.com")))).await.unwrap();
    assert_eq!(other.status(), StatusCode::MISDIRECTED_REQUEST);
    assert_eq!(world.refusals(), [RefusalKind::Misdirected]);
    world.keeps_its_secret();
}

#[tokio::test]
async fn over_http2_each_request_is_looked_at_and_bodies_stream_both_ways() {
    let world = World::new(&custom(&["*.example.com"], &["*.api.example.com"])).await;
    let port = mirror(&world, &["a.api.example.com"], &[b"h2", b"http/1.1"]).await;
    let roots = trusting(&world.authority.certificate_pem);
    let stream = soon(tls(world.guest(port).await, "a.api.example.com", roots, &[b"h2"])).await.unwrap();
    let client = http2::Builder::new(TokioExecutor::new());
    let (mut sender, connection) = client.handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let answer = soon(sender.send_request(request("https://a.api.example.com/p", None))).await.unwrap();
    assert_eq!((answer.status(), answer.version()), (StatusCode::OK, Version::HTTP_2));
    let text = seen(&answer);
    assert!(text.starts_with("HTTP/2.0 https://a.api.example.com/p ") && text.contains(SECRET), "{text}");
    assert!(!text.contains("mine") && !text.contains("cookie"), "{text}");
    // A browser would send these over the same connection when the certificate covered them.
    for other in ["https://b.api.example.com/", "https://evil.example.org/"] {
        let answer = soon(sender.send_request(request(other, None))).await.unwrap();
        assert_eq!(answer.status(), StatusCode::MISDIRECTED_REQUEST);
    }
    let answer = soon(sender.send_request(request("https://a.api.example.com/", Some("b.example.com")))).await.unwrap();
    assert_eq!(answer.status(), StatusCode::BAD_REQUEST);
    let large = Request::post("https://a.api.example.com/").body(Full::new(Bytes::from(vec![5; 8 << 20]))).unwrap();
    let answer = soon(sender.send_request(large)).await.unwrap();
    assert_eq!(soon(answer.into_body().collect()).await.unwrap().to_bytes().len(), 8 << 20);
    assert_eq!(world.refusals()[..2], [RefusalKind::Misdirected; 2]);
    let rule = &world.sandbox.counters.report(0).rules["transform *.api.example.com"];
    assert!(rule.allowed == 2 && rule.bytes_up > 8 << 20 && rule.bytes_down > 8 << 20, "{rule:?}");
    world.keeps_its_secret();
}

#[tokio::test]
async fn a_websocket_passes() {
    let world = World::new(&custom(&[], &["api.example.com"])).await;
    let port = mirror(&world, &["api.example.com"], &[]).await;
    let roots = trusting(&world.authority.certificate_pem);
    let mut stream = soon(tls(world.guest(port).await, "api.example.com", roots, &[b"http/1.1"])).await.unwrap();
    let request = "GET /switch HTTP/1.1\r\nHost: api.example.com\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                   Sec-WebSocket-Key: k\r\nSec-WebSocket-Version: 13\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(soon(stream.read_u8()).await.unwrap());
    }
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 101 ") && head.contains("upgrade: websocket"), "{head}");
    for text in [b"hello".to_vec(), vec![9; 100_000]] {
        let mut echoed = vec![0; text.len()];
        stream.write_all(&text).await.unwrap();
        soon(stream.read_exact(&mut echoed)).await.unwrap();
        assert!(echoed == text);
    }
}

#[tokio::test]
async fn a_client_that_pins_its_server_fails_at_once_and_the_refusal_says_why() {
    let world = World::new(&custom(&[], &["api.example.com"])).await;
    let port = mirror(&world, &["api.example.com"], &[]).await;
    let mut pinned = RootCertStore::empty();
    pinned.add(world.root.clone()).unwrap();
    let other = trusting(&authority::make("sandbox").unwrap().certificate_pem);
    for (i, roots) in [pinned, other].into_iter().enumerate() {
        let began = Instant::now();
        assert!(soon(tls(world.guest(port).await, "api.example.com", roots, &[])).await.is_err());
        assert!(began.elapsed() < Duration::from_secs(2));
        soon(async {
            while world.refusals().len() <= i {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await;
    }
    assert_eq!(world.refusals(), [RefusalKind::ClientDistrust; 2]);
    let reason = world.sandbox.counters.report(0).refusals[0].reason.clone();
    assert!(reason.contains("alert") && reason.contains("api.example.com"), "{reason}");
}

#[tokio::test]
async fn a_server_that_is_not_trusted_gets_nothing() {
    let world = World::new(&custom(&[], &["api.example.com"])).await;
    let port = mirror(&world, &["other.example.com"], &[]).await;
    let roots = trusting(&world.authority.certificate_pem);
    let stream = soon(tls(world.guest(port).await, "api.example.com", roots, &[b"h2", b"http/1.1"])).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let answer = soon(sender.send_request(request("/", Some("api.example.com")))).await.unwrap();
    assert_eq!(answer.status(), StatusCode::BAD_GATEWAY);
    let text = soon(answer.into_body().collect()).await.unwrap().to_bytes();
    assert!(String::from_utf8_lossy(&text).contains("is not trusted"), "{text:?}");
    assert_eq!(world.refusals()[0], RefusalKind::UpstreamCertificate);
    world.keeps_its_secret();
}

#[tokio::test]
async fn what_has_no_transform_stays_a_tunnel() {
    let world = World::new(&custom(&["plain.example.com"], &["api.example.com"])).await;
    let port = mirror(&world, &["plain.example.com"], &[]).await;
    let mut roots = RootCertStore::empty();
    roots.add(world.root.clone()).unwrap();
    let stream = soon(tls(world.guest(port).await, "plain.example.com", roots, &[])).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let answer = soon(sender.send_request(request("/", Some("plain.example.com")))).await.unwrap();
    assert!(seen(&answer).contains("authorization=mine") && !seen(&answer).contains("s3cret"));
}
