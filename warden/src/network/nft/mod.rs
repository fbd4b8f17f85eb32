//! Tables of nf_tables as plain data, and the one transaction that puts a table in the place of the one before.
//!
//! Netlink rather than the `nft` program: a sandbox's table takes about a millisecond this way, the program several for its own start, and a
//! process with privileges starts no others. What the kernel holds is what `nft list ruleset` shows all the same.

pub(super) mod expression;

use self::expression::{DATA_VALUE, LIST_ELEMENT, Rule};
use super::netlink::{ACK, APPEND, Attributes, CREATE, DUMP, NetlinkError, Reader, Request, Socket};
use std::net::Ipv4Addr;

/// `NFNL_SUBSYS_NFTABLES`, in the upper half of a message's type.
const SUBSYSTEM: u16 = 10 << 8;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;

const NEW_TABLE: u16 = SUBSYSTEM;
const DELETE_TABLE: u16 = SUBSYSTEM | 2;
const NEW_CHAIN: u16 = SUBSYSTEM | 3;
const NEW_RULE: u16 = SUBSYSTEM | 6;
const NEW_SET: u16 = SUBSYSTEM | 9;
const NEW_ELEMENTS: u16 = SUBSYSTEM | 0x0c;
const GET_ELEMENTS: u16 = SUBSYSTEM | 0x0d;
const NEW_OBJECT: u16 = SUBSYSTEM | 0x12;
const GET_OBJECT: u16 = SUBSYSTEM | 0x13;

/// `NFPROTO_INET`: IPv4 and IPv6 in one table, so that nothing is forgotten that is not IPv4.
const BOTH_FAMILIES: u8 = 1;

/// Flags of sets.
const INTERVAL: u32 = 4;
const TIMEOUT: u32 = 0x10;
const EVALUATED: u32 = 0x20;
const OBJECTS: u32 = 0x40;
/// Flag of an element: the range before it ends here.
const INTERVAL_END: u32 = 1;

/// `nft`'s numbers for types of keys, so that it prints them as what they are.
const TYPE_IPV4: u32 = 7;
const TYPE_PROTOCOL: u32 = 12;
const TYPE_PORT: u32 = 13;
const TYPE_MARK: u32 = 19;
const CONCATENATED: u32 = 6;
/// `NFT_OBJECT_COUNTER`
const COUNTER: u32 = 1;

/// Where packets meet a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hook {
    /// `filter` or `nat`.
    pub(super) kind: &'static str,
    /// `NF_INET_…`
    pub(super) number: u32,
    /// Lower ones come first.
    pub(super) priority: i32,
    /// What no rule decides is dropped.
    pub(super) drops: bool,
}

/// `NF_INET_PRE_ROUTING` and the others.
pub(super) mod hook {
    pub(in crate::network) const PREROUTING: u32 = 0;
    pub(in crate::network) const INPUT: u32 = 1;
    pub(in crate::network) const FORWARD: u32 = 2;
    pub(in crate::network) const POSTROUTING: u32 = 4;
}

/// A chain and its rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chain {
    /// Its name.
    pub(super) name: &'static str,
    /// Where packets meet it; `None` for one that others lead to.
    pub(super) hook: Option<Hook>,
    /// In order.
    pub(super) rules: Vec<Rule>,
}

/// A set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Set {
    /// Its name.
    pub(super) name: &'static str,
    /// What it holds.
    pub(super) content: Content,
}

/// What a set holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// Ranges of addresses, first and last, in order, none touching the next.
    Ranges(Vec<(Ipv4Addr, Ipv4Addr)>),
    /// What rules note: destination, protocol, port, reason. It forgets by itself.
    Notes {
        /// Entries at most.
        size: u32,
        /// Each is forgotten this long after it was noted last, ms.
        forget_ms: u64,
    },
    /// Which counter a connection's mark counts into.
    Counters(Vec<(u32, String)>),
}

/// A whole table of both families.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Table {
    /// Its name.
    pub(super) name: &'static str,
    /// Named counters.
    pub(super) counters: Vec<String>,
    /// Sets.
    pub(super) sets: Vec<Set>,
    /// Chains: one that rules lead to stands before those rules' chain or after it, both is well.
    pub(super) chains: Vec<Chain>,
}

