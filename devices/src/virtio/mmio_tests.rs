//! The transport against a driver of its own: registers, the status machine, hostile queues, saved and restored.

use super::super::driver::{ARENA, Driver, F_INDIRECT, F_VERSION_1, MEMORY_BYTES, memory, readable, writable};
use super::super::rng::{Rng, RngState};
use super::super::vsock::VsockState;
use super::*;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

fn driver() -> Driver {
    Driver::new(Rng::new())
}

fn fresh() -> MmioDevice {
    MmioDevice::new(Box::new(Rng::new()), memory(), EventFd::new(EFD_NONBLOCK).unwrap()).unwrap()
}

#[test]
fn the_identity_registers_are_those_of_a_modern_device() {
    let driver = driver();
    assert_eq!(driver.read(0), 0x7472_6976);
    assert_eq!(driver.read(4), 2);
    assert_eq!(driver.read(8), 4);
    assert_eq!(driver.offered(), F_VERSION_1 | F_INDIRECT);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), 64);
    driver.write(reg::VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), 0, "no such queue");
    assert_eq!(driver.read(reg::VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
}

#[test]
fn accesses_of_other_widths_and_places_do_nothing() {
    let driver = driver();
    let before = driver.device().save();
    for len in [1, 2, 3, 8, 16] {
        for offset in [0, 1, 2, 0x70, 0xff, 0x100, 0xfff, 0x1000, u64::MAX, u64::MAX - 3] {
            let mut data = vec![0xaa; len];
            driver.device().read(offset, &mut data);
            if offset < 0x100 {
                assert!(data.iter().all(|&byte| byte == 0));
            }
            driver.device().write(offset, &vec![1; len]);
        }
    }
    assert_eq!(driver.device().save(), before);
}

#[test]
fn features_that_were_not_offered_or_are_not_modern_are_refused() {
    let driver = driver();
    assert!(driver.negotiate(F_VERSION_1));
    assert!(driver.negotiate(F_VERSION_1 | F_INDIRECT));
    assert!(!driver.negotiate(0));
    assert!(!driver.negotiate(F_VERSION_1 | 1 << 29), "EVENT_IDX");
    assert!(!driver.negotiate(F_VERSION_1 | 1 << 63));
    // Too late to change one's mind.
    assert!(driver.negotiate(F_VERSION_1));
    driver.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    driver.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
    assert_eq!(driver.device().save().driver_features, F_VERSION_1);
}

#[test]
fn a_queue_that_is_no_queue_breaks_the_device() {
    let good = Driver::ring_addresses(0, 16);
    let end = MEMORY_BYTES;
    for (size, addresses) in [
        (0, good),
        (3, good),
        (128, good),
        (0x1_0010, good),
        (16, [good[0] + 8, good[1], good[2]]),
        (16, [good[0], good[1] + 1, good[2]]),
        (16, [good[0], good[1], good[2] + 2]),
        (16, [good[0], 0, good[2]]),
        (16, [end - 16, good[1], good[2]]),
        (16, [good[0], end - 16, good[2]]),
        (16, [good[0], good[1], end - 16]),
        (16, [u64::MAX - 15, good[1], good[2]]),
        (16, [good[0], u64::MAX - 1, good[2]]),
        (16, [good[0], good[1], u64::MAX - 3]),
    ] {
        let driver = driver();
        assert!(driver.negotiate(F_VERSION_1));
        driver.configure_queue(0, size, addresses);
        assert_eq!(driver.read(reg::VIRTIO_MMIO_QUEUE_READY), 0, "{size} {addresses:x?}");
        assert!(driver.needs_reset());
        driver.write(reg::VIRTIO_MMIO_STATUS, 15);
        assert!(!driver.device().is_active());
        assert_eq!(driver.take_interrupt(), 0, "the driver is not there yet");
    }
}

#[test]
fn a_ready_queue_cannot_be_moved_and_queues_need_features() {
    let mut driver = driver();
    driver.write(reg::VIRTIO_MMIO_STATUS, 0);
    driver.configure_queue(0, 16, Driver::ring_addresses(0, 16));
    assert_eq!(driver.read(reg::VIRTIO_MMIO_QUEUE_READY), 0);
    driver.start(16, 0);
    let before = driver.device().save();
    driver.configure_queue(0, 4, [0x5000, 0x6000, 0x7000]);
    assert_eq!(driver.device().save(), before);
    driver.write(reg::VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_QUEUE_READY), 0);
    driver.notify(0);
    driver.run(0);
    assert!(!driver.needs_reset(), "a queue that is off is left alone");
}

