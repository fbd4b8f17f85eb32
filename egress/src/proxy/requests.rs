//! HTTP passed on request by request: each one's name is looked at, whatever the connection was opened for. A guest's connection has one
//! connection to a server at a time, of the same version of HTTP, used for as long as requests are for the same name.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;

use bytes::Bytes;
use http::request::Parts;
use http::uri::{PathAndQuery, Scheme};
use http::{HeaderValue, Request, Response, StatusCode, Uri, Version};
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1, http2};
use hyper::rt::{Read, Write};
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::copy_bidirectional_with_sizes;
use tokio::sync::Mutex;

use super::meter::Meter;
use super::{headers, refusal, target, terminate, upstream};
use crate::control::types::{RefusalKind, Via};
use crate::counters::Refused;
use crate::names::Name;
use crate::rules::{Rewrite, Rule, Verdict};
use crate::sandbox::{Era, Sandbox};

/// Bytes of a head at most, of requests and answers.
const MAX_HEAD: usize = 64 << 10;
/// Headers of a request at most.
const MAX_HEADERS: usize = 200;
/// Requests of one HTTP/2 connection at once.
const MAX_STREAMS: u32 = 100;
/// Bytes of one HTTP/2 stream, and of one connection, that may be under way.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 2 << 20;
/// Buffer of each direction of a WebSocket, bytes.
const WEBSOCKET_BUFFER: usize = 32 << 10;

/// What an answer is made of: the server's body, or our words.
type Answer = Response<Either<Incoming, Full<Bytes>>>;

/// Where a guest's connection leads.
pub(super) enum Leads {
    /// HTTP without TLS: every request may be for another name. `addressed`: what lets everything to the guest's destination pass.
    Anywhere { addressed: Option<Rule> },
    /// TLS that was ended for this name.
    To { name: Name, rule: Rule, rewrite: Arc<Rewrite> },
}

/// One connection of a guest.
pub(super) struct Session {
    pub(super) sandbox: Arc<Sandbox>,
    pub(super) era: Arc<Era>,
    pub(super) meter: Arc<Meter>,
    pub(super) destination: SocketAddrV4,
    pub(super) leads: Leads,
    /// Both sides speak HTTP/2.
    pub(super) http2: bool,
    /// The connection to a server that is there.
    pub(super) server: Mutex<Option<(Server, Sender)>>,
}

/// Who the other end of a connection to a server is.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Server {
    Name(Name),
    Address(Ipv4Addr),
}

/// The sending half of a connection to a server.
pub(super) enum Sender {
    Http1(http1::SendRequest<Incoming>),
    Http2(http2::SendRequest<Incoming>),
}

/// Streams of HTTP/2 are tasks of the era, too: none outlives its policy.
#[derive(Clone)]
struct InEra(Arc<Era>);

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for InEra {
    fn execute(&self, task: F) {
        self.0.spawn(task);
    }
}

/// What becomes of one request.
struct Passage {
    rule: Rule,
    server: Server,
    rewrite: Option<Arc<Rewrite>>,
}

/// A request that is not passed on, by which rule, and what the guest is told.
struct Stopped(Rule, Refused, StatusCode);

impl Session {
    /// Serves the guest's connection until it ends.
    pub(super) async fn serve<S>(self: Arc<Self>, stream: S)
    where
        S: Read + Write + Unpin + Send + 'static,
    {
        let deadlines = self.sandbox.shared.settings.deadlines;
        let session = Arc::clone(&self);
        let service = service_fn(move |request| {
            let session = Arc::clone(&session);
            async move { Ok::<_, Infallible>(session.answer(request).await) }
        });
        let connection = async {
            if self.http2 {
                let mut server = hyper::server::conn::http2::Builder::new(InEra(Arc::clone(&self.era)));
                server
                    .timer(TokioTimer::new())
                    .max_concurrent_streams(MAX_STREAMS)
                    .max_header_list_size(MAX_HEAD as u32)
                    .initial_stream_window_size(STREAM_WINDOW)
                    .initial_connection_window_size(CONNECTION_WINDOW)
                    .max_send_buf_size(STREAM_WINDOW as usize);
                server.serve_connection(stream, service).await
            } else {
                let mut server = hyper::server::conn::http1::Builder::new();
                server
                    .timer(TokioTimer::new())
                    .header_read_timeout(deadlines.head.max(std::time::Duration::from_secs(30)))
                    .max_buf_size(MAX_HEAD)
                    .max_headers(MAX_HEADERS)
                    .preserve_header_case(true)
                    .half_close(true);
                server.serve_connection(stream, service).with_upgrades().await
            }
        };
        let ended = tokio::select! {
            ended = connection => ended,
            () = self.meter.silent_for(deadlines.idle) => Ok(()),
        };
        if let Err(error) = ended
            && let Some(refused) = of_connection(&error)
        {
            self.sandbox.refuse(self.fallback_rule(), Via::Http, &refused, Some(self.destination.port()));
        }
    }

