//! What the guest serves, through the REST API: with an agent of this machine for a guest, and in a Debian guest that sleeps in between.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stasis_api::front::authority::Authority;
use stasis_api::invoke::Domain;
use stasis_api::sources::Sources;
use stasis_tests::guest::{self, LocalGuest, SANDBOX};
use stasis_tests::host;
use stasis_tests::service::{Options, Service};
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::Error;

const CLIENTS: [&str; 2] = ["0.4.0", "0.8.0"];
/// Routes of the guest, with a body that only the guest can refuse.
const ROUTES: [(&str, &str, &str); 44] = [
    ("POST", "process/execute", r#"{"command":"true"}"#),
    ("GET", "system/user-home-dir", ""),
    ("GET", "system/workdir", ""),
    ("POST", "filesystem/ls", r#"{"path":"/"}"#),
    ("POST", "filesystem/stat", r#"{"path":"/"}"#),
    ("POST", "filesystem/mkdir", r#"{"path":"/"}"#),
    ("POST", "filesystem/write-file?path=/proc/none/x", "x"),
    ("POST", "filesystem/write-files", ""),
    ("POST", "filesystem/read-file", r#"{"path":"/none"}"#),
    ("POST", "filesystem/read-files", r#"{"paths":["/none"]}"#),
    ("POST", "filesystem/delete", r#"{"path":"/none"}"#),
    ("POST", "filesystem/set-permissions", r#"{"path":"/none","mode":"755"}"#),
    ("POST", "filesystem/glob", r#"{"path":"/none"}"#),
    ("POST", "filesystem/grep", r#"{"path":"/none","pattern":"x"}"#),
    ("POST", "filesystem/edit-file", r#"{"path":"/none","edits":[{"find":"x"}]}"#),
    ("POST", "filesystem/edit-files", r#"{"files":["/none"],"find":"x"}"#),
    ("POST", "filesystem/move", r#"{"src_path":"/none","dst_path":"/none2"}"#),
    ("POST", "filesystem/copy", r#"{"src_path":"/none","dst_path":"/none2"}"#),
    ("POST", "filesystem/exists", r#"{"path":"/none"}"#),
    ("POST", "filesystem/tree", r#"{"path":"/none"}"#),
    ("POST", "git/clone", r#"{"url":"file:///none","path":"/none"}"#),
    ("POST", "git/status", r#"{"path":"/"}"#),
    ("POST", "git/branches", r#"{"path":"/"}"#),
    ("POST", "git/diff-unstaged", r#"{"path":"/"}"#),
    ("POST", "git/diff-staged", r#"{"path":"/"}"#),
    ("POST", "git/diff", r#"{"path":"/","target":"HEAD"}"#),
    ("POST", "git/reset", r#"{"path":"/"}"#),
    ("POST", "git/log", r#"{"path":"/"}"#),
    ("POST", "git/show", r#"{"path":"/","revision":"HEAD"}"#),
    ("POST", "git/create-branch", r#"{"path":"/","name":"x"}"#),
    ("POST", "git/checkout-branch", r#"{"path":"/","branch":"x"}"#),
    ("POST", "git/delete-branch", r#"{"path":"/","name":"x"}"#),
    ("POST", "git/add", r#"{"path":"/","files":["x"]}"#),
    ("POST", "git/commit", r#"{"path":"/","message":"x"}"#),
    ("POST", "git/push", r#"{"path":"/"}"#),
    ("POST", "git/pull", r#"{"path":"/"}"#),
    ("GET", "pty", ""),
    ("GET", "pty/none", ""),
    ("DELETE", "pty/none", ""),
    ("POST", "pty/none/resize", r#"{"cols":1,"rows":1}"#),
    ("GET", "pty/none/connect", ""),
    ("POST", "lsp/start", ""),
    ("POST", "ssh/access", ""),
    ("POST", "mounts", ""),
];

fn client(version: &str) -> PathBuf {
    host::built(&format!("sdk/{version}/bin/python"))
}

fn no_clients() -> Option<String> {
    CLIENTS.iter().find_map(|version| host::missing(&client(version), "tests/sdk/venvs makes it"))
}

fn no_debian() -> Option<String> {
    let images = host::built("images/templates/debian-bookworm/template.json");
    host::no_linux_guest().or_else(|| host::missing(&images, "guest-images/linux/build makes it")).or_else(no_clients)
}

fn main() {
    Suite::default()
        .test("unmodified_clients_use_the_guest", guest::lacking().or_else(no_clients), clients)
        .test("every_route_is_closed_to_others_and_open_to_its_tenant", guest::lacking(), tenants)
        .test("bad_requests_name_their_field_and_ask_no_guest", guest::lacking(), bad_requests)
        .test("large_files_pass_through_and_broken_ones_leave_the_old", guest::lacking(), large_files)
        .test("commands_have_users_limits_and_an_environment", guest::lacking(), commands)
        .test("secrets_of_git_are_in_no_log_and_no_argument", guest::lacking(), git_secrets)
        .test("unmodified_clients_live_through_the_whole_story", no_debian(), story)
        .test("a_debian_guest_serves_the_client_and_sleeps_with_a_terminal", no_debian(), debian)
        .main();
}

async fn clients() -> Outcome {
    for version in CLIENTS {
        let guest = LocalGuest::start().await?;
        drive(version, &guest.url, &guest.key, SANDBOX, &guest.scratch().to_string_lossy(), false).await?;
    }
    Ok(())
}

/// Runs the script of the guest's requests with one version of the client.
async fn drive(version: &str, url: &str, key: &str, sandbox: &str, scratch: &str, pauses: bool) -> Result<(), Error> {
    let mut environment =
        vec![("LEAP0_BASE_URL", url), ("LEAP0_API_KEY", key), ("SANDBOX", sandbox), ("SCRATCH", scratch)];
    if pauses {
        environment.push(("PAUSES", "1"));
    }
    script(version, "guest.py", &environment).await
}

/// Runs a script of `tests/sdk` with one version of the client.
#[expect(clippy::disallowed_methods, reason = "the client is a program")]
async fn script(version: &str, name: &str, environment: &[(&str, &str)]) -> Result<(), Error> {
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("sdk").join(name);
    let mut command = std::process::Command::new(client(version));
    command.arg(script).env("LEAP0_SDK_OTEL_ENABLED", "false").envs(environment.iter().copied());
    eprintln!("client {version}");
    let status = tokio::task::spawn_blocking(move || command.status()).await??;
    if status.success() { Ok(()) } else { Err(format!("{name} with client {version}: {status}").into()) }
}

async fn tenants() -> Outcome {
    let guest = LocalGuest::start().await?;
    let journal = &guest.supervisor.core().journal;
    let (_, other) = journal.create_key("other", "", &Sources::system())?;
    // This machine is the guest: what is not there is looked for where nobody else makes anything.
    let nowhere = guest.dir.path().join("none").display().to_string();
    for (method, route, body) in ROUTES {
        let body = body.replace("/none", &nowhere);
        let path = format!("/v1/sandbox/{SANDBOX}/{route}");
        let unknown = format!("/v1/sandbox/sbx-none00000000000000000/{route}");
        let (status, theirs) = guest.call(&other, method, &path, body.clone()).await?;
        assert_eq!(status, 404, "{route}: {theirs}");
        let (_, nobodys) = guest.call(&other, method, &unknown, body.clone()).await?;
        let named = |answer: &Value, id: &str| answer["message"].as_str().unwrap_or_default().replace(id, "…");
        assert_eq!(named(&theirs, SANDBOX), named(&nobodys, "sbx-none00000000000000000"), "{route}");
        assert_eq!(guest.call("wrong", method, &path, body.clone()).await?.0, 401, "{route}");
        let (status, ours) = guest.call(&guest.key, method, &path, body.clone()).await?;
        let left_out = ["lsp", "ssh", "mounts"].iter().any(|part| route.starts_with(part));
        assert_eq!(status == 501, left_out, "{route}: {status} {ours}");
        assert!(![401, 405, 500, 502].contains(&status), "{route}: {status} {ours}");
        assert!(status < 400 || ours["message"].is_string(), "{route}: {ours}");
        // With a slash too, since the clients follow no redirect.
        let slash = path.split_once('?').map_or(format!("{path}/"), |(path, query)| format!("{path}/?{query}"));
        assert_eq!(guest.call(&guest.key, method, &slash, body).await?.0, status, "{route}/");
    }
    let (status, desktop) =
        guest.call(&guest.key, "GET", &format!("/v1/sandbox/{SANDBOX}/desktop/api/status"), "").await?;
    assert!(status == 501 && desktop["message"].as_str().is_some_and(|m| m.contains("desktop")), "{desktop}");
    Ok(())
}

async fn bad_requests() -> Outcome {
    let mut guest = LocalGuest::start().await?;
    // Nobody is there to ask.
    guest.end_agent();
    for (route, body, field) in [
        ("process/execute", json!({"command": "x", "user": ""}), "user"),
        ("process/execute", json!({"command": "x", "timeout": 0}), "timeout"),
        ("filesystem/ls", json!({}), "path"),
        ("filesystem/ls", json!({"path": ""}), "path"),
        ("filesystem/ls", json!({"path": "/", "recursive": "yes"}), "recursive"),
        ("filesystem/ls", json!({"path": "/", "exclude": [1]}), "exclude[0]"),
        ("filesystem/mkdir", json!({"path": "/x", "permissions": "rwx"}), "permissions"),
        ("filesystem/read-file", json!({"path": "/x", "head": 1, "tail": 1}), "tail"),
        ("filesystem/read-file", json!({"path": "/x", "offset": -1}), "offset"),
        ("filesystem/read-files", json!({"paths": []}), "paths"),
        ("filesystem/set-permissions", json!({"path": "/x"}), "mode"),
        ("filesystem/grep", json!({"path": "/x"}), "pattern"),
        ("filesystem/edit-file", json!({"path": "/x", "edits": [{"find": ""}]}), "edits[0].find"),
        ("filesystem/edit-file", json!({"path": "/x", "edits": []}), "edits"),
        ("filesystem/edit-files", json!({"files": ["a"], "find": ""}), "find"),
        ("filesystem/move", json!({"src_path": "/x"}), "dst_path"),
        ("filesystem/write-file", json!({}), "path"),
        ("filesystem/write-file?path=/x&permissions=9", json!({}), "permissions"),
        ("filesystem/write-files", json!({}), "content-type"),
        ("filesystem/tree", json!({"path": "/x\u{0}"}), "path"),
        ("git/clone", json!({"url": "--upload-pack=x", "path": "/x"}), "url"),
        ("git/clone", json!({"url": "ext::sh", "path": "/x"}), "url"),
        ("git/clone", json!({"url": "https://x", "path": "/x", "password": "a\nb"}), "password"),
        ("git/diff", json!({"path": "/x", "target": "--output=/etc/passwd"}), "target"),
        ("git/branches", json!({"path": "/x", "branch_type": "x"}), "branch_type"),
        ("git/add", json!({"path": "/x", "files": []}), "files"),
        ("git/commit", json!({"path": "/x"}), "message"),
        ("git/push", json!({"path": "/x", "remote": "-x"}), "remote"),
        ("pty", json!({"cols": 0}), "cols"),
        ("pty", json!({"id": "a\nb"}), "id"),
        ("pty", json!({"envs": {"A=B": "x"}}), "envs.A=B"),
        ("pty/x/resize", json!({"cols": 80}), "rows"),
    ] {
        let path = format!("/v1/sandbox/{SANDBOX}/{route}");
        let (status, answer) = guest.call(&guest.key, "POST", &path, body.to_string()).await?;
        assert_eq!((status, answer["errors"][0]["field"].as_str()), (400, Some(field)), "{route} {body}: {answer}");
    }
    let (status, answer) =
        guest.call(&guest.key, "POST", &format!("/v1/sandbox/{SANDBOX}/filesystem/ls"), r#"{"path":"/"}"#).await?;
    assert_eq!(status, 502, "{answer}");
    Ok(())
}

const LARGE: usize = 300 << 20;
const PIECE: usize = 1 << 20;

/// Pieces of a file, each of one repeated byte, until `pieces` are through; then an error when it is to break off.
fn pieces(pieces: usize, breaks_off: bool) -> reqwest::Body {
    let all = (0..pieces).map(|n| Ok(vec![n.to_le_bytes()[0]; PIECE]));
    let end = breaks_off.then(|| Err(std::io::Error::other("the client has gone")));
    reqwest::Body::wrap_stream(futures::stream::iter(all.chain(end)))
}

async fn large_files() -> Outcome {
    let guest = LocalGuest::start().await?;
    let file = guest.scratch().join("large");
    let write = format!("/v1/sandbox/{SANDBOX}/filesystem/write-file?path={}", file.display());
    let before = memory()?;
    let (status, answer) = guest.call(&guest.key, "POST", &write, pieces(LARGE / PIECE, false)).await?;
    assert_eq!((status, std::fs::metadata(&file)?.len()), (204, LARGE as u64), "{answer}");

    let read = format!("/v1/sandbox/{SANDBOX}/filesystem/read-file");
    let request = reqwest::Client::new().post(format!("{}{read}", guest.url)).bearer_auth(&guest.key);
    let mut answer = request.body(json!({"path": file}).to_string()).send().await?;
    assert_eq!(answer.status(), 200);
    let mut seen = 0;
    while let Some(chunk) = answer.chunk().await? {
        let right = chunk.iter().enumerate().all(|(n, byte)| *byte == ((seen + n) / PIECE).to_le_bytes()[0]);
        assert!(right, "at {seen}");
        seen += chunk.len();
    }
    assert_eq!(seen, LARGE);
    let grown = memory()?.saturating_sub(before);
    assert!(grown < (LARGE / 4) as u64, "the supervisor grew by {} MiB", grown >> 20);

    // A client that goes away in the middle leaves the file as it was, and nothing beside it.
    assert!(guest.call(&guest.key, "POST", &write, pieces(20, true)).await.is_err());
    let begun = Instant::now();
    while std::fs::read_dir(guest.scratch())?.count() != 1 {
        assert!(begun.elapsed() < Duration::from_secs(30), "what was written is left");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(std::fs::metadata(&file)?.len(), LARGE as u64);
    // A refused file is taken to its end, so that the client sees the refusal.
    let nowhere = format!("/v1/sandbox/{SANDBOX}/filesystem/write-file?path=/proc/none/x");
    let (status, answer) = guest.call(&guest.key, "POST", &nowhere, pieces(30, false)).await?;
    assert!((400..500).contains(&status), "{status} {answer}");
    Ok(())
}

/// Resident memory of this process, in which the supervisor is.
fn memory() -> Result<u64, Error> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse::<u64>()? << 10)
}

async fn commands() -> Outcome {
    let guest = LocalGuest::start().await?;
    let run = async |body: Value| {
        guest.call(&guest.key, "POST", &format!("/v1/sandbox/{SANDBOX}/process/execute"), body.to_string()).await
    };
    let (status, done) = run(json!({"command": "id -u; echo $HOME $FROM_SANDBOX", "user": "1234"})).await?;
    assert_eq!((status, &done["stdout"]), (200, &json!("1234\n/ yes\n")), "{done}");
    let (status, done) = run(json!({"command": "true", "user": "no-such-user"})).await?;
    assert_eq!((status, &done["errors"][0]["field"]), (400, &json!("user")), "{done}");
    let (status, done) = run(json!({"command": "true", "cwd": "/no/such"})).await?;
    assert_eq!((status, &done["errors"][0]["field"]), (400, &json!("cwd")), "{done}");
    let (_, done) = run(json!({"command": "head -c 9000000 /dev/zero | tr '\\0' x; echo e >&2; exit 7"})).await?;
    assert_eq!(
        (done["stdout"].as_str().map(str::len), &done["stdout_dropped"]),
        (Some(4 << 20), &json!(9_000_000 - (4 << 20)))
    );
    assert_eq!((&done["exit_code"], &done["stderr"]), (&json!(7), &json!("e\n")));
    let (_, done) = run(json!({"command": "printf '\\377ok'"})).await?;
    assert_eq!(done["stdout"], json!("\u{fffd}ok"), "what is no text is made one");
    Ok(())
}

async fn git_secrets() -> Outcome {
    let guest = LocalGuest::start().await?;
    let scratch = guest.scratch();
    // Listens, and tells what git's processes look like while it makes git wait for an answer.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://ann:s3cr3t-in-url@{}/x.git", listener.local_addr()?);
    let watching = tokio::spawn(async move {
        let Ok((stream, _)) = listener.accept().await else { return String::new() };
        let mut seen = String::new();
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            seen.push_str(&String::from_utf8_lossy(&std::fs::read(entry.path().join("cmdline")).unwrap_or_default()));
            seen.push('\n');
        }
        drop(stream);
        seen
    });
    let body = json!({"url": url, "path": scratch.join("clone")}).to_string();
    let (status, done) = guest.call(&guest.key, "POST", &format!("/v1/sandbox/{SANDBOX}/git/clone"), body).await?;
    assert!(status == 200 && done["exit_code"] != json!(0), "{done}");
    let arguments = watching.await?;
    assert!(arguments.contains("/x.git"), "git was not seen: {arguments}");
    assert!(!arguments.contains("s3cr3t"), "{arguments}");
    assert!(!done.to_string().contains("s3cr3t"), "{done}");
    Ok(())
}

async fn debian() -> Outcome {
    let options = Options {
        images: Some(host::built("images")),
        environment: [("STASIS_DEADLINES_BOOT_MS", "300000"), ("STASIS_DEADLINES_WAKE_MS", "60000")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .to_vec(),
    };
    let service = Service::start(options).await?;
    let body = json!({
        "template_name": "system/debian:bookworm", "memory": 512, "vcpu": 2, "timeout": 3600,
        "env_vars": {"FROM_SANDBOX": "yes"},
    });
    let id = service.call("POST", "/v1/sandbox", Some(body)).await?.expect(201)?.text("id");
    // Every kind of request wakes it.
    for (method, route, body) in [
        ("GET", "system/workdir", Value::Null),
        ("POST", "filesystem/mkdir", json!({"path": "/root/scratch"})),
        ("POST", "git/status", json!({"path": "/root/scratch"})),
    ] {
        service.pause(&id).await?.expect(201)?;
        let body = (!body.is_null()).then_some(body);
        let woken = service.call(method, &format!("/v1/sandbox/{id}/{route}"), body).await?.expect_success()?;
        eprintln!("{route}: {}", woken.timing);
    }
    drive("0.8.0", &service.url, &service.key, &id, "/root/scratch", true).await
}

/// Create, execute, files, a server, invoke over HTTPS, pause, invoke again, snapshot, clone, terminal, presigned URL, delete: by both clients.
async fn story() -> Outcome {
    const DOMAIN: &str = "sandbox.test";
    let certificates = tempfile::tempdir()?;
    let domain = Domain::parse(DOMAIN).ok_or("the domain")?;
    let made = Authority::prepare(certificates.path(), &domain, &Sources::system())?;
    let (cert, key) = (made.cert.display().to_string(), made.key.display().to_string());
    let mut options = Options { images: Some(host::built("images")), ..Options::default() };
    for (name, value) in [
        ("STASIS_DEADLINES_BOOT_MS", "300000"),
        ("STASIS_DEADLINES_WAKE_MS", "60000"),
        ("STASIS_DOMAIN", DOMAIN),
        ("STASIS_TLS_CERT", &cert),
        ("STASIS_TLS_KEY", &key),
        ("STASIS_TLS_PLAIN", "true"),
    ] {
        options.environment.push((name.to_owned(), value.to_owned()));
    }
    let service = Service::start(options).await?;
    let port = service.url.rsplit_once(':').map(|(_, port)| port).ok_or("the port")?;
    let (url, place, ca) =
        (format!("https://{DOMAIN}:{port}"), format!("{DOMAIN}:{port}"), made.ca.display().to_string());
    for version in CLIENTS {
        let environment = [
            ("LEAP0_BASE_URL", url.as_str()),
            ("LEAP0_API_KEY", service.key.as_str()),
            ("LEAP0_SANDBOX_DOMAIN", place.as_str()),
            ("SSL_CERT_FILE", ca.as_str()),
            ("TEMPLATE", "system/debian:bookworm"),
        ];
        script(version, "story.py", &environment).await?;
    }
    service.await_no_vmm().await
}
