use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::reaper::Adoption;

/// Longer than anything here takes on a busy machine.
const HANG: Duration = Duration::from_mins(1);

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
    let (status, _, body) = exchange(path, head, "", body.as_bytes()).await;
    (status, String::from_utf8(body).unwrap())
}

/// Status, head and body of an answer; a body in chunks is put together.
async fn exchange(path: &Path, head: &str, headers: &str, body: &[u8]) -> (u16, String, Vec<u8>) {
    let mut stream = UnixStream::connect(path).await.unwrap();
    let request = format!(
        "{head} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n{headers}content-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    stream.write_all(body).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let end = memchr::memmem::find(&answer, b"\r\n\r\n").unwrap();
    let head = String::from_utf8(answer[..end].to_vec()).unwrap();
    let mut rest = &answer[end + 4..];
    let mut body = Vec::new();
    if head.to_lowercase().contains("transfer-encoding: chunked") {
        loop {
            let line = memchr::memmem::find(rest, b"\r\n").unwrap();
            let size = usize::from_str_radix(std::str::from_utf8(&rest[..line]).unwrap(), 16).unwrap();
            body.extend_from_slice(&rest[line + 2..line + 2 + size]);
            rest = &rest[line + 4 + size..];
            if size == 0 {
                break;
            }
        }
    } else {
        body.extend_from_slice(rest);
    }
    (head.split(' ').nth(1).unwrap().parse().unwrap(), head, body)
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
        ("POST /v1/exec", r#"{"command":"true","cwd":"/none","timeout_ms":9000,"output_limit":1}"#, 400, "/none"),
        ("POST /v1/wake", r#"{"unix_time_ns":1,"entropy":"AAAA"}"#, 400, "entropy"),
        ("POST /v1/files/ls", r#"{"path":"/none"}"#, 404, "/none"),
        ("POST /v1/files/ls", r#"{"path":""}"#, 400, "empty"),
        ("POST /v1/files/mkdir", r#"{"path":"/etc"}"#, 409, "/etc"),
        ("POST /v1/files/mkdir", r#"{"path":"/proc/x"}"#, 404, "/proc/x"),
        ("POST /v1/files/read-many", r#"{"paths":[]}"#, 400, "must have"),
        ("POST /v1/files/read-many", r#"{"paths":["/etc/passwd","/none"]}"#, 404, "/none"),
        ("POST /v1/files/write?path=/etc", "x", 400, "directory"),
        ("POST /v1/files/write-many", "x", 400, "boundary"),
        ("POST /v1/terminals/get", r#"{"id":"x"}"#, 404, "no terminal"),
        ("GET /v1/terminals/attach?id=x", "", 400, "upgrade"),
        ("POST /v1/git", r#"{"args":["x"],"cwd":"/none","timeout_ms":9000,"output_limit":1}"#, 400, "/none"),
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
        assert!(begun.elapsed() < HANG, "the command did not begin");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(stream);
    while !marker.exists() {
        assert!(begun.elapsed() < HANG, "the command ended with its connection");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Every byte value, and enough of them to need many reads.
fn large() -> Vec<u8> {
    (0..5_000_003_u32).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect()
}

#[tokio::test]
async fn files_come_and_go_as_they_are_however_large() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.sock");
    start(&path, 0);
    let file = directory.path().join("some dir/f");
    let query =
        format!("POST /v1/files/write?path={}&permissions=0640", file.display().to_string().replace(' ', "%20"));
    let (status, _, _) = exchange(&path, &query, "", &large()).await;
    assert_eq!(status, 204);
    assert!(std::fs::read(&file).unwrap() == large());
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o7777, 0o640);

    let request = |more: &str| format!(r#"{{"path":{:?}{more}}}"#, file.display().to_string());
    let (status, head, body) = exchange(&path, "POST /v1/files/read", "", request("").as_bytes()).await;
    assert!(status == 200 && body == large() && head.contains("application/octet-stream"));
    let part = request(r#","offset":4000000,"limit":3"#);
    let (_, _, body) = exchange(&path, "POST /v1/files/read", "", part.as_bytes()).await;
    assert_eq!(body, large()[4_000_000..4_000_003]);
}

#[tokio::test]
async fn a_form_has_paths_for_names_both_ways() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.sock");
    start(&path, 0);
    let at = |name: &str| directory.path().join(name).display().to_string();
    let part = |name: &str, content: &[u8]| {
        let mut part = format!(
            "--BOUND\r\nContent-Disposition: form-data; name=\"{name}\"; filename=\"upload\"\r\nContent-Type: application/octet-stream\r\n\r\n"
        )
        .into_bytes();
        part.extend_from_slice(content);
        part.extend_from_slice(b"\r\n");
        part
    };
    let kind = "content-type: multipart/form-data; boundary=BOUND\r\n";
    let tricky = b"\r\n--BOUN\r\n\r--\0\xff\r".to_vec();
    let form =
        [part(&at("new/a %22b%22"), &large()), part(&at("e"), b""), part(&at("t"), &tricky), b"--BOUND--\r\n".to_vec()];
    let (status, _, body) = exchange(&path, "POST /v1/files/write-many", kind, &form.concat()).await;
    assert_eq!(status, 204, "{}", String::from_utf8_lossy(&body));
    assert!(std::fs::read(at("new/a \"b\"")).unwrap() == large());
    assert_eq!((std::fs::read(at("e")).unwrap().len(), std::fs::read(at("t")).unwrap()), (0, tricky.clone()));

    let names = [at("t"), at("new/a \"b\""), at("e")];
    let request = serde_json::json!({ "paths": names }).to_string();
    let (status, head, body) = exchange(&path, "POST /v1/files/read-many", "", request.as_bytes()).await;
    let boundary = head.split("boundary=").nth(1).unwrap().lines().next().unwrap().trim().to_owned();
    assert_eq!(status, 200);
    let mut expected = Vec::new();
    for (name, content) in names.iter().zip([tricky, large(), Vec::new()]) {
        let file = Path::new(name).file_name().unwrap().to_str().unwrap().replace('"', "%22");
        let name = name.replace('"', "%22");
        expected.extend_from_slice(format!("--{boundary}\r\ncontent-disposition: form-data; name=\"{name}\"; filename=\"{file}\"\r\ncontent-type: application/octet-stream\r\n\r\n").as_bytes());
        expected.extend_from_slice(&content);
        expected.extend_from_slice(b"\r\n");
    }
    expected.extend_from_slice(format!("--{boundary}--\r\n").as_bytes());
    assert!(body == expected);

    // A form that breaks off leaves the file as it was; one without a name is refused whatever comes after.
    let broken = [part(&at("e"), b"new").as_slice(), b"--BOUND\r\nContent-Dis"].concat();
    assert_eq!(exchange(&path, "POST /v1/files/write-many", kind, &broken).await.0, 400);
    let mut half = part(&at("t"), b"half");
    half.truncate(half.len() - 2);
    assert_eq!(exchange(&path, "POST /v1/files/write-many", kind, &half).await.0, 400);
    assert_eq!(std::fs::read(at("e")).unwrap(), b"new");
    assert_ne!(std::fs::read(at("t")).unwrap(), b"half");
    let nameless = [part("", &large()), b"--BOUND--\r\n".to_vec()].concat();
    let (status, _, body) = exchange(&path, "POST /v1/files/write-many", kind, &nameless).await;
    assert!(status == 400 && String::from_utf8_lossy(&body).contains("name"));
    assert_eq!(exchange(&path, "POST /v1/files/write-many", kind, b"--BOUND--\r\n").await.0, 400);
}

/// The sender is not cut off before it has sent all: it would not see the answer.
#[tokio::test]
async fn a_refused_file_is_read_to_its_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.sock");
    start(&path, 0);
    let (status, _, body) = exchange(&path, "POST /v1/files/write?path=/proc/none/x", "", &large()).await;
    assert!((400..500).contains(&status), "{status} {}", String::from_utf8_lossy(&body));
}

#[tokio::test]
async fn a_terminal_is_attached_to_over_the_connection() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.sock");
    start(&path, 0);
    let create = r#"{"id":"a b","cwd":"/","envs":{},"environment":{"HOME":"/nonexistent"},"cols":80,"rows":24}"#;
    let (status, body) = ask(&path, "POST /v1/terminals/create", create).await;
    assert_eq!(status, 200, "{body}");
    let mut stream = UnixStream::connect(&path).await.unwrap();
    let head = "GET /v1/terminals/attach?id=a%20b HTTP/1.1\r\nhost: agent\r\nconnection: upgrade\r\nupgrade: stasis-terminal\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(b"echo $((20 + 3))-there; exit\n").await.unwrap();
    let mut seen = Vec::new();
    tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut seen)).await.expect("no end").unwrap();
    let seen = String::from_utf8_lossy(&seen);
    assert!(seen.starts_with("HTTP/1.1 101") && seen.contains("23-there"), "{seen}");
    let (_, body) = ask(&path, "POST /v1/terminals/list", "").await;
    assert!(body.contains(r#""active":false"#), "{body}");
    assert_eq!(ask(&path, "POST /v1/terminals/delete", r#"{"id":"a b"}"#).await.0, 204);
}
