//! The rules of a sandbox's namespace, made from its policy: a pure function, so that what is decided can be read and tested here.
//!
//! ```text
//!  guest ── tap ──▶ prerouting, before any address is changed: chain `egress` decides, marks the connection with its rule, and counts
//!                     ├─ DNS and, where names decide, 80/443 ──▶ nat: redirected to a socket of this namespace (resolver, proxy)
//!                     ├─ allowed ──▶ forward ──▶ masqueraded, out by the uplink
//!                     └─ refused ──▶ noted with its reason, answered at once (a reset, or "prohibited")
//! ```
//!
//! Every decision is taken in one chain that sees the packet as the guest sent it. What it did not mark is dropped by `input` and `forward`
//! all the same. A connection that was let through once goes on: a policy is fixed for the life of a network, so none outlives its policy.
//!
//! A segment of a TCP connection that this namespace never saw begin is answered with a reset: that is how the connections from before a wake
//! end at once, in place of waiting for their timeouts.

use super::nft::expression::{
    self as nft, ICMP, Rule, TCP, UDP, accept, count, count_by_mark, discard, go, redirect, set_mark, state, tcp_flags,
    to_port,
};
use super::nft::{Chain, Content, Hook, Set, Table, hook};
use super::policy::{Mode, Operator, Policy, RESERVED};
use super::range::{Range, merged};
use super::{GUEST, TAP, UPLINK};
use std::net::Ipv4Addr;

/// Where the egress proxy listens in the namespace.
pub(super) const PROXY_PORT: u16 = 3129;
/// Where the resolver does, UDP and TCP.
pub(super) const RESOLVER_PORT: u16 = 3053;

/// Name of the table.
pub(super) const TABLE: &str = "sandbox";
/// Set of what was refused.
pub(super) const REFUSED: &str = "refused";
/// What is remembered of refusals, and for how long.
const REFUSALS: u32 = 256;
pub(super) const REFUSAL_MS: u64 = 30 * 60 * 1000;

/// Before this, conntrack has seen the packet; after it, addresses are changed.
const DECIDE: i32 = -150;
const CHANGE_DESTINATION: i32 = -100;
const FILTER: i32 = 0;
const CHANGE_SOURCE: i32 = 100;
const LAST: i32 = 300;

/// A rule that let something pass: also the mark of its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Passed {
    /// Names, asked of the resolver.
    Dns,
    /// TCP 80 and 443, for the proxy to decide.
    Proxy,
    /// The operator's list.
    Operator,
    /// Entry of the policy's `allow`.
    Range(u16),
    /// All that is not reserved: allow-all.
    Internet,
}

impl Passed {
    fn mark(self) -> u32 {
        match self {
            Self::Dns => 1,
            Self::Proxy => 2,
            Self::Operator => 3,
            Self::Internet => 4,
            Self::Range(entry) => 16 + u32::from(entry),
        }
    }

    /// As it is called in counters and answers.
    pub fn name(self) -> String {
        match self {
            Self::Dns => "dns".to_owned(),
            Self::Proxy => "proxy".to_owned(),
            Self::Operator => "operator".to_owned(),
            Self::Internet => "internet".to_owned(),
            Self::Range(entry) => format!("cidr.{entry}"),
        }
    }
}

/// Why something was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// Nothing in the policy names it.
    Policy,
    /// A private, link-local, loopback, multicast or otherwise reserved address, and no list names it.
    Reserved,
    /// An address of the host.
    Host,
    /// The operator's list of what nobody may reach.
    Operator,
    /// More connections at once than are allowed.
    Connections,
    /// New connections faster than is allowed.
    Rate,
    /// Neither TCP, UDP nor ICMP.
    Protocol,
    /// IPv6, which sandboxes do not have.
    Ipv6,
    /// A source address that is not the guest's.
    Source,
    /// TCP of a connection that never began here.
    Stale,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Policy,
        Self::Reserved,
        Self::Host,
        Self::Operator,
        Self::Connections,
        Self::Rate,
        Self::Protocol,
        Self::Ipv6,
        Self::Source,
        Self::Stale,
    ];

    /// As it is called in counters and answers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Policy => "policy",
            Self::Reserved => "reserved-address",
            Self::Host => "host-address",
            Self::Operator => "operator",
            Self::Connections => "too-many-connections",
            Self::Rate => "too-fast",
            Self::Protocol => "protocol",
            Self::Ipv6 => "ipv6",
            Self::Source => "source-address",
            Self::Stale => "stale-connection",
        }
    }

    fn code(self) -> u32 {
        self as u32
    }

    pub(super) fn from_code(code: u32) -> Option<Self> {
        Self::ALL.get(code as usize).copied()
    }

    fn counter(self) -> String {
        format!("refused.{}", self.name())
    }
}