#[test]
fn a_reset_forgets_everything_but_counts() {
    let mut driver = driver();
    driver.start(16, F_INDIRECT);
    driver.add(0, &[writable(ARENA, 8)]);
    driver.notify(0);
    driver.run(0);
    assert_eq!(driver.completed(), 1);
    driver.write(reg::VIRTIO_MMIO_STATUS, 0);
    assert_eq!(driver.device().save(), fresh().save());
    assert_eq!(driver.completed(), 1);
}

#[test]
fn the_interrupt_comes_once_per_turn_unless_the_driver_does_not_want_it() {
    let mut driver = driver();
    driver.start(16, 0);
    driver.add(0, &[writable(ARENA, 8)]);
    driver.add(0, &[writable(ARENA, 8)]);
    driver.notify(0);
    driver.run(0);
    assert_eq!(driver.irq.read().unwrap(), 1);
    let interrupt = driver.device().interrupt();
    assert_eq!(interrupt.status(), 1);
    interrupt.acknowledge(1);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS), 0);

    driver.set_no_interrupt(0, true);
    driver.add(0, &[writable(ARENA, 8)]);
    driver.notify(0);
    driver.run(0);
    assert_eq!(driver.used_index(0), 3);
    assert_eq!(driver.take_interrupt(), 0);
}

#[test]
fn a_buffer_that_was_not_consumed_is_found_after_a_restore_without_a_notification() {
    let mut driver = driver();
    driver.start(16, 0);
    driver.add(0, &[writable(ARENA, 8)]);
    driver.notify(0);
    driver.run(0);
    driver.take_used(0).unwrap();
    // Available, and its notification is in an eventfd that stays behind.
    driver.add(0, &[writable(ARENA, 8)]);
    driver.notify(0);
    let mut next = driver.migrate(Rng::new());
    next.run(0);
    assert_eq!(next.take_used(0), None);
    next.device().kick_all();
    assert_eq!(next.take_used(0).unwrap().1, 8);
    assert_eq!(next.take_interrupt(), 1);
    // And the device lives on.
    next.add(0, &[writable(ARENA, 8)]);
    next.notify(0);
    next.run(0);
    assert_eq!(next.take_used(0).unwrap().1, 8);
}

#[test]
fn a_kick_raises_the_interrupt_even_with_nothing_to_do_and_against_the_flag() {
    let mut driver = driver();
    driver.device().kick_all();
    assert_eq!(driver.take_interrupt(), 0, "not before the driver is there");
    driver.start(16, 0);
    driver.set_no_interrupt(0, true);
    driver.device().kick_all();
    assert_eq!(driver.take_interrupt(), 1);
    driver.add(0, &[readable(ARENA, 8)]);
    driver.notify(0);
    driver.run(0);
    assert_eq!(driver.take_interrupt() & 2, 2);
    let next = driver.migrate(Rng::new());
    assert!(next.needs_reset());
    next.device().kick_all();
    assert_eq!(next.take_interrupt() & 2, 2, "a broken device says so again");
}

#[test]
fn states_of_every_stage_round_trip() {
    let mut driver = driver();
    driver.write(reg::VIRTIO_MMIO_QUEUE_SEL, 7);
    for status in [1, 3, 11] {
        driver.write(reg::VIRTIO_MMIO_STATUS, status);
        driver.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        driver.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, 1);
        let state = driver.device().save();
        let mut device = fresh();
        device.restore(&state).unwrap();
        assert_eq!(device.save(), state);
    }
    driver.start(16, 0);
    for _ in 0..40 {
        driver.add(0, &[writable(ARENA, 1)]);
        driver.notify(0);
        driver.run(0);
        driver.take_used(0).unwrap();
    }
    let state = driver.device().save();
    assert_eq!((state.queues[0].next_available, state.queues[0].next_used), (40, 40));
    assert_eq!(driver.migrate(Rng::new()).device().save(), state);
}

