//! How much passes a limited device, as a part of what passes an unlimited one in the same time.

use super::*;

/// How long it is measured, and in which steps the clock goes on.
const TIME: Duration = Duration::from_secs(1);
const STEP: Duration = Duration::from_millis(1);
/// Offered each way in a step.
const FRAMES: u64 = 16;
const FRAME: u64 = 1000;
/// Offered in a second.
const RATE: u64 = FRAMES * 1000;

/// Frames that pass from the guest and to it.
fn passed(to_guest: RateLimit, from_guest: RateLimit) -> [u64; 2] {
    let mut guest = Guest::with(NetConfig { to_guest, from_guest, ..config() }, MERGEABLE, 64);
    let frame = frame(FRAME as usize, 3);
    (0..32).for_each(|_| guest.give(&[1536]));
    for _ in 0..TIME.as_millis() / STEP.as_millis() {
        for _ in 0..FRAMES {
            // What finds no room is lost, as on any line.
            guest.send(Header::default(), &frame, 4096);
            guest.driver.notify(TRANSMIT);
            guest.try_arrive(Header::default(), &frame);
            guest.driver.notify(RECEIVE);
            // One turn: its timer goes by the machine's clock, and would end no wait by this one.
            guest.driver.turn(0);
            while guest.driver.take_used(TRANSMIT).is_some() {}
            while guest.arrived().is_some() {}
            guest.collect();
            while guest.take().is_some() {
                guest.give(&[1536]);
            }
        }
        guest.clock.advance(STEP);
    }
    [guest.counters.from_guest.packets(), guest.counters.to_guest.packets()]
}

#[test]
fn a_limited_guest_gets_its_part_of_what_an_unlimited_one_gets() {
    // Little passes at once: enough for what comes between two steps, and next to nothing of what is measured.
    let free = RateLimit { burst_bytes: Some(FRAMES * FRAME), burst_packets: Some(8), ..RateLimit::default() };
    let unlimited = passed(free, free);
    let bytes = |part| RateLimit { bytes_per_second: Some(RATE * FRAME / part), ..free };
    let packets = |part| RateLimit { packets_per_second: Some(RATE / part), ..free };
    for (to_guest, from_guest, parts) in [
        (free, bytes(10), [10, 1]),
        (bytes(10), free, [1, 10]),
        (packets(20), packets(50), [50, 20]),
        // The stricter one decides.
        (RateLimit { packets_per_second: Some(RATE / 40), ..bytes(10) }, free, [1, 40]),
    ] {
        let limited = passed(to_guest, from_guest);
        for (way, part) in parts.into_iter().enumerate() {
            let difference = (limited[way] * part).abs_diff(unlimited[way]);
            assert!(difference <= unlimited[way] / 20, "{limited:?} of {unlimited:?}, not 1 of {parts:?}");
        }
    }
}

#[test]
fn a_burst_passes_at_once_and_the_rate_holds_afterwards() {
    let limit =
        RateLimit { packets_per_second: Some(RATE / 100), burst_packets: Some(RATE / 10), ..RateLimit::default() };
    let [sent, received] = passed(RateLimit::default(), limit);
    let expected = RATE / 10 + RATE / 100 * TIME.as_secs();
    assert!(sent.abs_diff(expected) <= 2, "{sent}, not {expected}");
    assert_eq!(received, RATE * TIME.as_secs());
}
