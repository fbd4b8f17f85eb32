//! The REST client of the command line.

use super::profile::Profile;
use super::{ExitStatus, Failure};
use reqwest::Method;
use serde_json::Value;
use std::time::Duration;

/// Longer than any operation of the supervisor: the server's deadlines decide.
const DEADLINE: Duration = Duration::from_mins(30);

/// A supervisor.
#[derive(Clone, Debug)]
pub(super) struct Client {
    http: reqwest::Client,
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

impl Client {
    pub(super) fn new(profile: Profile) -> Result<Self, Failure> {
        // No proxy: the supervisor is an address that the user named.
        let http = reqwest::Client::builder()
            .no_proxy()
            .timeout(DEADLINE)
            .build()
            .map_err(|e| Failure::other(e.to_string()))?;
        Ok(Self { http, profile })
    }

    pub(super) async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Answer, Failure> {
        let url = format!("{}{path}", self.profile.url);
        let mut request = self.http.request(method, &url).bearer_auth(&self.profile.api_key);
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body.to_string());
        }
        let response = request.send().await.map_err(|e| self.unreachable(&e))?;
        let status = response.status().as_u16();
        let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        let (timing, code) = (header("server-timing"), header("stasis-error").unwrap_or_default());
        let bytes = response.bytes().await.map_err(|e| self.unreachable(&e))?;
        let body = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
        if (200..300).contains(&status) {
            return Ok(Answer { body, timing });
        }
        let message = body["message"].as_str().map_or_else(|| format!("{url} answered {status}"), str::to_owned);
        Err(Failure::new(ExitStatus::of(status, &code), message))
    }

    fn unreachable(&self, error: &reqwest::Error) -> Failure {
        let chain = crate::error::chain(error);
        Failure::new(
            ExitStatus::Unavailable,
            format!("cannot reach the supervisor at {}: {chain}; is it running? (stasis dev)", self.profile.url),
        )
    }
}
