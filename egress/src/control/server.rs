//! The proxy's half of the control interface. Whoever may open the socket may say everything: its directory is the supervisor's alone, and the
//! peer's user is looked at besides.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::frame::{self, FrameError};
use super::types::{Answer, PutSandbox, Refused, RefusedCode, Request, Sockets, Status};
use crate::counters::unix_ms;
use crate::sandboxes::Sandboxes;

/// Connections at once.
const CONNECTIONS: usize = 64;
/// For the next request of a connection to come.
const IDLE: Duration = Duration::from_mins(5);
/// For an answer to be taken.
const WRITE: Duration = Duration::from_secs(10);
/// After a failed `accept`.
const PAUSE: Duration = Duration::from_millis(20);
/// Name servers at most.
const MAX_UPSTREAMS: usize = 8;

/// Who may speak, and what the process says of itself.
pub struct Server {
    /// What it is about.
    pub sandboxes: Arc<Sandboxes>,
    /// Users that may speak beside root and this process's own.
    pub peers: Vec<u32>,
    /// See [`Status::confined_by`].
    pub confined_by: Vec<String>,
    /// When the process began.
    pub started: SystemTime,
}

impl Server {
    /// Serves `listener` until a request for the end comes; everything else has ended then, too.
    pub async fn serve(self, listener: UnixListener) {
        let server = Arc::new(self);
        let end = CancellationToken::new();
        let free = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = end.cancelled() => break,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a control connection");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            if let Err(refusal) = server.admit(&stream) {
                tracing::warn!(refusal, "a control connection is refused");
                continue;
            }
            let Ok(permit) = Arc::clone(&free).try_acquire_owned() else {
                tracing::warn!("a control connection too many is closed");
                continue;
            };
            let (server, end) = (Arc::clone(&server), end.clone());
            tokio::spawn(async move {
                if let Err(error) = server.converse(stream, &end).await {
                    tracing::warn!(error = crate::chain(&error), "a control connection ends");
                }
                drop(permit);
            });
        }
        server.sandboxes.end().await;
    }

    fn admit(&self, stream: &UnixStream) -> Result<(), String> {
        let peer = stream.peer_cred().map_err(|e| format!("its user is not known: {e}"))?.uid();
        let own = rustix::process::geteuid().as_raw();
        if peer == 0 || peer == own || self.peers.contains(&peer) {
            Ok(())
        } else {
            Err(format!("it is of user {peer}"))
        }
    }

    async fn converse(&self, mut stream: UnixStream, end: &CancellationToken) -> Result<(), FrameError> {
        loop {
            let received = tokio::time::timeout(IDLE, frame::receive::<Request>(&mut stream)).await;
            let (answer, last) = match received {
                Err(_) | Ok(Ok(None)) => return Ok(()),
                Ok(Ok(Some((Request::Shutdown, _)))) => (Answer::Done, true),
                Ok(Ok(Some((request, descriptors)))) => {
                    (self.carry_out(request, descriptors).await.unwrap_or_else(Answer::Refused), false)
                }
                Ok(Err(error @ (FrameError::Protocol(_) | FrameError::Json(..)))) => {
                    let code = match error {
                        FrameError::Protocol(_) => RefusedCode::Protocol,
                        _ => RefusedCode::Invalid,
                    };
                    (Answer::Refused(Refused { code, message: error.to_string() }), false)
                }
                // Where the next message begins is not known any more.
                Ok(Err(error)) => return Err(error),
            };
            let sent = tokio::time::timeout(WRITE, frame::send(&mut stream, answer, &[])).await;
            sent.unwrap_or_else(|_| Err(FrameError::late()))?;
            if last {
                end.cancel();
                return Ok(());
            }
        }
    }

    async fn carry_out(&self, request: Request, descriptors: Vec<OwnedFd>) -> Result<Answer, Refused> {
        let sandboxes = &self.sandboxes;
        Ok(match request {
            Request::Status => {
                let (list, connections) = sandboxes.list().await;
                Answer::Status(Status {
                    version: env!("CARGO_PKG_VERSION").to_owned(),
                    pid: std::process::id(),
                    started_ms: unix_ms(self.started),
                    sandboxes: list,
                    connections,
                    confined_by: self.confined_by.clone(),
                    upstreams: sandboxes.upstreams(),
                })
            }
            Request::Put(put) => {
                let sockets = sockets(&put, descriptors)?;
                sandboxes.put(&put, sockets).await?;
                Answer::Done
            }
            Request::Replace(replace) => {
                sandboxes.replace(&replace).await?;
                Answer::Done
            }
            Request::Remove(which) => Answer::Removed(sandboxes.remove(&which).await?),
            Request::Sandbox { key } => Answer::Sandbox(sandboxes.report(&key).await?),
            Request::Upstreams(servers) => {
                if servers.len() > MAX_UPSTREAMS {
                    let message = format!("more than {MAX_UPSTREAMS} name servers");
                    return Err(Refused { code: RefusedCode::Invalid, message });
                }
                sandboxes.set_upstreams(servers);
                Answer::Done
            }
            Request::Shutdown => Answer::Done,
        })
    }
}

/// The descriptors as what the request says that they are.
fn sockets(put: &PutSandbox, descriptors: Vec<OwnedFd>) -> Result<Sockets, Refused> {
    if descriptors.len() != put.sockets.count() {
        let message = format!("{} descriptors came for {} sockets", descriptors.len(), put.sockets.count());
        return Err(Refused { code: RefusedCode::Invalid, message });
    }
    let mut descriptors = descriptors.into_iter();
    let mut next = |wanted: bool| if wanted { descriptors.next() } else { None };
    Ok(Sockets {
        proxy: next(put.sockets.proxy).map(Into::into),
        dns_udp: next(put.sockets.dns_udp).map(Into::into),
        dns_tcp: next(put.sockets.dns_tcp).map(Into::into),
    })
}
