//! One stream connection between a guest port and a unix socket of the host.
//!
//! A connection owns its socket, its flow control and its half-closes. It knows nothing of queues: the device feeds it guest packets
//! and socket events, and asks it for the next packet when the guest has a buffer. Bytes are read from the socket only then, and only
//! as many as the guest gave credit for, so the host side needs no buffer towards the guest; towards the host it holds at most
//! [`WINDOW_BYTES`].
//!
//! ```text
//!   host connects ──▶ Requested ──RESPONSE──▶ Open ◀── guest connects
//!                         │                    │
//!                        RST                   ├─ both directions shut down, all bytes with the host ─▶ Reset
//!                         ▼                    └─ RST after the guest's last byte ─▶ Draining ─▶ Closed
//!                       Closed
//! ```

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use event_manager::EventSet;
use rustix::net::{RecvFlags, SendFlags};

use super::packet::{Header, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};

/// Receive buffer that is announced to the guest, bytes: the most that waits for a slow host reader.
pub(super) const WINDOW_BYTES: u32 = 128 * 1024;
/// The guest hears of freed buffer space in steps of this many bytes.
const CREDIT_STEP: u32 = WINDOW_BYTES / 4;
/// A connection that both sides are done with is dropped when nothing moves for this long.
const LINGER: Duration = Duration::from_secs(30);

/// What becomes of a connection after something happened to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Verdict {
    /// It goes on.
    Keep,
    /// The guest gets an RST, the host's socket is closed.
    Reset,
    /// The host's socket is closed; the guest knows already.
    Close,
    /// The guest has forgotten it: its ports are free, but bytes still flow to the host.
    Drain,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// A host client waits for the guest's RESPONSE.
    Requested { sent: bool },
    /// Bytes flow.
    Open,
    /// The guest is gone; its last bytes flow to the host.
    Draining,
}

/// A connection. See the module's documentation.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) ports: Ports,
    /// Whether the device has it in its list of connections with packets for the guest.
    pub(super) queued: bool,
    /// Epoll knows the socket.
    pub(super) registered: bool,
    /// What epoll watches for, until it reports once.
    pub(super) armed: Option<EventSet>,
    stream: UnixStream,
    phase: Phase,
    deadline: Option<Instant>,
    response_owed: bool,

    // Guest to host.
    to_host: VecDeque<u8>,
    /// Bytes that left `to_host`, and what the guest last heard of it.
    fwd_cnt: u32,
    announced_fwd_cnt: u32,
    credit_update_owed: bool,
    /// Flags of the guest's SHUTDOWN packets.
    guest_shutdown: u32,
    write_closed: bool,

    // Host to guest.
    tx_cnt: u32,
    guest_buf_alloc: u32,
    guest_fwd_cnt: u32,
    credit_requested: bool,
    /// The socket may have bytes, or its end, to read.
    readable: bool,
    end_of_stream: bool,
    /// The host takes no more bytes: its socket is closed, or a write failed. What the guest still sends is dropped.
    hung_up: bool,
    /// Flags of our SHUTDOWN packets so far.
    host_shutdown: u32,
}

impl Connection {
    /// A host client that has named its port: owes the guest a REQUEST, which must be answered by `deadline`.
    pub(super) fn requested(stream: UnixStream, ports: Ports, deadline: Instant) -> Self {
        Self::new(stream, ports, Phase::Requested { sent: false }, Some(deadline))
    }

    /// A guest's connection that the host's socket has accepted: owes the guest a RESPONSE.
    pub(super) fn accepted(stream: UnixStream, request: &Header, ports: Ports) -> Self {
        let mut connection = Self::new(stream, ports, Phase::Open, None);
        connection.response_owed = true;
        connection.take_credit(request);
        connection
    }

    fn new(stream: UnixStream, ports: Ports, phase: Phase, deadline: Option<Instant>) -> Self {
        Self {
            ports,
            queued: false,
            registered: false,
            armed: None,
            stream,
            phase,
            deadline,
            response_owed: false,
            to_host: VecDeque::new(),
            fwd_cnt: 0,
            announced_fwd_cnt: 0,
            credit_update_owed: false,
            guest_shutdown: 0,
            write_closed: false,
            tx_cnt: 0,
            guest_buf_alloc: 0,
            guest_fwd_cnt: 0,
            credit_requested: false,
            readable: false,
            end_of_stream: false,
            hung_up: false,
            host_shutdown: 0,
        }
    }

    pub(super) fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// When [`expire`](Self::expire) is due.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// The deadline has passed.
    pub(super) fn expire(&self) -> Verdict {
        match self.phase {
            // The guest never heard of it.
            Phase::Requested { sent: false } | Phase::Draining => Verdict::Close,
            Phase::Requested { sent: true } | Phase::Open => Verdict::Reset,
        }
    }

    /// What to watch the socket for; none when no event could change anything. A hang-up is always reported, so a socket that has
    /// hung up is watched only if it has something to do.
    pub(super) fn interest(&self) -> Option<EventSet> {
        let mut interest = EventSet::empty();
        if self.may_read() && !self.readable {
            interest |= EventSet::IN;
        }
        if !self.to_host.is_empty() {
            interest |= EventSet::OUT;
        }
        (!interest.is_empty() || !self.hung_up).then_some(interest)
    }

