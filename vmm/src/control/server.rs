//! The VMM's end of the control API.
//!
//! One task a connection; one lock around the machine, which requests hold as long as they change it. A capture holds the machine only
//! while it saves state and while it takes the outcome over; in between the state is `capturing` and nothing else is allowed but to look
//! and to cancel. Calls into KVM are short and blocking: they run in place on a worker of the runtime.

use std::collections::HashMap;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use stasis_snapshot::capture::Options;
use stasis_snapshot::grant::{Access, GrantedObject};
use stasis_snapshot::granted::{GrantedPacks, Patience, StoreClient};
use stasis_snapshot::ids::Digest;
use stasis_snapshot::manifest::Manifest;
use stasis_snapshot::pager::PackCache;
use stasis_snapshot::seal::DataKeys;
use tokio::net::UnixListener;
use tokio::sync::{Mutex, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::fds::Inbox;
use super::refusal::{Refusal, chain, failed};
use super::types::{
    BootRequest, CaptureMode, CaptureReport, CaptureRequest, Connections, DirtyReport, DiskConfig, ErrorBody, FdToken,
    KeepRequest, Metrics, PauseReport, PrepareRequest, RestoreReport, RestoreRequest, VmState, VmStatus,
};
use crate::dirty::Then;
use crate::inherited::HostFiles;
use crate::limits::Limits;
use crate::machine::capture::{Content, Order};
use crate::machine::kept::Kept;
use crate::machine::reboot::{Stored, reboot};
use crate::machine::restore::{self, RestoreFailed};
use crate::machine::staging::Staging;
use crate::machine::{self, Backends, Bare, BaseGiven, BootFiles, Disk, Host, Machine, MachineError};
use crate::vcpu::Ended;

/// Longest request body: a capture with a grant for each pack of the largest machine.
const MAX_BODY: usize = 16 << 20;
/// Longest manifest.
const MAX_MANIFEST: u64 = stasis_snapshot::manifest::MAX_LEN;
/// Longest notes on kept memory: 16 bytes a page of the largest machine, and runs.
const MAX_NOTES: u64 = 64 << 20;
/// How long the working set is recorded after a wake.
const RECORD_WORKING_SET: Duration = Duration::from_secs(10);

/// What the server is started with.
pub struct Settings {
    /// Id of the sandbox, for its answers.
    pub id: String,
    /// Opened files of the host.
    pub host: Arc<HostFiles>,
    /// MSRs that a restore may leave out.
    pub allowed_msrs: Vec<u32>,
    /// The client for granted URLs.
    pub store: StoreClient,
    /// What the guest may ask of the host.
    pub limits: Limits,
}

struct Server {
    settings: Settings,
    /// The sandbox, where the process was started before there was one.
    sandbox: OnceLock<String>,
    files: Inbox,
    machine: Mutex<Option<Box<Machine>>>,
    /// What was made ahead of the machine. Locked after `machine`.
    ready: Mutex<Option<Bare>>,
    /// The running capture, if any. Locked after `machine`.
    capture: Mutex<Option<Running>>,
    ended: mpsc::Sender<Ended>,
    shutdown: watch::Sender<bool>,
}

/// A capture that runs.
struct Running {
    cancel: CancellationToken,
    /// Cancelled when it has ended.
    done: CancellationToken,
    mode: CaptureMode,
    /// PUTs in flight at most.
    share: watch::Sender<u16>,
}

impl Running {
    fn is_round(&self) -> bool {
        self.mode == CaptureMode::Round
    }
}

/// A capture about to start.
struct Prepared {
    request: stasis_snapshot::capture::CaptureRequest,
    content: Content,
    stop_us: u64,
}

/// Why [`serve`] returned.
pub enum Finished {
    /// It was asked to.
    Shutdown,
    /// The machine ended by itself.
    Machine(Ended),
}

/// Serves `listener` until shutdown is asked for or the machine ends.
pub async fn serve(listener: UnixListener, files: Inbox, settings: Settings) -> Finished {
    let (ended_tx, mut ended) = mpsc::channel(8);
    let (shutdown, mut asked) = watch::channel(false);
    // Never dropped: a vCPU that waits for a page that cannot be had would keep its thread, and whoever joins it, for ever.
    let server = std::mem::ManuallyDrop::new(Arc::new(Server {
        settings,
        sandbox: OnceLock::new(),
        files,
        machine: Mutex::new(None),
        ready: Mutex::new(None),
        capture: Mutex::new(None),
        ended: ended_tx,
        shutdown,
    }));
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let server = Arc::clone(&server);
                    tokio::spawn(async move {
                        let last = Arc::new(AtomicBool::new(false));
                        let service = service_fn(|request| answer(server.clone(), last.clone(), request));
                        if let Err(error) = hyper::server::conn::http1::Builder::new()
                            .serve_connection(TokioIo::new(stream), service)
                            .await
                        {
                            tracing::debug!(%error, "control connection");
                        }
                        // The answer to a shutdown is written by now: its connection closes behind it.
                        if last.load(Ordering::Acquire) {
                            server.shutdown.send_replace(true);
                        }
                    });
                }
                Err(error) => tracing::warn!(%error, "control socket"),
            },
            Some(ended) = ended.recv() => return Finished::Machine(ended),
            _ = asked.changed() => return Finished::Shutdown,
        }
    }
}

