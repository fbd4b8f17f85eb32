//! A host, an Internet and guests, each a network namespace of this test's own: nothing here is connected to the machine's network.
//!
//! A guest is a namespace with a tap whose frames are carried to and from the tap of a sandbox's network, as a VMM's device would.

use rustix::event::{PollFd, PollFlags, poll};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use stasis_warden::network::policy::{Operator, Policy};
use stasis_warden::network::{Claimed, GUEST_HARDWARE, Listeners, Networks, Settings, tap};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Addresses of the Internet's servers: one that policies name, another one.
pub(crate) const SERVER: Ipv4Addr = Ipv4Addr::new(93, 184, 216, 34);
pub(crate) const OTHER_SERVER: Ipv4Addr = Ipv4Addr::new(93, 184, 220, 1);
/// A host of the site's own network.
pub(crate) const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 20, 30, 40);
/// Where clouds have their metadata.
pub(crate) const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// The host's address towards the Internet, and the router's.
pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(93, 184, 1, 2);
/// What a guest waits for an answer: refusals come at once, so that only what is dropped takes as long.
const PATIENCE: Duration = Duration::from_millis(700);

/// What came of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// The server's greeting.
    Greeted,
    /// It was refused at once.
    Refused,
    /// Nothing came.
    Silence,
}

/// The namespaces of one test. The thread that made it is on the host.
pub(crate) struct World {
    pub(crate) networks: Networks,
    pub(crate) settings: Settings,
    internet: OwnedFd,
    _state: tempfile::TempDir,
}

/// Runs `test` on a host of its own. The thread ends afterwards, and its namespaces with it.
pub(crate) fn on_a_host(operator: Operator, test: impl FnOnce(&mut World) + Send) -> Result<(), String> {
    std::thread::scope(|scope| {
        let run = scope.spawn(|| test(&mut World::new(operator)));
        run.join().map_err(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
        })
    })
}

/// Leaves the calling thread's namespace for a new one, and keeps a handle of that.
fn fresh_namespace() -> OwnedFd {
    // SAFETY: descriptors stay shared between threads.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
    File::open("/proc/thread-self/ns/net").unwrap().into()
}

/// Runs `work` within a namespace.
pub(crate) fn within<T: Send>(namespace: impl AsFd + Sync, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let run = scope.spawn(|| {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            work()
        });
        run.join().unwrap()
    })
}

#[expect(clippy::disallowed_methods, reason = "the test's own world is made with what people use")]
pub(crate) fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

impl World {
    fn new(operator: Operator) -> Self {
        // SAFETY: descriptors stay shared between threads.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS) }.unwrap();
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        let state = tempfile::tempdir().unwrap();
        let internet = std::thread::scope(|scope| scope.spawn(fresh_namespace).join().unwrap());
        ip("link set lo up");
        // By the number of a descriptor that this process shares with `ip`'s view of it.
        let there = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&internet));
        ip(&format!("link add wan type veth peer name lan netns {there}"));
        ip(&format!("addr add {HOST}/24 dev wan"));
        ip("link set wan up");
        within(&internet, || {
            ip("link set lo up");
            ip("addr add 93.184.1.1/24 dev lan");
            ip("link set lan up");
            for address in [SERVER, OTHER_SERVER, PRIVATE, METADATA] {
                ip(&format!("addr add {address}/32 dev lo"));
            }
        });
        ip("route add default via 93.184.1.1");
        ip("route add 169.254.169.254 via 93.184.1.1");
        let settings = Settings { state_dir: state.path().join("networks"), ready: 0, operator, ..Settings::default() };
        let networks = Networks::open(settings.clone()).unwrap();
        Self { networks, settings, internet, _state: state }
    }

    /// Serves a greeting over TCP on each of these addresses, in the Internet, until the process ends.
    pub(crate) fn serve(&self, addresses: &[(Ipv4Addr, u16)]) {
        within(&self.internet, || addresses.iter().for_each(|address| greet(*address)));
    }

    /// Echoes datagrams there.
    pub(crate) fn echo(&self, addresses: &[(Ipv4Addr, u16)]) {
        within(&self.internet, || {
            for address in addresses {
                echo(UdpSocket::bind(address).unwrap());
            }
        });
    }

    /// A guest on a network of its own that follows `policy`.
    pub(crate) fn guest(&self, owner: &str, policy: &Policy) -> Guest {
        let claimed = self.networks.claim(owner, policy).unwrap();
        let guest = Guest::new(claimed);
        self.networks.set_up(owner, true).unwrap();
        guest
    }
}

