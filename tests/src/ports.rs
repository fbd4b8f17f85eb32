//! Ports for programs that are told theirs, and that are started anew on the same one.
//!
//! A port that the kernel gives for a moment may be somebody else's by the time the program binds it: the kernel hands the same range out to
//! every connection of every test beside this one. So ports are taken from below that range, and each is kept from the other tests of this
//! machine by a name that only one process can have, for as long as the [`Port`] lives.

use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};

use crate::vmm::Error;

/// Ports below the kernel's range that are looked at.
const MANY: u16 = 12_000;
/// Where that range begins by default (Linux, `net.ipv4.ip_local_port_range`).
const USUAL: u16 = 32_768;

/// A port of the loopback.
#[derive(Debug)]
pub struct Port {
    number: u16,
    /// Its name in the abstract namespace, which ends with this process.
    _name: UnixListener,
}

impl Port {
    /// Takes one.
    pub fn take() -> Result<Self, Error> {
        let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
        let above = range.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(USUAL);
        // Where the kernel hands out nearly all, its range is as good as any.
        let above = if above > 1024 + MANY { above } else { u16::MAX };
        let first = rand::random_range(0..MANY);
        let numbers = (0..MANY).map(|n| above - 1 - (first + n) % MANY);
        for number in numbers {
            let name = SocketAddr::from_abstract_name(format!("stasis-test-port-{number}"))?;
            // Somebody who knows nothing of these names may listen there.
            if let Ok(name) = UnixListener::bind_addr(&name)
                && TcpListener::bind(("127.0.0.1", number)).is_ok()
            {
                return Ok(Self { number, _name: name });
            }
        }
        Err("there is no free port".into())
    }

    /// Its number.
    pub fn number(&self) -> u16 {
        self.number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_gets_a_port_twice() {
        let all: Vec<_> = (0..50).map(|_| Port::take().unwrap()).collect();
        let numbers: std::collections::BTreeSet<_> = all.iter().map(Port::number).collect();
        assert_eq!(numbers.len(), all.len());
        let number = all[0].number();
        let listener = TcpListener::bind(("127.0.0.1", number)).unwrap();
        drop(all);
        assert!(TcpListener::bind(("127.0.0.1", number)).is_err(), "it is still listened on");
        drop(listener);
    }
}
