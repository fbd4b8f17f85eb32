//! What is around the proxy in its tests: a name server, servers with certificates of an authority of their own, and guests.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{RData, Record};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::addresses::{OperatorRanges, Range};
use crate::authority;
use crate::config::Settings;
use crate::control::types::{Authority, Mode, Policy, RefusalKind, Secret, Transform};
use crate::counters::Counters;
use crate::proxy::connection;
use crate::proxy::upstream::Roots;
use crate::sandbox::{Sandbox, Shared};

/// Longest that anything in these tests may take.
pub(super) const SOON: Duration = Duration::from_secs(20);
/// What must not be seen anywhere.
pub(super) const SECRET: &str = "Bearer s3cret-value";

/// `future`, in time.
pub(super) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future).await.expect("it hangs")
}

/// Everything around one sandbox.
pub(super) struct World {
    pub(super) sandbox: Arc<Sandbox>,
    /// The sandbox's authority.
    pub(super) authority: Authority,
    /// What servers are trusted by.
    pub(super) root: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl World {
    /// A sandbox with this policy; `*.example.com` and `*.example.org` lead to loopback, `private.example.com` to 10.0.0.1.
    pub(super) async fn new(policy: &Policy) -> Self {
        Self::with(policy, |_| {}).await
    }

    /// The same with other settings.
    pub(super) async fn with(policy: &Policy, change: impl FnOnce(&mut Settings)) -> Self {
        let names = HashMap::from([("private.example.com.", Ipv4Addr::new(10, 0, 0, 1))]);
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap().der().clone();
        let mut settings = Settings {
            ranges: OperatorRanges { permitted: vec![Range::parse("127.0.0.0/8").unwrap()], refused: Vec::new() },
            upstreams: vec![name_server(names).await],
            extra_roots: vec![root.to_vec()],
            ..Settings::default()
        };
        settings.deadlines.head = Duration::from_millis(700);
        change(&mut settings);
        let shared = Shared {
            servers: Arc::new(settings.upstreams.clone().into()),
            roots: Roots::new(&settings.extra_roots).unwrap(),
            settings,
        };
        let authority = authority::make("sandbox").unwrap();
        let counters = Arc::new(Counters::default());
        let sandbox = Sandbox::new(&Arc::new(shared), counters, policy, Some(&authority)).unwrap();
        Self { sandbox, authority, root, issuer: Issuer::new(params, key) }
    }

    /// A guest's connection that was to `port` of some public address.
    pub(super) async fn guest(&self, port: u16) -> TcpStream {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let guest = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let (sandbox, era) = (Arc::clone(&self.sandbox), self.sandbox.era());
        let destination = SocketAddrV4::new(Ipv4Addr::new(93, 184, 216, 34), port);
        era.clone().spawn(async move { connection::serve(&sandbox, &era, stream, destination).await });
        guest
    }

    /// What a server called `names` needs for TLS.
    pub(super) fn server_config(&self, names: &[&str], alpn: &[&[u8]]) -> Arc<ServerConfig> {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &self.issuer).unwrap();
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let builder = ServerConfig::builder_with_provider(Arc::new(default_provider()));
        let builder = builder.with_safe_default_protocol_versions().unwrap().with_no_client_auth();
        let mut config = builder.with_single_cert(vec![certificate.der().clone()], der).unwrap();
        config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
        Arc::new(config)
    }

    /// A server over TLS that sends back what it gets, with its name before it.
    pub(super) async fn echo_tls(&self, name: &'static str) -> u16 {
        let acceptor = TlsAcceptor::from(self.server_config(&[name], &[]));
        listen(move |stream| {
            let acceptor = acceptor.clone();
            async move {
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                stream.write_all(name.as_bytes()).await.unwrap();
                let (mut read, mut write) = tokio::io::split(stream);
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            }
        })
        .await
    }

    /// The kinds of the refusals so far.
    pub(super) fn refusals(&self) -> Vec<RefusalKind> {
        self.sandbox.counters.report(0).refusals.iter().map(|r| r.kind).collect()
    }

    /// The secret is in nothing that is told.
    pub(super) fn keeps_its_secret(&self) {
        let report = serde_json::to_string(&self.sandbox.counters.report(0)).unwrap();
        assert!(!report.contains("s3cret"), "{report}");
    }
}

/// A server that does this with each connection; its port.
pub(super) async fn listen<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> u16
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream));
        }
    });
    port
}

async fn name_server(names: HashMap<&'static str, Ipv4Addr>) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 1500];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let mut message = Message::from_vec(&buffer[..length]).unwrap();
            message.metadata.message_type = MessageType::Response;
            let name = message.queries[0].name().clone();
            let text = name.to_ascii();
            if text.ends_with(".example.com.") || text.ends_with(".example.org.") {
                let address = names.get(&*text).copied().unwrap_or(Ipv4Addr::LOCALHOST);
                message.add_answer(Record::from_rdata(name, 60, RData::A(A(address))));
            } else {
                message.metadata.response_code = ResponseCode::NXDomain;
            }
            socket.send_to(&message.to_vec().unwrap(), from).await.unwrap();
        }
    });
    address
}

/// A policy that allows these names, and changes requests to those of `transforms`.
pub(super) fn custom(domains: &[&str], transforms: &[&str]) -> Policy {
    let transform = |domain: &&str| Transform {
        domain: (*domain).to_owned(),
        inject_headers: [("authorization".to_owned(), Secret::new(SECRET.to_owned()))].into(),
        strip_headers: vec!["cookie".to_owned()],
    };
    Policy {
        mode: Mode::Custom,
        allow_domains: domains.iter().map(|d| (*d).to_owned()).collect(),
        allow_cidrs: Vec::new(),
        transforms: transforms.iter().map(transform).collect(),
    }
}

/// The roots that a guest trusts.
pub(super) fn trusting(pem: &str) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()).unwrap();
    roots
}

/// TLS of a guest.
pub(super) async fn tls(
    stream: TcpStream,
    name: &str,
    roots: RootCertStore,
    alpn: &[&[u8]],
) -> std::io::Result<TlsStream<TcpStream>> {
    let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()));
    let builder = builder.with_safe_default_protocol_versions().unwrap();
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

/// Sends `text` and reads until the end.
pub(super) async fn raw(mut stream: TcpStream, text: &str) -> String {
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let _ = soon(stream.read_to_end(&mut answer)).await;
    String::from_utf8_lossy(&answer).into_owned()
}
