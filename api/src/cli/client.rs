//! The REST client of the command line.

use super::profile::Profile;
use super::{ExitStatus, Failure};
use reqwest::header::{CONNECTION, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE};
use reqwest::{Body, Method, Response, StatusCode, Upgraded};
use serde_json::Value;
use std::time::Duration;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

/// Longer than any operation of the supervisor: the server's deadlines decide.
const DEADLINE: Duration = Duration::from_mins(30);
/// For the supervisor to take a connection.
const CONNECT: Duration = Duration::from_secs(30);

/// A supervisor.
#[derive(Clone, Debug)]
pub(super) struct Client {
    http: reqwest::Client,
    /// For what has no length that is known: the server ends what does not move. HTTP/1.1, which can be upgraded.
    streams: reqwest::Client,
    profile: Profile,
}

/// An answer with a 2xx status.
#[derive(Debug)]
pub(super) struct Answer {
    /// The body; null when there is none.
    pub(super) body: Value,
    /// The `server-timing` header.
    pub(super) timing: Option<String>,
}

fn header(response: &Response, name: &str) -> Option<String> {
    response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
}

impl Client {
    pub(super) fn new(profile: Profile) -> Result<Self, Failure> {
        // No proxy: the supervisor is an address that the user named.
        let builder = || reqwest::Client::builder().no_proxy().connect_timeout(CONNECT);
        let failed = |e: reqwest::Error| Failure::other(e.to_string());
        let http = builder().timeout(DEADLINE).build().map_err(failed)?;
        let streams = builder().http1_only().build().map_err(failed)?;
        Ok(Self { http, streams, profile })
    }

    pub(super) async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Answer, Failure> {
        let url = self.url(path);
        let mut request = self.http.request(method, &url).bearer_auth(&self.profile.api_key);
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body.to_string());
        }
        let response = request.send().await.map_err(|e| self.unreachable(&e))?;
        if !response.status().is_success() {
            return Err(self.refused(&url, response).await);
        }
        let timing = header(&response, "server-timing");
        let bytes = response.bytes().await.map_err(|e| self.unreachable(&e))?;
        Ok(Answer { body: serde_json::from_slice(&bytes).unwrap_or(Value::Null), timing })
    }

    /// A request whose body or answer is a stream.
    pub(super) async fn stream(&self, method: Method, path: &str, body: Option<Body>) -> Result<Response, Failure> {
        let url = self.url(path);
        let mut request = self.streams.request(method, &url).bearer_auth(&self.profile.api_key);
        if let Some(body) = body {
            request = request.body(body);
        }
        let response = request.send().await.map_err(|e| self.unreachable(&e))?;
        if response.status().is_success() { Ok(response) } else { Err(self.refused(&url, response).await) }
    }

    /// The connection of a WebSocket, after the handshake.
    pub(super) async fn websocket(&self, path: &str) -> Result<Upgraded, Failure> {
        let (url, key) = (self.url(path), generate_key());
        let request = self.streams.get(&url).bearer_auth(&self.profile.api_key);
        let request = request.header(CONNECTION, "Upgrade").header(UPGRADE, "websocket");
        let request = request.header(SEC_WEBSOCKET_VERSION, "13").header(SEC_WEBSOCKET_KEY, &key);
        let response = request.send().await.map_err(|e| self.unreachable(&e))?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(self.refused(&url, response).await);
        }
        if header(&response, "sec-websocket-accept") != Some(derive_accept_key(key.as_bytes())) {
            return Err(Failure::other(format!("{url} speaks no WebSocket")));
        }
        response.upgrade().await.map_err(|e| self.unreachable(&e))
    }

    /// A path with a query.
    pub(super) fn with_query(&self, path: &str, pairs: &[(&str, String)]) -> Result<String, Failure> {
        let url = reqwest::Url::parse_with_params(&self.url(path), pairs);
        let url = url.map_err(|e| Failure::new(ExitStatus::Usage, format!("{}: {e}", self.profile.url)))?;
        Ok(format!("{path}?{}", url.query().unwrap_or_default()))
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.profile.url)
    }

    async fn refused(&self, url: &str, response: Response) -> Failure {
        let (status, code) = (response.status().as_u16(), header(&response, "stasis-error").unwrap_or_default());
        let body: Value = match response.bytes().await {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or(Value::Null),
            Err(error) => return self.unreachable(&error),
        };
        let message = body["message"].as_str().map_or_else(|| format!("{url} answered {status}"), str::to_owned);
        Failure::new(ExitStatus::of(status, &code), message)
    }

    fn unreachable(&self, error: &reqwest::Error) -> Failure {
        let chain = crate::error::chain(error);
        Failure::new(
            ExitStatus::Unavailable,
            format!("cannot reach the supervisor at {}: {chain}; is it running? (stasis dev)", self.profile.url),
        )
    }
}

/// What a stream that broke means.
pub(super) fn broken(error: &reqwest::Error) -> Failure {
    Failure::new(ExitStatus::Unavailable, format!("the connection broke: {}", crate::error::chain(error)))
}
