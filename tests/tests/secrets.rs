//! Keys, tokens and passwords are in no log, whatever is logged, and on no disk but where they must be: of API keys and tokens, journal and
//! bucket have hashes.

use std::path::{Path, PathBuf};

use serde_json::json;
use stasis_tests::service::{Options, Service};
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::{Error, no_pulse};

const IN_ENVIRONMENT: &str = "value-Quai6ohGh2eiC3ae";
const PASSWORD: &str = "git-oongoh7Ahx5eitoh";
const IN_URL: &str = "url-Ahshie2aiPh5ahTh";
const HEADER: &str = "header-eiX4ohchoo6fieNu";
const COMMAND: &str = "command-ooGh4aeTee3Ie";
const STORE_SECRET: &str = "test-secret";

fn main() {
    Suite::default().test("secrets_are_in_no_log_and_on_no_disk", no_pulse(), secrets).main();
}

/// Every file below `dir`.
fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => files(&entry.path(), found),
            Ok(kind) if kind.is_file() => found.push(entry.path()),
            _ => {}
        }
    }
}

/// Files below `dir` that hold `secret`.
fn holding(dir: &Path, secret: &str) -> Vec<PathBuf> {
    let mut all = Vec::new();
    files(dir, &mut all);
    let holds = |path: &PathBuf| {
        let bytes = std::fs::read(path).unwrap_or_default();
        bytes.windows(secret.len()).any(|window| window == secret.as_bytes())
    };
    all.into_iter().filter(holds).collect()
}

/// Uses every secret, well and badly.
async fn use_secrets(service: &Service) -> Result<(String, String), Error> {
    let body = json!({
        "template_name": "test/pulse", "memory": 32, "env_vars": {"SECRET": IN_ENVIRONMENT},
        "network_policy": {"mode": "custom", "transforms": [
            {"domain": "api.example.com", "inject_headers": {"authorization": HEADER}}
        ]},
    });
    let id = service.call("POST", "/v1/sandbox", Some(body.clone())).await?.expect(201)?.text("id");
    // Refused, and so perhaps said in a message.
    let mut wrong = body;
    wrong["vcpu"] = json!(99);
    wrong["env_vars"]["X=Y"] = json!(IN_ENVIRONMENT);
    service.call("POST", "/v1/sandbox", Some(wrong)).await?.expect(400)?;
    let at = |rest: &str| format!("/v1/sandbox/{id}/{rest}");
    for (rest, body) in [
        (
            "git/clone",
            json!({"url": format!("https://ann:{IN_URL}@git.example.com/r.git"), "path": "/r", "password": PASSWORD}),
        ),
        (
            "git/clone",
            json!({"url": format!("https://ann:{IN_URL}@git.example.com/r.git"), "path": "", "password": PASSWORD}),
        ),
        ("git/push", json!({"path": "/r", "username": "ann", "password": PASSWORD})),
        ("git/pull", json!({"path": "/r", "remote": format!("https://ann:{IN_URL}@git.example.com/r.git")})),
        ("process/execute", json!({"command": format!("echo {COMMAND}"), "envs": {"SECRET": IN_ENVIRONMENT}})),
        ("pty", json!({"envs": {"SECRET": IN_ENVIRONMENT}})),
        ("filesystem/write-file?path=/x", json!(COMMAND)),
    ] {
        let answer = service.call("POST", &at(rest), Some(body)).await?;
        assert!([400, 409].contains(&answer.status), "{rest}: {answer:?}");
    }
    let token =
        service.call("POST", &at("presigned-url"), Some(json!({"port": 8000}))).await?.expect(201)?.text("token");
    service.pause(&id).await?.expect(201)?;
    // By the token, and by the key where the app is: both wake it. Nothing listens in a guest without an agent.
    let http = reqwest::Client::new();
    for (label, key) in
        [(token.clone(), ""), (format!("{id}-8000"), service.key.as_str()), (id.clone(), service.key.as_str())]
    {
        let request = http
            .get(format!("{}/path?with={COMMAND}", service.url))
            .header("host", format!("{label}.sandbox.localhost"));
        let answer = if key.is_empty() { request } else { request.header("leap0-authorization", key) }.send().await?;
        assert!(answer.status().is_server_error() || answer.status().is_client_error(), "{label}");
    }
    // A key that is almost one.
    service.call_as(&format!("{}x", service.key), "GET", "/v1/sandboxes", None).await?.expect(401)?;
    service.call("POST", &at("snapshot/create"), Some(json!({"name": "kept"}))).await?;
    service
        .call("POST", "/v1/snapshot/restore", Some(json!({"snapshot_name": "kept", "env_vars": {"S": IN_ENVIRONMENT}})))
        .await?;
    for (method, rest) in [("GET", "inspect"), ("POST", "pause"), ("POST", "resume"), ("POST", "pause")] {
        service.call(method, &at(rest), None).await?;
    }
    service.call("GET", "/metrics", None).await?.expect(200)?;
    Ok((id, token))
}

async fn secrets() -> Outcome {
    let mut options = Options::default();
    // Everything that is ever logged, by the libraries, too.
    let log = [("STASIS_LOG", "trace"), ("STASIS_LOG_JSON", "1"), ("STASIS_VMM_LOG", "trace")];
    options.environment.extend(log.map(|(name, value)| (name.to_owned(), value.to_owned())));
    let service = Service::start(options).await?;
    let (id, token) = use_secrets(&service).await?;
    // While the VMM of a sandbox runs, its log is there, too.
    service.resume(&id).await?.expect(200)?;

    let log = service.log();
    let lines: Vec<&str> = log.lines().collect();
    assert!(
        lines.len() > 200 && log.contains("\"TRACE\""),
        "the log is not as full as it should be: {} lines",
        lines.len()
    );
    assert!(lines.iter().all(|line| !line.starts_with('{') || serde_json::from_str::<serde_json::Value>(line).is_ok()));
    let vmm_log = std::fs::read_to_string(service.run_dir(&id).join("vmm.log"))?;
    assert!(!vmm_log.is_empty(), "the VMM logs nothing");

    let key = service.key.as_str();
    for (what, secret) in [
        ("the API key", key),
        ("the token of a presigned URL", &token),
        ("a password for git", PASSWORD),
        ("a password in a URL for git", IN_URL),
        ("a command", COMMAND),
        ("the store's secret key", STORE_SECRET),
    ] {
        assert!(secret.len() > 10);
        let holding = holding(service.dir.path(), secret);
        assert!(holding.is_empty(), "{what} is in {holding:?}: {:?}", lines.iter().find(|line| line.contains(secret)));
    }
    // What a sandbox is made with is in its record: in the journal, and in the bucket with its head and its manifests. Nowhere else. Values of
    // headers are in the journal alone.
    for (what, secret, in_the_bucket) in [("a variable", IN_ENVIRONMENT, true), ("a header", HEADER, false)] {
        let holding = holding(service.dir.path(), secret);
        let may = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("journal.db") || (in_the_bucket && path.starts_with(service.dir.path().join("s3")))
        };
        let may_not: Vec<_> = holding.iter().filter(|path| !may(path)).collect();
        assert!(!holding.is_empty() && may_not.is_empty(), "{what} is in {may_not:?}");
    }
    // A grant is good for whoever has its URL.
    for (name, log) in [("supervisor", &log), ("VMM", &vmm_log)] {
        let line = log.lines().find(|line| line.contains("X-Amz-Signature=") || line.contains("Signature="));
        assert!(line.is_none(), "the log of the {name} has a grant: {line:?}");
    }
    Ok(())
}
