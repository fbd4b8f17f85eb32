//! A whole service: an S3 server on loopback, a proxy in front of it that can break things on the wire, `stasis serve` as a process, and a
//! client. The supervisor is a process of its own so that tests can kill it.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, pidfd_send_signal};
use serde_json::{Value, json};
use stasis_api::dev::{EmbeddedS3, FaultProxy};
use stasis_api::journal::Journal;
use stasis_api::supervisor::JOURNAL;
use stasis_api::vmm_process::find_under;
use stasis_snapshot::store::ObjectStore;
use stasis_snapshot::store::directory::DirectoryStore;
use stasis_snapshot::store::s3::{S3Settings, S3Store};
use stasis_vmm::control::CONSOLE_LOG;
use stasis_vmm::control::client::Client;
use stasis_warden::jail::start::{ProcessNote, find};

use crate::host;
use crate::ports::Port;
use crate::vmm::{Error, pulse, until};

const BUCKET: &str = "sandboxes";
const ACCESS_KEY: &str = "test-access";
const SECRET_KEY: &str = "test-secret";
/// How long a supervisor may take to start, or a sandbox to change its state. It bounds a hang: the machine may be busy.
const PATIENCE: Duration = Duration::from_mins(2);

/// What a service is started with.
#[derive(Clone)]
pub struct Options {
    /// Directory with `templates/`; the small pulse templates of [`small_images`] when absent.
    pub images: Option<PathBuf>,
    /// More environment of the supervisor: its configuration (`STASIS_…`).
    pub environment: Vec<(String, String)>,
}

impl Default for Options {
    fn default() -> Self {
        // A test that waits for one of these sets a shorter one; for the others they bound a hang.
        // What happens by itself in the background would take the faults that are meant for a request.
        let environment = [
            ("STASIS_DEADLINES_STORE_MS", "20000"),
            ("STASIS_DEADLINES_CAPTURE_MS", "60000"),
            ("STASIS_GOLDEN", "off"),
            ("STASIS_RUN_AHEAD", "off"),
            // Tests wait by asking.
            ("STASIS_LIMITS_REQUESTS_PER_MINUTE", "0"),
        ];
        Self { images: None, environment: environment.map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec() }
    }
}

/// Where a service's sandboxes sleep, and by which way it gets there.
#[derive(Clone, Debug, Default)]
pub enum Sleep {
    /// In the embedded S3 server, behind the proxy.
    #[default]
    Proxied,
    /// In the embedded S3 server, without a proxy in between, which would cost as much as the server.
    Direct,
    /// In a directory store.
    Directory,
    /// In a bucket elsewhere.
    Bucket(S3Settings),
}

/// A running service. Everything of it ends when it is dropped.
pub struct Service {
    /// The proxy between the supervisor (and its VMMs) and the S3 server.
    pub proxy: FaultProxy,
    /// `http://…` of the API.
    pub url: String,
    /// An API key of the tenant `test`.
    pub key: String,
    /// Everything on disk.
    pub dir: tempfile::TempDir,
    options: Options,
    /// The embedded S3 server.
    pub s3: EmbeddedS3,
    sleep: Sleep,
    port: Port,
    supervisor: Child,
    http: reqwest::Client,
}

/// Another supervisor over the same bucket, with a data directory of its own. It and its VMMs end when it is dropped.
pub struct Second {
    /// `http://…` of its API.
    pub url: String,
    data: PathBuf,
    supervisor: Child,
    _port: Port,
}

impl Second {
    /// Process ids of VMMs that hold a sandbox of it.
    pub fn vmm_pids(&self) -> Vec<u32> {
        vmms(&self.data.join("run"), |name| !name.starts_with("pool-"))
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        let _ = self.supervisor.kill();
        let _ = self.supervisor.wait();
        end_processes(&self.data);
    }
}

/// What a program said.
#[derive(Debug)]
pub struct Ran {
    /// Exit code.
    pub code: i32,
    /// What it wrote to stdout, as JSON; null when it is none.
    pub json: Value,
    /// What it wrote to stderr.
    pub stderr: String,
}

/// An answer of the API.
#[derive(Debug)]
pub struct Reply {
    /// HTTP status.
    pub status: u16,
    /// Body, null when it is empty or no JSON.
    pub json: Value,
    /// The `Server-Timing` header.
    pub timing: String,
    /// The `Retry-After` header, seconds.
    pub retry_after: Option<u64>,
}

