//! A guest with a network driver, against a host that is the other end of a datagram socket, or a real tap: the guest is here, the tests in
//! the files beside.

use std::collections::{HashMap, VecDeque};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_net as b;

use super::super::driver::{ARENA, Buffer, Driver, readable, writable};
use super::header::{HEADER_BYTES, Header};
use super::{CONTROL, Net, NetConfig, RECEIVE, RateLimit, TRANSMIT};

mod lifecycle;
mod limits;
mod real;
mod receive;
mod transmit;

const MAC: [u8; 6] = [2, 0x53, 0x54, 0x41, 0x53, 2];
const RX_ARENA: u64 = ARENA;
const TX_ARENA: u64 = ARENA + 0x40_0000;
const CTRL_ARENA: u64 = ARENA + 0x60_0000;
/// What fills receive buffers before they are used.
const CANARY: u8 = 0xa5;
const ALL: u64 = !0;
const MERGEABLE: u64 = 1 << b::VIRTIO_NET_F_MRG_RXBUF;
const GUEST_TSO4: u64 = 1 << b::VIRTIO_NET_F_GUEST_TSO4;
const ANNOUNCE: u64 = 1 << b::VIRTIO_NET_F_GUEST_ANNOUNCE;

/// A clock that a test moves.
#[derive(Clone)]
struct Clock(Arc<Mutex<Instant>>);

impl Clock {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }

    fn now(&self) -> Instant {
        *self.0.lock().unwrap()
    }

    fn advance(&self, by: Duration) {
        *self.0.lock().unwrap() += by;
    }
}

struct Guest {
    driver: Driver,
    host: UnixDatagram,
    clock: Clock,
    counters: Arc<super::NetCounters>,
    /// Receive buffers by head: where each begins, and its pieces.
    rx: HashMap<u16, Vec<Buffer>>,
    rx_next: u64,
    tx_next: u64,
    /// Frames that were received, in order.
    inbox: VecDeque<(Header, Vec<u8>)>,
}

fn config() -> NetConfig {
    NetConfig { mac: MAC, mtu: 1500, to_guest: RateLimit::default(), from_guest: RateLimit::default() }
}

/// A device and the host's end of its tap.
fn model(config: NetConfig, clock: &Clock) -> (Net, UnixDatagram) {
    let (tap, host) = UnixDatagram::pair().unwrap();
    host.set_nonblocking(true).unwrap();
    let clock = clock.clone();
    (Net::with_clock(config, Some(tap.into()), move || clock.now()).unwrap(), host)
}

impl Guest {
    fn new(features: u64) -> Self {
        Self::with(config(), features, 64)
    }

    fn with(config: NetConfig, features: u64, queue_size: u16) -> Self {
        let clock = Clock::new();
        let (net, host) = model(config, &clock);
        let counters = net.counters();
        let mut driver = Driver::new(net);
        driver.start(queue_size, features);
        let mut guest = Self {
            driver,
            host,
            clock,
            counters,
            rx: HashMap::new(),
            rx_next: RX_ARENA,
            tx_next: TX_ARENA,
            inbox: VecDeque::new(),
        };
        guest.driver.run(0);
        guest
    }

    /// Makes one receive buffer of these pieces available.
    fn give(&mut self, pieces: &[u32]) {
        let mut buffers = Vec::new();
        for &len in pieces {
            if self.rx_next + u64::from(len) > TX_ARENA {
                self.rx_next = RX_ARENA;
            }
            buffers.push(writable(self.rx_next, len));
            self.driver.put(self.rx_next, &vec![CANARY; len as usize]);
            // A gap behind each, that nobody may write.
            self.rx_next += u64::from(len) + 1;
            self.driver.put(self.rx_next - 1, &[CANARY]);
        }
        let head = self.driver.add(RECEIVE, &buffers);
        self.rx.insert(head, buffers);
    }

