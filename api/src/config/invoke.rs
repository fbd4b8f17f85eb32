//! Names of sandboxes, and requests to the apps in them.

use super::ConfigError;
use crate::invoke::Domain;
use serde::Deserialize;
use std::num::NonZeroU16;

/// The port that requests go to when nothing else says one.
const DEFAULT_PORT: NonZeroU16 = NonZeroU16::new(8080).unwrap();

/// The scheme of presigned URLs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scheme {
    /// `https`: TLS is here, or in a proxy in front.
    Https,
    /// `http`.
    Http,
}

impl Scheme {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Https => "https",
            Self::Http => "http",
        }
    }
}

/// How apps in sandboxes are reached.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Invoke {
    /// Domain whose names are sandboxes, `name` or `name:port`. Its names must lead to the API's address.
    pub domain: String,
    /// Port of requests that name none, in sandboxes whose `PORT` is not known.
    pub default_port: NonZeroU16,
    /// Believe `X-Forwarded-*` headers. Only behind a proxy that sets them, and that nobody can pass by.
    pub trust_forwarded: bool,
    /// Scheme of presigned URLs.
    pub scheme: Scheme,
}

impl Default for Invoke {
    fn default() -> Self {
        Self {
            domain: "sandbox.localhost".to_owned(),
            default_port: DEFAULT_PORT,
            trust_forwarded: false,
            scheme: Scheme::Https,
        }
    }
}

impl Invoke {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        self.domain().map(drop)
    }

    /// The domain.
    pub fn domain(&self) -> Result<Domain, ConfigError> {
        Domain::parse(&self.domain).ok_or_else(|| ConfigError::Value {
            field: "invoke.domain".to_owned(),
            error: format!(
                "must be a host name, with a port or without, such as box.example.com; not {:?}",
                self.domain
            ),
        })
    }
}
