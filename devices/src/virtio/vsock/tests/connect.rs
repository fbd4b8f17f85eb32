//! How connections begin, and how many there are.

use super::*;

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
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

#[test]
fn clients_beyond_the_bound_wait_their_turn() {
    let mut guest = Guest::with(|config| config.max_connections = 2);
    guest.give_all();
    let (_first, ports) = guest.accepted(1);
    let (_second, _) = guest.accepted(1);
    let mut third = guest.client();
    third.write_all(b"CONNECT 3\n").unwrap();
    assert_eq!(guest.try_receive(), None);
    guest.assert_quiet();
    // The guest's own are refused.
    let _service = guest.service(1);
    guest.send(Ports { host: 1, guest: 1 }, op::REQUEST);
    guest.expect(op::RST);
    guest.send(ports, op::RST);
    assert_eq!(guest.expect(op::REQUEST).0.dst_port, 3);
}
