//! The connections of a vsock device: who they are, whose turn it is, and what the guest's packets and the host's sockets do to them.
//!
//! The mux knows no queues. The device hands it each packet of the guest, asks it for packets while the guest has buffers, and calls
//! [`Mux::watch`] at the end of each of its own calls.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use event_manager::EventSet;

use super::VsockConfig;
use super::connection::{Connection, Verdict};
use super::greeting::{Greeting, Progress};
use super::packet::{HOST_CID, Header, Ports, STREAM, op};
use super::sockets::{self, FIRST_SOCKET, LISTENER, Sockets, TIMER, Token};
use crate::token_bucket::TokenBucket;

/// Resets that may wait before no packet of the guest is taken.
pub(super) const REPLIES: usize = 256;
/// Host ports of host-initiated connections: far from those that services use.
pub(super) const HOST_PORTS: std::ops::Range<u32> = 1 << 30..1 << 31;
/// Clients accepted in one call.
const ACCEPTS: usize = 64;
/// How long no client is accepted after the host refused a descriptor.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// See the module's documentation.
pub(super) struct Mux {
    pub(super) config: VsockConfig,
    sockets: Sockets,
    /// Clients are accepted and deadlines kept.
    active: bool,
    listening: bool,
    accept_again: Option<Instant>,
    greetings: HashMap<Token, Greeting>,
    connections: HashMap<Token, Connection>,
    /// Connections that the guest knows, by its name for them.
    by_ports: HashMap<Ports, Token>,
    next_token: Token,
    pub(super) next_host_port: u32,
    /// Connections with a packet for the guest, each once, in the order in which they get their turn.
    ready: VecDeque<Token>,
    /// Resets for the guest. They go first. At most one for each packet taken and each connection that ended.
    replies: VecDeque<Header>,
    /// What the guest may still ask for.
    connects: TokenBucket,
}

impl Mux {
    pub(super) fn new(config: VsockConfig, listener: UnixListener) -> io::Result<Self> {
        let rate = config.connects_per_second;
        Ok(Self {
            connects: TokenBucket::new(rate, rate, Instant::now()),
            config,
            sockets: Sockets::new(listener)?,
            active: false,
            listening: false,
            accept_again: None,
            greetings: HashMap::new(),
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            next_token: FIRST_SOCKET,
            next_host_port: HOST_PORTS.start,
            ready: VecDeque::new(),
            replies: VecDeque::new(),
        })
    }

    /// Readable while [`host_events`](Self::host_events) has something to do.
    pub(super) fn fd(&self) -> RawFd {
        self.sockets.fd()
    }

    /// From the next [`watch`](Self::watch) on, clients are accepted.
    pub(super) fn activate(&mut self) {
        self.active = true;
    }

    /// Closes every connection without a word to the guest, and accepts no more from the next [`watch`](Self::watch) on.
    pub(super) fn reset(&mut self) {
        self.active = false;
        self.accept_again = None;
        self.greetings.clear();
        self.connections.clear();
        self.by_ports.clear();
        self.ready.clear();
        self.replies.clear();
    }

    /// Too many resets wait for the guest's buffers.
    pub(super) fn is_choked(&self) -> bool {
        self.replies.len() >= REPLIES
    }

    /// Whether [`next_packet`](Self::next_packet) is worth a call.
    pub(super) fn may_have_packet(&self) -> bool {
        !(self.replies.is_empty() && self.ready.is_empty())
    }

    /// Handles what the host's sockets report.
    pub(super) fn host_events(&mut self, now: Instant) {
        for (token, events) in self.sockets.poll() {
            match token {
                LISTENER => {
                    self.listening = false;
                    self.accept(now);
                }
                TIMER => {
                    self.sockets.acknowledge_timer();
                    self.expire(now);
                }
                _ => match self.connections.get_mut(&token) {
                    Some(connection) => {
                        connection.armed = None;
                        let verdict = connection.host_event(events, now);
                        self.settle(token, verdict);
                    }
                    None => self.advance_greeting(token, now),
                },
            }
        }
    }