impl Reply {
    /// This reply, or an error when it has another status.
    pub fn expect(self, status: u16) -> Result<Self, Error> {
        if self.status == status { Ok(self) } else { Err(format!("expected {status}, got {self:?}").into()) }
    }

    /// This reply, or an error when it is no success.
    pub fn expect_success(self) -> Result<Self, Error> {
        if (200..300).contains(&self.status) { Ok(self) } else { Err(format!("expected success, got {self:?}").into()) }
    }

    /// A string field, empty when it is not there.
    pub fn text(&self, field: &str) -> String {
        self.json[field].as_str().unwrap_or_default().to_owned()
    }
}

/// Writes a template of a small pulse guest: `test/pulse`, 8 MiB filled and 1 MiB hot in as little as 32 MiB, counting its port accesses.
pub fn small_images(dir: &Path) -> Result<PathBuf, Error> {
    let template = dir.join("images/templates/pulse");
    std::fs::create_dir_all(&template)?;
    let json = json!({
        "name": "test/pulse", "kernel": pulse(), "disk_mib": 0, "min_memory_mib": 32, "exit_counter": true,
        "cmdline": "fill=8 hot=1 mix=real count=1", "ready": {"serial": "R\n"},
    });
    std::fs::write(template.join("template.json"), json.to_string())?;
    Ok(dir.join("images"))
}

/// Writes a template that images can be made on: what has an agent and a disk, by its description. No guest of it would ever be ready.
pub fn boots_images(images: &Path) -> Result<&'static str, Error> {
    const NAME: &str = "test/boots-images";
    let template = images.join("templates/boots-images");
    std::fs::create_dir_all(&template)?;
    File::create(template.join("rootfs.ext4"))?.set_len(1 << 20)?;
    let json = json!({
        "name": NAME, "kernel": pulse(), "rootfs": "rootfs.ext4", "disk_mib": 64, "cmdline": "fill=1 hot=1", "ready": "agent",
    });
    std::fs::write(template.join("template.json"), json.to_string())?;
    Ok(NAME)
}

impl Service {
    /// Starts everything and waits until the API answers.
    pub async fn start(options: Options) -> Result<Self, Error> {
        let dir = host::scratch()?;
        let objects = dir.path().join("s3");
        Self::start_with(options, Sleep::default(), dir, &objects).await
    }

    /// The same with another store, in a directory of the caller's, with the S3 server's objects in `objects`.
    pub async fn start_with(
        options: Options,
        sleep: Sleep,
        dir: tempfile::TempDir,
        objects: &Path,
    ) -> Result<Self, Error> {
        let loopback = "127.0.0.1:0".parse()?;
        let s3 = EmbeddedS3::start(objects, loopback, BUCKET, ACCESS_KEY, SECRET_KEY).await?;
        let proxy = FaultProxy::start(s3.addr()).await?;
        let images = match &options.images {
            Some(images) => images.clone(),
            None => small_images(dir.path())?,
        };
        let options = Options { images: Some(images), ..options };
        let port = Port::take()?;
        let url = format!("http://127.0.0.1:{}", port.number());
        let data = dir.path().join("d");
        let key = make_key(&data, "test")?;
        // A connection for each request: one to a supervisor that was killed must not be used for the next.
        let http = reqwest::Client::builder().timeout(Duration::from_mins(10)).pool_max_idle_per_host(0).build()?;
        let place = store_of(&sleep, &s3, &proxy, dir.path());
        let supervisor = spawn(dir.path(), &data, &options, &place, port.number())?;
        let service = Self { proxy, url, key, dir, options, s3, sleep, port, supervisor, http };
        service.ready().await?;
        Ok(service)
    }

    async fn ready(&self) -> Result<(), Error> {
        self.ready_at(&self.url, self.supervisor.id()).await
    }

