//! What happened to a sandbox's traffic: counters by rule, and the last refusals. Values of headers and bodies never come here; names,
//! addresses and reasons do.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::control::types::{MAX_REFUSALS, Refusal, RefusalKind, RuleCounters, SandboxReport, Via};

/// Rules that have counters of their own at most, over all policies that a sandbox had; the others share one.
const MAX_RULES: usize = 256;
/// The rule of those that are too many.
const OTHERS: &str = "others";
/// Bytes of a reason at most.
const MAX_REASON: usize = 300;

/// Counters of one rule.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    allowed: AtomicU64,
    refused: AtomicU64,
    up: AtomicU64,
    down: AtomicU64,
}

impl Tally {
    pub(crate) fn allow(&self) {
        self.allowed.fetch_add(1, Relaxed);
    }

    pub(crate) fn up(&self, bytes: u64) {
        self.up.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn down(&self, bytes: u64) {
        self.down.fetch_add(bytes, Relaxed);
    }

    fn report(&self) -> RuleCounters {
        RuleCounters {
            allowed: self.allowed.load(Relaxed),
            refused: self.refused.load(Relaxed),
            bytes_up: self.up.load(Relaxed),
            bytes_down: self.down.load(Relaxed),
        }
    }
}

/// Why something is refused, and of what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    pub(crate) kind: RefusalKind,
    pub(crate) name: Option<String>,
    pub(crate) address: Option<IpAddr>,
    pub(crate) reason: String,
}

impl Refused {
    pub(crate) fn new(kind: RefusalKind, reason: impl Into<String>) -> Self {
        Self { kind, name: None, address: None, reason: reason.into() }
    }

    pub(crate) fn of(mut self, name: &dyn std::fmt::Display) -> Self {
        self.name = Some(name.to_string());
        self
    }

    pub(crate) fn at(mut self, address: impl Into<IpAddr>) -> Self {
        self.address = Some(address.into());
        self
    }
}

/// One sandbox's.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    rules: Mutex<HashMap<String, Arc<Tally>>>,
    refusals: Mutex<VecDeque<Refusal>>,
    connections: AtomicU64,
}

impl Counters {
    /// The counters of the rule called `rule`.
    pub(crate) fn rule(&self, rule: &str) -> Arc<Tally> {
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        let rule = if rules.len() < MAX_RULES || rules.contains_key(rule) { rule } else { OTHERS };
        Arc::clone(rules.entry(rule.to_owned()).or_default())
    }

    /// Counts and keeps a refusal by the rule that `tally` is of.
    pub(crate) fn refuse(&self, tally: &Tally, via: Via, refused: &Refused, port: Option<u16>, now: SystemTime) {
        tally.refused.fetch_add(1, Relaxed);
        let cut = refused.reason.floor_char_boundary(MAX_REASON);
        let refusal = Refusal {
            at_ms: unix_ms(now),
            via,
            kind: refused.kind,
            name: refused.name.clone(),
            address: refused.address,
            port,
            reason: refused.reason.get(..cut).unwrap_or_default().to_owned(),
        };
        let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        if refusals.len() >= MAX_REFUSALS {
            refusals.pop_front();
        }
        refusals.push_back(refusal);
    }

    /// Counts a connection for as long as the answer lives.
    pub(crate) fn connection(self: &Arc<Self>) -> OpenConnection {
        self.connections.fetch_add(1, Relaxed);
        OpenConnection(Arc::clone(self))
    }

    /// Connections that are open.
    pub(crate) fn connections(&self) -> u64 {
        self.connections.load(Relaxed)
    }

    pub(crate) fn report(&self, generation: u64) -> SandboxReport {
        let mut report = SandboxReport { generation, connections: self.connections(), ..SandboxReport::default() };
        for (rule, tally) in self.rules.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let counters = tally.report();
            report.allowed += counters.allowed;
            report.refused += counters.refused;
            report.bytes_up += counters.bytes_up;
            report.bytes_down += counters.bytes_down;
            if counters != RuleCounters::default() {
                report.rules.insert(rule.clone(), counters);
            }
        }
        report.refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect();
        report
    }
}

/// See [`Counters::connection`].
pub(crate) struct OpenConnection(Arc<Counters>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Relaxed);
    }
}

/// Milliseconds since the epoch.
pub(crate) fn unix_ms(now: SystemTime) -> u64 {
    now.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_report_sums_its_rules_and_keeps_the_last_refusals() {
        let counters = Arc::new(Counters::default());
        let rule = counters.rule("domain a.example");
        rule.allow();
        rule.up(3);
        rule.down(5);
        let open = counters.connection();
        for i in 0..70_u64 {
            let refused = Refused::new(RefusalKind::NameNotAllowed, "ä".repeat(200)).of(&i);
            let now = UNIX_EPOCH + Duration::from_millis(i);
            counters.refuse(&counters.rule("default"), Via::Dns, &refused, Some(53), now);
        }
        let report = counters.report(9);
        assert_eq!((report.allowed, report.refused, report.bytes_up, report.bytes_down), (1, 70, 3, 5));
        assert_eq!((report.generation, report.connections, report.rules.len()), (9, 1, 2));
        assert_eq!(report.refusals.len(), MAX_REFUSALS);
        assert_eq!((report.refusals[0].at_ms, report.refusals[63].name.as_deref()), (6, Some("69")));
        assert!(report.refusals[0].reason.len() <= MAX_REASON);
        drop(open);
        assert_eq!(counters.connections(), 0);
    }

    #[test]
    fn rules_without_end_share_their_counters() {
        let counters = Counters::default();
        for i in 0..1000 {
            counters.rule(&format!("domain {i}.example")).allow();
        }
        let report = counters.report(0);
        assert_eq!((report.allowed, report.rules.len()), (1000, MAX_RULES + 1));
    }
}
