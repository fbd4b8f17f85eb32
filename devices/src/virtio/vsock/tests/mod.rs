//! A guest that speaks vsock, against host clients on real unix sockets: the guest is here, the tests in the files beside.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use super::super::VirtioDevice;
use super::super::driver::{ARENA, Driver, readable, writable};
use super::connection::WINDOW_BYTES;
use super::packet::{
    HEADER_BYTES, HOST_CID, Header, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, STREAM, op,
};
use super::{EVENT, RX, TX, Vsock, VsockConfig, VsockState};

const CID: u32 = 7;
const RX_BUFFER: u64 = 4096 + HEADER_BYTES as u64;
const RX_COUNT: u64 = 64;
const TX_ARENA: u64 = ARENA + 0x10_0000;
const TX_SLOT: u64 = 0x1_2000;
const TX_COUNT: u64 = 32;
const PATIENCE: Duration = Duration::from_secs(20);

mod bounds;
mod connect;
mod flow;
mod restore;

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
    let mut config = VsockConfig::new(CID);
    config.services = Some(path);
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

    /// Whatever waits, waits without waking the loop.
    fn assert_quiet(&mut self) {
        self.driver.run(0);
        let start = Instant::now();
        self.driver.turn(200);
        assert!(start.elapsed() >= Duration::from_millis(190), "the loop spins");
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