type Answer = Response<Full<Bytes>>;

async fn answer(server: Arc<Server>, last: Arc<AtomicBool>, request: Request<Incoming>) -> Result<Answer, http::Error> {
    let what = format!("{} {}", request.method(), request.uri().path());
    match route(&server, &last, request).await {
        Ok(answer) => answer,
        Err(refusal) => {
            tracing::info!(what, %refusal, "refused");
            let body =
                ErrorBody { code: refusal.code().to_owned(), message: refusal.to_string(), store: refusal.store() };
            Response::builder().status(refusal.status()).body(Full::from(serde_json::to_vec(&body).unwrap_or_default()))
        }
    }
}

/// `last` is set by the request after which the process ends.
async fn route(
    server: &Arc<Server>,
    last: &AtomicBool,
    request: Request<Incoming>,
) -> Result<Result<Answer, http::Error>, Refusal> {
    let (head, body) = request.into_parts();
    let body = Limited::new(body, MAX_BODY)
        .collect()
        .await
        .map_err(|e| Refusal::BadRequest(format!("cannot read the body: {e}")))?
        .to_bytes();
    Ok(match (&head.method, head.uri.path()) {
        (&Method::GET, "/v1/vm") => json(&server.status().await),
        (&Method::GET, "/v1/metrics") => json(&server.metrics().await),
        (&Method::PUT, "/v1/vm/prepare") => {
            server.prepare_for(parse(&body)?).await?;
            empty()
        }
        (&Method::PUT, "/v1/vm/boot") => json(&server.boot(parse(&body)?).await?),
        (&Method::PUT, "/v1/vm/restore") => json(&server.restore(parse(&body)?).await?),
        (&Method::PUT, "/v1/vm/pause") => json(&server.pause().await?),
        (&Method::PUT, "/v1/vm/resume") => json(&server.resume().await?),
        (&Method::POST, "/v1/vm/capture") => {
            // A connection that breaks must not leave a capture half taken over: it runs in a task of its own.
            let (server, request) = (server.clone(), parse(&body)?);
            let captured = tokio::spawn(async move { server.capture(request).await }).await.map_err(failed)?;
            let (draft, report) = captured?;
            let report = serde_json::to_string(&report).unwrap_or_default();
            Response::builder().header(super::REPORT_HEADER, report).body(Full::from(draft))
        }
        (&Method::DELETE, "/v1/vm/capture") => {
            if let Some(capture) = &*server.capture.lock().await {
                capture.cancel.cancel();
            }
            empty()
        }
        (&Method::PUT, "/v1/vm/capture/connections") => {
            let share: Connections = parse(&body)?;
            if let Some(capture) = &*server.capture.lock().await {
                capture.share.send_replace(share.connections.max(1));
            }
            empty()
        }
        (&Method::GET, "/v1/vm/dirty") => json(&server.dirty().await?),
        (&Method::PUT, "/v1/vm/keep") => {
            server.keep(parse(&body)?).await?;
            empty()
        }
        (&Method::PUT, "/v1/vm/console") => {
            server.console(&body).await?;
            empty()
        }
        (&Method::PUT, "/v1/vm/shutdown") => {
            last.store(true, Ordering::Release);
            Response::builder().status(StatusCode::NO_CONTENT).header("connection", "close").body(Full::default())
        }
        (method, path) => return Err(Refusal::NotFound(format!("{method} {path}"))),
    })
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(|e| Refusal::BadRequest(format!("cannot read the request: {e}")))
}

fn json(value: &impl Serialize) -> Result<Answer, http::Error> {
    Response::builder()
        .header("content-type", "application/json")
        .body(Full::from(serde_json::to_vec(value).unwrap_or_default()))
}