impl Table {
    /// Puts this table in the place of the one of its name, if there is one: packets meet the old one or the new one, never none.
    pub(super) fn replace(&self, socket: &mut Socket) -> Result<(), NetlinkError> {
        socket.send(&self.requests())
    }

    fn requests(&self) -> Vec<Request> {
        let mut requests = vec![batch(BATCH_BEGIN), self.named("make a table", NEW_TABLE, CREATE, |_| {})];
        requests.push(self.named("delete a table", DELETE_TABLE, 0, |_| {}));
        requests.push(self.named("make a table", NEW_TABLE, CREATE, |_| {}));
        requests.extend(self.counters.iter().map(|name| {
            self.named("make a counter", NEW_OBJECT, CREATE, |counter| {
                counter.text(2, name).number(3, COUNTER).nested(4, |data| {
                    data.long(1, 0).long(2, 0);
                });
            })
        }));
        for (id, set) in (1..).zip(&self.sets) {
            requests.push(self.set(id, set));
            requests.extend(self.elements(id, set));
        }
        requests.extend(self.chains.iter().map(|chain| self.chain(chain)));
        for chain in &self.chains {
            requests.extend(chain.rules.iter().map(|rule| {
                self.named("make a rule", NEW_RULE, CREATE | APPEND, |attributes| {
                    attributes.text(2, chain.name).nested(4, |list| {
                        rule.iter().for_each(|expression| expression.encode(list, LIST_ELEMENT));
                    });
                })
            }));
        }
        if let Some(last) = requests.last_mut() {
            last.flags |= ACK;
        }
        requests.push(batch(BATCH_END));
        requests
    }

    fn named(&self, what: &'static str, kind: u16, flags: u16, fill: impl FnOnce(&mut Attributes)) -> Request {
        let mut attributes = Attributes::default();
        attributes.text(1, self.name);
        fill(&mut attributes);
        Request { what, kind, flags, header: family(BOTH_FAMILIES, 0), attributes }
    }

    fn chain(&self, chain: &Chain) -> Request {
        self.named("make a chain", NEW_CHAIN, CREATE, |attributes| {
            attributes.text(3, chain.name);
            if let Some(hook) = chain.hook {
                attributes
                    .nested(4, |at| {
                        at.number(1, hook.number).number(2, hook.priority.cast_unsigned());
                    })
                    .number(5, u32::from(!hook.drops))
                    .text(7, hook.kind);
            }
        })
    }

    fn set(&self, id: u32, set: &Set) -> Request {
        self.named("make a set", NEW_SET, CREATE, |attributes| {
            attributes.text(2, set.name).number(10, id);
            match &set.content {
                Content::Ranges(_) => attributes.number(3, INTERVAL).number(4, TYPE_IPV4).number(5, 4),
                Content::Notes { size, forget_ms } => {
                    let parts = [TYPE_IPV4, TYPE_PROTOCOL, TYPE_PORT, TYPE_MARK];
                    let key = parts.iter().fold(0, |key, part| key << CONCATENATED | part);
                    attributes
                        .number(3, TIMEOUT | EVALUATED)
                        .number(4, key)
                        .number(5, NOTE_KEY)
                        .nested(9, |description| {
                            description.number(1, *size);
                        })
                        .long(11, *forget_ms)
                }
                Content::Counters(_) => {
                    attributes.number(3, OBJECTS).number(4, TYPE_MARK).number(5, 4).number(15, COUNTER)
                }
            };
        })
    }

    fn elements(&self, id: u32, set: &Set) -> Option<Request> {
        let mut list = Attributes::default();
        let key = |element: &mut Attributes, key: &[u8]| {
            element.nested(1, |data| {
                data.bytes(DATA_VALUE, key);
            });
        };
        match &set.content {
            Content::Ranges(ranges) if !ranges.is_empty() => {
                for (first, last) in ranges {
                    list.nested(LIST_ELEMENT, |element| key(element, &first.octets()));
                    // The end of a range is the first address behind it; behind the last address there is none.
                    if let Some(end) = u32::from(*last).checked_add(1) {
                        list.nested(LIST_ELEMENT, |element| {
                            key(element, &end.to_be_bytes());
                            element.number(3, INTERVAL_END);
                        });
                    }
                }
            }
            Content::Counters(counters) if !counters.is_empty() => {
                for (mark, counter) in counters {
                    list.nested(LIST_ELEMENT, |element| {
                        key(element, &mark.to_ne_bytes());
                        element.text(9, counter);
                    });
                }
            }
            Content::Ranges(_) | Content::Counters(_) | Content::Notes { .. } => return None,
        }
        Some(self.named("fill a set", NEW_ELEMENTS, CREATE, |attributes| {
            attributes.text(2, set.name).number(4, id).bytes(3 | 1 << 15, list.as_bytes());
        }))
    }
}