/// Counters of a rule: packets and octets of both ways, and connections.
pub(super) fn counter(kind: &str, passed: Passed) -> String {
    format!("{kind}.{}", passed.name())
}

/// The table of a sandbox with this policy, on a host with these addresses.
pub(super) fn table(policy: &Policy, operator: &Operator, host: &[Ipv4Addr]) -> Table {
    let rules = rules_that_pass(policy);
    let by_mark = |kind: &str| rules.iter().map(|passed| (passed.mark(), counter(kind, *passed))).collect();
    let mut counters: Vec<String> = Reason::ALL.iter().map(|reason| reason.counter()).collect();
    for kind in ["new", "out", "in"] {
        counters.extend(rules.iter().map(|passed| counter(kind, *passed)));
    }
    let ranges = |ranges: &[Range]| Content::Ranges(merged(ranges.iter().copied()));
    let host: Vec<Range> = host.iter().map(|address| Range::one(*address)).collect();
    Table {
        name: TABLE,
        counters,
        sets: vec![
            Set { name: REFUSED, content: Content::Notes { size: REFUSALS, forget_ms: REFUSAL_MS } },
            Set { name: "out", content: Content::Counters(by_mark("out")) },
            Set { name: "in", content: Content::Counters(by_mark("in")) },
            Set { name: "host", content: ranges(&host) },
            Set { name: "reserved", content: ranges(RESERVED) },
            Set { name: "denied", content: ranges(&operator.deny) },
            Set { name: "allowed", content: ranges(&operator.allow) },
        ],
        chains: chains(policy, operator),
    }
}

fn rules_that_pass(policy: &Policy) -> Vec<Passed> {
    if policy.mode == Mode::DenyAll {
        return Vec::new();
    }
    let mut rules = vec![Passed::Dns, Passed::Operator];
    rules.extend(policy.proxy.then_some(Passed::Proxy));
    rules.extend((0..).zip(&policy.allow).map(|(entry, _)| Passed::Range(entry)));
    rules.extend((policy.mode == Mode::AllowAll).then_some(Passed::Internet));
    rules
}

fn chains(policy: &Policy, operator: &Operator) -> Vec<Chain> {
    let hooked = |kind, number, priority, drops| Some(Hook { kind, number, priority, drops });
    let refusals =
        Reason::ALL.iter().map(|reason| Chain { name: refusal_chain(*reason), hook: None, rules: refuse(*reason) });
    let mut chains: Vec<Chain> = refusals.collect();
    chains.push(Chain {
        name: "egress",
        hook: hooked("filter", hook::PREROUTING, DECIDE, false),
        rules: egress(policy, operator),
    });
    let redirected = |passed: Passed, protocol, port| {
        [nft::from_link(TAP), nft::ipv4(), nft::protocol(protocol), nft::marked(passed.mark()), redirect(port)].concat()
    };
    chains.push(Chain {
        name: "to-egress",
        hook: hooked("nat", hook::PREROUTING, CHANGE_DESTINATION, false),
        rules: vec![
            redirected(Passed::Dns, UDP, RESOLVER_PORT),
            redirected(Passed::Dns, TCP, RESOLVER_PORT),
            redirected(Passed::Proxy, TCP, PROXY_PORT),
        ],
    });
    chains.push(Chain {
        name: "input",
        hook: hooked("filter", hook::INPUT, FILTER, true),
        rules: vec![
            [nft::from_link(TAP), nft::redirected(), accept()].concat(),
            [nft::connection_state(state::ESTABLISHED | state::RELATED), accept()].concat(),
        ],
    });
    chains.push(Chain {
        name: "forward",
        hook: hooked("filter", hook::FORWARD, FILTER, true),
        rules: vec![
            [nft::from_link(TAP), nft::to_link(UPLINK), accept()].concat(),
            [
                nft::from_link(UPLINK),
                nft::to_link(TAP),
                nft::connection_state(state::ESTABLISHED | state::RELATED),
                accept(),
            ]
            .concat(),
        ],
    });
    chains.push(Chain {
        name: "leave",
        hook: hooked("nat", hook::POSTROUTING, CHANGE_SOURCE, false),
        rules: vec![[nft::ipv4(), nft::to_link(UPLINK), nft::masquerade()].concat()],
    });
    chains.push(Chain {
        name: "incoming",
        hook: hooked("filter", hook::POSTROUTING, LAST, false),
        rules: vec![[nft::to_link(TAP), count_by_mark("in")].concat()],
    });
    chains
}

