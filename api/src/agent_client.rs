//! The supervisor's end of the agent protocol: HTTP/1.1 over the host end of the guest's vsock (connect, `CONNECT <port>\n`, `OK …\n`).
//! One connection a request, since connections do not survive a pause. Answers are untrusted: bounded, and never trusted beyond their text.

mod calls;

use crate::vsock;
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use stasis_agent::protocol::git::GitRequest;
use stasis_agent::protocol::trust::{TrustReply, TrustRequest};
use stasis_agent::protocol::{
    AGENT_PORT, AgentError, ClockRequest, ExecReply, ExecRequest, Health, ImageReply, ImageRequest, WakeReply,
    WakeRequest,
};
use stasis_vmm::control::VSOCK_SOCKET;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why the agent did not answer.
#[derive(Debug, thiserror::Error)]
pub enum AgentFailure {
    /// Nobody listens, or the connection broke.
    #[error("the connection to the agent failed: {0}")]
    Connection(String),
    /// It did not answer in time.
    #[error("the agent did not answer within {0:?}")]
    Deadline(Duration),
    /// It refused.
    #[error("{message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// Its words.
        message: String,
        /// The field of the request that it names; its words are then the end of a sentence that starts with it.
        field: Option<String>,
    },
    /// It answered something else.
    #[error("the agent's answer makes no sense: {0}")]
    Nonsense(String),
}

/// The agent behind one vsock socket.
#[derive(Clone, Debug)]
pub struct Agent {
    socket: PathBuf,
    answer_limit: usize,
}

impl Agent {
    /// The one in the VM with this run directory. Answers larger than `answer_limit` bytes are refused.
    pub fn new(run_dir: &Path, answer_limit: usize) -> Self {
        Self { socket: run_dir.join(VSOCK_SOCKET), answer_limit }
    }

    /// `GET /v1/health`.
    pub async fn health(&self, within: Duration) -> Result<Health, AgentFailure> {
        self.call(Method::GET, "/v1/health", None::<&()>, within).await
    }

    /// `POST /v1/exec`.
    pub async fn exec(&self, request: &ExecRequest, within: Duration) -> Result<ExecReply, AgentFailure> {
        self.call(Method::POST, "/v1/exec", Some(request), within).await
    }

    /// `POST /v1/git`.
    pub async fn git(&self, request: &GitRequest, within: Duration) -> Result<ExecReply, AgentFailure> {
        self.call(Method::POST, "/v1/git", Some(request), within).await
    }

    /// `POST /v1/wake`. The request is asked for when the connection stands: a guest that has just been restored may take seconds until it
    /// accepts one, and the time in the request must not be of before.
    pub async fn wake(
        &self,
        request: impl FnOnce() -> WakeRequest,
        within: Duration,
    ) -> Result<WakeReply, AgentFailure> {
        self.call_with(Method::POST, "/v1/wake", || encode(&request()), within).await
    }

    /// `POST /v1/clock`. Asked for when the connection stands, like that of [`wake`](Self::wake).
    pub async fn clock(
        &self,
        request: impl FnOnce() -> ClockRequest,
        within: Duration,
    ) -> Result<WakeReply, AgentFailure> {
        self.call_with(Method::POST, "/v1/clock", || encode(&request()), within).await
    }

    /// `POST /v1/image`.
    pub async fn image(&self, request: &ImageRequest, within: Duration) -> Result<ImageReply, AgentFailure> {
        self.call(Method::POST, "/v1/image", Some(request), within).await
    }

    /// `POST /v1/trust`.
    pub async fn trust(&self, request: &TrustRequest, within: Duration) -> Result<TrustReply, AgentFailure> {
        self.call(Method::POST, "/v1/trust", Some(request), within).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
        within: Duration,
    ) -> Result<T, AgentFailure> {
        self.call_with(method, path, || body.map_or(Ok(Bytes::new()), encode), within).await
    }

    async fn call_with<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: impl FnOnce() -> Result<Bytes, AgentFailure>,
        within: Duration,
    ) -> Result<T, AgentFailure> {
        match tokio::time::timeout(within, self.exchange(method, path, body)).await {
            Ok(answer) => {
                let answer = answer?;
                serde_json::from_slice(&answer).map_err(|e| AgentFailure::Nonsense(e.to_string()))
            }
            Err(_) => Err(AgentFailure::Deadline(within)),
        }
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: impl FnOnce() -> Result<Bytes, AgentFailure>,
    ) -> Result<Bytes, AgentFailure> {
        let broken = |e: &dyn std::fmt::Display| AgentFailure::Connection(e.to_string());
        let stream = vsock::connect(&self.socket, AGENT_PORT).await.map_err(|e| broken(&e))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| broken(&e))?;
        let pump = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::HOST, "agent")
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(Full::new(body()?))
            .map_err(|e| broken(&e))?;
        let answer = async {
            let response = sender.send_request(request).await.map_err(|e| broken(&e))?;
            let status = response.status();
            let bytes = Limited::new(response.into_body(), self.answer_limit)
                .collect()
                .await
                .map_err(|e| broken(&e))?
                .to_bytes();
            Ok((status, bytes))
        }
        .await;
        pump.abort();
        let (status, bytes) = answer?;
        if status.is_success() { Ok(bytes) } else { Err(refusal(status, &bytes)) }
    }
}

