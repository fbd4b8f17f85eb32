//! Virtio devices as a guest reaches them: registers, and rings in its memory, in any order and with any content. The input is a program of
//! steps, each an octet that says which and the octets it takes.
//!
//! Nothing here may panic, and what a device saves, in whatever state a guest left it, it must be able to restore.

use std::os::unix::net::{UnixDatagram, UnixListener};
use std::sync::{Arc, Mutex, OnceLock};

use event_manager::{EventManager, SubscriberOps};
use stasis_devices::GuestMemory;
use stasis_devices::overlay::Overlay;
use stasis_devices::virtio::VirtioDevice;
use stasis_devices::virtio::block::Block;
use stasis_devices::virtio::mmio::MmioDevice;
use stasis_devices::virtio::net::{Net, NetConfig, RateLimit};
use stasis_devices::virtio::rng::Rng;
use stasis_devices::virtio::vsock::{Vsock, VsockConfig};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MEMORY_BYTES: u64 = 1 << 20;
const DISK_BYTES: u64 = 1 << 20;
/// Rings of queue q begin at `RINGS + q * RING_BYTES`.
const RINGS: u64 = 0x1_0000;
const RING_BYTES: u64 = 0x1_0000;
const QUEUES: u64 = 3;
const QUEUE_SIZE: u16 = 64;
/// Turns of the event loop after a step: a device that asks for more is still at work.
const TURNS: usize = 8;
/// Steps of one input.
const STEPS: usize = 512;

/// Which device.
#[derive(Clone, Copy)]
enum Kind {
    Block,
    Net,
    Vsock,
    Rng,
}

/// What the host's end of the device is: kept as long as the device.
enum Other {
    Nothing,
    Network(UnixDatagram),
}

struct Machine {
    kind: Kind,
    memory: GuestMemory,
    device: Arc<Mutex<MmioDevice>>,
    events: EventManager<Arc<Mutex<MmioDevice>>>,
    other: Other,
    published: [u16; QUEUES as usize],
}

fn model(kind: Kind) -> (Box<dyn VirtioDevice>, Other) {
    match kind {
        Kind::Block => {
            let overlay = Overlay::new(None, tempfile::tempfile().expect("a file"), DISK_BYTES).expect("a disk");
            (Box::new(Block::new(Arc::new(overlay), [0; 20])), Other::Nothing)
        }
        Kind::Net => {
            let (tap, host) = UnixDatagram::pair().expect("sockets");
            host.set_nonblocking(true).expect("a socket");
            let limit = RateLimit {
                bytes_per_second: Some(1 << 40),
                packets_per_second: Some(1 << 40),
                ..RateLimit::default()
            };
            let config = NetConfig { mac: [2, 0, 0, 0, 0, 1], mtu: 1500, to_guest: limit, from_guest: limit };
            (Box::new(Net::new(config, Some(tap.into())).expect("a device")), Other::Network(host))
        }
        Kind::Vsock => {
            static DIRECTORY: OnceLock<tempfile::TempDir> = OnceLock::new();
            let directory = DIRECTORY.get_or_init(|| tempfile::tempdir().expect("a directory"));
            let path = directory.path().join(format!("{:?}", std::thread::current().id()));
            let _ = std::fs::remove_file(&path);
            let listener = UnixListener::bind(&path).expect("a listener");
            let vsock = Vsock::new(VsockConfig::new(3), listener).expect("a device");
            (Box::new(vsock), Other::Nothing)
        }
        Kind::Rng => (Box::new(Rng::new()), Other::Nothing),
    }
}

fn place(kind: Kind, memory: &GuestMemory) -> (MmioDevice, Other) {
    let irq = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let (model, other) = model(kind);
    (MmioDevice::new(model, memory.clone(), irq).expect("a device"), other)
}

