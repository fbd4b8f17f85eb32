//! A guest that speaks vsock, against host clients on real unix sockets. `guest` has the guest, the rest are the tests.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::Bytes;

use super::super::driver::{ARENA, Driver, readable, writable};
use super::packet::{SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::*;

const CID: u32 = 7;
const RX_BUFFER: u64 = 4096 + HEADER_BYTES as u64;
const RX_COUNT: u64 = 64;
const TX_ARENA: u64 = ARENA + 0x10_0000;
const TX_SLOT: u64 = 0x1_2000;
const TX_COUNT: u64 = 32;
const PATIENCE: Duration = Duration::from_secs(20);

type Packet = (Header, Vec<u8>);

struct Guest {
    driver: Driver,
    directory: tempfile::TempDir,
    /// Packets taken from the receive queue and not looked at yet.
    inbox: VecDeque<Packet>,
    rx_buffers: HashMap<u16, u64>,
    tx_free: Vec<u64>,
    tx_buffers: HashMap<u16, u64>,
    /// Gives used receive buffers back at once.
    generous: bool,
    /// What the guest says of its receive buffer.
    buf_alloc: u32,
    fwd_cnt: u32,
}

fn model(directory: &Path, change: impl FnOnce(&mut VsockConfig)) -> Vsock {
    let path = directory.join("v.sock");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let mut config = VsockConfig::new(CID, path);
    change(&mut config);
    Vsock::new(config, listener).unwrap()
}

impl Guest {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut VsockConfig)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let driver = Driver::new(model(directory.path(), change));
        let mut guest = Self {
            driver,
            directory,
            inbox: VecDeque::new(),
            rx_buffers: HashMap::new(),
            tx_free: (0..TX_COUNT).map(|slot| TX_ARENA + slot * TX_SLOT).collect(),
            tx_buffers: HashMap::new(),
            generous: true,
            buf_alloc: 256 * 1024,
            fwd_cnt: 0,
        };
        guest.driver.start(64, !0);
        guest
    }

    /// With all receive buffers given.
    fn ready() -> Self {
        let mut guest = Self::new();
        guest.give_all();
        guest
    }

    fn give_all(&mut self) {
        for slot in 0..RX_COUNT {
            self.give(ARENA + slot * 0x2000);
        }
        self.driver.notify(RX);
    }

    fn give(&mut self, address: u64) {
        let head = self.driver.add(RX, &[writable(address, RX_BUFFER as u32)]);
        self.rx_buffers.insert(head, address);
    }

    fn give_event_buffer(&mut self) {
        self.driver.add(EVENT, &[writable(ARENA + 0xf_0000, 8)]);
        self.driver.notify(EVENT);
    }

    fn client(&self) -> UnixStream {
        let client = UnixStream::connect(self.directory.path().join("v.sock")).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client
    }

    /// A listener that takes the guest's connections to `port`.
    fn service(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.directory.path().join(format!("v.sock_{port}"))).unwrap()
    }

    /// Takes what the device has put in the receive queue.
    fn collect(&mut self) {
        let mut gave = false;
        while let Some((head, len)) = self.driver.take_used(RX) {
            let address = self.rx_buffers.remove(&head).unwrap();
            let bytes = self.driver.get(address, len as usize);
            let header = Header::decode(bytes[..HEADER_BYTES].try_into().unwrap());
            assert_eq!(header.len as usize, bytes.len() - HEADER_BYTES);
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID.into()));
            self.inbox.push_back((header, bytes[HEADER_BYTES..].to_vec()));
            if self.generous {
                self.give(address);
                gave = true;
            }
        }
        if gave {
            self.driver.notify(RX);
        }
        while let Some((head, len)) = self.driver.take_used(TX) {
            assert_eq!(len, 0);
            self.tx_free.push(self.tx_buffers.remove(&head).unwrap());
        }
    }

    fn turn(&mut self) {
        self.driver.turn(5);
        self.collect();
    }

    /// Runs the loop until nothing happens any more.
    fn settle(&mut self) {
        loop {
            self.driver.run(5);
            let before = self.inbox.len();
            self.collect();
            if self.inbox.len() == before {
                return;
            }
        }
    }

    fn try_receive(&mut self) -> Option<Packet> {
        if self.inbox.is_empty() {
            self.settle();
        }
        self.inbox.pop_front()
    }

    fn receive(&mut self) -> Packet {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(packet) = self.inbox.pop_front() {
                return packet;
            }
            assert!(Instant::now() < deadline, "no packet");
            self.turn();
        }
    }

    fn expect(&mut self, op: u16) -> Packet {
        let packet = self.receive();
        assert_eq!(packet.0.op, op, "{packet:?}");
        packet
    }

    fn header(&self, ports: Ports, op: u16) -> Header {
        Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: ports.guest,
            dst_port: ports.host,
            kind: STREAM,
            op,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
            ..Header::default()
        }
    }

    fn send_raw(&mut self, header: &Header, payload: &[u8]) {
        while self.tx_free.is_empty() {
            self.turn();
        }
        let address = self.tx_free.pop().unwrap();
        self.driver.put(address, &header.encode());
        self.driver.put(address + HEADER_BYTES as u64, payload);
        let head = self.driver.add(TX, &[readable(address, (HEADER_BYTES + payload.len()) as u32)]);
        self.tx_buffers.insert(head, address);
        self.driver.notify(TX);
    }

    fn send(&mut self, ports: Ports, op: u16) {
        self.send_raw(&self.header(ports, op), &[]);
    }

    fn send_bytes(&mut self, ports: Ports, payload: &[u8]) {
        self.send_raw(&Header { len: payload.len() as u32, ..self.header(ports, op::RW) }, payload);
    }

    fn send_shutdown(&mut self, ports: Ports, flags: u32) {
        self.send_raw(&Header { flags, ..self.header(ports, op::SHUTDOWN) }, &[]);
    }

    /// A host client's connection to `port`, accepted.
    fn accepted(&mut self, port: u32) -> (UnixStream, Ports) {
        let mut client = self.client();
        client.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        let (request, _) = self.expect(op::REQUEST);
        assert_eq!(request.dst_port, port);
        assert_eq!(request.buf_alloc, WINDOW_BYTES);
        let ports = Ports { host: request.src_port, guest: port };
        self.send(ports, op::RESPONSE);
        self.settle();
        let line = format!("OK {}\n", ports.host);
        let mut answer = vec![0; line.len()];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer, line.as_bytes());
        (client, ports)
    }

    /// A connection of the guest to a host service.
    fn connected(&mut self, host: u32, guest: u32) -> (UnixStream, Ports) {
        let service = self.service(host);
        let ports = Ports { host, guest };
        self.send(ports, op::REQUEST);
        self.settle();
        let (stream, _) = service.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(self.expect(op::RESPONSE).0.buf_alloc, WINDOW_BYTES);
        (stream, ports)
    }
}

