//! What sandboxes are doing, for people who watch.

use super::sandboxes::Sandbox;
use super::text::Moment;
use schemars::JsonSchema;
use serde::Serialize;

/// All sandboxes.
#[derive(Debug, Serialize, JsonSchema)]
pub struct LiveList {
    /// In the order of their making.
    pub items: Vec<LiveSandbox>,
}

/// A sandbox, what it is doing, and what its last operations cost.
#[derive(Debug, Serialize, JsonSchema)]
pub struct LiveSandbox {
    /// The sandbox.
    #[serde(flatten)]
    pub sandbox: Sandbox,
    /// Its guest runs commands and terminals.
    pub agent: bool,
    /// When its present life ends, seconds since the epoch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_at: Option<i64>,
    /// The last ones since the supervisor started, oldest first.
    pub operations: Vec<PastOperation>,
}

/// An operation that has ended.
#[derive(Debug, Serialize, JsonSchema)]
pub struct PastOperation {
    /// `create`, `pause`, `resume`, `stop`, `start` or `snapshot`.
    pub operation: &'static str,
    /// When it ended.
    #[schemars(with = "Moment")]
    pub ended_at: String,
    /// From its first step to its last, ms.
    pub ms: f64,
    /// Its steps in the order in which they ended; some go on at the same time.
    pub phases: Vec<Phase>,
    /// What it moved.
    pub bytes: Vec<Moved>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

/// A step.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Phase {
    /// Its name, as in `Server-Timing`.
    pub name: &'static str,
    /// How long it took, ms.
    pub ms: f64,
}

/// Octets that went to the store or came from it.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Moved {
    /// `sent` or `fetched`.
    pub name: &'static str,
    /// How many.
    pub bytes: u64,
}
