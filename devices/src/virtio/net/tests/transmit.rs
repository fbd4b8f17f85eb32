//! From the guest to the host.

use proptest::prelude::*;

use super::*;

#[test]
fn a_frame_of_many_pieces_arrives_as_one() {
    let mut guest = Guest::new(ALL);
    let checksum = Header { flags: 1, csum_start: 34, csum_offset: 6, ..Header::default() };
    assert!(guest.send(checksum, &frame(1000, 1), 37));
    guest.run_transmit();
    assert_eq!(guest.arrived(), Some((checksum, frame(1000, 1))));
    assert_eq!((guest.counters.from_guest.packets(), guest.counters.from_guest.bytes()), (1, 1000));
}

#[test]
fn a_frame_with_a_false_header_is_dropped_and_the_next_one_passes() {
    let mut guest = Guest::new(ALL);
    let false_headers = [
        Header { flags: 1, csum_start: 999, csum_offset: 0, ..Header::default() },
        Header { gso_type: 4, flags: 1, gso_size: 1440, csum_start: 54, csum_offset: 16, ..Header::default() },
        Header { gso_type: 1, flags: 1, gso_size: 0, csum_start: 34, csum_offset: 16, ..Header::default() },
    ];
    for header in false_headers {
        assert!(guest.send(header, &frame(1000, 1), 4096));
    }
    assert!(guest.send(Header::default(), &frame(5, 1), 4096), "no room for an Ethernet header");
    assert!(guest.send(Header::default(), &frame(60, 2), 4096));
    guest.run_transmit();
    assert_eq!(guest.arrived().map(|(_, frame)| frame), Some(frame(60, 2)));
    assert_eq!(guest.arrived(), None);
    assert_eq!((guest.counters.from_guest.packets(), guest.counters.from_guest.dropped()), (1, 4));
    assert!(!guest.driver.needs_reset());
}

#[test]
fn without_a_whole_header_the_device_breaks() {
    let mut guest = Guest::new(ALL);
    guest.driver.add(TRANSMIT, &[readable(TX_ARENA, 11)]);
    guest.run_transmit();
    assert!(guest.driver.needs_reset());
}

#[test]
fn a_host_that_is_slow_loses_nothing() {
    let mut guest = Guest::with(config(), ALL, 256);
    let mut arrived = 0_u8;
    for n in 0..200_u8 {
        assert!(guest.send(Header::default(), &frame(1514, n), 2000));
    }
    guest.run_transmit();
    while arrived < 200 {
        while let Some((_, got)) = guest.arrived() {
            assert_eq!(got, frame(1514, arrived));
            arrived += 1;
        }
        // The device hears of the room by itself.
        guest.driver.run(0);
    }
    assert_eq!(guest.counters.from_guest.dropped(), 0);
}

#[test]
fn a_host_that_is_gone_takes_the_link_and_not_the_device() {
    let mut guest = Guest::new(ALL);
    assert_eq!(guest.status(), 1);
    guest.give(&[2000]);
    guest.run_receive();
    let (other, _) = UnixDatagram::pair().unwrap();
    guest.host = other;
    assert!(guest.send(Header::default(), &frame(60, 2), 4096));
    guest.run_transmit();
    assert!(!guest.driver.needs_reset());
    assert_eq!(guest.counters.from_guest.dropped(), 1);
}

#[test]
fn the_limit_counts_segments() {
    let limit = RateLimit { packets_per_second: Some(100), ..RateLimit::default() };
    let mut guest = Guest::with(NetConfig { from_guest: limit, ..config() }, ALL, 256);
    let tso =
        Header { flags: 1, gso_type: 1, hdr_len: 54, gso_size: 1000, csum_start: 34, csum_offset: 16, num_buffers: 0 };
    for n in 0..4 {
        assert!(guest.send(tso, &frame(50_000, n), 65_536));
    }
    guest.run_transmit();
    // 64 at once, 50 a frame: the second one makes a debt of 36, which is 0.37 s.
    assert_eq!(guest.counters.from_guest.packets(), 2);
    guest.clock.advance(Duration::from_millis(360));
    guest.run_transmit();
    assert_eq!(guest.counters.from_guest.packets(), 2);
    guest.clock.advance(Duration::from_millis(20));
    guest.run_transmit();
    assert_eq!(guest.counters.from_guest.packets(), 3);
    while guest.arrived().is_some() {}
    // The timer wakes the device when the limit allows the next.
    guest.clock.advance(Duration::from_secs(1));
    let until = Instant::now() + Duration::from_secs(10);
    while guest.counters.from_guest.packets() < 4 && Instant::now() < until {
        guest.driver.turn(100);
    }
    assert_eq!(guest.counters.from_guest.packets(), 4);
}

#[test]
fn one_turn_is_bounded() {
    let mut guest = Guest::with(config(), ALL, 256);
    let mut sent = 0;
    while guest.send(Header { gso_type: 9, ..Header::default() }, &frame(65_000, 0), 65_536) {
        sent += 1;
    }
    guest.driver.notify(TRANSMIT);
    guest.driver.turn(0);
    let after_one = guest.driver.used_index(TRANSMIT);
    assert!((1..sent).contains(&after_one), "{after_one} of {sent}");
    guest.driver.run(0);
    assert_eq!(guest.driver.used_index(TRANSMIT), sent);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever the header says and however the frame is cut, it arrives as it was or not at all, and the device lives.
    #[test]
    fn any_header_passes_or_drops_its_frame(
        header in any::<[u8; HEADER_BYTES]>(),
        len in 0_usize..5000,
        piece in 1_usize..6000,
    ) {
        let mut guest = Guest::with(config(), ALL, 256);
        let header = Header::decode(&header);
        if guest.send(header, &frame(len, 3), piece) {
            guest.run_transmit();
            if let Some((_, arrived)) = guest.arrived() {
                prop_assert_eq!(arrived, frame(len, 3));
            }
            prop_assert_eq!(guest.counters.from_guest.packets() + guest.counters.from_guest.dropped(), 1);
        }
        prop_assert!(!guest.driver.needs_reset());
    }
}
