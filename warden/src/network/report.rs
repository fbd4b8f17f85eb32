//! What passed and what was refused, made of the kernel's counters and notes.

use super::nft::{Counted, Note};
use super::rules::{REFUSAL_MS, Reason};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;

/// What a sandbox's network did so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// What passed, by rule: `dns`, `proxy`, `operator`, `internet`, `cidr.0` and so on.
    pub passed: BTreeMap<String, Traffic>,
    /// Packets that were refused, by reason.
    pub refused: BTreeMap<String, u64>,
    /// The last refusals, the latest first. Each destination stands here once, for half an hour after it was refused last.
    pub refusals: Vec<Refusal>,
}

/// What passed by one rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Connections that it let begin.
    pub connections: u64,
    /// Packets from the guest.
    pub packets_out: u64,
    /// Octets in them, IP headers included.
    pub bytes_out: u64,
    /// Packets to the guest.
    pub packets_in: u64,
    /// Octets in them.
    pub bytes_in: u64,
}

/// One destination that was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Where it was to go.
    pub address: Ipv4Addr,
    /// `tcp`, `udp`, `icmp`, or the number.
    pub protocol: String,
    /// Port, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Why: a name of [`Reason`].
    pub reason: String,
    /// How often.
    pub times: u64,
    /// How long ago the last time was, ms.
    pub ago_ms: u64,
}

/// Puts `counters` and `notes` in order.
pub(super) fn report(counters: &[Counted], notes: &[Note]) -> Report {
    let mut report = Report::default();
    for counter in counters {
        let Some((kind, name)) = counter.name.split_once('.') else { continue };
        if kind == "refused" {
            report.refused.insert(name.to_owned(), counter.packets);
            continue;
        }
        let traffic = report.passed.entry(name.to_owned()).or_default();
        match kind {
            "new" => traffic.connections = counter.packets,
            "out" => (traffic.packets_out, traffic.bytes_out) = (counter.packets, counter.bytes),
            "in" => (traffic.packets_in, traffic.bytes_in) = (counter.packets, counter.bytes),
            _ => {}
        }
    }
    report.refusals = notes.iter().filter_map(refusal).collect();
    report.refusals.sort_by_key(|refusal| refusal.ago_ms);
    report
}

fn refusal(note: &Note) -> Option<Refusal> {
    let protocol = match note.protocol {
        1 => "icmp".to_owned(),
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        other => other.to_string(),
    };
    Some(Refusal {
        address: note.address,
        protocol,
        port: matches!(note.protocol, 6 | 17).then_some(note.port),
        reason: Reason::from_code(note.reason)?.name().to_owned(),
        times: note.times,
        ago_ms: REFUSAL_MS.saturating_sub(note.forgotten_in_ms),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_put_together_by_rule_and_refusals_by_time() {
        let counted = |name: &str, packets, bytes| Counted { name: name.to_owned(), packets, bytes };
        let note = |port, forgotten_in_ms| Note {
            address: Ipv4Addr::new(10, 0, 0, 1),
            protocol: 6,
            port,
            reason: 1,
            times: 2,
            forgotten_in_ms,
        };
        let report = report(
            &[
                counted("new.cidr.0", 1, 60),
                counted("out.cidr.0", 5, 500),
                counted("in.cidr.0", 4, 4000),
                counted("refused.ipv6", 3, 0),
            ],
            &[note(80, REFUSAL_MS - 5000), note(443, REFUSAL_MS - 10)],
        );
        let traffic = Traffic { connections: 1, packets_out: 5, bytes_out: 500, packets_in: 4, bytes_in: 4000 };
        assert_eq!(report.passed, BTreeMap::from([("cidr.0".to_owned(), traffic)]));
        assert_eq!(report.refused["ipv6"], 3);
        let order: Vec<_> = report.refusals.iter().map(|r| (r.port, r.ago_ms, r.reason.as_str())).collect();
        assert_eq!(order, [(Some(443), 10, "reserved-address"), (Some(80), 5000, "reserved-address")]);
    }
}