fn empty() -> Result<Answer, http::Error> {
    Response::builder().status(StatusCode::NO_CONTENT).body(Full::default())
}

impl Server {
    fn host(&self) -> Host {
        let ended = self.ended.clone();
        Host {
            files: self.settings.host.clone(),
            allowed_msrs: self.settings.allowed_msrs.clone(),
            limits: self.settings.limits,
            // The first end decides; a queue full of others loses nothing.
            ended: Arc::new(move |why| drop(ended.try_send(why))),
        }
    }

    async fn state(&self, machine: Option<&Machine>) -> VmState {
        match machine {
            None => VmState::Empty,
            Some(machine) if machine.is_paused() => {
                if self.capture.lock().await.is_some() {
                    VmState::Capturing
                } else {
                    VmState::Paused
                }
            }
            Some(_) => VmState::Running,
        }
    }

    async fn describe(&self, machine: Option<&Machine>) -> VmStatus {
        VmStatus {
            id: self.sandbox.get().unwrap_or(&self.settings.id).clone(),
            pid: std::process::id(),
            vmm_version: env!("CARGO_PKG_VERSION").to_owned(),
            state: self.state(machine).await,
            machine: machine.map(Machine::config),
        }
    }

    async fn status(&self) -> VmStatus {
        let machine = self.machine.lock().await;
        self.describe(machine.as_deref()).await
    }

    async fn metrics(&self) -> Metrics {
        self.machine.lock().await.as_deref().map(Machine::metrics).unwrap_or_default()
    }

    fn take(&self, what: &str, token: FdToken) -> Result<std::fs::File, Refusal> {
        self.files.take(token).ok_or_else(|| {
            Refusal::BadRequest(format!("no descriptor was sent for the {what} under token {}", token.0))
        })
    }

    fn disks(&self, configs: Vec<DiskConfig>) -> Result<Vec<Disk>, Refusal> {
        let disk = |config: DiskConfig| {
            let base = match (config.base, config.base_digest) {
                (Some(token), Some(digest)) => {
                    let digest = digest
                        .parse::<Digest>()
                        .map_err(|e| Refusal::BadRequest(format!("base_digest: {}", chain(&e))))?;
                    let index = config.base_index.map(|token| self.take("index of a disk base", token)).transpose()?;
                    Some(BaseGiven { file: self.take("disk base", token)?, digest, index })
                }
                (None, None) => None,
                _ => return Err(Refusal::BadRequest("base and base_digest belong together".to_owned())),
            };
            let overlay = config.overlay.map(|token| self.take("disk overlay", token)).transpose()?;
            if overlay.is_some() == config.read_only {
                return Err(Refusal::BadRequest("a disk has an overlay or is read_only".to_owned()));
            }
            let size = config.size_mib.checked_mul(1 << 20);
            let size = size.ok_or_else(|| Refusal::BadRequest(format!("size_mib {}", config.size_mib)))?;
            Disk::new(base, overlay, size).map_err(failed)
        };
        configs.into_iter().map(disk).collect()
    }

    async fn prepare_for(&self, request: PrepareRequest) -> Result<(), Refusal> {
        let slot = self.machine.lock().await;
        self.only_in(VmState::Empty, slot.as_deref(), "a preparation").await?;
        let bare = tokio::task::block_in_place(|| {
            crate::heap::make_ready();
            machine::make_ready(request.vcpus, request.memory_mib, &self.settings.host)
        });
        *self.ready.lock().await = Some(bare.map_err(failed)?);
        Ok(())
    }

    async fn boot(&self, request: BootRequest) -> Result<VmStatus, Refusal> {
        let mut slot = self.machine.lock().await;
        self.only_in(VmState::Empty, slot.as_deref(), "a boot").await?;
        let files = BootFiles {
            kernel: self.take("kernel", request.kernel)?,
            initramfs: request.initramfs.map(|token| self.take("initramfs", token)).transpose()?,
            cmdline: request.cmdline,
            memory: request.memory.map(|token| self.take("memory", token)).transpose()?,
        };
        let backends = Backends {
            disks: self.disks(request.disks)?,
            tap: request.tap.map(|token| self.take("tap", token)).transpose()?.map(OwnedFd::from),
        };
        let ready = self.ready.lock().await.take();
        let machine = match request.disks_from {
            None => {
                tokio::task::block_in_place(|| Machine::boot(&request.machine, ready, files, backends, self.host()))
                    .map_err(failed)?
            }
            Some(from) => {
                let manifest = self.manifest(from.manifest, &from.manifest_digest)?;
                let packs = self.granted(from.packs)?;
                let cache_files = packs.cache_files();
                let stored = Stored {
                    manifest,
                    keys: DataKeys::new(from.keys),
                    packs: Arc::new(packs),
                    cache: (!cache_files.is_empty()).then(|| Arc::new(PackCache::new(cache_files))),
                    connections: from.connections,
                };
                reboot(&request.machine, ready, files, backends, self.host(), stored).await.map_err(failed)?
            }
        };
        *slot = Some(Box::new(machine));
        self.belongs_to(request.id);
        Ok(self.describe(slot.as_deref()).await)
    }

