//! The connections of before a wake: they end with a reset.
//!
//! Their other ends, and the host's memory of them, belong to another time and maybe to another place. One that is used learns that from the
//! reset which the host answers; one that only waits would wait for ever. So the kernel is told to end them all (`SOCK_DESTROY` of
//! `sock_diag(7)`): whoever waits on one gets an error at once. Connections that stay inside the guest live on.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;

use rustix::net::netlink::{SOCK_DIAG, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with};

const IPV4: u8 = libc::AF_INET as u8;
const IPV6: u8 = libc::AF_INET6 as u8;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const REQUEST: u16 = libc::NLM_F_REQUEST as u16;
const DUMP: u16 = libc::NLM_F_DUMP as u16;
const ACKNOWLEDGE: u16 = libc::NLM_F_ACK as u16;
const MESSAGE_HEADER: usize = 16;
/// Of `struct inet_diag_msg`: family, state, timer, retransmissions.
const FOUR_BYTES: usize = 4;
/// `struct inet_diag_sockid`: two ports, two addresses of 16 bytes, interface, cookie.
const SOCKET_ID: usize = 48;
/// All states but listening (10) and closed (7): those have no other end.
const CONNECTED_STATES: u32 = !(1 << 10 | 1 << 7);
/// Longest answer in one datagram of the kernel's.
const ANSWER_BYTES: usize = 32 * 1024;
/// More connections than a guest's wake should be held up by.
const MAX_CONNECTIONS: usize = 16_384;
/// Messages of the kernel that are read for one request, at most.
const MAX_ANSWERS: usize = 4096;

/// One end of a connection as the kernel names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Connection {
    family: u8,
    id: [u8; SOCKET_ID],
}

impl Connection {
    /// Of the answer to a dump.
    fn decode(body: &[u8]) -> Option<Self> {
        let id = body.get(FOUR_BYTES..FOUR_BYTES + SOCKET_ID)?.try_into().ok()?;
        Some(Self { family: *body.first()?, id })
    }

    fn address(&self, at: usize) -> IpAddr {
        let bytes: [u8; 16] = std::array::from_fn(|i| self.id[at + i]);
        if self.family == IPV4 {
            IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]))
        } else {
            Ipv6Addr::from(bytes).to_canonical()
        }
    }

    /// Whether the other end is outside the guest.
    fn leaves_the_guest(&self) -> bool {
        let (here, there) = (self.address(4), self.address(20));
        !there.is_unspecified() && !there.is_loopback() && here != there
    }
}

/// A netlink message of type `kind` with an `inet_diag_req_v2` in it.
fn message(kind: u16, flags: u16, family: u8, id: &[u8; SOCKET_ID]) -> Vec<u8> {
    let len = MESSAGE_HEADER + 8 + SOCKET_ID;
    let mut bytes = Vec::with_capacity(len);
    bytes.extend((len as u32).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((REQUEST | flags).to_ne_bytes());
    bytes.extend([0; 8]); // sequence, port
    bytes.extend([family, libc::IPPROTO_TCP as u8, 0, 0]);
    bytes.extend(CONNECTED_STATES.to_ne_bytes());
    bytes.extend(id);
    bytes
}

/// One message of the kernel's.
enum Answer<'a> {
    Content(&'a [u8]),
    /// It has said everything.
    End(io::Result<()>),
}

/// Takes the next message off the front of a datagram; none at its end or where it is damaged.
fn next<'a>(rest: &mut &'a [u8]) -> Option<Answer<'a>> {
    let header = rest.get(..MESSAGE_HEADER)?;
    let len = u32::from_ne_bytes(header.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(header.get(4..6)?.try_into().ok()?);
    let body = rest.get(MESSAGE_HEADER..len)?;
    *rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    Some(match i32::from(kind) {
        libc::NLMSG_DONE => Answer::End(Ok(())),
        libc::NLMSG_ERROR => {
            let code = body.get(..4).and_then(|code| code.try_into().ok()).map_or(-libc::EBADMSG, i32::from_ne_bytes);
            Answer::End(if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) })
        }
        _ => Answer::Content(body),
    })
}

