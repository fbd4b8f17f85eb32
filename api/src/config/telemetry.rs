//! Traces for an OpenTelemetry collector.

use super::ConfigError;
use serde::Deserialize;

/// `[telemetry]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Telemetry {
    /// `http://…` or `https://…` of a collector that takes OTLP over HTTP, without the path. Nothing is exported when absent.
    pub otlp_endpoint: Option<String>,
}

impl Telemetry {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        match self.otlp_endpoint.as_deref() {
            Some(url)
                if url.parse::<http::Uri>().is_err()
                    || !(url.starts_with("http://") || url.starts_with("https://")) =>
            {
                Err(ConfigError::Value {
                    field: "telemetry.otlp_endpoint".to_owned(),
                    error: format!("{url:?} must be a URL that starts with http:// or https://"),
                })
            }
            _ => Ok(()),
        }
    }
}