/// Greets whoever connects in the calling thread's namespace.
pub(crate) fn greet(address: (Ipv4Addr, u16)) {
    let listener = TcpListener::bind(address).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut stream = stream;
                let _ = stream.write_all(b"hello");
                // Until the other side is through with it.
                let _ = std::io::copy(&mut stream, &mut std::io::sink());
            });
        }
    });
}

fn echo(socket: UdpSocket) {
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
    });
}

/// A namespace in the place of a VM.
pub(crate) struct Guest {
    namespace: OwnedFd,
    pub(crate) address: Ipv4Addr,
    pub(crate) listeners: Listeners,
    cable: Cable,
}

impl Guest {
    fn new(claimed: Claimed) -> Self {
        let (namespace, end) = std::thread::scope(|scope| {
            let made = scope.spawn(|| {
                let namespace = fresh_namespace();
                let end = tap::open("eth0").unwrap();
                let mac = GUEST_HARDWARE.map(|octet| format!("{octet:02x}")).join(":");
                ip(&format!("link set eth0 address {mac} mtu 1500 up"));
                ip("addr add 100.64.0.2/30 dev eth0");
                ip("route add default via 100.64.0.1");
                (namespace, end)
            });
            made.join().unwrap()
        });
        let cable = Cable::new(claimed.tap, end);
        Self { namespace, address: claimed.address, listeners: claimed.listeners, cable }
    }

    /// What a wake does: the guest as it was, on another network.
    pub(crate) fn moved_to(self, world: &World, owner: &str, policy: &Policy) -> Self {
        let end = self.cable.cut();
        let claimed = world.networks.claim(owner, policy).unwrap();
        let cable = Cable::new(claimed.tap, end);
        world.networks.set_up(owner, true).unwrap();
        Self { namespace: self.namespace, address: claimed.address, listeners: claimed.listeners, cable }
    }

    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        within(&self.namespace, work)
    }

    /// Connects and waits for the greeting.
    pub(crate) fn connect(&self, address: Ipv4Addr, port: u16) -> Seen {
        self.run(|| match TcpStream::connect_timeout(&SocketAddr::from((address, port)), PATIENCE) {
            Ok(mut stream) => {
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                let mut greeting = [0; 5];
                match stream.read_exact(&mut greeting) {
                    Ok(()) => Seen::Greeted,
                    Err(error) => seen(&error),
                }
            }
            Err(error) => seen(&error),
        })
    }

    /// Sends a datagram and waits for its echo.
    pub(crate) fn ask(&self, address: Ipv4Addr, port: u16) -> Seen {
        self.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.connect((address, port)).unwrap();
            match socket.send(b"hello").and_then(|_| socket.recv(&mut [0; 16])) {
                Ok(_) => Seen::Greeted,
                Err(error) => seen(&error),
            }
        })
    }
}

fn seen(error: &std::io::Error) -> Seen {
    match error.kind() {
        std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock => Seen::Silence,
        _ => Seen::Refused,
    }
}

/// Carries frames between two taps.
struct Cable {
    stop: Arc<AtomicBool>,
    ends: Arc<[OwnedFd; 2]>,
    threads: Vec<JoinHandle<()>>,
}

impl Cable {
    fn new(sandbox: OwnedFd, guest: OwnedFd) -> Self {
        let (stop, ends) = (Arc::new(AtomicBool::new(false)), Arc::new([sandbox, guest]));
        let threads = [(0, 1), (1, 0)].map(|(from, to)| {
            let (stop, ends) = (stop.clone(), ends.clone());
            std::thread::spawn(move || carry(&ends[from], &ends[to], &stop))
        });
        Self { stop, ends, threads: threads.into() }
    }

    /// Takes the sandbox's end away; the guest's is left.
    fn cut(self) -> OwnedFd {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
        let [_, guest] = Arc::into_inner(self.ends).unwrap();
        guest
    }
}

fn carry(from: &OwnedFd, to: &OwnedFd, stop: &AtomicBool) {
    let mut frame = vec![0; 70_000];
    let moment = rustix::time::Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
    while !stop.load(Ordering::Relaxed) {
        match rustix::io::read(from, frame.as_mut_slice()) {
            // A tap that is down takes no frames.
            Ok(length) => drop(rustix::io::write(to, &frame[..length])),
            Err(rustix::io::Errno::AGAIN) => {
                let _ = poll(&mut [PollFd::new(from, PollFlags::IN)], Some(&moment));
            }
            Err(_) => return,
        }
    }
}
