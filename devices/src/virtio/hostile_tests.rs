//! Rings that no honest driver builds, against a device that uses them: always a device error or an answer, never a panic, never more
//! than a bounded amount of work, never a byte outside the buffers.

use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::block::Block;
use super::driver::{ARENA, Driver, F_INDIRECT, INDIRECT, MEMORY_BYTES, NEXT, WRITE, readable, writable};
use super::rng::Rng;
use crate::overlay::Overlay;

const SIZE: u16 = 16;
/// A word in memory that most random descriptors do not name.
const CANARY: u64 = 0x5a5a_5a5a_5a5a_5a5a;
const TABLE: u64 = ARENA + 0x10_0000;

fn block() -> Driver {
    let disk = Overlay::new(None, tempfile::tempfile().unwrap(), 1 << 20).unwrap();
    Driver::new(Block::new(Arc::new(disk), [0; 20]))
}

fn started(features: u64) -> Driver {
    let mut driver = block();
    driver.start(SIZE, features);
    driver
}

/// Publishes descriptor 0 and expects the device to ask for a reset without having used anything.
fn breaks(mut driver: Driver, what: &str) {
    driver.publish(0, 0);
    driver.notify(0);
    driver.run(0);
    assert!(driver.needs_reset(), "{what}");
    assert_eq!(driver.take_interrupt(), 2, "{what}: a configuration interrupt");
    assert_eq!(driver.used_index(0), 0, "{what}");
    // It does nothing more, and a reset brings it back.
    driver.notify(0);
    driver.run(0);
    assert_eq!(driver.take_interrupt(), 0);
    driver.start(SIZE, 0);
    driver.put(ARENA, &[0; 16]);
    driver.add(0, &[readable(ARENA, 16), writable(ARENA + 512, 513)]);
    driver.notify(0);
    driver.run(0);
    assert_eq!(driver.take_used(0).map(|used| used.1), Some(513), "{what}: alive after a reset");
}

#[test]
fn descriptor_loops() {
    let driver = started(0);
    driver.write_descriptor(0, 0, ARENA, 16, NEXT, 0);
    breaks(driver, "a descriptor that follows itself");

    let driver = started(0);
    for index in 0..SIZE {
        driver.write_descriptor(0, index, ARENA, 16, NEXT, (index + 1) % SIZE);
    }
    breaks(driver, "a ring of all descriptors");

    let driver = started(F_INDIRECT);
    driver.write_descriptor(0, 0, TABLE, 64, INDIRECT, 0);
    for index in 0..4 {
        driver.write_descriptor_at(TABLE, index, ARENA, 16, NEXT, (index + 1) % 4);
    }
    breaks(driver, "a ring inside an indirect table");
}

#[test]
fn indexes_outside_their_table() {
    let driver = started(0);
    driver.write_descriptor(0, 0, ARENA, 16, NEXT, SIZE);
    breaks(driver, "a next index past the table");

    let driver = started(F_INDIRECT);
    driver.write_descriptor(0, 0, TABLE, 32, INDIRECT, 0);
    driver.write_descriptor_at(TABLE, 0, ARENA, 16, NEXT, 2);
    breaks(driver, "a next index past the indirect table");

    let mut driver = started(0);
    driver.publish(0, SIZE);
    driver.notify(0);
    driver.run(0);
    assert!(driver.needs_reset(), "a head past the table");
}

#[test]
fn addresses_and_lengths_outside_memory() {
    for (address, len) in [
        (MEMORY_BYTES, 16),
        (MEMORY_BYTES - 8, 16),
        (u64::MAX, 1),
        (u64::MAX - 15, 16),
        (u64::MAX - 15, u32::MAX),
        (0, u32::MAX),
        (ARENA, u32::MAX),
        (1 << 63, 1),
    ] {
        for flags in [0, WRITE] {
            let driver = started(0);
            driver.write_descriptor(0, 0, ARENA, 16, NEXT, 1);
            driver.write_descriptor(0, 1, address, len, flags, 0);
            breaks(driver, &format!("{len:#x} bytes at {address:#x}"));
        }
    }
}

#[test]
fn a_request_with_one_bad_buffer_does_nothing_at_all() {
    let disk = Arc::new(Overlay::new(None, tempfile::tempfile().unwrap(), 1 << 20).unwrap());
    let mut driver = Driver::new(Block::new(Arc::clone(&disk), [0; 20]));
    driver.start(SIZE, 0);
    let header = [1u32.to_le_bytes(), [0; 4], [0; 4], [0; 4]].concat();
    driver.put(ARENA, &header);
    // More than the device moves at once, then a buffer outside memory.
    driver.add(
        0,
        &[readable(ARENA, 16), readable(ARENA, 1 << 19), readable(MEMORY_BYTES - 256, 512), writable(ARENA + 512, 1)],
    );
    driver.notify(0);
    driver.run(0);
    assert!(driver.needs_reset());
    assert!(disk.dirty().is_empty());
}

