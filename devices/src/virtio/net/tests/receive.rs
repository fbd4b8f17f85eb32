//! From the host to the guest.

use proptest::prelude::*;

use super::super::PATIENCE;
use super::super::header::MAX_FRAME;
use super::*;

/// A frame that the guest's kernel segments.
fn tso() -> Header {
    Header { flags: 1, gso_type: 1, hdr_len: 54, gso_size: 1448, csum_start: 34, csum_offset: 16, num_buffers: 0 }
}

#[test]
fn a_frame_fills_one_buffer_and_marks_its_pages() {
    let mut guest = Guest::new(ALL);
    guest.give(&[12, 2000]);
    guest.driver.clear_dirty();
    guest.arrives(Header::default(), &frame(60, 1));
    guest.run_receive();
    assert_eq!(guest.take(), Some((Header { num_buffers: 1, ..Header::default() }, frame(60, 1))));
    assert!(guest.driver.is_dirty(RX_ARENA));
    assert_eq!(guest.driver.take_interrupt(), 1);
    assert_eq!((guest.counters.to_guest.packets(), guest.counters.to_guest.bytes()), (1, 60));
}

#[test]
fn a_long_frame_is_spread_over_buffers_that_come_together() {
    let mut guest = Guest::new(ALL);
    (0..64).for_each(|_| guest.give(&[1536]));
    guest.driver.clear_dirty();
    guest.arrives(tso(), &frame(60_000, 2));
    guest.arrives(Header::default(), &frame(100, 3));
    guest.run_receive();
    let buffers = (60_000_u16 + 12).div_ceil(1536);
    assert_eq!(guest.take(), Some((Header { num_buffers: buffers, ..tso() }, frame(60_000, 2))));
    assert_eq!(guest.take().map(|(header, _)| header.num_buffers), Some(1));
    // The first bytes of each buffer, and of those that were not needed.
    assert!((0..41).all(|page| guest.driver.is_dirty(RX_ARENA + page * 1537)));
    assert!(!guest.driver.is_dirty(RX_ARENA + 50 * 1537));
}

#[test]
fn without_mergeable_buffers_a_frame_takes_one_chain_or_is_lost() {
    let mut guest = Guest::new(ALL & !MERGEABLE);
    guest.give(&[12, 40_000, 26_000]);
    guest.arrives(tso(), &frame(60_000, 2));
    guest.run_receive();
    assert_eq!(guest.take(), Some((Header { num_buffers: 1, ..tso() }, frame(60_000, 2))));
    guest.give(&[1526]);
    guest.arrives(tso(), &frame(3000, 1));
    guest.arrives(Header::default(), &frame(1514, 4));
    guest.run_receive();
    assert_eq!(guest.take().map(|(_, frame)| frame), Some(frame(1514, 4)), "the buffer is there for the next");
    assert_eq!(guest.counters.to_guest.dropped(), 1);
}

#[test]
fn a_driver_without_segmentation_gets_frames_of_the_mtu_and_no_longer_ones() {
    let mut guest = Guest::new(ALL & !GUEST_TSO4 & !MERGEABLE);
    guest.give(&[12, 1518]);
    guest.arrives(Header::default(), &frame(1518, 1));
    guest.run_receive();
    assert_eq!(guest.take().map(|(_, frame)| frame.len()), Some(1518));
}

#[test]
fn frames_wait_in_the_tap_for_buffers_and_the_device_does_not_spin() {
    let mut guest = Guest::new(ALL);
    guest.arrives(Header::default(), &frame(60, 1));
    guest.run_receive();
    assert_eq!(guest.take(), None);
    guest.give(&[2000]);
    guest.run_receive();
    assert_eq!(guest.take().map(|(_, frame)| frame), Some(frame(60, 1)));
}

