//! The supervisor's end. Calls block, bounded by a deadline; each thread that calls at once has a connection of its own.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::net::SocketAddrUnix;

use crate::message;
use crate::protocol::{MAX_MESSAGE, Refusal, Reply, Request, VERSION};

/// How long the warden may take for one request.
const DEADLINE: Duration = Duration::from_secs(10);
/// Connections that are kept for later calls.
const KEPT: usize = 4;

/// A call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// It cannot be reached, or did not answer in time. What was asked may have been done.
    #[error("cannot reach the warden at {socket}")]
    Unreachable {
        /// Its socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It refused.
    #[error("the warden refused")]
    Refused(#[from] Refusal),
    /// Its answer is not one to what was asked.
    #[error("cannot understand the warden's answer: {0}")]
    Answer(String),
}

/// What a warden says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Its process id, as it sees it.
    pub pid: u32,
    /// Walls that its host has not, each with the reason.
    pub missing: Vec<String>,
    /// Fingerprints of its programs.
    pub programs: Vec<String>,
}

/// A warden, by the path of its socket. A connection that broke, as when the warden started anew, is replaced.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    idle: Mutex<Vec<OwnedFd>>,
}

impl Client {
    /// The warden at `socket`. Connects with the first call.
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned(), idle: Mutex::default() }
    }

    /// The path of its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Whether it is there and speaks our version, and what it says of itself.
    pub fn hello(&self) -> Result<Hello, ClientError> {
        match self.call(&Request::Hello { version: VERSION }, &[])? {
            (Reply::Hello { version: VERSION, pid, missing, programs }, _) => Ok(Hello { pid, missing, programs }),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Sends a request and waits for its reply, which is not [`Reply::Refused`].
    pub fn call(
        &self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>), ClientError> {
        let unreachable = |source| ClientError::Unreachable { socket: self.socket.clone(), source };
        let bytes = serde_json::to_vec(request).map_err(|error| ClientError::Answer(error.to_string()))?;
        let kept = self.idle().pop();
        // A kept connection may be of a warden that is gone by now: then nobody has read the request.
        let connection = match kept {
            Some(kept) if message::send(kept.as_fd(), &bytes, descriptors).is_ok() => kept,
            _ => {
                let fresh = self.connect().map_err(unreachable)?;
                message::send(fresh.as_fd(), &bytes, descriptors).map_err(unreachable)?;
                fresh
            }
        };
        let mut buffer = vec![0; MAX_MESSAGE];
        let (answer, received) = message::receive(connection.as_fd(), &mut buffer).map_err(unreachable)?;
        if answer.is_empty() {
            return Err(unreachable(io::ErrorKind::UnexpectedEof.into()));
        }
        let reply = serde_json::from_slice(answer).map_err(|error| ClientError::Answer(error.to_string()))?;
        let mut idle = self.idle();
        if idle.len() < KEPT {
            idle.push(connection);
        }
        drop(idle);
        match reply {
            Reply::Refused(refusal) => Err(refusal.into()),
            reply => Ok((reply, received)),
        }
    }

    fn connect(&self) -> io::Result<OwnedFd> {
        let connection = message::socket()?;
        message::set_deadline(connection.as_fd(), DEADLINE)?;
        rustix::net::connect(&connection, &SocketAddrUnix::new(&self.socket)?)?;
        Ok(connection)
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<OwnedFd>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A reply that is none to what was asked.
pub(crate) fn unexpected(reply: &Reply) -> ClientError {
    ClientError::Answer(format!("{reply:?}"))
}
