//! The invoke route: requests to `<id>[-<port>].<domain>` go to the app that listens on that port in the sandbox.
//!
//! | module | what |
//! | --- | --- |
//! | `host` | which sandbox a request is for |
//! | `headers` | which headers pass, and what they become |
//! | `hold` | a request waits until its sandbox runs and the app has taken a connection |
//! | `exchange` | the request, its answer, and what follows an upgrade |
//! | `idle` | connections on which nothing moves are ended |
//!
//! The way into the guest is its vsock, where the agent leads on to a TCP port of the loopback: no network policy is in between.
//!
//! A request is sent once. Until the first byte of it leaves, whatever breaks is tried again; from then on a broken connection is the
//! client's to know, since the app may have done what was asked. A request that waits or whose answer is under way counts as activity of the
//! sandbox: no timer pauses it meanwhile.

mod exchange;
mod headers;
mod hold;
mod host;
mod idle;

pub use host::{Destination, Domain};

use crate::config::Config;
use crate::error::Error;
use crate::ids::SandboxId;
use crate::journal::presigned::Token;
use crate::record::Spec;
use crate::registry::Sandbox;
use crate::routes;
use crate::states::State;
use crate::supervisor::Core;
use crate::timing::Timing;
use axum::body::Body;
use axum::response::{IntoResponse as _, Response};
use exchange::Failure;
use headers::Arrival;
use http::header::HOST;
use http::uri::PathAndQuery;
use http::{HeaderName, HeaderValue, Method, Request, StatusCode, Uri, Version};
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

/// How often a request of which nothing was sent is sent on another connection.
const TRIES: u32 = 5;
const REFERRER_POLICY: HeaderName = HeaderName::from_static("referrer-policy");
const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// Why an app did not answer.
#[derive(Debug, thiserror::Error)]
pub enum InvokeError {
    /// The name belongs to nobody.
    #[error(
        "there is no sandbox and no URL of that name; a sandbox is reached as <id>.<domain> or <id>-<port>.<domain>"
    )]
    NoName,
    /// A presigned URL that was never made, has expired or was deleted.
    #[error("there is no such URL, or it has expired or was deleted")]
    NoUrl,
    /// A request without a usable host.
    #[error("the request does not say once, in its Host header or its target, which host it is for")]
    NoHost,
    /// A tunnel.
    #[error("CONNECT is not served: send the request itself, or upgrade")]
    Tunnel,
    /// Nobody listens.
    #[error("nothing listens on port {port} of sandbox {id}")]
    NotListening {
        /// Which sandbox.
        id: SandboxId,
        /// Which port.
        port: NonZeroU16,
    },
    /// Somebody listens but takes no connection.
    #[error("port {port} of sandbox {id} took no connection within {ms} ms")]
    NotTaken {
        /// Which sandbox.
        id: SandboxId,
        /// Which port.
        port: NonZeroU16,
        /// The deadline.
        ms: u128,
    },
    /// The guest's agent cannot be reached, or cannot connect.
    #[error("cannot connect to port {port} of sandbox {id}: {why}")]
    NoWay {
        /// Which sandbox.
        id: SandboxId,
        /// Which port.
        port: NonZeroU16,
        /// What went wrong.
        why: String,
    },
    /// As many connections as a sandbox may have.
    #[error("sandbox {id} has as many connections as it may have; try again")]
    Crowded {
        /// Which.
        id: SandboxId,
    },
    /// Nothing moved for too long before the answer.
    #[error("port {port} of sandbox {id}: nothing was sent or received for {ms} ms")]
    Silent {
        /// Which sandbox.
        id: SandboxId,
        /// Which port.
        port: NonZeroU16,
        /// The deadline.
        ms: u128,
    },
    /// The connection broke before the answer.
    #[error("port {port} of sandbox {id}: {why}; it may have got the request")]
    Broken {
        /// Which sandbox.
        id: SandboxId,
        /// Which port.
        port: NonZeroU16,
        /// What is known.
        why: String,
    },
}

