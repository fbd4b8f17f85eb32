//! The egress policy of a sandbox: its shape and its rules. What enforces it: `supervisor::network`.
//!
//! Values of injected headers are secrets. A request gives them as text; before anything is recorded, the text goes to the journal's `secrets`
//! ([`NetworkPolicy::keep`]), and its name stands in its place: records, heads and manifests hold names, answers and logs hold neither.

use crate::validate::FieldErrors;
use serde::ser::SerializeStruct as _;
use serde::{Deserialize, Serialize, Serializer};
use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;

/// Domains in `allow_domains` at most.
pub const MAX_DOMAINS: usize = 50;
/// Ranges in `allow_cidrs` at most.
pub const MAX_CIDRS: usize = 10;
/// Entries of `transforms` at most.
pub const MAX_TRANSFORMS: usize = 20;

/// What a sandbox may reach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct NetworkPolicy {
    /// The default.
    pub mode: Mode,
    /// Hosts that may be reached (`custom` only): exact, or `*.suffix`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow_domains: Vec<String>,
    /// IPv4 ranges that may be reached (`custom` only).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow_cidrs: Vec<String>,
    /// Changes to requests on their way out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub transforms: Vec<Transform>,
}

/// The default of a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "NetworkPolicyMode")]
pub enum Mode {
    /// Everything passes.
    AllowAll,
    /// Nothing passes.
    DenyAll,
    /// What the lists allow passes.
    Custom,
}

/// Header changes for one domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(rename = "HeaderTransform")]
pub struct Transform {
    /// The domain.
    pub domain: String,
    /// Headers to set.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(with = "BTreeMap<String, String>")]
    pub inject_headers: BTreeMap<String, Injected>,
    /// Headers to remove.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub strip_headers: Vec<String>,
}

/// The value of an injected header.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Injected {
    /// As a request gave it. It is written nowhere.
    Given(String),
    /// Its name in the journal of the host that the policy was given to.
    Kept {
        /// The name.
        secret: String,
    },
}

/// What stands for a value where values are not shown.
const REDACTED: &str = "[redacted]";

impl fmt::Debug for Injected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Given(_) => f.write_str(REDACTED),
            Self::Kept { secret } => f.debug_tuple("Kept").field(secret).finish(),
        }
    }
}

impl Serialize for Injected {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Given(_) => serializer.serialize_str(REDACTED),
            Self::Kept { secret } => {
                let mut kept = serializer.serialize_struct("Kept", 1)?;
                kept.serialize_field("secret", secret)?;
                kept.end()
            }
        }
    }
}

impl NetworkPolicy {
    /// Allow-all: what holds when a request names none.
    pub const OPEN: Self =
        Self { mode: Mode::AllowAll, allow_domains: Vec::new(), allow_cidrs: Vec::new(), transforms: Vec::new() };

    /// For answers: values are not shown.
    #[must_use]
    pub fn redacted(&self) -> Self {
        let mut policy = self.clone();
        policy.values().for_each(|value| *value = Injected::Given(String::new()));
        policy
    }

    /// Puts a name in the place of each value that was given, which `keep` is told under that name; `name` makes names.
    pub fn keep<E>(
        &mut self,
        mut name: impl FnMut() -> String,
        mut keep: impl FnMut(&str, &str) -> Result<(), E>,
    ) -> Result<(), E> {
        for value in self.values() {
            if let Injected::Given(text) = value {
                let secret = name();
                keep(&secret, text)?;
                *value = Injected::Kept { secret };
            }
        }
        Ok(())
    }

    /// Names of the values that are kept.
    pub fn secrets(&self) -> impl Iterator<Item = &str> {
        self.transforms.iter().flat_map(|transform| transform.inject_headers.values()).filter_map(|value| match value {
            Injected::Kept { secret } => Some(secret.as_str()),
            Injected::Given(_) => None,
        })
    }

    fn values(&mut self) -> impl Iterator<Item = &mut Injected> {
        self.transforms.iter_mut().flat_map(|transform| transform.inject_headers.values_mut())
    }

