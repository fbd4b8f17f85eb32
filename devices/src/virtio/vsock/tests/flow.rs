//! Credit, half-closes, and that every byte arrives.

use std::sync::Arc;

use super::*;

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
fn a_host_that_closes_after_a_half_close_is_noticed() {
    let mut guest = Guest::ready();
    let (client, _) = guest.accepted(1);
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, SHUTDOWN_SEND);
    assert_eq!(guest.try_receive(), None);
    drop(client);
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, SHUTDOWN_BOTH);
    guest.assert_quiet();
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
fn each_packet_takes_one_receive_buffer_and_no_more() {
    let mut guest = Guest::ready();
    let (mut client, _) = guest.accepted(1);
    for round in 0..4 * RX_COUNT {
        client.write_all(&round.to_le_bytes()).unwrap();
        assert_eq!(guest.expect(op::RW).1, round.to_le_bytes());
        guest.settle();
    }
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
    guest.assert_quiet();
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