/// Asks the kernel and passes each message of its answer to `each`.
fn ask(socket: &OwnedFd, request: &[u8], mut each: impl FnMut(&[u8])) -> io::Result<()> {
    sendto(socket, request, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    let mut buffer = vec![0; ANSWER_BYTES];
    for _ in 0..MAX_ANSWERS {
        let (len, _) = recv(socket, buffer.as_mut_slice(), RecvFlags::empty())?;
        let mut rest = &buffer[..len];
        while let Some(answer) = next(&mut rest) {
            match answer {
                Answer::Content(body) => each(body),
                Answer::End(how) => return how,
            }
        }
    }
    Err(io::ErrorKind::InvalidData.into())
}

/// Ends the connections that leave the guest; answers how many.
pub(crate) fn reset_all() -> io::Result<usize> {
    let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, SocketFlags::CLOEXEC, Some(SOCK_DIAG))?;
    let mut connections = Vec::new();
    // Sockets of IPv6 may be connected over IPv4.
    for family in [IPV4, IPV6] {
        ask(&socket, &message(SOCK_DIAG_BY_FAMILY, DUMP, family, &[0; SOCKET_ID]), |body| {
            if let Some(connection) = Connection::decode(body).filter(Connection::leaves_the_guest)
                && connections.len() < MAX_CONNECTIONS
            {
                connections.push(connection);
            }
        })?;
    }
    let mut ended = 0;
    for Connection { family, id } in connections {
        match ask(&socket, &message(SOCK_DESTROY, ACKNOWLEDGE, family, &id), |_| {}) {
            Ok(()) => ended += 1,
            // It has ended by itself.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(ended)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpStream;

    use rustix::net::socket;

    use super::*;

    fn connection(family: u8, here: &[u8], there: &[u8]) -> Connection {
        let mut id = [0; SOCKET_ID];
        id[4..4 + here.len()].copy_from_slice(here);
        id[20..20 + there.len()].copy_from_slice(there);
        Connection { family, id }
    }

    #[test]
    fn only_what_leaves_the_guest_is_ended() {
        let four = |here: [u8; 4], there: [u8; 4]| connection(IPV4, &here, &there);
        let guest = [100, 64, 0, 2];
        assert!(four(guest, [1, 1, 1, 1]).leaves_the_guest());
        assert!(four(guest, [100, 64, 0, 1]).leaves_the_guest());
        assert!(!four([127, 0, 0, 1], [127, 0, 0, 1]).leaves_the_guest());
        assert!(!four(guest, guest).leaves_the_guest());
        assert!(!four(guest, [0; 4]).leaves_the_guest());
        let mapped = |address: [u8; 4]| Ipv4Addr::from(address).to_ipv6_mapped().octets();
        assert!(connection(IPV6, &mapped(guest), &mapped([1, 1, 1, 1])).leaves_the_guest());
        assert!(!connection(IPV6, &mapped([127, 0, 0, 1]), &mapped([127, 0, 0, 1])).leaves_the_guest());
        assert!(!connection(IPV6, &Ipv6Addr::LOCALHOST.octets(), &Ipv6Addr::LOCALHOST.octets()).leaves_the_guest());
    }

    /// A connection between two addresses of a network namespace of this thread's own, neither of which is the loopback's.
    fn connected() -> io::Result<(TcpStream, TcpStream)> {
        // SAFETY: only this thread gets another network; it holds no sockets of the old one.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return Err(io::Error::last_os_error());
        }
        crate::init::loopback_up()?;
        for address in ["100.64.0.1/32", "100.64.0.2/32"] {
            #[expect(clippy::disallowed_methods, reason = "a test that sets a namespace up")]
            let set = std::process::Command::new("ip").args(["address", "add", address, "dev", "lo"]).status()?;
            assert!(set.success());
        }
        let listener = std::net::TcpListener::bind("100.64.0.1:0")?;
        let socket = socket(AddressFamily::INET, SocketType::STREAM, None)?;
        rustix::net::bind(&socket, &"100.64.0.2:0".parse::<std::net::SocketAddrV4>().map_err(io::Error::other)?)?;
        rustix::net::connect(&socket, &listener.local_addr()?)?;
        Ok((TcpStream::from(socket), listener.accept()?.0))
    }

    #[test]
    fn who_waits_on_a_connection_hears_of_its_end() {
        let ended = std::thread::spawn(|| {
            let (mut here, _there) = match connected() {
                Ok(connected) => connected,
                Err(error) => return eprintln!("left out: no network namespace here: {error}"),
            };
            match reset_all() {
                // Both ends are in this namespace; the first to end may take the other with it.
                Ok(ended) => assert!((1..=2).contains(&ended), "{ended} ends"),
                Err(error) => return eprintln!("left out: this kernel ends no connections: {error}"),
            }
            here.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
            let error = here.read(&mut [0]).unwrap_err();
            assert!(
                matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset),
                "{error}"
            );
            assert_eq!(reset_all().unwrap(), 0);
        });
        ended.join().unwrap();
    }

    #[test]
    fn answers_end_with_done_or_an_error_and_damaged_ones_end_too() {
        let message = |kind: u16, body: &[u8]| {
            let mut bytes = ((MESSAGE_HEADER + body.len()) as u32).to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend([0; 10]);
            bytes.extend(body);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        let bytes = [message(20, &[1, 2, 3]), message(libc::NLMSG_DONE as u16, &[])].concat();
        let mut rest = bytes.as_slice();
        assert!(matches!(next(&mut rest), Some(Answer::Content([1, 2, 3]))));
        assert!(matches!(next(&mut rest), Some(Answer::End(Ok(())))));
        assert!(next(&mut rest).is_none());
        let bytes = message(libc::NLMSG_ERROR as u16, &(-libc::ENOENT).to_ne_bytes());
        let Some(Answer::End(Err(error))) = next(&mut bytes.as_slice()) else { panic!("no error") };
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
        for damaged in [&[][..], &[1; 15], &[0xff; 40], &[0; 40]] {
            assert!(next(&mut &*damaged).is_none());
        }
    }
}
