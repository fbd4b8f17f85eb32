//! Links, addresses, routes and neighbours: the route family's messages, as far as a sandbox's network needs them.

use super::netlink::{ACK, Attributes, CREATE, DUMP, EXCLUSIVE, NetlinkError, Reader, Request, Socket};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, BorrowedFd};

const NEW_LINK: u16 = 16;
const DEL_LINK: u16 = 17;
const GET_LINK: u16 = 18;
const NEW_ADDRESS: u16 = 20;
const GET_ADDRESS: u16 = 22;
const NEW_ROUTE: u16 = 24;
const NEW_NEIGHBOUR: u16 = 28;

/// `IFLA_…`
const LINK_ADDRESS: u16 = 1;
const LINK_NAME: u16 = 3;
const LINK_MTU: u16 = 4;
const LINK_INFO: u16 = 18;
const LINK_INFO_KIND: u16 = 1;
const LINK_INFO_DATA: u16 = 2;
const LINK_ALIAS: u16 = 20;
const LINK_NAMESPACE: u16 = 28;
const VETH_PEER: u16 = 1;

/// `IFA_…`
const ADDRESS_LOCAL: u16 = 2;
const ADDRESS_PEER: u16 = 1;

/// `RTA_…`
const ROUTE_OIF: u16 = 4;
const ROUTE_GATEWAY: u16 = 5;

/// `NDA_…`
const NEIGHBOUR_ADDRESS: u16 = 1;
const NEIGHBOUR_LINK_ADDRESS: u16 = 2;
/// A neighbour that is not asked for again.
const NEIGHBOUR_PERMANENT: u16 = 0x80;

const IPV4: u8 = 2;
const UP: u32 = 1;
const TABLE_MAIN: u8 = 254;
const PROTOCOL_STATIC: u8 = 4;
const SCOPE_UNIVERSE: u8 = 0;
const TYPE_UNICAST: u8 = 1;

/// A link of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    /// Its number.
    pub(super) index: u32,
    /// Its name.
    pub(super) name: String,
    /// What we wrote beside it: whose it is.
    pub(super) alias: Option<String>,
}

/// The route family in one namespace.
#[derive(Debug)]
pub(super) struct Links(Socket);

impl Links {
    /// Of the calling thread's namespace.
    pub(super) fn open() -> Result<Self, NetlinkError> {
        Socket::route().map(Self)
    }

    /// Makes a pair: `name` here, `peer` in `namespace`.
    pub(super) fn add_veth(
        &mut self,
        name: &str,
        peer: &str,
        namespace: BorrowedFd<'_>,
        mtu: u32,
    ) -> Result<(), NetlinkError> {
        let namespace = namespace.as_raw_fd().cast_unsigned();
        let mut attributes = Attributes::default();
        attributes.text(LINK_NAME, name).native(LINK_MTU, mtu).nested(LINK_INFO, |info| {
            info.text(LINK_INFO_KIND, "veth").nested(LINK_INFO_DATA, |data| {
                let mut inner = Attributes::default();
                inner.text(LINK_NAME, peer).native(LINK_MTU, mtu).native(LINK_NAMESPACE, namespace);
                data.headed(VETH_PEER, &link_header(0, 0, 0), &inner);
            });
        });
        self.0.send(&[Request {
            what: "make a veth pair",
            kind: NEW_LINK,
            flags: ACK | CREATE | EXCLUSIVE,
            header: link_header(0, 0, 0),
            attributes,
        }])
    }

    /// Writes beside a link whose it is; the link's name says which. An empty text takes it away.
    pub(super) fn set_alias(&mut self, index: u32, alias: &str) -> Result<(), NetlinkError> {
        let mut attributes = Attributes::default();
        attributes.bytes(LINK_ALIAS, alias.as_bytes());
        self.change("name a link's owner", index, (0, 0), attributes)
    }

    /// Gives a link its hardware address.
    pub(super) fn set_address(&mut self, index: u32, address: [u8; 6]) -> Result<(), NetlinkError> {
        let mut attributes = Attributes::default();
        attributes.bytes(LINK_ADDRESS, &address);
        self.change("set a link's hardware address", index, (0, 0), attributes)
    }

    /// Sets the greatest packet of a link.
    pub(super) fn set_mtu(&mut self, index: u32, mtu: u32) -> Result<(), NetlinkError> {
        let mut attributes = Attributes::default();
        attributes.native(LINK_MTU, mtu);
        self.change("set a link's MTU", index, (0, 0), attributes)
    }

    /// Lets a link carry packets, or not.
    pub(super) fn set_up(&mut self, index: u32, up: bool) -> Result<(), NetlinkError> {
        let what = if up { "bring a link up" } else { "take a link down" };
        self.change(what, index, (if up { UP } else { 0 }, UP), Attributes::default())
    }

