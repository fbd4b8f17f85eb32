//! The warden's socket: who may ask, and a thread for each connection that takes its requests one by one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::net::{SocketAddrUnix, SocketFlags, accept_with, bind, listen, sockopt};

use crate::message;
use crate::protocol::{MAX_MESSAGE, Refusal, RefusalCode, Reply, Request};

/// Connections at once. A supervisor keeps a few.
const CONNECTIONS: usize = 64;
const BACKLOG: i32 = 64;

/// What is done with a request: the reply, and descriptors to go with it.
pub trait Serve: Send + Sync + 'static {
    /// Called on the thread of the connection.
    fn serve(&self, request: Request, descriptors: Vec<OwnedFd>) -> Result<(Reply, Vec<OwnedFd>), Refusal>;
}

/// Listens at `path`, which only its owner and root may connect to; one that an earlier warden left is replaced.
pub fn bind_at(path: &Path) -> io::Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = message::socket()?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Accepts connections of processes whose user is among `users` for as long as the socket can be read. `connections` counts those that
/// are open.
pub fn run(
    socket: &OwnedFd,
    users: &[u32],
    handler: &Arc<impl Serve>,
    connections: &Arc<AtomicUsize>,
) -> io::Result<()> {
    loop {
        let connection = match accept_with(socket, SocketFlags::CLOEXEC) {
            Ok(connection) => connection,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => continue,
            Err(error) => return Err(error.into()),
        };
        let peer = sockopt::socket_peercred(&connection)?;
        if !users.contains(&peer.uid.as_raw()) {
            tracing::warn!(uid = peer.uid.as_raw(), pid = peer.pid.as_raw_nonzero(), "somebody else's connection");
            continue;
        }
        if connections.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS {
            connections.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!("too many connections");
            continue;
        }
        let (handler, open) = (handler.clone(), connections.clone());
        let thread = std::thread::Builder::new().name("connection".to_owned()).spawn(move || {
            if let Err(error) = serve(connection.as_fd(), &*handler) {
                tracing::debug!(%error, "a connection ended");
            }
            drop(connection);
            open.fetch_sub(1, Ordering::AcqRel);
        });
        if let Err(error) = thread {
            connections.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!(%error, "cannot serve a connection");
        }
    }
}

fn serve(connection: BorrowedFd<'_>, handler: &impl Serve) -> io::Result<()> {
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        let (bytes, descriptors) = message::receive(connection, &mut buffer)?;
        if bytes.is_empty() {
            return Ok(());
        }
        let done = serde_json::from_slice(bytes)
            .map_err(|error| Refusal { code: RefusalCode::BadRequest, message: error.to_string() })
            .and_then(|request| handler.serve(request, descriptors));
        let (reply, given) = done.unwrap_or_else(|refusal| {
            tracing::info!(%refusal, "refused");
            (Reply::Refused(refusal), Vec::new())
        });
        let given: Vec<_> = given.iter().map(AsFd::as_fd).collect();
        message::send(connection, &serde_json::to_vec(&reply)?, &given)?;
    }
}