    /// Reads and checks the request's JSON; what is wrong goes to `errors` under `network_policy.…`.
    pub fn from_json(value: &serde_json::Value, errors: &mut FieldErrors) -> Option<Self> {
        let policy: Self = match serde_json::from_value(value.clone()) {
            Ok(policy) => policy,
            Err(e) => {
                errors.add("network_policy", format!("is not a network policy: {e}"));
                return None;
            }
        };
        let before = errors.len();
        policy.check(errors);
        (errors.len() == before).then_some(policy)
    }

    fn check(&self, errors: &mut FieldErrors) {
        let mut bound = |field: &str, len: usize, max: usize| {
            if len > max {
                errors.add(&format!("network_policy.{field}"), format!("has {len} entries; at most {max} are allowed"));
            }
        };
        bound("allow_domains", self.allow_domains.len(), MAX_DOMAINS);
        bound("allow_cidrs", self.allow_cidrs.len(), MAX_CIDRS);
        bound("transforms", self.transforms.len(), MAX_TRANSFORMS);
        if self.mode != Mode::Custom {
            for (field, empty) in
                [("allow_domains", self.allow_domains.is_empty()), ("allow_cidrs", self.allow_cidrs.is_empty())]
            {
                if !empty {
                    errors.add(&format!("network_policy.{field}"), "is allowed only with mode \"custom\"".to_owned());
                }
            }
        }
        if self.mode == Mode::DenyAll && !self.transforms.is_empty() {
            errors.add("network_policy.transforms", "make no sense with mode \"deny-all\": nothing passes".to_owned());
        }
        for (i, domain) in self.allow_domains.iter().enumerate() {
            if !is_domain_pattern(domain) {
                errors.add(
                    &format!("network_policy.allow_domains[{i}]"),
                    format!("{domain:?} is neither a host name nor *.suffix"),
                );
            }
        }
        for (i, cidr) in self.allow_cidrs.iter().enumerate() {
            if !is_ipv4_cidr(cidr) {
                errors.add(
                    &format!("network_policy.allow_cidrs[{i}]"),
                    format!("{cidr:?} is not an IPv4 range such as 10.0.0.0/8"),
                );
            }
        }
        for (i, transform) in self.transforms.iter().enumerate() {
            let field = format!("network_policy.transforms[{i}]");
            if !is_domain_pattern(&transform.domain) {
                errors.add(
                    &format!("{field}.domain"),
                    format!("{:?} is neither a host name nor *.suffix", transform.domain),
                );
            }
            for (name, value) in &transform.inject_headers {
                let fits = matches!(value, Injected::Given(text) if http::HeaderValue::from_str(text).is_ok());
                if http::HeaderName::from_bytes(name.as_bytes()).is_err() || !fits {
                    errors.add(
                        &format!("{field}.inject_headers"),
                        format!("{name:?} is not a header name with a header value"),
                    );
                }
            }
            for name in &transform.strip_headers {
                if http::HeaderName::from_bytes(name.as_bytes()).is_err() {
                    errors.add(&format!("{field}.strip_headers"), format!("{name:?} is not a header name"));
                }
            }
        }
    }
}

/// An exact host or `*.suffix`, of at least two labels of letters, digits and hyphens.
fn is_domain_pattern(text: &str) -> bool {
    let name = text.strip_prefix("*.").unwrap_or(text);
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    name.len() <= 253 && name.split('.').count() >= 2 && name.split('.').all(label)
}