impl InvokeError {
    /// Its HTTP status.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::NoName | Self::NoUrl => StatusCode::NOT_FOUND,
            Self::NoHost => StatusCode::BAD_REQUEST,
            Self::Tunnel => StatusCode::METHOD_NOT_ALLOWED,
            Self::NotListening { .. } | Self::NoWay { .. } | Self::Broken { .. } => StatusCode::BAD_GATEWAY,
            Self::Crowded { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::NotTaken { .. } | Self::Silent { .. } => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    /// A stable word for machines.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoName | Self::NoUrl => "not-found",
            Self::NoHost => "no-host",
            Self::Tunnel => "wrong-method",
            Self::NotListening { .. } => "not-listening",
            Self::NotTaken { .. } => "not-taken",
            Self::NoWay { .. } => "no-way",
            Self::Crowded { .. } => "crowded",
            Self::Silent { .. } => "silent",
            Self::Broken { .. } => "broken",
        }
    }
}

/// Who sent a request, and over what.
#[derive(Clone, Copy, Debug)]
pub struct Client {
    /// Its address.
    pub peer: IpAddr,
    /// Over TLS.
    pub secure: bool,
}

/// What is known of a request for the log. A presigned URL's host is a secret, so it is named by its id.
#[derive(Debug, Default)]
pub struct Account {
    /// The sandbox, once known.
    pub sandbox: Option<SandboxId>,
    /// The port, once known.
    pub port: Option<NonZeroU16>,
    /// The presigned URL, when it came by one.
    pub url: Option<String>,
}

/// Answers a request whose destination is not the API.
pub async fn serve(
    core: &Arc<Core>,
    destination: Destination,
    request: Request<Body>,
    client: Client,
    account: &mut Account,
) -> Response {
    match answer(core, destination, request, client, account).await {
        Ok(response) => response,
        Err(error) => error.into_response(),
    }
}

async fn answer(
    core: &Arc<Core>,
    destination: Destination,
    request: Request<Body>,
    client: Client,
    account: &mut Account,
) -> Result<Response, Error> {
    let by_url = matches!(destination, Destination::Presigned(_));
    let (sandbox, port) = match destination {
        Destination::Sandbox(id, port) => {
            let tenant = routes::tenant_of(core, request.headers())?;
            (core.registry.find(&tenant, id.as_str())?, port)
        }
        Destination::Presigned(token) => {
            let (sandbox, port) = opened_by(core, &token)?;
            account.url = Some(token.id());
            (sandbox, Some(port))
        }
        Destination::Nobody => return Err(InvokeError::NoName.into()),
        Destination::Unclear | Destination::Api => return Err(InvokeError::NoHost.into()),
    };
    if request.method() == Method::CONNECT {
        return Err(InvokeError::Tunnel.into());
    }
    let port = port.unwrap_or_else(|| default_port(&sandbox.record().spec, &core.config));
    (account.sandbox, account.port) = (Some(sandbox.id.clone()), Some(port));
    let arrival = (client, core.config.invoke.trust_forwarded);
    forward(core, &sandbox, port, request, arrival, by_url).await
}

/// The sandbox and the port that a presigned URL leads to.
fn opened_by(core: &Core, token: &Token) -> Result<(Arc<Sandbox>, NonZeroU16), Error> {
    let url = core.journal.presigned_of(token, core.sources.now_ms())?.ok_or(InvokeError::NoUrl)?;
    let sandbox = core.registry.get(&url.sandbox).ok_or(InvokeError::NoUrl)?;
    if matches!(sandbox.state(), State::Deleting | State::Deleted) {
        return Err(InvokeError::NoUrl.into());
    }
    Ok((sandbox, url.port))
}

/// The port when none is named: `PORT` of the sandbox's own environment, else its template's, else the configured one.
fn default_port(spec: &Spec, config: &Config) -> NonZeroU16 {
    let own = spec.env_vars.get("PORT").and_then(|port| port.parse().ok());
    own.or(spec.port).unwrap_or(config.invoke.default_port)
}