    /// There is one machine in a life, so the first answer stays.
    fn belongs_to(&self, sandbox: Option<String>) {
        if let Some(id) = sandbox {
            self.sandbox.get_or_init(|| id);
        }
    }

    async fn only_in(&self, wanted: VmState, machine: Option<&Machine>, what: &'static str) -> Result<(), Refusal> {
        let state = self.state(machine).await;
        if state == wanted { Ok(()) } else { Err(Refusal::WrongState { state, what }) }
    }

    async fn restore(&self, request: RestoreRequest) -> Result<RestoreReport, Refusal> {
        let mut slot = self.machine.lock().await;
        self.only_in(VmState::Empty, slot.as_deref(), "a restore").await?;
        let started = Instant::now();
        let mut manifest = self.manifest(request.manifest, &request.manifest_digest)?;
        let keys = DataKeys::new(request.keys);
        manifest.open_state(&keys).map_err(failed)?;
        let packs = self.granted(request.packs)?;
        let cache_files = packs.cache_files();
        let kept = match request.kept {
            None => None,
            Some(token) => Some(Kept::read(&mut self.take("kept notes", token)?.take(MAX_NOTES)).map_err(failed)?),
        };
        let input = restore::Input {
            ready: self.ready.lock().await.take(),
            packs: Arc::new(packs),
            keys,
            cache: (!cache_files.is_empty()).then(|| Arc::new(PackCache::new(cache_files))),
            memory: request.memory.map(|token| self.take("memory", token)).transpose()?,
            kept,
            paging: request.paging,
            backends: Backends {
                disks: self.disks(request.disks)?,
                tap: request.tap.map(|token| self.take("tap", token)).transpose()?.map(OwnedFd::from),
            },
            network_limits: request.network_limits,
            generation_id: generation_id(&request.generation_id)?,
            host: self.host(),
        };
        let manifest_us = started.elapsed().as_micros() as u64;
        let (machine, report) = restore::restore(manifest, input).await.map_err(|e: RestoreFailed| failed(e))?;
        *slot = Some(Box::new(machine));
        self.belongs_to(request.id);
        Ok(RestoreReport { manifest_us, ..report })
    }

    /// A manifest that was sent, its digest checked.
    fn manifest(&self, token: FdToken, digest: &str) -> Result<Manifest, Refusal> {
        let digest =
            digest.parse::<Digest>().map_err(|e| Refusal::BadRequest(format!("manifest_digest: {}", chain(&e))))?;
        let mut bytes = Vec::new();
        self.take("manifest", token)?.take(MAX_MANIFEST).read_to_end(&mut bytes).map_err(failed)?;
        Manifest::decode_checked(&bytes, digest).map_err(failed)
    }

    /// The grants with the files they name.
    fn granted(&self, objects: Vec<GrantedObject>) -> Result<GrantedPacks, Refusal> {
        let mut files = HashMap::new();
        for object in &objects {
            if let Access::Fd(token) = object.access {
                files.insert(token, self.take(&object.key, FdToken(token))?);
            }
            if let Some(token) = object.cache
                && let Some(file) = self.files.take(FdToken(token))
            {
                files.insert(token, file);
            }
        }
        GrantedPacks::new(self.settings.store.clone(), objects, &mut files, Patience::default()).map_err(failed)
    }

