//! virtio-vsock, virtio 1.2 §5.10: the host's side of a guest's stream sockets, on unix sockets.
//!
//! - A host client connects to the device's listener and writes `CONNECT <port>\n`. When the guest accepts on that port, the client
//!   reads `OK <host port>\n`; from then on bytes flow. When the guest refuses, or does not answer in time, the socket is closed.
//! - A guest that connects to port P of the host (CID 2) reaches the unix socket `<path>_<P>`, or is reset if nobody listens there.
//!
//! Everything runs in the transport's calls: guest packets when a queue is notified, host sockets when their epoll is readable.
//!
//! # Bounds
//!
//! At most [`VsockConfig::max_connections`] sockets, each with at most 128 KiB that wait for the host; towards the guest nothing waits
//! but at most one reset per packet received or connection. The transmit queue is not read while [`REPLIES`] resets wait for a
//! receive buffer, as virtio 1.2 §5.10.6.1.2 allows. Clients beyond the bound wait in the listener's backlog.
//!
//! # Snapshots
//!
//! A connection does not survive into another process: its host end is a socket of the old one. The restored device queues a
//! transport-reset event, which makes the guest's driver drop its connections, and holds packets for the guest back until the driver
//! has taken that event: a connection made sooner would be dropped with the old ones. In a VM that is paused and resumed in the same
//! process, connections go on.

mod connection;
mod greeting;
mod packet;
mod sockets;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use event_manager::EventSet;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use self::connection::{Connection, Verdict, WINDOW_BYTES};
use self::greeting::{Greeting, Progress};
use self::packet::{HEADER_BYTES, HOST_CID, Header, Ports, STREAM, op};
use self::sockets::{FIRST_SOCKET, LISTENER, Sockets, TIMER, Token};
use super::{DeviceError, DeviceIo, DeviceState, RestoreError, VirtioDevice};

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];

/// Feature bit: stream sockets.
const F_STREAM: u64 = 1 << 0;
/// Payload of the event that tells the driver to drop its connections (VIRTIO_VSOCK_EVENT_TRANSPORT_RESET).
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// Resets that may wait before the transmit queue is read no more.
const REPLIES: usize = 256;
/// Packets of one direction handled in one call.
const BATCH: usize = 256;
/// Clients accepted in one call.
const ACCEPTS: usize = 64;
/// Largest payload sent to the guest in one packet, bytes.
const PACKET_BYTES: usize = 64 * 1024;
/// How long packets are held back for a driver that does not take its transport-reset event.
const RESET_HOLD: Duration = Duration::from_secs(2);
/// How long no client is accepted after the host refused a descriptor.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// Host ports of host-initiated connections: far from those that services use.
const HOST_PORTS: std::ops::Range<u32> = 1 << 30..1 << 31;

/// Saved state of a [`Vsock`]. Connections are not part of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// Context id of the guest.
    pub guest_cid: u32,
    /// The host port that the next host-initiated connection gets: not one that the guest may remember.
    pub next_host_port: u32,
}

impl VsockState {
    /// Version of this structure.
    pub const VERSION: u16 = 1;
}

/// What a [`Vsock`] is made with.
#[derive(Clone, Debug)]
pub struct VsockConfig {
    /// Context id of the guest, 3 or more.
    pub guest_cid: u32,
    /// A guest's connection to port P of the host goes to the unix socket at this path followed by `_P`.
    pub path: PathBuf,
    /// Connections at one time, the ones being set up included.
    pub max_connections: usize,
    /// How long a connection may take to be set up.
    pub connect_timeout: Duration,
}

impl VsockConfig {
    /// The defaults: 256 connections, 5 s.
    pub fn new(guest_cid: u32, path: PathBuf) -> Self {
        Self { guest_cid, path, max_connections: 256, connect_timeout: Duration::from_secs(5) }
    }
}

/// Where the transport-reset event of a restored device is.
#[derive(Clone, Copy, Debug)]
enum TransportReset {
    /// Not needed, or taken by the driver.
    Done,
    /// Waits for a buffer. Packets are held back until the time given; it starts with the first call after the restore.
    Owed { hold_until: Option<Instant> },
    /// In the driver's buffer; its available index changes when the driver has handled it and gives the buffer back.
    Sent { available: u16, hold_until: Instant },
}

