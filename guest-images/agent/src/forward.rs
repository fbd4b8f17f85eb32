//! Connections to TCP ports of the guest: whoever connects names a port (`protocol`), and is then joined to that port of the loopback.
//!
//! Each connection is a task of its own. Both directions are copied as they come, the end of one is passed on while the other goes on, and
//! each holds one buffer at most: a slow reader slows its writer down. The agent ends no connection by itself, however long it is silent:
//! whoever opened it knows what it is for, and a host that goes away ends its connections.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use stasis_agent::protocol::{Forwarded, MAX_FORWARD_LINE, parse_forward_line};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, copy_bidirectional_with_sizes};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use crate::server::{Listen, next};

/// Connections at once; the next one waits in the listener's queue. The device has no more.
const CONNECTIONS: usize = 256;
/// For the line with the port to come.
const LINE_DEADLINE: Duration = Duration::from_secs(10);
/// For a listener whose queue is full to take a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// Buffer of each direction, bytes.
const BUFFER: usize = 64 * 1024;

/// Serves connections for ever.
pub(crate) async fn serve(listener: impl Listen) {
    let free = Arc::new(Semaphore::new(CONNECTIONS));
    // The semaphore is never closed, so this ends only with the task.
    while let Ok(permit) = Arc::clone(&free).acquire_owned().await {
        let stream = next(&listener).await;
        tokio::spawn(async move {
            // Either side may go away at any time, which the other one sees; the console tells whoever looks for the reason.
            if let Err(error) = join(stream).await {
                eprintln!("stasis-agent: a forwarded connection broke: {}", crate::chain(&error));
            }
            drop(permit);
        });
    }
}

async fn join(mut host: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let line = tokio::time::timeout(LINE_DEADLINE, read_line(&mut host)).await??;
    let (answer, stream) = match parse_forward_line(&line) {
        None => (Forwarded::Failed("the line names no port".to_owned()), None),
        Some(port) => match connect(port).await {
            Ok(stream) => (Forwarded::Connected, Some(stream)),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => (Forwarded::Refused, None),
            Err(error) => (Forwarded::Failed(error.to_string()), None),
        },
    };
    host.write_all(answer.line().as_bytes()).await?;
    let Some(mut stream) = stream else { return host.shutdown().await };
    copy_bidirectional_with_sizes(&mut host, &mut stream, BUFFER, BUFFER).await.map(drop)
}

/// Octet by octet: what follows the line is for the port.
async fn read_line(host: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    loop {
        match host.read_u8().await? {
            b'\n' => return Ok(line),
            byte if line.len() < MAX_FORWARD_LINE => line.push(byte),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// Connects to the port on the loopback: IPv4 first, as most servers listen there.
async fn connect(port: NonZeroU16) -> io::Result<TcpStream> {
    let both: [SocketAddr; 2] = [(Ipv4Addr::LOCALHOST, port.get()).into(), (Ipv6Addr::LOCALHOST, port.get()).into()];
    let mut first_failure = None;
    for address in both {
        let failure = match tokio::time::timeout(CONNECT_DEADLINE, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                // Small messages must not wait for an acknowledgement of those before; failing that, they are only late.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Err(error)) => error,
            Err(_) => io::Error::new(io::ErrorKind::TimedOut, "it does not take the connection"),
        };
        // A guest without IPv6 says so for every port: what IPv4 said counts.
        first_failure.get_or_insert(failure);
    }
    Err(first_failure.unwrap_or_else(|| io::ErrorKind::NotFound.into()))
}

#[cfg(test)]
mod tests;
