//! What the operator decides for all sandboxes of a host.

use std::net::SocketAddr;
use std::time::Duration;

use crate::addresses::OperatorRanges;
use crate::rate::Rate;

/// Settings of the process.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Addresses that are reached, or never.
    pub ranges: OperatorRanges,
    /// Name servers, in the order in which they are asked.
    pub upstreams: Vec<SocketAddr>,
    /// Certificates (DER) that are trusted beside the public roots.
    pub extra_roots: Vec<Vec<u8>>,
    /// Lets a ClientHello with `encrypted_client_hello` pass by its outer name. GREASE cannot be told from a hidden name, so a guest can then
    /// reach whatever the servers of its allowed names serve beside them.
    pub pass_encrypted_hello: bool,
    /// Bounds for each sandbox.
    pub limits: Limits,
    /// How long things may take.
    pub deadlines: Deadlines,
}

/// Bounds for one sandbox.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once.
    pub connections: u32,
    /// New connections.
    pub new_connections: Rate,
    /// DNS questions, and resolutions for connections that the cache does not answer.
    pub questions: Rate,
    /// Questions that wait for a name server at once.
    pub open_questions: u32,
    /// Bytes that wait for slow readers, over all connections.
    pub buffered: usize,
    /// Different names a minute below wildcards, which a guest could use to send data to whoever serves the suffix.
    pub made_up_names: usize,
    /// Bytes of such a name before the suffix.
    pub made_up_bytes: usize,
    /// Labels of such a name before the suffix.
    pub made_up_labels: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            new_connections: Rate { a_second: 200, burst: 400 },
            questions: Rate { a_second: 100, burst: 200 },
            open_questions: 32,
            buffered: 16 << 20,
            made_up_names: 60,
            made_up_bytes: 100,
            made_up_labels: 5,
        }
    }
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// From a connection to all of its ClientHello or its first request's head.
    pub head: Duration,
    /// In `allow-all` and allowed ranges, for the client to speak first: protocols in which the server does get it by waiting.
    pub first_byte: Duration,
    /// A connection to one address of a server.
    pub connect: Duration,
    /// TLS with client or server.
    pub handshake: Duration,
    /// Without a byte in either direction.
    pub idle: Duration,
    /// One question to one name server.
    pub question: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            head: Duration::from_secs(10),
            first_byte: Duration::from_millis(500),
            connect: Duration::from_secs(5),
            handshake: Duration::from_secs(10),
            idle: Duration::from_mins(15),
            question: Duration::from_secs(2),
        }
    }
}

/// Name servers of a `resolv.conf`, IPv4 and IPv6, port 53.
pub fn name_servers(resolv_conf: &str) -> Vec<SocketAddr> {
    resolv_conf
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver")?.split_whitespace().next()?.parse().ok())
        .map(|address| SocketAddr::new(address, 53))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_read_as_the_c_library_reads_them() {
        let text = "# nameserver 9.9.9.9\nsearch example.com\nnameserver 10.0.0.2\n nameserver\t::1 trust\nnameserver nonsense\n";
        assert_eq!(name_servers(text), ["10.0.0.2:53".parse().unwrap(), "[::1]:53".parse().unwrap()]);
    }
}
