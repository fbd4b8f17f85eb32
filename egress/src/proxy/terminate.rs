//! TLS ended here, for the domains of transforms alone. The server is reached first, so that the guest is offered exactly the protocol that the
//! server chose; a server that cannot be reached, or is not trusted, is answered for by 502, in a protocol of the guest's own choice.

use std::io;
use std::net::SocketAddrV4;
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::server::{ClientHello as Hello, NoServerSessionStorage, ResolvesServerCert};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{AlertDescription, Error as TlsError, ServerConfig};

use super::meter::{Meter, Metered};
use super::requests::{Leads, Server, Session};
use super::upstream;
use crate::control::types::{RefusalKind, Via};
use crate::counters::Refused;
use crate::names::Name;
use crate::rules::{Rewrite, Rule};
use crate::sandbox::{Era, Sandbox};
use crate::tls::client_hello::ClientHello;

/// ALPN of HTTP/1.1.
pub(super) const HTTP_1_1: &[u8] = b"http/1.1";
/// ALPN of HTTP/2.
pub(super) const HTTP_2: &[u8] = b"h2";

/// The one certificate of a connection.
#[derive(Debug)]
struct Only(Arc<CertifiedKey>);

impl ResolvesServerCert for Only {
    fn resolve(&self, _: Hello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

/// TLS with the server that `name` leads to.
pub(super) async fn reach(
    sandbox: &Sandbox,
    era: &Era,
    name: &Name,
    port: u16,
    alpn: &[Vec<u8>],
) -> Result<TlsStream<TcpStream>, Refused> {
    let deadlines = sandbox.shared.settings.deadlines;
    let found = sandbox.resolver.resolve(name, &era.rules).await?;
    let stream = upstream::connect(&found.addresses, port, deadlines.connect).await.map_err(|r| r.of(name))?;
    upstream::tls(&sandbox.shared.roots, name, alpn, stream, deadlines.handshake).await
}

/// What of a guest's connection is known when its TLS is ended.
pub(super) struct Ended {
    pub(super) name: Name,
    pub(super) hello: ClientHello,
    /// What was read of it, the ClientHello.
    pub(super) first: Vec<u8>,
    pub(super) destination: SocketAddrV4,
    pub(super) rule: Rule,
    pub(super) rewrite: Arc<Rewrite>,
}

/// Ends TLS of `guest` and serves its requests.
pub(super) async fn run(sandbox: &Arc<Sandbox>, era: &Arc<Era>, guest: TcpStream, ended: Ended) {
    let Ended { name, hello, first, destination, rule, rewrite } = ended;
    let port = destination.port();
    let refuse = |refused: &Refused| sandbox.refuse(&rule, Via::Tls, refused, Some(port));
    let offered: Vec<Vec<u8>> = hello.alpn.into_iter().filter(|p| *p == HTTP_1_1 || *p == HTTP_2).collect();
    let reached = reach(sandbox, era, &name, port, &offered).await;
    let chosen = match &reached {
        Ok(server) => server.get_ref().1.alpn_protocol().map(<[u8]>::to_vec),
        Err(refused) => {
            refuse(refused);
            let plain = offered.iter().find(|p| **p == HTTP_1_1).or(offered.first());
            plain.cloned()
        }
    };
    let config = match config(era, &name, chosen.clone()) {
        Ok(config) => config,
        Err(refused) => return refuse(&refused),
    };
    let meter = Meter::new(&rule);
    let stream = Metered::new(guest, first, Arc::clone(&meter));
    let within = sandbox.shared.settings.deadlines.handshake;
    let guest = match tokio::time::timeout(within, TlsAcceptor::from(config).accept(stream)).await {
        Ok(Ok(guest)) => guest,
        Ok(Err(error)) => return refuse(&of_handshake(&error, &name)),
        Err(_) => {
            return refuse(&Refused::new(RefusalKind::TooSlow, "the TLS handshake did not end in time").of(&name));
        }
    };
    let http2 = chosen.as_deref() == Some(HTTP_2);
    let session = Arc::new(Session {
        sandbox: Arc::clone(sandbox),
        era: Arc::clone(era),
        meter,
        destination,
        leads: Leads::To { name: name.clone(), rule: rule.clone(), rewrite },
        http2,
        server: Mutex::new(None),
    });
    if let Ok(server) = reached {
        match session.start(TokioIo::new(server), http2).await {
            Ok(sender) => *session.server.lock().await = Some((Server::Name(name), sender)),
            Err(refused) => refuse(&refused),
        }
    }
    session.serve(TokioIo::new(guest)).await;
}

fn config(era: &Era, name: &Name, alpn: Option<Vec<u8>>) -> Result<Arc<ServerConfig>, Refused> {
    let internal = |error: &dyn std::error::Error| {
        Refused::new(RefusalKind::NotReachable, format!("TLS cannot be ended: {}", crate::chain(error))).of(name)
    };
    let authority = era.authority.as_ref();
    let authority = authority.ok_or_else(|| Refused::new(RefusalKind::NotReachable, "there is no authority"))?;
    let leaf = authority.leaf(name).map_err(|e| internal(&e))?;
    let builder = ServerConfig::builder_with_provider(Arc::new(default_provider()));
    let builder = builder.with_safe_default_protocol_versions().map_err(|e| internal(&e))?;
    let mut config = builder.with_no_client_auth().with_cert_resolver(Arc::new(Only(leaf)));
    config.alpn_protocols = alpn.into_iter().collect();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// Why a guest's handshake failed. A client that does not trust the authority says so by an alert, or by leaving when it has seen the certificate.
fn of_handshake(error: &io::Error, name: &Name) -> Refused {
    let distrust = |how: String| {
        let reason = format!(
            "the client does not trust the sandbox's authority, or expects another certificate of {name}: {how}"
        );
        Refused::new(RefusalKind::ClientDistrust, reason).of(name)
    };
    match error.get_ref().and_then(|e| e.downcast_ref::<TlsError>()) {
        Some(TlsError::AlertReceived(
            alert @ (AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateRevoked
            // An authority of the same name with another key.
            | AlertDescription::DecryptError),
        )) => distrust(format!("it sent the alert {alert:?}")),
        None if error.kind() == io::ErrorKind::UnexpectedEof || error.kind() == io::ErrorKind::ConnectionReset => {
            distrust("it left after the certificate".to_owned())
        }
        _ => Refused::new(RefusalKind::Malformed, format!("the TLS handshake failed: {error}")).of(name),
    }
}
