//! A whole service: an S3 server on loopback, a proxy in front of it that can break things on the wire, `stasis serve` as a process, and a
//! client. The supervisor is a process of its own so that tests can kill it.
//!
//! Here: what it is and how it starts and ends, and what can be seen of it from outside; requests to it are `calls`.

mod calls;
mod place;
mod processes;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use stasis_api::dev::{EmbeddedS3, FaultProxy};
use stasis_api::journal::Journal;
use stasis_api::supervisor::JOURNAL;
use stasis_snapshot::store::ObjectStore;
use stasis_snapshot::store::directory::DirectoryStore;
use stasis_snapshot::store::s3::{S3Settings, S3Store};
use stasis_vmm::control::CONSOLE_LOG;
use stasis_vmm::control::client::Client;

pub use calls::Reply;
use place::{Place, environment, store_of};
use processes::{end_processes, is_dead, make_key, spawn, vmms};

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
