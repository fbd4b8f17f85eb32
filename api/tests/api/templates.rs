//! Templates from container images over the API: from a layout on disk, and from a registry in this process.

use crate::support::{Answer, Place, Served, spec};
use axum::Router;
use axum::body::Body;
use axum::extract::{Path as At, State};
use axum::http::{HeaderMap, Request, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use serde_json::{Value, json};
use stasis_api::config::{Config, Isolation, IsolationConfig, Templates};
use stasis_api::dev::layout::{Entry, Layout, Packing, archive};
use stasis_api::sources::Sources;
use stasis_api::supervisor::Supervisor;
use stasis_snapshot::commit::HeadState;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const BOOT: &str = "test/boot";

/// A place whose second template has an agent and a disk, as far as anybody looks.
fn place() -> Place {
    let place = Place::new();
    let boot = place.path("images/templates/boot");
    std::fs::create_dir_all(&boot).unwrap();
    for file in ["kernel", "initramfs", "rootfs"] {
        std::fs::write(boot.join(file), file).unwrap();
    }
    let json = json!({
        "name": BOOT, "kernel": "kernel", "initramfs": "initramfs", "rootfs": "rootfs", "disk_mib": 1,
        "cmdline": "quiet", "ready": "agent",
    });
    std::fs::write(boot.join("template.json"), json.to_string()).unwrap();
    std::fs::create_dir(place.path("local")).unwrap();
    place
}

fn config(place: &Place) -> Config {
    let templates = Templates {
        local_dir: Some(place.path("local")),
        boot: BOOT.to_owned(),
        disk_mib: 64,
        image_mib: 32,
        per_tenant: 2,
        ..Templates::default()
    };
    Config { templates, ..place.config() }
}

async fn serve(config: Config) -> Served {
    Served::over(Supervisor::start(config).await.unwrap())
}

fn image(config: &Value) -> Layout {
    let first = archive(&[Entry::directory("app"), Entry::file("app/run", "#!/bin/sh\n").mode(0o755)]);
    let second = archive(&[Entry::file("app/data", "second layer")]);
    Layout::new(config, &[(Packing::Gzip, first), (Packing::Zstd, second)]).unwrap()
}

fn app() -> Layout {
    image(&json!({
        "Entrypoint": ["/app/run"], "Cmd": ["--now"], "User": "1000", "WorkingDir": "/app", "Env": ["MODE=prod"],
        "ExposedPorts": {"3000/tcp": {}},
    }))
}

async fn upload(served: &Served, name: &str, uri: &str) -> Answer {
    served.call("POST", "/v1/template", &json!({"name": name, "uri": uri}).to_string()).await
}

fn id(answer: &Answer) -> String {
    answer.body["id"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn an_image_becomes_a_template_and_stays_one() {
    let place = place();
    let layout = app();
    layout.write(&place.path("local/app"), "v1").unwrap();
    let served = serve(config(&place)).await;
    let made = upload(&served, "app", "oci:app:v1").await;
    assert_eq!(made.status, 201, "{}", made.body);
    let id = id(&made);
    assert!(id.starts_with("tpl-"));
    assert_eq!(made.body["digest"], layout.digest());
    let image_config = json!({
        "entrypoint": ["/app/run"], "cmd": ["--now"], "user": "1000", "working_dir": "/app", "env": {"MODE": "prod"},
    });
    assert_eq!(made.body["image_config"], image_config);
    assert_eq!((&made.body["name"], &made.body["is_system"]), (&json!("app"), &json!(false)));
    assert_eq!((&made.body["port"], &made.body["state"]), (&json!(3000), &json!("ready")));
    assert!(made.body["created_at"].as_str().unwrap().ends_with('Z'));
    // Nothing of its making is left, and kernel and initramfs are its own.
    assert_eq!(std::fs::read_dir(place.path("data/templates/.making")).unwrap().count(), 0);
    let dir = place.path("data/templates/dev").join(&id);
    assert_eq!(std::fs::read_to_string(dir.join("vmlinux")).unwrap(), "kernel");

    let list = served.get("/v1/template?query=app").await;
    assert_eq!((list.status, &list.body["total_items"], &list.body["items"][0]["id"]), (200, &json!(1), &json!(id)));
    let all = served.get("/v1/templates").await.body;
    let names: Vec<_> = all["items"].as_array().unwrap().iter().map(|item| item["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["test/bare", BOOT, "app"]);

    // What it is called changes nothing else, and survives a restart, as it does itself.
    let before = served.supervisor.core().templates.find("dev", "app", &served.supervisor.core().journal).unwrap();
    assert_eq!(before.port.map(std::num::NonZeroU16::get), Some(3000));
    let path = format!("/v1/template/{id}");
    assert_eq!(served.call("PATCH", &path, r#"{"name":"other"}"#).await.status, 204);
    served.supervisor.shutdown().await;
    std::fs::write(place.path("images/templates/boot/kernel"), "another kernel").unwrap();
    let served = serve(config(&place)).await;
    assert_eq!(served.get(&path).await.body["name"], "other");
    let core = served.supervisor.core();
    let after = core.templates.find("dev", "other", &core.journal).unwrap();
    assert_eq!((after.id(), after.digest), (id.clone(), before.digest.clone()));
    assert!(core.templates.by_digest(&before.digest, "app", &core.journal).unwrap().is_some());
    assert!(core.templates.find("someone", "other", &core.journal).is_err());

    assert_eq!(served.call("DELETE", &path, "").await.status, 204);
    assert_eq!(served.call("DELETE", &path, "").await.status, 404);
    assert!(!dir.exists());
    assert!(core.templates.by_digest(&before.digest, "app", &core.journal).unwrap().is_none());
}

#[tokio::test]
async fn what_cannot_be_a_template_says_why() {
    let place = place();
    app().write(&place.path("local/app"), "v1").unwrap();
    let first = (Packing::Gzip, archive(&[Entry::file("a", "x")]));
    let escape = (Packing::Gzip, archive(&[Entry::file("../../etc/passwd", "x")]));
    let bad = Layout::new(&json!({}), &[first, escape]).unwrap();
    bad.write(&place.path("local/bad"), "v1").unwrap();
    let served = serve(config(&place)).await;

    for (name, uri, field) in
        [("system/x", "oci:app", "name"), ("a b", "oci:app", "name"), ("x", "oci:../app", "uri"), ("x", "", "uri")]
    {
        let refused = upload(&served, name, uri).await;
        assert_eq!((refused.status, &refused.body["errors"][0]["field"]), (400, &json!(field)), "{}", refused.body);
    }
    let failed = upload(&served, "bad", "oci:bad").await;
    let message = failed.body["message"].as_str().unwrap();
    assert_eq!(failed.status, 400);
    assert!(message.contains("layer 2 of 2") && message.contains("../../etc/passwd"), "{message}");
    // It stays in the list until somebody does something about it.
    let listed = served.get("/v1/template?query=bad").await.body["items"][0].clone();
    assert_eq!((&listed["state"], listed["reason"].as_str()), (&json!("failed"), Some(message)));
    assert!(
        served.call("POST", "/v1/sandbox", r#"{"template_name":"bad"}"#).await.body["errors"][0]["error"].is_string()
    );
    let path = format!("/v1/template/{}", listed["id"].as_str().unwrap());
    assert_eq!(served.call("PATCH", &path, r#"{"name":"good"}"#).await.status, 409);
    assert_eq!(served.call("DELETE", &path, "").await.status, 204);
    assert_eq!(served.get(&path).await.status, 404);
    assert_eq!(std::fs::read_dir(place.path("data/templates/.making")).unwrap().count(), 0);

    for uri in ["oci:none", "docker-archive:app", "evil.example/x", "127.0.0.1:1/x"] {
        let refused = upload(&served, "x", uri).await;
        assert_eq!(refused.status, 400, "{uri}: {}", refused.body);
    }
    for method in ["GET", "PATCH", "DELETE"] {
        assert_eq!(served.call(method, "/v1/template/tpl-none", r#"{"name":"x"}"#).await.status, 404, "{method}");
    }
    let bare = served.get("/v1/template?query=bare").await.body["items"][0]["id"].as_str().unwrap().to_owned();
    for method in ["PATCH", "DELETE"] {
        assert_eq!(
            served.call(method, &format!("/v1/template/{bare}"), r#"{"name":"x"}"#).await.status,
            409,
            "{method}"
        );
    }
}

/// The unpacker whose disk is below `place`, and its user.
fn unpacker_below(place: &Place) -> Option<(rustix::process::Pid, u32)> {
    let making = std::fs::canonicalize(place.path("data/templates/.making")).ok()?;
    std::fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
        let number = entry.file_name().to_str()?.parse().ok()?;
        let name = std::fs::read_to_string(entry.path().join("comm")).ok()?;
        let mut open = std::fs::read_dir(entry.path().join("fd")).ok()?.flatten();
        let ours = open.any(|fd| std::fs::read_link(fd.path()).is_ok_and(|path| path.starts_with(&making)));
        let status = std::fs::read_to_string(entry.path().join("status")).ok()?;
        let user =
            status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().next()?.parse().ok()?;
        (name.trim() == "stasis-unpack" && ours).then_some((rustix::process::Pid::from_raw(number)?, user))
    })
}

#[tokio::test]
async fn an_unpacker_that_is_killed_fails_its_template_and_leaves_nothing() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("left out: only root sees what another process has open");
        return;
    }
    // Once as our own child, and once behind a warden's walls.
    for mode in [Isolation::Off, Isolation::Available] {
        let place = place();
        app().write(&place.path("local/app"), "v1").unwrap();
        // The same layer again and again, so that there is time.
        let layer = (Packing::Plain, archive(&[Entry::file("large", vec![7; 4 << 20])]));
        Layout::new(&json!({}), &vec![layer; 60]).unwrap().write(&place.path("local/long"), "v1").unwrap();
        let mut config = config(&place);
        config.isolation = IsolationConfig { mode, warden: None };
        (config.templates.image_mib, config.templates.disk_mib) = (4096, 4096);
        let served = serve(config).await;
        let killed = async {
            loop {
                if let Some((pid, user)) = unpacker_below(&place) {
                    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
                    return (pid, user);
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        let (failed, (pid, user)) = tokio::join!(upload(&served, "long", "oci:long:v1"), killed);
        assert_eq!(failed.status, 500, "{}", failed.body);
        let message = failed.body["message"].as_str().unwrap();
        assert!(message.contains("oci:long:v1") && message.contains("it was killed"), "{message}");
        assert_eq!(std::fs::read_dir(place.path("data/templates/.making")).unwrap().count(), 0);
        assert!(unpacker_below(&place).is_none());
        let jailed = stasis_warden::jail::Users::default().of(pid.as_raw_nonzero().get());
        assert_eq!(user, if mode == Isolation::Off { 0 } else { jailed });
        // The next one is not disturbed.
        assert_eq!(upload(&served, "app", "oci:app:v1").await.status, 201);
        served.supervisor.shutdown().await;
    }
}

#[tokio::test]
async fn names_and_numbers_of_templates_are_limited() {
    let place = place();
    app().write(&place.path("local/app"), "v1").unwrap();
    let served = serve(config(&place)).await;
    // Two at once want one name.
    let (one, other) = tokio::join!(upload(&served, "app", "oci:app"), upload(&served, "app", "oci:app"));
    let mut both = [one.status, other.status];
    both.sort_unstable();
    assert_eq!(both, [201, 409]);
    assert_eq!(upload(&served, BOOT, "oci:app").await.status, 409);
    assert_eq!(upload(&served, "second", "oci:app").await.status, 201);
    let over = upload(&served, "third", "oci:app").await;
    assert_eq!(over.status, 409);
    assert!(over.body["message"].as_str().unwrap().contains("limit"), "{}", over.body);
    assert_eq!(over.headers["retry-after"], "60");
    let id = served.get("/v1/template?query=second").await.body["items"][0]["id"].as_str().unwrap().to_owned();
    assert_eq!(served.call("PATCH", &format!("/v1/template/{id}"), r#"{"name":"app"}"#).await.status, 409);
}

#[tokio::test]
async fn a_host_has_room_for_so_many_templates_of_all_together() {
    let place = place();
    app().write(&place.path("local/app"), "v1").unwrap();
    let mut config = config(&place);
    config.templates.per_host = 1;
    let served = serve(config).await;
    assert_eq!(upload(&served, "app", "oci:app").await.status, 201);
    let (_, other) = served.supervisor.core().journal.create_key("other", "", &Sources::system()).unwrap();
    let body = Body::from(json!({"name": "theirs", "uri": "oci:app"}).to_string());
    let request = Request::post("/v1/template").header("authorization", other).body(body).unwrap();
    let full = served.send(request).await;
    assert_eq!((full.status, &full.headers["retry-after"]), (503, &"60".parse().unwrap()), "{}", full.body);
    assert!(!full.body.to_string().contains("app"), "{}", full.body);
}

#[tokio::test]
async fn a_template_that_a_sandbox_sleeps_on_is_not_deleted() {
    let place = place();
    app().write(&place.path("local/app"), "v1").unwrap();
    let served = serve(config(&place)).await;
    let id = id(&upload(&served, "app", "oci:app").await);
    let core = served.supervisor.core();
    let template = core.templates.find("dev", "app", &core.journal).unwrap();
    let spec = stasis_api::record::Spec { rootfs_digest: template.rootfs_digest, ..spec() };
    let sandbox = "sbx-sleeps0000000000000a";
    crate::support::write_head_of(&place.path("store"), sandbox, "host-other", HeadState::Paused, &spec).await;
    assert_eq!(served.call("POST", "/v1/recover", "{}").await.body["items"][0]["outcome"], "recovered");
    let path = format!("/v1/template/{id}");
    let refused = served.call("DELETE", &path, "").await;
    assert_eq!(refused.status, 409);
    assert!(refused.body["message"].as_str().unwrap().contains(sandbox), "{}", refused.body);
    assert_eq!(served.get(&path).await.body["state"], "ready");
    assert_eq!(served.call("DELETE", &format!("/v1/sandbox/{sandbox}"), "").await.status, 204);
    assert_eq!(served.call("DELETE", &path, "").await.status, 204);
}

#[tokio::test]
async fn what_a_killed_supervisor_left_is_swept() {
    let place = place();
    app().write(&place.path("local/app"), "v1").unwrap();
    let served = serve(config(&place)).await;
    let id = id(&upload(&served, "app", "oci:app").await);
    served.supervisor.shutdown().await;
    let root = place.path("data/templates");
    // Killed in a build, and between withdrawing a template and deleting it.
    std::fs::create_dir_all(root.join(".making/tpl-half/work")).unwrap();
    std::fs::write(root.join(".making/tpl-half/work/content"), "x").unwrap();
    std::fs::rename(root.join("dev").join(&id), root.join("dev").join(format!("{id}.withdrawn"))).unwrap();
    let served = serve(config(&place)).await;
    assert!(!root.join(".making/tpl-half").exists());
    assert_eq!(served.get(&format!("/v1/template/{id}")).await.body["state"], "ready");
    assert_eq!(served.get("/v1/templates").await.body["total_items"], 3);
    assert_eq!(served.call("DELETE", &format!("/v1/template/{id}"), "").await.status, 204);
    served.supervisor.shutdown().await;
    assert_eq!(std::fs::read_dir(root.join(".boot")).unwrap().count(), 2);
    serve(config(&place)).await;
    assert_eq!(std::fs::read_dir(root.join(".boot")).unwrap().count(), 0);
}

/// Who may pull from the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guard {
    Everybody,
    /// User and password with each request.
    Basic,
    /// A token, which user and password get.
    Bearer,
}

#[derive(Clone)]
struct Registry {
    guard: Guard,
    addr: SocketAddr,
    layout: Arc<Layout>,
    /// A blob to damage.
    spoil: Option<String>,
    seen: Arc<Mutex<Vec<String>>>,
}

/// `stranger:hush`
const BASIC: &str = "Basic c3RyYW5nZXI6aHVzaA==";

/// What the registry gives for a password.
fn token(headers: &HeaderMap) -> Response {
    if headers.get(header::AUTHORIZATION).is_some_and(|value| value == BASIC) {
        return json!({"token": "opened", "expires_in": 300}).to_string().into_response();
    }
    StatusCode::UNAUTHORIZED.into_response()
}

impl Registry {
    async fn start(guard: Guard, layout: Layout, spoil: Option<String>) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let registry = Self { guard, addr, layout: Arc::new(layout), spoil, seen: Arc::default() };
        let app = Router::new()
            .route("/v2/", get(|State(this): State<Registry>, headers: HeaderMap| async move { this.answer(&headers, "", "") }))
            .route("/token", get(|headers: HeaderMap| async move { token(&headers) }))
            .route(
                "/v2/team/app/{kind}/{name}",
                get(|State(this): State<Registry>, At((kind, name)): At<(String, String)>, headers: HeaderMap| async move {
                    this.answer(&headers, &kind, &name)
                }),
            )
            .with_state(registry.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
        registry
    }

    fn answer(&self, headers: &HeaderMap, kind: &str, name: &str) -> Response {
        let authorization = headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok()).unwrap_or_default();
        self.seen.lock().unwrap().push(format!("{kind} {authorization}"));
        let (open, challenge) = match self.guard {
            Guard::Everybody => (true, String::new()),
            Guard::Basic => (authorization == BASIC, "Basic realm=\"registry\"".to_owned()),
            Guard::Bearer => (
                authorization == "Bearer opened",
                format!("Bearer realm=\"http://{}/token\",service=\"registry\"", self.addr),
            ),
        };
        if !open {
            return (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, challenge)]).into_response();
        }
        match kind {
            "" => StatusCode::OK.into_response(),
            "manifests" if name == "v1" || name == self.layout.digest() => {
                let kind = "application/vnd.oci.image.manifest.v1+json";
                ([(header::CONTENT_TYPE, kind)], self.layout.manifest.clone()).into_response()
            }
            "blobs" => match self.layout.blobs.get(name) {
                Some(_) if self.spoil.as_deref() == Some(name) => vec![7_u8; 10].into_response(),
                Some(blob) => blob.clone().into_response(),
                None => StatusCode::NOT_FOUND.into_response(),
            },
            _ => StatusCode::NOT_FOUND.into_response(),
        }
    }

    fn uri(&self, rest: &str) -> String {
        format!("{}/team/app{rest}", self.addr)
    }

    fn config(&self, place: &Place) -> Config {
        let mut config = config(place);
        config.templates.registries = vec![self.addr.to_string()];
        config.templates.plain_http = vec![self.addr.to_string()];
        config
    }
}

#[tokio::test]
async fn images_are_pulled_with_and_without_credentials() {
    let place = place();
    for guard in [Guard::Everybody, Guard::Basic, Guard::Bearer] {
        let registry = Registry::start(guard, app(), None).await;
        let served = serve(registry.config(&place)).await;
        let ask = async |credentials: Value, rest: &str| {
            let mut body = json!({"name": "app", "uri": registry.uri(rest)});
            if !credentials.is_null() {
                body["credentials"] = credentials;
            }
            served.call("POST", "/v1/template/", &body.to_string()).await
        };
        let basic = |password: &str| json!({"type": "basic", "username": "stranger", "password": password});
        if guard != Guard::Everybody {
            for credentials in [Value::Null, basic("wrong")] {
                let refused = ask(credentials, ":v1").await;
                assert_eq!(refused.status, 400, "{guard:?}: {}", refused.body);
                assert!(!refused.body.to_string().contains("hush"));
            }
        }
        let credentials = if guard == Guard::Everybody { Value::Null } else { basic("hush") };
        for rest in [":v1".to_owned(), format!("@{}", registry.layout.digest())] {
            let made = ask(credentials.clone(), &rest).await;
            assert_eq!(made.status, 201, "{guard:?} {rest}: {}", made.body);
            assert_eq!(made.body["digest"], registry.layout.digest());
            assert_eq!(served.call("DELETE", &format!("/v1/template/{}", id(&made)), "").await.status, 204);
        }
        let missing = ask(credentials, ":v2").await;
        assert_eq!(missing.status, 400, "{guard:?}: {}", missing.body);
        let seen = registry.seen.lock().unwrap().clone();
        assert!(seen.iter().any(|line| line.starts_with("blobs")));
        served.supervisor.shutdown().await;
    }
}

#[tokio::test]
async fn a_registry_that_lies_or_is_gone_is_told_from_a_bad_request() {
    let place = place();
    let layout = app();
    let layer = layout.blobs.iter().find(|(_, blob)| blob.starts_with(&[0x1f, 0x8b])).unwrap().0.clone();
    let registry = Registry::start(Guard::Everybody, layout, Some(layer.clone())).await;
    let mut config = registry.config(&place);
    config.templates.registries.push("127.0.0.1:1".to_owned());
    config.templates.plain_http.push("127.0.0.1:1".to_owned());
    let served = serve(config).await;
    let lied = upload(&served, "app", &registry.uri(":v1")).await;
    let message = lied.body["message"].as_str().unwrap();
    assert!((400..=502).contains(&lied.status) && message.contains(&layer), "{} {message}", lied.status);
    let gone = tokio::time::timeout(Duration::from_mins(2), upload(&served, "app", "127.0.0.1:1/x")).await.unwrap();
    assert_eq!(gone.status, 502, "{}", gone.body);
}

/// Amazon's API: gives the registry's password for one key.
async fn amazon() -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let seen: Arc<Mutex<Vec<String>>> = Arc::default();
    let noted = seen.clone();
    let answer = move |headers: HeaderMap, body: String| async move {
        let header = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
        noted.lock().unwrap().push(format!("{headers:?} {body}"));
        let signed = "SignedHeaders=content-type;host;x-amz-date;x-amz-target, Signature=";
        assert!(header("authorization").contains(signed), "{}", header("authorization"));
        assert_eq!(header("x-amz-target"), "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken");
        if header("authorization").contains("Credential=AKIDGOOD/") {
            // `stranger:hush`
            let token = json!({"authorizationToken": "c3RyYW5nZXI6aHVzaA==", "proxyEndpoint": "https://x"});
            json!({"authorizationData": [token]}).to_string().into_response()
        } else {
            let refusal = json!({"__type": "UnrecognizedClientException", "message": "AKIDBAD is not known"});
            (StatusCode::BAD_REQUEST, refusal.to_string()).into_response()
        }
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let app = Router::new().route("/", axum::routing::post(answer));
    tokio::spawn(async move { axum::serve(listener, app).await });
    (addr, seen)
}

#[tokio::test]
async fn a_key_of_amazons_opens_its_registry() {
    let place = place();
    let registry = Registry::start(Guard::Basic, app(), None).await;
    let (amazon, seen) = amazon().await;
    let mut config = registry.config(&place);
    config.templates.ecr_endpoint = Some(format!("http://{amazon}/"));
    let served = serve(config).await;
    let ask = async |key: &str, region: Value| {
        let credentials = json!({
            "type": "aws", "aws_access_key_id": key, "aws_secret_access_key": "the-secret", "aws_region": region,
        });
        let body = json!({"name": "app", "uri": registry.uri(":v1"), "credentials": credentials});
        served.call("POST", "/v1/template", &body.to_string()).await
    };
    let unsaid = ask("AKIDGOOD", Value::Null).await;
    assert_eq!((unsaid.status, &unsaid.body["errors"][0]["field"]), (400, &json!("credentials.aws_region")));
    let refused = ask("AKIDBAD", json!("eu-west-1")).await;
    let message = refused.body["message"].as_str().unwrap();
    assert_eq!(refused.status, 400, "{message}");
    assert!(message.contains("UnrecognizedClientException") && !message.contains("AKIDBAD"), "{message}");
    let made = ask("AKIDGOOD", json!("eu-west-1")).await;
    assert_eq!(made.status, 201, "{}", made.body);
    let asked = seen.lock().unwrap().clone();
    assert_eq!(asked.len(), 2, "once for each pull");
    assert!(asked.iter().all(|one| one.contains("/eu-west-1/ecr/aws4_request") && !one.contains("the-secret")));
    assert!(registry.seen.lock().unwrap().iter().all(|line| !line.contains("AKID")), "the key is for Amazon alone");
}
