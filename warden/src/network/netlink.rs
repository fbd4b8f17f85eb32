//! Netlink: messages with nested attributes, and a socket that sends them and waits for what the kernel says.
//!
//! Two families use it: route (`links`) and netfilter (`nft`). It is little more than the framing of both: what a message means is said
//! where it is made. A [`Socket`] belongs to the network namespace of the thread that opened it, for as long as it is open, whatever
//! thread uses it later: that is how the rules of a sandbox are changed without entering its namespace again.
//!
//! Answers come from the kernel alone, and are read all the same with their lengths checked: an attribute that does not fit is left out.

use rustix::net::netdevice::name_to_index;
use rustix::net::netlink::{NETFILTER, SocketAddrNetlink};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, send, socket_with,
};
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// How long the kernel may take to answer: it answers at once, unless it waits for another user of its routing lock.
const ANSWER: Duration = Duration::from_secs(20);
/// Enough for what the kernel puts into one datagram of a dump.
const DATAGRAM: usize = 64 << 10;
/// Length of the header that each message has.
const HEADER: usize = 16;
/// Length of the header that each attribute has.
const ATTRIBUTE: usize = 4;
/// In the type of an attribute that holds attributes.
const NESTED: u16 = 1 << 15;
/// All but the flags of the type of an attribute.
const ATTRIBUTE_TYPE: u16 = 0x3fff;

/// Types that every family has.
const ERROR: u16 = 2;
const DONE: u16 = 3;

/// Asks for an answer, as every request of ours does.
const REQUEST: u16 = 1;
/// Asks for a word when it is carried out.
pub(super) const ACK: u16 = 4;
/// The object must not be there yet.
pub(super) const EXCLUSIVE: u16 = 0x200;
/// The object is made when it is not there.
pub(super) const CREATE: u16 = 0x400;
/// Goes to the end of a list: rules of a chain.
pub(super) const APPEND: u16 = 0x800;
/// Asks for all objects.
pub(super) const DUMP: u16 = 0x300;

/// Attributes, one behind the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Attributes(Vec<u8>);

impl Attributes {
    /// Adds one of these octets.
    pub(super) fn bytes(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        self.put(kind, value)
    }

    /// Adds text with the NUL that the kernel wants behind it.
    pub(super) fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut text = value.as_bytes().to_vec();
        text.push(0);
        self.put(kind, &text)
    }

    /// Adds a number as this machine writes it (route).
    pub(super) fn native(&mut self, kind: u16, value: u32) -> &mut Self {
        self.put(kind, &value.to_ne_bytes())
    }

    /// Adds a number in network order (netfilter).
    pub(super) fn number(&mut self, kind: u16, value: u32) -> &mut Self {
        self.put(kind, &value.to_be_bytes())
    }

    /// The same of 64 bits.
    pub(super) fn long(&mut self, kind: u16, value: u64) -> &mut Self {
        self.put(kind, &value.to_be_bytes())
    }

    /// Adds one that holds what `fill` puts into it.
    pub(super) fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Attributes)) -> &mut Self {
        let mut inner = Attributes::default();
        fill(&mut inner);
        self.put(kind | NESTED, &inner.0)
    }

    /// As they are sent.
    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Adds one that holds a family's header and then attributes, as the peer of a veth pair is described.
    pub(super) fn headed(&mut self, kind: u16, header: &[u8], inner: &Attributes) -> &mut Self {
        self.put(kind | NESTED, &[header, &inner.0].concat())
    }

    fn put(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        // What is sent is of our own making and far below the limit; one that were not would be refused by the kernel as cut short.
        let length = u16::try_from(ATTRIBUTE + value.len()).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(ATTRIBUTE), 0);
        self
    }
}

/// Reads attributes.
#[derive(Clone, Debug)]
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// Of the attributes that begin at `at` in `body`.
    pub(super) fn at(body: &'a [u8], at: usize) -> Self {
        Self(body.get(at..).unwrap_or_default())
    }

    /// The value of the first of `kind`.
    pub(super) fn find(&self, kind: u16) -> Option<&'a [u8]> {
        self.clone().find_map(|(found, value)| (found == kind).then_some(value))
    }

    /// The attributes within the first of `kind`; none when it is not there.
    pub(super) fn within(&self, kind: u16) -> Reader<'a> {
        Reader(self.find(kind).unwrap_or_default())
    }

    /// A number of 64 bits in network order.
    pub(super) fn long(&self, kind: u16) -> Option<u64> {
        self.find(kind)?.try_into().ok().map(u64::from_be_bytes)
    }

    /// Text, without its NUL.
    pub(super) fn text(&self, kind: u16) -> Option<&'a str> {
        let bytes = self.find(kind)?;
        std::str::from_utf8(bytes.strip_suffix(&[0]).unwrap_or(bytes)).ok()
    }
}

