//! The host's own namespace: its one table, and forwarding.
//!
//! The table is the second wall: whatever a sandbox's own rules let out, its packets reach neither another sandbox nor this host, and nothing
//! comes to it that it did not ask for.
//!
//! Forwarding is turned on link by link, for our veths and for the links that answers come in by. Where the host was no router before, it
//! becomes none for others: the table drops what is neither from a sandbox nor to one.

use super::nft::expression::{self as nft, TCP, accept, discard, state};
use super::nft::{Chain, Content, Hook, Set, Table, hook};
use super::policy::Operator;
use super::range::{Range, merged};
use std::io;
use std::path::PathBuf;

/// Name of the table.
pub(super) const TABLE: &str = "stasis";

/// Before other tables of the host decide.
const EARLY: i32 = -10;
const CHANGE_SOURCE: i32 = 100;

/// The table of a host whose veths have names with `prefix` and addresses in `addresses`.
pub(super) fn table(prefix: &str, addresses: Range, operator: &Operator, was_router: bool) -> Table {
    let hooked = |kind, number, priority| Some(Hook { kind, number, priority, drops: false });
    let (from, to) = (nft::from_links(prefix), nft::to_links(prefix));
    let answers = nft::connection_state(state::ESTABLISHED | state::RELATED);
    let mut forward = vec![
        [from.clone(), to.clone(), discard()].concat(),
        [from.clone(), nft::not_ipv4(), discard()].concat(),
        [from.clone(), accept()].concat(),
        [to.clone(), answers.clone(), accept()].concat(),
        [to, discard()].concat(),
    ];
    if !was_router {
        forward.push(discard());
    }
    let open = [from.clone(), nft::ipv4(), nft::to_set("allowed")].concat();
    let input = vec![
        [open, accept()].concat(),
        [from.clone(), nft::protocol(TCP), nft::reset()].concat(),
        [from, nft::prohibit()].concat(),
    ];
    let masquerade = [
        nft::ipv4(),
        nft::from_range(addresses.first(), addresses.prefix()),
        nft::not_to_links(prefix),
        nft::masquerade(),
    ]
    .concat();
    Table {
        name: TABLE,
        counters: Vec::new(),
        sets: vec![Set { name: "allowed", content: Content::Ranges(merged(operator.allow.iter().copied())) }],
        chains: vec![
            Chain { name: "forward", hook: hooked("filter", hook::FORWARD, EARLY), rules: forward },
            Chain { name: "input", hook: hooked("filter", hook::INPUT, EARLY), rules: input },
            Chain { name: "leave", hook: hooked("nat", hook::POSTROUTING, CHANGE_SOURCE), rules: vec![masquerade] },
        ],
    }
}

/// Whether the calling thread's namespace forwards by itself.
pub(super) fn is_router() -> io::Result<bool> {
    std::fs::read_to_string(setting("all")).map(|text| text.trim() != "0")
}

/// Lets packets that come in by `link` be forwarded.
pub(super) fn forward_from(link: &str) -> io::Result<()> {
    std::fs::write(setting(link), "1")
}

fn setting(link: &str) -> PathBuf {
    PathBuf::from("/proc/sys/net/ipv4/conf").join(link).join("forwarding")
}