#[test]
fn long_buffers_cost_no_more_than_the_device_gives() {
    let whole = (MEMORY_BYTES - ARENA) as u32;
    let mut rng = Driver::new(Rng::new());
    rng.start(64, 0);
    rng.add(0, &[writable(ARENA, whole); 64]);
    rng.notify(0);
    rng.run(0);
    assert_eq!(rng.take_used(0).map(|used| used.1), Some(64 * 1024));

    // 1.7 GiB of data for a disk of 1 MiB.
    let mut driver = block();
    driver.start(256, 0);
    driver.put(ARENA, &1u32.to_le_bytes());
    let mut buffers = vec![readable(ARENA, whole); 255];
    buffers.push(writable(0x800, 1));
    driver.add(0, &buffers);
    driver.notify(0);
    // Of this thread alone: a busy machine may not run it at once.
    let worked = || rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime).tv_sec;
    let start = worked();
    driver.run(0);
    assert!(worked() - start <= 1);
    assert_eq!(driver.take_used(0).map(|used| used.1), Some(1));
    assert_eq!(driver.get(0x800, 1), [1], "VIRTIO_BLK_S_IOERR");
}

#[test]
fn readable_after_writable() {
    let driver = started(0);
    driver.write_descriptor(0, 0, ARENA, 16, NEXT | WRITE, 1);
    driver.write_descriptor(0, 1, ARENA, 16, NEXT, 2);
    driver.write_descriptor(0, 2, ARENA, 16, WRITE, 0);
    breaks(driver, "readable after writable");
}

#[test]
fn indirect_abuse() {
    // The table itself holds a good request.
    let indirect = |len: u32, flags: u16| {
        let driver = started(F_INDIRECT);
        driver.put(ARENA, &[0; 16]);
        driver.write_descriptor(0, 0, TABLE, len, INDIRECT | flags, 1);
        driver.write_descriptor(0, 1, ARENA + 512, 1, WRITE, 0);
        driver.write_descriptor_at(TABLE, 0, ARENA, 16, NEXT, 1);
        driver.write_descriptor_at(TABLE, 1, ARENA + 512, 513, WRITE, 0);
        driver
    };
    breaks(indirect(0, 0), "an empty table");
    breaks(indirect(15, 0), "less than a descriptor");
    breaks(indirect(40, 0), "two and a half descriptors");
    breaks(indirect(16 * (u32::from(SIZE) + 1), 0), "more than the queue has");
    breaks(indirect(!15, 0), "4 GiB of table");
    breaks(indirect(32, NEXT), "a table in the middle of a chain");

    let driver = started(0);
    driver.write_descriptor(0, 0, TABLE, 16, INDIRECT, 0);
    breaks(driver, "not negotiated");

    let driver = started(F_INDIRECT);
    driver.write_descriptor(0, 0, TABLE, 16, INDIRECT, 0);
    driver.write_descriptor_at(TABLE, 0, TABLE, 16, INDIRECT, 0);
    breaks(driver, "a table in a table");

    for address in [MEMORY_BYTES, MEMORY_BYTES - 8, u64::MAX - 15, u64::MAX] {
        let driver = started(F_INDIRECT);
        driver.write_descriptor(0, 0, address, 32, INDIRECT, 0);
        breaks(driver, "a table outside memory");
    }

    // A direct part, then as many indirect descriptors as the queue has: one too many in all.
    let driver = started(F_INDIRECT);
    driver.write_descriptor(0, 0, ARENA, 16, NEXT, 1);
    driver.write_descriptor(0, 1, TABLE, 16 * u32::from(SIZE), INDIRECT, 0);
    for index in 0..SIZE {
        let flags = if index + 1 < SIZE { NEXT } else { 0 };
        driver.write_descriptor_at(TABLE, index, ARENA, 1, flags, index + 1);
    }
    breaks(driver, "longer than the queue");
}

#[test]
fn honest_indirect_chains_are_served() {
    let mut driver = started(F_INDIRECT);
    driver.put(ARENA, &[0; 16]);
    driver.write_descriptor(0, 0, ARENA, 16, NEXT, 1);
    // The write flag of the descriptor that refers to a table is ignored (virtio 1.2 §2.7.5.3.2).
    driver.write_descriptor(0, 1, TABLE, 32, INDIRECT | WRITE, 0);
    driver.write_descriptor_at(TABLE, 0, ARENA + 4096, 512, NEXT | WRITE, 1);
    driver.write_descriptor_at(TABLE, 1, ARENA + 512, 1, WRITE, 0);
    driver.publish(0, 0);
    driver.notify(0);
    driver.run(0);
    assert_eq!(driver.take_used(0), Some((0, 513)));
}

