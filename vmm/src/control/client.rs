//! The supervisor's end of the control API.
//!
//! One connection a request: requests are rare, and a VMM that died is noticed at once. Every call has a deadline.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::types::{
    BootRequest, CaptureReport, CaptureRequest, Connections, DirtyReport, ErrorBody, FdToken, KeepRequest, Metrics,
    PauseReport, PrepareRequest, RestoreReport, RestoreRequest, VmStatus,
};

/// Deadline of a call that only moves state about.
const SHORT: Duration = Duration::from_secs(30);
/// Deadline of a boot or a restore.
const LONG: Duration = Duration::from_mins(10);
/// Longest JSON answer, bytes.
const MAX_JSON: usize = 1 << 20;
/// Longest manifest draft, bytes.
const MAX_DRAFT: usize = stasis_snapshot::manifest::MAX_LEN as usize;

/// A call to a VMM failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The VMM cannot be reached: it has not started yet, or it is gone.
    #[error("cannot reach the VMM at {socket}")]
    Unreachable {
        /// Its control socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It did not answer in time. What was asked may still happen.
    #[error("the VMM did not answer {what} within {seconds} s")]
    Deadline {
        /// The request.
        what: String,
        /// The deadline.
        seconds: u64,
    },
    /// It refused, or failed.
    #[error("the VMM refused {what}: {message}")]
    Refused {
        /// The request.
        what: String,
        /// HTTP status.
        status: u16,
        /// [`ErrorBody::code`].
        code: String,
        /// [`ErrorBody::message`].
        message: String,
        /// [`ErrorBody::store`].
        store: Option<stasis_snapshot::store::ErrorKind>,
    },
    /// Its answer makes no sense.
    #[error("cannot understand the VMM's answer to {what}")]
    Answer {
        /// The request.
        what: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A VMM's control API.
#[derive(Clone, Debug)]
pub struct Client {
    control: PathBuf,
    fds: PathBuf,
}

impl Client {
    /// The VMM whose run directory this is. Connects with each call.
    pub fn new(run_dir: &Path) -> Self {
        Self { control: run_dir.join(super::CONTROL_SOCKET), fds: run_dir.join(super::FDS_SOCKET) }
    }

    /// Sends opened files ahead of the request that names their tokens.
    pub async fn send_files(&self, files: Vec<(FdToken, std::fs::File)>) -> Result<(), ClientError> {
        use std::os::fd::AsFd;
        let socket = self.fds.clone();
        let unreachable = |source: Box<dyn std::error::Error + Send + Sync>| ClientError::Unreachable {
            socket: self.fds.clone(),
            source,
        };
        tokio::task::spawn_blocking(move || {
            let borrowed: Vec<_> = files.iter().map(|(token, file)| (*token, file.as_fd())).collect();
            super::fds::send(&socket, &borrowed)
        })
        .await
        .map_err(|e| unreachable(e.into()))?
        .map_err(|e| unreachable(e.into()))
    }

    /// `GET /v1/vm`.
    pub async fn status(&self) -> Result<VmStatus, ClientError> {
        self.json(Method::GET, "/v1/vm", None::<&()>, SHORT).await
    }

    /// `GET /v1/metrics`.
    pub async fn metrics(&self) -> Result<Metrics, ClientError> {
        self.json(Method::GET, "/v1/metrics", None::<&()>, SHORT).await
    }

    /// `PUT /v1/vm/boot`.
    pub async fn boot(&self, request: &BootRequest) -> Result<VmStatus, ClientError> {
        self.json(Method::PUT, "/v1/vm/boot", Some(request), LONG).await
    }

    /// `PUT /v1/vm/restore`.
    pub async fn restore(&self, request: &RestoreRequest) -> Result<RestoreReport, ClientError> {
        self.json(Method::PUT, "/v1/vm/restore", Some(request), LONG).await
    }

    /// `PUT /v1/vm/pause`.
    pub async fn pause(&self) -> Result<PauseReport, ClientError> {
        self.json(Method::PUT, "/v1/vm/pause", None::<&()>, SHORT).await
    }

    /// `PUT /v1/vm/resume`.
    pub async fn resume(&self) -> Result<VmStatus, ClientError> {
        self.json(Method::PUT, "/v1/vm/resume", None::<&()>, SHORT).await
    }

    /// `POST /v1/vm/capture`: the encoded draft of a manifest, and what it took.
    pub async fn capture(&self, request: &CaptureRequest) -> Result<(Bytes, CaptureReport), ClientError> {
        // The VMM keeps the deadline itself; this one is for a VMM that does not.
        let deadline = Duration::from_millis(request.deadline_ms) + SHORT;
        let body = to_json("POST /v1/vm/capture", request)?;
        let (headers, body) = self.call(Method::POST, "/v1/vm/capture", body, deadline, MAX_DRAFT).await?;
        let report = headers.get(super::REPORT_HEADER).map(|v| serde_json::from_slice(v.as_bytes())).transpose();
        let report = report
            .map_err(|e| ClientError::Answer { what: "POST /v1/vm/capture".to_owned(), source: e.into() })?
            .unwrap_or_default();
        Ok((body, report))
    }

    /// `GET /v1/vm/dirty`.
    pub async fn dirty(&self) -> Result<DirtyReport, ClientError> {
        self.json(Method::GET, "/v1/vm/dirty", None::<&()>, SHORT).await
    }

    /// `PUT /v1/vm/keep`: writes the notes that belong to the memory file into `notes`, an empty file, and sends it under `token`.
    pub async fn keep(&self, token: FdToken, notes: std::fs::File) -> Result<(), ClientError> {
        self.send_files(vec![(token, notes)]).await?;
        let body = to_json("PUT /v1/vm/keep", &KeepRequest { notes: token })?;
        self.call(Method::PUT, "/v1/vm/keep", body, SHORT, MAX_JSON).await.map(drop)
    }

    /// `PUT /v1/vm/prepare`.
    pub async fn prepare(&self, request: PrepareRequest) -> Result<(), ClientError> {
        let body = to_json("PUT /v1/vm/prepare", &request)?;
        self.call(Method::PUT, "/v1/vm/prepare", body, SHORT, MAX_JSON).await.map(drop)
    }

    /// `PUT /v1/vm/capture/connections`.
    pub async fn set_connections(&self, connections: u16) -> Result<(), ClientError> {
        let body = to_json("PUT /v1/vm/capture/connections", &Connections { connections })?;
        self.call(Method::PUT, "/v1/vm/capture/connections", body, SHORT, MAX_JSON).await.map(drop)
    }

    /// `DELETE /v1/vm/capture`.
    pub async fn cancel_capture(&self) -> Result<(), ClientError> {
        self.call(Method::DELETE, "/v1/vm/capture", Bytes::new(), SHORT, MAX_JSON).await.map(drop)
    }

    /// `PUT /v1/vm/console`.
    pub async fn console(&self, input: Bytes) -> Result<(), ClientError> {
        self.call(Method::PUT, "/v1/vm/console", input, SHORT, MAX_JSON).await.map(drop)
    }

    /// `PUT /v1/vm/shutdown`.
    pub async fn shutdown(&self) -> Result<(), ClientError> {
        self.call(Method::PUT, "/v1/vm/shutdown", Bytes::new(), SHORT, MAX_JSON).await.map(drop)
    }

    async fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
        deadline: Duration,
    ) -> Result<T, ClientError> {
        let what = format!("{method} {path}");
        let body = body.map_or_else(|| Ok(Bytes::new()), |b| to_json(&what, b))?;
        let (_, answer) = self.call(method, path, body, deadline, MAX_JSON).await?;
        serde_json::from_slice(&answer).map_err(|e| ClientError::Answer { what, source: e.into() })
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        deadline: Duration,
        limit: usize,
    ) -> Result<(hyper::HeaderMap, Bytes), ClientError> {
        let what = format!("{method} {path}");
        let late = ClientError::Deadline { what: what.clone(), seconds: deadline.as_secs() };
        match tokio::time::timeout(deadline, self.exchange(method, path, body, limit, &what)).await {
            Ok(answer) => answer,
            Err(_) => Err(late),
        }
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        limit: usize,
        what: &str,
    ) -> Result<(hyper::HeaderMap, Bytes), ClientError> {
        let unreachable = |source: Box<dyn std::error::Error + Send + Sync>| ClientError::Unreachable {
            socket: self.control.clone(),
            source,
        };
        let answer = |source| ClientError::Answer { what: what.to_owned(), source };
        let stream = tokio::net::UnixStream::connect(&self.control).await.map_err(|e| unreachable(e.into()))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| unreachable(e.into()))?;
        let pump = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "vmm")
            .body(Full::new(body))
            .map_err(|e| unreachable(e.into()))?;
        let response = sender.send_request(request).await.map_err(|e| unreachable(e.into()))?;
        let (head, body) = response.into_parts();
        let bytes = Limited::new(body, limit).collect().await.map_err(answer)?.to_bytes();
        pump.abort();
        if head.status.is_success() {
            return Ok((head.headers, bytes));
        }
        let error: ErrorBody = serde_json::from_slice(&bytes).unwrap_or_else(|_| ErrorBody {
            code: "unknown".to_owned(),
            message: String::from_utf8_lossy(&bytes).into_owned(),
            store: None,
        });
        let status: StatusCode = head.status;
        Err(ClientError::Refused {
            what: what.to_owned(),
            status: status.as_u16(),
            code: error.code,
            message: error.message,
            store: error.store,
        })
    }
}

fn to_json(what: &str, body: &impl Serialize) -> Result<Bytes, ClientError> {
    serde_json::to_vec(body)
        .map(Bytes::from)
        .map_err(|e| ClientError::Answer { what: what.to_owned(), source: e.into() })
}
