//! A real tap in a network namespace of the test's own: what the host's kernel makes of the device's frames, and the device of the kernel's.

use std::ffi::CString;
use std::io::{self, Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};

use super::*;

const GATEWAY_MAC: [u8; 6] = [2, 0x53, 0x54, 0x41, 0x53, 1];
const HOST: [u8; 4] = [100, 64, 0, 1];
const GUEST: [u8; 4] = [100, 64, 0, 2];
const ETHERNET: usize = 14;
const IP: usize = 20;

/// Runs `test` in a thread with a network of its own; says so where that cannot be had.
fn in_a_namespace(test: impl FnOnce() + Send + 'static) {
    let ran = std::thread::spawn(|| {
        // SAFETY: only this thread gets another network; it holds no sockets of the old one.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            eprintln!("left out: no network namespace here: {}", io::Error::last_os_error());
        } else if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/net/tun") {
            eprintln!("left out: no tap here: {error}");
        } else {
            test();
        }
    });
    ran.join().unwrap();
}

fn ip(arguments: &str) {
    #[expect(clippy::disallowed_methods, reason = "a test that sets a namespace up")]
    let set = std::process::Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(set.success(), "ip {arguments}");
}

/// A tap as a supervisor makes it, with the guest's address known and the link up.
fn tap() -> OwnedFd {
    let file = std::fs::File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: an ifreq is plain data, for which all zeros is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(CString::new("tap0").unwrap().as_bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the kernel reads and writes one ifreq, which lives through the call.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
    ip("link set tap0 address 02:53:54:41:53:01");
    ip("address add 100.64.0.1/30 dev tap0");
    ip("link set tap0 up");
    ip("neigh add 100.64.0.2 lladdr 02:53:54:41:53:02 dev tap0 nud permanent");
    file.into()
}

impl Guest {
    fn on_a_tap() -> Self {
        let clock = Clock::new();
        let now = clock.clone();
        let net = Net::with_clock(config(), Some(tap()), move || now.now()).unwrap();
        let counters = net.counters();
        let mut driver = Driver::new(net);
        driver.start(256, ALL);
        let (host, _) = UnixDatagram::pair().unwrap();
        let (rx, inbox) = (HashMap::new(), VecDeque::new());
        let mut guest = Self { driver, host, clock, counters, rx, rx_next: RX_ARENA, tx_next: TX_ARENA, inbox };
        (0..200).for_each(|_| guest.give(&[1536]));
        guest.run_receive();
        guest
    }

    /// The next frame of IPv4 with this protocol; others are dropped.
    fn expect_ip(&mut self, protocol: u8) -> (Header, Vec<u8>) {
        let until = Instant::now() + Duration::from_secs(10);
        while Instant::now() < until {
            while let Some((header, frame)) = self.take() {
                if frame[12..14] == [8, 0] && frame[ETHERNET + 9] == protocol {
                    return (header, frame);
                }
            }
            self.driver.turn(100);
            self.collect();
        }
        panic!("no frame of protocol {protocol}");
    }
}

fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The header of a packet of the guest's, then `payload` whose checksum at `checksum_at` is left to the device: it has only the pseudo header's.
fn packet(protocol: u8, mut payload: Vec<u8>, checksum_at: usize) -> Vec<u8> {
    let pseudo = sum(&GUEST) + sum(&HOST) + u32::from(protocol) + payload.len() as u32;
    payload[checksum_at..checksum_at + 2].copy_from_slice(&fold(pseudo).to_be_bytes());
    let mut header = vec![0x45, 0];
    header.extend(((IP + payload.len()) as u16).to_be_bytes());
    header.extend([0, 1, 0x40, 0, 64, protocol, 0, 0]);
    header.extend(GUEST);
    header.extend(HOST);
    let checksum = !fold(sum(&header));
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    [&GATEWAY_MAC[..], &MAC, &[8, 0], &header, &payload].concat()
}

fn checksum_at(offset: u16) -> Header {
    Header { flags: 1, csum_start: (ETHERNET + IP) as u16, csum_offset: offset, ..Header::default() }
}

#[test]
fn the_kernel_finishes_checksums_and_leaves_its_own_unfinished() {
    in_a_namespace(|| {
        let mut guest = Guest::on_a_tap();
        let socket = UdpSocket::bind("100.64.0.1:7000").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let udp = [&7001_u16.to_be_bytes()[..], &7000_u16.to_be_bytes(), &13_u16.to_be_bytes(), &[0, 0], b"hello"];
        assert!(guest.send(checksum_at(6), &packet(17, udp.concat(), 6), 20));
        guest.run_transmit();
        let mut bytes = [0; 100];
        let (len, from) = socket.recv_from(&mut bytes).unwrap();
        assert_eq!((&bytes[..len], from.to_string().as_str()), (&b"hello"[..], "100.64.0.2:7001"));

        socket.send_to(b"and back", "100.64.0.2:7001").unwrap();
        let (header, frame) = guest.expect_ip(17);
        assert_eq!((header.flags & 1, header.csum_offset), (1, 6), "its checksum is left to the guest");
        assert!(frame.ends_with(b"and back"));
        assert_eq!(guest.counters.from_guest.dropped(), 0);
    });
}

#[test]
fn a_tap_that_is_down_or_gone_loses_frames_and_no_device() {
    in_a_namespace(|| {
        let mut guest = Guest::on_a_tap();
        ip("link set tap0 down");
        assert!(guest.send(Header::default(), &[0; 60], 4096));
        guest.run_transmit();
        assert_eq!((guest.counters.from_guest.dropped(), guest.status()), (1, 1));
        ip("link set tap0 up");
        assert!(guest.send(Header::default(), &[0; 60], 4096));
        guest.run_transmit();
        assert_eq!(guest.counters.from_guest.packets(), 1);
        ip("link delete tap0");
        guest.driver.take_interrupt();
        guest.driver.run(10);
        assert_eq!(guest.status(), 0, "the link is down");
        assert_eq!(guest.driver.take_interrupt() & 2, 2);
        assert!(guest.send(Header::default(), &[0; 60], 4096));
        guest.run_transmit();
        assert!(!guest.driver.needs_reset());
    });
}

/// A segment of the guest's TCP: no options, its checksum left to the device.
fn segment(ports: (u16, u16), sequence: u32, acknowledged: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut tcp = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
    tcp.extend(sequence.to_be_bytes());
    tcp.extend(acknowledged.to_be_bytes());
    tcp.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    tcp.extend(payload);
    packet(6, tcp, 16)
}

#[test]
fn tcp_travels_unsegmented_both_ways() {
    const SYN: u8 = 2;
    const ACK: u8 = 16;
    in_a_namespace(|| {
        let mut guest = Guest::on_a_tap();
        let connecting = std::thread::spawn({
            // A thread of this one is in the same namespace.
            || TcpStream::connect_timeout(&"100.64.0.2:80".parse().unwrap(), Duration::from_secs(10))
        });
        let (_, syn) = guest.expect_ip(6);
        let tcp = &syn[ETHERNET + IP..];
        let ports = (80, u16::from_be_bytes([tcp[0], tcp[1]]));
        let theirs = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]).wrapping_add(1);
        assert!(guest.send(checksum_at(16), &segment(ports, 1000, theirs, SYN | ACK, &[]), 4096));
        guest.run_transmit();
        let mut stream = connecting.join().unwrap().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();

        // 20 000 bytes of the guest in one frame, which the kernel takes whole or in segments.
        let sent = frame(20_000, 7);
        let header = Header { gso_type: 1, gso_size: 1460, hdr_len: 54, ..checksum_at(16) };
        assert!(guest.send(header, &segment(ports, 1001, theirs, ACK, &sent), 3000));
        guest.run_transmit();
        let mut received = vec![0; sent.len()];
        stream.read_exact(&mut received).unwrap();
        assert_eq!(received, sent);

        // And of the host: more than a segment in one frame over several buffers. The guest acknowledges nothing, so it gets a window of ten
        // segments and no more.
        let sent = frame(10_000, 9);
        stream.write_all(&sent).unwrap();
        let mut arrived: Vec<u8> = Vec::new();
        let mut longest = 0;
        while arrived.len() < 5000 {
            let (header, segment) = guest.expect_ip(6);
            let (tcp, payload) = segment[ETHERNET + IP..].split_at(20);
            let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
            // Others are retransmissions.
            if !payload.is_empty() && sequence == theirs.wrapping_add(arrived.len() as u32) {
                assert!(sent[arrived.len()..].starts_with(payload), "in order and whole");
                arrived.extend(payload);
                longest = longest.max(payload.len());
                assert_eq!(header.gso_type, u8::from(payload.len() > 1460));
            }
        }
        assert!(longest > 1460, "the longest had {longest} bytes");
    });
}
