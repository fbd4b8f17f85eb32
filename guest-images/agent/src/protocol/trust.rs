//! `POST /v1/trust`: the certificate authority that the guest trusts beside those of its image. Sent after a boot and after a wake of a sandbox
//! whose egress policy changes requests; said again it changes nothing, and another authority takes the place of the one before, so that a clone
//! does not go on trusting the sandbox that it comes from.
//!
//! | request | body | answer |
//! | --- | --- | --- |
//! | `POST /v1/trust` | [`TrustRequest`] | [`TrustReply`] |

use serde::{Deserialize, Serialize};

/// Bytes of [`TrustRequest::certificate_pem`] at most.
pub const MAX_CERTIFICATE: usize = 16 << 10;

/// Body of `POST /v1/trust`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrustRequest {
    /// One certificate; none: the one of before is taken away.
    pub certificate_pem: Option<String>,
}

/// Answer of `POST /v1/trust`. Commands that are started from now on find the usual variables (`SSL_CERT_FILE`, `NODE_EXTRA_CA_CERTS`, …).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrustReply {
    /// Files that have the authority now.
    pub files: Vec<String>,
    /// Those that could not be changed, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<String>,
}
