//! Four network namespaces and what is in them.
//!
//! ```text
//! guest ── sandbox (redirects TCP 80/443 to the proxy's socket; DNS)        host (the proxy) ── world (servers, name server)
//! ```
//!
//! Guest and host are not connected: whatever the guest reaches, the proxy has let it.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{RData, Record, RecordType};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use stasis_egress::authority;
use stasis_egress::control::Client;
use stasis_egress::control::types::{Authority, Policy, PutSandbox, SocketKinds, Sockets};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

/// The servers' public address.
pub(crate) const PUBLIC: Ipv4Addr = Ipv4Addr::new(93, 184, 216, 34);
/// Another one, which no allowed name leads to.
pub(crate) const OTHER: Ipv4Addr = Ipv4Addr::new(93, 184, 216, 99);
/// A server of raw bytes, on port 443; see `measure`.
pub(crate) const BULK: Ipv4Addr = Ipv4Addr::new(93, 184, 216, 77);
const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(93, 184, 216, 53);
/// Servers that must not be reached.
pub(crate) const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 9);
pub(crate) const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// The host's own address.
pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(93, 184, 216, 1);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 1);
const PROXY_PORT: u16 = 3128;
/// Names of servers.
const NAMES: [&str; 4] = ["a.example.com", "b.example.com", "api.example.com", "evil.example.org"];
/// The key of the sandbox.
pub(crate) const KEY: &str = "sbx-test";

static WORLDS: AtomicU32 = AtomicU32::new(0);

/// Runs a program to its end.
pub(crate) fn run(line: &str) -> Output {
    let mut words = line.split(' ').filter(|w| !w.is_empty());
    let program = words.next().expect("a program");
    #[expect(clippy::disallowed_methods, reason = "the test's own tools")]
    let output = Command::new(program).args(words).stdin(Stdio::null()).output();
    output.unwrap_or_else(|e| panic!("{line}: {e}"))
}

fn must(line: &str) {
    let output = run(line);
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Does something in another network namespace; sockets that it makes stay there.
pub(crate) fn within<T: Send + 'static>(namespace: &str, act: impl FnOnce() -> T + Send + 'static) -> T {
    let file = std::fs::File::open(format!("/run/netns/{namespace}")).unwrap();
    let thread = std::thread::spawn(move || {
        use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        act()
    });
    thread.join().unwrap()
}

/// The namespaces, which go with this.
struct Namespaces(String);

impl Namespaces {
    fn names(&self) -> [String; 4] {
        ["g", "s", "h", "w"].map(|part| format!("{}{part}", self.0))
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        let names = self.names();
        let _ = std::fs::remove_dir_all(format!("/etc/netns/{}", names[0]));
        for name in names {
            run(&format!("ip netns del {name}"));
        }
    }
}

/// See the module. All of it goes when this is dropped.
pub(crate) struct World {
    id: Namespaces,
    pub(crate) dir: tempfile::TempDir,
    proxy: Child,
    pub(crate) client: Client,
    pub(crate) authority: Authority,
}

impl World {
    pub(crate) fn guest(&self) -> String {
        format!("{}g", self.id.0)
    }

    /// The namespace that the proxy is in.
    pub(crate) fn host(&self) -> String {
        format!("{}h", self.id.0)
    }

    /// The namespace that the servers are in.
    pub(crate) fn world(&self) -> String {
        format!("{}w", self.id.0)
    }

    /// Everything, with a proxy that has no sandbox yet.
    pub(crate) async fn new() -> Self {
        let id = format!("eg{}x{}", std::process::id(), WORLDS.fetch_add(1, Ordering::Relaxed));
        let id = Namespaces(id);
        let [guest, sandbox, host, world] = id.names();
        for namespace in [&guest, &sandbox, &host, &world] {
            must(&format!("ip netns add {namespace}"));
            must(&format!("ip -n {namespace} link set lo up"));
        }
        let link = |a: &str, a_addresses: &[String], b: &str, b_addresses: &[String]| {
            must(&format!("ip -n {a} link add eth0 type veth peer name eth0 netns {b}"));
            for (namespace, addresses) in [(a, a_addresses), (b, b_addresses)] {
                for address in addresses {
                    must(&format!("ip -n {namespace} addr add {address} dev eth0"));
                }
                must(&format!("ip -n {namespace} link set eth0 up"));
            }
        };
        link(&guest, &["10.0.2.2/24".to_owned()], &sandbox, &[format!("{GATEWAY}/24")]);
        must(&format!("ip -n {guest} route add default via {GATEWAY}"));
        let public = |address: Ipv4Addr| format!("{address}/24");
        let servers = [
            public(PUBLIC),
            public(OTHER),
            public(BULK),
            public(NAME_SERVER),
            format!("{PRIVATE}/24"),
            format!("{METADATA}/16"),
        ];
        link(&host, &[public(HOST)], &world, &servers);
        must(&format!("ip -n {host} route add default via {PUBLIC}"));
        let rules = format!(
            "table ip egress {{ chain pre {{ type nat hook prerouting priority -100; iifname eth0 tcp dport {{ 80, 443 }} redirect to :{PROXY_PORT}\n}}\n}}\n"
        );
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("rules"), rules).unwrap();
        must(&format!("ip netns exec {sandbox} nft -f {}", dir.path().join("rules").display()));
        std::fs::create_dir_all(format!("/etc/netns/{guest}")).unwrap();
        std::fs::write(format!("/etc/netns/{guest}/resolv.conf"), format!("nameserver {GATEWAY}\n")).unwrap();

