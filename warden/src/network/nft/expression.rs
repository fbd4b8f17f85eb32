//! The expressions of nf_tables that our rules are made of, and how the kernel wants them written (`linux/netfilter/nf_tables.h`).
//!
//! A rule is a list of expressions: some load a value into a register, some compare a register and end the rule when it differs, some do
//! something. The constructors here make the pairs that people think in: "from this link", "to this port".

use super::super::netlink::Attributes;
use std::net::Ipv4Addr;

/// One expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::network) struct Expression {
    name: &'static str,
    data: Attributes,
}

/// A rule: its expressions in order.
pub(in crate::network) type Rule = Vec<Expression>;

/// `NFTA_LIST_ELEM`
pub(super) const LIST_ELEMENT: u16 = 1;
/// `NFTA_DATA_VALUE`
pub(super) const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;

/// The first register of 16 octets, and the registers of 4 octets that it is made of.
const REGISTER: u32 = 1;
const REGISTER_32: u32 = 8;
const VERDICT_REGISTER: u32 = 0;

const EQUAL: u32 = 0;
const DIFFERENT: u32 = 1;

const META_INPUT_NAME: u32 = 6;
const META_OUTPUT_NAME: u32 = 7;
const META_FAMILY: u32 = 15;
const META_PROTOCOL: u32 = 16;

const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
const SOURCE_ADDRESS: u32 = 12;
const DESTINATION_ADDRESS: u32 = 16;
const DESTINATION_PORT: u32 = 2;
const TCP_FLAGS: u32 = 13;

const CT_STATE: u32 = 0;
const CT_STATUS: u32 = 2;
const CT_MARK: u32 = 3;

/// Protocols of a packet.
pub(in crate::network) const ICMP: u8 = 1;
pub(in crate::network) const TCP: u8 = 6;
pub(in crate::network) const UDP: u8 = 17;

/// `NFPROTO_IPV4`
const FAMILY_IPV4: u8 = 2;

/// States of a connection.
pub(in crate::network) mod state {
    /// Conntrack can make nothing of it.
    pub(in crate::network) const INVALID: u32 = 1;
    /// Of a connection that answers.
    pub(in crate::network) const ESTABLISHED: u32 = 2;
    /// An error about a connection that is known.
    pub(in crate::network) const RELATED: u32 = 4;
}

/// The destination was changed by a redirect.
const STATUS_REDIRECTED: u32 = 1 << 5;

/// TCP's flags.
pub(in crate::network) mod tcp_flags {
    pub(in crate::network) const FIN: u8 = 1;
    pub(in crate::network) const SYN: u8 = 2;
    pub(in crate::network) const RST: u8 = 4;
    pub(in crate::network) const ACK: u8 = 16;
}

impl Expression {
    fn new(name: &'static str, fill: impl FnOnce(&mut Attributes)) -> Self {
        let mut data = Attributes::default();
        fill(&mut data);
        Self { name, data }
    }

    /// As an element of a list.
    pub(super) fn encode(&self, list: &mut Attributes, kind: u16) {
        list.nested(kind, |element| {
            element.text(1, self.name).bytes(2 | 1 << 15, self.data.as_bytes());
        });
    }
}

fn meta(key: u32) -> Expression {
    Expression::new("meta", |e| {
        e.number(1, REGISTER).number(2, key);
    })
}

fn compare(operation: u32, value: &[u8]) -> Expression {
    Expression::new("cmp", |e| {
        e.number(1, REGISTER).number(2, operation).nested(3, |data| {
            data.bytes(DATA_VALUE, value);
        });
    })
}

fn payload(register: u32, base: u32, offset: u32, length: u32) -> Expression {
    Expression::new("payload", |e| {
        e.number(1, register).number(2, base).number(3, offset).number(4, length);
    })
}

fn mask(mask: &[u8]) -> Expression {
    let zero = vec![0; mask.len()];
    Expression::new("bitwise", |e| {
        e.number(1, REGISTER)
            .number(2, REGISTER)
            .number(3, u32::try_from(mask.len()).unwrap_or(u32::MAX))
            .nested(4, |data| {
                data.bytes(DATA_VALUE, mask);
            })
            .nested(5, |data| {
                data.bytes(DATA_VALUE, &zero);
            });
    })
}

fn immediate(register: u32, value: &[u8]) -> Expression {
    Expression::new("immediate", |e| {
        e.number(1, register).nested(2, |data| {
            data.bytes(DATA_VALUE, value);
        });
    })
}

fn verdict(code: i32, chain: Option<&str>) -> Expression {
    Expression::new("immediate", |e| {
        e.number(1, VERDICT_REGISTER).nested(2, |data| {
            data.nested(DATA_VERDICT, |verdict| {
                verdict.number(VERDICT_CODE, code.cast_unsigned());
                if let Some(chain) = chain {
                    verdict.text(VERDICT_CHAIN, chain);
                }
            });
        });
    })
}

