//! Firecracker's API socket: HTTP/1.1 with JSON.

use std::path::PathBuf;

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use crate::bench::peer::PATIENCE;
use crate::vmm::Error;

/// More than any answer of its API.
const MAX_ANSWER: usize = 64 << 10;

/// The API behind one socket.
#[derive(Debug)]
pub(super) struct Api {
    /// Its path.
    pub(super) socket: PathBuf,
}

impl Api {
    /// One request on a connection of its own; any answer but a success is an error.
    pub(super) async fn call(&self, method: &str, path: &str, body: Value) -> Result<(), Error> {
        let body = body.to_string();
        let mut stream = UnixStream::connect(&self.socket).await?;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).await?;
        let mut answer = Vec::new();
        let done = async {
            // The connection stays open after the answer: its head says where it ends, and only an error's body is of interest.
            while !answer.windows(4).any(|four| four == b"\r\n\r\n") && answer.len() < MAX_ANSWER {
                if stream.read_buf(&mut answer).await? == 0 {
                    break;
                }
            }
            Ok::<_, std::io::Error>(())
        };
        tokio::time::timeout(PATIENCE, done).await??;
        let text = String::from_utf8_lossy(&answer);
        match text.split(' ').nth(1) {
            Some(status) if status.starts_with('2') => Ok(()),
            _ => Err(format!("Firecracker refuses {method} {path}: {text}").into()),
        }
    }
}
