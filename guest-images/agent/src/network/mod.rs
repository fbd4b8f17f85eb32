//! The guest's network, which the kernel command line says: one interface, one address, one gateway, no DHCP, no IPv6.
//!
//! `stasis.net=ADDRESS/PREFIX,GATEWAY,DNS,MTU` is carried out once, when the guest boots. A guest that wakes, or that is a clone, still has all
//! of it in its memory: addresses are the same for every guest, since each has a network of its own. What does not live on is its
//! connections (`connections`).

pub(crate) mod connections;

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::str::FromStr;

use rustix::net::{AddressFamily, SocketType, socket};

/// The interface of the virtio device: the only one beside the loopback.
const INTERFACE: &[u8] = b"eth0";
const WORD: &str = "stasis.net=";

/// What the kernel command line says of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Network {
    address: Ipv4Addr,
    prefix: u8,
    gateway: Ipv4Addr,
    dns: Ipv4Addr,
    mtu: u16,
}

/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    #[error("the kernel command line has {WORD}{0}, which is no ADDRESS/PREFIX,GATEWAY,DNS,MTU")]
    Word(String),
    #[error("cannot {operation}")]
    Kernel {
        operation: &'static str,
        #[source]
        source: io::Error,
    },
}

fn failed<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> NetworkError {
    move |source| NetworkError::Kernel { operation, source: source.into() }
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        let parsed = || {
            let mut fields = word.split(',');
            let (address, prefix) = fields.next()?.split_once('/')?;
            let network = Self {
                address: address.parse().ok()?,
                prefix: prefix.parse().ok().filter(|prefix| *prefix <= 32)?,
                gateway: fields.next()?.parse().ok()?,
                dns: fields.next()?.parse().ok()?,
                mtu: fields.next()?.parse().ok()?,
            };
            fields.next().is_none().then_some(network)
        };
        parsed().ok_or_else(|| NetworkError::Word(word.to_owned()))
    }
}

impl Network {
    /// The network that the kernel command line names, if it names one.
    pub(crate) fn from_command_line(line: &str) -> Result<Option<Self>, NetworkError> {
        line.split_ascii_whitespace().find_map(|word| word.strip_prefix(WORD)).map(str::parse).transpose()
    }

    fn netmask(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0))
    }

    /// Sets the interface up and names the resolver.
    pub(crate) fn apply(&self, root: &Path) -> Result<(), NetworkError> {
        // Before the interface is up, so that not even a router solicitation leaves it. A kernel without IPv6 has no such file.
        for (name, value) in [("disable_ipv6", "1"), ("accept_ra", "0"), ("router_solicitations", "0")] {
            match fs::write(format!("/proc/sys/net/ipv6/conf/eth0/{name}"), value) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("turn IPv6 off")(error)),
                _ => {}
            }
        }
        let socket = socket(AddressFamily::INET, SocketType::DGRAM, None).map_err(failed("open a socket"))?;
        let mut mtu = interface();
        mtu.ifr_ifru.ifru_mtu = self.mtu.into();
        request(&socket, libc::SIOCSIFMTU, &mtu).map_err(failed("set the MTU of eth0"))?;
        request(&socket, libc::SIOCSIFADDR, &with_address(self.address)).map_err(failed("set the address of eth0"))?;
        request(&socket, libc::SIOCSIFNETMASK, &with_address(self.netmask()))
            .map_err(failed("set the netmask of eth0"))?;
        let mut up = interface();
        up.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        request(&socket, libc::SIOCSIFFLAGS, &up).map_err(failed("bring up eth0"))?;
        default_route(&socket, self.gateway).map_err(failed("set the default route"))?;
        self.name_resolver(root).map_err(failed("write /etc/resolv.conf"))
    }

    fn name_resolver(&self, root: &Path) -> io::Result<()> {
        let path = root.join("etc/resolv.conf");
        // A link leads to what some resolver of the image would write, and nobody does.
        match fs::symlink_metadata(&path) {
            Ok(found) if found.is_symlink() => fs::remove_file(&path)?,
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::create_dir_all(root.join("etc"))?;
        fs::write(path, format!("nameserver {}\n", self.dns))
    }
}

fn interface() -> libc::ifreq {
    // SAFETY: an ifreq is plain data, for which all zeros is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(INTERFACE) {
        *to = from.cast_signed();
    }
    request
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: a sockaddr is plain data, for which all zeros is valid.
    let mut generic: libc::sockaddr = unsafe { std::mem::zeroed() };
    generic.sa_family = libc::AF_INET as libc::sa_family_t;
    // A sockaddr_in: two bytes of port, then the address.
    for (to, from) in generic.sa_data[2..].iter_mut().zip(address.octets()) {
        *to = from.cast_signed();
    }
    generic
}

fn with_address(address: Ipv4Addr) -> libc::ifreq {
    let mut request = interface();
    request.ifr_ifru.ifru_addr = socket_address(address);
    request
}

fn request(socket: &OwnedFd, what: libc::c_ulong, argument: &libc::ifreq) -> io::Result<()> {
    // SAFETY: the kernel reads one ifreq, whose name ends in a zero byte; it lives through the call.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), what as _, std::ptr::from_ref(argument)) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn default_route(socket: &OwnedFd, gateway: Ipv4Addr) -> io::Result<()> {
    // SAFETY: an rtentry is plain data, for which all zeros is valid; a null device is none.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = socket_address(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    // SAFETY: the kernel reads one rtentry, which lives through the call.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT as _, &raw const route) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "console=ttyS0 rw stasis.net=100.64.0.2/30,100.64.0.1,100.64.0.1,1500 quiet";

    #[test]
    fn the_command_line_names_a_network_or_none() {
        let network = Network::from_command_line(LINE).unwrap().unwrap();
        assert_eq!(
            network,
            Network {
                address: Ipv4Addr::new(100, 64, 0, 2),
                prefix: 30,
                gateway: Ipv4Addr::new(100, 64, 0, 1),
                dns: Ipv4Addr::new(100, 64, 0, 1),
                mtu: 1500,
            }
        );
        assert_eq!(network.netmask(), Ipv4Addr::new(255, 255, 255, 252));
        assert_eq!(Network { prefix: 0, ..network }.netmask(), Ipv4Addr::UNSPECIFIED);
        assert_eq!(Network { prefix: 32, ..network }.netmask(), Ipv4Addr::BROADCAST);
        assert!(Network::from_command_line("console=ttyS0 quiet").unwrap().is_none());
    }

    #[test]
    fn a_word_that_is_no_network_is_named() {
        for word in ["", "1.2.3.4", "1.2.3.4/33,1.2.3.5,1.2.3.5,1500", "1.2.3.4/30,1.2.3.5,1.2.3.5", "a/30,b,c,d"] {
            let error = Network::from_command_line(&format!("rw {WORD}{word}")).unwrap_err();
            assert!(error.to_string().contains(word));
        }
        assert!("1.2.3.4/30,1.2.3.5,1.2.3.5,1500,x".parse::<Network>().is_err());
    }

    #[test]
    fn the_resolver_takes_the_place_of_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let network = Network::from_command_line(LINE).unwrap().unwrap();
        let file = dir.path().join("etc/resolv.conf");
        network.name_resolver(dir.path()).unwrap();
        fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("../run/resolver/stub.conf", &file).unwrap();
        for _ in 0..2 {
            network.name_resolver(dir.path()).unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), "nameserver 100.64.0.1\n");
            assert!(!fs::symlink_metadata(&file).unwrap().is_symlink());
        }
    }
}