#[test]
fn a_frame_that_finds_too_few_buffers_is_held_then_delivered_or_dropped() {
    let mut guest = Guest::new(ALL);
    (0..3).for_each(|_| guest.give(&[1000]));
    guest.arrives(tso(), &frame(5000, 1));
    guest.run_receive();
    assert_eq!(guest.take(), None);
    assert_eq!(guest.driver.used_index(RECEIVE), 0, "nothing of it is in the ring");
    (0..3).for_each(|_| guest.give(&[1000]));
    guest.run_receive();
    assert_eq!(guest.take().map(|(header, frame)| (header.num_buffers, frame)), Some((6, frame(5000, 1))));
    guest.give(&[1000]);
    guest.arrives(tso(), &frame(5000, 2));
    guest.arrives(tso(), &frame(500, 3));
    guest.run_receive();
    guest.clock.advance(PATIENCE);
    // The timer wakes the device: the driver does not notify again.
    let until = Instant::now() + 10 * PATIENCE;
    while guest.inbox.is_empty() && Instant::now() < until {
        guest.driver.turn(100);
        guest.collect();
    }
    assert_eq!(guest.take().map(|(_, frame)| frame), Some(frame(500, 3)));
    assert_eq!(guest.counters.to_guest.dropped(), 1);
}

#[test]
fn buffers_that_are_no_receive_buffers_break_the_device_until_a_reset() {
    for buffers in [vec![readable(RX_ARENA, 100), writable(RX_ARENA, 2000)], vec![writable(RX_ARENA, 11)]] {
        let mut guest = Guest::new(ALL);
        guest.driver.add(RECEIVE, &buffers);
        guest.arrives(Header::default(), &frame(60, 1));
        guest.driver.notify(RECEIVE);
        guest.driver.run(0);
        assert!(guest.driver.needs_reset());
        guest.driver.start(64, ALL);
        guest.rx.clear();
        guest.give(&[2000]);
        guest.run_receive();
        assert_eq!(guest.take().map(|(_, frame)| frame), Some(frame(60, 1)));
    }
}

#[test]
fn the_limit_spreads_what_comes_over_time() {
    let limit = RateLimit { packets_per_second: Some(1000), ..RateLimit::default() };
    let mut guest = Guest::with(NetConfig { to_guest: limit, ..config() }, ALL, 256);
    (0..200).for_each(|_| guest.give(&[300]));
    let mut arrived = 0_u32;
    let mut taken = 0;
    for _ in 0..40 {
        while arrived < 150 && guest.try_arrive(Header::default(), &frame(64, 0)) {
            arrived += 1;
        }
        guest.run_receive();
        taken += guest.inbox.drain(..).count();
    }
    // The burst is a tenth of a second's.
    assert_eq!(taken, 100);
    guest.clock.advance(Duration::from_millis(20));
    guest.run_receive();
    assert!((10..=21).contains(&guest.inbox.len()), "{}", guest.inbox.len());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever buffers there are and whatever comes, the frames that are received are those that were sent, whole and in order.
    #[test]
    fn frames_arrive_whole_and_in_order(
        buffers in prop::collection::vec(prop::collection::vec(12_u32..3000, 1..4), 1..200),
        frames in prop::collection::vec(14_usize..20_000, 1..30),
        mergeable: bool,
    ) {
        let mut guest = Guest::with(config(), if mergeable { ALL } else { ALL & !MERGEABLE }, 256);
        let mut buffers = buffers.into_iter();
        let mut sent = Vec::new();
        for (index, &len) in frames.iter().enumerate() {
            let frame = frame(len, index as u8);
            if guest.try_arrive(Header::default(), &frame) {
                sent.push(frame);
            }
            buffers.by_ref().take(1 + index % 7).for_each(|pieces| guest.give(&pieces));
            guest.run_receive();
        }
        prop_assert!(!guest.driver.needs_reset());
        let received: Vec<_> = guest.inbox.drain(..).map(|(_, frame)| frame).collect();
        prop_assert_eq!(received.len() as u64, guest.counters.to_guest.packets());
        let mut rest = sent.iter();
        for frame in &received {
            prop_assert!(rest.any(|sent| sent == frame), "a frame of {} bytes that nobody sent", frame.len());
        }
        if mergeable {
            prop_assert_eq!(&received[..], &sent[..received.len()]);
        }
    }
}

#[test]
fn the_longest_frame_fits_and_a_longer_one_does_not() {
    let mut guest = Guest::with(config(), ALL, 256);
    (0..100).for_each(|_| guest.give(&[1000]));
    guest.arrives(tso(), &frame(MAX_FRAME as usize, 1));
    guest.run_receive();
    assert_eq!(guest.take().map(|(_, frame)| frame.len() as u64), Some(MAX_FRAME));
}