        let tls = certificates(dir.path());
        serve_world(&world, &host, &tls);
        let socket = dir.path().join("control.sock");
        let (host_name, socket_name) = (host.clone(), socket.clone());
        let roots = dir.path().join("ca.pem");
        #[expect(clippy::disallowed_methods, reason = "the process under test")]
        let proxy = Command::new("ip")
            .args(["netns", "exec", &host_name, env!("CARGO_BIN_EXE_stasis-egress"), "--control-socket"])
            .arg(&socket_name)
            .args(["--upstream", &format!("{NAME_SERVER}:53"), "--extra-roots"])
            .arg(roots)
            .spawn()
            .unwrap();
        let client = Client::new(&socket);
        let world = Self { id, dir, proxy, client, authority: authority::make("test sandbox").unwrap() };
        world.until_it_answers().await;
        world
    }

    async fn until_it_answers(&self) {
        let answers = async {
            while self.client.status().await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), answers).await.expect("the proxy does not answer");
    }

    /// Gives the proxy the sandbox, with sockets made in its namespace.
    pub(crate) async fn put(&self, generation: u64, policy: Policy) {
        let sockets = self.sockets();
        let put = PutSandbox {
            key: KEY.to_owned(),
            generation,
            policy,
            authority: Some(self.authority.clone()),
            sockets: SocketKinds::default(),
        };
        self.client.put(put, &sockets).await.unwrap();
    }

    pub(crate) fn sockets(&self) -> Sockets {
        within(&format!("{}s", self.id.0), || {
            // A socket that is being closed by the proxy holds its address for a moment.
            let again = |make: &dyn Fn() -> std::io::Result<Sockets>| {
                let deadline = std::time::Instant::now() + Duration::from_secs(5);
                loop {
                    match make() {
                        Ok(sockets) => return sockets,
                        Err(error) if std::time::Instant::now() > deadline => panic!("{error}"),
                        Err(_) => std::thread::yield_now(),
                    }
                }
            };
            again(&|| {
                Ok(Sockets {
                    proxy: Some(TcpListener::bind((Ipv4Addr::UNSPECIFIED, PROXY_PORT))?),
                    dns_udp: Some(UdpSocket::bind((GATEWAY, 53))?),
                    dns_tcp: Some(TcpListener::bind((GATEWAY, 53))?),
                })
            })
        })
    }

    /// Runs curl as the guest: exit status, and what it says.
    pub(crate) async fn curl(&self, arguments: &str) -> (i32, String) {
        let line = format!("ip netns exec {} curl -sS -m 15 {arguments}", self.guest());
        let output = tokio::task::spawn_blocking(move || run(&line)).await.unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned())
    }

    /// The id of the proxy's process.
    pub(crate) fn proxy_id(&self) -> u32 {
        self.proxy.id()
    }

    /// Waits for the end of the proxy.
    pub(crate) fn ended(&mut self) -> std::process::ExitStatus {
        self.proxy.wait().unwrap()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.proxy.kill();
        let _ = self.proxy.wait();
    }
}

