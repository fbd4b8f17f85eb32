//! Guests that break the rules, or take nothing.

use proptest::prelude::*;
use vm_memory::Bytes;

use super::super::mux::REPLIES;
use super::*;

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
fn connections_beyond_the_rate_are_refused_unseen() {
    let mut guest = Guest::with(|config| config.connects_per_second = 3);
    guest.give_all();
    let service = guest.service(1);
    service.set_nonblocking(true).unwrap();
    for n in 0..20 {
        let ports = Ports { host: 1, guest: 1000 + n };
        guest.send(ports, op::REQUEST);
    }
    guest.settle();
    let accepted = std::iter::from_fn(|| service.accept().ok()).count();
    assert!((3..=5).contains(&accepted), "{accepted} of 20");
    assert!(!guest.driver.needs_reset());
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
    guest.assert_quiet();
    // A few buffers, once: the packets that waited are taken without another notification.
    guest.generous = false;
    guest.give_all();
    guest.settle();
    assert_eq!(guest.tx_free.len(), TX_COUNT as usize);
    guest.generous = true;
    guest.give_all_free();
    let resets =
        std::iter::from_fn(|| guest.try_receive()).inspect(|(header, _)| assert_eq!(header.op, op::RST)).count();
    assert_eq!(resets, sent);
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