    fn fallback_rule(&self) -> &Rule {
        match &self.leads {
            Leads::To { rule, .. } => rule,
            Leads::Anywhere { .. } => self.era.rules.default_rule(),
        }
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Answer {
        match self.pass(request).await {
            Ok(answer) => answer,
            Err(Stopped(rule, refused, status)) => {
                self.sandbox.refuse(&rule, Via::Http, &refused, Some(self.destination.port()));
                let text = refusal::text(&refused.reason, &rule.label);
                let mut answer = Response::new(Either::Right(Full::new(Bytes::from(text))));
                *answer.status_mut() = status;
                let plain = HeaderValue::from_static("text/plain; charset=utf-8");
                answer.headers_mut().insert(http::header::CONTENT_TYPE, plain);
                answer
            }
        }
    }

    /// What is to become of a request: the only place that decides it.
    fn judge(&self, parts: &Parts) -> Result<Passage, Stopped> {
        let name = target::name(parts).map_err(|bad| {
            let status = match bad.kind {
                RefusalKind::Malformed | RefusalKind::AmbiguousHost => StatusCode::BAD_REQUEST,
                _ => StatusCode::FORBIDDEN,
            };
            Stopped(self.fallback_rule().clone(), Refused::new(bad.kind, bad.reason), status)
        });
        let addressed = match &self.leads {
            Leads::To { name: ended_for, rule, rewrite } => {
                let name = name?;
                if name != *ended_for {
                    let reason = format!("the request is for {name}, its TLS connection for {ended_for}");
                    let refused = Refused::new(RefusalKind::Misdirected, reason).of(&name);
                    return Err(Stopped(rule.clone(), refused, StatusCode::MISDIRECTED_REQUEST));
                }
                let rewrite = Some(Arc::clone(rewrite));
                return Ok(Passage { rule: rule.clone(), server: Server::Name(name), rewrite });
            }
            Leads::Anywhere { addressed } => addressed.as_ref(),
        };
        let as_addressed = |rule: &Rule| Passage {
            rule: rule.clone(),
            server: Server::Address(*self.destination.ip()),
            rewrite: None,
        };
        let name = match (name, addressed) {
            (Ok(name), _) => name,
            // To an allowed address anything may go that is one request.
            (Err(Stopped(_, refused, _)), Some(rule))
                if matches!(refused.kind, RefusalKind::NoName | RefusalKind::IpLiteral) =>
            {
                return Ok(as_addressed(rule));
            }
            (Err(stopped), _) => return Err(stopped),
        };
        match (self.era.rules.name(&name), addressed) {
            (Verdict::Change(rule, rewrite), _) => {
                Ok(Passage { rule, server: Server::Name(name), rewrite: Some(rewrite) })
            }
            (Verdict::PassAsAddressed(rule), _) => Ok(as_addressed(&rule)),
            (_, Some(rule)) => Ok(as_addressed(rule)),
            (Verdict::Pass(rule), None) => Ok(Passage { rule, server: Server::Name(name), rewrite: None }),
            (Verdict::Refuse(rule), None) => {
                let refused = Refused::new(RefusalKind::NameNotAllowed, format!("no rule allows {name}")).of(&name);
                Err(Stopped(rule, refused, StatusCode::FORBIDDEN))
            }
        }
    }

    async fn pass(self: &Arc<Self>, mut request: Request<Incoming>) -> Result<Answer, Stopped> {
        let guests = hyper::upgrade::on(&mut request);
        let (mut parts, body) = request.into_parts();
        let Passage { rule, server, rewrite } = self.judge(&parts)?;
        self.meter.count_for(&rule);
        let websocket = parts.version == Version::HTTP_11 && headers::wants_websocket(&parts.headers);
        headers::to_server(&mut parts.headers, websocket, rewrite.as_deref());
        let not_passed = |refused: Refused| {
            let status = match refused.kind {
                RefusalKind::AddressNotPublic | RefusalKind::TooManyNames => StatusCode::FORBIDDEN,
                RefusalKind::TooFast => StatusCode::TOO_MANY_REQUESTS,
                _ => StatusCode::BAD_GATEWAY,
            };
            Stopped(rule.clone(), refused, status)
        };
        address(&mut parts, &server).map_err(not_passed)?;
        let mut request = Request::from_parts(parts, body);
        // Once more when a kept connection turns out to be closed before anything was sent on it.
        let (mut answer, sender) = loop {
            let (mut sender, kept) = self.sender(&server).await.map_err(not_passed)?;
            match sender.send(request).await {
                Ok(answer) => break (answer, sender),
                Err(mut error) => match error.take_message() {
                    Some(unsent) if kept => request = unsent,
                    _ => {
                        let reason = format!("the server broke off: {}", crate::chain(&error.into_error()));
                        let refused = Refused::new(RefusalKind::NotReachable, reason);
                        return Err(not_passed(match server {
                            Server::Name(name) => refused.of(&name),
                            Server::Address(address) => refused.at(address),
                        }));
                    }
                },
            }
        };
        rule.tally.allow();
        let switched = websocket && answer.status() == StatusCode::SWITCHING_PROTOCOLS;
        if switched {
            self.hand_over(guests, hyper::upgrade::on(&mut answer));
        } else if let Sender::Http1(_) = sender {
            *self.server.lock().await = Some((server, sender));
        }
        headers::to_guest(answer.headers_mut(), switched);
        Ok(answer.map(Either::Left))
    }

    /// The connection to `server`, and whether it was there before.
    async fn sender(self: &Arc<Self>, server: &Server) -> Result<(Sender, bool), Refused> {
        let mut slot = self.server.lock().await;
        if let Some((there, sender)) = slot.take()
            && there == *server
            && let Some(mut sender) = sender.open()
        {
            if let Sender::Http2(shared) = &sender {
                *slot = Some((there, Sender::Http2(shared.clone())));
            }
            if sender.ready().await {
                return Ok((sender, true));
            }
        }
        let sender = self.connect(server).await?;
        if let Sender::Http2(shared) = &sender {
            *slot = Some((server.clone(), Sender::Http2(shared.clone())));
        }
        Ok((sender, false))
    }

    async fn connect(self: &Arc<Self>, server: &Server) -> Result<Sender, Refused> {
        let within = self.sandbox.shared.settings.deadlines.connect;
        let port = self.destination.port();
        let name = match server {
            Server::Address(address) => {
                let stream = upstream::connect(&[*address], port, within).await?;
                return self.start(TokioIo::new(stream), false).await;
            }
            Server::Name(name) => name,
        };
        match &self.leads {
            Leads::Anywhere { .. } => {
                let found = self.sandbox.resolver.resolve(name, &self.era.rules).await?;
                let stream = upstream::connect(&found.addresses, port, within).await.map_err(|r| r.of(name))?;
                let _ = stream.set_nodelay(true);
                self.start(TokioIo::new(stream), false).await
            }
            Leads::To { .. } => {
                // The guest's connection has its protocol by now.
                let alpn = if self.http2 { terminate::HTTP_2 } else { terminate::HTTP_1_1 }.to_vec();
                let stream = terminate::reach(&self.sandbox, &self.era, name, port, &[alpn]).await?;
                let http2 = stream.get_ref().1.alpn_protocol() == Some(terminate::HTTP_2);
                if http2 != self.http2 {
                    let reason = format!("{name} speaks another version of HTTP than a moment ago");
                    return Err(Refused::new(RefusalKind::NotReachable, reason).of(name));
                }
                self.start(TokioIo::new(stream), http2).await
            }
        }
    }

    /// Begins HTTP on a connection to a server.
    pub(super) async fn start<S>(&self, stream: S, http2: bool) -> Result<Sender, Refused>
    where
        S: Read + Write + Unpin + Send + 'static,
    {
        let failed = |error: hyper::Error| {
            Refused::new(RefusalKind::NotReachable, format!("HTTP with the server failed: {}", crate::chain(&error)))
        };
        if http2 {
            let mut client = http2::Builder::new(InEra(Arc::clone(&self.era)));
            client
                .timer(TokioTimer::new())
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .max_header_list_size(MAX_HEAD as u32)
                .max_send_buf_size(STREAM_WINDOW as usize);
            let (sender, connection) = client.handshake(stream).await.map_err(failed)?;
            self.era.spawn(async move {
                let _ = connection.await;
            });
            return Ok(Sender::Http2(sender));
        }
        let mut client = http1::Builder::new();
        client.max_buf_size(4 * MAX_HEAD).preserve_header_case(true);
        let (sender, connection) = client.handshake(stream).await.map_err(failed)?;
        self.era.spawn(async move {
            let _ = connection.with_upgrades().await;
        });
        Ok(Sender::Http1(sender))
    }

    /// Passes a WebSocket's bytes on. Those of the guest are still counted by the meter below.
    fn hand_over(self: &Arc<Self>, guest: OnUpgrade, server: OnUpgrade) {
        let session = Arc::clone(self);
        let open = self.sandbox.counters.connection();
        self.era.spawn(async move {
            let deadlines = session.sandbox.shared.settings.deadlines;
            let both = async { tokio::try_join!(guest, server) };
            let Ok(Ok((guest, server))) = tokio::time::timeout(deadlines.handshake, both).await else { return };
            let (mut guest, mut server) = (TokioIo::new(guest), TokioIo::new(server));
            tokio::select! {
                // Either side may go away at any time: the other one sees it.
                _ = copy_bidirectional_with_sizes(&mut guest, &mut server, WEBSOCKET_BUFFER, WEBSOCKET_BUFFER) => {}
                () = session.meter.silent_for(deadlines.idle) => {}
            }
            drop(open);
        });
    }
}

impl Sender {
    /// It, unless the server has closed it.
    fn open(self) -> Option<Self> {
        let closed = match &self {
            Self::Http1(sender) => sender.is_closed(),
            Self::Http2(sender) => sender.is_closed(),
        };
        (!closed).then_some(self)
    }

