//! Plain HTTP: each request is looked at.

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

use super::world::{SECRET, World, custom, listen, raw, soon};
use crate::control::types::RefusalKind;

/// A server that answers each request with its head, as it came.
async fn mirror() -> u16 {
    listen(|stream| async move {
        let mut stream = BufReader::new(stream);
        loop {
            let (mut head, mut length) = (String::new(), 0);
            loop {
                let before = head.len();
                if stream.read_line(&mut head).await.unwrap_or(0) == 0 {
                    return;
                }
                let line = head[before..].to_ascii_lowercase();
                if let Some(value) = line.strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap();
                }
                if line.starts_with("transfer-encoding:") {
                    // The tests' bodies are of one chunk.
                    length = usize::MAX;
                }
                if line == "\r\n" {
                    break;
                }
            }
            let mut body = Vec::new();
            if length == usize::MAX {
                let mut line = String::new();
                while !line.ends_with("0\r\n") {
                    stream.read_line(&mut line).await.unwrap();
                }
                stream.read_line(&mut line).await.unwrap();
                body = line.into_bytes();
            } else {
                body.resize(length, 0);
                stream.read_exact(&mut body).await.unwrap();
            }
            let text = [head.as_bytes(), &body].concat();
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", text.len());
            stream.write_all(&[answer.as_bytes(), &text].concat()).await.unwrap();
        }
    })
    .await
}

/// Sends one request and reads one answer: status and body.
async fn exchange(stream: &mut BufReader<TcpStream>, request: &str) -> (u16, String) {
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut line = String::new();
    soon(stream.read_line(&mut line)).await.unwrap();
    let status = line.split(' ').nth(1).unwrap().parse().unwrap();
    let mut length = 0;
    while line != "\r\n" {
        line.clear();
        soon(stream.read_line(&mut line)).await.unwrap();
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    soon(stream.read_exact(&mut body)).await.unwrap();
    (status, String::from_utf8(body).unwrap())
}

#[tokio::test]
async fn every_request_of_a_connection_is_looked_at() {
    let world = World::new(&custom(&["a.example.com", "b.example.com"], &["t.example.com"])).await;
    let mut guest = BufReader::new(world.guest(mirror().await).await);
    let get = |host: &str| format!("GET /x?y HTTP/1.1\r\nHost: {host}\r\nAuthorization: mine\r\nCookie: c\r\n\r\n");
    let (status, seen) = exchange(&mut guest, &get("A.example.com")).await;
    assert_eq!(status, 200);
    assert!(seen.starts_with("GET /x?y HTTP/1.1\r\n") && seen.contains("Host: A.example.com") && seen.contains("mine"));
    let (status, said) = exchange(&mut guest, &get("evil.example.com")).await;
    assert_eq!(status, 403);
    assert!(said.contains("no rule allows evil.example.com") && said.contains("rule: default"), "{said}");
    assert_eq!(exchange(&mut guest, &get("b.example.com:80")).await.0, 200);
    let (status, said) = exchange(&mut guest, &get("private.example.com")).await;
    assert_eq!((status, said.contains("no rule allows")), (403, true));
    let (status, seen) = exchange(&mut guest, &get("t.example.com")).await;
    assert_eq!(status, 200);
    assert!(seen.contains(SECRET) && !seen.contains("mine") && !seen.contains("Cookie"), "{seen}");
    assert_eq!(exchange(&mut guest, &get("a.example.com")).await.0, 200);
    assert_eq!(world.refusals(), [RefusalKind::NameNotAllowed, RefusalKind::NameNotAllowed]);
    let rules = world.sandbox.counters.report(0).rules;
    assert_eq!((rules["domain a.example.com"].allowed, rules["transform t.example.com"].allowed), (2, 1));
    world.keeps_its_secret();
}

#[tokio::test]
async fn a_name_that_leads_inside_is_refused_after_it_was_resolved() {
    let world = World::new(&custom(&["private.example.com"], &[])).await;
    let answer =
        raw(world.guest(80).await, "GET / HTTP/1.1\r\nHost: private.example.com\r\nConnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 403") && answer.contains("10.0.0.1, which is private"), "{answer}");
    assert_eq!(world.refusals(), [RefusalKind::AddressNotPublic]);
}