fn is_ipv4_cidr(text: &str) -> bool {
    text.split_once('/').is_some_and(|(addr, bits)| {
        addr.parse::<Ipv4Addr>().is_ok() && bits.parse::<u8>().is_ok_and(|n| n <= 32) && !bits.starts_with('+')
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn errors_of(value: &serde_json::Value) -> Vec<String> {
        let mut errors = FieldErrors::default();
        let policy = NetworkPolicy::from_json(value, &mut errors);
        assert_eq!(policy.is_none(), !errors.is_empty());
        errors.into_list().into_iter().map(|e| e.field).collect()
    }

    #[test]
    fn the_three_modes_pass_and_read_back() {
        for mode in ["allow-all", "deny-all", "custom"] {
            assert!(errors_of(&json!({ "mode": mode })).is_empty());
        }
        let full = json!({"mode": "custom", "allow_domains": ["*.example.com"], "allow_cidrs": ["10.0.0.0/8"],
            "transforms": [{"domain": "api.example.com", "inject_headers": {"authorization": "x"}, "strip_headers": ["cookie"]}]});
        let policy = NetworkPolicy::from_json(&full, &mut FieldErrors::default()).unwrap();
        let mut shown = full;
        shown["transforms"][0]["inject_headers"]["authorization"] = json!("[redacted]");
        assert_eq!(serde_json::to_value(&policy).unwrap(), shown);
        assert_eq!(serde_json::to_value(policy.redacted()).unwrap(), shown);
    }

    #[test]
    fn values_are_kept_by_name_and_shown_nowhere() {
        let asked = json!({"mode": "allow-all", "transforms": [
            {"domain": "a.example.com", "inject_headers": {"authorization": "s3cret", "x-key": "t0ken"}}]});
        let mut policy = NetworkPolicy::from_json(&asked, &mut FieldErrors::default()).unwrap();
        assert!(!format!("{policy:?}").contains("s3cret"));
        let (mut names, mut kept) = (["one", "two"].into_iter(), Vec::new());
        let keep = |name: &str, text: &str| {
            kept.push((name.to_owned(), text.to_owned()));
            Ok::<_, ()>(())
        };
        policy.keep(|| names.next().unwrap().to_owned(), keep).unwrap();
        assert_eq!(kept, [("one".to_owned(), "s3cret".to_owned()), ("two".to_owned(), "t0ken".to_owned())]);
        assert_eq!(policy.secrets().collect::<Vec<_>>(), ["one", "two"]);
        // As a record has it, and as it is read again.
        let stored = serde_json::to_value(&policy).unwrap();
        assert_eq!(
            stored["transforms"][0]["inject_headers"],
            json!({"authorization": {"secret": "one"}, "x-key": {"secret": "two"}})
        );
        assert_eq!(serde_json::from_value::<NetworkPolicy>(stored).unwrap(), policy);
        let shown = serde_json::to_string(&policy.redacted()).unwrap();
        assert!(!shown.contains("s3cret") && !shown.contains("one"), "{shown}");
        // A request cannot name what is kept of somebody else.
        let named = json!({"mode": "allow-all", "transforms": [
            {"domain": "a.example.com", "inject_headers": {"authorization": {"secret": "one"}}}]});
        assert_eq!(errors_of(&named), ["network_policy.transforms[0].inject_headers"]);
    }

    #[test]
    fn bounds_and_forms_are_named_by_field() {
        let many = |n: usize| vec!["a.example.com"; n];
        assert!(errors_of(&json!({"mode": "custom", "allow_domains": many(50)})).is_empty());
        assert_eq!(errors_of(&json!({"mode": "custom", "allow_domains": many(51)})), ["network_policy.allow_domains"]);
        assert_eq!(
            errors_of(&json!({"mode": "custom", "allow_cidrs": vec!["1.2.3.4/32"; 11]})),
            ["network_policy.allow_cidrs"]
        );
        assert_eq!(
            errors_of(&json!({"mode": "custom", "transforms": vec![json!({"domain": "a.b"}); 21]})),
            ["network_policy.transforms"]
        );
        assert_eq!(errors_of(&json!({"mode": "sometimes"})), ["network_policy"]);
        assert_eq!(
            errors_of(&json!({"mode": "deny-all", "transforms": [{"domain": "a.b"}]})),
            ["network_policy.transforms"]
        );
        assert_eq!(errors_of(&json!({"allow_cidrs": []})), ["network_policy"]);
        assert_eq!(errors_of(&json!({"mode": "deny-all", "allow_domains": ["a.b"]})), ["network_policy.allow_domains"]);
        assert_eq!(
            errors_of(&json!({"mode": "custom", "allow_domains": ["localhost"]})),
            ["network_policy.allow_domains[0]"]
        );
        assert_eq!(
            errors_of(&json!({"mode": "custom", "allow_cidrs": ["10.0.0.0/33"]})),
            ["network_policy.allow_cidrs[0]"]
        );
    }
}
