use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::reaper::Adoption;

/// A listener whose first connections fail, as those do that a transport reset ended before they were accepted.
struct FailsFirst {
    inner: UnixListener,
    failures: std::sync::atomic::AtomicU32,
}

impl Listen for FailsFirst {
    type Stream = UnixStream;
    async fn accept(&self) -> io::Result<UnixStream> {
        let left = self.failures.load(std::sync::atomic::Ordering::Relaxed);
        if left > 0 {
            self.failures.store(left - 1, std::sync::atomic::Ordering::Relaxed);
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        Listen::accept(&self.inner).await
    }
}

fn start(path: &Path, failures: u32) {
    let router = router(Arc::new(Reaper::start(Adoption::OwnChildren).unwrap()));
    let listener = FailsFirst { inner: UnixListener::bind(path).unwrap(), failures: failures.into() };
    tokio::spawn(serve(listener, router));
}

async fn ask(path: &Path, head: &str, body: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(path).await.unwrap();
    let request =
        format!("{head} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

#[tokio::test]
async fn the_protocol_is_served_after_failed_accepts() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.sock");
    start(&path, 3);

    let (status, body) = ask(&path, "GET /v1/health", "").await;
    let health: Health = serde_json::from_str(&body).unwrap();
    assert_eq!((status, health.protocol), (200, PROTOCOL));
    assert_eq!(health.boot_id.len(), 36);

    let request =
        r#"{"command":"echo $A; pwd","cwd":"/","env":{"A":"b"},"timeout_ms":9000,"output_limit":100,"later_field":1}"#;
    let (status, body) = ask(&path, "POST /v1/exec", request).await;
    let reply: ExecReply = serde_json::from_str(&body).unwrap();
    assert_eq!((status, reply.exit_code), (200, 0));
    assert_eq!(STANDARD.decode(reply.stdout).unwrap(), b"b\n/\n");
}

#[tokio::test]
async fn refusals_are_agent_errors() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.sock");
    start(&path, 0);
    let cases = [
        ("GET /v1/nothing", "", 404, "/v1/nothing"),
        ("POST /v1/exec", "{", 400, "cannot read the request"),
        ("POST /v1/exec", r#"{"command":"true","cwd":"/none","timeout_ms":1,"output_limit":1}"#, 400, "/none"),
        ("POST /v1/wake", r#"{"unix_time_ns":1,"entropy":"AAAA"}"#, 400, "entropy"),
    ];
    for (head, body, expected, part) in cases {
        let (status, body) = ask(&path, head, body).await;
        let error: AgentError = serde_json::from_str(&body).unwrap();
        assert_eq!(status, expected, "{head}");
        assert!(error.message.contains(part), "{}", error.message);
    }
}

#[tokio::test]
async fn a_command_outlives_the_connection_that_asked_for_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.sock");
    start(&path, 0);
    let marker = directory.path().join("done");
    let command =
        format!("echo $$ > {0}/begun; seq 50000; sleep 0.2; seq 50000; echo > {0}/done", directory.path().display());
    let body = serde_json::json!({"command": command, "cwd": "/", "timeout_ms": 20000, "output_limit": 10}).to_string();
    let mut stream = UnixStream::connect(&path).await.unwrap();
    let request = format!("POST /v1/exec HTTP/1.1\r\nhost: agent\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    stream.write_all(request.as_bytes()).await.unwrap();
    let begun = Instant::now();
    while !directory.path().join("begun").exists() {
        assert!(begun.elapsed() < Duration::from_secs(10), "the command did not begin");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(stream);
    while !marker.exists() {
        assert!(begun.elapsed() < Duration::from_secs(15), "the command ended with its connection");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
