//! The host end of a guest's vsock: a unix socket that takes `CONNECT <port>\n` and answers `OK …\n` when the guest has accepted.

use std::io;
use std::path::Path;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

/// Longest line that answers `CONNECT`.
const MAX_OK: usize = 64;

/// Connects to `port` of the guest whose vsock is at `socket`. The caller sets the deadline.
pub async fn connect(socket: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let line = read_line(&mut stream, MAX_OK).await?;
    if line.starts_with(b"OK ") || line == b"OK" {
        Ok(stream)
    } else {
        Err(io::Error::other(format!("the vsock device answered {:?}", String::from_utf8_lossy(&line))))
    }
}

/// A line of at most `most` octets, without its line feed. Octet by octet: what follows the line belongs to whoever has the stream next.
pub async fn read_line(stream: &mut UnixStream, most: usize) -> io::Result<Vec<u8>> {
    let mut line = Vec::with_capacity(most.min(64));
    loop {
        match stream.read_u8().await? {
            b'\n' => return Ok(line),
            byte if line.len() < most => line.push(byte),
            _ => return Err(io::Error::other("the answer is no line of the protocol")),
        }
    }
}
