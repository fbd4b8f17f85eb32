//! Connections to the store: who opens them ([`Dial`]), TLS over them, and the client that keeps and reuses them.
//!
//! The process that uses grants may have no network of its own. Then somebody else dials and hands over the connected socket; TLS still
//! runs here, from end to end, so that who dialled sees neither URLs nor bytes.

use std::{
    error::Error,
    fmt,
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use http::Uri;
use http_body_util::Full;
use hyper_util::{
    client::legacy::{
        Client,
        connect::{Connected, Connection},
    },
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use tokio::net::TcpStream;
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{ClientConfig, RootCertStore, crypto::ring, pki_types::ServerName},
};

/// How long a connection may take to be there, TLS included.
const CONNECT: Duration = Duration::from_secs(10);
/// A connection that nobody used for this long is closed. Until then all of a burst stay: with 4 kept a VMM had 0.9 MiB less after a wake from the
/// store, but its hot set came up to a quarter later, for connections were dropped and dialled again all through it.
const IDLE: Duration = Duration::from_secs(90);
/// Bytes that a connection reads at once at most. It keeps the buffer while it is idle, and there are as many as there were transfers at once.
const READ_AT_ONCE: usize = 32 << 10;

/// Opens TCP connections.
#[async_trait]
pub trait Dial: Send + Sync + fmt::Debug {
    /// A connection to a port of a host, by name or address. The caller bounds the wait.
    async fn dial(&self, host: &str, port: u16) -> io::Result<TcpStream>;
}

/// Dials by itself.
#[derive(Debug)]
pub struct Direct;

#[async_trait]
impl Dial for Direct {
    async fn dial(&self, host: &str, port: u16) -> io::Result<TcpStream> {
        TcpStream::connect((host, port)).await
    }
}

/// The client for granted URLs. Clones share their connections.
#[derive(Clone, Debug)]
pub struct StoreClient(pub(super) Client<Connector, Full<Bytes>>);

impl StoreClient {
    /// One whose connections `dial` opens.
    pub fn new(dial: Arc<dyn Dial>) -> Result<Self, tokio_rustls::rustls::Error> {
        let mut roots = RootCertStore::empty();
        roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let connector = Connector { dial, tls: TlsConnector::from(Arc::new(tls)) };
        // HTTP/1.1: a hedge needs a connection of its own, and bulk transfers gain nothing from sharing one.
        let client = Client::builder(TokioExecutor::new())
            .pool_idle_timeout(IDLE)
            .pool_timer(TokioTimer::new())
            .http1_max_buf_size(READ_AT_ONCE)
            .timer(TokioTimer::new())
            .build(connector);
        Ok(Self(client))
    }
}

/// Opens what the client asks for: `http` or `https`.
#[derive(Clone)]
pub(super) struct Connector {
    dial: Arc<dyn Dial>,
    tls: TlsConnector,
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.dial.fmt(f)
    }
}

type BoxError = Box<dyn Error + Send + Sync>;

impl Connector {
    async fn connect(self, uri: Uri) -> Result<Stream, BoxError> {
        let host = uri.host().ok_or("the URL has no host")?.trim_start_matches('[').trim_end_matches(']').to_owned();
        let encrypted = uri.scheme_str() == Some("https");
        let port = uri.port_u16().unwrap_or(if encrypted { 443 } else { 80 });
        let dialled = self.dial.dial(&host, port).await?;
        dialled.set_nodelay(true)?;
        if !encrypted {
            return Ok(Stream::Plain(TokioIo::new(dialled)));
        }
        let stream = self.tls.connect(ServerName::try_from(host)?, dialled).await?;
        Ok(Stream::Encrypted(Box::new(TokioIo::new(stream))))
    }
}

impl tower_service::Service<Uri> for Connector {
    type Response = Stream;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Stream, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = self.clone().connect(uri);
        Box::pin(async move {
            let late = |_| io::Error::new(io::ErrorKind::TimedOut, "no connection in time");
            tokio::time::timeout(CONNECT, connecting).await.map_err(late)?
        })
    }
}

/// A connection.
pub(super) enum Stream {
    Plain(TokioIo<TcpStream>),
    Encrypted(Box<TokioIo<TlsStream<TcpStream>>>),
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl hyper::rt::Read for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Encrypted(stream) => Pin::new(stream.as_mut()).poll_read(cx, buf),
        }
    }
}

impl hyper::rt::Write for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Encrypted(stream) => Pin::new(stream.as_mut()).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Encrypted(stream) => Pin::new(stream.as_mut()).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Encrypted(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Encrypted(stream) => Pin::new(stream.as_mut()).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Encrypted(stream) => stream.is_write_vectored(),
        }
    }
}