fn connection(key: u32) -> Expression {
    Expression::new("ct", |e| {
        e.number(1, REGISTER).number(2, key);
    })
}

/// Any of the `bits` is set in a value of 32 bits as this machine writes it.
fn any_of(bits: u32) -> [Expression; 2] {
    [mask(&bits.to_ne_bytes()), compare(DIFFERENT, &0_u32.to_ne_bytes())]
}

fn name_bytes(name: &str) -> [u8; 16] {
    let mut bytes = [0; 16];
    let length = name.len().min(15);
    bytes[..length].copy_from_slice(&name.as_bytes()[..length]);
    bytes
}

/// Came in by this link.
pub(in crate::network) fn from_link(name: &str) -> Rule {
    vec![meta(META_INPUT_NAME), compare(EQUAL, &name_bytes(name))]
}

/// Came in by another link.
pub(in crate::network) fn not_from_link(name: &str) -> Rule {
    vec![meta(META_INPUT_NAME), compare(DIFFERENT, &name_bytes(name))]
}

/// Goes out by this link.
pub(in crate::network) fn to_link(name: &str) -> Rule {
    vec![meta(META_OUTPUT_NAME), compare(EQUAL, &name_bytes(name))]
}

/// Came in by a link whose name begins so.
pub(in crate::network) fn from_links(prefix: &str) -> Rule {
    vec![meta(META_INPUT_NAME), compare(EQUAL, prefix.as_bytes())]
}

/// Goes out by a link whose name begins so.
pub(in crate::network) fn to_links(prefix: &str) -> Rule {
    vec![meta(META_OUTPUT_NAME), compare(EQUAL, prefix.as_bytes())]
}

/// Goes out by a link whose name does not begin so.
pub(in crate::network) fn not_to_links(prefix: &str) -> Rule {
    vec![meta(META_OUTPUT_NAME), compare(DIFFERENT, prefix.as_bytes())]
}

/// Is no IPv4.
pub(in crate::network) fn not_ipv4() -> Rule {
    vec![meta(META_FAMILY), compare(DIFFERENT, &[FAMILY_IPV4])]
}

/// Is IPv4: before anything that looks at an IPv4 header, in a table of both families.
pub(in crate::network) fn ipv4() -> Rule {
    vec![meta(META_FAMILY), compare(EQUAL, &[FAMILY_IPV4])]
}

/// Is of this protocol.
pub(in crate::network) fn protocol(number: u8) -> Rule {
    vec![meta(META_PROTOCOL), compare(EQUAL, &[number])]
}

/// Is of another protocol.
pub(in crate::network) fn not_protocol(number: u8) -> Rule {
    vec![meta(META_PROTOCOL), compare(DIFFERENT, &[number])]
}

/// Goes to this port; after [`protocol`].
pub(in crate::network) fn to_port(port: u16) -> Rule {
    vec![payload(REGISTER, TRANSPORT_HEADER, DESTINATION_PORT, 2), compare(EQUAL, &port.to_be_bytes())]
}

/// Comes from another address than this one.
pub(in crate::network) fn not_from_address(address: Ipv4Addr) -> Rule {
    vec![payload(REGISTER, NETWORK_HEADER, SOURCE_ADDRESS, 4), compare(DIFFERENT, &address.octets())]
}

/// Comes from a range.
pub(in crate::network) fn from_range(address: Ipv4Addr, prefix: u8) -> Rule {
    in_range(SOURCE_ADDRESS, address, prefix)
}

/// Goes to a range.
pub(in crate::network) fn to_range(address: Ipv4Addr, prefix: u8) -> Rule {
    in_range(DESTINATION_ADDRESS, address, prefix)
}

fn in_range(offset: u32, address: Ipv4Addr, prefix: u8) -> Rule {
    let bits = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
    let network = u32::from(address) & bits;
    vec![
        payload(REGISTER, NETWORK_HEADER, offset, 4),
        mask(&bits.to_be_bytes()),
        compare(EQUAL, &network.to_be_bytes()),
    ]
}

/// Goes to an address of the set.
pub(in crate::network) fn to_set(set: &str) -> Rule {
    let lookup = Expression::new("lookup", |e| {
        e.text(1, set).number(2, REGISTER);
    });
    vec![payload(REGISTER, NETWORK_HEADER, DESTINATION_ADDRESS, 4), lookup]
}

/// The connection is in one of these states.
pub(in crate::network) fn connection_state(states: u32) -> Rule {
    std::iter::once(connection(CT_STATE)).chain(any_of(states)).collect()
}

/// The connection's destination was changed by a redirect of ours.
pub(in crate::network) fn redirected() -> Rule {
    std::iter::once(connection(CT_STATUS)).chain(any_of(STATUS_REDIRECTED)).collect()
}

/// Of those in `of`, exactly the TCP flags `set` are set; after [`protocol`].
pub(in crate::network) fn flags(of: u8, set: u8) -> Rule {
    vec![payload(REGISTER, TRANSPORT_HEADER, TCP_FLAGS, 1), mask(&[of]), compare(EQUAL, &[set])]
}