/// The device.
pub struct Vsock {
    config: VsockConfig,
    sockets: Sockets,
    active: bool,
    listening: bool,
    accept_again: Option<Instant>,
    greetings: HashMap<Token, Greeting>,
    connections: HashMap<Token, Connection>,
    /// Connections that the guest knows, by its name for them.
    by_ports: HashMap<Ports, Token>,
    next_token: Token,
    next_host_port: u32,
    /// Connections with a packet for the guest, each once, in the order in which they get their turn.
    ready: VecDeque<Token>,
    /// Resets for the guest. They go first.
    replies: VecDeque<Header>,
    transport_reset: TransportReset,
    buffer: Box<[u8]>,
}

impl Vsock {
    /// A device whose host clients connect to `listener`.
    pub fn new(config: VsockConfig, listener: UnixListener) -> io::Result<Self> {
        Ok(Self {
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
            transport_reset: TransportReset::Done,
            // A packet of the guest fills its window at most.
            buffer: vec![0; WINDOW_BYTES as usize].into_boxed_slice(),
        })
    }

    /// All that the queues allow now. Every entry point ends here, since each queue's progress may be what another waits for.
    fn pump(&mut self, io: &mut DeviceIo<'_>, now: Instant) -> Result<(), DeviceError> {
        self.pump_events(io, now)?;
        self.pump_transmit(io, now)?;
        self.pump_receive(io, now)?;
        // Room for replies may have come only now.
        if self.replies.len() < REPLIES && io.has_available(TX)? {
            io.reschedule(TX);
        }
        self.watch(now)
    }

    /// Sends the transport-reset event and notices when the driver has handled it.
    fn pump_events(&mut self, io: &mut DeviceIo<'_>, now: Instant) -> Result<(), DeviceError> {
        match self.transport_reset {
            TransportReset::Done => {}
            TransportReset::Owed { hold_until } => {
                let hold_until = hold_until.unwrap_or(now + RESET_HOLD);
                self.transport_reset = TransportReset::Owed { hold_until: Some(hold_until) };
                if let Some(mut chain) = io.pop(EVENT)? {
                    chain.writable.write(io.memory(), &TRANSPORT_RESET)?;
                    io.complete(EVENT, chain.head, TRANSPORT_RESET.len() as u32)?;
                    self.transport_reset = TransportReset::Sent { available: io.available_index(EVENT)?, hold_until };
                }
            }
            TransportReset::Sent { available, hold_until } => {
                if now >= hold_until || io.available_index(EVENT)? != available {
                    self.transport_reset = TransportReset::Done;
                }
            }
        }
        Ok(())
    }

    fn packets_held(&self, now: Instant) -> bool {
        match self.transport_reset {
            TransportReset::Done => false,
            TransportReset::Owed { hold_until } => hold_until.is_none_or(|until| now < until),
            TransportReset::Sent { .. } => true,
        }
    }

    /// Takes packets of the guest.
    fn pump_transmit(&mut self, io: &mut DeviceIo<'_>, now: Instant) -> Result<(), DeviceError> {
        for _ in 0..BATCH {
            if self.replies.len() >= REPLIES {
                return Ok(());
            }
            let Some(mut chain) = io.pop(TX)? else {
                return Ok(());
            };
            let mut header = [0; HEADER_BYTES];
            chain.readable.read(io.memory(), &mut header)?;
            let header = Header::decode(&header);
            let len = header.len as usize;
            if u64::from(header.len) > chain.readable.remaining() {
                return Err(DeviceError::TooShort {
                    direction: "readable",
                    have: chain.readable.remaining(),
                    need: header.len.into(),
                });
            }
            // A payload beyond the window breaks the connection, not the device.
            let payload = if len <= self.buffer.len() {
                chain.readable.read(io.memory(), &mut self.buffer[..len])?;
                Some(len)
            } else {
                None
            };
            self.receive(&header, payload, now);
            io.complete(TX, chain.head, 0)?;
        }
        if io.has_available(TX)? {
            io.reschedule(TX);
        }
        Ok(())
    }