    /// Tells the device of what was given, and lets it work.
    fn run_receive(&mut self) {
        self.driver.notify(RECEIVE);
        self.driver.run(0);
        self.collect();
    }

    /// Takes what was received, as a driver does.
    fn collect(&mut self) {
        while let Some((head, len)) = self.driver.take_used(RECEIVE) {
            let mut frame = self.content(head, len as usize);
            let header = Header::decode(&frame[..HEADER_BYTES].try_into().unwrap());
            for _ in 1..header.num_buffers {
                let (head, len) = self.driver.take_used(RECEIVE).expect("all chains of a frame come together");
                let more = self.content(head, len as usize);
                frame.extend(more);
            }
            self.inbox.push_back((header, frame.split_off(HEADER_BYTES)));
        }
    }

    /// What a used buffer holds; what is behind its end was not touched.
    fn content(&mut self, head: u16, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for buffer in self.rx.remove(&head).expect("a buffer of ours") {
            let piece = self.driver.get(buffer.address, buffer.len as usize + 1);
            assert_eq!(piece.last(), Some(&CANARY), "behind a buffer");
            bytes.extend(&piece[..buffer.len as usize]);
        }
        assert!(bytes[len..].iter().all(|&byte| byte == CANARY), "beyond the used length");
        bytes.truncate(len);
        bytes
    }

    /// The host sends a frame.
    fn arrives(&self, header: Header, frame: &[u8]) {
        assert!(self.try_arrive(header, frame));
    }

    /// The same, if the host's queue has room.
    fn try_arrive(&self, header: Header, frame: &[u8]) -> bool {
        self.host.send(&[&header.encode(), frame].concat()).is_ok()
    }

    /// The next frame that the guest received.
    fn take(&mut self) -> Option<(Header, Vec<u8>)> {
        self.inbox.pop_front()
    }

    /// Makes a frame available for sending, in pieces of at most `piece` bytes; answers whether there was room in the ring.
    fn send(&mut self, header: Header, frame: &[u8], piece: usize) -> bool {
        let bytes = [&header.encode(), frame].concat();
        if self.tx_next + bytes.len() as u64 > CTRL_ARENA {
            self.tx_next = TX_ARENA;
        }
        self.driver.put(self.tx_next, &bytes);
        let buffers: Vec<_> = (0..bytes.len())
            .step_by(piece)
            .map(|at| readable(self.tx_next + at as u64, piece.min(bytes.len() - at) as u32))
            .collect();
        self.tx_next += bytes.len() as u64;
        self.driver.try_add(TRANSMIT, &buffers).is_some()
    }

    fn run_transmit(&mut self) {
        self.driver.notify(TRANSMIT);
        self.driver.run(0);
        while self.driver.take_used(TRANSMIT).is_some() {}
    }

    /// The next frame that the host received.
    fn arrived(&self) -> Option<(Header, Vec<u8>)> {
        let mut bytes = vec![0; 70_000];
        let len = self.host.recv(&mut bytes).ok()?;
        let header = Header::decode(&bytes[..HEADER_BYTES].try_into().unwrap());
        Some((header, bytes[HEADER_BYTES..len].to_vec()))
    }

    /// A command on the control queue, and its answer.
    fn command(&mut self, class: u8, command: u8) -> Option<u8> {
        self.driver.put(CTRL_ARENA, &[class, command, 0xff]);
        self.driver.add(CONTROL, &[readable(CTRL_ARENA, 2), writable(CTRL_ARENA + 2, 1)]);
        self.driver.notify(CONTROL);
        self.driver.run(0);
        self.driver.take_used(CONTROL)?;
        Some(self.driver.get(CTRL_ARENA + 2, 1)[0])
    }

    /// The status field of the configuration space.
    fn status(&self) -> u16 {
        let mut status = [0; 2];
        self.driver.device().read(0x106, &mut status);
        u16::from_le_bytes(status)
    }
}

fn frame(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}
