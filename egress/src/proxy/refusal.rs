//! What a client is told when it may not: at once, in its own protocol, and so that it arrives. A connection with unread bytes is reset by the
//! kernel when it is closed, which takes what was written with it; so the end is written, and what still comes is read for a moment.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::tls::Alert;

/// For the client to take the refusal and close.
const LINGER: Duration = Duration::from_secs(1);
/// Bytes that are read meanwhile.
const MAX_DRAINED: u64 = 64 << 10;
/// HTTP/2's error code for "use HTTP/1.1" (RFC 9113 §7).
const HTTP_1_1_REQUIRED: u32 = 0xd;

/// A TLS alert.
pub(super) async fn tls(stream: TcpStream, alert: Alert) {
    say(stream, &alert.record()).await;
}

/// An answer of HTTP/1.1, for a client whose request was not read.
pub(super) async fn http1(stream: TcpStream, status: &str, text: &str) {
    let answer = format!(
        "HTTP/1.1 {status}\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{text}",
        text.len()
    );
    say(stream, answer.as_bytes()).await;
}

/// The settings that a server of HTTP/2 begins with, and the end of the connection.
pub(super) async fn http2(stream: TcpStream, text: &str) {
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let length = u32::try_from(8 + text.len()).unwrap_or_default().to_be_bytes();
    let go_away =
        [&length[1..], &[7, 0, 0, 0, 0, 0], &[0; 4], &HTTP_1_1_REQUIRED.to_be_bytes(), text.as_bytes()].concat();
    say(stream, &[&settings[..], &go_away].concat()).await;
}

async fn say(mut stream: TcpStream, bytes: &[u8]) {
    let said = async {
        stream.write_all(bytes).await?;
        stream.shutdown().await?;
        tokio::io::copy(&mut (&mut stream).take(MAX_DRAINED), &mut tokio::io::sink()).await
    };
    // A client that has gone, or does not read, is not waited for.
    let _ = tokio::time::timeout(LINGER, said).await;
}

/// The body of a refusal: what was refused, why, and by which rule.
pub(super) fn text(reason: &str, rule: &str) -> String {
    format!("The sandbox's network policy refuses this: {reason} (rule: {rule}).\n")
}