    /// Whether [`next_packet`](Self::next_packet) may have one.
    pub(super) fn has_packet(&self) -> bool {
        match self.phase {
            Phase::Requested { sent } => !sent,
            Phase::Open => {
                self.response_owed
                    || self.credit_update_owed
                    || self.shutdown_owed() != 0
                    || self.may_read() && self.readable && (self.credit() > 0 || !self.credit_requested)
            }
            Phase::Draining => false,
        }
    }

    /// Takes a packet of the guest for these ports.
    pub(super) fn receive(&mut self, header: &Header, payload: &[u8], now: Instant) -> Verdict {
        self.take_credit(header);
        match (self.phase, header.op) {
            (Phase::Requested { sent: true }, op::RESPONSE) => self.open(),
            (Phase::Requested { .. }, op::RST) => Verdict::Close,
            (Phase::Open, op::RW) => self.take_bytes(payload, now),
            (Phase::Open, op::CREDIT_UPDATE) => Verdict::Keep,
            (Phase::Open, op::CREDIT_REQUEST) => {
                self.credit_update_owed = true;
                Verdict::Keep
            }
            (Phase::Open, op::SHUTDOWN) => self.take_shutdown(header.flags, now),
            (Phase::Open, op::RST) => {
                if self.guest_shutdown & SHUTDOWN_SEND != 0 && !self.to_host.is_empty() {
                    self.phase = Phase::Draining;
                    self.deadline = Some(now + LINGER);
                    Verdict::Drain
                } else {
                    Verdict::Close
                }
            }
            _ => Verdict::Reset,
        }
    }

