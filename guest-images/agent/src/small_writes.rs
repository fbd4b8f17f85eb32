//! Writes to vsock of a size that the guest's kernel has memory for.
//!
//! Linux copies what one write takes, up to 64 KiB, into a single allocation. Beyond eight pages in a row it would rather say ENOMEM than tidy
//! its memory, and the connection would break in a guest whose memory is merely used well.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes that one write takes at most: eight pages, the most that Linux finds however scattered its free memory is.
const MOST: usize = 32 * 1024;

/// A stream whose writes take at most [`MOST`] bytes each.
pub(crate) struct SmallWrites<S>(pub(crate) S);

impl<S: AsyncRead + Unpin> AsyncRead for SmallWrites<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for SmallWrites<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, &bytes[..bytes.len().min(MOST)])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn a_large_write_goes_in_pieces_and_loses_nothing() {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        let mut near = SmallWrites(near);
        let sent: Vec<u8> = (0..=250).cycle().take(3 * MOST + 5).collect();
        assert_eq!(near.write(&sent).await.unwrap(), MOST);
        near.write_all(&sent[MOST..]).await.unwrap();
        near.shutdown().await.unwrap();
        let mut got = Vec::new();
        far.read_to_end(&mut got).await.unwrap();
        assert!(got == sent);
    }
}