    async fn ready_at(&self, url: &str, pid: u32) -> Result<(), Error> {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            if let Ok(answer) = self.http.get(format!("{url}/healthz")).send().await
                && answer.status().is_success()
            {
                return Ok(());
            }
            if is_dead(pid) {
                return Err(format!("the supervisor has ended: {}", self.log()).into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Err(format!("the supervisor does not answer: {}", self.log()).into())
    }

    /// The supervisor's log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("supervisor.log")).unwrap_or_default()
    }

    /// Address of the S3 server itself, past the proxy.
    pub fn s3_endpoint(&self) -> String {
        self.s3.endpoint()
    }

    /// A new key of the tenant `test`, for a journal that was made anew.
    pub fn same_tenant_key(&self) -> Result<String, Error> {
        make_key(&self.dir.path().join("d"), "test")
    }

    /// A key of the tenant `test` in the data directory `name`.
    pub fn key_in(&self, name: &str) -> Result<String, Error> {
        make_key(&self.dir.path().join(name), "test")
    }

    /// Another tenant's key.
    pub fn other_key(&self) -> Result<String, Error> {
        make_key(&self.dir.path().join("d"), "other")
    }

    /// Kills the supervisor with SIGKILL; VMMs go on.
    pub fn kill_supervisor(&mut self) -> Result<(), Error> {
        self.supervisor.kill()?;
        self.supervisor.wait()?;
        Ok(())
    }

    /// Loses the data directory of a supervisor that was killed, and what ran for it.
    pub fn lose_data(&self) -> Result<(), Error> {
        let data = self.dir.path().join("d");
        end_processes(&data);
        Ok(std::fs::remove_dir_all(data)?)
    }

    /// Tells the supervisor to end, and waits until it has; answers whether it ended well.
    pub async fn end_supervisor(&mut self) -> Result<bool, Error> {
        kill_process(Pid::from_child(&self.supervisor), Signal::TERM)?;
        until("the end of the supervisor", || Ok(self.supervisor_is_dead().then_some(()))).await?;
        Ok(self.supervisor.wait()?.success())
    }

    /// Starts the supervisor again on the same data and address.
    pub async fn start_supervisor(&mut self) -> Result<(), Error> {
        self.spawn_supervisor()?;
        self.ready().await
    }

    /// The same, for one that may die before it answers.
    pub async fn try_start_supervisor(&mut self) -> Result<(), Error> {
        self.spawn_supervisor()?;
        tokio::select! {
            // One that is dead is not ready, and may be.
            ready = self.ready() => if self.supervisor_is_dead() { Ok(()) } else { ready },
            () = async { while !self.supervisor_is_dead() { tokio::time::sleep(Duration::from_millis(5)).await } } => Ok(()),
        }
    }

    fn spawn_supervisor(&mut self) -> Result<(), Error> {
        let data = self.dir.path().join("d");
        let place = store_of(&self.sleep, &self.s3, &self.proxy, self.dir.path());
        self.supervisor = spawn(self.dir.path(), &data, &self.options, &place, self.port.number())?;
        Ok(())
    }

    /// Sets or removes a variable of the supervisor's environment, for its next start and for [`Service::stasis`].
    pub fn set_environment(&mut self, name: &str, value: Option<&str>) {
        self.options.environment.retain(|(known, _)| known != name);
        self.options.environment.extend(value.map(|value| (name.to_owned(), value.to_owned())));
    }

    /// The supervisor has ended, by itself or not.
    pub fn supervisor_is_dead(&self) -> bool {
        is_dead(self.supervisor.id())
    }

    /// Process id of the supervisor.
    pub fn supervisor_pid(&self) -> u32 {
        self.supervisor.id()
    }

    /// Starts another supervisor on the data directory `name`, past the proxy.
    pub async fn start_second(&self, name: &str) -> Result<Second, Error> {
        let port = Port::take()?;
        let data = self.dir.path().join(name);
        let place = self.direct_place();
        let supervisor = spawn(self.dir.path(), &data, &self.options, &place, port.number())?;
        let second = Second { url: format!("http://127.0.0.1:{}", port.number()), data, supervisor, _port: port };
        self.ready_at(&second.url, second.supervisor.id()).await?;
        Ok(second)
    }

    /// Runs `stasis --json ARGUMENTS` with the supervisor's configuration.
    #[expect(clippy::disallowed_methods, reason = "a program run as an operator runs it")]
    pub async fn stasis(&self, arguments: &[&str]) -> Result<Ran, Error> {
        let data = self.dir.path().join("d");
        let mut command = std::process::Command::new(host::program("stasis"));
        command.arg("--json").args(arguments).envs(environment(&data, &self.options, &self.direct_place(), 0));
        // Beside the runtime: the S3 server that it talks to is one of the runtime's tasks.
        let ran = tokio::task::spawn_blocking(move || command.output()).await??;
        Ok(Ran {
            code: ran.status.code().unwrap_or(-1),
            json: serde_json::from_slice(&ran.stdout).unwrap_or(Value::Null),
            stderr: String::from_utf8_lossy(&ran.stderr).into_owned(),
        })
    }

    /// Where the sandboxes sleep, past the proxy: its faults are for the first supervisor alone.
    fn direct_place(&self) -> Place {
        let sleep = match &self.sleep {
            Sleep::Proxied => &Sleep::Direct,
            other => other,
        };
        store_of(sleep, &self.s3, &self.proxy, self.dir.path())
    }

    /// The store that the supervisor uses, reached the same way.
    pub fn store(&self) -> Result<Arc<dyn ObjectStore>, Error> {
        Ok(match store_of(&self.sleep, &self.s3, &self.proxy, self.dir.path()) {
            Place::Directory(path) => Arc::new(DirectoryStore::open(&path)?),
            Place::S3(settings) => Arc::new(S3Store::new(settings)?),
        })
    }

    /// One request as the tenant `test`.
    pub async fn call(&self, method: &str, path: &str, body: Option<Value>) -> Result<Reply, Error> {
        self.call_as(&self.key, method, path, body.map(|b| b.to_string())).await
    }

    /// One request with this key and this body, well-formed or not.
    pub async fn call_as(&self, key: &str, method: &str, path: &str, body: Option<String>) -> Result<Reply, Error> {
        self.call_at(&self.url, key, method, path, body).await
    }

    /// The same to any supervisor.
    pub async fn call_at(
        &self,
        url: &str,
        key: &str,
        method: &str,
        path: &str,
        body: Option<String>,
    ) -> Result<Reply, Error> {
        let mut request = self.http.request(method.parse()?, format!("{url}{path}"));
        if !key.is_empty() {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body);
        }
        let answer = request.send().await?;
        let status = answer.status().as_u16();
        let timing = answer.headers().get("server-timing").and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
        let retry_after = answer.headers().get("retry-after").and_then(|v| v.to_str().ok()?.parse().ok());
        let json = serde_json::from_slice(&answer.bytes().await?).unwrap_or(Value::Null);
        Ok(Reply { status, json, timing, retry_after })
    }