fn at_end(stream: &mut UnixStream) -> bool {
    stream.read(&mut [0; 16]).unwrap() == 0
}

#[test]
fn a_host_client_reaches_a_port_of_the_guest() {
    let mut guest = Guest::ready();
    let (mut client, ports) = guest.accepted(1024);
    client.write_all(b"hello").unwrap();
    assert_eq!(guest.expect(op::RW).1, b"hello");
    guest.send_bytes(ports, b"hello yourself");
    guest.settle();
    let mut answer = [0; 14];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"hello yourself");
    // A second client gets another host port.
    let (_other, others) = guest.accepted(1024);
    assert_ne!(others.host, ports.host);
}

#[test]
fn bytes_sent_together_with_the_greeting_are_not_lost() {
    let mut guest = Guest::ready();
    let mut client = guest.client();
    client.write_all(b"CONNECT 5\nearly").unwrap();
    let (request, _) = guest.expect(op::REQUEST);
    guest.send(Ports { host: request.src_port, guest: 5 }, op::RESPONSE);
    assert_eq!(guest.expect(op::RW).1, b"early");
}

#[test]
fn a_client_that_is_refused_or_says_nonsense_is_closed() {
    let mut guest = Guest::ready();
    let mut client = guest.client();
    client.write_all(b"CONNECT 99\n").unwrap();
    let (request, _) = guest.expect(op::REQUEST);
    guest.send(Ports { host: request.src_port, guest: 99 }, op::RST);
    guest.settle();
    assert!(at_end(&mut client));

    let mut client = guest.client();
    client.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    guest.settle();
    // Closed with bytes unread: the client may see a reset or the end.
    assert!(!matches!(client.read(&mut [0]), Ok(1)));
    assert_eq!(guest.try_receive(), None);
}

