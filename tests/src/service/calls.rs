//! Requests to the API, and what is waited for by asking it.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{PATIENCE, Service};
use crate::vmm::{Error, until};

/// An answer of the API.
#[derive(Debug)]
pub struct Reply {
    /// HTTP status.
    pub status: u16,
    /// Body, null when it is empty or no JSON.
    pub json: Value,
    /// The `Server-Timing` header.
    pub timing: String,
    /// The `Retry-After` header, seconds.
    pub retry_after: Option<u64>,
}

impl Reply {
    /// This reply, or an error when it has another status.
    pub fn expect(self, status: u16) -> Result<Self, Error> {
        if self.status == status { Ok(self) } else { Err(format!("expected {status}, got {self:?}").into()) }
    }

    /// This reply, or an error when it is no success.
    pub fn expect_success(self) -> Result<Self, Error> {
        if (200..300).contains(&self.status) { Ok(self) } else { Err(format!("expected success, got {self:?}").into()) }
    }

    /// A string field, empty when it is not there.
    pub fn text(&self, field: &str) -> String {
        self.json[field].as_str().unwrap_or_default().to_owned()
    }
}

impl Service {
    /// One request as the tenant `test`.
    pub async fn call(&self, method: &str, path: &str, body: Option<Value>) -> Result<Reply, Error> {
        self.call_as(&self.key, method, path, body.map(|b| b.to_string())).await
    }

    /// One request with this key and this body, well-formed or not.
    pub async fn call_as(&self, key: &str, method: &str, path: &str, body: Option<String>) -> Result<Reply, Error> {
        self.call_at(&self.url, key, method, path, body).await
    }

    /// The same to any supervisor.
    pub async fn call_at(
        &self,
        url: &str,
        key: &str,
        method: &str,
        path: &str,
        body: Option<String>,
    ) -> Result<Reply, Error> {
        let mut request = self.http.request(method.parse()?, format!("{url}{path}"));
        if !key.is_empty() {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body);
        }
        let answer = request.send().await?;
        let status = answer.status().as_u16();
        let timing = answer.headers().get("server-timing").and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
        let retry_after = answer.headers().get("retry-after").and_then(|v| v.to_str().ok()?.parse().ok());
        let json = serde_json::from_slice(&answer.bytes().await?).unwrap_or(Value::Null);
        Ok(Reply { status, json, timing, retry_after })
    }

    /// Creates a small pulse sandbox and answers its id.
    pub async fn create_pulse(&self) -> Result<String, Error> {
        let body = json!({"template_name": "test/pulse", "memory": 32});
        Ok(self.call("POST", "/v1/sandbox", Some(body)).await?.expect(201)?.text("id"))
    }

    /// Waits until `/metrics` has this line.
    pub async fn await_told(&self, line: &str) -> Result<(), Error> {
        let begun = Instant::now();
        loop {
            let request = self.http.get(format!("{}/metrics", self.url)).bearer_auth(&self.key);
            let text = request.send().await?.error_for_status()?.text().await?;
            if text.lines().any(|told| told == line) {
                return Ok(());
            }
            if begun.elapsed() > PATIENCE {
                return Err(format!("{line} is not in the metrics: {text}").into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// How many operations of this kind (`create`, `pause`, `resume`) have ended well or not (`ok`, `error`), by the metrics.
    pub async fn operations(&self, kind: &str, outcome: &str) -> Result<u64, Error> {
        let request = self.http.get(format!("{}/metrics", self.url)).bearer_auth(&self.key);
        let text = request.send().await?.error_for_status()?.text().await?;
        let series = format!("stasis_operations_total{{operation=\"{kind}\",outcome=\"{outcome}\"}} ");
        Ok(text.lines().find_map(|line| line.strip_prefix(&series)?.parse().ok()).unwrap_or(0))
    }

    /// `POST …/pause`.
    pub async fn pause(&self, id: &str) -> Result<Reply, Error> {
        self.call("POST", &format!("/v1/sandbox/{id}/pause"), None).await
    }

    /// `POST …/resume`.
    pub async fn resume(&self, id: &str) -> Result<Reply, Error> {
        self.call("POST", &format!("/v1/sandbox/{id}/resume"), None).await
    }

    /// Waits until the proxy holds a request ([`stasis_api::dev::Fault::Hold`]).
    pub async fn await_held(&self) -> Result<(), Error> {
        until("a request that is held", || Ok((self.proxy.held() > 0).then_some(()))).await
    }

    /// The state that `GET` answers.
    pub async fn state(&self, id: &str) -> Result<String, Error> {
        Ok(self.call("GET", &format!("/v1/sandbox/{id}"), None).await?.text("state"))
    }

    /// Waits until the sandbox is in this state.
    pub async fn await_state(&self, id: &str, state: &str) -> Result<(), Error> {
        let begun = Instant::now();
        loop {
            let now = self.state(id).await?;
            if now == state {
                return Ok(());
            }
            if begun.elapsed() > PATIENCE {
                return Err(format!("{id} is {now}, not {state}, in time; log: {}", self.log()).into());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}
