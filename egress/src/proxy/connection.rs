//! One connection of a guest: its first bytes are read, a rule is found, and it is passed on, ended here, or refused.

use std::net::SocketAddrV4;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::sync::Mutex;

use super::meter::{Meter, Metered};
use super::opening::{Opening, Openings};
use super::requests::{Leads, Session};
use super::{refusal, terminate, tunnel, upstream};
use crate::addresses;
use crate::control::types::{Mode, RefusalKind, Via};
use crate::counters::Refused;
use crate::names::{Name, NameError};
use crate::rules::{Rule, Verdict};
use crate::sandbox::{Era, Sandbox};
use crate::tls::Alert;
use crate::tls::client_hello::{ClientHello, HelloError};

/// Bytes read at once before it is known what they are.
const READ: usize = 4 << 10;
/// Where everything is TLS.
const HTTPS_PORT: u16 = 443;

/// Serves a connection that was to `destination`.
pub(super) async fn serve(sandbox: &Arc<Sandbox>, era: &Arc<Era>, stream: TcpStream, destination: SocketAddrV4) {
    let _ = stream.set_nodelay(true);
    let addressed = addressed(sandbox, era, destination);
    let connection = Connection { sandbox, era, destination };
    match addressed {
        // Whatever is said on it.
        Ok(Some(rule)) if !era.rules.has_transforms() => connection.to_address(stream, &rule, Vec::new()).await,
        Ok(addressed) => connection.by_its_opening(stream, addressed).await,
        Err((rule, refused)) => connection.refuse_unseen(stream, &rule, refused).await,
    }
}

/// The rule that lets everything to this destination pass, if there is one.
fn addressed(sandbox: &Sandbox, era: &Era, destination: SocketAddrV4) -> Result<Option<Rule>, (Rule, Refused)> {
    let rules = &era.rules;
    let rule = match rules.mode() {
        Mode::DenyAll => {
            let reason = "the policy allows nothing";
            let refused = Refused::new(RefusalKind::DeniedByMode, reason).at(*destination.ip());
            return Err((rules.default_rule().clone(), refused));
        }
        Mode::AllowAll => rules.default_rule(),
        Mode::Custom => match rules.address(*destination.ip()) {
            Some(rule) => rule,
            None => return Ok(None),
        },
    };
    let ranges = &sandbox.shared.settings.ranges;
    match ranges.admit(*destination.ip(), rules.ranges(), addresses::is_host) {
        Ok(()) => Ok(Some(rule.clone())),
        // In `custom` a name may still be allowed, which leads to wherever it does.
        Err(_) if rules.mode() == Mode::Custom => Ok(None),
        Err(why) => {
            let reason = format!("{} {why}", destination.ip());
            let refused = Refused::new(RefusalKind::AddressNotPublic, reason).at(*destination.ip());
            Err((rule.clone(), refused))
        }
    }
}

struct Connection<'a> {
    sandbox: &'a Arc<Sandbox>,
    era: &'a Arc<Era>,
    destination: SocketAddrV4,
}

