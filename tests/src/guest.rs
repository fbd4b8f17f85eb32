//! A supervisor with a sandbox whose guest is an agent process of this machine: everything that needs the guest but no machine can be asked,
//! where no Linux guest can boot. The sandbox cannot sleep.

use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::Arc;

use serde_json::Value;
use stasis_api::config::{
    Config, Deadlines, Gc, Invoke, Isolation, IsolationConfig, Limits, Network, RunAhead, Seal, StoreConfig, Telemetry,
    Templates, Tls, Warm,
};
use stasis_api::ids::SandboxId;
use stasis_api::record::{Record, Spec, VmmIdentity};
use stasis_api::sources::Sources;
use stasis_api::states::State;
use stasis_api::supervisor::Supervisor;
use stasis_api::vmm_process::Vmm;
use stasis_vmm::control::VSOCK_SOCKET;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{UnixListener, UnixStream};

use crate::host;
use crate::vmm::{Error, until};

/// Its id.
pub const SANDBOX: &str = "sbx-guest0000000000000000";

/// See the module. Everything of it ends when it is dropped.
pub struct LocalGuest {
    /// The supervisor, in this process.
    pub supervisor: Supervisor,
    /// `http://…` of the API.
    pub url: String,
    /// An API key of the sandbox's tenant.
    pub key: String,
    /// Scratch of the guest is in here.
    pub dir: tempfile::TempDir,
    http: reqwest::Client,
    /// The agent, and what stands in for the VMM.
    processes: [Child; 2],
}

/// Why it cannot be started; `None` when it can.
pub fn lacking() -> Option<String> {
    host::missing(&host::program("stasis-agent"), "cargo build --workspace --bins").or_else(|| {
        (!rustix::process::geteuid().is_root()).then(|| "only root has an agent run commands as root".to_owned())
    })
}

impl LocalGuest {
    /// Starts everything and waits until the agent answers.
    pub async fn start() -> Result<Self, Error> {
        let dir = host::scratch()?;
        let at = |name: &str| dir.path().join(name);
        let config = Config {
            listen: "127.0.0.1:0".parse()?,
            data_dir: at("data"),
            images_dir: at("images"),
            vmm: Some(host::program("stasis-vmm")),
            store: StoreConfig::Directory { path: at("store") },
            limits: Limits::default(),
            deadlines: Deadlines::default(),
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
        };
        std::fs::create_dir_all(at("store"))?;
        let supervisor = Supervisor::start(config).await?;
        let core = supervisor.core().clone();
        let (_, key) = core.journal.create_key("test", "", &Sources::system())?;

        let run_dir = core.config.data_dir.join("run").join(SANDBOX);
        std::fs::create_dir_all(&run_dir)?;
        std::fs::create_dir_all(at("scratch"))?;
        let agent = at("agent.sock");
        let processes = [start_agent(&agent)?, start_stand_in(&run_dir)?];
        until("the agent", || Ok(std::os::unix::net::UnixStream::connect(&agent).ok())).await?;
        let bridge = UnixListener::bind(run_dir.join(VSOCK_SOCKET))?;
        tokio::spawn(async move {
            while let Ok((stream, _)) = bridge.accept().await {
                tokio::spawn(connect(stream, agent.clone()));
            }
        });

        let sandbox = core.registry.add(record(&core.sources)?)?;
        let vmm = Vmm::adopt(&identity(processes[1].id())?, &run_dir, &core.launcher)
            .ok_or("the stand-in of the VMM is gone")?;
        sandbox.set_vm(Some(Arc::new(vmm)));
        let url = format!("http://{}", supervisor.addr());
        Ok(Self { supervisor, url, key, dir, http: reqwest::Client::new(), processes })
    }

    /// A directory that the guest may do anything with.
    pub fn scratch(&self) -> PathBuf {
        self.dir.path().join("scratch")
    }

    /// From now on nobody answers.
    pub fn end_agent(&mut self) {
        let _ = self.processes[0].kill();
        let _ = self.processes[0].wait();
    }

    /// A request with a key: status, body as JSON (null when it is none).
    pub async fn call(
        &self,
        key: &str,
        method: &str,
        path: &str,
        body: impl Into<reqwest::Body>,
    ) -> Result<(u16, Value), Error> {
        let request = self.http.request(method.parse()?, format!("{}{path}", self.url)).bearer_auth(key).body(body);
        let answer = request.send().await?;
        let status = answer.status().as_u16();
        let bytes = answer.bytes().await?;
        Ok((status, serde_json::from_slice(&bytes).unwrap_or(Value::Null)))
    }
}

impl Drop for LocalGuest {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

fn record(sources: &Sources) -> Result<Record, Error> {
    let spec = Spec {
        template_name: "test/local".to_owned(),
        template_id: "tpl-local".to_owned(),
        template_digest: "0".repeat(64),
        rootfs_digest: None,
        agent: true,
        vcpu: 1,
        memory_mib: 512,
        disk_mib: 1,
        timeout_s: 28_800,
        auto_pause: false,
        env_vars: [("FROM_SANDBOX".to_owned(), "yes".to_owned())].into(),
        network_policy: None,
        network: false,
        authority: None,
        port: None,
        snapshot: None,
        created_at: sources.now_ms(),
    };
    let id = SandboxId::parse(SANDBOX).ok_or("the id of the sandbox is none")?;
    let mut record = Record::new(id, "test".to_owned(), spec);
    record.state = State::Running;
    Ok(record)
}

#[expect(clippy::disallowed_methods, reason = "this is the place that starts agents on this machine")]
fn start_agent(socket: &std::path::Path) -> Result<Child, Error> {
    let agent = std::process::Command::new(host::program("stasis-agent"))
        .arg("--unix")
        .arg(socket)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    Ok(agent)
}

#[expect(clippy::disallowed_methods, reason = "this is the place that starts what stands in for a VMM")]
fn start_stand_in(run_dir: &std::path::Path) -> Result<Child, Error> {
    // Ends with this process, at the latest.
    Ok(std::process::Command::new("/bin/cat")
        .current_dir(run_dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()?)
}

/// As the supervisor knows a process: field 22 of its `stat`, the name in field 2 being of no words here.
fn identity(pid: u32) -> Result<VmmIdentity, Error> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let ticks = stat.split_ascii_whitespace().nth(21).ok_or("a process without a start time")?;
    Ok(VmmIdentity { pid: pid.try_into()?, started_ticks: ticks.parse()? })
}

/// The host end of a vsock device, in front of the agent's socket.
async fn connect(mut stream: UnixStream, agent: PathBuf) -> Result<(), Error> {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') && line.len() < 64 {
        line.push(stream.read_u8().await?);
    }
    if line != b"CONNECT 1\n" {
        return Err("somebody asked for another port".into());
    }
    let mut agent = UnixStream::connect(agent).await?;
    stream.write_all(b"OK 1073741824\n").await?;
    copy_bidirectional(&mut stream, &mut agent).await?;
    Ok(())
}