impl<'a> Iterator for Reader<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (length, kind) = (word(self.0, 0)?, word(self.0, 2)?);
        let value = self.0.get(ATTRIBUTE..usize::from(length))?;
        self.0 = self.0.get(usize::from(length).next_multiple_of(ATTRIBUTE)..).unwrap_or_default();
        Some((kind & ATTRIBUTE_TYPE, value))
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

fn double(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

/// One request: its type, its flags, the header of its family, its attributes. `what` says in an error what it was for.
#[derive(Clone, Debug)]
pub(super) struct Request {
    /// For errors: "make the veth pair".
    pub(super) what: &'static str,
    /// Type.
    pub(super) kind: u16,
    /// Flags beside "request".
    pub(super) flags: u16,
    /// The family's own header.
    pub(super) header: Vec<u8>,
    /// What it says.
    pub(super) attributes: Attributes,
}

impl Request {
    fn encode(&self, sequence: u32, out: &mut Vec<u8>) {
        let length = HEADER + self.header.len().next_multiple_of(ATTRIBUTE) + self.attributes.0.len();
        out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
        out.extend_from_slice(&self.kind.to_ne_bytes());
        out.extend_from_slice(&(self.flags | REQUEST).to_ne_bytes());
        out.extend_from_slice(&sequence.to_ne_bytes());
        out.extend_from_slice(&0_u32.to_ne_bytes());
        out.extend_from_slice(&self.header);
        out.resize(out.len().next_multiple_of(ATTRIBUTE), 0);
        out.extend_from_slice(&self.attributes.0);
    }
}

/// What went wrong with a request.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The kernel refused it, or did not answer in time.
    #[error("cannot {what}")]
    Refused {
        /// What it was for.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The socket cannot be opened.
    #[error("cannot open a netlink socket")]
    Open(#[source] io::Error),
}

impl NetlinkError {
    /// The kernel's word for it.
    pub fn os(&self) -> Option<i32> {
        match self {
            Self::Refused { source, .. } | Self::Open(source) => source.raw_os_error(),
        }
    }
}

/// A netlink socket of one family in one network namespace.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

impl Socket {
    /// For links, addresses and routes of the calling thread's namespace.
    pub(super) fn route() -> Result<Self, NetlinkError> {
        // The kernel's number of this family is 0, which is what no number means.
        Self::open(None)
    }

    /// For the rules of the calling thread's namespace.
    pub(super) fn netfilter() -> Result<Self, NetlinkError> {
        Self::open(Some(NETFILTER))
    }

    fn open(protocol: Option<Protocol>) -> Result<Self, NetlinkError> {
        let open = || -> rustix::io::Result<OwnedFd> {
            let fd = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
            bind(&fd, &SocketAddrNetlink::new(0, 0))?;
            set_socket_timeout(&fd, Timeout::Recv, Some(ANSWER))?;
            Ok(fd)
        };
        open().map(|fd| Self { fd, sequence: 0 }).map_err(|e| NetlinkError::Open(e.into()))
    }

    /// Sends `requests` in one datagram and waits until the last one is answered; the first that was refused is the error.
    ///
    /// Within a netfilter batch none was carried out then.
    pub(super) fn send(&mut self, requests: &[Request]) -> Result<(), NetlinkError> {
        let first = self.sequence.wrapping_add(1);
        let mut out = Vec::with_capacity(4096);
        for (i, request) in (0_u32..).zip(requests) {
            request.encode(first.wrapping_add(i), &mut out);
        }
        self.sequence = self.sequence.wrapping_add(u32::try_from(requests.len()).unwrap_or(u32::MAX));
        let Some(last) = (0_u32..).zip(requests).filter(|(_, r)| r.flags & ACK != 0).map(|(i, _)| i).last() else {
            return Ok(());
        };
        let refused = |at: u32, source: io::Error| {
            let what = requests.get(at as usize).map_or("use netlink", |request| request.what);
            NetlinkError::Refused { what, source }
        };
        send(&self.fd, &out, SendFlags::empty()).map_err(|e| refused(last, e.into()))?;
        let mut failed = None;
        loop {
            let datagram = self.datagram().map_err(|e| refused(last, e))?;
            for (kind, sequence, body) in messages(&datagram) {
                let at = sequence.wrapping_sub(first);
                if kind != ERROR || at as usize >= requests.len() {
                    continue;
                }
                let code = double(body, 0).unwrap_or_default().cast_signed();
                if code != 0 {
                    failed.get_or_insert((at, code));
                }
                if at == last {
                    return match failed {
                        Some((at, code)) => Err(refused(at, io::Error::from_raw_os_error(-code))),
                        None => Ok(()),
                    };
                }
            }
        }
    }

    /// The number of the link of this name in the socket's namespace.
    pub(super) fn link_index(&self, name: &str) -> Result<u32, NetlinkError> {
        name_to_index(&self.fd, name)
            .map_err(|e| NetlinkError::Refused { what: "find a link by its name", source: e.into() })
    }

    /// The bodies of everything that a dump answers.
    pub(super) fn dump(&mut self, request: &Request) -> Result<Vec<Vec<u8>>, NetlinkError> {
        let refused = |source: io::Error| NetlinkError::Refused { what: request.what, source };
        self.sequence = self.sequence.wrapping_add(1);
        let mut out = Vec::with_capacity(256);
        request.encode(self.sequence, &mut out);
        send(&self.fd, &out, SendFlags::empty()).map_err(|e| refused(e.into()))?;
        let mut found = Vec::new();
        loop {
            let datagram = self.datagram().map_err(refused)?;
            for (kind, sequence, body) in messages(&datagram) {
                if sequence != self.sequence {
                    continue;
                }
                match kind {
                    DONE => return Ok(found),
                    ERROR => {
                        let code = double(body, 0).unwrap_or_default().cast_signed();
                        return Err(refused(io::Error::from_raw_os_error(-code)));
                    }
                    _ => found.push(body.to_vec()),
                }
            }
        }
    }

    fn datagram(&self) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; DATAGRAM];
        let (length, _) = loop {
            match recv(&self.fd, buffer.as_mut_slice(), RecvFlags::empty()) {
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                other => break other?,
            }
        };
        buffer.truncate(length);
        Ok(buffer)
    }
}