impl Connection<'_> {
    async fn by_its_opening(&self, mut stream: TcpStream, addressed: Option<Rule>) {
        let deadlines = &self.sandbox.shared.settings.deadlines;
        let mut first = Vec::new();
        let speak = if addressed.is_some() { deadlines.first_byte } else { deadlines.head };
        let opening = match read_opening(&mut stream, &mut first, speak, deadlines.head).await {
            Ok(opening) => opening,
            Err(silence) => {
                // A server that speaks first, or a client that closes without a word.
                if let Some(rule) = addressed {
                    return self.to_address(stream, &rule, first).await;
                }
                if silence == Silence::Late {
                    let reason = "the client did not say in time where it wants to go";
                    self.refuse(Via::Tcp, self.era.rules.default_rule(), &Refused::new(RefusalKind::TooSlow, reason));
                    if first.first().is_none_or(u8::is_ascii_alphabetic) {
                        let text = refusal::text(reason, &self.era.rules.default_rule().label);
                        refusal::http1(stream, "408 Request Timeout", &text).await;
                    } else {
                        refusal::tls(stream, Alert::AccessDenied).await;
                    }
                }
                return;
            }
        };
        match (opening, addressed) {
            (Opening::Tls(hello), addressed) => self.tls(stream, hello, first, addressed).await,
            (Opening::Http1, addressed) if addressed.is_some() || self.destination.port() != HTTPS_PORT => {
                self.http1(stream, first, addressed).await;
            }
            (_, Some(rule)) => self.to_address(stream, &rule, first).await,
            (opening, None) => self.refuse_opening(stream, opening).await,
        }
    }

    async fn tls(&self, stream: TcpStream, hello: ClientHello, first: Vec<u8>, addressed: Option<Rule>) {
        let verdict = hello.server_name.clone().map(|name| (self.era.rules.name(&name), name));
        let (rule, refused, alert) = match (verdict, addressed) {
            (Some((Verdict::Change(rule, rewrite), name)), _) => {
                let destination = self.destination;
                let ended = terminate::Ended { name, hello, first, destination, rule, rewrite };
                return terminate::run(self.sandbox, self.era, stream, ended).await;
            }
            (_, Some(rule)) | (Some((Verdict::PassAsAddressed(rule), _)), None) => {
                return self.to_address(stream, &rule, first).await;
            }
            (Some((Verdict::Pass(rule), name)), None) => {
                if !hello.encrypted || self.sandbox.shared.settings.pass_encrypted_hello {
                    return self.to_name(stream, &rule, &name, first).await;
                }
                let reason = format!(
                    "the ClientHello for {name} has an encrypted_client_hello extension, behind which another name may be \
                     hidden: turn ECH off in the client"
                );
                (rule, Refused::new(RefusalKind::EncryptedClientHello, reason).of(&name), Alert::AccessDenied)
            }
            (Some((Verdict::Refuse(rule), name)), None) => {
                let refused = Refused::new(RefusalKind::NameNotAllowed, format!("no rule allows {name}")).of(&name);
                (rule, refused, Alert::AccessDenied)
            }
            (None, None) => {
                let reason = "the ClientHello has no server name, so no rule can allow it";
                let rule = self.era.rules.default_rule().clone();
                (rule, Refused::new(RefusalKind::NoName, reason), Alert::UnrecognizedName)
            }
        };
        self.refuse(Via::Tls, &rule, &refused.at(*self.destination.ip()));
        refusal::tls(stream, alert).await;
    }

    async fn http1(&self, stream: TcpStream, first: Vec<u8>, addressed: Option<Rule>) {
        let meter = Meter::new(addressed.as_ref().unwrap_or(self.era.rules.default_rule()));
        let session = Arc::new(Session {
            sandbox: Arc::clone(self.sandbox),
            era: Arc::clone(self.era),
            meter: Arc::clone(&meter),
            destination: self.destination,
            leads: Leads::Anywhere { addressed },
            http2: false,
            server: Mutex::new(None),
        });
        session.serve(TokioIo::new(Metered::new(stream, first, meter))).await;
    }

    /// A tunnel to the address that the guest chose.
    async fn to_address(&self, stream: TcpStream, rule: &Rule, first: Vec<u8>) {
        let addresses = [*self.destination.ip()];
        let within = self.sandbox.shared.settings.deadlines.connect;
        let connected = upstream::connect(&addresses, self.destination.port(), within).await;
        match connected {
            Ok(server) => self.tunnel(&stream, &server, rule, &first).await,
            Err(refused) => {
                self.refuse(Via::Tcp, rule, &refused);
                let _ = stream.set_zero_linger();
            }
        }
    }

    /// A tunnel to where the name leads.
    async fn to_name(&self, stream: TcpStream, rule: &Rule, name: &Name, first: Vec<u8>) {
        let connected = async {
            let found = self.sandbox.resolver.resolve(name, &self.era.rules).await?;
            let within = self.sandbox.shared.settings.deadlines.connect;
            upstream::connect(&found.addresses, self.destination.port(), within).await.map_err(|r| r.of(name))
        };
        match connected.await {
            Ok(server) => self.tunnel(&stream, &server, rule, &first).await,
            Err(refused) => {
                self.refuse(Via::Tls, rule, &refused);
                let alert = match refused.kind {
                    RefusalKind::NotResolved => Alert::UnrecognizedName,
                    RefusalKind::NotReachable => Alert::InternalError,
                    _ => Alert::AccessDenied,
                };
                refusal::tls(stream, alert).await;
            }
        }
    }

    async fn tunnel(&self, guest: &TcpStream, server: &TcpStream, rule: &Rule, first: &[u8]) {
        rule.tally.allow();
        let meter = Meter::new(rule);
        if let Err(refused) = tunnel::run(self.sandbox, guest, server, first, &meter).await {
            self.refuse(Via::Tcp, rule, &refused.at(*self.destination.ip()));
            let _ = guest.set_zero_linger();
        }
    }

    async fn refuse_opening(&self, stream: TcpStream, opening: Opening) {
        let rule = self.era.rules.default_rule();
        let address = *self.destination.ip();
        match opening {
            Opening::BadTls(error) => {
                let kind = match error {
                    HelloError::TooLarge => RefusalKind::TooLarge,
                    HelloError::ServerName(NameError::Address) => RefusalKind::IpLiteral,
                    HelloError::Malformed(_) | HelloError::ServerName(NameError::Malformed) => RefusalKind::Malformed,
                };
                self.refuse(Via::Tls, rule, &Refused::new(kind, error.to_string()).at(address));
                let alert = match error {
                    HelloError::ServerName(_) => Alert::UnrecognizedName,
                    _ => Alert::DecodeError,
                };
                refusal::tls(stream, alert).await;
            }
            Opening::CleartextHttp2 => {
                let reason = "HTTP/2 without TLS is not passed on: use HTTP/1.1";
                self.refuse(Via::Http, rule, &Refused::new(RefusalKind::CleartextHttp2, reason).at(address));
                refusal::http2(stream, &refusal::text(reason, &rule.label)).await;
            }
            Opening::Http1 | Opening::Tls(_) => {
                let reason = "on port 443 only TLS is passed on";
                self.refuse(Via::Http, rule, &Refused::new(RefusalKind::Malformed, reason).at(address));
                refusal::http1(stream, "403 Forbidden", &refusal::text(reason, &rule.label)).await;
            }
            Opening::Other => {
                let reason = "what the client sends is neither TLS nor HTTP, so it names no destination";
                self.refuse(Via::Tcp, rule, &Refused::new(RefusalKind::Malformed, reason).at(address));
                let _ = stream.set_zero_linger();
            }
        }
    }

    /// Refuses what is refused whatever it says; it is read all the same, to answer in its protocol and to name it.
    async fn refuse_unseen(&self, mut stream: TcpStream, rule: &Rule, refused: Refused) {
        let deadlines = &self.sandbox.shared.settings.deadlines;
        let mut first = Vec::new();
        match read_opening(&mut stream, &mut first, deadlines.head, deadlines.head).await {
            Ok(Opening::Tls(hello)) => {
                let refused = Refused { name: hello.server_name.map(|name| name.to_string()), ..refused };
                self.refuse(Via::Tls, rule, &refused);
                refusal::tls(stream, Alert::AccessDenied).await;
            }
            Ok(Opening::BadTls(_)) => {
                self.refuse(Via::Tls, rule, &refused);
                refusal::tls(stream, Alert::AccessDenied).await;
            }
            Ok(Opening::Http1) => {
                self.refuse(Via::Http, rule, &refused);
                refusal::http1(stream, "403 Forbidden", &refusal::text(&refused.reason, &rule.label)).await;
            }
            Ok(Opening::CleartextHttp2) => {
                self.refuse(Via::Http, rule, &refused);
                refusal::http2(stream, &refusal::text(&refused.reason, &rule.label)).await;
            }
            Ok(Opening::Other) | Err(_) => {
                self.refuse(Via::Tcp, rule, &refused);
                let _ = stream.set_zero_linger();
            }
        }
    }

    fn refuse(&self, via: Via, rule: &Rule, refused: &Refused) {
        self.sandbox.refuse(rule, via, refused, Some(self.destination.port()));
    }
}

/// Why there is no opening.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Silence {
    /// It did not come in time.
    Late,
    /// The client ended or broke the connection.
    Gone,
}

/// Reads until it is known what the connection begins with: `speak` for the first byte, `whole` for all of it.
async fn read_opening(
    stream: &mut TcpStream,
    first: &mut Vec<u8>,
    speak: Duration,
    whole: Duration,
) -> Result<Opening, Silence> {
    let mut openings = Openings::default();
    let end = tokio::time::Instant::now() + whole;
    let mut wait = tokio::time::Instant::now() + speak;
    first.reserve(READ);
    loop {
        match tokio::time::timeout_at(wait, stream.read_buf(first)).await {
            Ok(Ok(0) | Err(_)) => return Err(Silence::Gone),
            Ok(Ok(_)) => {}
            Err(_) => return Err(Silence::Late),
        }
        if let Some(opening) = openings.read(first) {
            return Ok(opening);
        }
        wait = end;
    }
}