/// Octets of the key of a note: each part takes four.
const NOTE_KEY: u32 = 16;

fn family(family: u8, resource: u16) -> Vec<u8> {
    let [high, low] = resource.to_be_bytes();
    vec![family, 0, high, low]
}

fn batch(kind: u16) -> Request {
    let header = family(0, SUBSYSTEM >> 8);
    Request { what: "change the rules", kind, flags: 0, header, attributes: Attributes::default() }
}

/// Takes a table away. One that is not there is no error.
pub(super) fn delete(name: &'static str, socket: &mut Socket) -> Result<(), NetlinkError> {
    let table = Table { name, counters: Vec::new(), sets: Vec::new(), chains: Vec::new() };
    let mut delete = table.named("delete a table", DELETE_TABLE, 0, |_| {});
    delete.flags |= ACK;
    let make = table.named("make a table", NEW_TABLE, CREATE, |_| {});
    socket.send(&[batch(BATCH_BEGIN), make, delete, batch(BATCH_END)])
}

/// A counter as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Counted {
    /// Its name.
    pub(super) name: String,
    /// Packets.
    pub(super) packets: u64,
    /// Octets in them.
    pub(super) bytes: u64,
}

/// All named counters of a table.
pub(super) fn counters(table: &str, socket: &mut Socket) -> Result<Vec<Counted>, NetlinkError> {
    let mut attributes = Attributes::default();
    attributes.text(1, table).number(3, COUNTER);
    let found = socket.dump(&Request {
        what: "read the counters",
        kind: GET_OBJECT,
        flags: DUMP,
        header: family(BOTH_FAMILIES, 0),
        attributes,
    })?;
    let counted = |body: &Vec<u8>| {
        let object = Reader::at(body, 4);
        let data = object.within(4);
        Some(Counted { name: object.text(2)?.to_owned(), bytes: data.long(1)?, packets: data.long(2)? })
    };
    Ok(found.iter().filter_map(counted).collect())
}

/// Something that a rule noted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Note {
    /// Where it was to go.
    pub(super) address: Ipv4Addr,
    /// IP protocol.
    pub(super) protocol: u8,
    /// Port; 0 for protocols that have none.
    pub(super) port: u16,
    /// The rule's reason.
    pub(super) reason: u32,
    /// How often.
    pub(super) times: u64,
    /// When it will be forgotten, ms from now.
    pub(super) forgotten_in_ms: u64,
}

/// What a set of notes holds.
pub(super) fn notes(table: &str, set: &str, socket: &mut Socket) -> Result<Vec<Note>, NetlinkError> {
    let mut attributes = Attributes::default();
    attributes.text(1, table).text(2, set);
    let found = socket.dump(&Request {
        what: "read what was refused",
        kind: GET_ELEMENTS,
        flags: DUMP,
        header: family(BOTH_FAMILIES, 0),
        attributes,
    })?;
    let elements = found.iter().flat_map(|body| Reader::at(body, 4).within(3));
    Ok(elements.filter_map(|(_, element)| note(&Reader::at(element, 0))).collect())
}

fn note(element: &Reader<'_>) -> Option<Note> {
    let key = element.within(1).find(DATA_VALUE)?;
    let part = |at: usize| <[u8; 4]>::try_from(key.get(at..at + 4)?).ok();
    let [high, low, ..] = part(8)?;
    // One expression of an element stands alone, several in a list: kernels differ.
    let alone = element.within(7);
    let listed = element.within(11).within(LIST_ELEMENT);
    let times = alone.within(2).long(2).or_else(|| listed.within(2).long(2)).unwrap_or_default();
    Some(Note {
        address: Ipv4Addr::from(part(0)?),
        protocol: part(4)?[0],
        port: u16::from_be_bytes([high, low]),
        reason: u32::from_ne_bytes(part(12)?),
        times,
        forgotten_in_ms: element.long(5).unwrap_or_default(),
    })
}
