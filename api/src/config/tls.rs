//! TLS of the API and of apps in sandboxes.

use super::ConfigError;
use serde::Deserialize;
use std::path::PathBuf;

/// Certificate and key. Without both, everything is served in clear.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tls {
    /// Certificate chain, PEM, the server's own first. For the API's name, the domain of sandboxes and `*.` that domain.
    pub cert: Option<PathBuf>,
    /// Its private key, PEM.
    pub key: Option<PathBuf>,
    /// Serve requests in clear, too, on the same port.
    pub plain: bool,
}

impl Tls {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let missing = match (&self.cert, &self.key) {
            (Some(_), None) => "tls.key",
            (None, Some(_)) => "tls.cert",
            _ => return Ok(()),
        };
        Err(ConfigError::Value {
            field: missing.to_owned(),
            error: "is missing: TLS needs a certificate and its key".to_owned(),
        })
    }
}