    /// Takes a packet of the guest; its payload, none if it was too large. Not to be called while [`is_choked`](Self::is_choked).
    pub(super) fn receive(&mut self, header: &Header, payload: Option<&[u8]>, now: Instant) {
        if header.src_cid != u64::from(self.config.guest_cid) {
            // virtio 1.2 §5.10.6: a packet with a false sender is dropped.
            return;
        }
        let refused = header.dst_cid != HOST_CID || header.kind != STREAM;
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        match self.by_ports.get(&ports) {
            Some(&token) if !refused => {
                let Some(connection) = self.connections.get_mut(&token) else {
                    return;
                };
                let verdict = match payload {
                    Some(payload) => connection.receive(header, payload, now),
                    None => Verdict::Reset,
                };
                self.settle(token, verdict);
            }
            None if !refused && header.op == op::REQUEST => self.connect_to_host(header, ports, now),
            _ if header.op == op::RST => {}
            _ => self.replies.push_back(header.reset_reply()),
        }
    }

    /// A guest program connects to a port of the host.
    fn connect_to_host(&mut self, request: &Header, ports: Ports, now: Instant) {
        if self.connects.opens(now).is_some() {
            return self.replies.push_back(request.reset_reply());
        }
        self.connects.take(1);
        let Some(services) = &self.config.services else { return self.replies.push_back(request.reset_reply()) };
        let mut path = services.clone().into_os_string();
        path.push(format!("_{}", ports.host));
        if self.is_full() {
            tracing::debug!(port = ports.host, "guest connection refused: too many");
            return self.replies.push_back(request.reset_reply());
        }
        match sockets::connect(path.as_ref()) {
            Ok(stream) => self.insert(Connection::accepted(stream, request, ports)),
            Err(error) => {
                tracing::debug!(port = ports.host, %error, "guest connection refused");
                self.replies.push_back(request.reset_reply());
            }
        }
    }

    /// The next packet for the guest. Its payload, at most `room` bytes, is in `buffer` then.
    pub(super) fn next_packet(&mut self, room: usize, buffer: &mut [u8], now: Instant) -> Option<Header> {
        loop {
            if let Some(reply) = self.replies.pop_front() {
                return Some(reply);
            }
            let token = self.ready.pop_front()?;
            let Some(connection) = self.connections.get_mut(&token) else {
                continue;
            };
            connection.queued = false;
            let (header, verdict) = connection.next_packet(room, buffer, now);
            self.settle(token, verdict);
            if let Some(header) = header {
                return Some(Header {
                    src_cid: HOST_CID,
                    dst_cid: self.config.guest_cid.into(),
                    kind: STREAM,
                    ..header
                });
            }
        }
    }

    /// Puts a new connection under watch.
    fn insert(&mut self, connection: Connection) {
        let token = self.take_token();
        self.by_ports.insert(connection.ports, token);
        self.connections.insert(token, connection);
        self.settle(token, Verdict::Keep);
    }

