//! Networks of sandboxes as they are, without a VM: namespaces play the host, the Internet and the guests. Needs root and what the kernel
//! has for networks; what this machine lacks is said.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod world;

use libtest_mimic::{Arguments, Failed, Trial};
use rustix::net::sockopt::ip_original_dst;
use stasis_warden::network::policy::{Mode, Operator, Policy};
use stasis_warden::network::{NetworkError, Networks, Reason, remove_all};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};
use world::{HOST, METADATA, OTHER_SERVER, PRIVATE, SERVER, Seen, World, greet, on_a_host};

fn policy(mode: Mode, allow: &[&str]) -> Policy {
    Policy { mode, allow: allow.iter().map(|range| range.parse().unwrap()).collect(), proxy: mode == Mode::Custom }
}

fn main() {
    let arguments = Arguments::from_args();
    let lacking = lacking();
    let test = |name: &str, operator: Operator, run: fn(&mut World)| {
        let trial = Trial::test(name, move || on_a_host(operator, run).map_err(Failed::from));
        trial.with_ignored_flag(lacking.is_some())
    };
    let operator = |allow: &[&str], deny: &[&str]| Operator {
        allow: allow.iter().map(|range| range.parse().unwrap()).collect(),
        deny: deny.iter().map(|range| range.parse().unwrap()).collect(),
        ..Operator::default()
    };
    let none = Operator::default;
    let trials = vec![
        test("each mode lets pass what it says and refuses the rest at once", none(), modes),
        test("names are asked of the resolver's socket alone", none(), resolver),
        test("connections to the web go to the proxy's socket, which learns where they were to go", none(), proxy),
        test("sandboxes reach neither each other nor the host", none(), neighbours),
        test(
            "an operator opens and closes addresses for all",
            operator(&["93.184.1.2/32", "10.20.30.40/32"], &["93.184.220.0/24"]),
            operators,
        ),
        test("connections of before a wake end with a reset", none(), stale),
        test("a tap that is down carries nothing, and everything again when it is up", none(), down),
        test(
            "a storm of connections is bounded",
            Operator {
                limits: stasis_warden::network::policy::Limits { connections: 20, new_per_second: 1000, burst: 1000 },
                ..none()
            },
            storm,
        ),
        test("a restarted warden finds what goes on and removes the rest", none(), restart),
        test("nothing is left of removed networks", none(), nothing_left),
    ];
    if let (Some(lacking), false) = (&lacking, arguments.list) {
        eprintln!("left out: networks of sandboxes: {lacking}");
    }
    libtest_mimic::run(&arguments, trials).exit();
}

/// What this machine lacks for these tests.
fn lacking() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root".to_owned());
    }
    ["/dev/net/tun", "/usr/sbin/ip"]
        .iter()
        .find(|path| !std::path::Path::new(path).exists())
        .map(|path| format!("needs {path}"))
}