impl Machine {
    fn new(kind: Kind) -> Self {
        let half = (MEMORY_BYTES / 2) as usize;
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), half), (GuestAddress(half as u64), half)]);
        let memory = memory.expect("guest memory");
        let (device, other) = place(kind, &memory);
        Self::around(kind, memory, device, other, [0; QUEUES as usize])
    }

    fn around(
        kind: Kind,
        memory: GuestMemory,
        device: MmioDevice,
        other: Other,
        published: [u16; QUEUES as usize],
    ) -> Self {
        let device = Arc::new(Mutex::new(device));
        let mut events = EventManager::new().expect("an event loop");
        events.add_subscriber(device.clone());
        Self { kind, memory, device, events, other, published }
    }

    fn write(&self, register: u64, value: u32) {
        self.device.lock().expect("no panic").write(register, &value.to_le_bytes());
    }

    fn read(&self, register: u64) -> u32 {
        let mut bytes = [0; 4];
        self.device.lock().expect("no panic").read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        // Outside memory nobody writes.
        let _ = self.memory.write_slice(bytes, GuestAddress(address));
    }

    fn ring(queue: u64) -> [u64; 3] {
        let table = RINGS + queue * RING_BYTES;
        let available = table + 16 * u64::from(QUEUE_SIZE);
        [table, available, (available + 6 + 2 * u64::from(QUEUE_SIZE)).next_multiple_of(4)]
    }

    /// What an honest driver does to begin, with the features that `mask` leaves.
    fn start(&mut self, mask: u32) {
        self.write(0x70, 0);
        self.write(0x70, 1);
        self.write(0x70, 3);
        for half in [0, 1] {
            self.write(0x14, half);
            let features = self.read(0x10);
            self.write(0x24, half);
            self.write(0x20, if half == 0 { features & mask } else { features });
        }
        self.write(0x70, 11);
        for queue in 0..QUEUES {
            self.put(Self::ring(queue)[0], &[0; 2048]);
            self.write(0x30, queue as u32);
            self.write(0x38, QUEUE_SIZE.into());
            for (register, address) in [0x80, 0x90, 0xa0].into_iter().zip(Self::ring(queue)) {
                self.write(register, address as u32);
                self.write(register + 4, (address >> 32) as u32);
            }
            self.write(0x44, 1);
        }
        self.write(0x70, 15);
        self.published = [0; QUEUES as usize];
    }

    fn publish(&mut self, queue: u64, head: u16) {
        let available = Self::ring(queue)[1];
        let published = &mut self.published[queue as usize];
        let slot = u64::from(*published % QUEUE_SIZE);
        *published = published.wrapping_add(1);
        let index = *published;
        self.put(available + 4 + 2 * slot, &head.to_le_bytes());
        self.put(available + 2, &index.to_le_bytes());
    }

    /// Lets the device work.
    fn run(&mut self) {
        for _ in 0..TURNS {
            if self.events.run_with_timeout(0).expect("an event loop") == 0 {
                return;
            }
        }
    }

    /// The device in another process, on the same memory.
    fn migrate(self) -> Self {
        let state = self.device.lock().expect("no panic").save();
        let (kind, memory, published) = (self.kind, self.memory.clone(), self.published);
        drop(self);
        let (mut device, other) = place(kind, &memory);
        device.restore(&state).expect("what was saved can be restored");
        assert_eq!(device.save().queues, state.queues);
        device.kick_all();
        Self::around(kind, memory, device, other, published)
    }

    /// The host does something.
    fn host(&self, bytes: &[u8]) {
        if let Other::Network(host) = &self.other {
            let _ = host.send(bytes);
            while host.recv(&mut [0; 64]).is_ok() {}
        }
    }
}

/// Octets that a step takes; zeros when there are no more.
struct Program<'a>(&'a [u8]);

impl<'a> Program<'a> {
    fn number(&mut self, octets: usize) -> u64 {
        let mut bytes = [0; 8];
        let taken = self.take(octets);
        bytes[..taken.len()].copy_from_slice(taken);
        u64::from_le_bytes(bytes)
    }

    fn take(&mut self, octets: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(octets.min(self.0.len()));
        self.0 = rest;
        taken
    }
}