    /// Does what `verdict` says, and brings the connection's place in the queue and its epoll registration up to date.
    fn settle(&mut self, token: Token, verdict: Verdict) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        match verdict {
            Verdict::Keep => {}
            Verdict::Drain => drop(self.by_ports.remove(&connection.ports)),
            Verdict::Reset | Verdict::Close => {
                let ports = connection.ports;
                // A draining connection's ports may name another one by now.
                if self.by_ports.get(&ports) == Some(&token) {
                    self.by_ports.remove(&ports);
                }
                self.connections.remove(&token);
                if verdict == Verdict::Reset {
                    self.replies.push_back(Header {
                        src_cid: HOST_CID,
                        dst_cid: self.config.guest_cid.into(),
                        src_port: ports.host,
                        dst_port: ports.guest,
                        kind: STREAM,
                        op: op::RST,
                        ..Header::default()
                    });
                }
                return;
            }
        }
        if connection.has_packet() && !connection.queued {
            connection.queued = true;
            self.ready.push_back(token);
        }
        let interest = connection.interest();
        let Some(wanted) = interest.filter(|_| interest != connection.armed) else {
            return;
        };
        let registered = match connection.armed {
            None if !connection.registered => self.sockets.add(connection.fd(), token, wanted),
            _ => self.sockets.rearm(connection.fd(), token, wanted),
        };
        match registered {
            Ok(()) => {
                connection.registered = true;
                connection.armed = interest;
            }
            Err(error) => {
                tracing::warn!(%error, "cannot watch a vsock connection");
                self.settle(token, Verdict::Reset);
            }
        }
    }

    /// Accepts clients while there is room for them.
    fn accept(&mut self, now: Instant) {
        for _ in 0..ACCEPTS {
            if self.is_full() {
                return;
            }
            let accepted =
                self.sockets.accept().and_then(|client| client.map(|stream| self.greet(stream, now)).transpose());
            match accepted {
                Ok(Some(())) => {}
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a vsock client");
                    self.accept_again = Some(now + ACCEPT_PAUSE);
                    return;
                }
            }
        }
    }

    fn greet(&mut self, stream: UnixStream, now: Instant) -> io::Result<()> {
        let token = self.take_token();
        self.sockets.add(stream.as_raw_fd(), token, EventSet::IN)?;
        self.greetings.insert(token, Greeting::new(stream, now + self.config.connect_timeout));
        Ok(())
    }

    /// A client that has not named its port yet wrote something, or left.
    fn advance_greeting(&mut self, token: Token, now: Instant) {
        let Some(greeting) = self.greetings.get_mut(&token) else {
            return;
        };
        match greeting.advance() {
            Progress::Waiting => {
                if let Err(error) = self.sockets.rearm(greeting.stream.as_raw_fd(), token, EventSet::IN) {
                    tracing::warn!(%error, "cannot watch a vsock client");
                    self.greetings.remove(&token);
                }
            }
            Progress::Refused => drop(self.greetings.remove(&token)),
            Progress::Port(guest) => {
                let Some(greeting) = self.greetings.remove(&token) else {
                    return;
                };
                let ports = Ports { host: self.take_host_port(guest), guest };
                let mut connection = Connection::requested(greeting.stream, ports, now + self.config.connect_timeout);
                connection.registered = true;
                self.by_ports.insert(ports, token);
                self.connections.insert(token, connection);
                self.settle(token, Verdict::Keep);
            }
        }
    }

    /// Ends what has waited too long.
    fn expire(&mut self, now: Instant) {
        self.greetings.retain(|_, greeting| now < greeting.deadline);
        let late = |connection: &Connection| connection.deadline().is_some_and(|deadline| now >= deadline);
        let expired: Vec<_> =
            self.connections.iter().filter(|(_, c)| late(c)).map(|(&token, c)| (token, c.expire())).collect();
        for (token, verdict) in expired {
            self.settle(token, verdict);
        }
        self.accept_again = self.accept_again.filter(|&until| now < until);
    }

    /// Brings listener and timer up to date with what happened since the last call. The timer also keeps the device's `deadline`.
    pub(super) fn watch(&mut self, deadline: Option<Instant>, now: Instant) -> io::Result<()> {
        let listen = self.active && !self.is_full() && self.accept_again.is_none();
        if listen != self.listening {
            self.sockets.listen(listen)?;
            self.listening = listen;
        }
        let greetings = self.greetings.values().map(|greeting| greeting.deadline);
        let connections = self.connections.values().filter_map(Connection::deadline);
        let next = greetings.chain(connections).chain(self.accept_again).chain(deadline).min();
        self.sockets.wake_at(next.filter(|_| self.active), now)
    }

    fn is_full(&self) -> bool {
        self.greetings.len() + self.connections.len() >= self.config.max_connections
    }

    /// Tokens never repeat, so an event of a closed socket finds nobody.
    fn take_token(&mut self) -> Token {
        let token = self.next_token;
        self.next_token += 1;
        token
    }

    fn take_host_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_host_port;
            self.next_host_port = if host + 1 < HOST_PORTS.end { host + 1 } else { HOST_PORTS.start };
            // Ends: there are fewer connections than ports.
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }
}
