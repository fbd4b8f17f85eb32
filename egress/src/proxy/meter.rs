//! Bytes of one connection, counted for the rule that let them pass, and the time since the last one. `Up` is from the sandbox.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use crate::counters::Tally;
use crate::rules::Rule;

/// See the module.
pub(crate) struct Meter {
    rule: RwLock<Arc<Tally>>,
    began: Instant,
    /// When the last byte moved, ms after `began`.
    moved: AtomicU64,
}

impl Meter {
    /// Counts for `rule` until told otherwise.
    pub(crate) fn new(rule: &Rule) -> Arc<Self> {
        Arc::new(Self { rule: RwLock::new(Arc::clone(&rule.tally)), began: Instant::now(), moved: AtomicU64::new(0) })
    }

    /// Counts for `rule` from now on.
    pub(crate) fn count_for(&self, rule: &Rule) {
        *self.rule.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&rule.tally);
    }

    pub(crate) fn up(&self, bytes: usize) {
        self.touch();
        self.rule.read().unwrap_or_else(PoisonError::into_inner).up(bytes as u64);
    }

    pub(crate) fn down(&self, bytes: usize) {
        self.touch();
        self.rule.read().unwrap_or_else(PoisonError::into_inner).down(bytes as u64);
    }

    fn touch(&self) {
        self.moved.store(u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX), Relaxed);
    }

    /// Returns when nothing has moved for `within`.
    pub(crate) async fn silent_for(&self, within: Duration) {
        loop {
            let end = self.began + Duration::from_millis(self.moved.load(Relaxed)) + within;
            if end <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(end).await;
        }
    }
}

/// The guest's end of a connection with a meter on it, and with what was read of it before.
pub(crate) struct Metered<S> {
    inner: S,
    before: Vec<u8>,
    given: usize,
    meter: Arc<Meter>,
}

impl<S> Metered<S> {
    /// `before` is read first.
    pub(crate) fn new(inner: S, before: Vec<u8>, meter: Arc<Meter>) -> Self {
        Self { inner, before, given: 0, meter }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Metered<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let rest = this.before.get(this.given..).unwrap_or_default();
        let length = if rest.is_empty() {
            let before = buffer.filled().len();
            ready!(Pin::new(&mut this.inner).poll_read(cx, buffer))?;
            buffer.filled().len() - before
        } else {
            let length = rest.len().min(buffer.remaining());
            buffer.put_slice(rest.get(..length).unwrap_or_default());
            this.given += length;
            if this.given == this.before.len() {
                (this.before, this.given) = (Vec::new(), 0);
            }
            length
        };
        this.meter.up(length);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Metered<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.inner).poll_write(cx, bytes))?;
        self.meter.down(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.inner).poll_write_vectored(cx, bytes))?;
        self.meter.down(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