/// What happens to a packet of the guest.
fn egress(policy: &Policy, operator: &Operator) -> Vec<Rule> {
    let limits = operator.limits;
    let mut rules = vec![
        [nft::not_from_link(TAP), accept()].concat(),
        [nft::not_ipv4(), to(Reason::Ipv6)].concat(),
        [nft::not_from_address(GUEST), to(Reason::Source)].concat(),
    ];
    // Counting and letting pass are two rules: an error about a connection may belong to one without a mark.
    let known = nft::connection_state(state::ESTABLISHED | state::RELATED);
    rules.push([known.clone(), count_by_mark("out")].concat());
    rules.push([known, accept()].concat());
    let tcp = nft::protocol(TCP);
    let all = tcp_flags::FIN | tcp_flags::SYN | tcp_flags::RST | tcp_flags::ACK;
    // A reset is not answered, so that two sides never reset each other for ever.
    rules.push([tcp.clone(), nft::flags(tcp_flags::RST, tcp_flags::RST), discard()].concat());
    rules.push([tcp.clone(), nft::not_flags(all, tcp_flags::SYN), to(Reason::Stale)].concat());
    rules.push([nft::connection_state(state::INVALID), discard()].concat());
    rules.push([nft::faster_than(limits.new_per_second, limits.burst), to(Reason::Rate)].concat());
    rules.push([nft::more_than(limits.connections), to(Reason::Connections)].concat());
    if policy.mode != Mode::DenyAll {
        for protocol in [UDP, TCP] {
            rules.push([nft::protocol(protocol), to_port(53), pass(Passed::Dns)].concat());
        }
        rules.push([nft::to_set("denied"), to(Reason::Operator)].concat());
        rules.push([nft::to_set("allowed"), pass(Passed::Operator)].concat());
        // The host is the operator's: no policy of a tenant's opens it.
        rules.push([nft::to_set("host"), to(Reason::Host)].concat());
        // A reserved address is opened by an entry that means it, not by one as wide as 0.0.0.0/0. Where names decide, the proxy is asked
        // about the web even so: requests to a name in such a range may have to be changed.
        let (meant, wide): (Vec<_>, Vec<_>) = (0..).zip(&policy.allow).partition(|(_, range)| is_reserved(**range));
        let open = |to_proxy: bool, (entry, range): (u16, &Range)| {
            let range = nft::to_range(range.first(), range.prefix());
            let web = [80, 443].into_iter().filter(|_| to_proxy);
            let web = web.map(|port| [range.clone(), tcp.clone(), to_port(port), pass(Passed::Proxy)].concat());
            let all = [range.clone(), pass(Passed::Range(entry))].concat();
            web.chain([all]).collect::<Vec<_>>()
        };
        rules.extend(meant.into_iter().flat_map(|entry| open(policy.proxy, entry)));
        rules.push([nft::to_set("reserved"), to(Reason::Reserved)].concat());
        if policy.proxy {
            rules.extend([80, 443].map(|port| [tcp.clone(), to_port(port), pass(Passed::Proxy)].concat()));
        }
        rules.extend(wide.into_iter().flat_map(|entry| open(false, entry)));
        if policy.mode == Mode::AllowAll {
            for protocol in [TCP, UDP, ICMP] {
                rules.push([nft::protocol(protocol), pass(Passed::Internet)].concat());
            }
            rules.push(to(Reason::Protocol));
        }
    }
    rules.push(to(Reason::Policy));
    rules
}

/// Whether all of `range` is reserved.
fn is_reserved(range: Range) -> bool {
    RESERVED.iter().any(|reserved| reserved.contains(range.first()) && reserved.contains(range.last()))
}

/// Marks the connection, counts it and its first packet, and lets it pass.
fn pass(passed: Passed) -> Rule {
    let counted = [count(&counter("new", passed)), count(&counter("out", passed))].concat();
    [set_mark(passed.mark()), counted, accept()].concat()
}

/// On to what is done with refused packets.
fn to(reason: Reason) -> Rule {
    go(refusal_chain(reason))
}

fn refusal_chain(reason: Reason) -> &'static str {
    match reason {
        Reason::Policy => "refuse-policy",
        Reason::Reserved => "refuse-reserved",
        Reason::Host => "refuse-host",
        Reason::Operator => "refuse-operator",
        Reason::Connections => "refuse-connections",
        Reason::Rate => "refuse-rate",
        Reason::Protocol => "refuse-protocol",
        Reason::Ipv6 => "refuse-ipv6",
        Reason::Source => "refuse-source",
        Reason::Stale => "refuse-stale",
    }
}

