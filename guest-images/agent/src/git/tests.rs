use std::path::Path;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;
use crate::reaper::Adoption;

fn request(cwd: &Path, args: &[&str]) -> GitRequest {
    GitRequest {
        cwd: Some(cwd.to_str().unwrap().to_owned()),
        args: args.iter().map(|&arg| arg.to_owned()).collect(),
        env: BTreeMap::new(),
        credentials: None,
        timeout_ms: 30_000,
        output_limit: 1 << 20,
    }
}

fn text(base64: &str) -> String {
    String::from_utf8(STANDARD.decode(base64).unwrap()).unwrap()
}

#[test]
fn credentials_are_bound_to_scheme_host_and_port() {
    for (url, expected) in [
        ("https://example.com/a/b.git", Some("https://example.com")),
        ("HTTP://example.com:8080", Some("http://example.com:8080")),
        ("https://user:secret@example.com/x", Some("https://example.com")),
        ("https://[::1]:8443/x", Some("https://[::1]:8443")),
        ("ssh://git@example.com/x", None),
        ("git@example.com:a/b.git", None),
        ("/srv/x.git", None),
        ("https:///x", None),
        ("https://exa mple/x", None),
    ] {
        assert_eq!(origin(url).as_deref(), expected, "{url}");
    }
}

#[test]
fn a_secret_is_not_in_what_is_printed() {
    let credentials = Credentials {
        username: "ann".to_owned(),
        password: "hunter2".to_owned(),
        remote: Remote::Fetch("origin".to_owned()),
    };
    assert!(!format!("{credentials:?}").contains("hunter2"));
}

#[tokio::test]
async fn a_repository_is_made_and_committed_to_without_any_configuration() {
    let directory = tempfile::tempdir().unwrap();
    let reaper = Reaper::start(Adoption::OwnChildren).unwrap();
    for args in [&["init", "-q"][..], &["commit", "-q", "--allow-empty", "--message=first"], &["log", "--format=%ae"]] {
        let mut request = request(directory.path(), args);
        // The configuration of whoever runs the tests does not count.
        request.env = [("HOME".to_owned(), directory.path().to_str().unwrap().to_owned())].into();
        let reply = run(&reaper, request).await.unwrap();
        assert_eq!(reply.exit_code, 0, "{args:?}: {}", text(&reply.stderr));
        if args[0] == "log" {
            assert_eq!(text(&reply.stdout), "root@localhost\n");
        }
    }
}

/// A server that wants a password, and notes what it is told.
async fn server() -> (String, tokio::sync::mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/repository.git", listener.local_addr().unwrap());
    let (tell, told) = tokio::sync::mpsc::channel(16);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            let head = String::from_utf8(head).unwrap();
            let answer = head
                .lines()
                .find_map(|line| line.to_lowercase().starts_with("authorization:").then(|| line.to_owned()));
            let status = if answer.is_some() {
                "404 Not Found"
            } else {
                "401 Unauthorized\r\nwww-authenticate: Basic realm=\"x\""
            };
            if let Some(answer) = answer {
                tell.send(answer).await.unwrap();
            }
            let reply = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            stream.write_all(reply.as_bytes()).await.unwrap();
        }
    });
    (url, told)
}

#[tokio::test]
async fn credentials_reach_their_remote_and_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let reaper = Reaper::start(Adoption::OwnChildren).unwrap();
    let ((url, mut told), (other, mut other_told)) = (server().await, server().await);
    run(&reaper, request(directory.path(), &["init", "-q"])).await.unwrap();
    run(&reaper, request(directory.path(), &["remote", "add", "origin", &url])).await.unwrap();
    let secret = |remote| Some(Credentials { username: "ann".to_owned(), password: "pa$$ 'word\"".to_owned(), remote });

    let mut named = request(directory.path(), &["fetch", "origin"]);
    named.credentials = secret(Remote::Fetch("origin".to_owned()));
    let reply = run(&reaper, named).await.unwrap();
    assert_ne!(reply.exit_code, 0);
    assert!(!text(&reply.stderr).contains("word"), "{}", text(&reply.stderr));
    let basic = format!("Basic {}", STANDARD.encode("ann:pa$$ 'word\""));
    assert!(told.recv().await.unwrap().ends_with(&basic));

    // The same credentials while git talks to somebody else.
    let mut elsewhere = request(directory.path(), &["fetch", &other]);
    elsewhere.credentials = secret(Remote::Url(url));
    assert_ne!(run(&reaper, elsewhere).await.unwrap().exit_code, 0);
    assert!(other_told.try_recv().is_err());
}

#[tokio::test]
async fn a_guest_without_git_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let reaper = Reaper::start(Adoption::OwnChildren).unwrap();
    let mut request = request(directory.path(), &["status"]);
    request.env = [("PATH".to_owned(), "/nonexistent".to_owned())].into();
    let reply = run(&reaper, request).await.unwrap();
    assert_eq!(reply.exit_code, EXIT_NOT_FOUND);
    assert!(text(&reply.stderr).contains("not installed"));
}