    /// Creates a small pulse sandbox and answers its id.
    pub async fn create_pulse(&self) -> Result<String, Error> {
        let body = json!({"template_name": "test/pulse", "memory": 32});
        Ok(self.call("POST", "/v1/sandbox", Some(body)).await?.expect(201)?.text("id"))
    }

    /// Waits until `/metrics` has this line.
    pub async fn await_told(&self, line: &str) -> Result<(), Error> {
        let begun = Instant::now();
        loop {
            let request = self.http.get(format!("{}/metrics", self.url)).bearer_auth(&self.key);
            let text = request.send().await?.error_for_status()?.text().await?;
            if text.lines().any(|told| told == line) {
                return Ok(());
            }
            if begun.elapsed() > PATIENCE {
                return Err(format!("{line} is not in the metrics: {text}").into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// How many operations of this kind (`create`, `pause`, `resume`) have ended well or not (`ok`, `error`), by the metrics.
    pub async fn operations(&self, kind: &str, outcome: &str) -> Result<u64, Error> {
        let request = self.http.get(format!("{}/metrics", self.url)).bearer_auth(&self.key);
        let text = request.send().await?.error_for_status()?.text().await?;
        let series = format!("stasis_operations_total{{operation=\"{kind}\",outcome=\"{outcome}\"}} ");
        Ok(text.lines().find_map(|line| line.strip_prefix(&series)?.parse().ok()).unwrap_or(0))
    }

    /// `POST …/pause`.
    pub async fn pause(&self, id: &str) -> Result<Reply, Error> {
        self.call("POST", &format!("/v1/sandbox/{id}/pause"), None).await
    }

    /// `POST …/resume`.
    pub async fn resume(&self, id: &str) -> Result<Reply, Error> {
        self.call("POST", &format!("/v1/sandbox/{id}/resume"), None).await
    }

    /// Waits until the proxy holds a request ([`stasis_api::dev::Fault::Hold`]).
    pub async fn await_held(&self) -> Result<(), Error> {
        until("a request that is held", || Ok((self.proxy.held() > 0).then_some(()))).await
    }

    /// The state that `GET` answers.
    pub async fn state(&self, id: &str) -> Result<String, Error> {
        Ok(self.call("GET", &format!("/v1/sandbox/{id}"), None).await?.text("state"))
    }

    /// Waits until the sandbox is in this state.
    pub async fn await_state(&self, id: &str, state: &str) -> Result<(), Error> {
        let begun = Instant::now();
        loop {
            let now = self.state(id).await?;
            if now == state {
                return Ok(());
            }
            if begun.elapsed() > PATIENCE {
                return Err(format!("{id} is {now}, not {state}, in time; log: {}", self.log()).into());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Run directory of the sandbox's VMM.
    pub fn run_dir(&self, id: &str) -> PathBuf {
        self.dir.path().join("d/run").join(id)
    }

    /// What the guest printed since its VMM started.
    pub fn console(&self, id: &str) -> String {
        let log = std::fs::read(self.run_dir(id).join(CONSOLE_LOG)).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// The sandbox's VMM.
    pub fn vmm(&self, id: &str) -> Client {
        Client::new(&self.run_dir(id))
    }

    /// Pulse goes on and has lost nothing: it prints new passes and never a '!'.
    pub async fn pulse_is_well(&self, id: &str) -> Result<(), Error> {
        let before = self.console(id).len();
        until("new passes of pulse", || Ok((self.console(id).len() > before + 3).then_some(()))).await?;
        let console = self.console(id);
        if console.contains('!') { Err(format!("pulse lost something: {console}").into()) } else { Ok(()) }
    }

    /// Waits until no VMM that held a sandbox is left, nor its run directory: the kernel takes a VMM apart after a pause is answered.
    pub async fn await_no_vmm(&self) -> Result<(), Error> {
        let run = self.dir.path().join("d/run");
        let is_idle = |entry: std::fs::DirEntry| entry.file_name().to_string_lossy().starts_with("pool-");
        until("the end of all VMMs with a sandbox", || {
            let only_idle = std::fs::read_dir(&run)?.flatten().all(is_idle);
            Ok((only_idle && self.vmm_pids().is_empty()).then_some(()))
        })
        .await
    }

    /// Process ids of VMMs that hold this sandbox.
    pub fn vmms_of(&self, id: &str) -> Vec<u32> {
        vmms(&self.dir.path().join("d/run"), |name| name == id)
    }

    /// The journal, beside the supervisor.
    pub fn journal(&self) -> Result<Journal, Error> {
        Ok(Journal::open(&self.dir.path().join("d").join(JOURNAL))?)
    }

    /// Process ids of VMMs that hold a sandbox of this service. Idle ones of the pool are not among them, nor are killed ones that the kernel
    /// still takes apart.
    pub fn vmm_pids(&self) -> Vec<u32> {
        vmms(&self.dir.path().join("d/run"), |name| !name.starts_with("pool-") && !name.starts_with("ended-"))
    }

    /// Process ids of this service's VMMs that were started ahead and are used by nobody.
    pub fn idle_vmm_pids(&self) -> Vec<u32> {
        vmms(&self.dir.path().join("d/run"), |name| name.starts_with("pool-"))
    }

    /// Objects in the bucket below `prefix`, by their paths in the S3 server's folder.
    pub fn objects(&self, prefix: &str) -> Vec<PathBuf> {
        fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    walk(&path, found);
                } else {
                    found.push(path);
                }
            }
        }
        let root = self.dir.path().join("s3").join(BUCKET);
        let mut found = Vec::new();
        walk(&root, &mut found);
        found.retain(|path| path.strip_prefix(&root).is_ok_and(|p| p.to_string_lossy().starts_with(prefix)));
        found.sort();
        found
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.supervisor.kill();
        let _ = self.supervisor.wait();
        end_processes(&self.dir.path().join("d"));
    }
}

/// A process of ours has ended: it is ours to wait for, so it stays as a zombie until then.
fn is_dead(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']))
}

/// Ends what a killed supervisor left, idle VMMs too: no other comes that would. The warden first, which may be starting one.
fn end_processes(data: &Path) {
    let note = std::fs::read(data.join("warden.json")).ok();
    let note = note.and_then(|note| serde_json::from_slice::<ProcessNote>(&note).ok());
    if let Some(warden) = note.and_then(|note| find(&note)) {
        let _ = pidfd_send_signal(warden, Signal::KILL);
    }
    for pid in vmms(&data.join("run"), |_| true) {
        if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// Process ids of VMMs whose run directory is one of `root` with a name that is `wanted`.
fn vmms(root: &Path, wanted: impl Fn(&str) -> bool) -> Vec<u32> {
    let found = find_under(root).unwrap_or_default().into_iter();
    found
        .filter(|(_, dir)| dir.file_name().is_some_and(|name| wanted(&name.to_string_lossy())))
        .filter_map(|(identity, _)| u32::try_from(identity.pid).ok())
        // A killed one has no command line any more, though it may not be reaped yet.
        .filter(|pid| std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty()))
        .collect()
}

enum Place {
    Directory(PathBuf),
    S3(S3Settings),
}

fn store_of(sleep: &Sleep, s3: &EmbeddedS3, proxy: &FaultProxy, dir: &Path) -> Place {
    let embedded = |endpoint| {
        Place::S3(S3Settings {
            endpoint,
            region: "us-east-1".to_owned(),
            bucket: BUCKET.to_owned(),
            access_key: ACCESS_KEY.to_owned(),
            secret_key: SECRET_KEY.to_owned(),
            path_style: true,
            request_timeout: Duration::from_mins(1),
            commit_timeout: Duration::from_mins(1),
        })
    };
    match sleep {
        Sleep::Proxied => embedded(proxy.endpoint()),
        Sleep::Direct => embedded(s3.endpoint()),
        Sleep::Directory => Place::Directory(dir.join("store")),
        Sleep::Bucket(settings) => Place::S3(settings.clone()),
    }
}

fn store_environment(place: &Place) -> Vec<(&'static str, OsString)> {
    match place {
        Place::Directory(path) => {
            vec![("STASIS_STORE_KIND", "directory".into()), ("STASIS_STORE_PATH", path.into())]
        }
        Place::S3(settings) => [
            ("STASIS_STORE_KIND", "s3"),
            ("STASIS_STORE_ENDPOINT", &settings.endpoint),
            ("STASIS_STORE_BUCKET", &settings.bucket),
            ("STASIS_STORE_REGION", &settings.region),
            ("STASIS_STORE_ACCESS_KEY", &settings.access_key),
            ("STASIS_STORE_SECRET_KEY", &settings.secret_key),
            ("STASIS_STORE_PATH_STYLE", if settings.path_style { "true" } else { "false" }),
        ]
        .map(|(name, value)| (name, value.into()))
        .to_vec(),
    }
}

/// What tells a program of ours its data, its images and its store.
fn environment(data: &Path, options: &Options, place: &Place, port: u16) -> Vec<(String, OsString)> {
    let images = options.images.clone().unwrap_or_default();
    let ours = [
        ("STASIS_LISTEN", format!("127.0.0.1:{port}").into()),
        ("STASIS_DATA_DIR", data.into()),
        ("STASIS_IMAGES_DIR", images.into()),
    ];
    let ours = ours.into_iter().chain(store_environment(place)).map(|(name, value)| (name.to_owned(), value));
    ours.chain(options.environment.iter().map(|(name, value)| (name.clone(), value.into()))).collect()
}

#[expect(clippy::disallowed_methods, reason = "this is the tests' one place that starts supervisors")]
fn spawn(dir: &Path, data: &Path, options: &Options, place: &Place, port: u16) -> Result<Child, Error> {
    let log = File::options().create(true).append(true).open(dir.join("supervisor.log"))?;
    let child = std::process::Command::new(host::program("stasis"))
        .arg("serve")
        .envs(environment(data, options, place, port))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    Ok(child)
}

#[expect(clippy::disallowed_methods, reason = "a program run as an operator runs it")]
fn make_key(data: &Path, tenant: &str) -> Result<String, Error> {
    let made = std::process::Command::new(host::program("stasis"))
        .args(["--json", "key", "create", "--tenant", tenant, "--data-dir"])
        .arg(data)
        .output()?;
    let answer: Value = serde_json::from_slice(&made.stdout)
        .map_err(|e| format!("stasis key create: {e}: {}", String::from_utf8_lossy(&made.stderr)))?;
    Ok(answer["key"].as_str().unwrap_or_default().to_owned())
}