    fn change(
        &mut self,
        what: &'static str,
        index: u32,
        (flags, mask): (u32, u32),
        attributes: Attributes,
    ) -> Result<(), NetlinkError> {
        let header = link_header(index, flags, mask);
        self.0.send(&[Request { what, kind: NEW_LINK, flags: ACK, header, attributes }])
    }

    /// Deletes a link, and of a pair the other one.
    pub(super) fn delete(&mut self, index: u32) -> Result<(), NetlinkError> {
        let header = link_header(index, 0, 0);
        let attributes = Attributes::default();
        self.0.send(&[Request { what: "delete a link", kind: DEL_LINK, flags: ACK, header, attributes }])
    }

    /// Gives a link an address; with a peer, the link leads to that one alone.
    pub(super) fn add_address(&mut self, index: u32, address: Ipv4Addr, prefix: u8) -> Result<(), NetlinkError> {
        let mut header = vec![IPV4, prefix, 0, SCOPE_UNIVERSE];
        header.extend_from_slice(&index.to_ne_bytes());
        let mut attributes = Attributes::default();
        attributes.bytes(ADDRESS_LOCAL, &address.octets()).bytes(ADDRESS_PEER, &address.octets());
        let flags = ACK | CREATE | EXCLUSIVE;
        self.0.send(&[Request { what: "give a link its address", kind: NEW_ADDRESS, flags, header, attributes }])
    }

    /// Sends what has no other way to `gateway`.
    pub(super) fn add_default_route(&mut self, index: u32, gateway: Ipv4Addr) -> Result<(), NetlinkError> {
        let header = vec![IPV4, 0, 0, 0, TABLE_MAIN, PROTOCOL_STATIC, SCOPE_UNIVERSE, TYPE_UNICAST, 0, 0, 0, 0];
        let mut attributes = Attributes::default();
        attributes.bytes(ROUTE_GATEWAY, &gateway.octets()).native(ROUTE_OIF, index);
        let flags = ACK | CREATE | EXCLUSIVE;
        self.0.send(&[Request { what: "set the default route", kind: NEW_ROUTE, flags, header, attributes }])
    }

    /// Says once and for all which hardware address `address` has.
    pub(super) fn add_neighbour(
        &mut self,
        index: u32,
        address: Ipv4Addr,
        hardware: [u8; 6],
    ) -> Result<(), NetlinkError> {
        let mut header = vec![IPV4, 0, 0, 0];
        header.extend_from_slice(&index.to_ne_bytes());
        header.extend_from_slice(&NEIGHBOUR_PERMANENT.to_ne_bytes());
        header.extend_from_slice(&[0, TYPE_UNICAST]);
        let mut attributes = Attributes::default();
        attributes.bytes(NEIGHBOUR_ADDRESS, &address.octets()).bytes(NEIGHBOUR_LINK_ADDRESS, &hardware);
        let flags = ACK | CREATE;
        self.0.send(&[Request { what: "name a neighbour", kind: NEW_NEIGHBOUR, flags, header, attributes }])
    }

    /// All links.
    pub(super) fn list(&mut self) -> Result<Vec<Link>, NetlinkError> {
        let (header, attributes) = (link_header(0, 0, 0), Attributes::default());
        let found = self.0.dump(&Request { what: "list links", kind: GET_LINK, flags: DUMP, header, attributes })?;
        Ok(found.iter().filter_map(|body| link(body)).collect())
    }

    /// The number of the link of this name.
    pub(super) fn index_of(&self, name: &str) -> Result<u32, NetlinkError> {
        self.0.link_index(name)
    }

    /// All IPv4 addresses of this namespace.
    pub(super) fn addresses(&mut self) -> Result<Vec<Ipv4Addr>, NetlinkError> {
        let (header, attributes) = (vec![IPV4, 0, 0, 0, 0, 0, 0, 0], Attributes::default());
        let what = "list addresses";
        let found = self.0.dump(&Request { what, kind: GET_ADDRESS, flags: DUMP, header, attributes })?;
        let local = |body: &Vec<u8>| <[u8; 4]>::try_from(Reader::at(body, 8).find(ADDRESS_LOCAL)?).ok();
        Ok(found.iter().filter_map(local).map(Ipv4Addr::from).collect())
    }
}

/// `struct ifinfomsg`.
fn link_header(index: u32, flags: u32, mask: u32) -> Vec<u8> {
    let mut header = vec![0, 0, 0, 0];
    header.extend_from_slice(&index.to_ne_bytes());
    header.extend_from_slice(&flags.to_ne_bytes());
    header.extend_from_slice(&mask.to_ne_bytes());
    header
}

fn link(body: &[u8]) -> Option<Link> {
    let index = u32::from_ne_bytes(body.get(4..8)?.try_into().ok()?);
    let attributes = Reader::at(body, 16);
    let alias = attributes.text(LINK_ALIAS).map(str::to_owned).filter(|alias| !alias.is_empty());
    Some(Link { index, name: attributes.text(LINK_NAME)?.to_owned(), alias })
}