#[test]
fn available_index_jumps() {
    for index in [SIZE + 1, 1000, u16::MAX] {
        let driver = started(0);
        driver.set_available_index(0, index);
        let mut driver = driver;
        driver.notify(0);
        driver.run(0);
        assert!(driver.needs_reset(), "{index}");
        assert_eq!(driver.used_index(0), 0);
    }
    // The index may not go back either: that is a jump of almost 2^16.
    let mut driver = started(0);
    driver.put(ARENA, &[0; 16]);
    driver.add(0, &[readable(ARENA, 16), writable(ARENA + 512, 513)]);
    driver.notify(0);
    driver.run(0);
    driver.set_available_index(0, 0);
    driver.notify(0);
    driver.run(0);
    assert!(driver.needs_reset());
}

#[test]
fn rings_that_overlap_buffers_and_each_other() {
    // The data of a read lands on the device's own descriptor table and used ring.
    let mut driver = started(0);
    let [table, _, used] = Driver::ring_addresses(0, SIZE);
    driver.put(ARENA, &[0; 16]);
    driver.write_descriptor(0, 0, ARENA, 16, NEXT, 1);
    driver.write_descriptor(0, 1, table, 512, NEXT | WRITE, 2);
    driver.write_descriptor(0, 2, used, 1, WRITE, 0);
    driver.publish(0, 0);
    driver.publish(0, 0);
    driver.notify(0);
    driver.run(0);
    // The second request was erased by the first: descriptor 0 is all zero now, which is no request.
    assert!(driver.needs_reset());
}

#[derive(Clone, Debug)]
struct Scribble {
    at: u64,
    value: u64,
    len: u32,
    flags: u16,
    next: u16,
}

fn scribble() -> impl Strategy<Value = Scribble> {
    let value = prop_oneof![
        4 => ARENA..ARENA + 0x4000,
        2 => Just(TABLE),
        1 => 0..MEMORY_BYTES + 64,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => 0u32..1200, 2 => (0u32..20).prop_map(|n| n * 16), 1 => any::<u32>()];
    let flags = prop_oneof![6 => 0u16..4, 2 => 0u16..8, 1 => any::<u16>()];
    let next = prop_oneof![6 => 0u16..SIZE, 1 => any::<u16>()];
    (0u64..2 * u64::from(SIZE), value, len, flags, next).prop_map(|(at, value, len, flags, next)| Scribble {
        at,
        value,
        len,
        flags,
        next,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Random but plausible descriptors, direct and indirect, random heads, on each device: it survives, stays within its own bounds,
    /// and writes nothing outside the memory that some descriptor, or a ring, names.
    #[test]
    fn random_rings_are_survived(
        scribbles in prop::collection::vec(scribble(), 1..40),
        heads in prop::collection::vec(prop_oneof![8 => 0u16..SIZE, 1 => any::<u16>()], 1..=16),
        jump in prop_oneof![6 => Just(0u16), 1 => any::<u16>()],
        kinds in prop::collection::vec(prop_oneof![Just(0u32), Just(1), Just(4), Just(8), Just(11), Just(13), any::<u32>()], 64),
        model in 0..2,
    ) {
        let mut driver = if model == 0 { block() } else { Driver::new(Rng::new()) };
        driver.start(SIZE, !0);
        // Headers wherever a descriptor is likely to point.
        for (at, kind) in (ARENA..).step_by(256).zip(&kinds) {
            driver.put(at, &kind.to_le_bytes());
            driver.put(at + 8, &(u64::from(*kind) % 3000).to_le_bytes());
        }
        for s in &scribbles {
            let (table, index) = if s.at < SIZE.into() { (Driver::ring_base(0), s.at) } else { (TABLE, s.at - u64::from(SIZE)) };
            driver.write_descriptor_at(table, index as u16, s.value, s.len, s.flags, s.next);
        }
        for &head in &heads {
            driver.publish(0, head);
        }
        if jump != 0 {
            driver.set_available_index(0, jump);
        }
        let canary = GuestAddress(ARENA + 0x20_0000);
        let named = scribbles.iter().any(|s| s.value <= canary.0 + 8 && s.value.saturating_add(s.len.into()) > canary.0);
        driver.memory.write_obj(CANARY, canary).unwrap();
        driver.notify(0);
        driver.run(0);
        driver.device().kick_all();
        driver.run(0);
        prop_assert!(driver.used_index(0) <= SIZE || driver.needs_reset());
        if !named {
            prop_assert_eq!(driver.memory.read_obj::<u64>(canary).unwrap(), CANARY);
        }
        // Whatever happened, the device can be saved, restored and used.
        let state = driver.device().save();
        prop_assert_eq!(postcard::from_bytes(&postcard::to_stdvec(&state).unwrap()), Ok(state));
        driver.start(SIZE, 0);
        prop_assert!(!driver.needs_reset());
    }

    /// Rings full of noise.
    #[test]
    fn noise_is_survived(noise in prop::collection::vec(any::<u8>(), 600)) {
        let mut driver = started(!0);
        driver.put(Driver::ring_base(0), &noise);
        driver.notify(0);
        driver.run(0);
        driver.device().kick_all();
        driver.start(SIZE, 0);
        prop_assert!(!driver.needs_reset());
    }
}
