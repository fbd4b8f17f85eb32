//! Presigned URLs.

use super::text::Moment;
use crate::ids::SandboxId;
use schemars::JsonSchema;
use serde::Serialize;
use std::num::NonZeroU16;

/// A presigned URL to be made.
#[derive(JsonSchema)]
pub struct CreatePresignedUrl {
    /// The port that it opens.
    #[schemars(range(min = 1, max = 65_535))]
    pub port: i64,
    /// Its life, seconds; an hour when absent, a week at most.
    #[schemars(range(min = 1, max = 604_800))]
    pub expires_in: Option<i64>,
}

/// A presigned URL.
#[derive(Debug, Serialize, JsonSchema)]
pub struct PresignedUrl {
    /// By which it is deleted.
    pub id: String,
    /// The secret in the URL; only its hash is kept, so it is shown this once.
    pub token: String,
    /// The URL. Whoever has it needs no key.
    #[schemars(extend("format" = "uri"))]
    pub url: String,
    /// Where it leads.
    pub sandbox_id: SandboxId,
    /// To which port.
    #[schemars(with = "u16", range(min = 1))]
    pub port: NonZeroU16,
    /// Until when.
    #[schemars(with = "Moment")]
    pub expires_at: String,
    /// When it was made.
    #[schemars(with = "Moment")]
    pub created_at: String,
}
