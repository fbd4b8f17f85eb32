//! What a sandbox's network does.

use super::text::Moment;
use crate::network_policy::NetworkPolicy;
use schemars::JsonSchema;
use serde::Serialize;

/// What a sandbox may reach, what it reached, and what it was refused.
#[derive(Debug, Serialize, JsonSchema)]
pub struct NetworkActivity {
    /// It has a network now: it runs, on a host that makes networks.
    pub connected: bool,
    /// Why it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Its policy; values of injected headers are not shown.
    pub policy: NetworkPolicy,
    /// Headers of the policy whose values this host does not have, as `domain: header`: requests go without them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub missing_values: Vec<String>,
    /// Connections, requests and DNS questions that passed, since this supervisor knows the sandbox.
    pub allowed: u64,
    /// What was refused.
    pub refused: u64,
    /// Bytes from the sandbox.
    pub bytes_out: u64,
    /// Bytes to the sandbox.
    pub bytes_in: u64,
    /// The same by the rule that decided.
    pub rules: Vec<RuleActivity>,
    /// What was refused last, the latest first.
    pub refusals: Vec<Refusal>,
}

/// One rule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct RuleActivity {
    /// `cidr …`, `domain …`, `transform …`, `internet`, `operator`, `dns`, or a reason of refusals.
    pub rule: String,
    /// What it let pass.
    pub allowed: u64,
    /// What it refused.
    pub refused: u64,
    /// Bytes from the sandbox.
    pub bytes_out: u64,
    /// Bytes to the sandbox.
    pub bytes_in: u64,
}

/// Something that did not pass.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Refusal {
    /// When, the last time.
    #[schemars(with = "Moment")]
    pub at: String,
    /// `tcp`, `udp`, `icmp`, `tls`, `http`, `dns`.
    pub protocol: String,
    /// The name it was for, where one is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The address it was for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// The port it was for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// A stable word for the reason.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
    /// How often.
    pub times: u64,
}