#[test]
fn set_up_has_a_time_limit() {
    let mut guest = Guest::with(|config| config.connect_timeout = Duration::from_millis(150));
    guest.give_all();
    let mut silent = guest.client();
    let mut waiting = guest.client();
    waiting.write_all(b"CONNECT 9\n").unwrap();
    let (request, _) = guest.expect(op::REQUEST);
    let (reset, _) = guest.expect(op::RST);
    assert_eq!((reset.src_port, reset.dst_port), (request.src_port, 9));
    assert!(at_end(&mut waiting) && at_end(&mut silent));
    // Too late.
    guest.send(Ports { host: request.src_port, guest: 9 }, op::RESPONSE);
    guest.expect(op::RST);

    // A guest without buffers never hears of the client, and owes it nothing.
    let mut guest = Guest::with(|config| config.connect_timeout = Duration::from_millis(150));
    let mut client = guest.client();
    client.write_all(b"CONNECT 9\n").unwrap();
    let deadline = Instant::now() + Duration::from_millis(500);
    while Instant::now() < deadline {
        guest.turn();
    }
    assert!(at_end(&mut client));
    guest.give_all();
    assert_eq!(guest.try_receive(), None);
}

#[test]
fn a_client_that_leaves_before_it_is_accepted_is_forgotten() {
    let mut guest = Guest::ready();
    let mut client = guest.client();
    client.write_all(b"CONNECT 3\n").unwrap();
    guest.expect(op::REQUEST);
    drop(client);
    guest.expect(op::RST);
}

#[test]
fn the_guest_reaches_services_of_the_host_and_only_those() {
    let mut guest = Guest::ready();
    let (mut stream, ports) = guest.connected(52, 4000);
    guest.send_bytes(ports, b"request");
    guest.settle();
    let mut request = [0; 7];
    stream.read_exact(&mut request).unwrap();
    assert_eq!(&request, b"request");
    stream.write_all(b"answer").unwrap();
    assert_eq!(guest.expect(op::RW).1, b"answer");

    let nobody = Ports { host: 53, guest: 4001 };
    guest.send(nobody, op::REQUEST);
    let (reset, _) = guest.expect(op::RST);
    assert_eq!((reset.src_port, reset.dst_port), (53, 4001));
    // A second request for ports in use ends the first.
    guest.send(ports, op::REQUEST);
    guest.expect(op::RST);
    assert!(at_end(&mut stream));
}

#[test]
fn packets_that_belong_nowhere_are_reset_or_dropped() {
    let mut guest = Guest::ready();
    let ports = Ports { host: 1, guest: 2 };
    for op in [op::RESPONSE, op::RW, op::SHUTDOWN, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 0, 99] {
        guest.send(ports, op);
        let (reset, _) = guest.expect(op::RST);
        assert_eq!((reset.src_port, reset.dst_port), (1, 2));
    }
    guest.send(ports, op::RST);
    assert_eq!(guest.try_receive(), None, "never a reset for a reset");
    // Another sender than this guest.
    guest.send_raw(&Header { src_cid: 8, ..guest.header(ports, op::REQUEST) }, &[]);
    assert_eq!(guest.try_receive(), None);
    // Another socket type.
    let _service = guest.service(1);
    guest.send_raw(&Header { kind: 2, ..guest.header(ports, op::REQUEST) }, &[]);
    assert_eq!(guest.expect(op::RST).0.kind, 2);
    assert!(!guest.driver.needs_reset());
}

#[test]
fn the_host_sends_no_more_than_the_guest_has_room_for() {
    let mut guest = Guest::ready();
    guest.buf_alloc = 1000;
    let (mut client, ports) = guest.accepted(1);
    client.write_all(&[7; 2500]).unwrap();
    let mut seen = guest.expect(op::RW).1.len();
    assert_eq!(seen, 1000);
    guest.expect(op::CREDIT_REQUEST);
    assert_eq!(guest.try_receive(), None);
    for (fwd_cnt, len) in [(400, 400), (1000, 600), (2000, 500)] {
        guest.fwd_cnt = fwd_cnt;
        guest.send(ports, op::CREDIT_UPDATE);
        let (header, payload) = guest.expect(op::RW);
        assert_eq!((header.op, payload.len()), (op::RW, len));
        seen += payload.len();
        if seen < 2500 {
            guest.expect(op::CREDIT_REQUEST);
        }
    }
    assert_eq!(seen, 2500);
    // Counters that make no sense stall the connection and nothing else.
    guest.fwd_cnt = 1 << 31;
    guest.send(ports, op::CREDIT_UPDATE);
    client.write_all(b"x").unwrap();
    guest.expect(op::CREDIT_REQUEST);
    assert_eq!(guest.try_receive(), None);
}