/// An authority in `ca.pem`, and a certificate for [`NAMES`] by it.
fn certificates(dir: &Path) -> Arc<ServerConfig> {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // OpenSSL takes a certificate for self-signed whose issuer is called the same.
    params.distinguished_name.push(rcgen::DnType::CommonName, "test root");
    std::fs::write(dir.join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
    let own = KeyPair::generate().unwrap();
    let names: Vec<String> = NAMES.map(str::to_owned).into();
    let certificate = CertificateParams::new(names).unwrap().signed_by(&own, &Issuer::new(params, key)).unwrap();
    let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(own.serialize_der()));
    let builder = ServerConfig::builder_with_provider(Arc::new(default_provider()));
    let builder = builder.with_safe_default_protocol_versions().unwrap().with_no_client_auth();
    Arc::new(builder.with_single_cert(vec![certificate.der().clone()], der).unwrap())
}

fn serve_world(world: &str, host: &str, tls: &Arc<ServerConfig>) {
    let listen = |namespace: &str, address: Ipv4Addr, port: u16| {
        let socket = within(namespace, move || TcpListener::bind((address, port)).unwrap());
        socket.set_nonblocking(true).unwrap();
        tokio::net::TcpListener::from_std(socket).unwrap()
    };
    for address in [PUBLIC, OTHER, PRIVATE, METADATA] {
        tokio::spawn(serve_http(listen(world, address, 80), address, None));
        tokio::spawn(serve_http(listen(world, address, 443), address, Some(TlsAcceptor::from(Arc::clone(tls)))));
    }
    tokio::spawn(serve_http(listen(host, HOST, 80), HOST, None));
    let dns = within(world, || UdpSocket::bind((NAME_SERVER, 53)).unwrap());
    dns.set_nonblocking(true).unwrap();
    tokio::spawn(serve_dns(tokio::net::UdpSocket::from_std(dns).unwrap()));
}

/// Answers each connection's first request with who it is and what it got. `/bytes` becomes an endless stream.
async fn serve_http(listener: tokio::net::TcpListener, address: Ipv4Addr, tls: Option<TlsAcceptor>) {
    while let Ok((stream, _)) = listener.accept().await {
        let tls = tls.clone();
        tokio::spawn(async move {
            match tls {
                None => answer(stream, address).await,
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        answer(stream, address).await;
                    }
                }
            }
        });
    }
}

async fn answer(mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin, address: Ipv4Addr) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    let text = format!("this is {address}\n{}", String::from_utf8_lossy(&head));
    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}", text.len());
    let _ = stream.write_all(answer.as_bytes()).await;
    let _ = stream.shutdown().await;
}

async fn serve_dns(socket: tokio::net::UdpSocket) {
    let mut buffer = [0; 1500];
    while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
        let mut message = Message::from_vec(&buffer[..length]).unwrap();
        message.metadata.message_type = MessageType::Response;
        let query = message.queries[0].clone();
        let address = match query.name().to_ascii().as_str() {
            "private.example.com." => Some(PRIVATE),
            "metadata.example.com." => Some(METADATA),
            "host.example.com." => Some(HOST),
            name if NAMES.iter().any(|n| name.strip_suffix('.') == Some(n)) => Some(PUBLIC),
            _ => None,
        };
        match address {
            Some(address) if query.query_type() == RecordType::A => {
                message.add_answer(Record::from_rdata(query.name().clone(), 60, RData::A(A(address))));
            }
            Some(_) => {}
            None => message.metadata.response_code = ResponseCode::NXDomain,
        }
        let _ = socket.send_to(&message.to_vec().unwrap(), from).await;
    }
}

/// Asks the guest's resolver over UDP: the answer's code and addresses.
pub(crate) async fn ask(world: &World, name: &str, kind: RecordType) -> (ResponseCode, Vec<Ipv4Addr>) {
    let socket = within(&world.guest(), || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap());
    socket.set_nonblocking(true).unwrap();
    let socket = tokio::net::UdpSocket::from_std(socket).unwrap();
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    let name = hickory_proto::rr::Name::from_ascii(name).unwrap();
    message.add_query(hickory_proto::op::Query::query(name, kind));
    socket.send_to(&message.to_vec().unwrap(), SocketAddr::from((GATEWAY, 53))).await.unwrap();
    let mut buffer = [0; 1500];
    let length =
        tokio::time::timeout(Duration::from_secs(15), socket.recv(&mut buffer)).await.expect("no answer").unwrap();
    let answer = Message::from_vec(&buffer[..length]).unwrap();
    let address = |r: &Record| if let RData::A(a) = &r.data { Some(a.0) } else { None };
    (answer.metadata.response_code, answer.answers.iter().filter_map(address).collect())
}

/// The file with what servers are trusted by.
pub(crate) fn roots(world: &World) -> PathBuf {
    world.dir.path().join("ca.pem")
}
