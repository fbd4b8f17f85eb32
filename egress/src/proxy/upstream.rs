//! Connections to servers, plain and over TLS. The server's certificate is verified against the public roots and those of the operator; what a
//! guest trusts does not count.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::client::Resumption;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, Error as TlsError, RootCertStore};

use crate::control::types::RefusalKind;
use crate::counters::Refused;
use crate::names::Name;

/// Addresses of a name that are tried.
const MAX_TRIED: usize = 4;

/// What servers' certificates are verified with.
#[derive(Clone)]
pub(crate) struct Roots(ClientConfig);

/// A certificate of the operator is none.
#[derive(Debug, thiserror::Error)]
#[error("cannot use a root certificate")]
pub struct RootError(#[source] TlsError);

impl Roots {
    /// The public roots and `extra` ones.
    pub(crate) fn new(extra: &[Vec<u8>]) -> Result<Self, RootError> {
        let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
        for root in extra {
            roots.add(CertificateDer::from_slice(root)).map_err(RootError)?;
        }
        let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()));
        let builder = builder.with_safe_default_protocol_versions().map_err(RootError)?;
        let mut config = builder.with_root_certificates(roots).with_no_client_auth();
        // A ticket of one sandbox's connection must not be used for another's.
        config.resumption = Resumption::disabled();
        Ok(Self(config))
    }

    fn connector(&self, alpn: &[Vec<u8>]) -> TlsConnector {
        let mut config = self.0.clone();
        config.alpn_protocols = alpn.to_vec();
        TlsConnector::from(Arc::new(config))
    }
}

/// A connection to the first of `addresses` that takes one.
pub(super) async fn connect(addresses: &[Ipv4Addr], port: u16, within: Duration) -> Result<TcpStream, Refused> {
    let mut last = None;
    for address in addresses.iter().take(MAX_TRIED) {
        let tried = tokio::time::timeout(within, TcpStream::connect(SocketAddrV4::new(*address, port))).await;
        match tried.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = Some((*address, error)),
        }
    }
    let (address, error) = last.unwrap_or((Ipv4Addr::UNSPECIFIED, io::ErrorKind::AddrNotAvailable.into()));
    let reason = format!("cannot connect to {address} port {port}: {error}");
    Err(Refused::new(RefusalKind::NotReachable, reason).at(address))
}

/// TLS with the server called `name`, which is offered `alpn`.
pub(super) async fn tls(
    roots: &Roots,
    name: &Name,
    alpn: &[Vec<u8>],
    stream: TcpStream,
    within: Duration,
) -> Result<TlsStream<TcpStream>, Refused> {
    let _ = stream.set_nodelay(true);
    let failed = |kind, reason: String| Err(Refused::new(kind, reason).of(name));
    let Ok(server) = ServerName::try_from(name.to_string()) else {
        return failed(RefusalKind::Malformed, format!("{name} cannot be a server's name in TLS"));
    };
    match tokio::time::timeout(within, roots.connector(alpn).connect(server, stream)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => match error.get_ref().and_then(|e| e.downcast_ref::<TlsError>()) {
            Some(TlsError::InvalidCertificate(why)) => {
                failed(RefusalKind::UpstreamCertificate, format!("the certificate of {name} is not trusted: {why}"))
            }
            _ => failed(RefusalKind::NotReachable, format!("TLS with {name} failed: {error}")),
        },
        Err(_) => failed(RefusalKind::NotReachable, format!("TLS with {name} took longer than {within:?}")),
    }
}