    /// Takes events of the socket.
    pub(super) fn host_event(&mut self, events: EventSet, now: Instant) -> Verdict {
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            self.hung_up = true;
            self.readable = true;
        }
        self.readable |= events.contains(EventSet::IN);
        match self.phase {
            Phase::Requested { .. } if self.hung_up => return self.expire(),
            Phase::Draining if self.hung_up => return Verdict::Close,
            Phase::Requested { .. } | Phase::Open | Phase::Draining => {}
        }
        if self.to_host.is_empty() { Verdict::Keep } else { self.flush(now) }
    }

    /// The next packet for the guest with at most `room` bytes of payload, which are in `buffer` then. The device fills in CIDs and
    /// socket type.
    pub(super) fn next_packet(&mut self, room: usize, buffer: &mut [u8], now: Instant) -> (Option<Header>, Verdict) {
        match self.phase {
            Phase::Requested { sent: false } => {
                self.phase = Phase::Requested { sent: true };
                return (Some(self.header(op::REQUEST)), Verdict::Keep);
            }
            Phase::Requested { sent: true } | Phase::Draining => return (None, Verdict::Keep),
            Phase::Open => {}
        }
        if self.response_owed {
            self.response_owed = false;
            return (Some(self.header(op::RESPONSE)), Verdict::Keep);
        }
        if self.may_read() && self.readable {
            let limit = (self.credit() as usize).min(room).min(buffer.len());
            if limit == 0 {
                if !self.credit_requested {
                    self.credit_requested = true;
                    return (Some(self.header(op::CREDIT_REQUEST)), Verdict::Keep);
                }
            } else {
                match receive_bytes(&self.stream, &mut buffer[..limit]) {
                    Ok(Some(0)) => self.end_of_stream = true,
                    Ok(Some(len)) => {
                        self.tx_cnt = self.tx_cnt.wrapping_add(len as u32);
                        let header = Header { len: len as u32, ..self.header(op::RW) };
                        return (Some(header), Verdict::Keep);
                    }
                    Ok(None) => self.readable = false,
                    Err(_) => return (None, Verdict::Reset),
                }
            }
        }
        if self.credit_update_owed {
            return (Some(self.header(op::CREDIT_UPDATE)), Verdict::Keep);
        }
        let flags = self.shutdown_owed();
        if flags != 0 {
            self.host_shutdown |= flags;
            if self.host_shutdown == SHUTDOWN_BOTH {
                // The guest answers with an RST when its program has closed the socket.
                self.deadline = Some(now + LINGER);
            }
            let header = Header { flags: self.host_shutdown, ..self.header(op::SHUTDOWN) };
            return (Some(header), Verdict::Keep);
        }
        (None, Verdict::Keep)
    }

    /// The guest answered our REQUEST.
    fn open(&mut self) -> Verdict {
        self.phase = Phase::Open;
        self.deadline = None;
        let line = format!("OK {}\n", self.ports.host);
        // A fresh socket has room for it; one that has not belongs to a client that is gone.
        match send_bytes(&self.stream, line.as_bytes()) {
            Ok(Some(sent)) if sent == line.len() => Verdict::Keep,
            _ => Verdict::Reset,
        }
    }

    fn take_bytes(&mut self, payload: &[u8], now: Instant) -> Verdict {
        // Beyond its own end of stream, or beyond the credit it has.
        if self.guest_shutdown & SHUTDOWN_SEND != 0 || self.to_host.len() + payload.len() > WINDOW_BYTES as usize {
            return Verdict::Reset;
        }
        let sent = if self.hung_up {
            payload.len()
        } else if self.to_host.is_empty() {
            match send_bytes(&self.stream, payload) {
                Ok(sent) => sent.unwrap_or(0),
                Err(_) => return self.host_gone(payload.len(), now),
            }
        } else {
            0
        };
        self.fwd_cnt = self.fwd_cnt.wrapping_add(sent as u32);
        self.to_host.extend(&payload[sent..]);
        self.after_forwarding(now)
    }

    fn take_shutdown(&mut self, flags: u32, now: Instant) -> Verdict {
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
            // The host's writer learns it; what it has written is for nobody. Fails when the host is gone, which epoll reports.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.after_forwarding(now)
    }

    fn flush(&mut self, now: Instant) -> Verdict {
        while !self.to_host.is_empty() {
            match send_bytes(&self.stream, self.to_host.as_slices().0) {
                Ok(Some(sent)) => {
                    self.fwd_cnt = self.fwd_cnt.wrapping_add(sent as u32);
                    self.to_host.drain(..sent);
                }
                Ok(None) => break,
                Err(_) => return self.host_gone(0, now),
            }
        }
        self.after_forwarding(now)
    }

    /// A write failed: what waits, and `dropped` bytes more, count as forwarded, so that the guest's writer runs into our SHUTDOWN and
    /// not into a full window. What the host has sent still goes to the guest.
    fn host_gone(&mut self, dropped: usize, now: Instant) -> Verdict {
        self.hung_up = true;
        self.fwd_cnt = self.fwd_cnt.wrapping_add((self.to_host.len() + dropped) as u32);
        self.to_host.clear();
        self.after_forwarding(now)
    }

    /// What follows from how much is left in `to_host`.
    fn after_forwarding(&mut self, now: Instant) -> Verdict {
        self.credit_update_owed |= self.fwd_cnt.wrapping_sub(self.announced_fwd_cnt) >= CREDIT_STEP;
        if !self.to_host.is_empty() {
            if self.phase == Phase::Draining || self.guest_shutdown == SHUTDOWN_BOTH {
                // Something moved, or the wait begins.
                self.deadline = Some(now + LINGER);
            }
            return Verdict::Keep;
        }
        if self.phase == Phase::Draining {
            return Verdict::Close;
        }
        if self.guest_shutdown == SHUTDOWN_BOTH {
            // virtio 1.2 §5.10.6.6.1: the RST that completes a clean disconnect.
            return Verdict::Reset;
        }
        if self.guest_shutdown & SHUTDOWN_SEND != 0 && !self.write_closed {
            self.write_closed = true;
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        if self.host_shutdown == SHUTDOWN_BOTH {
            self.deadline = Some(now + LINGER);
        }
        Verdict::Keep
    }

    fn may_read(&self) -> bool {
        self.phase == Phase::Open && !self.end_of_stream && self.guest_shutdown & SHUTDOWN_RECEIVE == 0
    }

    /// SHUTDOWN flags that the guest has not heard of.
    fn shutdown_owed(&self) -> u32 {
        let send = if self.end_of_stream { SHUTDOWN_SEND } else { 0 };
        let receive = if self.hung_up { SHUTDOWN_RECEIVE } else { 0 };
        (send | receive) & !self.host_shutdown
    }

    /// Bytes that the guest has room for (virtio 1.2 §5.10.6.3). Its counters are its own affair: lies only stall it.
    fn credit(&self) -> u32 {
        self.guest_buf_alloc.saturating_sub(self.tx_cnt.wrapping_sub(self.guest_fwd_cnt))
    }

    fn take_credit(&mut self, header: &Header) {
        self.guest_buf_alloc = header.buf_alloc;
        self.guest_fwd_cnt = header.fwd_cnt;
        if self.credit() > 0 {
            self.credit_requested = false;
        }
    }

    /// Every packet tells the guest how much of its window is free.
    fn header(&mut self, op: u16) -> Header {
        self.credit_update_owed = false;
        self.announced_fwd_cnt = self.fwd_cnt;
        Header {
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            op,
            buf_alloc: WINDOW_BYTES,
            fwd_cnt: self.fwd_cnt,
            ..Header::default()
        }
    }
}

/// Sends without blocking or SIGPIPE; none when the socket has no room.
fn send_bytes(stream: &UnixStream, bytes: &[u8]) -> io::Result<Option<usize>> {
    if bytes.is_empty() {
        return Ok(Some(0));
    }
    again_is_none(rustix::io::retry_on_intr(|| {
        rustix::net::send(stream, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    }))
}

/// Receives without blocking; 0 is the end of the stream, none that there is nothing now.
pub(super) fn receive_bytes(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    again_is_none(
        rustix::io::retry_on_intr(|| rustix::net::recv(stream, &mut *buffer, RecvFlags::DONTWAIT)).map(|(len, _)| len),
    )
}

fn again_is_none(result: rustix::io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(len) => Ok(Some(len)),
        Err(rustix::io::Errno::AGAIN) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
