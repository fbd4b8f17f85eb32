//! What a sandbox's networks did: the reports of warden and proxy put together, and summed over its lives. Pure.
//!
//! Each wake has a network of its own, whose counters begin at nothing. What those before it counted is kept in memory, and forgotten by a
//! restart of the supervisor.

use crate::network_policy::NetworkPolicy;
use crate::sources::{UnixMs, rfc3339};
use crate::wire::network::{Refusal, RuleActivity};
use stasis_egress::control::types::{self as egress, SandboxReport};
use stasis_warden::network as warden;
use std::collections::BTreeMap;

/// Refusals that are remembered.
const REMEMBERED: usize = 100;

/// Counters by rule, and the last refusals.
#[derive(Clone, Debug, Default)]
pub struct Activity {
    rules: BTreeMap<String, RuleActivity>,
    /// With the time of each, the latest first.
    refusals: Vec<(UnixMs, Refusal)>,
}

impl Activity {
    /// Adds what the warden counted for a network of this policy.
    pub fn add_network(&mut self, report: &warden::Report, policy: &NetworkPolicy, now: UnixMs) {
        for (rule, traffic) in &report.passed {
            let name = match rule.strip_prefix("cidr.").and_then(|entry| entry.parse::<usize>().ok()) {
                Some(entry) => format!("cidr {}", policy.allow_cidrs.get(entry).map_or("", String::as_str)),
                None => rule.clone(),
            };
            // What goes to proxy and resolver is counted there, by name.
            let through_egress = rule == "proxy" || rule == "dns";
            if traffic.connections == 0 || through_egress {
                continue;
            }
            let sum = self.rule(&name);
            sum.allowed += traffic.connections;
            sum.bytes_out += traffic.bytes_out;
            sum.bytes_in += traffic.bytes_in;
        }
        for (reason, packets) in report.refused.iter().filter(|(_, packets)| **packets > 0) {
            self.rule(reason).refused += packets;
        }
        self.remember(report.refusals.iter().map(|refusal| {
            let at = now.saturating_sub_unsigned(refusal.ago_ms);
            let seen = Refusal {
                at: rfc3339(at),
                protocol: refusal.protocol.clone(),
                name: None,
                address: Some(refusal.address.to_string()),
                port: refusal.port,
                reason: refusal.reason.clone(),
                message: sentence(&refusal.reason).to_owned(),
                times: refusal.times,
            };
            (at, seen)
        }));
    }

    /// Adds what the proxy and the resolver counted.
    pub fn add_egress(&mut self, report: &SandboxReport) {
        for (rule, counters) in &report.rules {
            let sum = self.rule(rule);
            sum.allowed += counters.allowed;
            sum.refused += counters.refused;
            sum.bytes_out += counters.bytes_up;
            sum.bytes_in += counters.bytes_down;
        }
        self.remember(report.refusals.iter().map(|refusal| {
            let at = UnixMs::try_from(refusal.at_ms).unwrap_or_default();
            (at, of_egress(refusal, at))
        }));
    }

    /// Adds what another life counted.
    pub fn merge(&mut self, other: &Self) {
        for (name, rule) in &other.rules {
            let sum = self.rule(name);
            sum.allowed += rule.allowed;
            sum.refused += rule.refused;
            sum.bytes_out += rule.bytes_out;
            sum.bytes_in += rule.bytes_in;
        }
        self.remember(other.refusals.iter().cloned());
    }

    fn rule(&mut self, name: &str) -> &mut RuleActivity {
        let new = || RuleActivity { rule: name.to_owned(), ..RuleActivity::default() };
        self.rules.entry(name.to_owned()).or_insert_with(new)
    }

    fn remember(&mut self, more: impl Iterator<Item = (UnixMs, Refusal)>) {
        self.refusals.extend(more);
        self.refusals.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
        self.refusals.truncate(REMEMBERED);
    }

    /// By rule.
    pub fn rules(&self) -> Vec<RuleActivity> {
        self.rules.values().cloned().collect()
    }

    /// The latest first.
    pub fn refusals(&self) -> Vec<Refusal> {
        self.refusals.iter().map(|(_, refusal)| refusal.clone()).collect()
    }