#[test]
fn a_slow_host_bounds_what_the_guest_may_send() {
    let mut guest = Guest::ready();
    let (mut client, ports) = guest.accepted(1);
    let mut sent = 0u32;
    let mut heard = 0;
    // An honest guest stops when its window is full.
    loop {
        while let Some((header, _)) = guest.try_receive() {
            assert_eq!(header.op, op::CREDIT_UPDATE);
            heard = header.fwd_cnt;
        }
        if WINDOW_BYTES - (sent - heard) < 4096 {
            break;
        }
        guest.send_bytes(ports, &[sent as u8; 4096]);
        sent += 4096;
        guest.settle();
    }
    assert!(sent > WINDOW_BYTES);
    // The host reads: the window opens again, and every byte is there.
    let mut seen = vec![0; sent as usize];
    let reader = std::thread::spawn(move || {
        client.read_exact(&mut seen).unwrap();
        (client, seen)
    });
    while !reader.is_finished() {
        guest.turn();
    }
    let (client, seen) = reader.join().unwrap();
    assert!(
        seen.chunks(4096).zip((0u32..).step_by(4096)).all(|(chunk, at)| chunk.iter().all(|&byte| byte == at as u8))
    );
    let (update, _) = guest.expect(op::CREDIT_UPDATE);
    assert!(WINDOW_BYTES - (sent - update.fwd_cnt) >= 4096);
    // One that is asked answers.
    guest.inbox.clear();
    guest.send(ports, op::CREDIT_REQUEST);
    assert_eq!(guest.expect(op::CREDIT_UPDATE).0.fwd_cnt, sent);

    // A guest that does not stop is cut off, before the host holds more than the window.
    for _ in 0..64 {
        guest.send_bytes(ports, &vec![0; 32 * 1024]);
        guest.settle();
    }
    assert!(std::iter::from_fn(|| guest.try_receive()).any(|(header, _)| header.op == op::RST));
    drop(client);
}

#[test]
fn a_host_half_close_leaves_the_other_half_open() {
    let mut guest = Guest::ready();
    let (mut client, ports) = guest.accepted(1);
    client.write_all(b"all I have").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(op::RW).1, b"all I have");
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, SHUTDOWN_SEND);
    guest.send_bytes(ports, b"answer");
    guest.settle();
    let mut answer = [0; 6];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
    guest.send_shutdown(ports, SHUTDOWN_BOTH);
    guest.expect(op::RST);
    assert!(at_end(&mut client));
}

#[test]
fn a_guest_half_close_leaves_the_other_half_open() {
    let mut guest = Guest::ready();
    let (mut client, ports) = guest.accepted(1);
    guest.send_bytes(ports, b"question");
    guest.send_shutdown(ports, SHUTDOWN_SEND);
    guest.settle();
    let mut question = Vec::new();
    client.read_to_end(&mut question).unwrap();
    assert_eq!(question, b"question");
    client.write_all(b"answer").unwrap();
    assert_eq!(guest.expect(op::RW).1, b"answer");
    // Bytes after the end break the connection.
    guest.send_bytes(ports, b"more");
    guest.expect(op::RST);
}

#[test]
fn a_guest_that_reads_no_more_stops_the_hosts_writer() {
    let mut guest = Guest::ready();
    let (mut client, ports) = guest.accepted(1);
    guest.send_shutdown(ports, SHUTDOWN_RECEIVE);
    guest.settle();
    let error = (0..100).find_map(|_| client.write(&vec![0; 65536]).err()).unwrap();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    guest.send_bytes(ports, b"still here");
    guest.settle();
    let mut bytes = [0; 10];
    client.read_exact(&mut bytes).unwrap();
    assert_eq!(guest.try_receive(), None);
}