/// Type, sequence number and body of each message in a datagram.
fn messages(datagram: &[u8]) -> impl Iterator<Item = (u16, u32, &[u8])> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = double(rest, 0)? as usize;
        let (kind, sequence) = (word(rest, 4)?, double(rest, 8)?);
        let body = rest.get(HEADER..length)?;
        rest = rest.get(length.next_multiple_of(ATTRIBUTE)..).unwrap_or_default();
        Some((kind, sequence, body))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_read_back_as_they_were_written() {
        let mut attributes = Attributes::default();
        attributes.text(1, "table").number(2, 7).nested(3, |inner| {
            inner.bytes(4, &[1, 2, 3]).long(5, u64::MAX);
        });
        let read = Reader::at(&attributes.0, 0);
        assert_eq!((read.text(1), read.find(2)), (Some("table"), Some(&[0, 0, 0, 7][..])));
        assert_eq!((read.within(3).find(4), read.within(3).long(5)), (Some(&[1, 2, 3][..]), Some(u64::MAX)));
        assert_eq!(read.count(), 3);
    }

    #[test]
    fn what_is_cut_short_ends_the_reading() {
        let mut attributes = Attributes::default();
        attributes.text(1, "table").number(2, 7);
        for length in 0..attributes.0.len() {
            assert!(Reader::at(&attributes.0[..length], 0).count() < 2);
        }
        let mut message = Vec::new();
        let request = Request { what: "", kind: 9, flags: 0, header: vec![1, 2], attributes };
        request.encode(3, &mut message);
        assert_eq!(messages(&message).map(|(kind, sequence, _)| (kind, sequence)).collect::<Vec<_>>(), [(9, 3)]);
        for length in 0..message.len() {
            assert_eq!(messages(&message[..length]).count(), 0);
        }
    }
}