    /// Of all rules together.
    pub fn total(&self) -> RuleActivity {
        self.rules.values().fold(RuleActivity::default(), |sum, rule| RuleActivity {
            rule: String::new(),
            allowed: sum.allowed + rule.allowed,
            refused: sum.refused + rule.refused,
            bytes_out: sum.bytes_out + rule.bytes_out,
            bytes_in: sum.bytes_in + rule.bytes_in,
        })
    }
}

fn of_egress(refusal: &egress::Refusal, at: UnixMs) -> Refusal {
    Refusal {
        at: rfc3339(at),
        protocol: word(&refusal.via),
        // A question's name ends with a dot, a host's does not.
        name: refusal.name.as_ref().map(|name| name.strip_suffix('.').unwrap_or(name).to_owned()),
        address: refusal.address.map(|address| address.to_string()),
        port: refusal.port,
        reason: word(&refusal.kind),
        message: refusal.reason.clone(),
        times: 1,
    }
}

/// As the type is called on the wire.
fn word(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn sentence(reason: &str) -> &'static str {
    match reason {
        "policy" => "nothing in the sandbox's policy allows it",
        "reserved-address" => "a private, link-local or otherwise reserved address that no entry of allow_cidrs names",
        "host-address" => "an address of the host itself",
        "operator" => "the operator of this host lets no sandbox reach it",
        "too-many-connections" => "the sandbox has as many connections as it may have",
        "too-fast" => "the sandbox began new connections faster than it may",
        "protocol" => "neither TCP, UDP nor ICMP",
        _ => "it is refused",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stasis_egress::control::types::{RefusalKind, RuleCounters, Via};
    use stasis_warden::network::Traffic;

    #[test]
    fn both_walls_are_one_report_in_the_order_of_time() {
        let policy = NetworkPolicy { allow_cidrs: vec!["10.0.0.0/8".to_owned()], ..NetworkPolicy::OPEN };
        let traffic = Traffic { connections: 2, packets_out: 3, bytes_out: 300, packets_in: 4, bytes_in: 4000 };
        let refused = warden::Refusal {
            address: "10.1.2.3".parse().unwrap(),
            protocol: "tcp".to_owned(),
            port: Some(22),
            reason: "reserved-address".to_owned(),
            times: 3,
            ago_ms: 1000,
        };
        let network = warden::Report {
            passed: [("cidr.0", traffic), ("proxy", traffic), ("internet", Traffic::default())]
                .map(|(rule, traffic)| (rule.to_owned(), traffic))
                .into(),
            refused: [("reserved-address".to_owned(), 3), ("ipv6".to_owned(), 0)].into(),
            refusals: vec![refused],
        };
        let egress = SandboxReport {
            rules: [(
                "domain a.example.com".to_owned(),
                RuleCounters { allowed: 1, refused: 0, bytes_up: 5, bytes_down: 7 },
            )]
            .into(),
            refusals: vec![egress::Refusal {
                at_ms: 9_500,
                via: Via::Tls,
                kind: RefusalKind::NameNotAllowed,
                name: Some("b.example.com.".to_owned()),
                address: None,
                port: Some(443),
                reason: "no rule allows b.example.com".to_owned(),
            }],
            ..SandboxReport::default()
        };
        let mut activity = Activity::default();
        activity.add_network(&network, &policy, 10_000);
        activity.add_network(&network, &policy, 10_000);
        activity.add_egress(&egress);
        let rules: Vec<_> = activity.rules().into_iter().map(|rule| (rule.rule, rule.allowed, rule.refused)).collect();
        let expected = [("cidr 10.0.0.0/8", 4, 0), ("domain a.example.com", 1, 0), ("reserved-address", 0, 6)];
        assert_eq!(rules, expected.map(|(rule, allowed, refused)| (rule.to_owned(), allowed, refused)));
        let total = activity.total();
        assert_eq!((total.allowed, total.refused, total.bytes_out, total.bytes_in), (5, 6, 605, 8007));
        let order: Vec<_> = activity.refusals().into_iter().map(|refusal| (refusal.reason, refusal.times)).collect();
        assert_eq!(order[0], ("name-not-allowed".to_owned(), 1));
        assert_eq!(order[1], ("reserved-address".to_owned(), 3));
    }
}
