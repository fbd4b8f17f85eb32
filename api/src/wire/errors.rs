//! Bodies of refusals.

use crate::validate::FieldError;
use schemars::JsonSchema;
use serde::Serialize;

/// Why a request failed.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "Error")]
pub struct Failure {
    /// What happened, to which object, and what to do.
    pub message: String,
}

/// What is wrong with a request.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ValidationError {
    /// All of it in one sentence.
    pub message: String,
    /// Each field that is wrong. Empty when the guest refused for a reason that is no field's.
    pub errors: Vec<FieldError>,
}