    async fn pause(&self) -> Result<PauseReport, Refusal> {
        let mut slot = loop {
            self.end_round().await;
            let slot = self.machine.lock().await;
            // One that began in between is ended, too; none begins while this is held.
            if !self.capture.lock().await.as_ref().is_some_and(Running::is_round) {
                break slot;
            }
        };
        // What a staged capture sends must not be collected once more before it is settled.
        let staged = self.capture.lock().await.is_some();
        let state = if staged { VmState::Capturing } else { self.state(slot.as_deref()).await };
        let (Some(machine), VmState::Running | VmState::Paused) = (slot.as_deref_mut(), state) else {
            return Err(Refusal::WrongState { state, what: "a pause" });
        };
        tokio::task::block_in_place(|| {
            let stop = machine.pause().map_err(failed)?;
            let counts = machine.collect_dirty(&Options::default(), Then::Leave).map_err(failed)?;
            Ok(PauseReport {
                dirty_memory_pages: counts.memory_pages,
                dirty_disk_blocks: counts.disk_blocks,
                packs_needed: counts.packs_needed,
                stop_us: stop.as_micros() as u64,
            })
        })
    }

    /// A round that runs is cancelled and waited for: what it sent stays sent.
    async fn end_round(&self) {
        loop {
            let done = match &*self.capture.lock().await {
                Some(running) if running.is_round() => {
                    running.cancel.cancel();
                    running.done.clone()
                }
                _ => return,
            };
            done.cancelled().await;
        }
    }

    async fn dirty(&self) -> Result<DirtyReport, Refusal> {
        let slot = self.machine.lock().await;
        let Some(machine) = slot.as_deref() else {
            return Err(Refusal::WrongState { state: VmState::Empty, what: "a look at what is dirty" });
        };
        let counts = tokio::task::block_in_place(|| machine.estimate_dirty(&Options::default())).map_err(failed)?;
        Ok(DirtyReport {
            memory_pages: counts.memory_pages,
            disk_blocks: counts.disk_blocks,
            packs_needed: counts.packs_needed,
        })
    }

    async fn keep(&self, request: KeepRequest) -> Result<(), Refusal> {
        let slot = self.machine.lock().await;
        self.only_in(VmState::Paused, slot.as_deref(), "keeping its memory").await?;
        let Some(machine) = slot.as_deref() else {
            return Err(Refusal::WrongState { state: VmState::Empty, what: "keeping its memory" });
        };
        let mut notes = self.take("kept notes", request.notes)?;
        tokio::task::block_in_place(|| machine.keep(&mut notes)).map_err(failed)
    }

    async fn resume(self: &Arc<Self>) -> Result<VmStatus, Refusal> {
        let mut slot = self.machine.lock().await;
        self.only_in(VmState::Paused, slot.as_deref(), "a resume").await?;
        if let Some(machine) = slot.as_deref_mut() {
            tokio::task::block_in_place(|| machine.resume()).map_err(failed)?;
        }
        self.record_working_set();
        Ok(self.describe(slot.as_deref()).await)
    }