    /// Handles one packet of the guest; its payload is the first `payload` bytes of the buffer, none if it was too large.
    fn receive(&mut self, header: &Header, payload: Option<usize>, now: Instant) {
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
                    Some(len) => connection.receive(header, &self.buffer[..len], now),
                    None => Verdict::Reset,
                };
                self.settle(token, verdict);
            }
            None if !refused && header.op == op::REQUEST => self.connect_to_host(header, ports),
            _ if header.op == op::RST => {}
            _ => self.replies.push_back(header.reset_reply()),
        }
    }

    /// A guest program connects to a port of the host.
    fn connect_to_host(&mut self, request: &Header, ports: Ports) {
        let mut path = self.config.path.clone().into_os_string();
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

    /// Fills receive buffers of the guest.
    fn pump_receive(&mut self, io: &mut DeviceIo<'_>, now: Instant) -> Result<(), DeviceError> {
        if self.packets_held(now) {
            return Ok(());
        }
        for _ in 0..BATCH {
            if self.replies.is_empty() && self.ready.is_empty() {
                return Ok(());
            }
            // None: what there is to send waits where it is, the bytes in their sockets.
            let Some(mut chain) = io.pop(RX)? else {
                return Ok(());
            };
            let have = chain.writable.remaining();
            // Room for a header, and for progress.
            let need = HEADER_BYTES as u64 + 1;
            if have < need {
                return Err(DeviceError::TooShort { direction: "writable", have, need });
            }
            let room = PACKET_BYTES.min(have as usize - HEADER_BYTES);
            let Some(header) = self.next_packet(room, now) else {
                io.unpop(RX);
                return Ok(());
            };
            chain.writable.write(io.memory(), &header.encode())?;
            chain.writable.write(io.memory(), &self.buffer[..header.len as usize])?;
            io.complete(RX, chain.head, HEADER_BYTES as u32 + header.len)?;
        }
        if !(self.replies.is_empty() && self.ready.is_empty()) {
            io.reschedule(RX);
        }
        Ok(())
    }

    /// The next packet for the guest, its payload in the buffer.
    fn next_packet(&mut self, room: usize, now: Instant) -> Option<Header> {
        loop {
            if let Some(reply) = self.replies.pop_front() {
                return Some(reply);
            }
            let token = self.ready.pop_front()?;
            let Some(connection) = self.connections.get_mut(&token) else {
                continue;
            };
            connection.queued = false;
            let (header, verdict) = connection.next_packet(room, &mut self.buffer, now);
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

    /// Brings listener and timer up to date with what happened in this call.
    fn watch(&mut self, now: Instant) -> Result<(), DeviceError> {
        let listen = self.active && !self.is_full() && self.accept_again.is_none();
        if listen != self.listening {
            self.sockets
                .listen(listen)
                .map_err(|source| DeviceError::Host { operation: "watch the vsock listener", source })?;
            self.listening = listen;
        }
        let deadlines = !self.greetings.is_empty()
            || self.accept_again.is_some()
            || self.packets_held(now)
            || self.connections.values().any(|connection| connection.deadline().is_some());
        self.sockets
            .tick(self.active && deadlines)
            .map_err(|source| DeviceError::Host { operation: "set the vsock timer", source })
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

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Vec<u8> {
        u64::from(self.config.guest_cid).to_le_bytes().to_vec()
    }

    fn activate(&mut self, _features: u64) -> Result<(), DeviceError> {
        self.active = true;
        self.watch(Instant::now())
    }

    fn reset(&mut self) {
        self.active = false;
        self.accept_again = None;
        self.greetings.clear();
        self.connections.clear();
        self.by_ports.clear();
        self.ready.clear();
        self.replies.clear();
        self.transport_reset = TransportReset::Done;
        if let Err(error) = self.watch(Instant::now()) {
            tracing::warn!(error = &error as &dyn std::error::Error, "vsock reset");
        }
    }

    fn process_queue(&mut self, _queue: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        self.pump(io, Instant::now())
    }

    fn host_events(&self) -> Option<RawFd> {
        Some(self.sockets.fd())
    }

    fn process_host_events(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        let now = Instant::now();
        for (token, events) in self.sockets.poll() {
            match token {
                LISTENER => {
                    self.listening = false;
                    self.accept(now);
                }
                TIMER => {
                    self.sockets.acknowledge_tick();
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
        self.pump(io, now)
    }

    fn save(&self) -> DeviceState {
        DeviceState::Vsock(VsockState { guest_cid: self.config.guest_cid, next_host_port: self.next_host_port })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Vsock(VsockState { guest_cid, next_host_port }) = *state else {
            return Err(RestoreError::Foreign);
        };
        if guest_cid != self.config.guest_cid {
            let (saved, actual) = (guest_cid.into(), self.config.guest_cid.into());
            return Err(RestoreError::Mismatch { field: "guest CID", saved, actual });
        }
        if !HOST_PORTS.contains(&next_host_port) {
            return Err(RestoreError::Impossible { field: "next host port", value: next_host_port.into() });
        }
        self.next_host_port = next_host_port;
        self.transport_reset = TransportReset::Owed { hold_until: None };
        Ok(())
    }
}

#[cfg(test)]
mod tests;
