//! The supervisor's half of the control interface.
//!
//! One connection a request: requests are rare, and a proxy that died or was replaced is noticed at once. Every call has a deadline.

use std::net::SocketAddr;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::UnixStream;

use super::frame::{self, FrameError};
use super::types::{
    Answer, PutSandbox, Refused, RefusedCode, ReplacePolicy, Request, SandboxRef, SandboxReport, Sockets, Status,
};

/// Deadline of a call unless told otherwise: none of them waits for a network.
const DEADLINE: Duration = Duration::from_secs(10);

/// A call to the proxy failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens: it has not started yet, or it is gone.
    #[error("cannot reach the egress proxy at {socket}")]
    Unreachable {
        /// Its control socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It did not answer in time. What was asked may still happen.
    #[error("the egress proxy did not answer {what} within {within:?}")]
    Deadline {
        /// The request.
        what: &'static str,
        /// The deadline.
        within: Duration,
    },
    /// It refused, and changed nothing.
    #[error("the egress proxy refused {what}: {}", refused.message)]
    Refused {
        /// The request.
        what: &'static str,
        /// Its words.
        refused: Refused,
    },
    /// The connection broke, or what came is no answer to that. What was asked may have happened.
    #[error("cannot understand the egress proxy's answer to {what}")]
    Answer {
        /// The request.
        what: &'static str,
        /// Why; none when it was the answer to something else.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
}

impl ClientError {
    /// Why it refused; none when it did something else.
    pub fn refused(&self) -> Option<RefusedCode> {
        if let Self::Refused { refused, .. } = self { Some(refused.code) } else { None }
    }
}

/// A proxy's control interface.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    within: Duration,
}

impl Client {
    /// The proxy that listens at `socket`. Nothing is sent yet.
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned(), within: DEADLINE }
    }

    /// With another deadline for each call.
    #[must_use]
    pub fn with_deadline(mut self, within: Duration) -> Self {
        self.within = within;
        self
    }

    /// How the process does, and which sandboxes it has: what a supervisor that comes back asks first.
    pub async fn status(&self) -> Result<Status, ClientError> {
        match self.call("status", &Request::Status, &[]).await? {
            Answer::Status(status) => Ok(status),
            other => Err(unexpected("status", other)),
        }
    }

    /// Gives it a sandbox and its sockets, which this side may close afterwards.
    pub async fn put(&self, mut sandbox: PutSandbox, sockets: &Sockets) -> Result<(), ClientError> {
        sandbox.sockets = sockets.kinds();
        let descriptors: Vec<BorrowedFd<'_>> = [
            sockets.proxy.as_ref().map(|s| s.as_fd()),
            sockets.dns_udp.as_ref().map(|s| s.as_fd()),
            sockets.dns_tcp.as_ref().map(|s| s.as_fd()),
        ]
        .into_iter()
        .flatten()
        .collect();
        self.done("put", &Request::Put(sandbox), &descriptors).await
    }

    /// Replaces a policy. When this returns, nothing passes under the old one.
    pub async fn replace(&self, policy: ReplacePolicy) -> Result<(), ClientError> {
        self.done("replace", &Request::Replace(policy), &[]).await
    }

    /// Removes a sandbox; answers its last report, or none when it was not there.
    pub async fn remove(&self, sandbox: SandboxRef) -> Result<Option<SandboxReport>, ClientError> {
        match self.call("remove", &Request::Remove(sandbox), &[]).await? {
            Answer::Removed(report) => Ok(report),
            other => Err(unexpected("remove", other)),
        }
    }

    /// Counters and last refusals of a sandbox.
    pub async fn sandbox(&self, key: &str) -> Result<SandboxReport, ClientError> {
        match self.call("sandbox", &Request::Sandbox { key: key.to_owned() }, &[]).await? {
            Answer::Sandbox(report) => Ok(report),
            other => Err(unexpected("sandbox", other)),
        }
    }

    /// Sets the name servers.
    pub async fn upstreams(&self, servers: Vec<SocketAddr>) -> Result<(), ClientError> {
        self.done("upstreams", &Request::Upstreams(servers), &[]).await
    }

    /// Ends the process.
    pub async fn shutdown(&self) -> Result<(), ClientError> {
        self.done("shutdown", &Request::Shutdown, &[]).await
    }

    async fn done(
        &self,
        what: &'static str,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        match self.call(what, request, descriptors).await? {
            Answer::Done => Ok(()),
            other => Err(unexpected(what, other)),
        }
    }

    async fn call(
        &self,
        what: &'static str,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Answer, ClientError> {
        let answer = |error: FrameError| ClientError::Answer { what, source: Some(Box::new(error)) };
        let exchange = async {
            let connected = UnixStream::connect(&self.socket).await;
            let mut stream =
                connected.map_err(|source| ClientError::Unreachable { socket: self.socket.clone(), source })?;
            frame::send(&mut stream, request, descriptors).await.map_err(answer)?;
            let received = frame::receive::<Answer>(&mut stream).await.map_err(answer)?;
            received.map(|(body, _)| body).ok_or(ClientError::Answer { what, source: None })
        };
        match tokio::time::timeout(self.within, exchange).await {
            Ok(answer) => answer,
            Err(_) => Err(ClientError::Deadline { what, within: self.within }),
        }
    }
}

fn unexpected(what: &'static str, answer: Answer) -> ClientError {
    match answer {
        Answer::Refused(refused) => ClientError::Refused { what, refused },
        _ => ClientError::Answer { what, source: None },
    }
}