#[test]
fn a_host_that_closes_is_a_shutdown_of_both_halves_and_loses_nothing() {
    let mut guest = Guest::ready();
    let (mut client, ports) = guest.accepted(1);
    client.write_all(&vec![1; 20_000]).unwrap();
    drop(client);
    let mut seen = 0;
    let flags = loop {
        match guest.receive() {
            (Header { op: op::RW, .. }, payload) => seen += payload.len(),
            (Header { op: op::SHUTDOWN, flags, .. }, _) if flags == SHUTDOWN_BOTH => break flags,
            (Header { op: op::SHUTDOWN, .. }, _) => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((seen, flags), (20_000, SHUTDOWN_BOTH));
    // What the guest sends now goes nowhere, and does not stall.
    guest.send_bytes(ports, &vec![0; 30_000]);
    guest.send_bytes(ports, &vec![0; 30_000]);
    guest.settle();
    assert!(std::iter::from_fn(|| guest.try_receive()).all(|(header, _)| header.op != op::RST));
    // The guest's program closes its socket.
    guest.send(ports, op::RST);
    guest.send_bytes(ports, b"x");
    guest.expect(op::RST);
}

#[test]
fn bytes_of_a_guest_that_closes_and_forgets_still_reach_a_slow_host() {
    let mut guest = Guest::ready();
    let (mut client, ports) = guest.accepted(1);
    let payload: Vec<u8> = (0..32 * 1024u32).map(|i| (i / 3) as u8).collect();
    let mut sent = 0;
    // More than the socket takes, so that some waits in the device.
    for _ in 0..9 {
        guest.send_bytes(ports, &payload);
        guest.settle();
        sent += payload.len();
    }
    guest.inbox.clear();
    guest.send_shutdown(ports, SHUTDOWN_BOTH);
    assert_eq!(guest.try_receive(), None, "no clean end before the bytes are with the host");
    guest.send(ports, op::RST);
    guest.settle();
    // The ports are free at once.
    guest.send_bytes(ports, b"?");
    guest.expect(op::RST);
    let reader = std::thread::spawn(move || {
        let mut seen = Vec::new();
        client.read_to_end(&mut seen).unwrap();
        seen
    });
    while !reader.is_finished() {
        guest.turn();
    }
    let seen = reader.join().unwrap();
    assert_eq!(seen.len(), sent);
    assert!(seen.chunks(payload.len()).all(|chunk| chunk == payload));
}

#[test]
fn without_receive_buffers_nothing_is_lost_and_nobody_spins() {
    let mut guest = Guest::new();
    (0..16).for_each(|slot| guest.give(ARENA + slot * 0x2000));
    guest.driver.notify(RX);
    guest.generous = false;
    let (mut client, ports) = guest.accepted(1);
    client.write_all(&vec![9; 100_000]).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    guest.settle();
    // All buffers are used up. The loop must be quiet although the socket has bytes.
    let start = Instant::now();
    guest.driver.turn(200);
    assert!(start.elapsed() >= Duration::from_millis(190), "the loop spins");
    // The transmit direction does not depend on receive buffers.
    guest.send_bytes(ports, b"fine");
    guest.driver.run(5);
    let mut bytes = [0; 4];
    client.read_exact(&mut bytes).unwrap();
    guest.generous = true;
    guest.give_all_free();
    let mut seen = 0;
    loop {
        match guest.receive() {
            (Header { op: op::RW, .. }, payload) => {
                assert!(payload.iter().all(|&byte| byte == 9));
                seen += payload.len();
            }
            (Header { op: op::SHUTDOWN, .. }, _) => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(seen, 100_000);
}

impl Guest {
    /// Gives the receive buffers back that are not with the device.
    fn give_all_free(&mut self) {
        self.collect();
        for slot in 0..RX_COUNT {
            let address = ARENA + slot * 0x2000;
            if !self.rx_buffers.values().any(|&given| given == address) {
                self.give(address);
            }
        }
        self.driver.notify(RX);
    }
}

#[test]
fn resets_are_bounded_when_the_guest_takes_none() {
    let mut guest = Guest::new();
    let nowhere = Ports { host: 1, guest: 2 };
    let mut sent = 0;
    for _ in 0..2 * REPLIES {
        if guest.tx_free.is_empty() {
            guest.settle();
        }
        if guest.tx_free.is_empty() {
            break;
        }
        guest.send(nowhere, op::RW);
        sent += 1;
    }
    // The device has stopped reading the transmit queue, quietly.
    assert_eq!(sent, REPLIES + TX_COUNT as usize);
    guest.driver.run(0);
    let start = Instant::now();
    guest.driver.turn(200);
    assert!(start.elapsed() >= Duration::from_millis(190), "the loop spins");
    guest.give_all();
    let resets =
        std::iter::from_fn(|| guest.try_receive()).inspect(|(header, _)| assert_eq!(header.op, op::RST)).count();
    assert_eq!(resets, sent);
}

#[test]
fn large_transfers_both_ways_are_exact() {
    const BYTES: usize = 64 << 20;
    /// A prime, so that no buffer size hides a shift.
    const PERIOD: usize = 65_521;
    let pattern: Arc<[u8]> = (0..3 * PERIOD).map(|at| at % PERIOD).map(|at| (at ^ (at >> 8)) as u8).collect();
    let part = |pattern: &Arc<[u8]>, at: usize, len: usize| pattern[at % PERIOD..at % PERIOD + len].to_vec();
    let mut guest = Guest::ready();
    let (client, ports) = guest.accepted(1);
    let mut writer = client.try_clone().unwrap();
    let mut reader = client;
    let theirs = Arc::clone(&pattern);
    let to_guest = std::thread::spawn(move || {
        let chunk = 100_000;
        for at in (0..BYTES).step_by(chunk) {
            writer.write_all(&part(&theirs, at, chunk.min(BYTES - at))).unwrap();
        }
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let theirs = Arc::clone(&pattern);
    let from_guest = std::thread::spawn(move || {
        let mut at = 0;
        let mut buffer = vec![0; 70_000];
        loop {
            let len = reader.read(&mut buffer).unwrap();
            if len == 0 {
                return at;
            }
            assert!(buffer[..len] == part(&theirs, at, len), "after {at} bytes");
            at += len;
        }
    });
    let (mut sent, mut heard, mut received) = (0usize, 0u32, 0usize);
    let (mut host_done, mut guest_done) = (false, false);
    let deadline = Instant::now() + Duration::from_mins(2);
    while !(host_done && guest_done) {
        assert!(Instant::now() < deadline, "{sent} sent, {received} received");
        let room = WINDOW_BYTES - (sent as u32).wrapping_sub(heard);
        let len = (room as usize).min(60_000).min(BYTES - sent);
        if len > 0 && !guest.tx_free.is_empty() {
            guest.send_bytes(ports, &part(&pattern, sent, len));
            sent += len;
        } else if sent == BYTES && !guest_done && !guest.tx_free.is_empty() {
            guest.send_shutdown(ports, SHUTDOWN_SEND);
            guest_done = true;
        }
        guest.driver.turn(1);
        guest.collect();
        let mut update = false;
        while let Some((header, payload)) = guest.inbox.pop_front() {
            heard = header.fwd_cnt;
            match header.op {
                op::RW => {
                    assert!(payload == part(&pattern, received, payload.len()), "after {received} bytes");
                    received += payload.len();
                    guest.fwd_cnt = received as u32;
                    update |= received % (64 * 1024) < payload.len();
                }
                op::SHUTDOWN => host_done = true,
                op::CREDIT_UPDATE => {}
                op::CREDIT_REQUEST => update = true,
                other => panic!("op {other}"),
            }
        }
        if update {
            guest.send(ports, op::CREDIT_UPDATE);
        }
    }
    to_guest.join().unwrap();
    while !from_guest.is_finished() {
        guest.turn();
    }
    assert_eq!((from_guest.join().unwrap(), received), (BYTES, BYTES));
}

#[test]
fn many_short_connections_in_both_directions_leave_nothing_behind() {
    let mut guest = Guest::with(|config| config.max_connections = 8);
    guest.give_all();
    let service = guest.service(80);
    let path = guest.directory.path().join("v.sock");
    let before = open_files();
    let clients = std::thread::spawn(move || {
        for round in 0..1000u32 {
            let mut client = UnixStream::connect(&path).unwrap();
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            client.write_all(format!("CONNECT {}\n{round}", 1000 + round % 3).as_bytes()).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with("OK ") && answer.ends_with(&format!("\necho {round}")), "{answer:?}");
        }
    });
    let mut echoes: HashMap<Ports, Vec<u8>> = HashMap::new();
    let mut guest_port = 0;
    let mut done = 0;
    while !clients.is_finished() || done < guest_port {
        // The guest's own connections, one after the other, beside the clients'.
        if guest_port < 1000 && done == guest_port {
            guest_port += 1;
            guest.send(Ports { host: 80, guest: guest_port }, op::REQUEST);
        }
        guest.turn();
        while let Some((header, payload)) = guest.inbox.pop_front() {
            let ports = Ports { host: header.src_port, guest: header.dst_port };
            match header.op {
                op::REQUEST => {
                    guest.send(ports, op::RESPONSE);
                    echoes.insert(ports, b"echo ".to_vec());
                }
                op::RW => echoes.entry(ports).or_default().extend(payload),
                op::SHUTDOWN => {
                    if let Some(echo) = echoes.remove(&ports) {
                        guest.send_bytes(ports, &echo);
                        guest.send_shutdown(ports, SHUTDOWN_BOTH);
                    }
                }
                op::RESPONSE => {
                    let (mut stream, _) = service.accept().unwrap();
                    stream.write_all(b"x").unwrap();
                    guest.send_shutdown(ports, SHUTDOWN_BOTH);
                }
                op::RST => done += u32::from(ports.host == 80),
                op::CREDIT_UPDATE | op::CREDIT_REQUEST => {}
                other => panic!("op {other}"),
            }
        }
    }
    clients.join().unwrap();
    guest.settle();
    assert_eq!(done, 1000);
    assert_eq!(open_files(), before, "sockets left open");
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn clients_beyond_the_bound_wait_their_turn() {
    let mut guest = Guest::with(|config| config.max_connections = 2);
    guest.give_all();
    let (_first, ports) = guest.accepted(1);
    let (_second, _) = guest.accepted(1);
    let mut third = guest.client();
    third.write_all(b"CONNECT 3\n").unwrap();
    assert_eq!(guest.try_receive(), None);
    let start = Instant::now();
    guest.driver.turn(200);
    assert!(start.elapsed() >= Duration::from_millis(190), "the loop spins");
    // The guest's own are refused.
    let _service = guest.service(1);
    guest.send(Ports { host: 1, guest: 1 }, op::REQUEST);
    guest.expect(op::RST);
    guest.send(ports, op::RST);
    assert_eq!(guest.expect(op::REQUEST).0.dst_port, 3);
}

#[test]
fn a_reset_of_the_device_closes_everything_and_a_new_driver_starts_afresh() {
    let mut guest = Guest::ready();
    let (mut client, _) = guest.accepted(1);
    guest.driver.start(64, !0);
    guest.driver.run(5);
    assert!(at_end(&mut client));
    guest.rx_buffers.clear();
    guest.give_all();
    guest.accepted(2);
}

#[test]
fn a_restored_device_resets_the_transport_before_anything_else() {
    let mut guest = Guest::ready();
    guest.give_event_buffer();
    let (mut client, ports) = guest.accepted(1);
    let next = guest.driver.migrate(model(guest.directory.path(), |_| {}));
    // The old process ends.
    let mut old = std::mem::replace(&mut guest.driver, next);
    old.run(0);
    drop(old);
    assert!(at_end(&mut client));
    let mut client = guest.client();
    client.write_all(b"CONNECT 5\n").unwrap();
    guest.driver.device().kick_all();
    guest.driver.run(50);
    assert_eq!(guest.driver.take_used(EVENT).map(|used| used.1), Some(4));
    assert_eq!(guest.driver.get(ARENA + 0xf_0000, 4), TRANSPORT_RESET);
    guest.collect();
    assert!(guest.inbox.is_empty(), "the driver has not taken the event yet");
    // It gives the buffer back when it has dropped its connections.
    guest.give_event_buffer();
    let (request, _) = guest.expect(op::REQUEST);
    assert_eq!(request.dst_port, 5);
    assert!(request.src_port > ports.host, "not a port that the guest may remember");
    // An old connection is unknown.
    guest.send(ports, op::RW);
    assert_eq!(guest.expect(op::RST).0.src_port, ports.host);
    // Only once.
    guest.driver.run(5);
    assert_eq!(guest.driver.take_used(EVENT), None);
}

#[test]
fn the_reset_event_waits_for_a_buffer_but_connections_do_not_wait_for_ever() {
    let mut guest = Guest::ready();
    let next = guest.driver.migrate(model(guest.directory.path(), |_| {}));
    guest.driver = next;
    guest.driver.device().kick_all();
    let mut client = guest.client();
    client.write_all(b"CONNECT 5\n").unwrap();
    let start = Instant::now();
    guest.expect(op::REQUEST);
    assert!(start.elapsed() + Duration::from_millis(300) >= RESET_HOLD);
    assert_eq!(guest.driver.take_used(EVENT), None);
    guest.give_event_buffer();
    guest.driver.run(5);
    assert_eq!(guest.driver.take_used(EVENT).map(|used| used.1), Some(4));
}

#[test]
fn a_state_of_another_guest_or_with_an_odd_port_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let good = VsockState { guest_cid: CID, next_host_port: HOST_PORTS.start + 5 };
    let restore = |state: VsockState| model(directory.path(), |_| {}).restore(&DeviceState::Vsock(state));
    assert!(restore(good.clone()).is_ok());
    assert!(restore(VsockState { guest_cid: 8, ..good.clone() }).is_err());
    assert!(restore(VsockState { next_host_port: 5, ..good.clone() }).is_err());
    assert!(restore(VsockState { next_host_port: HOST_PORTS.end, ..good }).is_err());
}

#[test]
fn packets_and_buffers_that_are_none_break_the_device() {
    // A header cut short.
    let mut guest = Guest::ready();
    guest.driver.add(TX, &[readable(TX_ARENA, 43)]);
    guest.driver.notify(TX);
    guest.driver.run(5);
    assert!(guest.driver.needs_reset());
    // A payload that is not there.
    for len in [1, 70_000, u32::MAX] {
        let mut guest = Guest::ready();
        let header = Header { len, ..guest.header(Ports { host: 1, guest: 1 }, op::RW) };
        guest.send_raw(&header, &[]);
        guest.driver.run(5);
        assert!(guest.driver.needs_reset(), "{len}");
    }
    // A receive buffer without room, or that cannot be written.
    for buffer in [writable(ARENA, 44), readable(ARENA, 4096)] {
        let mut guest = Guest::new();
        let mut client = guest.client();
        client.write_all(b"CONNECT 1\n").unwrap();
        guest.driver.add(RX, &[buffer]);
        guest.driver.notify(RX);
        guest.driver.run(5);
        assert!(guest.driver.needs_reset());
        assert!(at_end(&mut client), "its sockets are closed");
    }
    // An event buffer without room.
    let guest = Guest::ready();
    let mut next = guest.driver.migrate(model(guest.directory.path(), |_| {}));
    next.add(EVENT, &[writable(ARENA, 3)]);
    next.device().kick_all();
    next.run(5);
    assert!(next.needs_reset());
}

#[test]
fn a_packet_larger_than_the_window_breaks_its_connection_only() {
    let mut guest = Guest::ready();
    let (mut client, ports) = guest.accepted(1);
    // One chain of two buffers, longer than the window in all.
    let len = WINDOW_BYTES + 1;
    let header = Header { len, ..guest.header(ports, op::RW) };
    guest.driver.put(TX_ARENA, &header.encode());
    guest.driver.add(TX, &[readable(TX_ARENA, HEADER_BYTES as u32), readable(ARENA, len)]);
    guest.driver.notify(TX);
    guest.driver.run(5);
    guest.driver.take_used(TX).unwrap();
    guest.expect(op::RST);
    assert!(at_end(&mut client));
    guest.accepted(2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Random packets, for connections that exist and for some that do not: the device lives, and an honest connection works after.
    #[test]
    fn random_packets_are_survived(packets in prop::collection::vec(
        (0u16..9, prop_oneof![Just(STREAM), any::<u16>()], any::<u32>(), any::<u32>(), any::<u32>(), 0usize..3000, 0u32..4),
        0..60,
    )) {
        let mut guest = Guest::ready();
        let (_client, known) = guest.accepted(1);
        let (_stream, other) = guest.connected(9, 9);
        for (op, kind, flags, buf_alloc, fwd_cnt, len, which) in packets {
            let ports = [known, other, Ports { host: 9, guest: flags }, Ports { host: flags, guest: fwd_cnt }][which as usize];
            let header = Header { kind, flags, buf_alloc, fwd_cnt, len: len as u32, ..guest.header(ports, op) };
            guest.send_raw(&header, &vec![1; len]);
            guest.turn();
        }
        guest.settle();
        prop_assert!(!guest.driver.needs_reset());
        guest.inbox.clear();
        guest.accepted(77);
    }

    /// Random bytes as packets.
    #[test]
    fn noise_is_survived(noise in prop::collection::vec(any::<u8>(), 44..200)) {
        let mut guest = Guest::ready();
        guest.driver.memory.write_slice(&noise, vm_memory::GuestAddress(TX_ARENA)).unwrap();
        guest.driver.add(TX, &[readable(TX_ARENA, noise.len() as u32)]);
        guest.driver.notify(TX);
        guest.driver.run(0);
        guest.driver.start(64, !0);
        prop_assert!(!guest.driver.needs_reset());
    }
}