/// Of those in `of`, other TCP flags than `set` are set; after [`protocol`].
pub(in crate::network) fn not_flags(of: u8, set: u8) -> Rule {
    vec![payload(REGISTER, TRANSPORT_HEADER, TCP_FLAGS, 1), mask(&[of]), compare(DIFFERENT, &[set])]
}

/// The connection bears this mark.
pub(in crate::network) fn marked(mark: u32) -> Rule {
    vec![connection(CT_MARK), compare(EQUAL, &mark.to_ne_bytes())]
}

/// Marks the connection.
pub(in crate::network) fn set_mark(mark: u32) -> Rule {
    let set = Expression::new("ct", |e| {
        e.number(2, CT_MARK).number(4, REGISTER);
    });
    vec![immediate(REGISTER, &mark.to_ne_bytes()), set]
}

/// Counts into the counter that the map names for the connection's mark; a mark without one ends the rule.
pub(in crate::network) fn count_by_mark(map: &str) -> Rule {
    let count = Expression::new("objref", |e| {
        e.number(3, REGISTER).text(4, map);
    });
    vec![connection(CT_MARK), count]
}

/// Counts into a named counter.
pub(in crate::network) fn count(counter: &str) -> Rule {
    /// `NFT_OBJECT_COUNTER`
    const COUNTER: u32 = 1;
    vec![Expression::new("objref", |e| {
        e.number(1, COUNTER).text(2, counter);
    })]
}

/// There are more of them than `per_second`, with `burst` at once.
pub(in crate::network) fn faster_than(per_second: u32, burst: u32) -> Rule {
    vec![Expression::new("limit", |e| {
        e.long(1, u64::from(per_second)).long(2, 1).number(3, burst).number(4, 0).number(5, 1);
    })]
}

/// There are more connections than `count` at once.
pub(in crate::network) fn more_than(count: u32) -> Rule {
    vec![Expression::new("connlimit", |e| {
        e.number(1, count).number(2, 1);
    })]
}

/// Answers with a reset; after [`protocol`] TCP.
pub(in crate::network) fn reset() -> Rule {
    vec![Expression::new("reject", |e| {
        e.number(1, 1).bytes(2, &[0]);
    })]
}

/// Answers that an administrator forbids it.
pub(in crate::network) fn prohibit() -> Rule {
    /// `NFT_REJECT_ICMPX_UNREACH` and `NFT_REJECT_ICMPX_ADMIN_PROHIBITED`.
    const ANY_FAMILY: u32 = 2;
    const PROHIBITED: u8 = 3;
    vec![Expression::new("reject", |e| {
        e.number(1, ANY_FAMILY).bytes(2, &[PROHIBITED]);
    })]
}

/// Leads it to a socket of this namespace.
pub(in crate::network) fn redirect(port: u16) -> Rule {
    let redirect = Expression::new("redir", |e| {
        e.number(1, REGISTER);
    });
    vec![immediate(REGISTER, &port.to_be_bytes()), redirect]
}

/// Gives it the address of the link that it goes out by.
pub(in crate::network) fn masquerade() -> Rule {
    vec![Expression::new("masq", |_| {})]
}

/// Writes destination, protocol, port and `reason` into the set, with a counter, and lets it live anew. `with_port` for packets that have one.
pub(in crate::network) fn note(set: &str, with_port: bool, reason: u32) -> Rule {
    /// `NFT_DYNSET_OP_UPDATE`
    const UPDATE: u32 = 1;
    let port = if with_port {
        payload(REGISTER_32 + 2, TRANSPORT_HEADER, DESTINATION_PORT, 2)
    } else {
        immediate(REGISTER_32 + 2, &0_u32.to_ne_bytes())
    };
    let protocol = Expression::new("meta", |e| {
        e.number(1, REGISTER_32 + 1).number(2, META_PROTOCOL);
    });
    let update = Expression::new("dynset", |e| {
        e.text(1, set).number(3, UPDATE).number(4, REGISTER_32).nested(7, |expression| {
            expression.text(1, "counter").nested(2, |counter| {
                counter.long(1, 0).long(2, 0);
            });
        });
    });
    vec![
        payload(REGISTER_32, NETWORK_HEADER, DESTINATION_ADDRESS, 4),
        protocol,
        port,
        immediate(REGISTER_32 + 3, &reason.to_ne_bytes()),
        update,
    ]
}

/// Lets it pass this hook.
pub(in crate::network) fn accept() -> Rule {
    vec![verdict(1, None)]
}

/// Lets it vanish.
pub(in crate::network) fn discard() -> Rule {
    vec![verdict(0, None)]
}

/// Goes on in another chain, and does not come back.
pub(in crate::network) fn go(chain: &str) -> Rule {
    /// `NFT_GOTO`
    const GOTO: i32 = -4;
    vec![verdict(GOTO, Some(chain))]
}
