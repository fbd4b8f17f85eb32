//! How long a connection has been silent: bytes of either direction count, whoever sent them.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

/// When bytes last moved.
#[derive(Debug)]
pub(super) struct Motion {
    origin: Instant,
    /// Milliseconds after `origin`.
    last: AtomicU64,
    gave_up: AtomicBool,
}

impl Motion {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { origin: Instant::now(), last: AtomicU64::new(0), gave_up: AtomicBool::new(false) })
    }

    fn note(&self) {
        let ms = u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(ms, Ordering::Relaxed);
    }

    /// Returns when nothing has moved for `limit`.
    pub(super) async fn silent_for(&self, limit: Duration) {
        loop {
            let end = self.origin + Duration::from_millis(self.last.load(Ordering::Relaxed)) + limit;
            if Instant::now() >= end {
                self.gave_up.store(true, Ordering::Relaxed);
                return;
            }
            tokio::time::sleep_until(end).await;
        }
    }

    /// [`Motion::silent_for`] has returned.
    pub(super) fn gave_up(&self) -> bool {
        self.gave_up.load(Ordering::Relaxed)
    }
}

/// A stream that notes its bytes.
#[derive(Debug)]
pub(super) struct Watched<S> {
    stream: S,
    motion: Arc<Motion>,
}

impl<S> Watched<S> {
    pub(super) fn new(stream: S, motion: Arc<Motion>) -> Self {
        Self { stream, motion }
    }

    fn sent(&self, outcome: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if matches!(outcome, Poll::Ready(Ok(n)) if n > 0) {
            self.motion.note();
        }
        outcome
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let outcome = Pin::new(&mut self.stream).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.motion.note();
        }
        outcome
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.sent(outcome)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write_vectored(cx, bytes);
        self.sent(outcome)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn bytes_of_either_direction_put_the_end_off() {
        let limit = Duration::from_millis(300);
        let (ours, mut theirs) = tokio::io::duplex(64);
        let motion = Motion::new();
        let mut ours = Watched::new(ours, motion.clone());
        let begun = Instant::now();
        let traffic = async {
            for _ in 0..4 {
                tokio::time::sleep(limit / 2).await;
                ours.write_all(b"x").await.unwrap();
                theirs.read_u8().await.unwrap();
                tokio::time::sleep(limit / 2).await;
                theirs.write_all(b"y").await.unwrap();
                ours.read_u8().await.unwrap();
            }
            begun.elapsed()
        };
        let (last, ()) = tokio::join!(traffic, motion.silent_for(limit));
        // A machine that stops for a while may end the silence early for the traffic, never before the limit.
        assert!(begun.elapsed() >= limit && (motion.gave_up() || last < limit));
    }

    #[tokio::test]
    async fn silence_ends_it() {
        let motion = Motion::new();
        let begun = Instant::now();
        motion.silent_for(Duration::from_millis(50)).await;
        assert!(motion.gave_up() && begun.elapsed() >= Duration::from_millis(50));
    }
}
