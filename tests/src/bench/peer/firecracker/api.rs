//! Firecracker's API socket: HTTP/1.1 with JSON.

use std::path::PathBuf;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::Request;
use hyper::client::conn::http1::handshake;
use hyper_util::rt::TokioIo;
use serde_json::Value;
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
    /// One request on a connection of its own; any answer but a success is an error with what it says.
    pub(super) async fn call(&self, method: &str, path: &str, body: Value) -> Result<(), Error> {
        let asked = async {
            let (mut sender, connection) = handshake(TokioIo::new(UnixStream::connect(&self.socket).await?)).await?;
            tokio::spawn(connection);
            let request = Request::builder().method(method).uri(path).header("host", "localhost");
            let request =
                request.header("content-type", "application/json").body(Full::<Bytes>::from(body.to_string()))?;
            let (head, answer) = sender.send_request(request).await?.into_parts();
            let answer = if head.status.is_success() {
                Bytes::new()
            } else {
                Limited::new(answer, MAX_ANSWER).collect().await?.to_bytes()
            };
            Ok::<_, Error>((head.status, answer))
        };
        let (status, answer) = tokio::time::timeout(PATIENCE, asked).await??;
        if status.is_success() {
            return Ok(());
        }
        let told: Value = serde_json::from_slice(&answer).unwrap_or_default();
        let why = told["fault_message"].as_str().map_or_else(|| String::from_utf8_lossy(&answer), Into::into);
        Err(format!("Firecracker refuses {method} {path}: {status}: {why}").into())
    }
}