#[test]
fn a_state_is_not_believed() {
    let mut driver = driver();
    driver.start(16, 0);
    let good = driver.device().save();
    let refused = |change: &dyn Fn(&mut MmioState)| {
        let mut state = good.clone();
        change(&mut state);
        assert!(fresh().restore(&state).is_err(), "{state:?}");
    };
    assert!(fresh().restore(&good).is_ok());
    refused(&|s| s.device_type = 2);
    refused(&|s| s.queues.clear());
    refused(&|s| s.queues.push(QueueState::default()));
    refused(&|s| s.status = 14);
    refused(&|s| s.status |= 16);
    refused(&|s| s.interrupt_status = 4);
    refused(&|s| s.driver_features = 0);
    refused(&|s| s.driver_features |= 1 << 40);
    refused(&|s| s.queues[0].size = 0);
    refused(&|s| s.queues[0].size = 12);
    refused(&|s| s.queues[0].size = 128);
    refused(&|s| s.queues[0].descriptor_table = MEMORY_BYTES - 16);
    refused(&|s| s.queues[0].descriptor_table += 1);
    refused(&|s| s.queues[0].available_ring = u64::MAX - 1);
    refused(&|s| s.queues[0].available_ring = 0);
    refused(&|s| s.queues[0].used_ring = MEMORY_BYTES);
    refused(&|s| s.queues[0].next_available = 17);
    refused(&|s| s.queues[0].next_used = 1);
    refused(&|s| s.device = DeviceState::Vsock(VsockState { guest_cid: 3, next_host_port: 1 << 30 }));
}

#[test]
fn an_index_that_does_not_fit_the_rings_breaks_the_restored_device_and_no_more() {
    let mut driver = driver();
    driver.start(16, 0);
    let mut state = driver.device().save();
    state.queues[0].next_available = 5000;
    state.queues[0].next_used = 5000;
    let mut device =
        MmioDevice::new(Box::new(Rng::new()), driver.memory.clone(), EventFd::new(EFD_NONBLOCK).unwrap()).unwrap();
    device.restore(&state).unwrap();
    device.kick_all();
    assert_eq!(device.save().status, 15 | status::NEEDS_RESET);
}

fn queue_state() -> impl Strategy<Value = QueueState> {
    let address = || prop_oneof![Just(0x1_0000), 0..MEMORY_BYTES, any::<u64>()];
    (prop_oneof![Just(16), any::<u16>()], any::<bool>(), address(), address(), address(), any::<u16>(), 0u16..20)
        .prop_map(|(size, ready, descriptor_table, available_ring, used_ring, next_used, ahead)| QueueState {
            size,
            ready,
            descriptor_table: descriptor_table & !15,
            available_ring: available_ring & !1,
            used_ring: used_ring & !3,
            next_available: next_used.wrapping_add(ahead),
            next_used,
        })
}

proptest! {
    /// Whatever a snapshot says, and whatever is in memory: an error or a device that can be used, never a panic.
    #[test]
    fn any_state_restores_or_is_refused(
        queue in queue_state(),
        status in prop_oneof![Just(15u32), Just(11), Just(79), any::<u32>()],
        features in prop_oneof![Just(F_VERSION_1), Just(F_VERSION_1 | F_INDIRECT), any::<u64>()],
        selectors in any::<(u32, u32, u32)>(),
        seed in any::<u64>(),
    ) {
        let memory = memory();
        let mut word = seed | 1;
        for at in (0x1_0000..0x1_2000).step_by(8) {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            memory.write_obj(word, GuestAddress(at)).unwrap();
        }
        let mut device = MmioDevice::new(Box::new(Rng::new()), memory, EventFd::new(EFD_NONBLOCK).unwrap()).unwrap();
        let state = MmioState {
            device_type: 4,
            device_features_sel: selectors.0,
            driver_features_sel: selectors.1,
            driver_features: features,
            queue_sel: selectors.2,
            status,
            interrupt_status: 0,
            config_generation: 0,
            queues: vec![queue],
            device: DeviceState::Rng(RngState {}),
        };
        if device.restore(&state).is_ok() {
            device.kick_all();
            for register in (0..0x120).step_by(4) {
                device.read(register, &mut [0; 4]);
            }
            device.write(reg::VIRTIO_MMIO_STATUS.into(), &[0; 4]);
        }
        prop_assert_eq!(device.queue_events().len(), 1);
    }

    /// Random register traffic.
    #[test]
    fn any_register_traffic_is_survived(writes in prop::collection::vec((0u64..0x44, prop_oneof![0u32..20, any::<u32>()]), 0..200)) {
        let mut driver = driver();
        for (register, value) in writes {
            driver.device().write(register * 4, &value.to_le_bytes());
            driver.device().read(register * 4, &mut [0; 4]);
        }
        driver.run(0);
        driver.device().kick_all();
    }
}