fn play(kind: Kind, input: &[u8], started: bool) {
    let mut machine = Machine::new(kind);
    if started {
        machine.start(u32::MAX);
    }
    let mut program = Program(input);
    for _ in 0..STEPS {
        if program.0.is_empty() {
            break;
        }
        match program.number(1) % 12 {
            0 => machine.write(program.number(2) % 0x200, program.number(4) as u32),
            1 => drop(machine.read(program.number(2) % 0x1000)),
            2 => {
                let (at, len) = (program.number(3) % MEMORY_BYTES, program.number(1));
                machine.put(at, program.take(len as usize));
            }
            3 => machine.start(program.number(4) as u32),
            // A descriptor near where it belongs.
            4 => {
                let (queue, index) = (program.number(1) % QUEUES, program.number(1));
                machine.put(Machine::ring(queue)[0] + 16 * (index % 64), program.take(16));
            }
            // A chain of pieces of memory, well formed.
            5 => {
                let queue = program.number(1) % QUEUES;
                let pieces = program.number(1) % 8 + 1;
                let first = program.number(1) % 48;
                for piece in 0..pieces {
                    let address = program.number(3) % MEMORY_BYTES;
                    let len = program.number(2);
                    let flags = program.number(1) & 2 | u64::from(piece + 1 < pieces);
                    let mut bytes = [0; 16];
                    bytes[..8].copy_from_slice(&address.to_le_bytes());
                    bytes[8..12].copy_from_slice(&(len as u32).to_le_bytes());
                    bytes[12..14].copy_from_slice(&(flags as u16).to_le_bytes());
                    bytes[14..].copy_from_slice(&((first + piece + 1) as u16).to_le_bytes());
                    machine.put(Machine::ring(queue)[0] + 16 * (first + piece), &bytes);
                }
                machine.publish(queue, first as u16);
            }
            6 => {
                let (queue, head) = (program.number(1) % QUEUES, program.number(2));
                machine.publish(queue, head as u16);
            }
            7 => {
                machine.write(0x50, program.number(1) as u32);
                machine.run();
            }
            8 => machine = machine.migrate(),
            9 => {
                let len = program.number(1);
                machine.host(program.take(len as usize));
                machine.run();
            }
            10 => machine.run(),
            // Any width, anywhere.
            _ => {
                let at = program.number(2) % 0x1000;
                let width = 1 << (program.number(1) % 4);
                let bytes = program.take(width);
                machine.device.lock().expect("no panic").write(at, bytes);
                machine.device.lock().expect("no panic").read(at, &mut vec![0; width]);
            }
        }
    }
    machine.run();
    drop(machine.migrate());
}

/// The block device.
pub fn block(input: &[u8]) {
    play(Kind::Block, input, true);
}

/// The network device.
pub fn net(input: &[u8]) {
    play(Kind::Net, input, true);
}

/// The vsock device.
pub fn vsock(input: &[u8]) {
    play(Kind::Vsock, input, true);
}

/// The entropy device.
pub fn rng(input: &[u8]) {
    play(Kind::Rng, input, true);
}

/// Registers of any device, from power-on. The first octet chooses it.
pub fn mmio(input: &[u8]) {
    let Some((&kind, program)) = input.split_first() else { return };
    let kind = [Kind::Block, Kind::Net, Kind::Vsock, Kind::Rng][usize::from(kind % 4)];
    play(kind, program, false);
}

/// Descriptor tables with any content: sixteen octets a descriptor, and a notification of each of them.
pub fn chains(input: &[u8]) {
    let mut machine = Machine::new(Kind::Net);
    machine.start(u32::MAX);
    for (queue, part) in (0..QUEUES).zip(input.chunks(input.len().div_ceil(QUEUES as usize).max(1))) {
        machine.put(Machine::ring(queue)[0], &part[..part.len().min(16 * usize::from(QUEUE_SIZE))]);
    }
    for head in 0..QUEUE_SIZE {
        for queue in 0..QUEUES {
            machine.publish(queue, head);
            machine.write(0x50, queue as u32);
        }
        machine.host(&[0; 60]);
        machine.run();
        if machine.read(0x70) & 64 != 0 {
            return;
        }
    }
    drop(machine.migrate());
}