/// Counts, notes what a user may want to know of, and answers at once; storms and forgeries are not answered.
fn refuse(reason: Reason) -> Vec<Rule> {
    let mut rules = vec![count(&reason.counter())];
    if !matches!(reason, Reason::Ipv6 | Reason::Source | Reason::Stale) {
        for protocol in [TCP, UDP] {
            rules.push([nft::protocol(protocol), nft::note(REFUSED, true, reason.code())].concat());
        }
        rules.push([nft::not_protocol(TCP), nft::not_protocol(UDP), nft::note(REFUSED, false, reason.code())].concat());
    }
    if matches!(reason, Reason::Ipv6 | Reason::Source | Reason::Rate) {
        rules.push(discard());
    } else {
        rules.push([nft::protocol(TCP), nft::reset()].concat());
        rules.push(nft::prohibit());
    }
    rules
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(mode: Mode, allow: &[&str]) -> Policy {
        Policy { mode, allow: allow.iter().map(|range| range.parse().unwrap()).collect(), proxy: mode == Mode::Custom }
    }

    fn chain<'a>(table: &'a Table, name: &str) -> &'a Chain {
        table.chains.iter().find(|chain| chain.name == name).unwrap()
    }

    /// Where `needle` stands among the rules of `egress`.
    fn place(table: &Table, needle: &Rule) -> Option<usize> {
        let rules = &chain(table, "egress").rules;
        rules.iter().position(|rule| rule.windows(needle.len()).any(|part| part == needle.as_slice()))
    }

    #[test]
    fn what_no_rule_decides_is_dropped_and_what_leaves_egress_was_decided() {
        for mode in [Mode::AllowAll, Mode::DenyAll, Mode::Custom] {
            let table = table(&policy(mode, &[]), &Operator::default(), &[]);
            assert!(chain(&table, "input").hook.unwrap().drops && chain(&table, "forward").hook.unwrap().drops);
            let last = chain(&table, "egress").rules.last().unwrap();
            assert_eq!(last, &to(Reason::Policy), "{mode:?}");
        }
    }

    #[test]
    fn deny_all_lets_nothing_new_pass() {
        let table = table(&policy(Mode::DenyAll, &["10.0.0.0/8"]), &Operator::default(), &[]);
        for passed in [Passed::Dns, Passed::Proxy, Passed::Operator, Passed::Internet, Passed::Range(0)] {
            assert_eq!(place(&table, &set_mark(passed.mark())), None, "{passed:?}");
        }
    }

    #[test]
    fn a_wide_entry_does_not_open_reserved_addresses_and_one_that_means_them_does() {
        let table =
            table(&policy(Mode::Custom, &["0.0.0.0/0", "10.1.0.0/16", "10.0.0.0/7"]), &Operator::default(), &[]);
        let reserved = place(&table, &nft::to_set("reserved")).unwrap();
        let entry = |entry| place(&table, &set_mark(Passed::Range(entry).mark())).unwrap();
        assert!(entry(1) < reserved);
        assert!(entry(0) > reserved && entry(2) > reserved);
    }

    #[test]
    fn the_operator_comes_first_and_the_host_before_the_tenant() {
        let table = table(&policy(Mode::Custom, &["10.1.0.0/16"]), &Operator::default(), &[GUEST]);
        let order = ["denied", "allowed", "host"].map(|set| place(&table, &nft::to_set(set)).unwrap());
        assert!(order.is_sorted() && order[2] < place(&table, &set_mark(Passed::Range(0).mark())).unwrap());
    }

    #[test]
    fn every_chain_that_is_led_to_is_there_and_marks_are_distinct() {
        let all: Vec<_> = (0..10).map(Passed::Range).collect();
        let mut marks: Vec<_> = [Passed::Dns, Passed::Proxy, Passed::Operator, Passed::Internet]
            .iter()
            .chain(&all)
            .map(|passed| passed.mark())
            .collect();
        marks.sort_unstable();
        marks.dedup();
        assert_eq!(marks.len(), 14);
        let table = table(&policy(Mode::AllowAll, &[]), &Operator::default(), &[]);
        for reason in Reason::ALL {
            assert!(table.chains.iter().any(|chain| chain.name == refusal_chain(reason)));
            assert_eq!(Reason::from_code(reason.code()), Some(reason));
        }
    }
}