fn encode(body: &impl Serialize) -> Result<Bytes, AgentFailure> {
    serde_json::to_vec(body).map(Bytes::from).map_err(|e| AgentFailure::Nonsense(e.to_string()))
}

/// What the agent said with a status that is no success.
fn refusal(status: StatusCode, body: &[u8]) -> AgentFailure {
    /// Octets of it that are passed on.
    const LENGTH: usize = 2000;
    let cut = |text: &str| text.get(..text.floor_char_boundary(LENGTH)).unwrap_or_default().to_owned();
    let (message, field) = match serde_json::from_slice::<AgentError>(body) {
        Ok(said) => (cut(&said.message), said.field.as_deref().map(cut)),
        Err(_) => (cut(&String::from_utf8_lossy(body)), None),
    };
    AgentFailure::Refused { status: status.as_u16(), message, field }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
    use tokio::net::UnixListener;

    /// An agent that answers every request with this status line and body, `length` octets of which it announces.
    fn answering(status: &'static str, body: &'static str, length: usize) -> (tempfile::TempDir, Agent) {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join(VSOCK_SOCKET)).unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let mut stream = BufReader::new(stream);
                let mut line = String::new();
                stream.read_line(&mut line).await.unwrap();
                assert_eq!(line, "CONNECT 1\n");
                stream.write_all(b"OK 1073741824\n").await.unwrap();
                while line != "\r\n" {
                    line.clear();
                    stream.read_line(&mut line).await.unwrap();
                }
                let reply = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n\r\n{body}");
                stream.write_all(reply.as_bytes()).await.unwrap();
            }
        });
        let agent = Agent::new(dir.path(), 1000);
        (dir, agent)
    }

    #[tokio::test]
    async fn a_healthy_agent_is_understood() {
        let body = r#"{"protocol":1,"version":"x","boot_id":"abc"}"#;
        let (_dir, agent) = answering("200 OK", body, body.len());
        assert_eq!(agent.health(Duration::from_secs(5)).await.unwrap().boot_id, "abc");
    }

    #[tokio::test]
    async fn the_time_is_of_when_the_guest_has_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join(VSOCK_SOCKET)).unwrap();
        let accepted = Arc::new(AtomicBool::new(false));
        let accepts = accepted.clone();
        tokio::spawn(async move {
            let mut stream = BufReader::new(listener.accept().await.unwrap().0);
            let mut line = String::new();
            stream.read_line(&mut line).await.unwrap();
            // A guest that is slow: whatever would be written ahead is by now.
            tokio::time::sleep(Duration::from_millis(50)).await;
            accepts.store(true, Ordering::SeqCst);
            stream.write_all(b"OK 1073741824\n").await.unwrap();
            while line != "\r\n" {
                line.clear();
                stream.read_line(&mut line).await.unwrap();
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 16\r\n\r\n{\"stepped_ns\":7}").await.unwrap();
        });
        let request = || {
            assert!(accepted.load(Ordering::SeqCst), "the request was made before the guest took the connection");
            ClockRequest { unix_time_ns: 1 }
        };
        let reply = Agent::new(dir.path(), 1000).clock(request, Duration::from_secs(5)).await.unwrap();
        assert_eq!(reply.stepped_ns, 7);
    }

    #[tokio::test]
    async fn a_refusal_carries_its_message() {
        let (_dir, agent) = answering("400 Bad Request", r#"{"message":"cwd"}"#, 17);
        let error = agent.health(Duration::from_secs(5)).await.unwrap_err();
        assert!(matches!(error, AgentFailure::Refused { status: 400, message, field: None } if message == "cwd"));
    }

    #[tokio::test]
    async fn an_answer_beyond_the_limit_or_without_end_is_refused() {
        let (_dir, agent) = answering("200 OK", "", 2_000_000);
        assert!(agent.health(Duration::from_millis(200)).await.is_err());
        let missing = Agent::new(Path::new("/nonexistent"), 10);
        assert!(matches!(missing.health(Duration::from_secs(1)).await, Err(AgentFailure::Connection(_))));
    }
}
