//! The VMM's end of the control API.
//!
//! One task a connection; one lock around the machine, which requests hold as long as they change it. A capture holds the machine only
//! while it saves state and while it takes the outcome over; in between the state is `capturing` and nothing else is allowed but to look
//! and to cancel. Calls into KVM are short and blocking: they run in place on a worker of the runtime.

mod capture;
mod given;
mod lifecycle;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use stasis_snapshot::granted::StoreClient;
use tokio::net::UnixListener;
use tokio::sync::{Mutex, mpsc, watch};

use self::capture::Running;
use super::fds::Inbox;
use super::refusal::{Refusal, failed};
use super::types::{Connections, ErrorBody, Metrics, VmState, VmStatus};
use crate::inherited::HostFiles;
use crate::limits::Limits;
use crate::machine::{Bare, Host, Machine};
use crate::vcpu::Ended;

/// Longest request body: a capture with a grant for each pack of the largest machine.
const MAX_BODY: usize = 16 << 20;

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

    async fn only_in(&self, wanted: VmState, machine: Option<&Machine>, what: &'static str) -> Result<(), Refusal> {
        let state = self.state(machine).await;
        if state == wanted { Ok(()) } else { Err(Refusal::WrongState { state, what }) }
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