async fn forward(
    core: &Arc<Core>,
    sandbox: &Arc<Sandbox>,
    port: NonZeroU16,
    mut request: Request<Body>,
    (client, trusted): (Client, bool),
    by_url: bool,
) -> Result<Response, Error> {
    let id = || sandbox.id.clone();
    let visit = Arc::new(sandbox.visit(&core.sources));
    let wanted = headers::wanted_upgrade(request.headers()).is_some();
    let mut upgrade = wanted.then(|| hyper::upgrade::on(&mut request));
    let host = named_host(&request);
    let arrival = Arrival { peer: client.peer, secure: client.secure, host: &host, trusted };
    if by_url {
        headers::to_guest_of_presigned(request.headers_mut(), arrival);
    } else {
        headers::to_guest(request.headers_mut(), arrival);
    }
    *request.uri_mut() = target(request.uri());
    *request.version_mut() = Version::HTTP_11;
    *request.extensions_mut() = http::Extensions::new();
    let idle = core.config.deadlines.idle();
    let mut timing = Timing::default();
    for _ in 0..TRIES {
        let reached = hold::reach(core, sandbox, port, &mut timing).await?;
        let kept = (visit.clone(), reached.place);
        match exchange::exchange((reached.stream, &reached.vm), request, &mut upgrade, idle, kept).await {
            Ok(mut response) => {
                *response.version_mut() = Version::HTTP_11;
                if let Ok(cost) = HeaderValue::from_str(&timing.header())
                    && !cost.is_empty()
                {
                    response.headers_mut().append(SERVER_TIMING, cost);
                }
                if by_url {
                    // The name that the page was reached by is what opens it: other sites must not learn it.
                    response.headers_mut().entry(REFERRER_POLICY).or_insert(HeaderValue::from_static("same-origin"));
                }
                return Ok(response);
            }
            Err(Failure::Unsent(again)) => request = *again,
            Err(Failure::Silent) => {
                return Err(InvokeError::Silent { id: id(), port, ms: idle.as_millis() }.into());
            }
            Err(Failure::Broken(error)) => {
                let state = sandbox.state();
                let why = if state != State::Running || reached.vm.has_ended() {
                    "the sandbox went to sleep or ended before the answer came".to_owned()
                } else {
                    format!("the connection broke before the answer came: {error}")
                };
                return Err(InvokeError::Broken { id: id(), port, why }.into());
            }
        }
    }
    let why = "connections break before anything can be sent".to_owned();
    Err(InvokeError::NoWay { id: id(), port, why }.into())
}

/// The host as the client wrote it.
fn named_host(request: &Request<Body>) -> String {
    match request.uri().authority() {
        Some(authority) => authority.as_str().to_owned(),
        None => request.headers().get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default().to_owned(),
    }
}

/// The path and query alone: the guest's app is an origin server.
fn target(uri: &Uri) -> Uri {
    Uri::from(uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::tests_support::sample;

    #[test]
    fn targets_lose_their_authority_and_nothing_else() {
        for (from, to) in [
            ("https://a.test/b?c=%20d", "/b?c=%20d"),
            ("/b", "/b"),
            ("http://a.test", "/"),
            ("http://a.test?x", "/?x"),
            ("*", "*"),
        ] {
            assert_eq!(target(&from.parse().unwrap()).to_string(), to, "{from}");
        }
    }

    #[test]
    fn the_default_port_is_the_sandboxs_own_before_its_templates_before_the_configured_one() {
        let config = Config::load(None, &crate::config::tests_support::directory()).unwrap();
        let mut spec = sample("sbx-a").spec;
        assert_eq!(default_port(&spec, &config).get(), 8080);
        spec.port = NonZeroU16::new(3000);
        assert_eq!(default_port(&spec, &config).get(), 3000);
        for (value, expected) in [("5000", 5000), ("0", 3000), ("http", 3000), ("70000", 3000)] {
            spec.env_vars.insert("PORT".to_owned(), value.to_owned());
            assert_eq!(default_port(&spec, &config).get(), expected, "{value}");
        }
    }
}