    async fn ready(&mut self) -> bool {
        match self {
            Self::Http1(sender) => sender.ready().await.is_ok(),
            Self::Http2(sender) => sender.ready().await.is_ok(),
        }
    }

    async fn send(
        &mut self,
        request: Request<Incoming>,
    ) -> Result<Response<Incoming>, TrySendError<Request<Incoming>>> {
        match self {
            Self::Http1(sender) => sender.try_send_request(request).await,
            Self::Http2(sender) => sender.try_send_request(request).await,
        }
    }
}

/// Gives the request the form of target that the server's version of HTTP takes. In HTTP/1.1 the name stays in Host alone.
fn address(parts: &mut Parts, server: &Server) -> Result<(), Refused> {
    let path = parts.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    let mut uri = http::uri::Parts::default();
    if parts.version == Version::HTTP_2
        && let Server::Name(name) = server
    {
        parts.headers.remove(http::header::HOST);
        uri.scheme = Some(Scheme::HTTPS);
        uri.authority = name.to_string().parse().ok();
    } else {
        // HTTP/1.0 without keep-alive would cost a connection a request; the server's answer is made to fit by hyper.
        parts.version = Version::HTTP_11;
    }
    uri.path_and_query = Some(path);
    let malformed = |_| Refused::new(RefusalKind::Malformed, "the request's target makes no sense");
    parts.uri = Uri::from_parts(uri).map_err(malformed)?;
    Ok(())
}

/// The refusal that a guest's broken connection is, if it is one: hyper has answered it, or closed the connection.
fn of_connection(error: &hyper::Error) -> Option<Refused> {
    let kind = if error.is_parse_too_large() {
        RefusalKind::TooLarge
    } else if error.is_timeout() {
        RefusalKind::TooSlow
    } else if error.is_parse() || error.is_parse_status() {
        RefusalKind::Malformed
    } else {
        return None;
    };
    Some(Refused::new(kind, format!("the request cannot be read: {error}")))
}