/// Mode × destination: what a guest sees, and why it was refused.
fn modes(world: &mut World) {
    world.serve(&[(SERVER, 8080), (OTHER_SERVER, 8080), (PRIVATE, 8080), (METADATA, 80), (SERVER, 25)]);
    world.echo(&[(SERVER, 443), (SERVER, 4000)]);
    let open = world.guest("open", &policy(Mode::AllowAll, &[]));
    let closed = world.guest("closed", &policy(Mode::DenyAll, &[]));
    let listed = world.guest("listed", &policy(Mode::Custom, &["93.184.216.0/24"]));
    let meant = world.guest("meant", &policy(Mode::Custom, &["10.20.0.0/16", "0.0.0.0/0"]));
    let (greeted, refused) = (Seen::Greeted, Seen::Refused);
    for (address, port, expected) in [
        (SERVER, 8080, [greeted, refused, greeted, greeted]),
        (SERVER, 25, [greeted, refused, greeted, greeted]),
        (OTHER_SERVER, 8080, [greeted, refused, refused, greeted]),
        (PRIVATE, 8080, [refused, refused, refused, greeted]),
        (METADATA, 80, [refused, refused, refused, refused]),
        (HOST, 8080, [refused, refused, refused, refused]),
        (Ipv4Addr::new(224, 0, 0, 1), 8080, [refused, refused, refused, refused]),
    ] {
        let seen = [&open, &closed, &listed, &meant].map(|guest| guest.connect(address, port));
        assert_eq!(seen, expected, "{address}:{port}");
    }
    for (port, expected) in [(443, [greeted, refused, greeted]), (4000, [greeted, refused, greeted])] {
        assert_eq!([&open, &closed, &listed].map(|guest| guest.ask(SERVER, port)), expected, "UDP {port}");
        assert_eq!(listed.ask(OTHER_SERVER, port), refused, "UDP {port}: QUIC falls back at once");
    }
    let report = world.networks.report("listed").unwrap();
    let reasons: Vec<_> = report.refusals.iter().map(|r| (r.address, r.port, r.reason.as_str())).collect();
    for expected in [
        (OTHER_SERVER, Some(8080), Reason::Policy.name()),
        (PRIVATE, Some(8080), Reason::Reserved.name()),
        (METADATA, Some(80), Reason::Reserved.name()),
        (HOST, Some(8080), Reason::Host.name()),
    ] {
        assert!(reasons.contains(&expected), "{expected:?} in {reasons:?}");
    }
    assert!(
        report.refusals.iter().all(|refusal| refusal.times > 0 && refusal.ago_ms < 60_000),
        "{:?}",
        report.refusals
    );
    assert!(report.refused["policy"] > 0 && report.refused["reserved-address"] > 0);
    let passed = report.passed["cidr.0"];
    assert_eq!(passed.connections, 4, "{passed:?}");
    assert!(passed.packets_out > 4 && passed.packets_in > 4 && passed.bytes_in > 100, "{passed:?}");
    assert_eq!(world.networks.report("open").unwrap().passed["internet"].connections, 5);
    assert!(world.networks.report("closed").unwrap().passed.is_empty());
}

fn resolver(world: &mut World) {
    world.echo(&[(SERVER, 53)]);
    let open = world.guest("open", &policy(Mode::AllowAll, &[]));
    let closed = world.guest("closed", &policy(Mode::DenyAll, &[]));
    assert_eq!(closed.ask(SERVER, 53), Seen::Refused);
    assert_eq!(closed.connect(SERVER, 53), Seen::Refused);
    assert_eq!(open.ask(SERVER, 53), Seen::Silence, "the server was not asked");
    let dns = UdpSocket::from(open.listeners.dns.try_clone().unwrap());
    dns.set_nonblocking(false).unwrap();
    dns.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut asked = [0; 16];
    let (length, _) = dns.recv_from(&mut asked).unwrap();
    assert_eq!(&asked[..length], b"hello");
    // Whatever resolver the guest believes in, and over TCP too, it talks with ours.
    let answer = std::thread::spawn(move || {
        let (length, from) = dns.recv_from(&mut [0; 16]).unwrap();
        dns.send_to(&b"hello"[..length], from).unwrap();
    });
    assert_eq!(open.ask(Ipv4Addr::new(9, 9, 9, 9), 53), Seen::Greeted);
    answer.join().unwrap();
    let tcp = TcpListener::from(open.listeners.dns_tcp.try_clone().unwrap());
    tcp.set_nonblocking(false).unwrap();
    let answer = std::thread::spawn(move || tcp.accept().unwrap().0.write_all(b"hello").unwrap());
    assert_eq!(open.connect(SERVER, 53), Seen::Greeted);
    answer.join().unwrap();
    // Not by its own address: what was not redirected does not reach it.
    assert_eq!(open.connect(Ipv4Addr::new(100, 64, 0, 1), 3053), Seen::Refused);
    assert_eq!(world.networks.report("open").unwrap().passed["dns"].connections, 3);
}

fn proxy(world: &mut World) {
    world.serve(&[(SERVER, 443), (SERVER, 8443)]);
    let guest = world.guest("listed", &policy(Mode::Custom, &[]));
    let proxy = TcpListener::from(guest.listeners.proxy.try_clone().unwrap());
    proxy.set_nonblocking(false).unwrap();
    let answer = std::thread::spawn(move || {
        [(); 2].map(|()| {
            let (mut stream, _) = proxy.accept().unwrap();
            stream.write_all(b"hello").unwrap();
            let to = ip_original_dst(&stream).unwrap();
            (*to.ip(), to.port())
        })
    });
    assert_eq!(guest.connect(SERVER, 443), Seen::Greeted);
    assert_eq!(guest.connect(OTHER_SERVER, 80), Seen::Greeted);
    assert_eq!(answer.join().unwrap(), [(SERVER, 443), (OTHER_SERVER, 80)]);
    assert_eq!(guest.connect(SERVER, 8443), Seen::Refused, "other ports are no matter of names");
    assert_eq!(guest.connect(METADATA, 80), Seen::Refused, "names do not open reserved addresses");
    assert_eq!(guest.connect(Ipv4Addr::new(100, 64, 0, 1), 3129), Seen::Refused, "the proxy is not reached as itself");
}

