//! Connections to the store from the dialler: the VMM has no network of its own.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use async_trait::async_trait;
use stasis_snapshot::granted::Dial;
use stasis_warden::dialler::{answer, ask};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;

/// The inherited socket to the dialler; none where there is no store to connect to.
#[derive(Debug)]
pub struct Dialled(pub Option<OwnedFd>);

#[async_trait]
impl Dial for Dialled {
    async fn dial(&self, host: &str, port: u16) -> io::Result<TcpStream> {
        let dialler = self.0.as_ref().ok_or_else(|| io::Error::other("this VMM was started without a dialler"))?;
        // An address of version 6 stands in brackets before a port.
        let place = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        let end = ask(dialler.as_fd(), &place)?;
        // SAFETY: the `AsyncFd` owns the descriptor: it stays open, and the same, until the `AsyncFd` is dropped.
        let end = unsafe { AsyncFd::register_with_interest(end, Interest::READABLE) }.map_err(io::Error::other)?;
        let connection = end.async_io(Interest::READABLE, |end| answer(end.as_fd())).await?;
        connection.set_nonblocking(true)?;
        TcpStream::from_std(connection)
    }
}