#[tokio::test]
async fn what_can_be_read_in_two_ways_is_not_passed_on() {
    let world = World::new(&custom(&["a.example.com"], &[])).await;
    let port = mirror().await;
    let a = "Host: a.example.com\r\nConnection: close\r\n";
    for (request, status, kind) in [
        (format!("GET / HTTP/1.1\r\n{a}Host: evil.example.org\r\n\r\n"), 400, RefusalKind::AmbiguousHost),
        (format!("GET http://evil.example.org/ HTTP/1.1\r\n{a}\r\n"), 400, RefusalKind::AmbiguousHost),
        (format!("GET https://a.example.com/ HTTP/1.1\r\n{a}\r\n"), 403, RefusalKind::TargetForm),
        (format!("CONNECT a.example.com:443 HTTP/1.1\r\n{a}\r\n"), 403, RefusalKind::TargetForm),
        ("GET / HTTP/1.1\r\nConnection: close\r\n\r\n".to_owned(), 403, RefusalKind::NoName),
        ("GET / HTTP/1.0\r\n\r\n".to_owned(), 403, RefusalKind::NoName),
        ("GET / HTTP/1.1\r\nHost: 93.184.216.34\r\nConnection: close\r\n\r\n".to_owned(), 403, RefusalKind::IpLiteral),
        (format!("GET / HTTP/1.1\r\n{a}Content-Length: 1\r\nContent-Length: 2\r\n\r\nx"), 400, RefusalKind::Malformed),
        (format!("GET / HTTP/1.1\r\n{a}Transfer-Encoding: chunked, x\r\n\r\n"), 400, RefusalKind::Malformed),
        (format!("GET / HTTP/1.1\r\n{a}X : y\r\n\r\n"), 400, RefusalKind::Malformed),
        (format!("GET / HTTP/1.1\r\n{a} folded\r\n\r\n"), 400, RefusalKind::Malformed),
        (format!("GET / HTTP/1.1\r\n{a}X: {}\r\n\r\n", "y".repeat(70_000)), 431, RefusalKind::TooLarge),
    ] {
        let answer = raw(world.guest(port).await, &request).await;
        let line = &request[..request.len().min(120)];
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")) || answer.starts_with(&format!("HTTP/1.0 {status} ")),
            "{line:?} gave {answer:?}"
        );
        soon(async {
            while world.refusals().last() != Some(&kind) {
                tokio::time::sleep(std::time::Duration::from_millis(2)).await;
            }
        })
        .await;
    }
}

#[tokio::test]
async fn a_request_with_two_lengths_reaches_the_server_as_one() {
    let world = World::new(&custom(&["a.example.com"], &[])).await;
    let smuggled = "POST / HTTP/1.1\r\nHost: a.example.com\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n\
                    3\r\nabc\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a.example.com\r\n\r\n";
    let answer = raw(world.guest(mirror().await).await, smuggled).await;
    assert!(!answer.contains("Content-Length: 6"), "{answer}");
    // What follows is a request of its own, looked at like any other, or the connection ends: never part of the first.
    assert!(answer.matches("HTTP/1.1 200 OK").count() <= 2);
}

#[tokio::test]
async fn an_absolute_target_becomes_a_path() {
    let world = World::new(&custom(&["a.example.com"], &[])).await;
    let request = "GET http://a.example.com/p?q HTTP/1.1\r\nHost: a.example.com\r\nConnection: close\r\n\r\n";
    let answer = raw(world.guest(mirror().await).await, request).await;
    assert!(answer.contains("\r\n\r\nGET /p?q HTTP/1.1\r\n"), "{answer}");
}

#[tokio::test]
async fn http2_without_tls_and_http_where_tls_belongs_are_refused() {
    let world = World::new(&custom(&["a.example.com"], &[])).await;
    let answer = raw(world.guest(80).await, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    assert!(answer.contains("use HTTP/1.1"), "{answer:?}");
    let answer = raw(world.guest(443).await, "GET / HTTP/1.1\r\nHost: a.example.com\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer:?}");
    let answer = raw(world.guest(443).await, "\0\0\0").await;
    assert_eq!(answer, "");
    assert_eq!(world.refusals(), [RefusalKind::CleartextHttp2, RefusalKind::Malformed, RefusalKind::Malformed]);
}

#[tokio::test]
async fn an_offer_of_h2c_is_not_passed_on() {
    let world = World::new(&custom(&["a.example.com"], &[])).await;
    let request = "GET / HTTP/1.1\r\nHost: a.example.com\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\n\
                   HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n";
    let answer = raw(world.guest(mirror().await).await, request).await;
    assert!(answer.starts_with("HTTP/1.1 200") && !answer.to_ascii_lowercase().contains("h2c"), "{answer}");
}

#[tokio::test]
async fn a_client_that_says_nothing_is_told_so() {
    let world = World::new(&custom(&["a.example.com"], &[])).await;
    let answer = raw(world.guest(80).await, "").await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer:?}");
    assert_eq!(world.refusals(), [RefusalKind::TooSlow]);
}
