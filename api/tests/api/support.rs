//! A supervisor over a directory store, whose VMM program is a script that fails: everything that needs no guest can be asked.

use axum::body::Body;
use axum::http::{HeaderMap, Request, Response};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use serde_json::Value;
use stasis_api::config::{
    Config, Deadlines, Gc, Invoke, Isolation, IsolationConfig, Limits, Network, RunAhead, Seal, StoreConfig, Telemetry,
    Templates, Tls, Warm,
};
use stasis_api::error::Error;
use stasis_api::record::Spec;
use stasis_api::sources::Sources;
use stasis_api::supervisor::Supervisor;
use stasis_snapshot::commit::{Attempt, Backoff, Change, HeadState, ObjectHead, Outcome, Register, Sent};
use stasis_snapshot::ids::{CommitId, Digest};
use stasis_snapshot::layout::Owner;
use stasis_snapshot::manifest::ManifestRef;
use stasis_snapshot::store::directory::DirectoryStore;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tower::ServiceExt as _;

pub(crate) struct Place {
    pub(crate) dir: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let vmm = dir.path().join("vmm");
        std::fs::write(&vmm, "#!/bin/sh\necho this vmm cannot run >&2\nexit 1\n").unwrap();
        std::fs::set_permissions(&vmm, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let template = dir.path().join("images/templates/bare");
        std::fs::create_dir_all(&template).unwrap();
        std::fs::write(template.join("kernel"), "elf").unwrap();
        let json =
            r#"{"name":"test/bare","kernel":"kernel","cmdline":"","ready":{"serial":"R\n"},"min_memory_mib":64}"#;
        std::fs::write(template.join("template.json"), json).unwrap();
        Self { dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn config(&self) -> Config {
        Config {
            listen: "127.0.0.1:0".parse().unwrap(),
            data_dir: self.path("data"),
            images_dir: self.path("images"),
            vmm: Some(self.path("vmm")),
            store: StoreConfig::Directory { path: self.path("store") },
            limits: Limits { body_bytes: 64 << 10, sandboxes: 2, ..Limits::default() },
            deadlines: Deadlines { commit_ms: 1000, settle_ms: 2000, store_ms: 2000, ..Deadlines::default() },
            // The VMM here is a script that fails.
            warm: Warm { vmm_pool: 0, ..Warm::default() },
            gc: Gc::default(),
            run_ahead: RunAhead::default(),
            invoke: Invoke::default(),
            tls: Tls::default(),
            templates: Templates::default(),
            seal: Seal::default(),
            network: Network::default(),
            isolation: IsolationConfig { mode: Isolation::Off, warden: None },
            telemetry: Telemetry::default(),
        }
    }

    pub(crate) async fn start(&self) -> Served {
        Served::over(Supervisor::start(self.config()).await.unwrap())
    }
}

pub(crate) struct Served {
    pub(crate) supervisor: Supervisor,
    pub(crate) key: String,
}

/// An answer, read whole.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Value,
}

impl Served {
    pub(crate) fn over(supervisor: Supervisor) -> Self {
        let (_, key) = supervisor.core().journal.create_key("dev", "", &Sources::system()).unwrap();
        Self { supervisor, key }
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Answer {
        let app = stasis_api::routes::router(self.supervisor.core().clone());
        let response: Response<Body> = app.oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes: Bytes = body.collect().await.unwrap().to_bytes();
        let is_json = parts.headers.get("content-type").is_some_and(|kind| kind == "application/json");
        let body = if is_json { serde_json::from_slice(&bytes).unwrap() } else { Value::Null };
        Answer { status: parts.status.as_u16(), headers: parts.headers, body }
    }

    pub(crate) async fn call(&self, method: &str, path: &str, body: &str) -> Answer {
        let request =
            Request::builder().method(method).uri(path).header("authorization", format!("Bearer {}", self.key));
        self.send(request.body(Body::from(body.to_owned())).unwrap()).await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.call("GET", path, "").await
    }
}

pub(crate) fn spec() -> Spec {
    Spec {
        template_name: "test/bare".to_owned(),
        template_id: "tpl-0".to_owned(),
        template_digest: "0".repeat(64),
        rootfs_digest: None,
        agent: false,
        vcpu: 1,
        memory_mib: 64,
        disk_mib: 0,
        timeout_s: 300,
        auto_pause: false,
        env_vars: std::collections::BTreeMap::new(),
        port: None,
        network_policy: None,
        network: false,
        authority: None,
        snapshot: None,
        created_at: 1000,
    }
}

/// Writes the head of a sandbox as another supervisor would have: created by `owner`, and paused with a manifest that is not there.
pub(crate) async fn write_head(store: &Path, id: &str, owner: &str, state: HeadState) {
    write_head_of(store, id, owner, state, &spec()).await;
}

/// The same of a sandbox that was made as `spec`.
pub(crate) async fn write_head_of(store: &Path, id: &str, owner: &str, state: HeadState, spec: &Spec) {
    std::fs::create_dir_all(store).unwrap();
    let objects = Arc::new(DirectoryStore::open(store).unwrap());
    let place = Owner::sandbox("dev", id).unwrap();
    let register = Register::new(ObjectHead::new(objects, place.head()));
    let record = serde_json::json!({ "version": 1, "body": { "state": "paused", "spec": spec } });
    let mut pacer = Backoff::within(Duration::from_secs(5));
    let change = |state, manifest| Change { state, manifest, record: record.clone() };
    let ids = [CommitId([1; 16]), CommitId([2; 16]), CommitId([3; 16])];
    let first = Attempt::first(id, owner, change(HeadState::Live, None), ids[0]).unwrap();
    let Outcome::Committed { now } = register.commit(&first, Sent::Never, &mut pacer).await else {
        panic!("first head")
    };
    let manifest = ManifestRef { key: place.generation(2, 1, ids[1]).manifest(), digest: Digest::of(b"nothing") };
    let paused = Attempt::next(&now, change(HeadState::Paused, Some(manifest)), ids[1]).unwrap();
    let Outcome::Committed { now } = register.commit(&paused, Sent::Never, &mut pacer).await else {
        panic!("paused head")
    };
    let last = match state {
        HeadState::Paused => return,
        HeadState::Live => Attempt::claim(&now, owner, ids[2]).unwrap(),
        HeadState::Deleted => Attempt::delete(&now, ids[2]).unwrap(),
        HeadState::Stopped => panic!("not needed"),
    };
    let Outcome::Committed { .. } = register.commit(&last, Sent::Never, &mut pacer).await else { panic!("last head") };
}

pub(crate) async fn start_error(config: Config) -> Error {
    match Supervisor::start(config).await {
        Err(error) => error,
        Ok(_) => panic!("it started"),
    }
}