fn neighbours(world: &mut World) {
    let everything = policy(Mode::AllowAll, &["100.64.0.0/10", "93.184.1.0/24"]);
    let one = world.guest("one", &everything);
    let other = world.guest("other", &everything);
    other.run(|| greet((Ipv4Addr::UNSPECIFIED, 8080)));
    greet((Ipv4Addr::UNSPECIFIED, 8080));
    // The second wall holds what the first was told to let pass.
    assert_eq!(one.connect(other.address, 8080), Seen::Silence, "the neighbour");
    let host_end = Ipv4Addr::from(u32::from(one.address) - 1);
    assert_eq!(one.connect(host_end, 8080), Seen::Refused, "the host by its end of the veth");
    assert_eq!(one.connect(HOST, 8080), Seen::Refused, "the host by its own address");
    // An address that the host has got since.
    world::ip("addr add 93.184.7.7/32 dev lo");
    assert_eq!(one.connect(Ipv4Addr::new(93, 184, 7, 7), 8080), Seen::Refused);
    // Nor does anybody reach them.
    assert!(TcpStream::connect_timeout(&SocketAddr::from((other.address, 8080)), Duration::from_millis(300)).is_err());
}

fn operators(world: &mut World) {
    world.serve(&[(PRIVATE, 8080), (OTHER_SERVER, 8080)]);
    greet((HOST, 8080));
    let guest = world.guest("listed", &policy(Mode::Custom, &["93.184.220.0/24"]));
    assert_eq!(guest.connect(PRIVATE, 8080), Seen::Greeted);
    assert_eq!(guest.connect(HOST, 8080), Seen::Greeted, "the operator may open the host itself");
    assert_eq!(guest.connect(OTHER_SERVER, 8080), Seen::Refused, "what the operator closes no policy opens");
    let closed = world.guest("closed", &policy(Mode::DenyAll, &[]));
    assert_eq!(closed.connect(PRIVATE, 8080), Seen::Refused, "deny-all is deny-all");
}

fn stale(world: &mut World) {
    world.serve(&[(SERVER, 8080)]);
    let guest = world.guest("before", &policy(Mode::AllowAll, &[]));
    let mut stream = guest.run(|| TcpStream::connect((SERVER, 8080)).unwrap());
    stream.read_exact(&mut [0; 5]).unwrap();
    let idle = guest.run(|| TcpStream::connect((SERVER, 8080)).unwrap());
    world.networks.release("before").unwrap();
    let guest = guest.moved_to(world, "after", &policy(Mode::AllowAll, &[]));
    let begun = Instant::now();
    let end = loop {
        if let Err(error) = stream.write_all(b"still there?") {
            break error;
        }
        assert!(begun.elapsed() < Duration::from_secs(5), "no reset came");
        std::thread::park_timeout(Duration::from_millis(5));
    };
    assert!(matches!(end.kind(), std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe), "{end}");
    // One that says farewell first is no exception.
    drop(idle);
    assert_eq!(guest.connect(SERVER, 8080), Seen::Greeted, "new ones are as good as ever");
    assert!(world.networks.report("after").unwrap().refused["stale-connection"] > 0);
}

fn down(world: &mut World) {
    world.serve(&[(SERVER, 8080)]);
    let guest = world.guest("one", &policy(Mode::AllowAll, &[]));
    let mut stream = guest.run(|| TcpStream::connect((SERVER, 8080)).unwrap());
    stream.read_exact(&mut [0; 5]).unwrap();
    world.networks.set_up("one", false).unwrap();
    assert_eq!(guest.connect(SERVER, 8080), Seen::Silence);
    world.networks.set_up("one", true).unwrap();
    assert_eq!(guest.connect(SERVER, 8080), Seen::Greeted);
    // A pause that failed ends no connection.
    stream.write_all(b"still there?").unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let silence = stream.read(&mut [0; 1]).unwrap_err();
    assert!(matches!(silence.kind(), std::io::ErrorKind::WouldBlock), "{silence}");
}