    /// Ends the recording of the working set some time after a wake.
    fn record_working_set(self: &Arc<Self>) {
        let server = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep(RECORD_WORKING_SET).await;
            if let Some(server) = server.upgrade()
                && let Some(machine) = server.machine.lock().await.as_deref()
            {
                tokio::task::block_in_place(|| {
                    machine.close_working_set();
                    crate::heap::give_back();
                });
            }
        });
    }

    /// What a capture is prepared from, in its mode; the machine is as the mode leaves it.
    fn prepare(
        machine: &mut Machine,
        mode: CaptureMode,
        order: Order,
        staging: Option<Staging>,
    ) -> Result<Prepared, MachineError> {
        match (mode, staging) {
            (CaptureMode::Round, _) => {
                Ok(Prepared { request: machine.prepare_round(order)?, content: Content::None, stop_us: 0 })
            }
            (CaptureMode::Disks, _) => {
                Ok(Prepared { request: machine.prepare_disks(order)?, content: Content::Disks, stop_us: 0 })
            }
            (CaptureMode::Staged, Some(staging)) => {
                let (request, state, stop_us) = machine.prepare_staged(order, staging)?;
                Ok(Prepared { request, content: Content::Machine(state), stop_us })
            }
            (CaptureMode::Stopped | CaptureMode::Staged, _) => {
                let (request, state) = machine.prepare_stopped(order)?;
                Ok(Prepared { request, content: Content::Machine(state), stop_us: 0 })
            }
        }
    }

    async fn capture(&self, request: CaptureRequest) -> Result<(Vec<u8>, CaptureReport), Refusal> {
        let connections = request.connections.max(1);
        let memory = request.memory_bytes.unwrap_or(Options::default().memory);
        let options = Options { connections, memory, ..Options::default() };
        let cancel = CancellationToken::new();
        let sink = Arc::new(self.granted(request.packs)?);
        let (share, share_changes) = watch::channel(connections);
        let running = Running { cancel: cancel.clone(), done: CancellationToken::new(), mode: request.mode, share };
        // Whatever happens, those that wait for the end of this capture hear of it.
        let _done = running.done.clone().drop_guard();
        let prepared = {
            let mut slot = self.machine.lock().await;
            let wanted = match request.mode {
                CaptureMode::Stopped | CaptureMode::Disks => VmState::Paused,
                CaptureMode::Round | CaptureMode::Staged => VmState::Running,
            };
            self.only_in(wanted, slot.as_deref(), "a capture").await?;
            let mut current = self.capture.lock().await;
            let (Some(machine), None) = (slot.as_deref_mut(), &*current) else {
                return Err(Refusal::WrongState { state: VmState::Capturing, what: "a capture" });
            };
            let order =
                Order { sink, options, connections: share_changes, cancel: cancel.clone(), seal: request.seal.clone() };
            let prepared = tokio::task::block_in_place(|| {
                // Made before the guest stops.
                let staging = match request.mode {
                    CaptureMode::Staged => Some(Staging::with_room(machine.estimate_dirty(&options)?.memory_pages)),
                    CaptureMode::Stopped | CaptureMode::Disks | CaptureMode::Round => None,
                };
                Self::prepare(machine, request.mode, order, staging)
            })
            .map_err(failed)?;
            *current = Some(running);
            prepared
        };
        let started = Instant::now();
        let deadline = Duration::from_millis(request.deadline_ms);
        let mut capture = std::pin::pin!(stasis_snapshot::capture::capture(prepared.request));
        let mut late = false;
        let outcome = tokio::select! {
            outcome = &mut capture => outcome,
            () = tokio::time::sleep(deadline) => {
                late = true;
                cancel.cancel();
                // A cancelled capture ends by itself, and must be waited for: it may be reading memory.
                capture.await
            }
        };
        let upload_us = started.elapsed().as_micros() as u64;
        let mut slot = self.machine.lock().await;
        *self.capture.lock().await = None;
        let Some(machine) = slot.as_deref_mut() else {
            return Err(Refusal::WrongState { state: VmState::Empty, what: "a capture" });
        };
        let stats = outcome.as_ref().map(|c| c.stats).unwrap_or_default();
        let state_us = prepared.content.micros();
        let finish = || machine.finish_capture(prepared.content, outcome, request.seal.as_ref());
        let draft = tokio::task::block_in_place(finish).map_err(|e| match (late, cancel.is_cancelled()) {
            (true, _) => Refusal::TooSlow,
            (false, true) => Refusal::Cancelled,
            (false, false) => failed(e),
        })?;
        if request.mode != CaptureMode::Stopped {
            tokio::spawn(crate::heap::quiet_down());
        }
        let report = CaptureReport {
            state_us,
            upload_us,
            scanned_pages: stats.scanned_pages,
            zero_pages: stats.zero_pages,
            base_pages: stats.base_pages,
            unchanged_pages: stats.unchanged_pages,
            stop_us: prepared.stop_us,
            sent_pages: stats.sent_pages,
            sent_bytes: stats.sent_bytes,
            packs: stats.packs,
            cpu_us: stats.cpu_us,
        };
        Ok((draft, report))
    }

    async fn console(&self, input: &[u8]) -> Result<(), Refusal> {
        let slot = self.machine.lock().await;
        self.only_in(VmState::Running, slot.as_deref(), "console input").await?;
        let taken = slot.as_deref().map_or(0, |machine| machine.console_input(input));
        if taken < input.len() {
            let message = format!("the serial port took {taken} of {} bytes", input.len());
            return Err(Refusal::Failed { message, store: None });
        }
        Ok(())
    }
}

fn generation_id(hex: &str) -> Result<[u8; 16], Refusal> {
    u128::from_str_radix(hex, 16)
        .ok()
        // `from_str_radix` alone would take a sign.
        .filter(|_| hex.len() == 32 && hex.bytes().all(|digit| digit.is_ascii_hexdigit()))
        .map(u128::to_be_bytes)
        .ok_or_else(|| Refusal::BadRequest("generation_id must be 32 hexadecimal digits".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_ids_are_16_bytes_of_hex() {
        assert_eq!(generation_id("000102030405060708090a0b0c0d0e0f").unwrap()[..3], [0, 1, 2]);
        for bad in ["", "00", "zz0102030405060708090a0b0c0d0e0f", "+00102030405060708090a0b0c0d0e0f"] {
            assert!(generation_id(bad).is_err(), "{bad}");
        }
    }
}