fn storm(world: &mut World) {
    world.serve(&[(SERVER, 8080)]);
    let guest = world.guest("one", &policy(Mode::AllowAll, &[]));
    let neighbour = world.guest("two", &policy(Mode::AllowAll, &[]));
    let held: Vec<_> = guest.run(|| {
        let address = SocketAddr::from((SERVER, 8080));
        (0..40).filter_map(|_| TcpStream::connect_timeout(&address, Duration::from_millis(200)).ok()).collect()
    });
    assert_eq!(held.len(), 20);
    assert_eq!(world.networks.report("one").unwrap().refused["too-many-connections"], 20);
    assert_eq!(neighbour.connect(SERVER, 8080), Seen::Greeted);
}

fn restart(world: &mut World) {
    world.serve(&[(SERVER, 8080)]);
    let guest = world.guest("one", &policy(Mode::AllowAll, &[]));
    let settings = stasis_warden::network::Settings { ready: 2, ..world.settings.clone() };
    // One that is killed leaves two that are nobody's.
    let killed = Networks::open(settings.clone()).unwrap();
    assert!(killed.refill().unwrap());
    assert!(!killed.refill().unwrap());
    std::mem::forget(killed);
    let again = Networks::open(settings).unwrap();
    assert_eq!(again.owners(), ["one"]);
    assert_eq!(names(world).len(), 1);
    assert_eq!(guest.connect(SERVER, 8080), Seen::Greeted, "it goes on as before");
    assert!(again.report("one").unwrap().passed["internet"].connections >= 1);
    assert!(matches!(again.claim("one", &Policy::DENY), Err(NetworkError::Taken(_))));
    assert!(matches!(again.set_up("two", true), Err(NetworkError::Unknown(_))));
    again.set_up("one", false).unwrap();
    assert_eq!(guest.connect(SERVER, 8080), Seen::Silence);
    again.set_up("one", true).unwrap();
    // What held the namespace is gone, as mounts of a service are with it: the guest goes on, and what it had is given back.
    let file = std::fs::read_dir(&world.settings.state_dir).unwrap().next().unwrap().unwrap().path();
    rustix::mount::unmount(&file, rustix::mount::UnmountFlags::DETACH).unwrap();
    let third = Networks::open(world.settings.clone()).unwrap();
    assert_eq!(third.owners(), ["one"]);
    assert!(matches!(third.set_up("one", false), Err(NetworkError::Unknown(_))));
    assert_eq!(guest.connect(SERVER, 8080), Seen::Greeted);
    third.release("one").unwrap();
    assert_eq!((third.owners().len(), names(world).len()), (0, 0));
}

fn nothing_left(world: &mut World) {
    let settings = stasis_warden::network::Settings { ready: 3, ..world.settings.clone() };
    let networks = Networks::open(settings.clone()).unwrap();
    while networks.refill().unwrap() {}
    let claimed = networks.claim("one", &policy(Mode::AllowAll, &[])).unwrap();
    assert_eq!(networks.waiting(), 2);
    drop(claimed);
    networks.release("one").unwrap();
    networks.release("one").unwrap();
    networks.drain().unwrap();
    assert_eq!(names(world), [""; 0]);
    assert_eq!(std::fs::read_dir(&settings.state_dir).unwrap().count(), 0);
    let full = Networks::open(stasis_warden::network::Settings {
        addresses: "100.96.0.0/31".parse().unwrap(),
        ..settings.clone()
    })
    .unwrap();
    let _one = full.claim("one", &Policy::DENY).unwrap();
    assert!(matches!(full.claim("two", &Policy::DENY), Err(NetworkError::Full(_))));
    remove_all(&settings.state_dir, &settings.prefix).unwrap();
    assert_eq!(names(world), [""; 0]);
}

/// Names of the host's ends of veths.
fn names(world: &World) -> Vec<String> {
    let links = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let names = links.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim().to_owned());
    names.filter(|name| name.starts_with(&world.settings.prefix)).collect()
}
